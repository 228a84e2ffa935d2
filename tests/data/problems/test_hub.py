"""Data sets in the layout of the Hugging Face hub: local directories, the hub's cache, no network.

The copies are made here; nothing is downloaded.
"""

from __future__ import annotations

import os

import huggingface_hub
import pytest

from harness.datasets_on_disk import (
    COMMIT,
    datasets_cache,
    hub_cache,
    hub_directory,
    offline,
)
from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.data.problems import problem_set
from zip_rc_jax.runtime.errors import UsageError

TEST = [
    {"question": "Half of 8?", "answer": "8 / 2 = 4\n#### 4"},
    {"question": "Twice 6?", "answer": "#### 12"},
    {"question": "3 + 4?", "answer": "#### 7"},
]
TRAIN = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]


@pytest.fixture(scope="module")
def gsm(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "gsm"
    hub_directory(path, {"main": {"train": TRAIN, "test": TEST}, "socratic": {"test": TEST[:1]}}, 2)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Caches of this test alone, and no network."""
    offline(monkeypatch, tmp_path)
    return tmp_path


def read(source, **settings):
    return problem_set(ProblemsConfig(SourceConfig(source, **settings)), "train")


def pairs(found):
    return [(p.question, p.answer) for p in found.problems]


def test_a_local_directory_is_read_with_its_configuration_and_split(gsm, home):
    found = read(f"hf:{gsm}/main", split="test")
    assert pairs(found) == [("Half of 8?", "4"), ("Twice 6?", "12"), ("3 + 4?", "7")]
    assert pairs(read(f"hf:{gsm}/main", split="test[:1]")) == [("Half of 8?", "4")]
    assert pairs(read(f"hf:{gsm}/socratic")) == [("Half of 8?", "4")], "its only split"
    (source,) = found.record["sources"]
    assert (source["split"], source["rows"], source["problems"]) == ("test", 3, 3)
    assert source["columns"] == {"question": ["question"], "answer": ["answer"]}


def test_a_local_directory_is_read_as_it_is_now_and_is_no_other_one_of_its_name(home, tmp_path):
    first, second = tmp_path / "a" / "mine", tmp_path / "b" / "mine"
    hub_directory(first, {"default": {"test": TEST}})
    hub_directory(second, {"default": {"test": TRAIN}})
    assert len(read(f"hf:{first}")) == 3
    assert len(read(f"hf:{second}")) == 5
    hub_directory(first, {"default": {"test": TEST[:1]}})
    assert pairs(read(f"hf:{first}")) == [("Half of 8?", "4")]


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [
        ("", "test", r"it has the configurations \['main', 'socratic'\].*Fix: name one: hf:ORG"),
        ("/maim", "test", r"it has the configurations \['main', 'socratic'\]"),
        ("/main", "", r"split of .*it has several: train, test.*such as split: train"),
        ("/main", "dev", r"split='dev' of .*no such split; there are train, test"),
    ],
)
def test_an_unknown_or_unnamed_configuration_or_split_names_those_that_are_there(
    gsm, home, config, split, message
):
    with pytest.raises(UsageError, match=message):
        read(f"hf:{gsm}{config}", split=split)


def test_an_empty_split_and_a_directory_that_is_not_there_are_refused(gsm, home):
    with pytest.raises(UsageError, match=r"split 'test\[:0\]' of .*it has no rows"):
        read(f"hf:{gsm}/main", split="test[:0]")
    hub_directory(home / "empty", {"main": {"test": []}})
    with pytest.raises(UsageError, match=r"split 'test' of .*it has no rows"):
        read(f"hf:{home}/empty/main")
    with pytest.raises(UsageError, match=r"there is no such directory.*hub's layout"):
        read("hf:./nowhere", split="test")


def test_a_missing_column_names_those_that_are_there(gsm, home):
    with pytest.raises(UsageError, match=r"no column `solution`; the columns are question, answer"):
        read(f"hf:{gsm}/main", split="test", answer="solution")


def test_without_a_network_the_cache_that_hf_download_fills_is_read(gsm, home):
    snapshot = hub_cache(home, "openai/gsm8k", gsm)
    found = read("hf:openai/gsm8k/main", split="test")
    assert pairs(found) == [("Half of 8?", "4"), ("Twice 6?", "12"), ("3 + 4?", "7")]
    assert found.record["sources"][0]["revision"] == COMMIT
    # An interrupted download would be other problems without a word.
    (snapshot / "main" / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match="no copy is in"):
        read("hf:openai/gsm8k/main", split="test")


def test_without_a_network_the_cache_that_the_library_filled_itself_is_read(gsm, home):
    """No repository is in the hub's cache; the arrow files of `load_dataset` are all there is."""
    datasets_cache(home, "openai/gsm8k", "main", gsm, ("train", "test"))
    assert not (home / "hub").exists()
    found = read("hf:openai/gsm8k/main", split="test")
    assert pairs(found) == [("Half of 8?", "4"), ("Twice 6?", "12"), ("3 + 4?", "7")]
    assert found.record["sources"][0]["revision"] == COMMIT
    assert len(read("hf:openai/gsm8k", split="train")) == len(TRAIN), "its only configuration"
    assert pairs(read("hf:openai/gsm8k/main", split="test", revision=COMMIT)) == pairs(found)
    # Nothing offline says which commit a tag is: another one would be other problems.
    with pytest.raises(UsageError, match=rf"revision='v1'.*the cache of datasets has {COMMIT}"):
        read("hf:openai/gsm8k/main", split="test", revision="v1")
    with pytest.raises(UsageError, match="no copy is in"):
        read("hf:openai/gsm8k/socratic", split="test")


def test_without_network_and_copy_the_error_names_the_cache_and_the_command_that_fills_it(home):
    with pytest.raises(UsageError) as caught:
        read("hf:openai/gsm8k/main", split="test", revision="v1")
    said = str(caught.value)
    assert str(home / "hub") in said
    assert "`hf download --repo-type dataset openai/gsm8k --revision v1`" in said
    assert "HF_HOME" in said


def test_everything_else_is_read_before_the_network_is_asked(tmp_path, monkeypatch):
    """A mistake in a file is found at once, however long the hub takes."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "mine.jsonl").write_text('{"question": "q"}\n')
    sources = (
        SourceConfig("hf:openai/gsm8k/main", split="train"),
        SourceConfig(f"jsonl:{tmp_path}/mine.jsonl"),
    )
    with pytest.raises(UsageError, match=r"mine\.jsonl.*no column `answer`"):
        problem_set(ProblemsConfig(sources), "train")


def test_with_a_network_the_newest_commit_is_read_and_recorded(gsm, home, monkeypatch):
    """The hub here is a stand-in that answers with its commit and a builder of a local copy."""
    import datasets

    class Info:
        sha = COMMIT

    asked, load = [], datasets.load_dataset_builder

    def builder(path, config, data_dir=None, revision=None):
        asked.append((path, revision))
        return load(str(gsm), config)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    found = read("hf:openai/gsm8k/main", split="test", revision="main")
    assert asked == [("openai/gsm8k", COMMIT)]
    assert found.record["sources"][0]["revision"] == COMMIT
    assert os.path.isdir(gsm)
