"""The reserved range: one matmul for both, never sampled, and next-token logits that do not notice it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_GRID, TINY_MODEL, WORDS, randomised, tiny_lm

from zip_rc_jax.config import SamplingConfig
from zip_rc_jax.decoding.sampling import sample
from zip_rc_jax.errors import UsageError
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.tokenizer import word_level
from zip_rc_jax.zip_head import ZipHead, cell_log_probs, fit_vocabulary, fold, joint_log_probs, padded_vocab_size, policy_logits

HEAD = ZipHead(TINY_GRID, "value", first_id=20, used_ids=18)
V, D = 40, 16
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.standard_normal((V, D)), jnp.float32)
ROWS = jnp.asarray(RNG.standard_normal((9, D)), jnp.float32)
HIDDEN = jnp.asarray(RNG.standard_normal((7, D)), jnp.float32)


def test_one_matmul_with_the_folded_table_equals_two_separate_ones():
    logits = HIDDEN @ fold(TABLE, ROWS, HEAD).T
    separate = np.asarray(HIDDEN) @ np.asarray(TABLE).T
    np.testing.assert_allclose(np.delete(logits, range(20, 29), axis=1), np.delete(separate, range(20, 29), axis=1), atol=1e-5)
    np.testing.assert_allclose(logits[:, 20:29], np.asarray(HIDDEN) @ np.asarray(ROWS).T, atol=1e-5)
    np.testing.assert_allclose(joint_log_probs(logits, HEAD), cell_log_probs(HIDDEN @ ROWS.T, HEAD.grid), atol=1e-5)


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
    drawn = np.asarray(sample(keys, policy_logits(jnp.broadcast_to(jnp.asarray(logits), (10_000, V)), HEAD), sampling))
    assert drawn.max() < 18
    if sampling.temperature:
        assert set(drawn) == set(range(18))


@pytest.mark.parametrize(
    ("first_id", "used_ids", "vocab_size", "message"),
    [
        (17, 18, 40, r"reserved range 17\.\.25: the tokenizer really uses ids 17\.\.17 of it\. Fix: start it at 18 or later"),
        (0, 18, 40, r"uses ids 0\.\.8 of it"),
        (32, 18, 40, r"reserved range 32\.\.40: the vocabulary ends at 39, so 9 cells do not fit\. Fix: pad the vocabulary to 128"),
        (500, 18, 40, r"the vocabulary ends at 39"),
    ],
)
def test_impossible_ranges_say_so(first_id, used_ids, vocab_size, message):
    head = ZipHead(TINY_GRID, "value", first_id, used_ids)
    with pytest.raises(UsageError, match=message):
        head.check(vocab_size)
    with pytest.raises(UsageError, match=message):
        fold(TABLE, ROWS, head)


def test_ranges_that_fit_exactly_are_fine():
    ZipHead(TINY_GRID, "value", 31, 31).check(40)
    ZipHead(TINY_GRID, "value", 18, 18).check(27)


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
    with_head = dataclasses.replace(with_head, params={**with_head.params, "zip_rows": 3 + with_head.params["zip_rows"]})
    hidden = jnp.asarray(RNG.standard_normal((5, config.d_model)), jnp.float32)
    before, after = (np.asarray(hidden @ m.folded_table().T) for m in (plain, with_head))
    np.testing.assert_array_equal(before[:, :used], after[:, :used])
    masked = np.asarray(policy_logits(jnp.asarray(after), with_head.head))
    np.testing.assert_array_equal(masked[:, :used], before[:, :used])
    assert np.isneginf(masked[:, used:]).all()


def test_a_fresh_head_knows_nothing(lm):
    fresh = lm.with_head(Grid((0, 1), (0, 2, 4)), "correct")
    hidden = jnp.asarray(RNG.standard_normal((3, 32)), jnp.float32)
    np.testing.assert_allclose(np.exp(joint_log_probs(hidden @ fresh.folded_table().T, fresh.head)), 0.25, atol=1e-6)


def test_a_head_survives_its_dict():
    assert ZipHead.from_dict(HEAD.to_dict()) == HEAD


def test_a_vocabulary_below_the_tokenizers_is_refused():
    with pytest.raises(UsageError, match=r"model\.vocab_size=10: the tokenizer uses \d+ ids"):
        LanguageModel.create(dataclasses.replace(TINY_MODEL, vocab_size=10), word_level(WORDS), 0)


def test_the_digest_is_the_identity_of_what_was_computed(lm):
    assert lm.digest() == tiny_lm().digest()
    rows = lm.params["zip_rows"].at[0, 0].add(1e-3)
    others = [
        dataclasses.replace(lm, params={**lm.params, "zip_rows": rows}),
        dataclasses.replace(lm, head=dataclasses.replace(lm.head, label="correct")),
        dataclasses.replace(lm, config=dataclasses.replace(lm.config, rope_theta=5.0)),
    ]
    assert len({m.digest() for m in [lm, *others]}) == 4
