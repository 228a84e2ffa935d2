"""Pools on disk: complete or absent, resumed, checked, and small where they may be."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from zip_rc_jax.data.sample_pool import (
    ARRAYS,
    DIGESTS,
    JOINTS,
    METADATA,
    PartialPool,
    PoolFiles,
    PoolSample,
    block_means,
    packed,
    tail_means,
    unpacked,
)
from zip_rc_jax.evaluation.replay import load_pool, windowed, windowed_end
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError

GRID = Grid((0.0, 1.0), (0, 4, 8))
STRIDE, WINDOW = 4, 3
SETTINGS = {
    "decode": {
        "max_tokens": 32,
        "stop": [],
        "answer_extractor": "stated",
        "answer_equivalence": "grader",
    }
}


def joints_of(length, rng):
    return rng.dirichlet(np.ones(4), length).astype(np.float32)


def sample(prompt, number, length, kind="float32"):
    rng = np.random.default_rng([prompt, number])
    along = joints_of(length, rng)
    along[0] = joints_of(1, np.random.default_rng(prompt))[0]  # the root is the prompt's
    stored = {
        "root": along[0],
        "joints": np.array(
            [along[max(0, t + 1 - WINDOW) : t + 1].mean(0) for t in range(STRIDE, length, STRIDE)],
            np.float32,
        ).reshape(-1, 4),
        "end": along[-WINDOW:].mean(0),
        "blocks": block_means(along, STRIDE),
        "tail": tail_means(along, STRIDE),
    }
    return PoolSample(
        prompt_index=prompt, sample_index=number, prompt_hash=7, level=prompt, question="1 + é =",
        reference="2", text=f"Answer: {number}", answer_id=number, separable=True,
        stopped=bool(number), correct=float(number % 2), value=0.25, computed=length,
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=-rng.random(length).astype(np.float32),
        rewards=rng.random(length).astype(np.float32),
        **{name: packed(value, kind) for name, value in stored.items()},
    )  # fmt: skip


LENGTHS = [[1, 9], [4, 5], [8, 13]]


def rows(prompt, kind="float32"):
    return [sample(prompt, k, length, kind) for k, length in enumerate(LENGTHS[prompt])]


def about(kind="float32"):
    return {
        "grid": GRID.to_dict(), "prompts": 3, "samples": 2, "stride": STRIDE, "window": WINDOW,
        "joints": kind,
    }  # fmt: skip


def written(directory, kind="float32"):
    partial = PartialPool(directory, SETTINGS)
    for prompt in range(3):
        partial.add(prompt, rows(prompt, kind))
    partial.finish(3, 6, about(kind))
    return PoolFiles(directory)


def test_what_was_written_is_read(tmp_path):
    files = written(tmp_path / "pool")
    expected = [row for prompt in range(3) for row in rows(prompt)]
    for mine, theirs in zip(files, expected, strict=True):
        for field in dataclasses.fields(PoolSample):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if field.name in ARRAYS:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
            else:
                assert a == b
    assert files.metadata["settings"] == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["pool"], "nothing is left beside it"


def test_equal_samples_become_equal_bytes(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert one._digests == two._digests


def test_an_interrupted_pool_goes_on_with_what_is_missing(tmp_path):
    directory = tmp_path / "pool"
    first = PartialPool(directory, SETTINGS)
    first.add(0, rows(0))
    first.add(2, rows(2))
    # A file that was cut off has no note yet, and counts as absent.
    first.partial.joinpath("samples-000001.array_record").write_bytes(b"half")
    assert not directory.exists()
    second = PartialPool(directory, SETTINGS)
    assert second.done() == {0, 2}
    second.add(1, rows(1))
    second.finish(3, 6, about())
    assert [row.prompt_index for row in PoolFiles(directory)] == [0, 0, 1, 1, 2, 2]


def test_other_settings_do_not_go_on_with_a_partial_pool(tmp_path):
    PartialPool(tmp_path / "pool", SETTINGS).add(0, rows(0))
    other = {"decode": SETTINGS["decode"] | {"max_tokens": 64}}
    with pytest.raises(UsageError, match=r"decode.max_tokens was 32, now 64.*start again"):
        PartialPool(tmp_path / "pool", other)


def test_a_partial_file_that_was_changed_is_named(tmp_path):
    partial = PartialPool(tmp_path / "pool", SETTINGS)
    partial.add(0, rows(0))
    path = partial.partial / "samples-000000.array_record"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match=r"samples-000000.array_record: it is not as it was"):
        partial.finish(1, 2, about())
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("name", [METADATA, "samples-000001.array_record"])
def test_damage_is_named_with_the_file(tmp_path, name):
    directory = tmp_path / "pool"
    written(directory)
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(bytes(data))
    with pytest.raises(UsageError, match=rf"{name}: it is not as it was.*Fix: delete the direct"):
        list(PoolFiles(directory))


def test_a_missing_file_and_no_pool_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"pool .*nothing: there is no such directory"):
        PoolFiles(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"it has no metadata.json, so it is no pool"):
        PoolFiles(tmp_path / "empty")
    written(tmp_path / "pool")
    (tmp_path / "pool" / "samples-000002.array_record").unlink()
    with pytest.raises(UsageError, match=r"samples-000002.array_record: it cannot be read"):
        list(PoolFiles(tmp_path / "pool"))
    (tmp_path / "pool" / DIGESTS).write_text(json.dumps([]))
    with pytest.raises(UsageError, match=r"digests.json: it holds no digests"):
        PoolFiles(tmp_path / "pool")


@pytest.mark.parametrize(("kind", "most"), [("float32", 0), ("bfloat16", 2e-3), ("uint8", 8e-3)])
def test_joints_in_fewer_bits_are_near_and_still_distributions(tmp_path, kind, most):
    exact = joints_of(500, np.random.default_rng(0))
    found = unpacked(packed(exact, kind), kind)
    assert np.abs(found - exact).max() <= most
    np.testing.assert_allclose(found.sum(1), 1, atol=5e-3)
    files = written(tmp_path / "pool", kind)
    first = next(iter(files))
    assert all(getattr(first, name).dtype == np.float32 for name in JOINTS)
    stored = next(files.records(JOINTS))
    assert stored["joints"].dtype.itemsize == {"float32": 4, "bfloat16": 2, "uint8": 1}[kind]


def test_a_sure_joint_stays_sure_in_eight_bits():
    sure = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(unpacked(packed(sure, "uint8"), "uint8"), sure)


def test_block_means_give_every_window_of_multiples_of_the_stride():
    rng = np.random.default_rng(5)
    for length in (1, 2, 4, 5, 9, 16, 17, 23):
        along = joints_of(length, rng)
        blocks, tail = block_means(along, STRIDE), tail_means(along, STRIDE)
        for window in (4, 8, 12, 40):
            decided = windowed(blocks, along[0], STRIDE, window)
            points = range(STRIDE, length, STRIDE)
            assert len(decided) == len(points)
            for mine, t in zip(decided, points, strict=True):
                expected = along[max(0, t + 1 - window) : t + 1].mean(0)
                np.testing.assert_allclose(mine, expected, atol=1e-6)
            end = windowed_end(tail, length, STRIDE, window)
            np.testing.assert_allclose(end, along[-window:].mean(0), atol=1e-6)


def test_a_replay_reads_its_joints_at_every_decision(tmp_path):
    files = written(tmp_path / "pool")
    pool = load_pool(files)
    assert pool.length.tolist() == LENGTHS
    for row in files:
        here = row.prompt_index, row.sample_index
        length = len(row.token_ids)
        for t in [*range(0, length, STRIDE), length]:
            found = pool.joint_at(*(np.array([x]) for x in (*here, t)))[0]
            ended = t == length
            expected = row.end if ended else row.joints[t // STRIDE - 1] if t else row.root
            np.testing.assert_array_equal(found, expected)


def test_a_cut_off_sample_is_worth_what_the_switch_says(tmp_path):
    """Sample 1 of each prompt is right, and sample 0 was cut off."""
    files = written(tmp_path / "pool")
    changed = [dataclasses.replace(x, correct=1.0) for p in range(3) for x in rows(p)]
    partial = PartialPool(tmp_path / "other", SETTINGS)
    partial.add(0, changed)
    partial.finish(1, 6, about())
    files = PoolFiles(tmp_path / "other")
    assert load_pool(files).correct.tolist() == [[1, 1]] * 3
    assert load_pool(files, unfinished="wrong").correct.tolist() == [[0, 1]] * 3


def test_fewer_samples_than_stored_are_the_first_ones_and_more_are_refused(tmp_path):
    files = written(tmp_path / "pool")
    assert load_pool(files, samples=1).length.tolist() == [[row[0]] for row in LENGTHS]
    with pytest.raises(UsageError, match=r"3 samples of pool .*: it has 2 of every prompt"):
        load_pool(files, samples=3)


def test_a_window_between_the_stored_blocks_is_refused(tmp_path):
    files = written(tmp_path / "pool")
    with pytest.raises(UsageError, match=r"window=6: .*every 4 tokens.*windows of 3.*multiple"):
        load_pool(files, window=6)
