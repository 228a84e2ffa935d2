"""The stages of an evaluation, each from records to a record: decode, predict, measure, compare,
write."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig, PipelineConfig
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.prompts import conversations, prompt_time, variant_of
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation import metrics, plots
from zip_rc_jax.evaluation.baselines import (
    SELF_EVALUATION,
    BaselinePoint,
    SamplePool,
    baseline_curves,
    self_evaluation_curve,
)
from zip_rc_jax.evaluation.compare import headline
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.method_curves import method_curves
from zip_rc_jax.evaluation.report import Evaluation
from zip_rc_jax.evaluation.reward_model import RewardModelScorer, reward_model_curves
from zip_rc_jax.evaluation.rollout_predictions import (
    RolloutPredictions,
    length_errors,
    predict_rollouts,
)
from zip_rc_jax.evaluation.self_evaluation import SelfEvaluation
from zip_rc_jax.evaluation.token_statistics import token_statistics
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.evaluation.benchmarks import Benchmark
from zip_rc_jax.pipeline.evaluation.drift import drift
from zip_rc_jax.pipeline.evaluation.pool import (
    joined_pools,
    joined_runs,
    most_eventful,
    online_run,
    sample_pool,
)
from zip_rc_jax.pipeline.evaluation.predictions import (
    TABLE,
    by_problem,
    chosen_prompts,
    joint_figure,
    known_bins,
    policy_metrics,
    prediction_metrics,
    prompt_joints_figure,
    with_values_of,
)
from zip_rc_jax.pipeline.evaluation.runner import Decoded, EvaluationRunner
from zip_rc_jax.pipeline.rollouts import as_rollouts
from zip_rc_jax.predictions import ScoringConfig

POLICY_RUN = "start policy"
GROUPS = 4  # groups of tokens in a mean sample, for DeepConf; the authors' group has 2,048
AUTHORS_GROUP = 2048


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of an evaluation, on the same devices.

    Attributes:
      lm: the final model, with a head.
      start: the starting policy.
      lite: ZIP-RC-Lite; None if there is none.
    """

    lm: LanguageModel
    start: LanguageModel
    lite: LanguageModel | None = None

    @property
    def grid(self) -> Grid:
        assert self.lm.head is not None
        return self.lm.head.grid


@dataclasses.dataclass(frozen=True)
class Opinions:
    """Who else judges the samples.

    Made before anything is decoded, so that what must be refused is refused then.

    Attributes:
      policy: the policy itself, if it is asked.
      reward_model: another model, if one is named.
    """

    policy: SelfEvaluation | None
    reward_model: RewardModelScorer | None


@dataclasses.dataclass(frozen=True)
class Decodes:
    """Everything that was decoded.

    Attributes:
      pool: all tries of all problems, see `SamplePool.tries`.
      runs: every setting of the sweep, in the order of the pool's rows.
      samples: `[P][tries * N]` rollouts of the pool, those of a try in a row.
      start_samples: `[P][N]` of the starting policy, of one try.
      start_change: `[P]`, by how much plain sampling got better from the starting policy to the
        final one, in the same try.
      traced: the result whose trace shows most.
    """

    pool: SamplePool
    runs: tuple[OnlineRun, ...]
    samples: list[list[Rollout]]
    start_samples: list[list[Rollout]]
    start_change: np.ndarray
    traced: Result | None


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the heads say along the samples, by problem.

    Attributes:
      full, lite: `[P][tries * N]`; `lite` is None without such a model.
      finished: `[P, tries * N]` bool, samples that ended by themselves.
    """

    full: list[list[RolloutPredictions]]
    lite: list[list[RolloutPredictions]] | None
    finished: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """`[P]` bool, problems none of whose samples was cut off."""
        return np.asarray(self.finished.all(axis=1))


Curves = dict[str, tuple[BaselinePoint, ...]]


# ---- before decoding


def opinions(benchmark: Benchmark, models: Models) -> Opinions:
    """Raises UsageError as `SelfEvaluation` and `RewardModelScorer`."""
    config, problems = benchmark.config, benchmark.problems.found.problems
    e = config.evaluate
    policy = SelfEvaluation(models.lm, problems, config) if e.self_evaluation.question else None
    scorer = None
    if e.reward_model.path:
        turns: Any = (
            conversations(problems, config)
            if config.prompt.style == "chat"
            else [[{"role": "user", "content": p.question}] for p in problems]
        )
        now = prompt_time(config, models.lm.tokenizer)
        tokens = config.decode.max_tokens
        scorer = RewardModelScorer(models.lm, turns, e.reward_model, max_tokens=tokens, now=now)
    return Opinions(policy, scorer)


# ---- decode


def decode(benchmark: Benchmark, models: Models, grader: Grader) -> Decodes:
    """The samples of the baselines, and every setting of the sweep, in every try.

    What an earlier call finished is read. The length budget of the pruning rule is a quantile of
    the first try.
    """
    config, found = benchmark.config, benchmark.problems.found
    head = models.lm.head
    assert head is not None
    partial = benchmark.directory / ".partial"
    pools, runs, samples = list[SamplePool](), dict[str, list[OnlineRun]](), list[Any]()
    traced = None
    for number in range(benchmark.tries):
        place = partial / f"try_{number + 1}" if number else partial
        bench = EvaluationRunner(config, found, grader, place, number)
        title = f"try {number + 1} of {benchmark.tries}: " if benchmark.tries > 1 else ""
        if number == 0:
            # Only the drift reads it, and one try says enough of that.
            start = bench.decode(
                models.start.with_head(head.grid, head.label, head.first_id),
                config.fixed_decode,
                POLICY_RUN,
            )
        outcome = bench.decode(models.lm, config.fixed_decode, "fixed samples", title)
        pools.append(sample_pool(found.problems, outcome, config.decode))
        samples.append(_rollouts(outcome, found.problems, models.lm, config))
        budget = int(np.quantile(pools[0].self_length, 0.75))
        for name, setting in config.sweep(length_budget=budget):
            decoded = bench.decode(models.lm, setting, name, title)
            runs.setdefault(name, []).append(online_run(name, setting, decoded))
            if traced is None and _is_headline(setting, config):
                traced = most_eventful(decoded, found.problems)
    start_pool = sample_pool(found.problems, start, config.decode)
    return Decodes(
        joined_pools(pools),
        tuple(joined_runs(tries) for tries in runs.values()),
        [list(itertools.chain(*tries)) for tries in zip(*samples, strict=True)],
        _rollouts(start, found.problems, models.lm, config),
        pools[0].correct.mean(1) - start_pool.correct.mean(1),
        traced,
    )


def _is_headline(setting: DecodeConfig, config: PipelineConfig) -> bool:
    return setting.strategy == "zip_rc" and setting.beta == config.evaluate.headline_beta[0]


def _rollouts(
    outcome: Decoded, problems: Sequence[Problem], lm: LanguageModel, config: PipelineConfig
) -> list[list[Rollout]]:
    special = config.fixed_decode.add_special_tokens
    return [
        as_rollouts(p, r, lm, special, variant_of(config.prompt, p.question))
        for p, r in zip(problems, outcome.results, strict=True)
    ]


# ---- predict


def predict(benchmark: Benchmark, models: Models, decodes: Decodes) -> Heads:
    """Predictions of both heads along all samples."""
    flat = list(itertools.chain(*decodes.samples))
    settings = ScoringConfig(benchmark.config.label.batch_tokens)
    each = len(decodes.samples[0])

    def along(lm: LanguageModel, title: str) -> list[list[RolloutPredictions]]:
        found = predict_rollouts(lm, flat, settings, title)
        return [found[i : i + each] for i in range(0, len(found), each)]

    return Heads(
        along(models.lm, "predictions"),
        None if models.lite is None else along(models.lite, "predictions of Lite"),
        np.array([[sample.finished for sample in row] for row in decodes.samples]),
    )


# ---- measure: methods that read the pool


def measure(
    benchmark: Benchmark, models: Models, decodes: Decodes, heads: Heads, others: Opinions
) -> tuple[Curves, dict[str, float]]:
    """Curves of all baselines, and how well the policy judges itself if it is asked."""
    config, pool = benchmark.config, decodes.pool
    curves, asked = baseline_curves(pool), dict[str, float]()

    def rows(found: Any) -> Any:
        return np.asarray(found).reshape(pool.correct.shape)

    if others.policy is not None:
        values, extra = (rows(x) for x in others.policy(decodes.samples))
        curves[SELF_EVALUATION] = self_evaluation_curve(pool, values, extra)
        auc = metrics.within_prompt_auc(values, pool.correct)[0]
        asked = {"self_evaluation/within_prompt_auc": auc}
    if others.reward_model is not None:
        scorer = others.reward_model
        scores, extra = (rows(x) for x in scorer(decodes.samples))
        curves |= reward_model_curves(pool, scores, extra, serial_steps=scorer.parameter_ratio)
        auc = metrics.within_prompt_auc(scores, pool.correct)[0]
        asked["reward_model/within_prompt_auc"] = auc
    if config.evaluate.baselines == "all":
        curves |= _further_curves(config, models, decodes, heads)
    return curves, asked


def _further_curves(
    config: PipelineConfig, models: Models, decodes: Decodes, heads: Heads
) -> Curves:
    """Those of `method_curves`, at their default settings and the decoder's window and interval."""
    pool = decodes.pool
    each = pool.n_samples

    def by_try(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        flat = list(itertools.chain(*rows))
        return [flat[i : i + each] for i in range(0, len(flat), each)]

    statistics = token_statistics(
        models.lm,
        list(itertools.chain(*decodes.samples)),
        ScoringConfig(config.label.batch_tokens),
        title="token statistics",
    )
    traces = [[window_means(x.reward, config.decode.window) for x in row] for row in heads.full]
    # A mean of rewards may lie a rounding error past 1.
    rounded = dataclasses.replace(pool, value=np.clip(pool.value, 0, 1))
    return method_curves(
        rounded,
        statistics=by_try([statistics]),
        window=min(AUTHORS_GROUP, max(1, round(pool.self_length.mean() / GROUPS))),
        traces=by_try(traces),
        interval=config.decode.interval,
        draws=Draws(seed=config.evaluate.seed),
    )


def window_means(trace: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and those before it, `window` in all: float64, as long as `trace`."""
    total = np.concatenate([[0.0], np.cumsum(trace, dtype=np.float64)])
    end = np.arange(1, len(trace) + 1)
    begin = np.maximum(0, end - window)
    return (total[end] - total[begin]) / (end - begin)


# ---- compare


def compare(
    benchmark: Benchmark,
    models: Models,
    decodes: Decodes,
    heads: Heads,
    curves: Curves,
    asked: dict[str, float],
) -> Evaluation:
    """Everything that a report shows, but for its metadata."""
    config, grid, pool = benchmark.config, models.grid, decodes.pool
    e, whole, problems = config.evaluate, heads.whole, by_problem(pool)
    known = known_bins(grid, heads.finished, problems.self_length)
    quality = prediction_metrics(grid, problems, heads.full, whole, known)
    columns = {"full": quality}
    if models.lite is not None and heads.lite is not None:
        assert models.lite.head is not None
        own = with_values_of(problems, heads.lite, config.decode.window)
        columns["Lite"] = prediction_metrics(models.lite.head.grid, own, heads.lite, whole, known)
    found = benchmark.problems.found.problems
    ended = [
        p
        for row, flags in zip(heads.full, heads.finished, strict=True)
        for p, flag in zip(row, flags, strict=True)
        if flag
    ]
    return Evaluation(
        metadata={},
        pool=pool,
        curves=curves,
        runs=decodes.runs,
        alphas=e.alphas,
        headline=headline(
            decodes.runs,
            curves,
            pool,
            alphas=e.alphas,
            headline_beta=e.headline_beta,
            resamples=e.bootstrap,
            seed=e.seed,
        ),
        quality=policy_metrics(pool) | quality | asked,
        answer=config.decode.answer,
        drift=drift(
            models.start,
            models.lm,
            models.lite,
            list(itertools.chain(*decodes.start_samples))[: e.drift_rollouts],
            decodes.start_change,
            config,
        ),
        predictions={
            head: {name: values[key] for name, key in TABLE.items()}
            for head, values in columns.items()
        },
        joint=joint_figure(grid, problems, heads.full, whole),
        joints=prompt_joints_figure(
            grid,
            problems,
            heads.full,
            found,
            chosen_prompts(found, problems, known, e.joint_prompts),
        ),
        calibration=plots.calibration_figure(
            pool.value.ravel(), pool.correct.ravel(), length_errors(ended)
        ),
        trace=plots.trace_figure(decodes.traced) if decodes.traced else None,
        resamples=e.bootstrap,
        seed=e.seed,
    )
