"""From the record of a search back to what was decided on: the search decides the same again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zip_rc_jax import Decoder, Request, UsageError, decode
from zip_rc_jax.inference.introspection import decision_inputs, explain_decisions, texts_of
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.search.policies import decide

PROMPTS = ["1 + 2 =", "3 + 4 = 7 so", "a b"]
OPTIONS = {"n": 4, "interval": 4, "window": 3, "max_tokens": 24, "beta": 0.03}


def decoder_of(lm, **options):
    return Decoder(lm, **OPTIONS | options)


def decided_again(result, config, grid, slots=None):
    inputs = decision_inputs(result.trace, texts_of(result), config, grid, slots)
    action = decide(inputs, grid=grid, config=config)
    for row, decision in enumerate(result.trace):
        place = [(slots or config.n) if i < 0 else i for i in decision.prefix_ids]
        yield decision, action.multiplicity[row][place].tolist(), float(action.utility[row])


@pytest.mark.parametrize(
    "options",
    [
        {"candidates": "published"},
        {"candidates": "exhaustive"},
        {"candidates": "branching"},
        {"candidates": "published", "evidence": "answers"},
        {"candidates": "branching", "allow_no_answer": True, "beta": 0.3},
        {"strategy": "half_finished"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_recorded_joints_give_the_recorded_decisions_bit_by_bit(lm, options):
    decoder = decoder_of(lm, **options)
    count = 0
    for result in decoder(PROMPTS, return_joints=True):
        for decision, multiplicity, utility in decided_again(result, decoder.config, lm.head.grid):
            assert multiplicity == list(decision.multiplicity)
            assert utility == decision.utility or math.isnan(decision.utility)
            count += 1
    assert count > 4


def test_what_is_explained_is_the_action_that_was_taken_also_after_a_file(lm):
    decoder = decoder_of(lm, candidates="branching")
    (result,) = decoder(PROMPTS[:1], return_joints=True)
    stored = Result.from_dict(result.to_dict(joints=True))
    for read in (result, stored):
        found = explain_decisions(read.trace, texts_of(read), decoder.config, lm.head.grid)
        assert len(found) == len(result.trace)
        for one, decision in zip(found, result.trace, strict=True):
            assert one.multiplicity[0].tolist() == list(decision.multiplicity)
            assert one.multiplicity.shape[1] == len(decision.prefix_ids)
            assert one.utility[0] == pytest.approx(decision.utility, abs=1e-6)


def test_a_request_with_fewer_prefixes_than_the_engine_is_explained_in_its_slots(lm):
    decoder = decoder_of(lm, candidates="branching")
    request = Request(PROMPTS[0], n=2, beta=0.001)
    (result,) = decoder([request], return_joints=True)
    mine = request.over(decoder.config)
    assert mine.n == 2
    found = explain_decisions(result.trace, texts_of(result), mine, lm.head.grid, slots=4)
    for one, decision in zip(found, result.trace, strict=True):
        assert one.multiplicity[0].tolist() == list(decision.multiplicity)
        assert one.utility[0] == pytest.approx(decision.utility, abs=1e-6)
        # Nothing is listed that this request may not do.
        copies = np.array(decision.prefix_ids) >= 0
        new = np.maximum(one.multiplicity - copies, 0).sum(1) + copies.sum()
        assert new.max() <= 2


def test_without_joints_the_error_says_what_records_them(lm):
    (result,) = decode(lm, PROMPTS[:1], **OPTIONS)
    with pytest.raises(UsageError, match="return_joints=True"):
        decision_inputs(result.trace, {}, decoder_of(lm).config, lm.head.grid)


def test_recording_joints_changes_no_result(lm):
    decoder = decoder_of(lm)
    for with_them, without in zip(
        decoder(PROMPTS, return_joints=True), decoder(PROMPTS), strict=True
    ):
        assert with_them.prefixes == without.prefixes
        assert with_them.trace == without.trace
