"""What a reader sees of a training run. TensorBoard's own reader says what the event files hold."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import signal

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.tiny import TINY_GRID, TINY_MODEL, tiny_lm
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation import drawing
from zip_rc_jax.evaluation.rollout_predictions import (
    MeanJoints,
    mean_joints,
    predict_rollouts,
    validate,
)
from zip_rc_jax.models.transformer import forward_packed
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.training import trainer
from zip_rc_jax.training.step import train_step
from zip_rc_jax.training.tracking import Tracker
from zip_rc_jax.training.trainer import Interrupted, train

JOINTS = MeanJoints(np.full((3, 3), 1 / 9), np.eye(3) / 3, positions=1234, rollouts=56, left_out=0)


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def board(directory):
    """(name -> [(step, value)], name -> [(step, PNG)]) as TensorBoard shows them."""
    reader = EventAccumulator(str(directory / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    scalars = {
        name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]
    }
    images = {
        name: [(e.step, e.encoded_image_string) for e in reader.Images(name)]
        for name in reader.Tags()["images"]
    }
    return scalars, images


def curves(found):
    """The same of JSONL records; TensorBoard's numbers are float32."""
    names = dict.fromkeys(name for record in found for name in record if name != "step")
    return {
        name: [(r["step"], float(np.float32(r[name]))) for r in found if name in r]
        for name in names
    }


def test_tensorboard_shows_the_numbers_of_the_records(tmp_path):
    written = [
        {"step": 1, "train/loss": 2.5, "train/tokens_per_second": 1e5 / 3},
        {
            "step": 300,
            "train/loss": -0.1,
            "train/tokens_per_second": 0.0,
            "eval/within_prompt_auc": 0.625,
        },
        {"step": 2**40, "train/loss": 1e-30, "train/tokens_per_second": 7.0},
    ]
    with Tracker(tmp_path, 0) as tracker:
        for record in written:
            tracker.record(record)
            assert records(tmp_path)[-1] == record, "a record is on disk at once"
            assert board(tmp_path)[0] == curves(records(tmp_path))
    assert records(tmp_path) == written
    assert not list(tmp_path.glob("*.tmp"))


def test_a_number_that_does_not_exist_is_null_in_strict_json_and_nan_where_numbers_are_shown(
    tmp_path,
):
    with Tracker(tmp_path, 0) as tracker:
        tracker.record(
            {
                "step": 1,
                "train/loss": math.nan,
                "eval/within_prompt_auc": math.inf,
                "train/tokens_per_second": 1.0,
            }
        )
        shown = tracker.status
    ((step, value),) = board(tmp_path)[0]["train/loss"]
    assert (step, math.isnan(value)) == (1, True)
    line = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {
        "step": 1,
        "train/loss": None,
        "eval/within_prompt_auc": None,
        "train/tokens_per_second": 1.0,
    }
    with Tracker(tmp_path, 1) as tracker:
        assert tracker.status == "loss nan  within-prompt AUC nan  1 tok/s"
    assert shown == "loss nan  within-prompt AUC inf  1 tok/s"


def test_rollouts_reach_the_disk_with_the_checkpoint_that_follows_them(tmp_path, monkeypatch):
    """A bucket that is mounted with gcsfuse has a file's new lines no sooner than at fsync or
    close."""
    synced, saved = [], []
    fsync, save = os.fsync, trainer.Checkpoints.save
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: synced.append(pathlib.Path(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd),
    )
    monkeypatch.setattr(
        trainer.Checkpoints,
        "save",
        lambda *args: synced.clear() or save(*args) or saved.append(len(records(tmp_path))),
    )
    seen = []

    def step(*args):
        seen.append({path.parent.name if "tfevents" in path.name else path.name for path in synced})
        return train_step(*args)

    monkeypatch.setattr(trainer, "train_step", step)
    train(
        tiny_lm(), rollouts(), dataclasses.replace(CONFIG, save_seconds=1e-9), tmp_path, source={}
    )
    assert saved == [1, 2, 3, 4, 5, 6]
    assert all({"metrics.jsonl", "tensorboard"} <= names for names in seen[1:])


@pytest.mark.parametrize("at", [0, 1, 2, 4], ids=lambda at: f"at {at}")
@pytest.mark.parametrize("torn", [False, True], ids=["closed", "torn"])
def test_after_a_resume_no_step_stands_twice_and_no_curve_runs_backwards(tmp_path, at, torn):
    def run(start, end, loss):
        with Tracker(tmp_path, start) as tracker:
            for step in range(start + 1, end + 1):
                tracker.heatmap(step, JOINTS, TINY_GRID)
                tracker.record(
                    {"step": step, "train/loss": loss + step, "train/tokens_per_second": 1.0}
                )

    run(0, 4, 100.0)
    if torn:  # killed in the middle of writing
        (events,) = (tmp_path / "tensorboard").iterdir()
        os.truncate(events, events.stat().st_size - 5)
        with (tmp_path / "metrics.jsonl").open("a") as log:
            log.write('{"step": 5, "train/lo')
    run(at, 3, 200.0)  # and stopped at once if at == 4
    run(min(at + 1, 4), 6, 300.0)
    scalars, images = board(tmp_path)
    expected = [*[100.0] * at, *[200.0] * (at + 1 <= 3), *[300.0] * 6][:6]
    assert [r["train/loss"] - r["step"] for r in records(tmp_path)] == expected
    # TensorBoard cannot read a torn point; the JSONL record of step 4 was whole.
    if torn and at == 4:
        assert scalars["train/loss"] == [
            p for p in curves(records(tmp_path))["train/loss"] if p[0] != 4
        ], "only the torn point is lost"
    else:
        assert scalars == curves(records(tmp_path))
    assert [step for step, _ in images["eval/joint"]] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (tmp_path / "heatmaps").iterdir()) == [
        f"step_00000{i}.png" for i in range(1, 7)
    ]


def test_heat_maps_that_an_interrupted_run_drew_of_later_steps_are_removed(tmp_path):
    with Tracker(tmp_path, 0) as tracker:
        for step in (2, 4):
            tracker.heatmap(step, JOINTS, TINY_GRID)
    Tracker(tmp_path, 2).__exit__()
    assert [p.name for p in (tmp_path / "heatmaps").iterdir()] == ["step_000002.png"]
    assert [step for step, _ in board(tmp_path)[1]["eval/joint"]] == [2]


def test_of_several_processes_only_one_writes(tmp_path):
    with Tracker(tmp_path, 0, writes=False) as tracker:
        tracker.record({"step": 1, "train/loss": 1.0, "train/tokens_per_second": 10.0})
        tracker.heatmap(1, JOINTS, TINY_GRID)
        assert tracker.status == "loss 1.0000  10 tok/s"
    assert not list(tmp_path.iterdir())


def test_the_bar_shows_the_newest_of_everything_also_after_a_resume(tmp_path):
    with Tracker(tmp_path, 0) as tracker:
        tracker.record({"step": 1, "train/loss": 3.0, "train/joint": 1.0, "train/kl": 0.25,
        "eval/within_prompt_auc": 0.75,
                        "train/tokens_per_second": 10.0})  # fmt: skip
        tracker.record(
            {
                "step": 2,
                "train/loss": 2.0,
                "train/joint": 0.5,
                "train/kl": 0.125,
                "train/tokens_per_second": 12345.6,
            }
        )
        shown = "loss 2.0000  joint 0.5000  kl 0.1250  within-prompt AUC 0.7500  12,346 tok/s"
        assert tracker.status == shown
    with Tracker(tmp_path, 2) as tracker:
        assert tracker.status == shown


def test_the_heat_map_in_tensorboard_is_the_file_and_shows_both_joints(tmp_path):
    left_out = dataclasses.replace(JOINTS, left_out=7)
    with Tracker(tmp_path, 0) as tracker:
        tracker.heatmap(50, left_out, TINY_GRID)
    ((step, png),) = board(tmp_path)[1]["eval/joint"]
    assert step == 50
    assert png == (tmp_path / "heatmaps" / "step_000050.png").read_bytes()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("eval/joint")
    assert matplotlib.image.imread(io.BytesIO(png)).shape == (event.height, event.width, 4)
    figure = drawing.joint_heatmaps(
        JOINTS.predicted, JOINTS.observed, TINY_GRID, ["step 50"], "a note about $x"
    )
    for axis, joint in zip(figure.axes, (JOINTS.predicted, JOINTS.observed), strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), joint)
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "step 50: predicted (total variation 0.67)",
        "step 50: empirical",
    ]
    assert figure.get_suptitle() == "a note about $x"


def rollouts(n=24, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            prompt_index=i // 4, sample_index=i % 4, level=0, seed=0, task="chain_sum", prompt="",
            question="", answer="", entry_json="",
            prompt_token_ids=rng.integers(2, 20, 3), output_token_ids=[*rng.integers(2, 20,
            rng.integers(1, 14)), 0], response="",
            finished=bool(i % 5), correct=float(i % 2), value=float(rng.random()),
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("label", ["correct", "value"])
def test_the_joints_are_means_over_the_positions_of_finished_rollouts(lm, label):
    data = rollouts()
    data[3] = dataclasses.replace(data[3], **{label: math.nan})
    used = [r for r in data if r.finished and r is not data[3]]
    ids = np.zeros((len(used), 20), np.int32)
    for row, r in zip(ids, used, strict=True):
        row[: 3 + len(r.output_token_ids)] = np.concatenate(
            [r.prompt_token_ids, r.output_token_ids]
        )
    at = jnp.broadcast_to(jnp.arange(20), ids.shape)
    hidden = forward_packed(
        TINY_MODEL, lm.params["body"], ids, at, np.ones_like(ids), layout=lm.layout
    )
    scores = np.exp(
        np.asarray(hidden, np.float64) @ np.asarray(lm.params["zip_rows"], np.float64).T
    )
    predicted, observed, positions = np.zeros((3, 3)), np.zeros((3, 3)), 0
    for r, row in zip(used, scores, strict=True):
        for i in range(len(r.output_token_ids)):
            predicted += (row[2 + i] / row[2 + i].sum()).reshape(3, 3)
            reward, left = getattr(r, label), len(r.output_token_ids) - i
            b = 0 if reward < 0.15 else 1 if reward < 0.65 else 2
            observed[b, 0 if left < 3 else 1 if left < 7 else 2] += 1
            positions += 1
    found = mean_joints(predict_rollouts(lm, data, ScoringConfig(7 * 32)), data, label, TINY_GRID)
    np.testing.assert_allclose(found.predicted, predicted / positions, atol=1e-5)
    np.testing.assert_allclose(found.observed, observed / positions, atol=1e-12)
    assert (found.positions, found.rollouts, found.left_out) == (
        positions,
        len(used),
        len(data) - len(used),
    )


def test_without_a_finished_rollout_there_is_no_joint_to_compare_with(lm):
    cut = [dataclasses.replace(r, finished=False) for r in rollouts(8)]
    found = validate(lm, cut, label="value", last=2, settings=ScoringConfig(128))
    assert found.joints is None
    assert set(found.metrics) == {"eval/within_prompt_auc", "eval/mixed_prompts", "eval/length_mae"}
    assert np.isnan(found.metrics["eval/length_mae"])


def test_a_rollout_that_was_cut_off_has_no_true_length_to_be_compared_with(lm):
    data = rollouts(16)
    some = [dataclasses.replace(r, finished=i % 3 > 0) for i, r in enumerate(data)]
    kept = [r for r in some if r.finished]
    mixed, whole = (
        validate(lm, x, label="value", last=2, settings=ScoringConfig(512)).metrics[
            "eval/length_mae"
        ]
        for x in (some, kept)
    )
    assert mixed == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("evaluations", "log_every", "at"),
    [(3, 5, [2, 4, 6]), (2, 1, [3, 6]), (4, 4, [2, 3, 5, 6]), (9, 1, [1, 2, 3, 4, 5, 6])],
)
def test_a_run_is_evaluated_as_often_as_is_asked_for(tmp_path, evaluations, log_every, at):
    data, config = (
        rollouts(),
        dataclasses.replace(CONFIG, evaluations=evaluations, log_every=log_every),
    )
    train(tiny_lm(), data[8:], config, tmp_path, source={}, validation=data[:8])
    assert [r["step"] for r in records(tmp_path) if "eval/within_prompt_auc" in r] == at


CONFIG = TrainConfig(
    label="value", steps=6, batch_rows=4, row_tokens=24, learning_rate=1e-2, trainable="zip_rows",
    log_every=1, evaluations=3,
)  # fmt: skip


def test_a_run_that_was_interrupted_shows_the_same_as_one_that_was_not(tmp_path, monkeypatch):
    data = rollouts()

    def run(name):
        train(tiny_lm(), data[8:], CONFIG, tmp_path / name, source={}, validation=data[:8])
        return tmp_path / name

    def stopped(*args):
        result = train_step(*args)
        if int(result[0].step) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    whole = run("whole")
    monkeypatch.setattr(trainer, "train_step", stopped)
    with pytest.raises(Interrupted):
        run("cut")
    monkeypatch.undo()
    cut = run("cut")
    scalars, images = board(whole)
    again, images_again = board(cut)
    for found in (scalars, again):
        assert [step for step, _ in found.pop("train/tokens_per_second")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["eval/within_prompt_auc"]] == [2, 4, 6]
    assert again == scalars
    assert images_again == images
    assert [step for step, _ in images["eval/joint"]] == [2, 4, 6]
    for directory in (whole, cut):
        shown = curves(records(directory))
        shown.pop("train/tokens_per_second")
        assert shown == scalars
        assert sorted(p.name for p in (directory / "heatmaps").iterdir()) == [
            f"step_00000{step}.png" for step in (2, 4, 6)
        ]
