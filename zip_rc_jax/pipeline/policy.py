"""The policy stage: a demo policy is trained on worked solutions."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.data.worked_solutions import vocabulary, write_solution
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.io.tokenizer import Tokenizer, word_level
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.problems import sources_of, training_problems
from zip_rc_jax.pipeline.provenance import added_record, prompt_record
from zip_rc_jax.pipeline.rollouts import rollout_of_problem
from zip_rc_jax.pipeline.run_dir import run_directory, train_layout
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.training.trainer import train

LARGEST_NUMBER = 120  # a chain sum of 8 digits stays within 72 even if every step slips by 3


def solution_rollouts(config: PipelineConfig, tokenizer: Tokenizer) -> list[Rollout]:
    """Training texts of a demo policy as rollouts: prompts of the training split with written
    solutions.

    Raises:
      UsageError: a problem that is no chain sum, a prompt that leaves no room in a row for the
        shortest of several solutions, or see `prompt_texts`.
    """
    rng = random.Random(config.policy.train.seed)
    found = training_problems(config, config.policy.examples).problems
    rollouts = []
    for p, prompt in zip(found, prompt_texts(found, config, tokenizer), strict=True):
        if p.task != "chain_sum":
            raise UsageError(
                f"task {p.task!r}",
                "worked solutions are written for chain_sum alone",
                "set policy.path to a model that knows the task",
            )
        chat, added = config.prompt.style == "chat", config.decode.add_special_tokens
        prompt_ids = tokenizer.encode_prompt(prompt, chat=chat, add_special_tokens=added)
        # the last token is never an input
        room = config.policy.train.row_tokens + 1 - len(prompt_ids)
        for _ in range(100):  # the rare solution that does not fit is written anew
            solution = write_solution(p.question, config.policy, rng)
            output = [*tokenizer.encode(solution), tokenizer.eos_ids[0]]
            if len(output) <= room:
                break
        else:
            raise UsageError(
                f"policy.train.row_tokens={config.policy.train.row_tokens}",
                f"problem {p.index} has a prompt of {len(prompt_ids)} tokens, and none of 100 "
                "solutions fits behind it",
                "make the rows longer",
            )
        rollouts.append(rollout_of_problem(p, 0, prompt, prompt_ids, output, solution, True, 1.0))
    return rollouts


def make_policy(config: PipelineConfig) -> LanguageModel:
    """Trains a demo policy on worked solutions, from scratch or from `policy.start`; result in
    `run_dir/policy`.
    """
    if config.policy.start:
        lm = load(config.policy.start, layout=train_layout(config))
    else:
        lm = LanguageModel.create(
            config.model, word_level(vocabulary(LARGEST_NUMBER)), config.policy.train.seed
        )
        lm = dataclasses.replace(lm, layout=train_layout(config))
    text = {
        name: value
        for name, value in to_dict(config.policy).items()
        if name not in ("train", "path", "start")
    }
    source: dict[str, Any] = {"policy": text, "problems": sources_of(config)}
    if config.policy.start:
        source |= {
            "start": lm.digest(),
            **prompt_record(config, lm.tokenizer),
            **added_record(config, lm.tokenizer),
        }
    lm = lm.with_head(config.grid.grid("correct"), "correct")
    directory, rollouts, start = (
        run_directory(config) / "policy",
        solution_rollouts(config, lm.tokenizer),
        [lm],
    )
    del lm  # see `train`
    return train(
        start.pop(), rollouts, config.policy.train, directory, source=source, title="policy"
    )
