"""The held-out comparison: every method decoded online on the same problems, graded by the task's
scorer, under one cost meter."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence

import numpy as np

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.data.prompts import variant_of
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation import metrics, plots
from zip_rc_jax.evaluation.baselines import (
    SELF_EVALUATION,
    baseline_curves,
    self_evaluation_curve,
)
from zip_rc_jax.evaluation.compare import headline
from zip_rc_jax.evaluation.report import Evaluation, pool_rows, result_rows, write_report
from zip_rc_jax.evaluation.rollout_predictions import length_errors, predict_rollouts
from zip_rc_jax.evaluation.self_evaluation import SelfEvaluation
from zip_rc_jax.grading.custom import grader_of
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.evaluation.drift import drift
from zip_rc_jax.pipeline.evaluation.pool import most_eventful, online_run, sample_pool
from zip_rc_jax.pipeline.evaluation.predictions import (
    joint_figure,
    policy_metrics,
    prediction_metrics,
)
from zip_rc_jax.pipeline.evaluation.runner import Decoded, EvaluationRunner
from zip_rc_jax.pipeline.problems import HeldOutProblems, evaluation_problems
from zip_rc_jax.pipeline.provenance import prompt_record
from zip_rc_jax.pipeline.rollouts import as_rollouts
from zip_rc_jax.pipeline.run_dir import load_policy, run_directory
from zip_rc_jax.predictions import ForwardSettings
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import run_metadata, write_json, write_jsonl

POLICY_RUN = "start policy"


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
                traced = most_eventful(outcome, bench.problems)

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
        drift=drift(
            start,
            lm,
            lite,
            list(itertools.chain(*rollouts(plain)))[: e.drift_rollouts],
            pool,
            sample_pool(bench.problems, plain),
            config,
        ),
        joint=joint_figure(grid, pool, by_prompt, whole),
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
