"""The authors' numbers: with their definitions switched on, ours equal a slow reference of them.

What the switches are is in docs/authors.md.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from harness import authors_definitions as authors
from harness.documents import DOCS, ROOT, blocks
from harness.forwards import LAYOUT, fast_jit
from harness.hf_models import load, torch_model
from harness.rollouts import make_rollouts
from zip_rc_jax.config import GridConfig, TrainConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.batches import example, train_batches
from zip_rc_jax.evaluation.rollout_predictions import final_values, predict_rollouts
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import unembedding
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.training.features import teacher_features
from zip_rc_jax.training.loss import joint_loss
from zip_rc_jax.training.step import TrainSpec, losses
from zip_rc_jax.training.trainer import recorded

# A tokenizer of 64 ids, 6 cells, and 14 rows of padding: 84 rows.
USED, EDGES, ROWS = 64, (0, 3, 6, 9), 84
CENTRES = (0.0, 1.0)
CELLS = (len(EDGES) - 1) * len(CENTRES)
THEIRS = GridConfig(length_edges=EDGES, length_counts="without_end")
CONFIG = TrainConfig(
    kl_weight=10.0, kl_mask="cells", kl_top_k=8, unfinished_length="ended", mean_over="rollouts",
    loss_chunk=16, batch_rows=2, row_tokens=32,
)  # fmt: skip


def rollout(prompt, output, finished=True, correct=1.0, value=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return dataclasses.replace(
        make_rollouts(1)[0],
        prompt_token_ids=rng.integers(0, USED, prompt),
        output_token_ids=rng.integers(0, USED, output),
        finished=finished,
        correct=correct,
        value=value,
    )


ROLLOUTS = [rollout(4, 9, True, 1.0, seed=1), rollout(6, 12, False, 0.0, seed=2),
            rollout(3, 7, True, 0.0, seed=3)]  # fmt: skip


# ---- labels


def cells_of_the_loss(fields, grid):
    """The cell that the loss reads at every labelled position: of a joint whose entries are the
    numbers of its cells, cross-entropy is minus that number."""
    at = fields["labelled"]
    numbers = np.arange(grid.n_cells, dtype=np.float32).reshape(grid.n_reward, grid.n_length)
    joints = jnp.broadcast_to(numbers, (at.sum(), *numbers.shape))
    reward, remaining, censored = (fields[x][at] for x in ("reward", "remaining", "censored"))
    return -np.asarray(joint_loss(joints, reward, remaining, censored, grid))


@pytest.mark.parametrize(
    ("label", "finished", "output"),
    [("correct", True, 1), ("correct", False, 258), ("value", True, 33_000), ("value", False, 257)],
)
def test_the_cell_of_every_prefix_is_the_authors(label, finished, output):
    centres = CENTRES if label == "correct" else authors.VALUE_CENTRES
    grid = GridConfig(value_centres=centres, length_counts="without_end").grid(label)
    one = rollout(5, output, finished, correct=0.0, value=0.4)
    fields = example(one, label, "ended")
    assert not fields["censored"].any()
    theirs = authors.cell_labels(5, output, getattr(one, label), centres)
    np.testing.assert_array_equal(cells_of_the_loss(fields, grid), theirs)


def test_our_labels_differ_from_the_authors_in_one_position_of_each_edge_that_is_passed():
    """A rollout of 1,100 tokens passes 3 edges; where one is, theirs lies one bin lower."""
    fields = example(rollout(5, 1100), "correct")
    at = fields["labelled"]
    ours = Grid.authors("correct").length_bin(fields["remaining"][at])
    theirs = np.array(authors.cell_labels(5, 1100, 0.0, CENTRES))
    (where,) = np.nonzero(ours != theirs)
    assert (1100 - where).tolist() == [1024, 512, 256], "tokens still to generate"
    np.testing.assert_array_equal((ours - theirs)[where], 1)


def test_a_rollout_that_was_cut_off_is_censored_unless_it_counts_as_ended():
    ours, theirs = (example(rollout(5, 9, False), "correct", x) for x in ("censored", "ended"))
    at = ours["labelled"]
    assert ours["censored"][at].all()
    assert not theirs["censored"].any()
    np.testing.assert_array_equal(ours["remaining"][at], np.arange(10, 1, -1))
    np.testing.assert_array_equal(theirs["remaining"][at], np.arange(9, 0, -1))


@pytest.mark.parametrize(
    ("value", "ours", "theirs"),
    [(1 / 12, 1, 0), (3 / 12, 2, 2), (5 / 12, 3, 3), (7 / 12, 4, 3), (9 / 12, 5, 5),
     (11 / 12, 6, 6), (1 / 6, 1, 1), (0.0, 0, 0), (1.0, 6, 6)],
)  # fmt: skip
def test_centres_of_seven_digits_move_two_values_on_an_edge_to_the_lower_bin(value, ours, theirs):
    """1/6 as 0.1666667 puts the first edge at 0.08333335, above 1/12; 2/3 does so with 7/12."""
    written = GridConfig(value_centres=authors.VALUE_CENTRES).grid("value")
    fields = example(rollout(1, 1, value=value), "value")
    assert cells_of_the_loss(fields, Grid.authors("value")) // 8 == ours
    assert cells_of_the_loss(fields, written) // 8 == theirs
    assert authors.cell_labels(1, 1, value, authors.VALUE_CENTRES)[0] // 8 == theirs


def test_a_step_over_rollouts_weighs_them_alike_however_long_they_are():
    options = {"label": "correct", "batch_rows": 3, "row_tokens": 32, "seed": 0, "epochs": 1}
    (alike,) = train_batches(ROLLOUTS, **options)
    assert alike.weight is None
    (batch,) = train_batches(ROLLOUTS, **options, mean_over="rollouts")
    np.testing.assert_array_equal(batch.weight > 0, batch.labelled)
    of_each = {
        (row, segment): batch.weight[row, batch.segment_ids[row] == segment].sum()
        for row in range(3)
        for segment in np.unique(batch.segment_ids[row])
        if segment
    }
    assert len(of_each) == len(ROLLOUTS)
    np.testing.assert_allclose(list(of_each.values()), 1 / len(ROLLOUTS), rtol=1e-6)


# ---- losses and gradients on a tiny Qwen3 with rows past the tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Student and teacher: in torch (float64), and the same parameters in JAX."""
    student = torch_model("qwen3", vocab_size=ROWS)
    teacher = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in teacher.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.3 * parameter.std() * noise
    ours = []
    for model in (student, teacher):
        directory = tmp_path_factory.mktemp("qwen3")
        model.save_pretrained(directory)
        ours.append(load(directory)[1:])
    return student.double(), teacher.double(), ours


def loaded(models):
    """Ours, with a head whose cells lie behind the tokenizer: student, and the teacher's body."""
    (config, body), (_, teacher) = models[2]
    head = ZipHead(THEIRS.grid("correct"), "correct", first_id=USED, used_ids=USED)
    rows = unembedding(config, body)[head.first_id : head.last_id]
    return config, head, {"body": body, "zip_rows": rows}, teacher


def our_losses(models, config):
    """Loss parts and the gradients of the objective."""
    model, head, params, teacher = loaded(models)
    batch = next(
        iter(
            train_batches(
                ROLLOUTS, label="correct", batch_rows=2, row_tokens=32, seed=0, epochs=1,
                unfinished_length=config.unfinished_length, mean_over=config.mean_over,
            )
        )
    )  # fmt: skip
    spec = TrainSpec(model, head, LAYOUT, config)
    objective = fast_jit(jax.grad(functools.partial(losses, spec), has_aux=True))
    gradients, parts = objective(params, teacher, jax.tree.map(jnp.asarray, batch))
    return parts, gradients


def their_losses(models, kl_ids=None):
    student, teacher, _ = models
    rows = [
        (
            [*r.prompt_token_ids.tolist(), *r.output_token_ids.tolist()],
            len(r.prompt_token_ids) - 1,
            authors.cell_labels(
                len(r.prompt_token_ids), len(r.output_token_ids), r.correct, CENTRES, EDGES
            ),
        )
        for r in ROLLOUTS
    ]
    student.zero_grad()
    joint, kl = authors.losses(student, teacher, rows, USED, CELLS, CONFIG.kl_top_k, kl_ids)
    (joint + CONFIG.kl_weight * kl).backward()
    return joint, kl, {name: p.grad.numpy() for name, p in student.named_parameters()}


def test_cross_entropy_kl_and_gradients_equal_the_authors(models):
    parts, gradients = our_losses(models, CONFIG)
    joint, kl, theirs = their_losses(models)
    np.testing.assert_allclose(parts["joint"], joint.item(), rtol=1e-6)
    np.testing.assert_allclose(parts["kl"], kl.item(), rtol=1e-6)

    embed = theirs["model.embed_tokens.weight"]  # tied: theirs hold the cells too
    scale = np.abs(embed).max()
    ours = np.array(gradients["body"]["embed"])
    ours[USED : USED + CELLS] += gradients["zip_rows"]
    np.testing.assert_allclose(ours / scale, embed / scale, atol=1e-6)
    norm = theirs["model.norm.weight"]
    np.testing.assert_allclose(
        gradients["body"]["final_norm"] / np.abs(norm).max(), norm / np.abs(norm).max(), atol=2e-6
    )


def test_our_kl_is_that_of_the_ids_of_the_tokenizer_and_smaller_on_random_weights(models):
    """14 rows of padding beside 64 ids: a random student gives them probability too.

    The difference is what docs/authors.md says.
    """
    parts, gradients = our_losses(models, dataclasses.replace(CONFIG, kl_mask="unused"))
    _, kl, theirs = their_losses(models, torch.arange(ROWS) < USED)
    np.testing.assert_allclose(parts["kl"], kl.item(), rtol=1e-6)
    embed = theirs["model.embed_tokens.weight"][:USED]
    scale = np.abs(embed).max()
    np.testing.assert_allclose(gradients["body"]["embed"][:USED] / scale, embed / scale, atol=1e-6)
    np.testing.assert_array_equal(gradients["body"]["embed"][USED:], 0)
    assert their_losses(models)[1].item() / kl.item() == pytest.approx(1.10, abs=0.005)


def test_the_value_of_a_rollout_is_the_authors(models):
    """Their scorer: the mean expected reward of the last labelled positions."""
    config, head, params, _ = loaded(models)
    lm = LanguageModel(config, word_level(map(str, range(USED - 2))), params, head, LAYOUT, {})
    ours = final_values(predict_rollouts(lm, ROLLOUTS, ScoringConfig(64)), 5)
    theirs = [
        authors.value(
            models[0],
            [*r.prompt_token_ids.tolist(), *r.output_token_ids.tolist()],
            len(r.prompt_token_ids) - 1, USED, CENTRES, len(EDGES) - 1, 5,
        )
        for r in ROLLOUTS
    ]  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_cached_teacher_has_the_ids_of_the_same_mask(models):
    """The likeliest ids of a random teacher are now and then rows of padding."""
    config, head, params, teacher = loaded(models)
    lm = LanguageModel(
        config, word_level(map(str, range(USED - 2))), {**params, "body": teacher}, head, LAYOUT, {}
    )
    for mask, most in (("cells", ROWS), ("unused", USED)):
        kept = teacher_features(lm, ROLLOUTS, dataclasses.replace(CONFIG, kl_mask=mask))
        (ids,) = (np.unique(kept.ids),)
        assert ids.max() < most
        assert not np.isin(ids, np.arange(USED, USED + CELLS)).any()
        assert (ids >= USED).any() == (mask == "cells")


def test_runs_from_before_these_settings_go_on():
    """What they recorded did not name them, and they did what the defaults do."""
    ours = recorded(TrainConfig(kl_weight=1.0))
    assert ours["kl_kind"] == "forward_topk"
    later = {"kl_mask": "cells", "unfinished_length": "ended", "mean_over": "rollouts"}
    assert not set(later) & set(ours)
    assert recorded(TrainConfig(kl_weight=1.0, **later)) == {**ours, **later}


# ---- the page


def test_the_command_of_the_page_sets_every_switch_of_its_table():
    (command, *_) = (b.code for b in blocks(DOCS / "authors.md") if b.language == "bash")
    words = shlex.split(command.replace("\\\n", " "))
    overrides = [word for word in words if "=" in word]
    theirs = load_config(str(ROOT / words[2]), overrides)
    assert theirs.grid.grid("value").reward_centres == authors.VALUE_CENTRES
    assert theirs.grid.grid("value").length_edges[:3] == (0, 257, 513)
    assert (theirs.final.kl_mask, theirs.final.unfinished_length) == ("cells", "ended")
    assert (theirs.data_ends, theirs.grade.unfinished) == ("table", "wrong")

    named = re.findall(r"`([a-z_.]+=)[^`]*`", (DOCS / "authors.md").read_text().split("```")[0])
    assert len(set(named)) == 9
    assert {word.partition("=")[0] + "=" for word in overrides} == {*named, "data="}
