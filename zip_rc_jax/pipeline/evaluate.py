"""The held-out comparison: every method decoded online on the same problems, graded by the task's
scorer, under one cost meter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.data.problems import Problem, ProblemSet
from zip_rc_jax.data.prompts import prompt_texts, variant_of
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation import drawing, metrics, plots
from zip_rc_jax.evaluation.baselines import (
    SELF_EVALUATION,
    SamplePool,
    baseline_curves,
    majority_reward,
    self_evaluation_curve,
)
from zip_rc_jax.evaluation.compare import headline
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.report import Evaluation, pool_rows, result_rows, write_report
from zip_rc_jax.evaluation.rollout_predictions import (
    RolloutPredictions,
    length_errors,
    predict_rollouts,
)
from zip_rc_jax.evaluation.self_evaluation import SelfEvaluation
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.custom import grader_of
from zip_rc_jax.grading.grader import Grader, correct
from zip_rc_jax.grading.votes import group_answers
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, unembedding
from zip_rc_jax.pipeline.problems import HeldOutProblems, evaluation_problems
from zip_rc_jax.pipeline.provenance import prompt_record
from zip_rc_jax.pipeline.rollouts import as_rollouts, refuse_failure
from zip_rc_jax.pipeline.run_dir import load_policy, run_directory
from zip_rc_jax.pipeline.seeds import evaluation_seed, with_own_samples
from zip_rc_jax.predictions import ForwardSettings, padded_width
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.storage import (
    code_version,
    read_json,
    run_metadata,
    with_digest,
    without_digest,
    write_json,
    write_jsonl,
)
from zip_rc_jax.runtime.temporaries import remove_leftovers
from zip_rc_jax.training.loss import (
    FullTeacher,
    PolicyLoss,
    VocabChunking,
    largest_difference,
    policy_loss,
)

POLICY_RUN = "start policy"


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One strategy on all problems: its results and the grades of every prefix (`grades[p][k]` in
    {0, 1})."""

    results: list[Result]
    grades: list[list[float]]
    seconds: float


class EvaluationRunner:
    """Held-out problems, the grader, and the files that make finished decodes survive an
    interruption.

    They stay when the report has been written: with another beta, or more of them, only what is new
    is decoded.
    """

    def __init__(
        self, config: PipelineConfig, found: ProblemSet, grader: Grader, partial: pathlib.Path
    ):
        self.config, self.grader, self.partial = config, grader, partial
        self.set, self.problems = found, found.problems
        partial.mkdir(parents=True, exist_ok=True)
        remove_leftovers(partial)

    def decode(self, lm: LanguageModel, decode: DecodeConfig, title: str) -> Decoded:
        """All problems under one setting.

        Reads the result of an earlier call with the same model, setting and code.

        Raises:
          UsageError: the model failed on a problem.
        """
        seed = evaluation_seed(self.config)
        key = {
            "model": lm.digest(),
            "decode": to_dict(decode),
            "problems": self.set.record,
            "evaluate": {"seed": seed},
            "code": code_version(),  # the report names one commit, which made all of it
            **prompt_record(self.config, lm.tokenizer),
            **self.config.grade.grader_record(),  # `unfinished` is applied to what is stored
        }
        path = self.partial / (title.replace(" ", "_").replace("=", "") + ".json")
        stored = _stored(path)
        if stored.get("key") != json.loads(json.dumps(key)):
            engine = Engine(lm, decode, seed)
            started = time.perf_counter()
            found = run_all(
                engine,
                with_own_samples(prompt_texts(self.problems, self.config, lm.tokenizer), seed),
                title,
            )
            seconds = time.perf_counter() - started
            for p, result in zip(self.problems, found, strict=True):
                refuse_failure(p, result)
            stored = {
                "key": key,
                "seconds": seconds,
                "grades": None,
                "results": [r.to_dict() for r in found],
            }
            # before the grades, so that an interruption or a failure among them loses no decode
            write_json(path, with_digest(stored))
        results = [Result.from_dict(r) for r in stored["results"]]
        if stored["grades"] is None:
            items = [
                (p, x.text) for p, r in zip(self.problems, results, strict=True) for x in r.prefixes
            ]
            scores = iter([correct(s) for s in self.grader.grade_many(items)])
            stored["grades"] = [[next(scores) for _ in r.prefixes] for r in results]
            write_json(path, with_digest(stored))
        never = self.config.grade.unfinished == "wrong"
        grades = [
            [
                0.0 if never and x.finish_reason != "stop" else grade
                for x, grade in zip(r.prefixes, of_prompt, strict=True)
            ]
            for r, of_prompt in zip(results, stored["grades"], strict=True)
        ]
        return Decoded(results, grades, stored["seconds"])


def _stored(path: pathlib.Path) -> dict[str, Any]:
    """What an earlier call left; {} where there is nothing.

    Raises UsageError for a damaged file.
    """
    if not os.path.lexists(path):
        return {}
    fix = "delete it, and this setting is decoded again"
    found = read_json(path, fix=fix)
    try:
        return without_digest(found)
    except ValueError as error:
        raise UsageError(f"file {path}", f"it is damaged ({error})", fix) from None


def answer_ids(texts: Sequence[str]) -> list[int]:
    """Equal numbers for equal answers of one prompt's samples, from 0; `NO_ANSWER` where there is
    none."""
    return group_answers([extract_answer(text) for text in texts])


def sample_pool(found: Sequence[Problem], decoded: Decoded) -> SamplePool:
    """The baselines' pool from a decode with strategy "fixed".

    Raises:
      UsageError: a sample that is not finished, whose value and length are those of a prefix.
    """
    for p, r in zip(found, decoded.results, strict=True):
        if unfinished := [x.id for x in r.prefixes if x.state != "finished"]:
            raise UsageError(
                f"samples {unfinished} of problem {p.index}",
                "they are not finished",
                "decode them with strategy='fixed' and without a budget",
            )
    return SamplePool(
        correct=np.array(decoded.grades),
        answer_id=np.array([answer_ids([x.text for x in r.prefixes]) for r in decoded.results]),
        value=np.array([[x.expected_reward for x in r.prefixes] for r in decoded.results]),
        self_length=np.array([[len(x.token_ids) for x in r.prefixes] for r in decoded.results]),
        level=np.array([p.level for p in found]),
        level_names=_level_names(found),
    )


def _level_names(found: Sequence[Problem]) -> tuple[str, ...]:
    """By level; those of levels without problems are their numbers."""
    names = {p.level: p.level_name for p in found}
    return tuple(names.get(level) or str(level) for level in range(max(names) + 1))


def online_run(name: str, decode: DecodeConfig, decoded: Decoded) -> OnlineRun:
    """The cost and the answers (by value, by vote, by majority) of a decode."""

    def graded(result: Result, grades: list[float], text: str) -> float:
        # Where a budget ended the search, the answer may be that of an unfinished prefix.
        return next(
            (g for x, g in zip(result.prefixes, grades, strict=True) if x.text == text), 0.0
        )

    def majority(result: Result, grades: list[float]) -> float:
        ended = [
            (g, x.text)
            for x, g in zip(result.prefixes, grades, strict=True)
            if x.state == "finished"
        ]
        return majority_reward(
            np.array([g for g, _ in ended]), np.array(answer_ids([text for _, text in ended]))
        )

    pairs = list(zip(decoded.results, decoded.grades, strict=True))
    adaptive = decode.strategy == "zip_rc"
    return OnlineRun.from_results(
        decoded.results,
        [graded(r, g, r.value_text) for r, g in pairs],
        [graded(r, g, r.vote_text) for r, g in pairs],
        [majority(r, g) for r, g in pairs],
        name=name,
        alpha=decode.alpha if adaptive else math.nan,
        beta=decode.beta if adaptive else math.nan,
        candidates=decode.candidates if adaptive else "",
        strategy=decode.strategy,
        seconds=decoded.seconds,
    )


def policy_metrics(pool: SamplePool) -> dict[str, float]:
    """Whether the policy is worth deciding about: accuracy and reach by level, and how much longer
    the longest sample is."""
    n = pool.n_samples
    found: dict[str, float] = {}
    for level in np.unique(pool.level):
        rows = pool.level == level
        name = pool.level_title(int(level)).replace(" ", "_")
        found[f"policy/pass@1/{name}"] = float(pool.correct[rows].mean())
        found[f"policy/pass@{n}/{name}"] = float(pool.correct[rows].max(1).mean())
    found["policy/longest_over_mean"] = float(
        (pool.self_length.max(1) / pool.self_length.mean(1)).mean()
    )
    return found


def prediction_metrics(
    grid: Grid, pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]], whole: np.ndarray
) -> dict[str, float]:
    """Prediction quality of the head on the pool, whose predictions are `found[p][k]`.

    The empirical joint that TV is measured against has the final values of the prompt's own samples
    on its reward axis, as the head's labels have; with few samples per prompt it is noisy, which
    raises TV.

    Args:
      whole: `[P]` bool, prompts none of whose samples was truncated. The others have no true
        lengths, and are left out of what needs them.
    """
    auc, mixed = metrics.within_prompt_auc(pool.value, pool.correct)
    weighted, _ = metrics.within_prompt_auc(pool.value, pool.correct, pair_weighted=True)
    predicted, observed = _first_joints(grid, pool, found)
    root = metrics.length_calibration(
        np.array([row[0].remaining[0] for row in found])[whole], pool.self_length.mean(1)[whole]
    )
    return {
        "within_prompt_auc": auc,
        "within_prompt_auc/pair_weighted": weighted,
        "within_prompt_auc/mixed_prompts": float(mixed),
        "pooled_auc": metrics.auc(pool.value.ravel(), pool.correct.ravel()),
        **metrics.binary_metrics(pool.value.ravel(), pool.correct.ravel()),
        "ece": metrics.ece(pool.value.ravel(), pool.correct.ravel()),
        "brier": metrics.brier(pool.value.ravel(), pool.correct.ravel()),
        "tv/first_position": float(metrics.total_variation(predicted, observed)[whole].mean())
        if whole.any()
        else math.nan,
        "length/root_mean_error": root.mean_error,
        "length/root_mean_absolute_error": root.mean_absolute_error,
        "length/prompts_left_out": float((~whole).sum()),
    }


def _first_joints(
    grid: Grid, pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]]
) -> tuple[np.ndarray, np.ndarray]:
    """`[P, B_V, B_T]` predicted and empirical joint at the root of each prompt."""
    return np.stack([row[0].first_joint for row in found]), metrics.empirical_joint(
        pool.value, pool.self_length, grid
    )


def drift_metrics(
    start: LanguageModel, trained: LanguageModel, rollouts: Sequence[Rollout], batch_tokens: int
) -> dict[str, float]:
    """KL(start || trained) per response token on samples of the starting policy, and the largest
    difference of a next-token logit.

    Args:
      batch_tokens: see `LabelConfig`.
    """
    assert trained.head is not None
    start = start.with_head(trained.head.grid, trained.head.label, trained.head.first_id)
    width = padded_width(
        max(len(r.prompt_token_ids) + len(r.output_token_ids) - 1 for r in rollouts)
    )
    sampleable = trained.head.sampleable(trained.config.vocab_size)
    vocabulary = VocabChunking(trained.config, trained.layout, chunk=min(2048, batch_tokens))
    divergence = PolicyLoss(vocabulary, "forward", kl_weight=1, nll_weight=0)

    @jax.jit
    def compare(a: Any, b: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        ones = jnp.ones_like(tokens)

        def forward(body: Any) -> tuple[jax.Array, jax.Array]:
            hidden = forward_packed(
                trained.config, body, tokens, positions, ones, layout=trained.layout
            )
            return hidden, unembedding(trained.config, body)

        (ha, ta), (hb, tb) = forward(a), forward(b)
        kl, _ = policy_loss(
            divergence, hb, tb, tokens, mask.astype(jnp.float32), sampleable, FullTeacher(ha, ta)
        )
        return kl, largest_difference(
            vocabulary, FullTeacher(ha, ta), FullTeacher(hb, tb), mask, sampleable
        )

    total, count, largest = 0.0, 0, 0.0
    rows = trained.layout.padded(max(1, batch_tokens // width), "batch")
    with progress("drift", len(rollouts)) as bar:
        for begin in range(0, len(rollouts), rows):
            batch = rollouts[begin : begin + rows]
            tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
            for lane, r in enumerate(batch):
                ids = np.concatenate([r.prompt_token_ids, r.output_token_ids])[:-1]
                tokens[lane, : len(ids)] = ids
                mask[lane, len(r.prompt_token_ids) - 1 : len(ids)] = True
            kl, gap = compare(
                start.params["body"], trained.params["body"], jnp.asarray(tokens), jnp.asarray(mask)
            )
            total, count, largest = (
                total + float(kl),
                count + int(mask.sum()),
                max(largest, float(gap)),
            )
            bar(begin + len(batch), None)
    return {"kl_start_trained_per_token": total / count, "largest_logit_difference": largest}


def evaluate(
    config: PipelineConfig,
    lm: LanguageModel,
    *,
    argv: Sequence[str],
    lite: LanguageModel | None = None,
    problems: HeldOutProblems | None = None,
) -> Evaluation:
    """Decodes the held-out problems with every method, and writes report, plots, `results.jsonl`,
    `pool.jsonl` and `metadata.json`.

    Args:
      config: all but the sections of training and rollouts; the report goes to `run_dir/report`.
      lm: the final model. All others are put on its devices.
      argv: the command, for the record.
      lite: the ZIP-RC-Lite model, whose drift is shown next to the full one's.
      problems: what `evaluation_problems(config)` gave; None asks it.
    """
    if lm.head is None:
        raise UsageError(
            "model without a ZIP head",
            "there is nothing to evaluate",
            "train one with `zip-rc train --stage final`",
        )
    started, grid = time.time(), lm.head.grid
    directory = run_directory(config) / "report"
    e = config.evaluate
    heldout = problems or evaluation_problems(config)
    start = load_policy(config, lm.layout, config.dtype)

    # Decoding: the samples of the baselines, then every setting of the sweep. What an earlier call
    # finished is read.
    with grader_of(config.grade, directory.parent) as grader:
        bench = EvaluationRunner(config, heldout.found, grader, directory / ".partial")
        ask = SelfEvaluation(lm, bench.problems, config) if e.self_evaluation.question else None
        plain = bench.decode(
            start.with_head(grid, lm.head.label, lm.head.first_id), config.fixed_decode, POLICY_RUN
        )
        decoded = bench.decode(lm, config.fixed_decode, "fixed samples")
        pool = sample_pool(bench.problems, decoded)
        runs, traced = [], None
        for name, setting in config.sweep(length_budget=int(np.quantile(pool.self_length, 0.75))):
            outcome = bench.decode(lm, setting, name)
            runs.append(online_run(name, setting, outcome))
            if (
                traced is None
                and setting.strategy == "zip_rc"
                and setting.beta == e.headline_beta[0]
            ):
                traced = _most_eventful(outcome, bench.problems)

    def rollouts(outcome: Decoded) -> list[list[Rollout]]:
        return [
            as_rollouts(
                p,
                r,
                lm,
                config.fixed_decode.add_special_tokens,
                variant_of(config.prompt, p.question),
            )
            for p, r in zip(bench.problems, outcome.results, strict=True)
        ]

    # Predictions along the samples, by prompt.
    samples = rollouts(decoded)
    found = predict_rollouts(
        lm,
        list(itertools.chain(*samples)),
        ForwardSettings(config.label.batch_tokens),
        "predictions",
    )
    finished: np.ndarray = np.array(
        [[x.finish_reason == "stop" for x in r.prefixes] for r in decoded.results]
    )
    whole: np.ndarray = np.all(finished, axis=1)
    by_prompt = [found[i : i + pool.n_samples] for i in range(0, len(found), pool.n_samples)]

    # Baselines from the samples, among them the model's own opinion if it is asked.
    curves, asked = baseline_curves(pool), dict[str, float]()
    if ask is not None:
        values, extra = ask(samples)
        curves[SELF_EVALUATION] = self_evaluation_curve(pool, values, extra)
        asked = {
            "self_evaluation/within_prompt_auc": metrics.within_prompt_auc(values, pool.correct)[0]
        }

    # Comparison.
    evaluation = Evaluation(
        metadata={},
        pool=pool,
        curves=curves,
        runs=tuple(runs),
        alphas=e.alphas,
        headline=headline(
            runs,
            curves,
            pool,
            alphas=e.alphas,
            headline_beta=e.headline_beta,
            resamples=e.bootstrap,
            seed=e.seed,
        ),
        quality=policy_metrics(pool) | prediction_metrics(grid, pool, by_prompt, whole) | asked,
        answer=config.decode.answer,
        drift=_drift(
            start,
            lm,
            lite,
            list(itertools.chain(*rollouts(plain)))[: e.drift_rollouts],
            pool,
            sample_pool(bench.problems, plain),
            config,
        ),
        joint=_joint_figure(grid, pool, by_prompt, whole),
        calibration=plots.calibration_figure(
            pool.value.ravel(),
            pool.correct.ravel(),
            length_errors([p for p, ended in zip(found, finished.ravel(), strict=True) if ended]),
        ),
        trace=plots.trace_figure(traced) if traced else None,
        resamples=e.bootstrap,
        seed=e.seed,
    )
    # The clock of the metadata stops here, when everything has been decoded and compared.
    evaluation = dataclasses.replace(
        evaluation,
        metadata=run_metadata(to_dict(config), argv, started)
        | {"problems": heldout.record, "notes": list(heldout.notes)},
    )
    write_report(directory, evaluation)
    write_jsonl(
        directory / "results.jsonl", result_rows(runs, pool, [p.question for p in bench.problems])
    )
    write_jsonl(directory / "pool.jsonl", pool_rows(pool))
    metrics_found = {"quality": evaluation.quality, "drift": evaluation.drift}
    write_json(
        directory / "metadata.json",
        {**evaluation.metadata, **prompt_record(config, lm.tokenizer), **metrics_found},
    )
    return evaluation


def _drift(
    start: LanguageModel,
    lm: LanguageModel,
    lite: LanguageModel | None,
    rollouts: Sequence[Rollout],
    pool: SamplePool,
    start_pool: SamplePool,
    config: PipelineConfig,
) -> dict[str, float]:
    """KL of the full (and Lite) model from the starting policy, and how the accuracy of plain
    sampling changed, per prompt."""
    settings, tokens = config.evaluate, config.label.batch_tokens
    change = metrics.paired_bootstrap(
        pool.correct.mean(1) - start_pool.correct.mean(1), settings.bootstrap, settings.seed
    )
    drift = {f"full/{k}": v for k, v in drift_metrics(start, lm, rollouts, tokens).items()}
    drift |= {
        f"full/sampling_accuracy_change/{k}": v
        for k, v in zip(("mean", "low", "high"), change, strict=True)
    }
    return drift | (
        {}
        if lite is None
        else {f"lite/{k}": v for k, v in drift_metrics(start, lite, rollouts, tokens).items()}
    )


def _joint_figure(
    grid: Grid, pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]], whole: np.ndarray
) -> Figure | None:
    """Predicted against empirical joint at the root, mean over the prompts of each level; `whole`
    as in `prediction_metrics`."""
    levels = np.unique(pool.level[whole])
    if not len(levels):
        return None
    predicted, observed = (
        np.stack([x[whole & (pool.level == level)].mean(0) for level in levels])
        for x in _first_joints(grid, pool, found)
    )
    return drawing.joint_heatmaps(
        predicted, observed, grid, [pool.level_title(int(level)) for level in levels]
    )


def _most_eventful(decoded: Decoded, found: Sequence[Problem]) -> Result:
    """The result whose trace shows most: of the hardest level, right, with the most paused
    prefixes."""
    hardest = max(p.level for p in found)
    ranked = [
        (sum(x.state == "paused" for x in r.prefixes) + 10 * any(g), -i)
        for i, (p, r, g) in enumerate(zip(found, decoded.results, decoded.grades, strict=True))
        if p.level == hardest
    ]
    return decoded.results[-max(ranked)[1]]
