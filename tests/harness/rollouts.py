"""Random rollouts, and their comparison."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from zip_rc_jax.data.rollouts import Rollout


def make_rollouts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            prompt_index=i // 2, sample_index=i % 2, level=i % 3, seed=2**40 + i, task="chain_sum",
            prompt=f"<user>{i}?\n",
            question=f"{i}?", answer=str(i), entry_json="{}", prompt_token_ids=rng.integers(0,
            150_000, rng.integers(1, 9)),
            output_token_ids=rng.integers(0, 150_000, rng.integers(0, 30)),
            response="é \U0001f600 \0 \ud800" if i % 5 == 0 else "",
            finished=bool(i % 4), correct=float(rng.random()) if i % 3 else math.nan,
            value=float(rng.random()) if i % 2 else math.nan,
            problem_id=f"p{i // 2}", source="gym:chain_sum", variant=i % 2,
        )
        for i in range(n)
    ]  # fmt: skip


def assert_same(found, expected, *, tolerance=0.0):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for field in dataclasses.fields(Rollout):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, np.ndarray):
                assert x.dtype == np.int32
                np.testing.assert_array_equal(x, y)
            elif isinstance(y, float):
                assert type(x) is float
                np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, equal_nan=True)
            else:
                assert (type(x), x) == (type(y), y)
