"""Decoding from pages, as on TPU and GPU, gives what decoding from slots gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness.engines import REAL, exact
from harness.tiny import tiny_lm
from zip_rc_jax.inference import state
from zip_rc_jax.inference.engine import Engine, ResultEvent

# Some begin alike, so that a prompt continues from the pages of another.
PROMPTS = ["1 + 2 =", "wait so check", "a b c d 7 + 8 =", "3", "a b c d 7 + 9 = 1", "11 + 10 + 9 ="]
CONFIG = dataclasses.replace(REAL, max_num_seqs=8, candidates="branching", beta=0.01)


def results(lm, page, kernel="plain", pages=None):
    """Args: `pages` of the pool; None for as many as the engine takes."""
    engine = Engine(lm, CONFIG, seed=3)
    network = dataclasses.replace(engine.settings.network, page=page, kernel=kernel)
    engine.settings = dataclasses.replace(engine.settings, network=network)
    memory = engine._memory
    memory.settings = engine.settings
    if pages is not None:
        sizes, host_pages = memory.sizes(64, True)
        sizes = dataclasses.replace(sizes, pages=pages)
        memory.sizes = lambda *_: (sizes, host_pages)
    events = engine.run(PROMPTS)
    found = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [found[i] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def sure():
    """A model whose head is surer than a random one, so that prefixes fork and pause."""
    lm = tiny_lm()
    return dataclasses.replace(lm, params=lm.params | {"zip_rows": 3 * lm.params["zip_rows"]})


@pytest.fixture(scope="module")
def expected(sure):
    return results(sure, 0)


def test_results_are_those_of_slots_bit_for_bit(sure, expected):
    """Forks, pauses and prompts that share their beginnings included."""
    prefixes = [p for r in expected for p in r.prefixes]
    assert any(p.parent >= 0 for p in prefixes)
    assert any(p.state == "paused" for p in prefixes)
    found = results(sure, 8)
    assert [exact(r) for r in found] == [exact(r) for r in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert [p.logprobs for p in mine.prefixes] == [p.logprobs for p in theirs.prefixes]
        assert [p.expected_reward for p in mine.prefixes] == [
            p.expected_reward for p in theirs.prefixes
        ]


def test_so_they_are_with_the_kernel_up_to_the_order_of_sums(sure, expected):
    found = results(sure, 16, "tpu")
    assert [[p.token_ids for p in r.prefixes] for r in found] == [
        [p.token_ids for p in r.prefixes] for r in expected
    ]
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine.prefixes, theirs.prefixes, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            assert a.expected_reward == pytest.approx(b.expected_reward, abs=1e-4)


@pytest.mark.parametrize("pages", [9, 12, 20])
def test_results_are_the_same_where_pages_are_short(sure, expected, pages, monkeypatch):
    """Sequences wait, or leave for host memory and come back. The fewest pages are those of one
    sequence."""
    read, read_out = [], state.read_out

    def counted(settings, pool, numbers, slots):
        read.append(numbers.size)
        return read_out(settings, pool, numbers, slots)

    monkeypatch.setattr(state, "read_out", counted)
    found = results(sure, 8, pages=pages)
    assert [exact(r) for r in found] == [exact(r) for r in expected]
    assert bool(read) == (pages < 20)
