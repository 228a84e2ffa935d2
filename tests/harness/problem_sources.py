"""Problems of reasoning-gym for tests, in one call."""

from __future__ import annotations

from typing import Any

from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.data.problems import Problem, problem_set


def gym(
    name: str = "chain_sum",
    levels: tuple[dict[str, Any], ...] = (),
    train_seed: int = 0,
    heldout_seed: int = 1_000_000_000,
    **settings: Any,
) -> ProblemsConfig:
    """One generator for training and evaluation. The two share the seeds between their first
    ones."""
    span = abs(heldout_seed - train_seed)
    train, heldout = (
        SourceConfig(f"gym:{name}", levels=levels, seed=seed, span=span)
        for seed in (train_seed, heldout_seed)
    )
    return ProblemsConfig(**{"train": train, "heldout": heldout, "overlap": "keep", **settings})


def gym_problems(
    problems: ProblemsConfig | str, split: str = "train", count: int = 1
) -> list[Problem]:
    """The first problems of a split."""
    config = gym(problems) if isinstance(problems, str) else problems
    return list(problem_set(config, split, count).problems)
