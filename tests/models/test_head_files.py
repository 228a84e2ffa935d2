"""Heads in files of their own: written from a trained model, attached to the policy alone."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import zip_rc_jax
from harness.tiny import tiny_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.head import HeadDefaults
from zip_rc_jax.models.io import head_files
from zip_rc_jax.models.io.head_files import body_digest, read_head, save_head
from zip_rc_jax.models.io.load import load
from zip_rc_jax.runtime.errors import UsageError

TEXTS = [("1 + 2 =", "3 so wait 4"), ("a b", "c d Answer: 7")]


@pytest.fixture(scope="module")
def trained(lm):
    """A model whose head has defaults of its own."""
    head = dataclasses.replace(lm.head, defaults=HeadDefaults(4, 2, 16))
    return dataclasses.replace(lm, head=head, info={"source": "tiny"})


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    """The policy without a head as a checkpoint, and the head as a file."""
    directory = tmp_path_factory.mktemp("head")
    trained.without_head().save(directory / "policy")
    save_head(trained, directory / "head.safetensors")
    return directory / "policy", directory / "head.safetensors"


def joints(lm):
    return [found.joint for found in zip_rc_jax.predict(lm, TEXTS)]


def test_policy_and_head_file_predict_as_the_trained_model_does(trained, places):
    policy, file = places
    attached = load(policy, head=file)
    assert attached.head == trained.head
    assert attached.head.defaults == trained.head.defaults
    np.testing.assert_array_equal(attached.params["zip_rows"], trained.params["zip_rows"])
    for ours, theirs in zip(joints(attached), joints(trained), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_same_policy_in_bfloat16_takes_the_head_too(trained, places):
    policy, file = places
    attached = load(policy, dtype="bfloat16", head=file)
    assert {str(x.dtype) for x in jax.tree.leaves(attached.params)} == {"bfloat16"}
    np.testing.assert_array_equal(
        np.asarray(attached.params["zip_rows"]),
        np.asarray(trained.params["zip_rows"]).astype(attached.params["zip_rows"].dtype),
    )


def test_a_policy_is_known_by_its_weights_whatever_head_or_padding_it_has(trained):
    assert body_digest(trained) == body_digest(trained.without_head())
    for name in ("embed", "final_norm"):
        body = trained.params["body"]
        changed = {**body, name: body[name].at[(3,) * body[name].ndim].add(0.5)}
        other = dataclasses.replace(trained, params={**trained.params, "body": changed})
        assert body_digest(other) != body_digest(trained), name


def test_a_head_is_refused_by_a_model_with_other_weights(places, tmp_path):
    tiny_lm(seed=6).without_head().save(tmp_path / "other")
    with pytest.raises(UsageError, match=r"trained on other weights.*trained on \(tiny\)"):
        load(tmp_path / "other", head=places[1])


def test_a_head_is_refused_by_a_model_of_another_width(places, trained, tmp_path):
    wider = tiny_lm(dataclasses.replace(trained.config, d_model=40)).without_head()
    wider.save(tmp_path / "wider")
    with pytest.raises(UsageError, match="its rows have 32 numbers, and the model 40"):
        load(tmp_path / "wider", head=places[1])


def test_a_model_that_has_a_head_takes_no_second_one(trained, places, tmp_path):
    trained.save(tmp_path / "trained")
    with pytest.raises(UsageError, match="the model has a head of its own"):
        load(tmp_path / "trained", head=places[1])


def test_a_model_without_a_head_has_none_to_write(trained, tmp_path):
    with pytest.raises(UsageError, match="there are no rows to write"):
        save_head(trained.without_head(), tmp_path / "none.safetensors")


def damaged_rows(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def other_format(data):
    return data.replace(b"zip_rc_jax/head/1", b"zip_rc_jax/head/9")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_rows, "its rows do not fit their digest"),
        (other_format, "its format is 'zip_rc_jax/head/9'"),
        (lambda data: data[: len(data) // 2], "it is no head file, or damaged"),
        (lambda data: b"", "it is no head file, or damaged"),
        (lambda data: data.replace(b"zip_rc_head", b"zip_rc_dead"), "it is no head file"),
    ],
)
def test_damaged_head_files_are_refused_before_the_model_is_read(places, tmp_path, damage, message):
    (tmp_path / "bad.safetensors").write_bytes(damage(places[1].read_bytes()))
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "there is no model", head=tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match="there is no such file"):
        load(tmp_path / "there is no model", head=tmp_path / "absent.safetensors")


def test_heads_that_ship_have_names(places, tmp_path, monkeypatch):
    monkeypatch.setattr(head_files, "SHIPPED", tmp_path)
    (tmp_path / "tiny-policy.safetensors").write_bytes(places[1].read_bytes())
    assert load(places[0], head="builtin:tiny-policy").head == read_head(places[1]).head
    with pytest.raises(UsageError, match="ships no such head.*tiny-policy"):
        load(places[0], head="builtin:tiny-polcy")


def test_every_head_that_ships_can_be_read_and_is_small():
    for path in head_files.SHIPPED.glob("*"):
        assert path.suffix == head_files.ENDING
        assert path.stat().st_size < 2**20
        assert np.isfinite(read_head(path).rows).all()


def test_the_command_line_writes_a_head_and_reads_with_it(trained, places, tmp_path, capsys):
    trained.save(tmp_path / "trained")
    file = tmp_path / "new" / "head.safetensors"
    assert main(["export", str(tmp_path / "trained"), str(file), "--head-only"]) == 0
    assert file.read_bytes() == places[1].read_bytes()
    again = ["export", str(tmp_path / "trained"), str(file), "--head-only"]
    assert main(again) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    command = ["predict", str(places[0]), "--prompt", "1 + 2 ="]
    assert main(command) == 2
    assert "without a ZIP head" in capsys.readouterr().err
    assert main([*command, "--head", str(file)]) == 0
