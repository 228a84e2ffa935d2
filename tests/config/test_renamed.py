"""Old names of settings are accepted for one release, with a warning."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import pytest

from zip_rc_jax.config import DecodeConfig, EvaluateConfig, PipelineConfig, ReplayConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.config.renamed import OLD_NAMES, new_names
from zip_rc_jax.inference.api import resolve
from zip_rc_jax.inference.outputs import Decision, Result, Usage
from zip_rc_jax.inference.requests import Request
from zip_rc_jax.runtime.errors import UsageError

WARNS = "rows was renamed to .*max_num_seqs; the old name goes away in the next release"


def test_every_old_name_stands_for_a_field_that_there_is():
    classes = {cls.__name__: cls for cls in (DecodeConfig, ReplayConfig, Request)}
    assert set(OLD_NAMES) == set(classes)
    for name, cls in classes.items():
        fields = {f.name for f in dataclasses.fields(cls)}
        assert set(OLD_NAMES[name].values()) <= fields
        assert not set(OLD_NAMES[name]) & fields


def test_python_takes_the_old_name_and_warns():
    with pytest.warns(DeprecationWarning, match=WARNS):
        config = DecodeConfig(n=2, rows=6)
    assert config == DecodeConfig(n=2, max_num_seqs=6)
    with pytest.warns(DeprecationWarning, match=WARNS):
        assert dataclasses.replace(config, rows=7) == DecodeConfig(n=2, max_num_seqs=7)
    with pytest.warns(DeprecationWarning, match=WARNS):
        assert config.rows == 6
    with pytest.warns(DeprecationWarning, match=WARNS):
        assert resolve(config, {"rows": 9}).max_num_seqs == 9


def test_yaml_and_overrides_take_the_old_name_and_warn(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: x\ndecode: {n: 2, rows: 5}\n")
    with pytest.warns(
        DeprecationWarning, match=r"decode\.rows was renamed to decode\.max_num_seqs"
    ):
        config = load_config(tmp_path / "c.yaml")
    assert (config.run_dir, config.decode) == ("x", DecodeConfig(n=2, max_num_seqs=5))
    with pytest.warns(DeprecationWarning, match=WARNS):
        assert load_config(tmp_path / "c.yaml", ["decode.rows=7"]).decode.max_num_seqs == 7


def test_a_setting_under_both_names_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("decode: {max_num_seqs: 2, rows: 5}\n")
    message = r"rows and .*max_num_seqs.*: they are two names of one setting\. Fix: leave out rows"
    with pytest.warns(DeprecationWarning, match=WARNS), pytest.raises(UsageError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.warns(DeprecationWarning, match=WARNS), pytest.raises(UsageError, match=message):
        resolve(None, {"rows": 5, "max_num_seqs": 5})


@pytest.mark.parametrize(
    ("cls", "old", "new", "value"),
    [
        (DecodeConfig, "no_harm", "add_back", False),
        (DecodeConfig, "skill", "selection_exponent", 0.5),
        (DecodeConfig, "abstain", "allow_no_answer", True),
        (ReplayConfig, "skills", "selection_exponents", (0.5,)),
        (functools.partial(Request, "x"), "abstain", "allow_no_answer", True),
    ],
)
def test_words_of_the_search_have_their_old_names_too(cls, old, new, value):
    with pytest.warns(DeprecationWarning, match=f"{old} was renamed to {new}"):
        config = cls(**{old: value})
    assert config == cls(**{new: value}) != cls()


def test_results_of_the_last_release_can_be_read():
    decision = Decision(8, (0,), (1,), 3, 0.5, (0.5,), (2.0,), (4,), (False,))
    usage = Usage(prompt_tokens=1, tokens=4, serial_steps=8, seconds=1.0)
    result = Result("x", "y", 0, "stop", 0.5, 0.0, "y", "y", (), (decision,), usage)
    stored = result.to_dict()
    stored["trace"][0]["future_bin"] = stored["trace"][0].pop("planned_pause_bin")
    assert Result.from_dict(json.loads(json.dumps(stored))) == result


def test_new_names_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert new_names(PipelineConfig, {"decode": {"n": 2}, "rollout": {"rows": 3}}) == {
            "decode": {"n": 2},
            "rollout": {"rows": 3},
        }
        dataclasses.replace(DecodeConfig(max_num_seqs=3), n=2)
        for name in ("chain_sum", "chain_sum_demo", "qwen3_1.7b", "smollm2_135m"):
            load_config(f"configs/{name}.yaml")


@pytest.mark.parametrize("text", [".nan: 1", "critic: {.nan: 1}", "decode: {.nan: 1, n: 2}"])
def test_a_key_that_is_no_number_is_an_unknown_key_and_was_not_renamed(tmp_path, text):
    """YAML's NaN is a key that equals nothing, itself included."""
    (tmp_path / "c.yaml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match=r"nan.*: no stage reads this key"):
            load_config(tmp_path / "c.yaml")


# ---- a search setting never fails on the number of sequences


@pytest.mark.parametrize(
    ("n", "max_num_seqs", "shards", "each"),
    [
        (8, 64, 1, 64),
        (8, 64, 4, 16),
        (8, 3, 1, 8),
        (8, 20, 4, 8),
        (1, 7, 2, 4),
        (100, 64, 1, 100),
        (3, 33, 4, 9),
    ],
)
def test_each_shard_holds_an_equal_part_and_at_least_one_prompt(n, max_num_seqs, shards, each):
    config = DecodeConfig(n=n, max_num_seqs=max_num_seqs)
    assert config.seqs_per_shard(shards) == each
    assert each >= n
    assert shards * each >= max_num_seqs


@pytest.mark.parametrize("candidates", ["published", "exhaustive", "branching"])
def test_no_number_of_sequences_is_too_small_for_a_search(candidates):
    config = PipelineConfig(
        decode=DecodeConfig(n=4, max_num_seqs=1, candidates=candidates),
        evaluate=EvaluateConfig(samples=10),
    )
    assert (config.fixed_decode.n, config.fixed_decode.seqs_per_shard(1)) == (10, 10)
