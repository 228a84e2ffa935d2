"""The reserved range: one matmul for both, never sampled, and next-token logits that do not notice
it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.small_tokenizers import chatml, gemma, llama
from harness.tiny import TINY_GRID, TINY_MODEL, WORDS, randomised, tiny_lm
from zip_rc_jax import load
from zip_rc_jax.config import SamplingConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import (
    ZipHead,
    cell_log_probs,
    fit_vocabulary,
    fold,
    joint_log_probs,
    padded_vocab_size,
    policy_logits,
    reserve,
)
from zip_rc_jax.inference.sampler import sample
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError

HEAD = ZipHead(TINY_GRID, "value", first_id=20, used_ids=18)
V, D = 40, 16
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.standard_normal((V, D)), jnp.float32)
ROWS = jnp.asarray(RNG.standard_normal((9, D)), jnp.float32)
HIDDEN = jnp.asarray(RNG.standard_normal((7, D)), jnp.float32)


def test_one_matmul_with_the_folded_table_equals_two_separate_ones():
    logits = HIDDEN @ fold(TABLE, ROWS, HEAD).T
    separate = np.asarray(HIDDEN) @ np.asarray(TABLE).T
    np.testing.assert_allclose(
        np.delete(logits, range(20, 29), axis=1),
        np.delete(separate, range(20, 29), axis=1),
        atol=1e-5,
    )
    np.testing.assert_allclose(logits[:, 20:29], np.asarray(HIDDEN) @ np.asarray(ROWS).T, atol=1e-5)
    np.testing.assert_allclose(
        joint_log_probs(logits, HEAD), cell_log_probs(HIDDEN @ ROWS.T, HEAD.grid), atol=1e-5
    )


def test_the_joint_is_a_distribution_laid_out_reward_major():
    logits = np.zeros((2, V), np.float32)
    logits[0, HEAD.first_id + 2 * 3 + 1] = 5  # reward bin 2, length bin 1
    logits[1] = RNG.standard_normal(V)
    joint = np.exp(joint_log_probs(jnp.asarray(logits), HEAD))
    assert joint.shape == (2, 3, 3)
    np.testing.assert_allclose(joint.sum((1, 2)), 1, atol=1e-6)
    assert np.unravel_index(joint[0].argmax(), (3, 3)) == (2, 1)
    assert joint[0, 2, 1] == pytest.approx(np.exp(5) / (np.exp(5) + 8), rel=1e-5)
    shifted = logits.copy()
    shifted[:, :20] += 9  # what the policy's logits are does not matter
    np.testing.assert_array_equal(joint, np.exp(joint_log_probs(jnp.asarray(shifted), HEAD)))


def test_the_joint_is_float32_even_of_bfloat16_logits():
    assert joint_log_probs(jnp.zeros((1, V), jnp.bfloat16), HEAD).dtype == jnp.float32


def test_the_policy_is_the_softmax_over_the_ids_of_the_tokenizer():
    logits = 5 * RNG.standard_normal((7, V)).astype(np.float32)
    policy = np.asarray(jax.nn.softmax(policy_logits(jnp.asarray(logits), HEAD)))
    used = np.exp(logits[:, :18])
    np.testing.assert_allclose(policy[:, :18], used / used.sum(1, keepdims=True), rtol=1e-4)
    assert (policy[:, 18:] == 0).all(), "neither padding (18, 19, 29..) nor reserved (20..28)"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=3.0, min_p=0.01),
        SamplingConfig(temperature=0),
        SamplingConfig(top_k=39, top_p=0.999),
    ],
    ids=repr,
)
def test_reserved_and_padding_ids_are_never_drawn_however_large_their_logits(sampling):
    logits = np.zeros(V, np.float32)
    logits[18:] = 1e4
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = np.asarray(
        sample(
            keys, policy_logits(jnp.broadcast_to(jnp.asarray(logits), (10_000, V)), HEAD), sampling
        )
    )
    assert drawn.max() < 18
    if sampling.temperature:
        assert set(drawn) == set(range(18))


FROM_18 = np.arange(40) >= 18


@pytest.mark.parametrize(
    ("first_id", "message"),
    [
        (
            17,
            r"reserved range 17\.\.25: the tokenizer really uses ids 17 of it\. Fix: start it at "
            r"18\.",
        ),
        (0, r"uses ids 0, 1, 2, 3, 4, \.\.\. of it"),
        (
            32,
            r"reserved range 32\.\.40: the vocabulary ends at 39, so 9 cells do not fit\. Fix: "
            r"pad the vocabulary to 128",
        ),
        (500, r"the vocabulary ends at 39"),
        (-1, r"reserved range -1\.\.7: the vocabulary ends at 39"),
    ],
)
def test_impossible_ranges_say_so(first_id, message):
    head = ZipHead(TINY_GRID, "value", first_id, 18)
    with pytest.raises(UsageError, match=message):
        head.check(40, FROM_18)
    if first_id not in (17, 0):
        with pytest.raises(UsageError, match=message):
            fold(TABLE, ROWS, head)


def test_used_ids_amid_placeholders_are_named():
    unused = np.ones(40, bool)
    unused[[22, 25]] = False
    with pytest.raises(UsageError, match=r"really uses ids 22, 25 of it\. Fix: start it at 30\."):
        ZipHead(TINY_GRID, "value", 20, 30).check(40, unused)
    unused[30:32] = False
    with pytest.raises(UsageError, match=r"Fix: start it at 0\."):
        ZipHead(TINY_GRID, "value", 20, 32).check(40, unused)
    unused[[5, 13]] = False
    with pytest.raises(UsageError, match=r"Fix: pad the vocabulary\."):
        ZipHead(TINY_GRID, "value", 20, 32).check(40, unused)


def test_ranges_that_fit_exactly_are_fine():
    ZipHead(TINY_GRID, "value", 31, 31).check(40, np.arange(40) >= 31)
    ZipHead(TINY_GRID, "value", 18, 18).check(27, FROM_18[:27])
    ZipHead(TINY_GRID, "value", 3, 40).check(40, (np.arange(40) >= 3) & (np.arange(40) < 12))


# ---- placeholders inside the tokenizer's ids

AMID = ZipHead(TINY_GRID, "value", first_id=5, used_ids=30)


def test_a_range_amid_the_tokenizers_ids_is_masked_and_nothing_else_is():
    kept = [*range(5), *range(14, 30)]
    assert np.flatnonzero(AMID.sampleable(V)).tolist() == kept
    logits = 5 * RNG.standard_normal((7, V)).astype(np.float32)
    policy = np.asarray(jax.nn.softmax(policy_logits(jnp.asarray(logits), AMID)))
    np.testing.assert_allclose(
        policy[:, kept], np.asarray(jax.nn.softmax(logits[:, kept])), rtol=1e-4
    )
    assert np.delete(policy, kept, axis=1).max() == 0
    folded = np.asarray(fold(TABLE, ROWS, AMID))
    np.testing.assert_array_equal(folded[5:14], ROWS)
    np.testing.assert_array_equal(
        np.delete(folded, range(5, 14), axis=0), np.delete(TABLE, range(5, 14), axis=0)
    )


def test_reserve_finds_the_first_run_and_prefers_rows_beyond_the_tokenizer():
    unused = np.zeros(60, bool)
    assert reserve(unused, TINY_GRID) is None
    unused[10:18] = True  # 8 ids, one too few
    assert reserve(unused, TINY_GRID) is None
    unused[20:29] = True
    assert reserve(unused, TINY_GRID) == 20
    unused[40:60] = True
    assert reserve(unused, TINY_GRID) == 20
    assert reserve(unused, TINY_GRID, used_ids=51) == 51
    assert reserve(unused, TINY_GRID, used_ids=52) == 20, "8 rows beyond the tokenizer are too few"
    assert reserve(unused, Grid.authors("value"), used_ids=40) is None
    assert reserve(np.ones(9, bool), TINY_GRID) == 0


@pytest.mark.parametrize("label", ["correct", "value"])
def test_qwen3_gets_the_ids_of_the_papers_authors(label):
    unused = np.arange(151_936) >= 151_669
    assert (
        reserve(unused, Grid.authors(label), 151_669)
        == reserve(unused, Grid.authors(label))
        == 151_669
    )


def with_tokenizer(tokenizer, spare=0, tied=True):
    config = dataclasses.replace(TINY_MODEL, vocab_size=tokenizer.size + spare, tied=tied)
    lm = LanguageModel.create(config, tokenizer, 0)
    return dataclasses.replace(lm, params=randomised(lm.params, 1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("make", "spare", "place"),
    [
        (gemma, 0, lambda t: t.backend.token_to_id("<unused0>")),
        (gemma, 8, lambda t: t.backend.token_to_id("<unused0>")),
        (gemma, 9, lambda t: t.size),
        # the template needs number 3
        (llama, 0, lambda t: t.backend.token_to_id("<|reserved_special_token_4|>")),
        (llama, 64, lambda t: t.size),
        (chatml, 9, lambda t: t.size),
    ],
)
def test_a_head_goes_where_the_tokenizer_emits_nothing_and_changes_no_other_logit(
    make, spare, place, tied
):
    plain = with_tokenizer(make(), spare, tied)
    found = plain.with_head(TINY_GRID, "value")
    head, size = found.head, plain.config.vocab_size
    assert (head.first_id, head.used_ids, found.config.vocab_size) == (
        place(make()),
        make().size,
        size,
    )
    assert not np.asarray(found.params["zip_rows"]).any()
    for name in ("embed", "unembed"):
        if name in plain.params["body"]:
            np.testing.assert_array_equal(found.params["body"][name], plain.params["body"][name])
    hidden = jnp.asarray(RNG.standard_normal((5, TINY_MODEL.d_model)), jnp.float32)
    before, after = (np.asarray(hidden @ m.folded_table().T) for m in (plain, found))
    elsewhere = np.delete(np.arange(size), range(head.first_id, head.last_id))
    np.testing.assert_array_equal(before[:, elsewhere], after[:, elsewhere])
    np.testing.assert_allclose(np.exp(joint_log_probs(jnp.asarray(after), head)), 1 / 9, atol=1e-6)
    assert np.isneginf(
        np.asarray(policy_logits(jnp.asarray(after), head))[:, head.first_id : head.last_id]
    ).all()


def test_without_room_the_vocabulary_is_padded():
    found = with_tokenizer(chatml(), 8).with_head(TINY_GRID, "value")
    assert (found.head.first_id, found.config.vocab_size) == (
        chatml().size,
        padded_vocab_size(chatml().size, TINY_GRID),
    )


def test_the_first_id_may_be_chosen():
    lm, size = with_tokenizer(gemma(), 20), gemma().size
    for first_id, vocab_size in [
        (4, size + 20),
        (25, size + 20),
        (size + 11, size + 20),
        (size + 12, 512),
    ]:
        found = lm.with_head(TINY_GRID, "value", first_id)
        assert (found.head.first_id, found.config.vocab_size) == (first_id, vocab_size)
    for first_id, message in [
        (3, r"reserved range 3\.\.11: the tokenizer really uses ids 3 of it"),
        (26, r"really uses ids 34 of it\. Fix: start it at \d+"),
        (size - 1, "really uses ids"),
        (504, r"reserved range 504\.\.512: the vocabulary ends at 511"),
    ]:
        with pytest.raises(UsageError, match=message):
            lm.with_head(TINY_GRID, "value", first_id)


def test_taking_the_head_off_gives_the_policy_back():
    lm = with_tokenizer(gemma())
    again = lm.with_head(TINY_GRID, "value").without_head()
    assert again.digest() == lm.digest()
    # Gemma's tokenizer has an id more than its text models have rows.
    body = lm.params["body"] | {"embed": lm.params["body"]["embed"][:-1]}
    config = dataclasses.replace(lm.config, vocab_size=lm.config.vocab_size - 1)
    short = (
        dataclasses.replace(lm, config=config, params={"body": body})
        .with_head(TINY_GRID, "value")
        .without_head()
    )
    assert short.config == config
    assert short.params["body"]["embed"].shape[0] == config.vocab_size


def test_a_head_on_placeholders_is_checked_again_when_it_is_loaded(tmp_path):
    lm = with_tokenizer(gemma()).with_head(TINY_GRID, "value")
    lm.save(tmp_path / "m")
    assert load(tmp_path / "m").head == lm.head
    dataclasses.replace(lm, head=dataclasses.replace(lm.head, first_id=26)).save(tmp_path / "m")
    with pytest.raises(
        UsageError, match=r"reserved range 26\.\.34: the tokenizer really uses ids 34 of it"
    ):
        load(tmp_path / "m")


def test_the_vocabulary_is_padded_to_a_multiple_of_128():
    for used in (1, 118, 119, 120, 128, 151_669):
        size = padded_vocab_size(used, TINY_GRID)
        assert size % 128 == 0
        assert used + 9 <= size < used + 9 + 128
    grown = fit_vocabulary(TABLE, 128)
    np.testing.assert_array_equal(grown[:V], TABLE)
    assert not np.asarray(grown[V:]).any()
    with pytest.raises(ValueError, match="40 rows, more than 39"):
        fit_vocabulary(TABLE, 39)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [len(WORDS) + 2, 128, 200])
def test_attaching_a_head_leaves_next_token_logits_bit_identical(tied, vocab_size):
    config = dataclasses.replace(TINY_MODEL, vocab_size=vocab_size, tied=tied)
    plain = LanguageModel.create(config, word_level(WORDS), 0)
    plain = dataclasses.replace(plain, params=randomised(plain.params, 1))
    with_head = plain.with_head(TINY_GRID, "value")
    used = plain.tokenizer.size
    assert with_head.config.vocab_size == max(vocab_size, 128)
    assert (with_head.head.first_id, with_head.head.used_ids) == (used, used)
    with_head = dataclasses.replace(
        with_head, params={**with_head.params, "zip_rows": 3 + with_head.params["zip_rows"]}
    )
    hidden = jnp.asarray(RNG.standard_normal((5, config.d_model)), jnp.float32)
    before, after = (np.asarray(hidden @ m.folded_table().T) for m in (plain, with_head))
    np.testing.assert_array_equal(before[:, :used], after[:, :used])
    masked = np.asarray(policy_logits(jnp.asarray(after), with_head.head))
    np.testing.assert_array_equal(masked[:, :used], before[:, :used])
    assert np.isneginf(masked[:, used:]).all()


def test_a_fresh_head_knows_nothing(lm):
    fresh = lm.with_head(Grid((0, 1), (0, 2, 4)), "correct")
    hidden = jnp.asarray(RNG.standard_normal((3, 32)), jnp.float32)
    np.testing.assert_allclose(
        np.exp(joint_log_probs(hidden @ fresh.folded_table().T, fresh.head)), 0.25, atol=1e-6
    )


def test_a_head_survives_its_dict():
    assert ZipHead.from_dict(HEAD.to_dict()) == HEAD


def test_a_vocabulary_below_the_tokenizers_is_refused():
    with pytest.raises(UsageError, match=r"model\.vocab_size=10: the tokenizer uses \d+ ids"):
        LanguageModel.create(dataclasses.replace(TINY_MODEL, vocab_size=10), word_level(WORDS), 0)


def test_the_digest_is_the_identity_of_what_was_computed():
    # Both are made here: that of the fixture may be of a file compiled otherwise (conftest.py).
    lm = tiny_lm()
    assert lm.digest() == tiny_lm().digest()
    rows = lm.params["zip_rows"].at[0, 0].add(1e-3)
    others = [
        dataclasses.replace(lm, params={**lm.params, "zip_rows": rows}),
        dataclasses.replace(lm, head=dataclasses.replace(lm.head, label="correct")),
        dataclasses.replace(lm, config=dataclasses.replace(lm.config, rope_theta=5.0)),
    ]
    assert len({m.digest() for m in [lm, *others]}) == 4
