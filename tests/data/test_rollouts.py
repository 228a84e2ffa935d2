"""Rollouts on disk: what was written comes back, in order, complete or not at all; also without
TensorFlow and in silence."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from harness.rollouts import assert_same, make_rollouts
from zip_rc_jax.data import tfds_builder
from zip_rc_jax.data.rollouts import (
    NEWER,
    PartialRollouts,
    RolloutSource,
    read_metadata,
    read_rollouts,
    summary_of,
    write_rollouts,
)
from zip_rc_jax.pipeline.chunks import write_in_chunks
from zip_rc_jax.runtime.errors import UsageError


def test_everything_comes_back_in_order(tmp_path):
    rollouts = make_rollouts(57)
    write_rollouts(tmp_path / "a/rollouts", iter(rollouts), metadata={"seed": 3, "grid": [0, 1]})
    # labels are float32
    assert_same(read_rollouts(tmp_path / "a/rollouts"), rollouts, tolerance=1e-7)
    assert read_metadata(tmp_path / "a/rollouts") == {"seed": 3, "grid": [0, 1]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["rollouts"], (
        "temporary files stayed behind"
    )


def test_a_dataset_of_an_earlier_version_has_no_names_of_levels_and_reads_as_ever(
    tmp_path, monkeypatch
):
    rollouts = [dataclasses.replace(r, **NEWER) for r in make_rollouts(5)]
    with monkeypatch.context() as patch:
        for name in ("INTEGERS", "TEXTS"):
            older = tuple(x for x in getattr(tfds_builder, name) if x not in NEWER)
            patch.setattr(tfds_builder, name, older)
        patch.setattr(
            tfds_builder,
            "vars",
            lambda r: {k: v for k, v in r.__dict__.items() if k not in NEWER},
            raising=False,
        )
        write_rollouts(tmp_path / "r", rollouts, metadata={})
    assert not {*NEWER} & {*tfds.builder_from_directory(str(tmp_path / "r")).info.features}
    assert_same(read_rollouts(tmp_path / "r"), rollouts, tolerance=1e-7)


def test_the_source_is_a_random_access_sequence(tmp_path):
    rollouts = make_rollouts(9)
    write_rollouts(tmp_path / "r", rollouts, metadata={})
    source = RolloutSource(tmp_path / "r")
    assert len(source) == 9
    assert_same(
        [source[i] for i in (8, 0, np.int64(3), -1)],
        [rollouts[i] for i in (8, 0, 3, -1)],
        tolerance=1e-7,
    )
    assert_same(source[2:7:2], rollouts[2:7:2], tolerance=1e-7)
    assert_same(source, rollouts, tolerance=1e-7)
    for index in (9, -10):
        with pytest.raises(IndexError):
            source[index]


def test_it_is_a_tfds_dataset_that_tfds_itself_reads(tmp_path):
    rollouts = make_rollouts(6)
    write_rollouts(tmp_path / "r", rollouts, metadata={})
    builder = tfds.builder_from_directory(str(tmp_path / "r"))
    assert builder.info.splits["train"].num_examples == 6
    for found, expected in zip(builder.as_data_source("train"), rollouts, strict=True):
        for name, value in vars(expected).items():
            if isinstance(value, str):
                assert found[name] == value.encode("utf-8", "surrogatepass")
            else:
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-7)


def test_bytes_do_not_depend_on_the_run(tmp_path):
    for name in "ab":
        write_rollouts(tmp_path / name, make_rollouts(20), metadata={})
    shards = [sorted((tmp_path / name).glob("*array_record*")) for name in "ab"]
    assert [p.name for p in shards[0]] == [p.name for p in shards[1]]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]


def test_it_needs_no_tensorflow_and_says_nothing(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from harness.rollouts import make_rollouts\n"
        "from zip_rc_jax.data.rollouts import read_rollouts, write_rollouts\n"
        f"write_rollouts({str(tmp_path / 'r')!r}, make_rollouts(3), metadata={{}}); "
        f"read_rollouts({str(tmp_path / 'r')!r})\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failed_write_leaves_the_old_dataset_and_nothing_else(tmp_path):
    write_rollouts(tmp_path / "r", make_rollouts(3), metadata={"old": True})

    def broken():
        yield from make_rollouts(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(tmp_path / "r", broken(), metadata={})
    assert_same(read_rollouts(tmp_path / "r"), make_rollouts(3), tolerance=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_dataset_can_be_rewritten_from_itself(tmp_path):
    """Grading and labelling do this."""
    write_rollouts(tmp_path / "r", make_rollouts(5), metadata={})
    write_rollouts(
        tmp_path / "r",
        (dataclasses.replace(r, value=0.5) for r in RolloutSource(tmp_path / "r")),
        metadata={"graded": True},
    )
    assert [r.value for r in read_rollouts(tmp_path / "r")] == [0.5] * 5
    assert read_metadata(tmp_path / "r") == {"graded": True}


def test_a_dataset_knows_its_rollouts_without_reading_them(tmp_path):
    rollouts = [
        *make_rollouts(8),
        dataclasses.replace(
            make_rollouts(1)[0], prompt_token_ids=[], output_token_ids=[], finished=False
        ),
    ]
    write_rollouts(tmp_path / "r", iter(rollouts), metadata={})
    plain = {
        "prompt": [len(r.prompt_token_ids) for r in rollouts],
        "output": [len(r.output_token_ids) for r in rollouts],
        "prompt_index": [r.prompt_index for r in rollouts],
        "prompt_hash": [
            zlib.crc32(np.asarray(r.prompt_token_ids, "<i4").tobytes()) for r in rollouts
        ],
        "largest_id": [
            max([*r.prompt_token_ids.tolist(), *r.output_token_ids.tolist()], default=-1)
            for r in rollouts
        ],
        "finished": [r.finished for r in rollouts],
        "correct": np.array([r.correct for r in rollouts], np.float32).tolist(),
        "value": np.array([r.value for r in rollouts], np.float32).tolist(),
    }
    stored = RolloutSource(tmp_path / "r").summary
    # Datasets of earlier versions have a summary without hashes, or none, and no digests.
    (tmp_path / "r/digests.json").unlink()
    np.savez(
        tmp_path / "r/summary.npz",
        **{name: column for name, column in vars(stored).items() if name != "prompt_hash"},
    )
    older = RolloutSource(tmp_path / "r").summary
    (tmp_path / "r/summary.npz").unlink()
    for found in (stored, older, RolloutSource(tmp_path / "r").summary, summary_of(rollouts)):
        assert vars(found).keys() == plain.keys()
        for name, column in vars(found).items():
            np.testing.assert_array_equal(column, plain[name], err_msg=name)
        assert found.finished.dtype == bool


def test_a_damaged_or_foreign_summary_is_refused_by_name(tmp_path):
    write_rollouts(tmp_path / "r", make_rollouts(3), metadata={})
    write_rollouts(tmp_path / "other", make_rollouts(4), metadata={})
    (tmp_path / "r/digests.json").unlink()  # which would tell first
    path = tmp_path / "r/summary.npz"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(
        UsageError,
        match=r"r/summary\.npz: it cannot be read .*Fix: delete it, and it is read from the "
        r"shards instead",
    ):
        _ = RolloutSource(tmp_path / "r").summary
    path.write_bytes((tmp_path / "other/summary.npz").read_bytes())
    with pytest.raises(UsageError, match=r"r/summary\.npz: it does not describe 3 rollouts"):
        _ = RolloutSource(tmp_path / "r").summary
    np.savez(path, prompt=np.zeros(3))
    with pytest.raises(UsageError, match=r"r/summary\.npz: it cannot be read"):
        _ = RolloutSource(tmp_path / "r").summary


def test_foreign_and_damaged_directories_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such directory"):
        RolloutSource(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"no dataset_info\.json"):
        read_rollouts(tmp_path / "other")
    with pytest.raises(UsageError, match="not overwritten"):
        write_rollouts(tmp_path / "other", make_rollouts(1), metadata={})
    with pytest.raises(UsageError, match="there are none"):
        write_rollouts(tmp_path / "empty", [], metadata={})
    write_rollouts(tmp_path / "r", make_rollouts(3), metadata={})
    (tmp_path / "r/digests.json").unlink()  # which would tell first
    info = (tmp_path / "r/dataset_info.json").read_text()
    (tmp_path / "r/dataset_info.json").write_text(info[:40])
    with pytest.raises(UsageError, match="TFDS cannot read it"):
        read_rollouts(tmp_path / "r")
    (tmp_path / "r/dataset_info.json").write_text(info)
    features = json.loads((tmp_path / "r/features.json").read_text())
    del features["featuresDict"]["features"]["value"]
    (tmp_path / "r/features.json").write_text(json.dumps(features))
    with pytest.raises(UsageError, match=r"differ from rollouts in \['value'\]"):
        read_rollouts(tmp_path / "r")
    write_rollouts(tmp_path / "r", make_rollouts(3), metadata={})
    shard = next((tmp_path / "r").glob("*array_record*"))
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(UsageError, match="a shard is damaged"):
        RolloutSource(tmp_path / "r")
    shard.unlink()
    with pytest.raises(UsageError, match="shards are missing"):
        read_rollouts(tmp_path / "r")


def test_chunks_survive_interruption_and_keep_their_order(tmp_path):
    rollouts = make_rollouts(12)
    first = PartialRollouts(
        tmp_path / "p", fingerprint={"seed": 1, "sampling": {"min_p": 0.1, "stop": (1, 2)}}
    )
    first.add(10, rollouts[8:])
    first.add(2, rollouts[:4])
    # what a kill leaves behind
    (tmp_path / "p/.chunk-00000003.jsonl.0123.tmp").write_text("half of a li")
    again = PartialRollouts(
        tmp_path / "p", fingerprint={"seed": 1, "sampling": {"min_p": 0.1, "stop": [1, 2]}}
    )
    assert again.done() == {2, 10}
    again.add(7, rollouts[4:8])
    assert_same(again.all(), rollouts)


def write_numbers(directory, size, make=None, count=5):
    return write_in_chunks(
        "test",
        directory,
        {"seed": 1},
        range(count),
        size,
        make or (lambda part: make_rollouts(len(part))),
    )


def test_chunks_of_another_size_are_never_joined_with_others(tmp_path):
    """Half of the work done in chunks of two, the other half in chunks of three: some rollouts
    would be there twice, and others not."""

    def stopping(part):
        if 2 in part:
            raise KeyboardInterrupt
        return make_rollouts(len(part))

    with pytest.raises(KeyboardInterrupt):
        write_numbers(tmp_path / "r", 2, stopping)
    with pytest.raises(UsageError, match="chunk_size was 2, now 3"):
        write_numbers(tmp_path / "r", 3)
    assert len(read_rollouts(write_numbers(tmp_path / "r", 2))) == 5
    assert read_metadata(tmp_path / "r") == {"seed": 1}, (
        "the dataset is the same for chunks of any size"
    )


def test_chunks_that_hold_too_few_rollouts_make_no_dataset(tmp_path):
    with pytest.raises(UsageError, match="they hold 4 rollouts, and 5 were asked for"):
        write_numbers(tmp_path / "r", 5, lambda part: make_rollouts(4))
    assert not (tmp_path / "r").exists()


def test_a_failed_chunk_is_absent(tmp_path):
    partial = PartialRollouts(tmp_path / "p", fingerprint={})

    def broken():
        yield from make_rollouts(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partial.add(0, broken())
    assert partial.done() == set()


def test_chunks_of_other_settings_are_refused_by_name(tmp_path):
    PartialRollouts(
        tmp_path / "p", fingerprint={"seed": 1, "sampling": {"min_p": 0.1, "top_k": 0}, "gone": 3}
    )
    with pytest.raises(UsageError) as error:
        PartialRollouts(
            tmp_path / "p", fingerprint={"seed": 1, "sampling": {"min_p": 0.2, "top_k": 0}}
        )
    message = str(error.value)
    assert "sampling.min_p was 0.1, now 0.2" in message
    assert "gone was 3, now None" in message
    assert "seed" not in message
    assert "top_k" not in message
