"""Prompts given as token ids: read as they are, and refused with a reason where they cannot be."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from harness.engines import REAL, REAL_PROMPTS, exact
from harness.tiny import WORDS
from zip_rc_jax import Request, Result, UsageError, decode
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.models.io.tokenizer import word_level

IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def by_text(lm):
    return decode(lm, REAL_PROMPTS[:2], REAL)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.asarray, jnp.asarray, lambda x: np.asarray(x, np.uint16)]
)
def test_token_ids_are_decoded_as_the_text_that_they_are_of(lm, by_text, kind):
    ids = [lm.tokenizer.encode(text) for text in REAL_PROMPTS[:2]]
    found = decode(lm, [kind(ids[0]), Request(kind(ids[1]))], REAL)
    assert [exact(r) for r in found] == [exact(r) for r in by_text], (
        "the text too: these ids spell it"
    )
    assert [list(r.prompt_token_ids) for r in found] == ids
    assert [r.template_hash for r in found] == [None, None]
    assert [list(Result.from_dict(r.to_dict()).prompt_token_ids) for r in found] == ids


def test_a_text_reports_the_ids_that_it_became(lm, by_text):
    assert [list(r.prompt_token_ids) for r in by_text] == [
        lm.tokenizer.encode(t) for t in REAL_PROMPTS[:2]
    ]


def test_nothing_is_put_before_or_behind_given_ids(lm):
    """This tokenizer begins texts with a token; whoever passes ids has decided about that."""
    tokenizer = word_level(WORDS)
    begin = ("wait", tokenizer.encode("wait")[0])
    tokenizer.backend.post_processor = TemplateProcessing(single="wait $A", special_tokens=[begin])
    begins = dataclasses.replace(lm, tokenizer=tokenizer)
    plain, full = tokenizer.encode("1 + 2"), tokenizer.encode_prompt("1 + 2")
    assert full == [begin[1], *plain]
    jobs = Engine(begins, REAL, 0).processor.tokenize(["1 + 2", plain, full])
    assert [job.ids for job in jobs] == [full, plain, full]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (IDS, r"prompts given as one list of token ids: .*one prompt or many\. Fix: pass \[ids\]"),
        (np.asarray(IDS), r"prompts given as one list of token ids"),
        (np.ones((2, 3), int), r"one array of shape \(2, 3\): .*Fix: pass list\(rows\)"),
        ([np.ones((2, 3), int)], r"an array of int64 of shape \(2, 3\): token ids are 1-D"),
        ([np.ones(3)], r"an array of float64 of shape \(3,\): token ids are whole"),
        ([np.ones(3, bool)], r"prompt 0, an array of bool of shape"),
        (["3", [5, 6.5]], r"prompt 1 as token ids: item 1 is 6\.5"),
        ([[True, 5]], r"prompt 0 as token ids: item 0 is True"),
        ([[5, "a"]], r"prompt 0 as token ids: item 1 is 'a'"),
        ([[5, None]], r"prompt 0 as token ids: item 1 is None"),
        ([[5, [6]]], r"prompt 0 as token ids: item 1 is \[6\]"),
        ([np.ones(0, int)], r"prompt 0: it is empty"),
        ([[]], r"prompt 0: it is empty"),
        ([[5, -1]], r"prompt 0 with ids -1 \(None\): the vocabulary has the ids 0 to 127"),
        ([[5, 10**30]], r"prompt 0 with ids 1000000000000000000000000000000 \(None\)"),
        ([5, 6], r"prompts given as one list of token ids"),
    ],
)  # fmt: skip
def test_bad_token_ids_are_refused_by_value_reason_and_fix(lm, prompts, message):
    with pytest.raises(UsageError, match=message):
        decode(lm, prompts, REAL)


def test_reserved_and_padding_ids_are_refused(lm):
    for i in (
        lm.head.first_id,
        lm.head.last_id - 1,
        lm.config.vocab_size - 1,
        lm.config.vocab_size,
    ):
        with pytest.raises(
            UsageError, match=rf"prompt 1 with ids {i} .*(reserved or unused|has the ids 0 to)"
        ):
            decode(lm, [IDS, [5, i]], REAL)


def test_one_bad_list_of_ids_costs_no_other_prompt(lm, by_text):
    prompts = iter([REAL_PROMPTS[0], [5, 2.5], 7, lm.tokenizer.encode(REAL_PROMPTS[1])])
    found = decode(lm, prompts, REAL)
    assert [r.finish_reason == "error" for r in found] == [False, True, True, False]
    assert "item 1 is 2.5" in found[1].error
    assert "prompt 2 of type int" in found[2].error
    assert [exact(found[0]), exact(found[3])] == [exact(r) for r in by_text]


def test_no_template_reads_token_ids_so_its_variables_are_refused(lm):
    with pytest.raises(UsageError, match="every prompt is a string or token ids"):
        decode(lm, [IDS, "3"], REAL, chat_template_kwargs={"enable_thinking": False})
