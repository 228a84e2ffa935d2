"""The rollout stage: the starting policy is sampled on the training problems."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.prompts import prompt_texts, variant_of
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.chunks import write_in_chunks
from zip_rc_jax.pipeline.problems import training_problems
from zip_rc_jax.pipeline.provenance import added_record, check_same_source, prompt_record
from zip_rc_jax.pipeline.run_dir import (
    check_output,
    check_policy,
    in_run_dir,
    load_policy,
    run_directory,
)
from zip_rc_jax.pipeline.seeds import with_own_samples
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, devices_worth_using, side_by_side


@in_run_dir("rollout")
def make_rollouts(config: PipelineConfig) -> pathlib.Path:
    """Samples the policy on the training problems; result in `run_dir/rollouts`. Finished chunks
    survive an interruption.

    Several processes share the chunks that are not there yet. A sample depends on the seed, its
    prompt and how many problems before it have the same one, so the result is the same for any
    number of them, also if it changes between an interruption and the next start.

    Raises:
      UsageError: `config.data` names other rollouts, the directory holds some of other settings, or
        the policy or task is impossible.
    """
    if config.data:
        raise UsageError(
            f"data={config.data!r}",
            "this stage samples rollouts itself",
            "leave data out, or go on with `zip-rc grade`",
        )
    r, directory = config.rollout, run_directory(config) / "rollouts"
    check_output(config, "rollouts")
    rows = max(r.rows, r.samples)
    check_policy(config)
    # Problems first: what is wrong with them shows before a model is loaded.
    problems = training_problems(config, r.prompts)
    found = problems.problems
    policy = load_policy(config, sampling_layout(rows, r.samples), config.dtype)
    settings = {
        "rollout": to_dict(r),
        "problems": problems.record,
        "policy": policy.digest(),
        **prompt_record(config, policy.tokenizer),
    }
    settings |= added_record(config, policy.tokenizer)
    if directory.is_dir():
        check_same_source(directory, settings)
        return directory

    # Every problem is a request with samples of its own.
    requests = with_own_samples(prompt_texts(found, config, policy.tokenizer), r.seed)

    # Plain sampling on the one engine there is.
    decode = DecodeConfig(
        strategy="fixed",
        n=r.samples,
        max_num_seqs=rows,
        interval=16,
        window=1,
        max_tokens=r.max_tokens,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        add_special_tokens=config.decode.add_special_tokens,
    )
    # The joint is not read here; a head is attached so that sampling runs on the one engine there
    # is.
    engine = Engine(policy.with_head(config.grid.grid("correct"), "correct"), decode, r.seed)

    def sample(part: Sequence[Problem]) -> list[Rollout]:
        results = run_all(engine, [requests[p.index] for p in part])
        return [
            x
            for p, result in zip(part, results, strict=True)
            for x in as_rollouts(
                p,
                result,
                policy,
                decode.add_special_tokens,
                variant_of(config.prompt, p.question),
            )
        ]

    return write_in_chunks(
        "rollout", directory, settings, found, max(1, rows // r.samples) * 4, sample, each=r.samples
    )


def sampling_layout(rows: int, samples: int) -> Layout:
    """Most devices of this process worth using over which `rows` rows divide, with room for all
    samples of a prompt on each; else one.
    """
    devices = devices_worth_using()
    used = max(
        (
            count
            for count in range(1, devices + 1)
            if rows % count == 0 and rows // count >= samples
        ),
        default=1,
    )
    return side_by_side(used, DECODE_RULES)


def refuse_failure(p: Problem, result: Result) -> None:
    """Raises UsageError if the model failed on the prompt; what broke off there is no sample of the
    policy.
    """
    if result.error:
        raise UsageError(
            f"problem {p.index} (level {p.level}, seed {p.seed})",
            result.error,
            "look at the model's weights and dtype",
        )


def as_rollouts(
    p: Problem, result: Result, lm: LanguageModel, add_special_tokens: bool, variant: int = 0
) -> list[Rollout]:
    """The prefixes of a result as ungraded rollouts. Raises as `refuse_failure`.

    Args:
      add_special_tokens: as in the `DecodeConfig` that it was decoded with.
      variant: of the prompt.
    """
    refuse_failure(p, result)
    chat = result.template_hash is not None
    prompt_ids = lm.tokenizer.encode_prompt(
        result.prompt, chat=chat, add_special_tokens=add_special_tokens
    )
    return [
        rollout_of_problem(
            p,
            x.id,
            result.prompt,
            prompt_ids,
            x.token_ids,
            x.text,
            x.finish_reason == "stop",
            variant=variant,
        )
        for x in result.prefixes
    ]


def rollout_of_problem(
    p: Problem,
    sample: int,
    prompt: str,
    prompt_ids: Any,
    output: Any,
    text: str,
    finished: bool,
    grade: float = math.nan,
    variant: int = 0,
) -> Rollout:
    return Rollout(
        prompt_index=p.index,
        sample_index=sample,
        level=p.level,
        seed=p.seed,
        task=p.task,
        prompt=prompt,
        question=p.question,
        answer=p.answer,
        entry_json=p.entry_json,
        prompt_token_ids=prompt_ids,
        output_token_ids=output,
        response=text,
        finished=finished,
        correct=grade,
        level_name=p.level_name,
        problem_id=p.id,
        source=p.source,
        variant=variant,
    )
