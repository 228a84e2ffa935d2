"""What a checkpoint holds is what comes out of it, or an error that names it: digests, damaged
files, paths that lose weights."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from harness.processes import cut
from harness.tiny import tiny_lm
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.models.io import digests, stored
from zip_rc_jax.models.io.digests import array_digest, array_digests, differing, json_digest
from zip_rc_jax.models.io.load import embedded, load
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training.checkpoint import Checkpoints, check_earlier
from zip_rc_jax.training.step import init_state


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---- digests


def by_hand(x):
    """The digest as its description says it, one element after another, with Python's integers."""
    width, mask = min(4, x.dtype.itemsize), 2**32 - 1
    raw, sums = x.tobytes(), [0, 0]
    for index in range(len(raw) // width):
        place = index * 0x9E3779B1 & mask
        mixed = (
            (int.from_bytes(raw[index * width : (index + 1) * width], "little") ^ place)
            * 0x85EBCA6B
        ) & mask
        mixed ^= mixed >> 15
        sums = [(sums[0] + mixed * 0x9E3779B1) & mask, (sums[1] + mixed * (place | 1)) & mask]
    return f"{x.dtype.name}[{','.join(map(str, x.shape))}]:{sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn"]
)
@pytest.mark.parametrize("on_host", [True, False], ids=["by NumPy", "by XLA"])
def test_the_digest_of_an_array_is_the_same_on_every_mesh_and_by_hand(monkeypatch, dtype, on_host):
    monkeypatch.setattr(digests, "_ON_HOST", 2**22 if on_host else 0)
    x = (3 * jax.random.normal(jax.random.key(0), (8, 4, 6))).astype(dtype)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    specs = [
        (),
        ("data",),
        ("fsdp", "tensor", "data"),
        (None, ("data", "tensor")),
        (("tensor", "fsdp", "data"),),
    ]
    found = {
        array_digest(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) for spec in specs
    }
    assert found | {array_digest(x)} == {by_hand(np.asarray(x))}


@pytest.mark.parametrize(
    "x",
    [
        np.float32([[0.0, 1.5], [-2.0, 1e-42]]),
        np.array([True, False, True]),
        np.arange(3, dtype=np.uint16),
    ],
)
@pytest.mark.parametrize("on_host", [True, False], ids=["by NumPy", "by XLA"])
def test_every_bit_of_an_array_counts(monkeypatch, x, on_host):
    monkeypatch.setattr(digests, "_ON_HOST", 2**22 if on_host else 0)
    bits = range(8 * x.nbytes) if x.dtype != bool else range(0, 8 * x.nbytes, 8)
    found = {array_digest(jnp.asarray(x))}
    for bit in bits:
        raw = bytearray(x.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        found.add(array_digest(jnp.asarray(np.frombuffer(raw, x.dtype).reshape(x.shape))))
    assert len(found) == 1 + len(bits)


def test_order_shape_and_type_of_an_array_count():
    x = np.float32([[1, -1], [2, 0]])
    others = [
        x.T,
        x[::-1],
        x.reshape(4),
        x.reshape(1, 4),
        -x,
        x.astype(np.int32),
        x.view(np.int32),
        np.zeros_like(x),
        np.ones_like(x),
    ]
    assert len({array_digest(y) for y in [x, *others]}) == 1 + len(others)
    assert array_digest(np.zeros((0, 3), np.float32)) == "float32[0,3]:0000000000000000"


def test_differing_arrays_are_named_also_missing_ones():
    assert differing({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert differing({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == "b, c"
    assert differing({}, dict.fromkeys("abcde", "1")) == "a, b, c and 2 more"


def test_the_digest_of_json_does_not_depend_on_how_it_is_written():
    value = {"b": [1, 0.1, None, "ü\n"], "a": {10: 1, 2: (3, 4)}}
    assert json_digest(value) == json_digest(
        json.loads(json.dumps(value, indent=3, ensure_ascii=False))
    )
    assert json_digest(value) != json_digest({**value, "b": [1, 0.1, None, "u\n"]})


# ---- damage to every file


def damages(raw, draw, flips):
    """(what, contents) of a damaged file; None where it is gone."""
    for bit in sorted(draw.sample(range(8 * len(raw)), min(flips, 8 * len(raw)))):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(changed)
    for length in sorted({0, 1, len(raw) // 2, len(raw) - 1}):
        yield f"cut after {length}", raw[:length]
    yield from [("zeros", bytes(len(raw))), ("longer", raw + b"\0x"), ("gone", None)]


def with_damage(directory, draw, flips):
    """Damages every file below `directory`, one after the other, each in many ways; what is yielded
    says which."""
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        raw = path.read_bytes()
        for what, changed in damages(raw, draw, flips):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            yield f"{path.relative_to(directory)}, {what}"
            path.unlink(missing_ok=True)
            path.write_bytes(raw)


def everything(lm):
    return lm.config, lm.head, lm.info, lm.tokenizer.to_dict()


@pytest.mark.parametrize(("seed", "flips"), [(0, 6), pytest.param(1, 60, marks=pytest.mark.slow)])
def test_a_damaged_model_is_refused_by_name_or_comes_out_whole(tmp_path, lm, seed, flips):
    lm = dataclasses.replace(lm, info={"made": "here"})
    lm.save(tmp_path / "m")
    refused, flipped = [], 0
    for what in with_damage(tmp_path / "m", random.Random(seed), flips):
        message, found = "", None
        try:
            found = load(tmp_path / "m")
        except UsageError as error:
            message = str(error)
        if found is None:
            assert message.startswith(f"model {tmp_path}/m: "), what
            assert len(message) < 1000, what
            refused.append(what)
            flipped += ", bit" in what
            continue
        assert everything(found) == everything(lm), what
        assert_equal(found.params, lm.params)
    assert flipped >= 2 * flips, "those of meta and arrays"
    whole_arrays = {
        what
        for what in refused
        if what.endswith((", zeros", ", gone", ", cut after 0")) and what.startswith("params/ocdbt")
    }
    assert whole_arrays, "the arrays cannot do without their files"


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def array_bits(path, draw, count):
    """Flips `count` bits of the largest file, where the arrays lie."""
    raw = bytearray(path.read_bytes())
    for bit in draw.sample(range(8 * len(raw)), count):
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def test_a_damaged_model_leaves_no_pages_of_tracebacks_behind(tmp_path, lm, capfd):
    lm.save(tmp_path / "m")
    cut(tmp_path / "m")
    with pytest.raises(UsageError, match="its parameters are incomplete"):
        load(tmp_path / "m")
    jax.clear_caches()
    text = "".join(capfd.readouterr())
    assert "Traceback" not in text
    assert "Exception" not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored_as", ["float32", "bfloat16"])
def test_a_model_is_checked_and_cast_whatever_its_types_are(
    tmp_path, monkeypatch, lm, dtype, stored_as
):
    monkeypatch.setattr(stored, "TOGETHER", 1000)
    lm.save(tmp_path / "m", jnp.dtype(stored_as))
    layout = Layout(make_mesh(data=2, fsdp=2, tensor=2), TRAIN_RULES)
    assert_equal(
        load(tmp_path / "m", dtype=dtype, layout=layout).params,
        jax.tree.map(lambda x: x.astype(stored_as).astype(dtype), lm.params),
    )
    path = largest_file(tmp_path / "m")
    raw = path.read_bytes()
    for seed in range(4):
        array_bits(path, random.Random(seed), 1)
        try:
            found = load(tmp_path / "m", dtype=dtype, layout=layout)
        except UsageError:
            continue
        finally:
            path.write_bytes(raw)
        assert_equal(
            found.params, jax.tree.map(lambda x: x.astype(stored_as).astype(dtype), lm.params)
        )


def test_groups_of_arrays_stay_below_the_limit_where_they_can(monkeypatch):
    monkeypatch.setattr(stored, "TOGETHER", 100)
    leaves = {
        name: np.zeros(size, np.uint8)
        for name, size in zip("abcdef", (60, 40, 1, 300, 99, 1), strict=True)
    }
    assert [list(group) for group in stored.groups(leaves)] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e", "f"],
    ]


def edit_meta(model, change):
    path = model / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_models_from_before_there_were_digests_are_read(tmp_path, lm):
    lm.save(tmp_path / "m")
    edit_meta(tmp_path / "m", lambda meta: meta.pop("digests"))
    assert_equal(load(tmp_path / "m").params, lm.params)
    assert_equal(
        load(tmp_path / "m", dtype="bfloat16").params,
        jax.tree.map(lambda x: x.astype("bfloat16"), lm.params),
    )


@pytest.mark.parametrize("name", ["chain_sum_policy", "chain_sum_zip"])
def test_the_models_that_ship_have_digests(tmp_path, name):
    model = shutil.copytree(embedded(name), tmp_path / name)
    meta = json.loads((model / "meta" / "metadata").read_text())
    assert meta["digests"]["params"] == array_digests(load(model, dtype=meta["dtype"]).params)
    edit_meta(model, lambda meta: meta["model"].update(rope_theta=meta["model"]["rope_theta"] + 1))
    with pytest.raises(
        UsageError, match=r"meta/metadata \(sizes, tokenizer, head\) does not fit its digest"
    ):
        load(model)


OLD_DAMAGES = {
    "no info": lambda meta: meta.pop("info"),
    "info is text": lambda meta: meta.update(info="x"),
    "no tokenizer": lambda meta: meta.update(tokenizer={}),
    "a tokenizer that is none": lambda meta: meta["tokenizer"].update(backend="{}"),
    "tokenizer is a list": lambda meta: meta.update(tokenizer=[1]),
    "model is a number": lambda meta: meta.update(model=7),
    "sizes are texts": lambda meta: meta["model"].update(d_model="32"),
    "a head of text": lambda meta: meta.update(head="x"),
    "other sizes": lambda meta: meta["model"].update(d_ff=24),
    "absurd sizes": lambda meta: meta["model"].update(d_ff=10**15),
}


@pytest.mark.parametrize("damage", OLD_DAMAGES)
def test_a_damaged_meta_of_a_model_without_digests_is_refused_too(tmp_path, lm, damage):
    lm.save(tmp_path / "m")
    edit_meta(tmp_path / "m", lambda meta: (meta.pop("digests"), OLD_DAMAGES[damage](meta)))
    with pytest.raises(UsageError, match=rf"model {tmp_path}/m: .*Fix: ") as found:
        load(tmp_path / "m")
    assert len(str(found.value)) < 1000


# ---- training checkpoints

CONFIG = TrainConfig(label="value", steps=6, batch_rows=4, row_tokens=48)
SETTINGS = {"train": {"steps": 6}, "model": {"d": [1, 2]}, "source": {}}


def states(layout=None):
    """Train states of the steps 2 and 4, laid out over a mesh if one is given."""
    lm = tiny_lm()
    layout = layout or Layout(make_mesh(), TRAIN_RULES)
    axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    state = init_state(layout.shard(lm.params, axes), CONFIG)
    state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, layout.sharding(())), state)
    return [
        dataclasses.replace(
            jax.tree.map(lambda x, s=step: x + jnp.asarray(s, x.dtype), state),
            step=state.step + step,
        )
        for step in (2, 4)
    ]


def save_both(directory, saved):
    checkpoints = Checkpoints(directory, SETTINGS)
    for state in saved:
        checkpoints.save(state, {"next": int(state.step) * 10, "of": [1, {"a": 0.1}]})
    checkpoints.close()


def restored(directory, like):
    checkpoints = Checkpoints(directory, SETTINGS)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


@pytest.mark.parametrize(("seed", "flips"), [pytest.param(1, 4, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_of_training_comes_out_whole_or_is_named_and_the_one_before_is_used(
    tmp_path, capsys, seed, flips
):
    saved = states()
    save_both(tmp_path / "whole", saved)
    expected, before = {int(state.step): state for state in saved}, 0
    for what in with_damage(tmp_path / "whole" / "4", random.Random(seed), flips):
        directory = shutil.copytree(tmp_path / "whole", tmp_path / "run" / "checkpoints")
        check_earlier(directory, SETTINGS)
        state, position = restored(directory, saved[0])
        step = int(state.step)
        assert_equal(state, expected[step])
        assert position == {"next": step * 10, "of": [1, {"a": 0.1}]}, what
        said = " ".join(capsys.readouterr().err.split())
        if step == 2:
            before += 1
            assert f"checkpoint {directory}/4 cannot be read (" in said, what
            assert "Going on from step 2" in said, what
        else:
            assert "cannot be read" not in said, what
        shutil.rmtree(tmp_path / "run")
    assert before > 3 * flips, "the arrays, the index, the settings and the position"


@pytest.mark.parametrize("name", ["settings", "data"])
def test_settings_and_position_of_a_checkpoint_cannot_change_without_being_noticed(
    tmp_path, capsys, name
):
    saved = states()
    save_both(tmp_path / "c", saved)
    path = tmp_path / "c" / "4" / name / "metadata"
    changed = (
        path.read_text().replace('"steps": 6', '"steps": 7').replace('"next": 40', '"next": 41')
    )
    assert changed != path.read_text()
    path.write_text(changed)
    check_earlier(tmp_path / "c", SETTINGS)
    state, position = restored(tmp_path / "c", saved[0])
    assert (int(state.step), position["next"]) == (2, 20)
    assert "do not fit their digest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "there", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "mesh"]
)
@pytest.mark.parametrize(
    "here", [None, {"data": 1, "fsdp": 4, "tensor": 2}], ids=["on one device", "on another mesh"]
)
def test_a_checkpoint_is_checked_on_any_mesh(tmp_path, there, here):
    saved = states(there and Layout(make_mesh(**there), TRAIN_RULES))
    like = states(here and Layout(make_mesh(**here), TRAIN_RULES))[0]
    save_both(tmp_path / "c", saved)
    state, _ = restored(tmp_path / "c", like)
    assert_equal(state, saved[1])
    found = []
    for seed in range(4):  # of the arrays, not of what is between them
        directory = shutil.copytree(tmp_path / "c", tmp_path / f"c{seed}")
        array_bits(largest_file(directory / "4"), random.Random(seed), 20)
        found.append(int(restored(directory, like)[0].step))
    assert found == [2] * 4


def test_checkpoints_of_training_from_before_there_were_digests_are_used(tmp_path):
    saved = states()
    save_both(tmp_path / "c", saved)
    path = tmp_path / "c" / "4" / "data" / "metadata"
    position = json.loads(path.read_text())
    del position["digests"]
    path.write_text(json.dumps(position))
    state, found = restored(tmp_path / "c", saved[0])
    assert_equal(state, saved[1])
    assert found == position


def test_a_save_that_left_no_index_is_an_error(tmp_path):
    """Orbax only warns when it finds nothing to merge into one."""
    saved = states()
    checkpoints = Checkpoints(tmp_path / "c", SETTINGS)
    checkpoints.save(saved[0], {})
    checkpoints.manager.wait_until_finished()
    (tmp_path / "c" / "2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(
        UsageError, match=r"checkpoint in .*could not be written \(.*no index of the arrays"
    ):
        checkpoints.save(saved[1], {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "d", SETTINGS)
    checkpoints.save(saved[0], {})
    checkpoints.manager.wait_until_finished()
    (tmp_path / "d" / "2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(UsageError, match="no index of the arrays"):
        checkpoints.close()


# ---- what is written is read back


def lose(monkeypatch, damage):
    """Whatever Orbax saves is damaged at once, as by a disk."""
    save = ocp.Checkpointer.save

    def losing(self, directory, *args, **kwargs):
        save(self, directory, *args, **kwargs)
        damage(directory)

    monkeypatch.setattr(ocp.Checkpointer, "save", losing)


LOSSES = {
    "no index": lambda path: os.unlink(path / "params" / "manifest.ocdbt"),
    "no meta": lambda path: shutil.rmtree(path / "meta"),
    "another meta": lambda path: edit_meta(
        path, lambda meta: meta["info"].update(made="elsewhere")
    ),
    "other arrays": lambda path: array_bits(largest_file(path / "params"), random.Random(0), 30),
    "an old meta": lambda path: edit_meta(path, lambda meta: meta.pop("digests")),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_that_does_not_come_back_as_it_was_saved_is_an_error(
    tmp_path, monkeypatch, lm, loss
):
    lose(monkeypatch, LOSSES[loss])
    with pytest.raises(UsageError, match="what was read back is not what was written"):
        lm.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == [], "nobody will take it for a model"


# ---- paths

UNFIT = ("[x]", "lr[1,2]", "a*", "a?", "a\\b", "gs:", "logs:", "x.orbax-checkpoint-tmp", "a\udcffb")
FIT = (
    "{a,b}",
    "a b",
    "a\nb",
    "ünï 🙂",
    "~x",
    "a..",
    "100%",
    "%5B",
    "a#b",
    "$HOME",
    "a:b",
    "-x",
    "x]",
    "'\"",
    "lr=1e-3,n=2",
    "s3:",
    "ocdbt.process_0",
)


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("where", ["itself", "above"])
def test_paths_where_orbax_loses_arrays_are_refused_before_anything_is_written(
    tmp_path, lm, name, where
):
    path = tmp_path / name if where == "itself" else tmp_path / name / "m"
    with pytest.raises(
        UsageError, match=r"model path .* its path .*Fix: choose a path of plain letters"
    ):
        lm.save(path)
    with pytest.raises(UsageError, match="checkpoint directory"):
        Checkpoints(path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_is_refused_for_the_folder_above_it(tmp_path, monkeypatch, lm):
    (tmp_path / "[x]").mkdir()
    monkeypatch.chdir(tmp_path / "[x]")
    with pytest.raises(
        UsageError,
        match=r"model path 'm': the path of a folder above it, '.*\[x\]/m/', contains '\['",
    ):
        lm.save("m")


@pytest.mark.parametrize(
    "path", ["gs://bucket/m", "s3://bucket/m", "http://host/m", "file:///tmp/m"]
)
def test_addresses_are_refused(path, lm):
    with pytest.raises(UsageError, match="elsewhere a bucket is used through a mount"):
        lm.save(path)


def test_a_null_character_is_refused(lm):
    with pytest.raises(UsageError, match="no file system allows it"):
        lm.save("a\0b")


@pytest.mark.parametrize("name", FIT)
def test_other_strange_paths_hold_what_was_saved(tmp_path, lm, name):
    for path in (tmp_path / name, tmp_path / "p" / name / "m"):
        lm.save(path)
        assert_equal(load(path).params, lm.params)


@pytest.mark.parametrize("name", ["[x]", "a*", "a?"])
def test_a_model_that_was_copied_to_such_a_path_is_read(tmp_path, lm, name):
    lm.save(tmp_path / "m")
    assert_equal(load(shutil.copytree(tmp_path / "m", tmp_path / name)).params, lm.params)


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch, lm):
    monkeypatch.setenv("HOME", str(tmp_path))
    lm.save("~/m")
    assert_equal(load("~/m").params, lm.params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_file_or_a_foreign_directory_is_never_replaced_by_a_model(tmp_path, lm):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    for name in ("file", "run"):
        with pytest.raises(
            UsageError,
            match=rf"model path {tmp_path}/{name}: a .* is there, which is not overwritten",
        ):
            lm.save(tmp_path / name)
    assert [p.read_text() for p in (tmp_path / "file", tmp_path / "run" / "thesis.tex")] == [
        "precious"
    ] * 2
    (tmp_path / "empty").mkdir()
    lm.save(tmp_path / "empty")
    lm.save(tmp_path / "empty")
    assert_equal(load(tmp_path / "empty").params, lm.params)
