"""Training: losses against plain numpy, exact resumption, ZIP-RC-Lite, eight devices, and what is
on disk."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from harness.forwards import fast_jit
from harness.naive_loss import naive_losses
from harness.runs import (
    CONFIG,
    LITE,
    assert_equal,
    batches,
    copied,
    interrupt,
    records,
    rollouts,
    settings,
    sigterm,
    without_clock,
)
from harness.tiny import TINY_GRID, TINY_MODEL, tiny_lm
from zip_rc_jax.aot.costs import measure
from zip_rc_jax.aot.hlo import parse_module
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.data.batches import train_batches
from zip_rc_jax.evaluation.rollout_predictions import (
    RolloutPredictions,
    final_values,
    predict_rollouts,
)
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import policy_logits
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.predictions import ScoringConfig, padded_width
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh, single_device
from zip_rc_jax.training import trainer
from zip_rc_jax.training.features import labelled_features, teacher_features
from zip_rc_jax.training.loss import (
    FullTeacher,
    PolicyLoss,
    PolicyLosses,
    VocabChunking,
    joint_loss,
    policy_loss,
    split_positions,
    teacher_top_k,
    top_k,
)
from zip_rc_jax.training.step import (
    TrainSpec,
    TrainState,
    cast_teacher,
    init_state,
    learning_rate,
    losses,
    train_step,
)
from zip_rc_jax.training.trainer import Interrupted, split_validation, train

# ---- losses against plain numpy


def test_the_joint_loss_is_cross_entropy_and_survival_where_censored():
    rng = np.random.default_rng(0)
    n, edges = 200, TINY_GRID.length_edges
    joint = rng.dirichlet(np.full(9, 0.5), n).reshape(n, 3, 3)
    reward, remaining, censored = rng.random(n), rng.integers(1, 30, n), rng.random(n) < 0.4
    reward[:4] = [0.0, 0.15, 0.65, 1.0]
    expected = []
    for p, v, t, c in zip(joint, reward.astype(np.float32), remaining, censored, strict=True):
        b = 0 if v < np.float32(0.15) else 1 if v < np.float32(0.65) else 2
        at = 0 if t < edges[1] else 1 if t < edges[2] else 2
        expected.append(-np.log(p[b, at:].sum() if c else p[b, at]))
    found = joint_loss(
        jnp.log(jnp.asarray(joint, jnp.float32)),
        jnp.asarray(reward, jnp.float32),
        jnp.asarray(remaining),
        jnp.asarray(censored),
        TINY_GRID,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_censored_length_pulls_mass_to_every_later_bin_and_to_no_earlier_one():
    log_joint = jnp.log(jnp.full((1, 3, 3), 1 / 9))

    def loss(logits, censored):
        args = (jnp.asarray([1.0]), jnp.asarray([4]), jnp.asarray([censored]), TINY_GRID)
        return joint_loss(jax.nn.log_softmax(logits.reshape(1, 9)).reshape(1, 3, 3), *args)[0]

    seen, cut = (np.asarray(jax.grad(loss)(log_joint, c))[0] for c in (False, True))
    assert (seen < 0).tolist() == [[False] * 3, [False] * 3, [False, True, False]]
    assert (cut < 0).tolist() == [[False] * 3, [False] * 3, [False, True, True]]
    assert float(loss(log_joint, True)) == pytest.approx(-np.log(2 / 9), abs=1e-6)


RNG = np.random.default_rng(1)
B, S, D, V, USED = 3, 23, 6, 17, 13
HIDDEN, TEACHER_HIDDEN = RNG.standard_normal((2, B, S, D)).astype(np.float32)
TABLE, TEACHER_TABLE = 2 * RNG.standard_normal((2, V, D)).astype(np.float32)
TARGETS = jnp.asarray(RNG.integers(0, USED, (B, S)))
SAMPLEABLE = np.arange(V) < USED
ONE = Layout(make_mesh(), TRAIN_RULES)


# 0 where not labelled
WEIGHTS = jnp.asarray(RNG.random((B, S)) * (RNG.random((B, S)) < 0.6), jnp.float32)
LAST = jnp.asarray(np.arange(S) >= S - 3, jnp.float32) * jnp.ones((B, 1))


def given_teacher(kind, vocabulary, weights, top_k=4):
    teacher = FullTeacher(jnp.asarray(TEACHER_HIDDEN), jnp.asarray(TEACHER_TABLE))
    return (
        teacher_top_k(vocabulary, teacher, weights != 0, SAMPLEABLE, top_k)
        if kind == "forward_topk"
        else teacher
    )


@functools.partial(jax.jit, static_argnames=("kind", "chunk", "teacher", "layout"))
def found_losses(hidden, table, kind, weights=WEIGHTS, chunk=21, teacher=True, layout=ONE):
    vocabulary = VocabChunking(TINY_MODEL, layout, chunk)
    setting = PolicyLoss(vocabulary, kind, kl_weight=1.0, nll_weight=0.3)
    given = given_teacher(kind, vocabulary, weights) if teacher else None
    return policy_loss(
        setting, jnp.asarray(hidden), jnp.asarray(table), TARGETS, weights, SAMPLEABLE, given
    )


def expected_losses(hidden, table, kind, weights=WEIGHTS, top_k=4):
    parts = naive_losses(
        hidden, table[:USED], TARGETS, TEACHER_HIDDEN, TEACHER_TABLE[:USED], kind, top_k
    )
    nll, kl = (jnp.sum(weights * x) for x in parts)
    return kl + 0.3 * nll, PolicyLosses(nll, kl)


def assert_losses_equal(found, expected):
    """Loss and parts, and the gradients of (hidden, table)."""
    (value, gradients), (naive_value, naive_gradients) = found, expected
    np.testing.assert_allclose(jax.tree.leaves(value), jax.tree.leaves(naive_value), rtol=2e-5)
    for a, b in zip(gradients, naive_gradients, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("weights", [jnp.ones((B, S)), WEIGHTS, LAST], ids=["all", "some", "last"])
@pytest.mark.parametrize("kind", ["forward_topk", "forward", "reverse"])
def test_losses_and_their_gradients_equal_the_naive_ones(kind, weights):
    found, naive = (
        jax.value_and_grad(
            functools.partial(f, kind=kind, weights=weights), argnums=(0, 1), has_aux=True
        )(HIDDEN, TABLE)
        for f in (found_losses, expected_losses)
    )
    assert_losses_equal(found, naive)
    assert not np.asarray(found[1][1][USED:]).any(), (
        "reserved and padding rows get no gradient from the policy"
    )
    assert_equal(found_losses(HIDDEN, TABLE, kind, weights), found[0])


@pytest.mark.parametrize("kind", ["forward_topk", "forward", "reverse"])
def test_the_chunk_size_does_not_matter(kind):
    gradient = jax.value_and_grad(found_losses, argnums=(0, 1), has_aux=True)
    whole = gradient(HIDDEN, TABLE, kind, chunk=B * S)
    for chunk in (1, 5, 22, 24, 68, 1000):
        assert_losses_equal(gradient(HIDDEN, TABLE, kind, chunk=chunk), whole)


@pytest.mark.parametrize("kind", ["forward_topk", "forward", "reverse"])
def test_a_factor_of_the_loss_is_one_of_its_gradient(kind):
    """Also in the dtype of bfloat16 states."""
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    one, four = (
        jax.grad(lambda h, t, f=f: f * found_losses(h, t, kind)[0] + 3, argnums=(0, 1))(
            hidden, jnp.asarray(TABLE)
        )
        for f in (1, 4)
    )
    assert [x.dtype for x in one] == [jnp.bfloat16, jnp.float32]
    assert_equal(jax.tree.map(lambda x: 4 * x, one), four)


def test_without_labelled_positions_loss_and_gradient_are_zero():
    found = jax.value_and_grad(found_losses, argnums=(0, 1), has_aux=True)(
        HIDDEN, TABLE, "forward_topk", jnp.zeros((B, S))
    )
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(found))


def test_positions_without_weight_are_not_looked_at():
    """Not even where their states are not finite; and their chunks are skipped, not multiplied by
    0."""
    hidden = jnp.where(WEIGHTS[..., None] == 0, jnp.nan, HIDDEN)
    gradient = jax.value_and_grad(found_losses, argnums=(0, 1), has_aux=True)
    assert_equal(
        gradient(hidden, TABLE, "forward"),
        gradient(jnp.where(WEIGHTS[..., None] == 0, 0, HIDDEN), TABLE, "forward"),
    )
    seen = []

    def count(carry, positions):
        jax.debug.callback(lambda x: seen.append(x.tolist()), positions)
        return carry + 1

    wanted = jnp.asarray([False, True, True, False, True, False, False, False])
    scan = jax.jit(VocabChunking(TINY_MODEL, ONE, 2).scan_chunks, static_argnums=0)
    assert int(scan(count, 0, wanted)) == 2
    assert seen == [[1, 2], [4, 8]], "the last is no position"


@pytest.mark.parametrize("kind", ["forward_topk", "forward", "reverse"])
def test_the_loss_on_a_mesh_is_that_of_one_device(kind):
    """Rows and width over `data` and `fsdp`, ids over `tensor`; labelled positions lie unevenly
    over the rows."""
    rng, shape = np.random.default_rng(2), (8, 16)
    hidden, teacher_hidden = rng.standard_normal((2, *shape, 8)).astype(np.float32)
    table, teacher_table = 2 * rng.standard_normal((2, 20, 8)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, USED, shape))
    weights = jnp.asarray(
        rng.random(shape) * (np.arange(16) < 2 * np.arange(8)[:, None]), jnp.float32
    )

    def loss(hidden, table, layout):
        vocabulary, sampleable = VocabChunking(TINY_MODEL, layout, 32), np.arange(20) < USED
        teacher = FullTeacher(jnp.asarray(teacher_hidden), jnp.asarray(teacher_table))
        if kind == "forward_topk":
            teacher = teacher_top_k(vocabulary, teacher, weights != 0, sampleable, 4)
        return policy_loss(
            PolicyLoss(vocabulary, kind, 1.0, 0.3),
            hidden,
            table,
            targets,
            weights,
            sampleable,
            teacher,
        )

    def naive(hidden, table):
        parts = naive_losses(
            hidden, table[:USED], targets, teacher_hidden, teacher_table[:USED], kind, 4
        )
        nll, kl = (jnp.sum(weights * x) for x in parts)
        return kl + 0.3 * nll, PolicyLosses(nll, kl)

    expected = jax.value_and_grad(naive, argnums=(0, 1), has_aux=True)(hidden, table)
    for mesh in (
        {},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 8},
        {"data": 8},
        {"fsdp": 2, "tensor": 4},
    ):
        layout = Layout(make_mesh(**mesh), TRAIN_RULES)
        placed = layout.shard((hidden, table), (("batch", None, None), ("vocab", "embed")))
        gradient = jax.value_and_grad(
            functools.partial(loss, layout=layout), argnums=(0, 1), has_aux=True
        )
        compiled = fast_jit(gradient).lower(*placed).compile()
        found = compiled(*placed)
        assert_losses_equal(found, expected)
        assert found[1][1].sharding.is_equivalent_to(placed[1].sharding, 2), (
            "the table's gradient lies where the table lies"
        )
        whole = f"f32[{20 // layout.ways('vocab')},8]"
        summed = [
            c.count
            for c in measure(parse_module(compiled.as_text()), per_step=False).collectives
            if whole in c.shape
        ]
        assert bool(summed) == (layout.ways("batch") > 1)
        assert set(summed) <= {1}, "once, not in every chunk"


@pytest.mark.parametrize("size", [60, 64, 1000, 1024])
def test_the_largest_are_found_in_the_groups_with_the_largest_maxima(size):
    x = jnp.asarray(
        np.random.default_rng(4).permutation(3 * 2 * size).reshape(3, 2, size), jnp.float32
    )
    for found, expected in zip(top_k(x, 4, group=8), jax.lax.top_k(x, 4), strict=True):
        np.testing.assert_array_equal(found, expected)
    equal = top_k(jnp.zeros((1, size)), 4, group=8)[1]
    assert len(set(np.asarray(equal)[0].tolist())) == 4, "of equal values, any, but each once"
    assert np.asarray(equal).max() < size, "and no padding"


@pytest.mark.parametrize("size", [20, 4400])
def test_of_a_vocabulary_over_devices_only_the_likeliest_ids_of_every_part_are_gathered(size):
    """Also where a part has fewer ids than are kept, and where it is no whole number of groups."""
    rng, (rows, k, parts) = np.random.default_rng(5), ((4, 8), 7, 4)
    hidden, table = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((*rows, D), (size, D))
    )
    sampleable, everywhere = np.arange(size) < size - 3, jnp.ones(rows, bool)

    def top(layout):
        vocabulary = VocabChunking(TINY_MODEL, layout, chunk=16)
        return (
            fast_jit(
                lambda h, t: teacher_top_k(vocabulary, FullTeacher(h, t), everywhere, sampleable, k)
            )
            .lower(hidden, table)
            .compile()
        )

    split = top(Layout(make_mesh(data=2, tensor=parts), TRAIN_RULES))
    expected, found = top(ONE)(hidden, table), split(hidden, table)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    gathered = [
        c
        for c in measure(parse_module(split.as_text()), per_step=False).collectives
        if "shard_map" in c.op_name
    ]
    positions, of_all_parts = 16 // 2, parts * min(k, size // parts)
    assert {c.shape for c in gathered} == {
        f"{dtype}[{positions},{of_all_parts}]" for dtype in ("f32", "s32")
    }, gathered


def test_chunks_are_even():
    assert split_positions(32768, chunk=1024) == (32, 1024)
    assert split_positions(23, chunk=7) == (4, 6), (
        "23 positions in four chunks of 6, one of them of 5"
    )
    assert split_positions(23, chunk=0) == (23, 1), "at least one position"
    assert split_positions(23, chunk=1000) == (1, 23)
    for positions, chunk in itertools.product((1, 7, 64), (1, 5, 64, 200)):
        chunks, width = split_positions(positions, chunk)
        assert positions <= chunks * width < positions + chunks
        assert width <= chunk


def test_no_array_of_all_positions_times_the_vocabulary_exists():
    def f(hidden, table):
        setting = PolicyLoss(
            VocabChunking(TINY_MODEL, ONE, 64), "forward", kl_weight=1, nll_weight=1
        )
        shape, sampleable = (2, 2048), np.arange(999) < 900
        return policy_loss(
            setting,
            hidden,
            table,
            jnp.zeros(shape, jnp.int32),
            jnp.ones(shape),
            sampleable,
            FullTeacher(hidden, table),
        )[0]

    text = str(
        jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(jnp.zeros((2, 2048, 8)), jnp.zeros((999, 8)))
    )
    assert "64,999" in text
    assert "2048,999" not in text
    assert "4096,999" not in text
    assert "64,64,999" not in text, "nothing of that size is stacked for the backward pass"


@pytest.mark.parametrize("kind", ["forward_topk", "forward", "reverse"])
def test_peak_memory_is_that_of_a_few_chunks(kind):
    """2,048 positions in chunks of 64; `benchmarks/loss.py` does the same for a real vocabulary."""
    shapes = [(1, 2048, D), (1500, D)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes + shapes]

    def chunked(hidden, table, teacher_hidden, teacher_table):
        vocabulary, sampleable, ones = (
            VocabChunking(TINY_MODEL, ONE, 64),
            np.ones(1500, bool),
            jnp.ones((1, 2048)),
        )
        teacher = FullTeacher(teacher_hidden, teacher_table)
        if kind == "forward_topk":
            teacher = teacher_top_k(vocabulary, teacher, ones != 0, sampleable, 4)
        setting = PolicyLoss(vocabulary, kind, kl_weight=1, nll_weight=1)
        return policy_loss(
            setting, hidden, table, jnp.zeros((1, 2048), jnp.int32), ones, sampleable, teacher
        )[0]

    def at_once(hidden, table, teacher_hidden, teacher_table):
        nll, kl = naive_losses(
            hidden, table, jnp.zeros((1, 2048), jnp.int32), teacher_hidden, teacher_table, kind, 4
        )
        return jnp.sum(nll + kl)

    found, naive = (
        jax.jit(jax.grad(f, argnums=(0, 1)))
        .lower(*arrays)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (chunked, at_once)
    )
    one = 4 * 2048 * 1500
    assert naive > 2 * one
    assert found < one / 4


def test_kl_is_zero_for_the_teacher_itself_and_absent_without_one():
    for kind in ("forward", "reverse"):
        assert float(found_losses(TEACHER_HIDDEN, TEACHER_TABLE, kind)[1].kl) == pytest.approx(
            0, abs=1e-5
        )
    # The truncated teacher keeps mass m < 1 on its top ids, so its divergence from itself is -log
    # m.
    p = np.sort(np.asarray(jax.nn.softmax(TEACHER_HIDDEN @ TEACHER_TABLE[:USED].T)))
    expected = np.sum(WEIGHTS * -np.log(p[..., -4:].sum(-1)))
    assert float(
        found_losses(TEACHER_HIDDEN, TEACHER_TABLE, "forward_topk")[1].kl
    ) == pytest.approx(float(expected), rel=1e-4)
    without, given = (
        found_losses(HIDDEN, TABLE, "forward", teacher=teacher)[1] for teacher in (False, True)
    )
    assert float(without.kl) == 0
    assert float(without.nll) == pytest.approx(float(given.nll), rel=1e-6)


def test_the_loss_is_the_weighted_sum_of_means_over_labelled_positions(lm):
    (batch,) = batches()
    found = fast_jit(functools.partial(losses, settings(lm), lm.params, lm.params["body"]))
    loss, parts = found(batch)
    assert float(loss) == pytest.approx(
        float(1.5 * parts["joint"] + 0.5 * parts["kl"] + 0.25 * parts["nll"]), rel=1e-5
    )
    noise = dataclasses.replace(
        batch,
        reward=jnp.where(batch.labelled, batch.reward, 0.9),
        remaining=jnp.where(batch.labelled, batch.remaining, 77),
        targets=jnp.where(batch.labelled, batch.targets, 3),
    )
    assert float(found(noise)[0]) == float(loss), "unlabelled positions do not count"


def test_bfloat16_computes_close_to_float32_and_leaves_float32_gradients(lm):
    (batch,) = batches()
    teacher = jax.tree.map(lambda x: 1.2 * x, lm.params["body"])
    found = []
    for dtype in ("float32", "bfloat16"):
        setting = settings(lm, dataclasses.replace(CONFIG, compute_dtype=dtype))
        objective = jax.value_and_grad(
            lambda p, s=setting: losses(s, p, cast_teacher(teacher, s.train), batch)[0]
        )
        assert ("bf16" in str(jax.make_jaxpr(objective)(lm.params))) == (dtype == "bfloat16")
        found.append(fast_jit(objective)(lm.params))
    (loss, grads), (half_loss, half_grads) = found
    assert half_loss.dtype == jnp.float32
    assert float(half_loss) == pytest.approx(float(loss), rel=0.02)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(half_grads))
    for a, b in zip(jax.tree.leaves(half_grads), jax.tree.leaves(grads), strict=True):
        assert 0.97 < float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))) < 1 - 1e-7


def test_gradients_of_many_chunks_are_summed_in_float32():
    """512 chunks in bfloat16: a sum in bfloat16 would lose all of a term that is 256 times
    smaller."""
    hidden = jnp.asarray(np.random.default_rng(6).standard_normal((1, 512, D)), jnp.bfloat16)

    def gradient(chunk):
        def total(table):
            setting = PolicyLoss(
                VocabChunking(TINY_MODEL, ONE, chunk), "forward", kl_weight=0, nll_weight=1
            )
            return policy_loss(
                setting,
                hidden,
                table,
                jnp.ones((1, 512), jnp.int32),
                jnp.ones((1, 512)),
                SAMPLEABLE,
                None,
            )[0]

        return fast_jit(jax.grad(total))(jnp.asarray(TABLE))

    whole = gradient(512)
    np.testing.assert_allclose(gradient(1), whole, atol=1e-3 * float(jnp.abs(whole).max()))


def test_cached_features_give_the_loss_and_the_gradient_of_the_body_itself(lm):
    """One batch that holds every rollout once, with the body and from its cached hidden states."""
    config = dataclasses.replace(LITE, batch_rows=40)
    found = []
    for features in (None, labelled_features(lm, rollouts(), ScoringConfig(4 * 24))):
        (batch,) = train_batches(
            rollouts(),
            label=config.label,
            batch_rows=40,
            row_tokens=config.row_tokens,
            seed=0,
            epochs=1,
            features=features,
        )
        setting = TrainSpec(lm.config, lm.head, Layout(lm.layout.mesh, TRAIN_RULES), config)

        def objective(rows, batch=batch, setting=setting):
            return losses(setting, {**lm.params, "zip_rows": rows}, None, batch)[0]

        found.append(jax.value_and_grad(objective)(lm.params["zip_rows"]))
    (loss, grad), (cached_loss, cached_grad) = found
    assert float(loss) == pytest.approx(float(cached_loss), rel=1e-5)
    np.testing.assert_allclose(grad, cached_grad, atol=1e-5)


def test_predictions_do_not_depend_on_how_many_tokens_go_together(lm):
    data, settings = rollouts(), ScoringConfig(32)
    alone, together = (
        predict_rollouts(lm, data, dataclasses.replace(settings, batch_tokens=tokens))
        for tokens in (1, 4096)
    )  # fmt: skip
    for mine, other, rollout in zip(alone, together, data, strict=True):
        assert len(mine.reward) == len(rollout.output_token_ids)
        np.testing.assert_allclose(mine.reward, other.reward, atol=1e-5)
        np.testing.assert_allclose(mine.first_joint, other.first_joint, atol=1e-5)
    half = predict_rollouts(lm, data, dataclasses.replace(settings, dtype="bfloat16"))
    assert (
        max(float(np.abs(a.reward - b.reward).max()) for a, b in zip(alone, half, strict=True))
        > 1e-4
    ), "the dtype is not ignored"


def test_widths_are_few_and_little_of_them_is_padding():
    widths = [padded_width(n) for n in range(1, 32769)]
    assert all(n <= w and (w - n < 32 or 8 * w <= 9 * n) for n, w in enumerate(widths, 1))
    assert len(set(widths)) < 70
    assert all(w % 128 == 0 for w in widths if w > 1024), "as kernels for long rows want it"


def test_a_sure_critic_gives_no_value_above_one():
    """In float32 the mean of rewards of 1 may round to a little more, which no later stage would
    take."""
    logits = jnp.asarray(
        np.random.default_rng(0).standard_normal((200_000, 2, 8)) + np.array([0, 18])[:, None],
        jnp.float32,
    )
    reward = np.asarray(
        Grid((0.0, 1.0), tuple(range(9))).expected_reward(
            jax.nn.softmax(logits.reshape(-1, 16)).reshape(-1, 2, 8)
        )
    )
    assert 0.999 < reward.min() <= reward.max() <= 1
    none = np.empty(0, np.float32)
    parts = [reward[i : i + 7] for i in range(0, 1000, 7)]
    found = [RolloutPredictions(part, none, none, none) for part in parts]
    assert final_values(found, 7).max() <= 1


def test_a_cached_teacher_gives_the_loss_and_gradient_of_the_one_on_the_device(lm):
    """A starting policy that is not the student, in packed rows with prompts and padding."""
    policy = dataclasses.replace(
        lm, params={**lm.params, "body": jax.tree.map(lambda x: 1.2 * x, lm.params["body"])}
    )
    config = dataclasses.replace(CONFIG, cache_teacher=True)
    data = functools.partial(
        train_batches, rollouts(), label="value", batch_rows=4, row_tokens=24, seed=0
    )
    found = []
    for batch, body in (
        (next(iter(data())), policy.params["body"]),
        (next(iter(data(teacher=teacher_features(policy, rollouts(), config)))), None),
    ):
        objective = fast_jit(
            jax.value_and_grad(lambda p, b, t: losses(settings(lm, config), p, t, b), has_aux=True)
        )
        found.append(objective(lm.params, jax.tree.map(jnp.asarray, batch), body))
    ((loss, parts), grads), ((cached_loss, cached_parts), cached_grads) = found
    assert float(parts["kl"]) > 0.1
    assert float(cached_parts["kl"]) == pytest.approx(float(parts["kl"]), rel=1e-5)
    assert float(cached_loss) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1)),
        cached_grads,
        grads,
    )


def test_lite_on_cached_features_learns_without_running_the_body_again(tmp_path):
    lm = tiny_lm()
    trained = train(
        lm,
        rollouts(),
        dataclasses.replace(LITE, cache_features=True, steps=30),
        tmp_path,
        source={},
    )
    jax.tree.map(np.testing.assert_array_equal, trained.params["body"], lm.params["body"])
    found = [r["train/joint"] for r in records(tmp_path)]
    assert found[-1] < found[0]


# ---- the schedule and one step


@pytest.mark.parametrize(
    ("steps", "warmup"), [(100, 0.05), (7, 0.3), (10, 0.0), (1, 0.0), (1, 0.9)]
)
def test_the_first_step_and_the_last_one_move_and_the_schedule_is_zero_after_it(steps, warmup):
    config = TrainConfig(steps=steps, warmup=warmup, learning_rate=2.0)
    rates = [float(learning_rate(jnp.int32(i), config)) for i in range(steps)]
    warm = max(1, round(warmup * steps))
    expected = [2 * (i + 1) / warm for i in range(min(warm, steps))]
    expected += [
        1 + np.cos(np.pi * (i + 1 - warm) / (steps + 1 - warm)) for i in range(warm, steps)
    ]
    assert rates == pytest.approx(expected, abs=1e-6)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(2)
    assert float(learning_rate(jnp.int32(steps), config)) == pytest.approx(0, abs=1e-6)


def test_the_first_step_is_adamw_with_clipping_written_out(lm):
    (batch,) = batches()
    grads = fast_jit(jax.grad(lambda p: losses(settings(lm), p, lm.params["body"], batch)[0]))(
        lm.params
    )
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    assert norm > CONFIG.clip, "clipping acts"
    state, metrics = train_step(
        settings(lm), init_state(copied(lm.params), CONFIG), lm.params["body"], batch
    )
    rate = 1e-2 / 2  # two of seven steps warm up
    assert float(metrics["learning_rate"]) == pytest.approx(rate)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    for name in ("body", "zip_rows"):

        def moved(p, g, scale=rate * (3.0 if name == "zip_rows" else 1.0)):
            g = np.asarray(g) * CONFIG.clip / norm
            return np.asarray(p) - scale * (
                g / (np.abs(g) + 1e-8) + CONFIG.weight_decay * np.asarray(p)
            )

        expected = jax.tree.map(moved, lm.params[name], grads[name])
        # Where the gradient is as small as Adam's epsilon, its rounding decides.
        clear = jax.tree.map(lambda g: np.abs(np.asarray(g)) > 1e-4, grads[name])
        jax.tree.map(
            lambda a, b, c: np.testing.assert_allclose(np.asarray(a)[c], b[c], atol=2e-5),
            state.params[name],
            expected,
            clear,
        )
    assert (int(state.step), int(state.skipped)) == (1, 0)


def test_keeping_activations_changes_what_is_computed_again_and_nothing_else(lm):
    (batch,) = batches()
    found, programs = [], []
    for remat in (True, False):
        setting = settings(lm, dataclasses.replace(CONFIG, remat=remat))
        objective = jax.value_and_grad(
            lambda p, s=setting: losses(s, p, lm.params["body"], batch)[0]
        )
        found.append(jax.jit(objective)(lm.params))
        programs.append(str(jax.make_jaxpr(objective)(lm.params)).count("remat"))
    assert programs[0] > programs[1]
    (loss, grads), (kept_loss, kept_grads) = found
    assert float(loss) == pytest.approx(float(kept_loss), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max() + 1e-7),
        grads,
        kept_grads,
    )


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["all", "lite"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_whose_loss_is_not_finite_changes_nothing_but_the_counters(lm, config, bad):
    (batch,) = batches(config)
    good = init_state(copied(lm.params), config)
    poisoned = {**copied(lm.params), "zip_rows": lm.params["zip_rows"].at[2, 3].set(bad)}
    state = TrainState(poisoned, good.opt_state, good.step, good.skipped)
    before = jax.tree.map(np.asarray, state)
    teacher = lm.params["body"] if config.kl_weight else None
    after, metrics = train_step(settings(lm, config), state, teacher, batch)
    assert not np.isfinite(float(metrics["loss"]))
    assert_equal(after.params, before.params)
    assert_equal(after.opt_state, before.opt_state)
    assert (int(after.step), int(after.skipped)) == (1, 1)


# ---- ZIP-RC-Lite


@pytest.mark.parametrize("tied", [True, False])
def test_lite_leaves_every_next_token_logit_bit_identical_while_the_joint_learns(tmp_path, tied):
    lm = tiny_lm(dataclasses.replace(TINY_MODEL, tied=tied))
    trained = train(
        lm, rollouts(), dataclasses.replace(LITE, steps=20), tmp_path / "lite", source={}
    )
    assert_equal(trained.params["body"], lm.params["body"])
    hidden = jnp.asarray(
        np.random.default_rng(0).standard_normal((50, TINY_MODEL.d_model)), jnp.float32
    )
    before, after = (
        np.asarray(policy_logits(hidden @ m.folded_table().T, lm.head)) for m in (lm, trained)
    )
    np.testing.assert_array_equal(before, after)
    assert np.abs(np.asarray(trained.params["zip_rows"] - lm.params["zip_rows"])).min() > 0
    joint = [r["train/joint"] for r in records(tmp_path / "lite")]
    assert np.mean(joint[-3:]) < np.mean(joint[:3]) - 0.1
    assert trained.params["zip_rows"].shape == (9, 32)


def test_training_everything_moves_the_body_too_and_the_caller_keeps_its_model(tmp_path):
    lm = tiny_lm()
    digest = lm.digest()
    trained = train(lm, rollouts(), CONFIG, tmp_path / "all", source={})
    assert lm.digest() == digest, "the step donates its state, not the caller's parameters"
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trained.params, lm.params)
    assert min(jax.tree.leaves(moved)) > 0
    assert {
        "train/joint",
        "train/kl",
        "train/nll",
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "step",
    } <= set(records(tmp_path / "all")[0])


# ---- interruption


def crash():
    raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return {
        c.trainable: (
            train(tiny_lm(), rollouts(), c, directory / c.trainable, source={}),
            directory / c.trainable,
        )
        for c in (CONFIG, LITE)
    }


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["all", "lite"])
@pytest.mark.parametrize("at", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path, monkeypatch, uninterrupted, config, at
):
    whole, where = uninterrupted[config.trainable]
    previous = signal.getsignal(signal.SIGTERM)
    interrupt(monkeypatch, at, sigterm)
    with pytest.raises(Interrupted, match=f"stopped by signal 15 at step {at} of {config.steps}"):
        train(tiny_lm(), rollouts(), config, tmp_path / "run", source={})
    assert signal.getsignal(signal.SIGTERM) is previous
    assert not (tmp_path / "run" / "model").exists()
    interrupt(monkeypatch, 1, sigterm)  # and once more, right after the resume
    with pytest.raises(Interrupted, match=f"at step {at + 1} "):
        train(tiny_lm(), rollouts(), config, tmp_path / "run", source={})
    monkeypatch.undo()
    resumed = train(tiny_lm(), rollouts(), config, tmp_path / "run", source={})
    assert_equal(resumed.params, whole.params)
    assert without_clock(records(tmp_path / "run")) == without_clock(records(where))
    assert [r["step"] for r in records(where)] == list(range(1, config.steps + 1))


def test_training_with_a_cached_teacher_is_training_with_one(tmp_path, uninterrupted):
    _, where = uninterrupted["all"]
    train(
        tiny_lm(),
        rollouts(),
        dataclasses.replace(CONFIG, cache_teacher=True),
        tmp_path / "run",
        source={},
    )
    for cached, whole in zip(records(tmp_path / "run"), records(where), strict=True):
        assert cached["train/kl"] == pytest.approx(whole["train/kl"], rel=1e-3, abs=1e-6)
        assert cached["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-4)


def test_a_cached_teacher_is_made_once_in_a_run_and_before_that_its_settings_are_checked(
    tmp_path, monkeypatch
):
    cached = dataclasses.replace(CONFIG, cache_teacher=True)
    made = []
    monkeypatch.setattr(
        trainer, "teacher_features", lambda *args: made.append(args) or teacher_features(*args)
    )

    def run(name, config=cached, lm=None):
        return train(lm or tiny_lm(), rollouts(), config, tmp_path / name, source={})

    whole = run("whole")
    kept = tmp_path / "run" / "teacher_top_k.npz"
    assert not (tmp_path / "whole" / kept.name).exists(), "a finished run needs it no more"
    interrupt(monkeypatch, 2, sigterm)
    with pytest.raises(Interrupted):
        run("run")
    assert (len(made), kept.exists()) == (2, True)
    with pytest.raises(UsageError, match=r"other settings: train.learning_rate"):
        run("run", dataclasses.replace(cached, learning_rate=0.5))
    assert len(made) == 2, "refused at once"
    assert_equal(run("run").params, whole.params)
    assert len(made) == 2
    other = tmp_path / "other" / kept.name
    for lm, count in (
        (tiny_lm(), 3),
        (tiny_lm(), 3),
        (tiny_lm(seed=9), 4),
        (tiny_lm(), 5),
        (None, 6),
    ):
        if lm is None:
            other.write_bytes(other.read_bytes()[:100])
        interrupt(monkeypatch, 1, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run("other", lm=lm)
        assert len(made) == count, "what was made of another policy, or is cut, is made again"


def test_a_crash_between_checkpoints_goes_back_to_the_last_one_and_leaves_no_record_twice(
    tmp_path, monkeypatch, uninterrupted
):
    whole, where = uninterrupted["zip_rows"]
    often = dataclasses.replace(LITE, save_seconds=1e-9)
    interrupt(monkeypatch, 4, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny_lm(), rollouts(), often, tmp_path / "run", source={})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        # a record past the checkpoint, and a torn line
        log.write('{"step": 4, "train/joint": 99}\n{"step": 5, "tra')
    monkeypatch.undo()
    resumed = train(tiny_lm(), rollouts(), often, tmp_path / "run", source={})
    assert_equal(resumed.params, whole.params)
    assert without_clock(records(tmp_path / "run")) == without_clock(records(where))


def test_a_finished_run_is_loaded_not_repeated(monkeypatch, uninterrupted):
    whole, where = uninterrupted["all"]
    interrupt(monkeypatch, 1, crash)
    again = train(tiny_lm(), rollouts(), CONFIG, where, source={})
    assert_equal(again.params, whole.params)
    assert again.info["skipped_steps"] == 0
    free = dataclasses.replace(
        CONFIG,
        log_every=3,
        evaluations=1,
        save_seconds=9,
        keep_checkpoints=1,
        max_skipped=99,
        remat=False,
        loss_chunk=7,
    )
    assert_equal(train(tiny_lm(), rollouts(), free, where, source={}).params, whole.params)


def test_other_settings_in_the_same_directory_are_refused(tmp_path, monkeypatch, uninterrupted):
    _, where = uninterrupted["all"]
    for config, source, message in [
        (
            dataclasses.replace(CONFIG, learning_rate=0.5),
            {},
            r"other settings: train.learning_rate was 0.01, now 0.5.*use another run_dir",
        ),
        (CONFIG, {"data": "other"}, r"other settings: .*source.data was None, now 'other'"),
    ]:
        with pytest.raises(UsageError, match=message):
            train(tiny_lm(), rollouts(), config, where, source=source)
    interrupt(monkeypatch, 2, sigterm)
    with pytest.raises(Interrupted):
        train(tiny_lm(), rollouts(), CONFIG, tmp_path / "run", source={})
    written = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(UsageError, match=r"other settings: train.steps was 7, now 8"):
        train(
            tiny_lm(), rollouts(), dataclasses.replace(CONFIG, steps=8), tmp_path / "run", source={}
        )
    assert (tmp_path / "run" / "settings.json").read_text() == written, (
        "a refused run leaves the directory as it was"
    )


def test_a_model_without_a_head_cannot_be_trained(tmp_path):
    with pytest.raises(UsageError, match="no ZIP head to train. Fix: attach one first"):
        train(dataclasses.replace(tiny_lm(), head=None), rollouts(), CONFIG, tmp_path, source={})


def of_prompts(prompts):
    """Two rollouts of each of these prompts, which are numbers."""
    return [
        dataclasses.replace(r, prompt_token_ids=[2, 3, prompts[r.prompt_index]])
        for r in rollouts(2 * len(prompts))
    ]


def test_validation_holds_back_whole_prompts():
    data = of_prompts(range(15))
    training, validation = split_validation(data, 8)
    assert len(validation) == 8
    assert len(training) == 22
    assert not {r.prompt_index for r in training} & {r.prompt_index for r in validation}
    assert split_validation(data, 0) == (data, [])
    with pytest.raises(UsageError, match="eval_rollouts=500: there are only 30 rollouts"):
        split_validation(data, 500)


def test_copies_of_a_prompt_are_all_trained_on_or_all_held_back():
    # as sums of two digits: most of them come again
    prompts = np.random.default_rng(0).integers(0, 200, 500).tolist()
    held = []
    for order in (prompts, prompts[::-1]):
        training, validation = split_validation(of_prompts(order), 200)
        texts = [{int(r.prompt_token_ids[-1]) for r in part} for part in (training, validation)]
        assert texts[0].isdisjoint(texts[1])
        assert len(training) + len(validation) == 1000
        assert abs(len(validation) - 200) < 10
        assert 0.15 < len(texts[1]) / len(set(prompts)) < 0.25, (
            "the frequent ones are held back no more and no less often"
        )
        held.append(texts[1])
    assert held[0] == held[1], "which ones does not depend on where they stand"


# ---- eight devices


MESH = {"data": 2, "fsdp": 2, "tensor": 2}
OTHER = {"data": 1, "fsdp": 4, "tensor": 2}


def test_parameters_lie_where_the_rules_say(lm):
    layout = Layout(make_mesh(**MESH), TRAIN_RULES)
    params = layout.shard(
        lm.params, {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    )
    blocks = params["body"]["blocks"]["0_attention"]
    wanted = {
        "q": (PartitionSpec(None, "fsdp", "tensor", None), (3, 16, 3, 10)),
        "v": (PartitionSpec(None, "fsdp", "tensor", None), (3, 16, 1, 10)),
        "o": (PartitionSpec(None, "tensor", None, "fsdp"), (3, 3, 10, 16)),
        "up": (PartitionSpec(None, "fsdp", "tensor"), (3, 16, 20)),
        "down": (PartitionSpec(None, "tensor", "fsdp"), (3, 20, 16)),
        "mlp_norm": (PartitionSpec(None, None), (3, 32)),
    }
    found = {
        name: (blocks[name].sharding.spec, blocks[name].addressable_shards[0].data.shape)
        for name in wanted
    }
    assert found == wanted
    assert params["body"]["embed"].addressable_shards[0].data.shape == (64, 16)
    assert params["zip_rows"].sharding.spec == PartitionSpec(None, "fsdp")
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))


def test_wrong_rules_and_impossible_meshes_fail_early(lm):
    layout = Layout(make_mesh(data=1, fsdp=1, tensor=4), TRAIN_RULES)
    with pytest.raises(
        UsageError,
        match=r"axis 'heads' of size 6: it does not divide over mesh axes \['tensor'\] of 4",
    ):
        layout.shard(
            lm.params["body"]["blocks"]["0_attention"]["q"],
            ("layers", "embed", "heads", "head_dim"),
        )
    with pytest.raises(UsageError, match="needs 16 devices and 8 are visible"):
        make_mesh(data=16)
    with pytest.raises(UsageError, match="logical axis 'head': the rules know batch"):
        layout.spec(("head",))
    with pytest.raises(UsageError, match="two dimensions fall on one mesh axis"):
        layout.spec(("heads", "mlp"))
    assert len(single_device().mesh.devices.ravel()) == 1, (
        "the default is one device, however many there are"
    )


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["all", "lite"])
def test_loss_and_gradients_on_eight_devices_equal_one(lm, config):
    (batch,) = batches(config)
    axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    found = []
    for layout in (Layout(make_mesh(), TRAIN_RULES), Layout(make_mesh(**MESH), TRAIN_RULES)):
        setting = settings(lm, config, layout)
        params = layout.shard(copied(lm.params), axes)
        # A teacher that is not the student, else the divergence has no gradient.
        teacher = jax.tree.map(lambda x: 1.2 * x, params["body"]) if config.kl_weight else None
        objective = jax.jit(jax.value_and_grad(lambda p, t, b, s=setting: losses(s, p, t, b)[0]))
        value, grads = objective(params, teacher, trainer._on_mesh(batch, layout))
        state, metrics = train_step(
            setting, init_state(params, config), teacher, trainer._on_mesh(batch, layout)
        )
        found.append((float(value), grads, float(metrics["grad_norm"]), state))
    one, eight = found
    assert one[0] == pytest.approx(eight[0], rel=1e-5)
    assert one[2] == pytest.approx(eight[2], rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 + 1e-4 * float(np.abs(a).max())),
        one[1],
        eight[1],
    )
    for name, x in eight[3].params["body"]["blocks"]["0_attention"].items():
        assert x.sharding.is_equivalent_to(
            layout.sharding(axes["body"]["blocks"]["0_attention"][name]), x.ndim
        ), f"{name} stays where it was"


def on_mesh(**mesh):
    layout = Layout(make_mesh(**mesh), TRAIN_RULES)
    return dataclasses.replace(tiny_lm(), layout=layout)


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["all", "lite"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(MESH, MESH), ({}, MESH), (MESH, {}), (MESH, OTHER)],
    ids=["same", "more", "fewer", "other"],
)
def test_a_run_resumes_on_a_mesh_and_on_another_one(
    tmp_path, monkeypatch, uninterrupted, config, first, second
):
    whole, where = uninterrupted[config.trainable]
    interrupt(monkeypatch, 2, sigterm)
    with pytest.raises(Interrupted):
        train(on_mesh(**first), rollouts(), config, tmp_path / "run", source={})
    monkeypatch.undo()
    resumed = train(on_mesh(**second), rollouts(), config, tmp_path / "run", source={})
    np.testing.assert_allclose(resumed.params["zip_rows"], whole.params["zip_rows"], atol=1e-3)
    if config is LITE:
        assert_equal(resumed.params["body"], whole.params["body"])
    for name in ("train/loss", "train/joint", "train/grad_norm"):
        assert [r[name] for r in records(tmp_path / "run")] == pytest.approx(
            [r[name] for r in records(where)], rel=1e-4
        ), name


# ---- models on disk


def test_save_and_load_round_trip_exactly(tmp_path, lm):
    saved = dataclasses.replace(lm, info={"made": ["by", 1]})
    saved.save(tmp_path / "m")
    found = load(tmp_path / "m")
    assert_equal(found.params, lm.params)
    assert (found.config, found.head, found.info) == (lm.config, lm.head, saved.info)
    assert found.digest() == lm.digest()
    text = "wait so 1 + 11 = check a"
    assert found.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert found.tokenizer.decode([*lm.tokenizer.encode(text), 0]) == text
    assert (found.tokenizer.eos_ids, found.tokenizer.size) == (
        lm.tokenizer.eos_ids,
        lm.tokenizer.size,
    )
    with pytest.raises(UsageError, match="unheard"):
        found.tokenizer.encode("wait unheard")


def test_bfloat16_and_headless_models_round_trip(tmp_path, lm):
    lm.save(tmp_path / "half", jnp.bfloat16)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    assert_equal(load(tmp_path / "half", dtype=jnp.bfloat16).params, half)
    loaded = load(tmp_path / "half")
    assert loaded.params["zip_rows"].dtype == jnp.float32
    assert_equal(loaded.params, jax.tree.map(lambda x: x.astype(jnp.float32), half))
    plain = dataclasses.replace(lm, head=None, params={"body": lm.params["body"]})
    plain.save(tmp_path / "half")  # replaces what was there
    found = load(tmp_path / "half")
    assert found.head is None
    assert_equal(found.params, plain.params)


def test_a_model_is_loaded_straight_onto_a_mesh(tmp_path, lm):
    (tmp_path / "run").mkdir()
    lm.save(tmp_path / "run" / "model")
    found = load(tmp_path / "run", layout=Layout(make_mesh(**MESH), TRAIN_RULES))
    assert found.params["body"]["blocks"]["0_attention"]["q"].addressable_shards[0].data.shape == (
        3,
        16,
        3,
        10,
    )
    assert_equal(found.params, lm.params)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: there is no such directory\. Fix: "):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no such directory"):
        load(tmp_path / "file")


def half_written(path):
    return {
        "no parameters": lambda: shutil.rmtree(path / "params"),
        "no meta": lambda: shutil.rmtree(path / "meta"),
        "an empty directory": lambda: (shutil.rmtree(path), path.mkdir()),
        "parameters without data": lambda: [
            shutil.rmtree(d) for d in (path / "params").iterdir() if d.is_dir()
        ],
        "parameters without index": lambda: [
            f.unlink() for f in (path / "params").iterdir() if f.is_file()
        ],
        "an empty meta": lambda: [
            f.write_text("") for f in (path / "meta").iterdir() if f.is_file()
        ],
    }


@pytest.mark.parametrize("damage", list(half_written(None)))
def test_half_written_models_are_refused(tmp_path, lm, damage):
    lm.save(tmp_path / "m")
    half_written(tmp_path / "m")[damage]()
    with pytest.raises(
        UsageError,
        match=r"m: (it is no complete checkpoint|its parameters are incomplete|it was not "
        r"written).*Fix: ",
    ):
        load(tmp_path / "m")


def test_foreign_checkpoints_are_refused(tmp_path):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(meta=ocp.args.JsonSave({"model": "theirs"}))
        checkpointer.save((tmp_path / "foreign").absolute(), args)
    with pytest.raises(UsageError, match="it was not written by this package"):
        load(tmp_path / "foreign")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="model_type None"):
        load(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"used_ids": 20, "first_id": 30}, r"it says 20 used ids, its tokenizer uses \d+"),
        ({"first_id": 5}, r"reserved range 5\.\.13: the tokenizer really uses ids"),
        ({"first_id": 125}, r"reserved range 125\.\.133: the vocabulary ends at 127"),
    ],
)
def test_a_checkpoint_with_an_impossible_reserved_range_is_refused(tmp_path, lm, change, message):
    dataclasses.replace(lm, head=dataclasses.replace(lm.head, **change)).save(tmp_path / "m")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "m")
