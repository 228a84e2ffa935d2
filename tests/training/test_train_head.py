"""`train_head`: a head from records, with or without a directory."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import zip_rc_jax
from harness.runs import LITE, assert_equal, interrupt, records, rollouts, sigterm, without_clock
from harness.tiny import TINY_GRID, tiny_lm
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.training import train_head
from zip_rc_jax.training.trainer import Interrupted, split_validation, train

CONFIG = dataclasses.replace(LITE, steps=4, eval_rollouts=8, evaluations=2)


@pytest.fixture(scope="module")
def in_memory():
    """(the trained model, its records)."""
    found: list[dict] = []
    return train_head(tiny_lm(), rollouts(), CONFIG, on_record=found.append), found


def test_without_a_directory_it_trains_the_same_model_and_writes_nothing(
    in_memory, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = tiny_lm()
    found: list[dict] = []
    trained = train_head(before, rollouts(), CONFIG, on_record=found.append)
    assert list(tmp_path.iterdir()) == []
    kept = train_head(tiny_lm(), rollouts(), CONFIG, tmp_path / "kept")
    assert_equal(trained.params, kept.params)
    assert without_clock(found) == without_clock(records(tmp_path / "kept"))
    assert_equal(before.params, tiny_lm().params)  # the model that it starts from stays as it is
    assert not np.array_equal(trained.params["zip_rows"], before.params["zip_rows"])


def test_records_hold_losses_of_every_step_and_the_validation_where_it_is_asked_for(in_memory):
    _, found = in_memory
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    assert ["eval/within_prompt_auc" in r for r in found] == [False, True, False, True]
    assert all(np.isfinite(r["train/joint"]) for r in found)


def test_the_rollouts_held_back_are_not_trained_on(in_memory):
    """Other labels of theirs change nothing but the validation; without holding back they count."""
    trained, _ = in_memory
    _, held = split_validation(rollouts(), CONFIG.eval_rollouts)
    known = {(r.prompt_index, r.sample_index) for r in held}
    other = [
        dataclasses.replace(r, value=0.5) if (r.prompt_index, r.sample_index) in known else r
        for r in rollouts()
    ]
    assert len(known) == 8
    assert_equal(train_head(tiny_lm(), other, CONFIG).params, trained.params)
    counted = train_head(tiny_lm(), other, dataclasses.replace(CONFIG, eval_rollouts=0)).params
    assert not np.array_equal(counted["zip_rows"], trained.params["zip_rows"])


def test_an_interrupted_call_resumes_in_its_directory(in_memory, tmp_path, monkeypatch):
    trained, found = in_memory
    interrupt(monkeypatch, 2, sigterm)
    with pytest.raises(Interrupted):
        train_head(tiny_lm(), rollouts(), CONFIG, tmp_path / "run")
    monkeypatch.undo()
    other = [dataclasses.replace(r, value=0.5) for r in rollouts()]
    with pytest.raises(UsageError, match=r"other settings: source.rollouts was "):
        train_head(tiny_lm(), other, CONFIG, tmp_path / "run")
    again: list[dict] = []
    assert_equal(
        train_head(tiny_lm(), rollouts(), CONFIG, tmp_path / "run", on_record=again.append).params,
        trained.params,
    )
    assert without_clock(again) == without_clock(found[2:])


def test_without_a_directory_an_interruption_comes_at_once(monkeypatch):
    def ctrl_c():
        raise KeyboardInterrupt

    interrupt(monkeypatch, 2, ctrl_c)
    with pytest.raises(KeyboardInterrupt) as stop:
        train_head(tiny_lm(), rollouts(), CONFIG)
    assert not isinstance(stop.value, Interrupted)


def test_a_teacher_is_kept_in_memory_where_there_is_no_directory(tmp_path):
    config = dataclasses.replace(
        LITE, trainable="all", kl_weight=0.5, kl_top_k=5, steps=2, cache_teacher=True
    )
    assert_equal(
        train(tiny_lm(), rollouts(), config, source={}).params,
        train(tiny_lm(), rollouts(), config, tmp_path / "run", source={}).params,
    )


def changed(number, **fields):
    data = rollouts()
    data[number] = dataclasses.replace(data[number], **fields)
    return data


UNLABELLED = [dataclasses.replace(r, value=float("nan")) for r in rollouts()]
UNGRADED = [dataclasses.replace(r, correct=float("nan")) for r in rollouts()]
HEADLESS = dataclasses.replace(tiny_lm(), head=None)


@pytest.mark.parametrize(
    ("lm", "data", "config", "message"),
    [
        (
            HEADLESS,
            rollouts(),
            CONFIG,
            r"the model: it has no ZIP head to train. Fix: attach one first: lm\.with_head\(",
        ),
        (
            "runs/final",
            rollouts(),
            CONFIG,
            r"model of type str: .*Fix: pass what zip_rc_jax\.load returns",
        ),
        (
            None,
            rollouts(),
            {"steps": 3},
            r"config of type dict: .*Fix: pass a zip_rc_jax\.TrainConfig",
        ),
        (
            None,
            rollouts(),
            dataclasses.replace(CONFIG, label="correct"),
            r"label='correct': the head of the model is for 'value'",
        ),
        (
            None,
            rollouts(),
            dataclasses.replace(CONFIG, rows_from="lite"),
            r"rows_from='lite': it names a stage of a run directory",
        ),
        (
            None,
            iter(rollouts()),
            CONFIG,
            r"rollouts of type list_iterator: .*Fix: pass a list of zip_rc_jax\.Rollout",
        ),
        (None, [], CONFIG, r"rollouts: there are none to train on"),
        (None, [*rollouts(), "text"], CONFIG, r"rollout 30, 'text': it is no Rollout"),
        (
            None,
            changed(3, output_token_ids=[5, -1]),
            CONFIG,
            r"rollout 3, output_token_ids=\[5, -1\]: .*Fix: pass ids >= 0",
        ),
        (
            None,
            changed(4, prompt_token_ids=[9999]),
            CONFIG,
            r"rollout 4: it has token id 9999, .*another model sampled it",
        ),
        (None, UNLABELLED, CONFIG, r"have no 'value' label. Fix: set it, or run `zip-rc label`"),
        (
            None,
            [dataclasses.replace(r, value=1.5) for r in rollouts()],
            CONFIG,
            r"label outside \[0, 1\]",
        ),
        (None, rollouts(6), CONFIG, r"eval_rollouts=8: there are only 6 rollouts"),
        (
            None,
            [dataclasses.replace(r, correct=float("nan")) for r in rollouts()],
            CONFIG,
            r"eval_rollouts=8: some rollouts have no `correct`",
        ),
        (
            None,
            rollouts(),
            dataclasses.replace(CONFIG, row_tokens=8),
            r"row_tokens=8: .*Fix: set row_tokens to at least",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_any_step(
    lm, data, config, message, monkeypatch
):
    monkeypatch.setattr("zip_rc_jax.training.trainer.train_step", None)
    with pytest.raises(UsageError, match=message) as error:
        train_head(tiny_lm() if lm is None else lm, data, config)
    assert len(str(error.value)) < 900


def test_a_training_that_diverges_names_a_fix_that_needs_no_directory(monkeypatch):
    def poisoned(spec, state, teacher, batch):
        return state, {"loss": np.float32(np.nan), "grad_norm": np.float32(1)}

    monkeypatch.setattr("zip_rc_jax.training.trainer.train_step", poisoned)
    with pytest.raises(
        UsageError, match=r"Fix: raise max_skipped to go on, or train with a lower learning rate\.$"
    ):
        train_head(
            tiny_lm(),
            rollouts(),
            dataclasses.replace(CONFIG, max_skipped=2, log_every=100, evaluations=1),
        )


def test_it_is_public_and_trains_a_model_that_decodes(in_memory):
    assert zip_rc_jax.train_head is train_head
    assert zip_rc_jax.TrainConfig is TrainConfig
    trained, _ = in_memory
    (result,) = zip_rc_jax.decode(
        trained, ["1 + 2 ="], n=2, interval=4, window=2, max_tokens=6, rows=8
    )
    assert 0 <= result.expected_reward <= 1
    assert trained.head.grid == TINY_GRID
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(trained.params))
