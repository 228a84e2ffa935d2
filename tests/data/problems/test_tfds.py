"""Data sets that TensorFlow Datasets prepared, without TensorFlow."""

from __future__ import annotations

import json
import sys

import pytest

from harness.datasets_on_disk import tfds_directory
from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.data.problems import problem_set
from zip_rc_jax.runtime.errors import UsageError


def row(i):
    return {"question": f"{i} + 1?", "answer": str(i + 1), "level": i % 2, "extra": {"id": f"x{i}"}}


ROWS = [row(i) for i in range(5)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    tfds_directory(path, {"train": ROWS[:3], "test": ROWS[3:]})
    return path


def read(data_dir, name="word_problems", **settings):
    source = SourceConfig(f"tfds:{name}", data_dir=str(data_dir), **settings)
    return problem_set(ProblemsConfig(source), "train")


@pytest.mark.parametrize("name", ["word_problems", "word_problems:1.2.0"])
def test_a_prepared_data_set_is_read_without_tensorflow(prepared, name):
    found = read(prepared, name, split="test", id="extra.id")
    assert {(p.id, p.question, p.answer, p.level_name) for p in found.problems} == {
        ("x3", "3 + 1?", "4", "1"),
        ("x4", "4 + 1?", "5", "0"),
    }
    assert "tensorflow" not in sys.modules
    (source,) = found.record["sources"]
    assert (source["version"], source["split"]) == ("1.2.0", "test")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("word_problems", "", r"it has train, test.*such as split: train"),
        ("word_problems", "dev", r"split='dev'.*no such split; there are train, test"),
        ("word_problems:9.9.9", "test", r"TFDS knows no such data set.*download_and_prepare"),
        ("nothing_here", "test", r"it is not there.*import tensorflow_datasets.*nothing_here"),
        ("a/b/c/d", "test", r"TFDS cannot read it.*Fix: write tfds:NAME"),
        ("word_problems", "test[:0]", r"it has no rows"),
    ],
)
def test_what_is_not_there_is_named_with_the_command_that_prepares_it(
    prepared, name, split, message
):
    with pytest.raises(UsageError, match=message) as caught:
        read(prepared, name, split=split)
    assert len(str(caught.value)) < 900


def test_a_format_that_needs_tensorflow_is_refused_by_name(tmp_path):
    directory = tfds_directory(tmp_path, {"test": ROWS})
    info = directory / "dataset_info.json"
    stored = json.loads(info.read_text())
    info.write_text(json.dumps(stored | {"fileFormat": "tfrecord"}))
    with pytest.raises(UsageError, match=r"format tfrecord, which only .*file_format='array_rec"):
        read(tmp_path, split="test")
