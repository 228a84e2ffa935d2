"""The pool of a replay: full samples of the problems, graded, with the joints along each and with
what the baselines read of them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.config.plugins import ANSWER_EXTRACTORS
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.prompts import prompt_texts, variant_of
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.data.sample_pool import (
    PartialPool,
    PoolFiles,
    PoolSample,
    block_means,
    packed,
    tail_means,
)
from zip_rc_jax.evaluation.pool_readings import stored_readings
from zip_rc_jax.grading.custom import grader_of
from zip_rc_jax.grading.grader import correct
from zip_rc_jax.grading.votes import answer_groups
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import Request, TokenizedRequest, prompt_hash
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.evaluation.benchmarks import Benchmark, with_problems
from zip_rc_jax.pipeline.evaluation.stages import judged, opinions
from zip_rc_jax.pipeline.problems import tell
from zip_rc_jax.pipeline.provenance import prompt_record, prompt_settings
from zip_rc_jax.pipeline.rollouts import refuse_failure, rollout_of_problem
from zip_rc_jax.pipeline.seeds import evaluation_seed, try_seed, with_own_samples
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.signals import Interrupted, stop_signal
from zip_rc_jax.runtime.storage import code_version, plain

MOST_PAIRS = 500  # of answers that are compared to find out whether subsets are grouped alike
# Options of a decode that decide its samples, their joints or their answers.
SHAPING = (
    "window",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "stop",
    "add_special_tokens",
    "answer_extractor",
    "answer_equivalence",
)


def pool_decode(config: PipelineConfig) -> DecodeConfig:
    """How the samples of a pool are drawn: as those of an evaluation with the same seed, and with a
    decision wherever a joint is stored."""
    return dataclasses.replace(
        config.fixed_decode,
        n=config.replay.samples,
        interval=config.replay.stride_for(config.decode.interval),
        candidates="published",
    )


def held_out(benchmark: Benchmark) -> Sequence[Problem]:
    """The problems of a planned benchmark. Tells what is worth saying about them.

    Raises UsageError as `with_problems`.
    """
    problems = with_problems(benchmark).problems
    for note in problems.notes:
        tell(note)
    return problems.found.problems


def pool_settings(config: PipelineConfig) -> dict[str, Any]:
    """What decides a pool, as far as it is known without the model."""
    shaping = to_dict(config.decode)
    return {
        "decode": {name: shaping[name] for name in SHAPING},
        "problems": to_dict(config.problems),
        "prompt": prompt_settings(config),
        "dtype": config.dtype,
        "evaluate": {"prompts": config.evaluate.prompts, "seed": evaluation_seed(config)},
        **config.grade.grader_record(),  # `unfinished` is applied to what is stored
    }


def planned_pool(config: PipelineConfig, tries: int = 1) -> dict[str, Any]:
    """What the metadata of a pool that is still to be made will say of its decode."""
    decode = pool_decode(config)
    return {
        "samples": decode.n,
        "tries": tries,
        "stride": decode.interval,
        "window": decode.window,
        "joints": config.replay.joints,
        "settings": pool_settings(config),
    }


def check_pool(files: PoolFiles, config: PipelineConfig, tries: int = 1) -> None:
    """Checks that a pool is of the settings of `config`, without the model.

    Raises:
      UsageError: it was made with others; the message names them.
    """
    known = pool_settings(config) | {"joints": config.replay.joints}
    about = files.metadata
    stored = {name: about["settings"].get(name) for name in known}
    known["tries"], stored["tries"] = tries, about.get("tries", 1)
    if config.replay.stride:
        known["stride"], stored["stride"] = config.replay.stride, about["stride"]
    fix = "restore these settings, use another run_dir, or delete it to make it again"
    check_same_settings(f"pool {files.directory}", stored, plain(known), fix=fix)
    if config.replay.samples > about["samples"]:
        raise UsageError(
            f"replay.samples={config.replay.samples}",
            f"pool {files.directory} has {about['samples']} samples of every problem",
            f"use at most {about['samples']}, or delete the pool to make a larger one",
        )


def make_pool(
    config: PipelineConfig,
    lm: LanguageModel,
    directory: pathlib.Path,
    source: Mapping[str, Any],
    found: Sequence[Problem],
    tries: int = 1,
) -> PoolFiles:
    """Draws and grades the samples, and writes the pool. Finished files survive an interruption.

    Args:
      lm: a model with a head.
      source: what is known of the model's files, for later calls.
      found: the problems.
      tries: how often each is decoded, every time with other random numbers.

    Raises:
      UsageError: the model failed on a problem, a file is damaged, or what an interruption left is
        of other settings.
      Interrupted: a signal to stop came. The file in hand is finished first.
    """
    assert lm.head is not None
    decode, kind, seed = pool_decode(config), config.replay.joints, evaluation_seed(config)
    judges = opinions(config, lm, found)
    prompts = prompt_texts(found, config, lm.tokenizer)
    drawn = [with_own_samples(prompts, try_seed(config, number)) for number in range(tries)]
    # The tries of a problem follow each other, as in the pool of an evaluation.
    requests = [request for of_problem in zip(*drawn, strict=True) for request in of_problem]
    rows = [p for p in found for _ in range(tries)]
    rows = [dataclasses.replace(p, index=row) for row, p in enumerate(rows)]
    recorder = JointRecorder()
    engine = Engine(lm, decode, seed, observer=recorder)
    # One file holds the prompts that are decoded together, twice over.
    size = max(1, 2 * engine.rows * engine.shards // decode.n)
    settings = pool_settings(config) | {
        "joints": kind,
        "stride": decode.interval,
        "samples": decode.n,
        **({"tries": tries} if tries > 1 else {}),
        "model": lm.digest(),
        **prompt_record(config, lm.tokenizer),
    }
    partial = PartialPool(directory, settings | {"problems_per_file": size})
    count = -(-len(rows) // size)
    done = partial.done() & set(range(count))
    with stop_signal() as received, grader_of(config.grade, directory.parent) as grader:
        with progress("pool", len(rows), min(len(done) * size, len(rows))) as bar:
            tokens = 0
            for made, number in enumerate(sorted(set(range(count)) - done), len(done) + 1):
                part = slice(number * size, (number + 1) * size)
                results = decode_with_joints(engine, requests[part], recorder)
                for p, result in zip(rows[part], results, strict=True):
                    refuse_failure(p, result)
                texts = _texts(rows[part], results)
                grades = [correct(score) for score in grader.grade_many(texts)]
                samples = pool_samples(
                    rows[part], results, recorder, grades, decode, lm.head.grid, kind
                )
                partial.add(number, samples)
                tokens += sum(r.usage.tokens for r in results)
                bar(min(made * size, len(rows)), f"{tokens:,} tokens")
                if received:
                    raise Interrupted(f"pool: stopped after {made} of {count} files")
        drawn_samples = partial.records(count, ("token_ids",))
        rollouts = _as_rollouts(drawn_samples, found, prompts, config, lm)
        readings = judged(config, lm, rollouts, judges, decode.n)
        metadata = planned_pool(config, tries) | {
            "grid": lm.head.grid.to_dict(),
            "head": lm.head.identity(),
            "prompts": len(rows),
            "source": dict(source),
            "code": code_version(),
            "readings": readings_settings(config) | {"parameter_ratio": readings.parameter_ratio},
        }
        partial.finish(count, len(rows) * decode.n, metadata, stored_readings(readings))
    return PoolFiles(directory)


def readings_settings(config: PipelineConfig) -> dict[str, Any]:
    """What decides the readings of a pool: an entry is None where nothing is read."""
    e = config.evaluate
    return {
        "statistics": True if e.baselines == "all" else None,
        "self_evaluation": to_dict(e.self_evaluation) if e.self_evaluation.question else None,
        "reward_model": to_dict(e.reward_model) if e.reward_model.path else None,
    }


def _as_rollouts(
    records: Iterable[Mapping[str, Any]],
    found: Sequence[Problem],
    prompts: Sequence[str],
    config: PipelineConfig,
    lm: LanguageModel,
) -> list[list[Rollout]]:
    """The samples of every problem, those of a try in a row, for forwards over them."""
    rows: list[list[Rollout]] = [[] for _ in found]
    flat, chat = list(records), config.prompt.style == "chat"
    each = len(flat) // len(found)
    added = config.fixed_decode.add_special_tokens
    for number, (p, prompt) in enumerate(zip(found, prompts, strict=True)):
        ids = lm.tokenizer.encode_prompt(prompt, chat=chat, add_special_tokens=added)
        variant = variant_of(config.prompt, p.question)
        rows[number] = [
            rollout_of_problem(
                p, k, prompt, ids, x["token_ids"], x["text"], x["stopped"], variant=variant
            )
            for k, x in enumerate(flat[number * each : (number + 1) * each])
        ]
    return rows


class JointRecorder:
    """The joints of all prefixes of a decode, as the engine tells of them."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int], list[np.ndarray]] = collections.defaultdict(list)

    def __call__(self, number: int, prefix: int, joints: np.ndarray) -> None:
        self.parts[number, prefix].append(joints.copy())

    def of(self, number: int, prefix: int, root: np.ndarray) -> np.ndarray:
        """Joints after 0, 1, ... of all computed tokens, `[computed + 1, C]`."""
        return np.concatenate([root.reshape(1, -1), *self.parts[number, prefix]])


def decode_with_joints(
    engine: Engine, requests: Sequence[Request], recorder: JointRecorder
) -> list[Result]:
    """Results with the joints of every decision, in order; `recorder` is the engine's observer."""
    recorder.parts.clear()
    jobs = [
        dataclasses.replace(job, joints=True) if isinstance(job, TokenizedRequest) else job
        for job in engine.processor.tokenize(list(requests))
    ]
    found = {
        event.prompt_index: event.result
        for event in engine.decode(jobs, stream=False)
        if isinstance(event, ResultEvent)
    }
    return [found[i] for i in range(len(requests))]


def _texts(found: Sequence[Problem], results: Sequence[Result]) -> list[tuple[Problem, str]]:
    return [(p, x.text) for p, r in zip(found, results, strict=True) for x in r.prefixes]


def pool_samples(
    found: Sequence[Problem],
    results: Sequence[Result],
    recorder: JointRecorder,
    grades: Sequence[float],
    decode: DecodeConfig,
    grid: Grid,
    kind: str,
) -> Iterator[PoolSample]:
    """The records of some problems, one sample after the other.

    Args:
      results, recorder: of `decode_with_joints`.
      grades: of all their samples.
      decode: as they were decoded.
      kind: of the joints, see `packed`.
    """
    grade = iter(grades)
    for number, (problem, result) in enumerate(zip(found, results, strict=True)):
        texts = [x.text for x in result.prefixes]
        ids = answer_groups(texts, decode.answer_extractor, decode.answer_equivalence)
        alike = separable(texts, ids, decode)
        trace = [np.asarray(decision.joints) for decision in result.trace]
        root = trace[0][0].reshape(-1)
        for k, prefix in enumerate(result.prefixes):
            length = len(prefix.token_ids)
            steps = recorder.of(number, prefix.id, root)
            along = steps[:length]
            points = (length - 1) // decode.interval
            decided = [trace[i][k].reshape(-1) for i in range(1, points + 1)]
            joints = {
                "root": root,
                "joints": np.reshape(decided, (points, grid.n_cells)),
                "end": trace[-1][k].reshape(-1),
                "blocks": block_means(along, decode.interval),
                "tail": tail_means(along, decode.interval),
            }
            tables = along.reshape(length, grid.n_reward, grid.n_length)
            yield PoolSample(
                prompt_index=problem.index,
                sample_index=k,
                prompt_hash=prompt_hash(result.prompt_token_ids),
                level=problem.level,
                question=problem.question,
                reference=problem.answer,
                text=prefix.text,
                answer_id=ids[k],
                separable=alike,
                stopped=prefix.finish_reason == "stop",
                correct=next(grade),
                value=prefix.expected_reward,
                computed=len(steps) - 1,
                token_ids=np.asarray(prefix.token_ids, np.int32),
                logprobs=np.asarray(prefix.logprobs, np.float32),
                rewards=(tables.sum(-1) @ np.asarray(grid.reward_centres)).astype(np.float32),
                **{name: packed(x, kind) for name, x in joints.items()},
            )


def separable(texts: Sequence[str], ids: Sequence[int], decode: DecodeConfig) -> bool:
    """Whether every subset of these texts is grouped as all of them are: no two answers of
    different groups are equal.

    Where there are too many to compare, the answer is no, and subsets are grouped one by one.
    """
    extract = ANSWER_EXTRACTORS.resolve(decode.answer_extractor)
    different = {extract(text): number for text, number in zip(texts, ids, strict=True)}
    different.pop(None, None)
    pairs = [(a, b) for (a, m), (b, k) in itertools.combinations(different.items(), 2) if m != k]
    if len(pairs) > MOST_PAIRS:
        return False
    return not any(
        len(set(answer_groups(pair, _as_it_is, decode.answer_equivalence))) == 1 for pair in pairs
    )


def _as_it_is(answer: str) -> str:
    return answer
