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
from zip_rc_jax.evaluation.baselines import SamplePool
from zip_rc_jax.evaluation.compare import headline
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.explored import ExploredSearch
from zip_rc_jax.evaluation.pool_curves import Curves, Readings, in_rows, pool_curves
from zip_rc_jax.evaluation.report import Evaluation
from zip_rc_jax.evaluation.reward_model import RewardModelScorer
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
from zip_rc_jax.pipeline.evaluation.introspection import introspected
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
      searches: of the headline's runs in the first try, see `Evaluation.searches`.
    """

    pool: SamplePool
    runs: tuple[OnlineRun, ...]
    samples: list[list[Rollout]]
    start_samples: list[list[Rollout]]
    start_change: np.ndarray
    traced: Result | None
    searches: tuple[ExploredSearch, ...] = ()


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


# ---- before decoding


def opinions(config: PipelineConfig, lm: LanguageModel, problems: Sequence[Problem]) -> Opinions:
    """Raises UsageError as `SelfEvaluation` and `RewardModelScorer`."""
    e = config.evaluate
    policy = SelfEvaluation(lm, problems, config) if e.self_evaluation.question else None
    scorer = None
    if e.reward_model.path:
        turns: Any = (
            conversations(problems, config)
            if config.prompt.style == "chat"
            else [[{"role": "user", "content": p.question}] for p in problems]
        )
        now = prompt_time(config, lm.tokenizer)
        tokens = config.decode.max_tokens
        scorer = RewardModelScorer(lm, turns, e.reward_model, max_tokens=tokens, now=now)
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
    traced, searches = None, list[ExploredSearch]()
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
            if number == 0 and _is_headline(setting, config):
                told = introspected(bench, models.lm, setting, decoded, name)
                searches += [
                    ExploredSearch(name, i * benchmark.tries, result, told.get(i))
                    for i, result in enumerate(decoded.results)
                ]
    start_pool = sample_pool(found.problems, start, config.decode)
    return Decodes(
        joined_pools(pools),
        tuple(joined_runs(tries) for tries in runs.values()),
        [list(itertools.chain(*tries)) for tries in zip(*samples, strict=True)],
        _rollouts(start, found.problems, models.lm, config),
        pools[0].correct.mean(1) - start_pool.correct.mean(1),
        traced,
        tuple(searches),
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
    further = config.evaluate.baselines == "all"
    readings = judged(config, models.lm, decodes.samples, others, pool.n_samples)
    if further:
        flat = list(itertools.chain(*heads.full))
        rewards = in_rows([x.reward for x in flat], pool.n_samples)
        readings = dataclasses.replace(readings, rewards=rewards)
    curves = pool_curves(
        pool,
        readings,
        window=config.decode.window,
        interval=config.decode.interval,
        further=further,
        orders=Draws(seed=config.evaluate.seed),
    )
    asked = dict[str, float]()
    for name in ("self_evaluation", "reward_model"):
        if (values := getattr(readings, name)) is not None:
            auc = metrics.within_prompt_auc(values[0], pool.correct)[0]
            asked[f"{name}/within_prompt_auc"] = auc
    return curves, asked


def judged(
    config: PipelineConfig,
    lm: LanguageModel,
    samples: Sequence[Sequence[Rollout]],
    others: Opinions,
    each: int,
) -> Readings:
    """What forwards over finished samples say of them: `Readings` without rewards.

    Args:
      samples: of every problem, those of a try in a row.
      each: samples of a row of the pool, which is one try of one problem.
    """

    def rows(found: Any) -> np.ndarray:
        return np.array([np.asarray(x, np.float64).reshape(-1, each) for x in found])

    readings = Readings()
    if others.policy is not None:
        readings = dataclasses.replace(readings, self_evaluation=rows(others.policy(samples)))
    if others.reward_model is not None:
        scorer = others.reward_model
        readings = dataclasses.replace(
            readings, reward_model=rows(scorer(samples)), parameter_ratio=scorer.parameter_ratio
        )
    if config.evaluate.baselines == "all":
        statistics = token_statistics(
            lm,
            list(itertools.chain(*samples)),
            ScoringConfig(config.label.batch_tokens),
            title="token statistics",
        )
        readings = dataclasses.replace(readings, statistics=in_rows(statistics, each))
    return readings


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
    lengths = length_errors(ended)
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
        calibration=plots.calibration_figure(pool.value.ravel(), pool.correct.ravel(), lengths),
        trace=plots.trace_figure(decodes.traced) if decodes.traced else None,
        lengths=lengths,
        searches=decodes.searches,
        resamples=e.bootstrap,
        seed=e.seed,
    )
