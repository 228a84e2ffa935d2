"""Calibration: from held-out problems to a setting that keeps a promise, or spends a budget.

What can be checked without the model is checked before it is loaded.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import (
    DecodeConfig,
    EvaluateConfig,
    PipelineConfig,
    ProblemsConfig,
    PromptConfig,
    SourceConfig,
    to_dict,
)
from zip_rc_jax.config.checks import require, shown
from zip_rc_jax.config.problems import KINDS
from zip_rc_jax.config.replay import ReplayConfig
from zip_rc_jax.data.sample_pool import DIGESTS, PoolFiles
from zip_rc_jax.evaluation.calibration import (
    BETAS,
    THRESHOLDS,
    Outcomes,
    Promise,
    Tested,
    beta_that_spends,
    check_enough,
    chosen,
    cost_interval,
    full_samples,
    replayed_outcomes,
    try_settings,
)
from zip_rc_jax.evaluation.replay import ReplayPool, check_replayable, load_pool
from zip_rc_jax.inference.api import resolve
from zip_rc_jax.inference.prepared import check_head
from zip_rc_jax.models.io.digests import json_digest
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.evaluation.benchmarks import planned_benchmarks
from zip_rc_jax.pipeline.pool import SHAPING, held_out, make_pool, planned_pool
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import check_writable, code_version, read_json

SEED = 0  # of the order of the problems


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """What is asked for.

    Attributes:
      data: a pool of `zip-rc replay`, or held-out problems: a file, or a source such as
        `hf:openai/gsm8k/main`.
      promise: what is to hold; None for a price alone.
      average_cost: mean GenCost that the price is to spend; None for no such price.
      options: fields of DecodeConfig, as `decode` takes them.
      betas, token_budgets: prices, or budgets, that are tested; empty for the default.
      thresholds: values of `abstain_below` that are tested; empty for the default.
      pool: where the samples of problems that are not a pool are stored.
      chat: problems are user turns for the model's chat template.
      problems: the first so many of `data`; 0 takes all.
    """

    data: str
    promise: Promise | None = None
    average_cost: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    betas: tuple[float, ...] = ()
    token_budgets: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    pool: str = ""
    chat: bool = False
    problems: int = 0

    def __post_init__(self) -> None:
        require(
            self.promise is not None or self.average_cost is not None,
            "calibrate",
            "it is not said for what",
            "add --max-error-rate 0.05, --max-loss 0.02 or --average-cost 1.5",
        )
        if self.average_cost is not None:
            require(
                np.isfinite(self.average_cost) and self.average_cost > 0,
                f"average-cost={self.average_cost:g}",
                "it is what a prompt may cost, in samples",
                "use a number such as 1.5",
            )
        for budget in self.token_budgets:
            reason = "nothing could be generated"
            require(budget >= 1, f"token-budgets={budget}", reason, "use a positive number")
        varied = {
            "betas": bool(self.betas),
            "token-budgets": bool(self.token_budgets),
            "average-cost": self.average_cost is not None,
        }
        named = [name for name, given in varied.items() if given]
        reason = "each of them says which prices are tested"
        require(len(named) <= 1, " with ".join(named), reason, "leave one of them out")
        errors = self.promise is not None and self.promise.risk == "errors"
        given = {
            "abstain_below": errors,
            "beta": bool(self.betas) or self.average_cost is not None,
            "token_budget": bool(self.token_budgets),
        }
        for name, taken in given.items():
            reason = "that is what the calibration chooses"
            value = f"{name}={shown(self.options.get(name))}"
            require(not (taken and name in self.options), value, reason, "leave it out")

    def settings(self, decode: DecodeConfig) -> list[DecodeConfig]:
        """The prices that are tested, those that spend most first. Raises UsageError."""
        if self.token_budgets:
            budgets = sorted(set(self.token_budgets), reverse=True)
            return [dataclasses.replace(decode, token_budget=budget) for budget in budgets]
        betas = self.betas
        if not betas and self.average_cost is None and self.promise is not None:
            ladder = self.promise.risk == "loss" and "beta" not in self.options
            betas = BETAS if ladder else ()
        betas = betas or (decode.beta,)
        return [dataclasses.replace(decode, beta=beta) for beta in sorted(set(betas))]

    def tested_thresholds(self, decode: DecodeConfig) -> tuple[float, ...]:
        """Values of `abstain_below` that are tested. Raises UsageError."""
        for value in self.thresholds:
            dataclasses.replace(decode, abstain_below=value)
        if self.thresholds:
            return self.thresholds
        errors = self.promise is not None and self.promise.risk == "errors"
        return THRESHOLDS if errors else (decode.abstain_below,)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
      settings: every test; empty without a promise.
      choice: what passed and is preferred, or what spends the average cost; None where nothing
        passed.
      tried: cost by beta, where a price was looked for.
      tested_on, priced_on: problems of the tests and of the price.
      record: what is stored; None without a choice.
    """

    settings: tuple[Tested, ...]
    choice: Tested | None
    tried: Mapping[float, float]
    tested_on: int
    priced_on: int
    record: Mapping[str, Any] | None


def calibrate(plan: CalibrationPlan, load: Callable[[str], LanguageModel]) -> Calibration:
    """Decodes the problems if `data` is no pool, replays every price, and tests.

    Args:
      load: the model in the given dtype. Called once, after everything else was checked.

    Raises:
      UsageError: an option that is unknown or that no pool gives, too few problems, a pool of
        another model, a model without a head, or a cost that no price spends.
    """
    source = _Source.of(plan)
    settings, thresholds = plan.settings(source.decode), plan.tested_thresholds(source.decode)
    for setting in settings:
        check_replayable(setting, source.about)
    priced, judged = _parts(plan, source.problems)
    if plan.promise is not None:
        errors = plan.promise.risk == "errors"
        paths = [len(thresholds)] * len(settings) if errors else [len(settings)] * len(thresholds)
        check_enough(plan.promise, len(judged), paths, tries=source.tries)
    lm = load(source.dtype)
    check_head(lm)
    files = source.files(lm)
    pool = load_pool(files)
    tried: dict[float, float] = {}
    if plan.average_cost is not None:
        beta, tried = _price(pool, source.decode, plan.average_cost, priced)
        settings = [dataclasses.replace(source.decode, beta=beta)]
    outcomes = replayed_outcomes(pool, settings)
    if plan.promise is None:
        rows: list[Tested] = []
        choice: Tested | None = _spending(outcomes[0].part(priced))
    else:
        reference = full_samples(pool, source.decode) if plan.promise.risk == "loss" else None
        mine = [one.part(judged) for one in outcomes]
        theirs = reference and reference.part(judged)
        rows = try_settings(plan.promise, mine, thresholds, theirs)
        choice = chosen(plan.promise, rows)
    counts = {"tested_on": len(judged) if plan.promise else 0, "priced_on": len(priced)}
    record = None if choice is None else _record(plan, source, files, choice, counts, len(rows))
    return Calibration(tuple(rows), choice, tried, record=record, **counts)


# ---- the problems


@dataclasses.dataclass(frozen=True)
class _Source:
    """Calibration problems before the model is loaded.

    Attributes:
      decode: what settings vary.
      about: metadata of the pool, or what it is going to be.
      problems, tries, dtype, name: of the pool.
      files: the pool, which is made if it is not there.
    """

    decode: DecodeConfig
    about: dict[str, Any]
    problems: int
    tries: int
    dtype: str
    name: str
    files: Callable[[LanguageModel], PoolFiles]

    @classmethod
    def of(cls, plan: CalibrationPlan) -> _Source:
        """Raises UsageError for data that cannot be read, or options that do not fit it."""
        path = pathlib.Path(plan.data).expanduser()
        return cls._stored(plan, path) if path.is_dir() else cls._problems(plan, path)

    @classmethod
    def _stored(cls, plan: CalibrationPlan, path: pathlib.Path) -> _Source:
        files = PoolFiles(path)
        about = files.metadata
        for name, given in (("--pool", plan.pool), ("--chat", plan.chat)):
            reason = "its samples are drawn already"
            require(not given, f"{name} with the pool {path}", reason, "leave it out")
        decode = pool_options(about, plan.options)
        stored, tries = about["prompts"] // about.get("tries", 1), about.get("tries", 1)
        require(
            plan.problems <= stored,
            f"problems={plan.problems}",
            f"pool {path} has {stored}",
            f"use at most {stored}",
        )

        def checked(lm: LanguageModel) -> PoolFiles:
            drawn = about["settings"].get("model")
            if lm.digest() != drawn:
                reason = f"its samples were drawn from another model (digest {drawn})"
                fix = "calibrate with samples of this model: `zip-rc replay` makes them"
                raise UsageError(f"pool {path}", reason, fix)
            return files

        dtype = about["settings"].get("dtype", "float32")
        count = plan.problems or stored
        return cls(decode, about, count, tries, dtype, path.name, checked)

    @classmethod
    def _problems(cls, plan: CalibrationPlan, path: pathlib.Path) -> _Source:
        require(
            bool(plan.pool),
            f"data={shown(plan.data)} without --pool",
            "it is no pool, so samples of its problems are drawn and stored first",
            "add --pool DIRECTORY, or give a pool of `zip-rc replay`",
        )
        directory = pathlib.Path(plan.pool).expanduser()
        if directory.exists():
            fix = f"give it as --data {directory}, or choose another directory"
            raise UsageError(f"--pool {directory}", "there is something already", fix)
        config = _config(plan, path, directory)
        found = held_out(planned_benchmarks(config)[0])
        check_writable(directory.parent, "--pool")

        def made(lm: LanguageModel) -> PoolFiles:
            return make_pool(config, lm, directory, {}, found)

        about = planned_pool(config)
        return cls(config.decode, about, len(found), 1, config.dtype, path.name, made)


def pool_options(about: Mapping[str, Any], options: Mapping[str, Any]) -> DecodeConfig:
    """How a pool's samples are decided on: its own sampling options, and `options`.

    Raises:
      UsageError: an unknown option, or another value than the samples were drawn with.
    """
    shaping = {name: about["settings"]["decode"][name] for name in SHAPING}
    free = {"interval": about["stride"], "n": min(DecodeConfig().n, about["samples"])}
    decode = resolve(None, free | shaping | dict(options))
    drawn = resolve(None, free | shaping)
    for name in set(SHAPING) - {"window"}:  # other windows may follow from the stored joints
        mine, theirs = getattr(decode, name), getattr(drawn, name)
        if mine != theirs:
            fix = f"leave it out, or draw samples with decode.{name}={shown(mine)}"
            reason = f"the pool's samples were drawn with {shown(theirs)}"
            raise UsageError(f"{name}={shown(mine)}", reason, fix)
    return decode


def _config(plan: CalibrationPlan, path: pathlib.Path, pool: pathlib.Path) -> PipelineConfig:
    """The settings that draw samples of problems. Raises UsageError for impossible ones."""
    kind = plan.data.partition(":")[0]
    if kind in KINDS:
        source = plan.data
    else:
        endings = {".jsonl": "jsonl", ".parquet": "parquet", ".csv": "csv"}
        if not path.is_file() or path.suffix not in endings:
            reason = "it is no pool, and no .jsonl, .parquet or .csv file that is there"
            fix = "give such a file, a pool, or a source such as hf:openai/gsm8k/main"
            raise UsageError(f"data={shown(plan.data)}", reason, fix)
        source = f"{endings[path.suffix]}:{path}"
    decode = resolve(None, dict(plan.options))
    # Every token is a stride where budgets in tokens are tested, see `check_replayable`.
    stride = 1 if plan.token_budgets or decode.token_budget else 0
    return PipelineConfig(
        run_dir=str(pool.parent),
        problems=ProblemsConfig(heldout=(SourceConfig(source),)),
        prompt=PromptConfig(style="chat" if plan.chat else "raw"),
        decode=decode,
        evaluate=EvaluateConfig(prompts=plan.problems, samples=decode.n, baselines="plain"),
        replay=ReplayConfig(samples=decode.n, stride=stride),
    )


def _parts(plan: CalibrationPlan, problems: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the problems that a price is chosen on, and of those that a promise is tested on.

    A price that is chosen on the tested problems would spoil the test, so each gets a half. The
    order is shuffled: problems may lie in the order of their levels.
    """
    order, none = np.random.default_rng(SEED).permutation(problems), np.arange(0)
    if plan.average_cost is None:
        return none, order
    return (order, none) if plan.promise is None else (order[::2], order[1::2])


def _price(
    pool: ReplayPool, decode: DecodeConfig, target: float, problems: np.ndarray
) -> tuple[float, dict[float, float]]:
    def cost_of(betas: Sequence[float]) -> list[float]:
        settings = [dataclasses.replace(decode, beta=beta) for beta in betas]
        found = replayed_outcomes(pool, settings)
        return [float(one.gen_cost[problems].mean()) for one in found]

    return beta_that_spends(cost_of, target)


def _spending(one: Outcomes) -> Tested:
    """What a price spends and reaches, without a test."""
    cost, low, high = cost_interval(one)
    nan = float("nan")
    answered, accuracy = float(np.isfinite(one.value).mean()), float(one.correct.mean())
    return Tested(one.decode, nan, nan, nan, nan, False, answered, accuracy, cost, low, high)


# ---- the record


def _record(
    plan: CalibrationPlan,
    source: _Source,
    files: PoolFiles,
    choice: Tested,
    counts: Mapping[str, int],
    tests: int,
) -> dict[str, Any]:
    decode = choice.decode
    names = ["n", "alpha", "beta", *["token_budget"] * bool(decode.token_budget), "abstain_below"]
    measured = dataclasses.asdict(choice)
    del measured["decode"]
    return {
        "options": {name: getattr(decode, name) for name in names},
        "decode": to_dict(decode),
        "promise": None if plan.promise is None else dataclasses.asdict(plan.promise),
        "average_cost": plan.average_cost,
        "measured": measured,
        "tests": tests,
        "data": {
            "name": source.name,
            "path": str(files.directory.absolute()),
            "digest": json_digest(read_json(files.directory / DIGESTS, fix="copy it again")),
            "problems": source.problems,
            "tries": source.tries,
            "samples": files.metadata["samples"],
            "model": files.metadata["settings"].get("model"),
            **counts,
        },
        "code": code_version(),
    }
