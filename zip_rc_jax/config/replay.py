"""What a replay decides again from stored samples: the section `replay`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from zip_rc_jax.config.checks import check_types, counts, one_of, require
from zip_rc_jax.config.decode import EVIDENCE, DecodeConfig, variant
from zip_rc_jax.config.renamed import takes_old_names
from zip_rc_jax.runtime.errors import UsageError

JOINT_TYPES = ("float32", "bfloat16", "uint8")
REPLAYED_CANDIDATES = ("published", "exhaustive")


@takes_old_names
@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """A pool of full samples, and the settings that are replayed from it.

    Ablations change one option at a time, at every alpha of `evaluate.alphas` with its headline
    beta. An empty list leaves an ablation out.

    Attributes:
      samples: full samples of every held-out problem in the pool.
      stride: tokens between stored joints. 0 takes the largest that all replayed intervals are
        multiples of.
      joints: how the pool stores them. "float32" is exact; "bfloat16" takes half the bytes, and
        "uint8" (of the square root) a quarter.
      ns: samples that the search and the pruning rules start with; empty for `decode.n`.
      candidates: candidate sets of the search: "published", "exhaustive" (n <= 10). Branching
        starts prefixes that no pool holds, so it is decoded online only.
      evidence: what finished prefixes are worth to the search, see `decode.evidence`; empty for
        that of `decode`.
      alphas, betas: prices of the search; empty for those of `evaluate`.
      reward_thresholds: points of the curve of "reward_threshold".
      length_budgets: points of the curve of "length_budget", in tokens; empty for the quantiles
        0.1, 0.25, 0.5, 0.75 and 0.9 of the pool's lengths.
      windows: ablation of `decode.window`, in multiples of the stride.
      intervals: ablation of `decode.interval`, in multiples of the stride.
      selection_exponents: ablation of `decode.selection_exponent`, the exponent of the value term.
      joint_temperatures, joint_top_ps: ablations of how the joint is sharpened.
      subsets: subsets of n samples that a replayed decode is averaged over, where the pool has more
        than n. All of them if there are no more; else so many, drawn by `seed`.
      baseline_subsets: the same for votes of a fixed n that no formula counts; at least 2.
      seed: of the subsets.
    """

    samples: int = 16
    stride: int = 0
    joints: str = "float32"
    ns: tuple[int, ...] = ()
    candidates: tuple[str, ...] = ("published",)
    evidence: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    reward_thresholds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    length_budgets: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    intervals: tuple[int, ...] = ()
    selection_exponents: tuple[float, ...] = ()
    joint_temperatures: tuple[float, ...] = ()
    joint_top_ps: tuple[float, ...] = ()
    subsets: int = 4
    baseline_subsets: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(ReplayConfig, vars(self))
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name in ("samples", "subsets", "baseline_subsets"):
            counts(f"replay.{name}", getattr(self, name))
        require(
            self.baseline_subsets >= 2,
            f"replay.baseline_subsets={self.baseline_subsets}",
            "one drawn subset has no standard error",
            "use at least 2",
        )
        for name in ("ns", "length_budgets", "windows", "intervals"):
            for value in getattr(self, name):
                counts(f"replay.{name}", value)
        require(
            0 <= self.stride < 2**31,
            f"replay.stride={self.stride}",
            "it counts tokens",
            "use a positive number, or 0 for the largest that fits the intervals",
        )
        require(
            0 <= self.seed < 2**32,
            f"replay.seed={self.seed}",
            "it is not a whole number of 32 bits",
            f"use one from 0 to {2**32 - 1}",
        )
        one_of("replay.joints", self.joints, JOINT_TYPES)
        for name in self.candidates:
            require(
                name != "branching",
                "replay.candidates with 'branching'",
                "it starts prefixes in the middle of others, and a pool holds samples from the "
                "root alone",
                "leave it out, and decode it online: `zip-rc evaluate` with evaluate.candidates",
            )
            one_of("replay.candidates", name, REPLAYED_CANDIDATES)
        for name in self.evidence:
            one_of("replay.evidence", name, EVIDENCE)
        for n in self.ns:
            require(
                n <= self.samples,
                f"replay.ns={list(self.ns)} with replay.samples={self.samples}",
                f"a decode of {n} samples needs a pool with as many",
                f"set replay.samples={n}, or leave {n} out",
            )

    def stride_for(self, interval: int) -> int:
        """Tokens between the joints of a new pool.

        Args:
          interval: of the decode that the ablations vary.

        Raises:
          UsageError: an interval is no multiple of `stride`.
        """
        wanted = (interval, *self.intervals)
        stride = self.stride or math.gcd(*wanted)
        for value in wanted:
            require(
                value % stride == 0,
                f"interval={value} with replay.stride={self.stride}",
                f"decisions every {value} tokens need joints that a pool with one every {stride} "
                "tokens does not hold",
                f"set replay.stride={math.gcd(*wanted)}, or 0",
            )
        return stride


@dataclasses.dataclass(frozen=True)
class ReplayedSetting:
    """One point of a replay.

    Attributes:
      name: unique.
      kind: "search", "reward_threshold", "half_finished", "length_budget", or the option that an
        ablation varies.
      value: of that option or threshold; NaN where there is none.
      decode: the setting.
    """

    name: str
    kind: str
    value: float
    decode: DecodeConfig


ABLATIONS = {
    "windows": "window",
    "intervals": "interval",
    "selection_exponents": "selection_exponent",
    "joint_temperatures": "joint_temperature",
    "joint_top_ps": "joint_top_p",
}


def replayed_settings(
    replay: ReplayConfig,
    decode: DecodeConfig,
    alphas: tuple[float, ...],
    betas: tuple[float, ...],
    headline_beta: tuple[float, ...],
    length_budgets: tuple[int, ...],
) -> list[ReplayedSetting]:
    """Every setting of a replay, in the order of its table.

    Args:
      decode: what the settings vary.
      alphas, betas, headline_beta: of the evaluation.
      length_budgets: used where `replay` names none.

    Raises:
      UsageError: a setting that `DecodeConfig` refuses, by its name; or one that stands there
        twice.
    """
    first = dataclasses.replace(
        decode, strategy="zip_rc", length_budget=0, candidates=replay.candidates[0]
        if replay.candidates else "published",
    )  # fmt: skip
    found: list[ReplayedSetting] = []

    def add(name: str, kind: str, value: float, **options: Any) -> None:
        try:
            setting = dataclasses.replace(first, **options)
        except UsageError as error:
            raise UsageError(f"replay of {name}: {error.value}", error.reason, error.fix) from None
        found.append(ReplayedSetting(name, kind, value, setting))

    nan = math.nan
    ns = replay.ns or (decode.n,)
    for n in ns:
        for candidates, evidence, alpha, beta in itertools.product(
            replay.candidates,
            replay.evidence or (decode.evidence,),
            replay.alphas or alphas,
            replay.betas or betas,
        ):
            options: dict[str, Any] = {"candidates": candidates, "evidence": evidence, "n": n}
            name = f"{variant(candidates, evidence)} n={n} alpha={alpha:g} beta={beta:g}"
            add(name, "search", nan, **options, alpha=alpha, beta=beta)
        for threshold in replay.reward_thresholds:
            name, kind = f"reward threshold {threshold:g} n={n}", "reward_threshold"
            add(name, kind, threshold, strategy=kind, reward_threshold=threshold, n=n)
        add(f"half finished n={n}", "half_finished", nan, strategy="half_finished", n=n)
        for budget in replay.length_budgets or length_budgets:
            name, kind = f"length budget {budget} n={n}", "length_budget"
            add(name, kind, budget, strategy=kind, length_budget=budget, n=n)
    for option, field in ABLATIONS.items():
        for value in getattr(replay, option):
            for alpha, beta in zip(alphas, headline_beta, strict=True):
                name = f"{field}={value:g} n={ns[0]} alpha={alpha:g} beta={beta:g}"
                options = {field: value, "alpha": alpha, "beta": beta, "n": ns[0]}
                add(name, field, value, **options)
    names = [setting.name for setting in found]
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    require(
        not repeated,
        f"replay: {repeated[:3]}",
        "they occur twice among the settings",
        "leave one of each out",
    )
    return found
