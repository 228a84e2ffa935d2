"""The head carries the interval, window and max_tokens it was made for, and decoding without
options uses them.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from harness.tiny import TINY_GRID, TINY_MODEL, tiny_lm
from zip_rc_jax import DecodeConfig, UsageError, decode, load
from zip_rc_jax.cli.main import main
from zip_rc_jax.config.files import load_config
from zip_rc_jax.head import HeadDefaults, ZipHead
from zip_rc_jax.inference.api import resolve
from zip_rc_jax.models.io.load import export
from zip_rc_jax.pipeline.train import head_defaults

MADE_FOR = HeadDefaults(interval=3, window=2, max_tokens=9)
QUESTION = "State the final answer to the following arithmetic problem: 4 + 3 - 2 ="


@pytest.fixture(scope="module")
def qwen():
    """A model that a family of Hugging Face's can express."""
    return tiny_lm(dataclasses.replace(TINY_MODEL, qk_norm=True, n_layers=1))


def with_defaults(lm, defaults=MADE_FOR):
    return dataclasses.replace(lm, head=dataclasses.replace(lm.head, defaults=defaults))


def test_what_the_caller_leaves_open_is_the_heads_and_then_the_configs():
    head = ZipHead(TINY_GRID, "value", 20, 18, MADE_FOR)
    assert resolve(None, {}, head) == DecodeConfig(interval=3, window=2, max_tokens=9)
    asked = resolve(None, {"n": 2, "window": 7, "max_new_tokens": 5}, head)
    assert asked == DecodeConfig(n=2, interval=3, window=7, max_tokens=5), "explicit options win"
    whole = DecodeConfig(n=2)
    assert resolve(whole, {"beta": 0.5}, head) == dataclasses.replace(whole, beta=0.5)
    assert resolve(None, {}, dataclasses.replace(head, defaults=None)) == DecodeConfig()
    assert resolve(None, {}, None) == DecodeConfig()


@pytest.mark.parametrize("kind", ["orbax", "hugging_face"])
def test_every_checkpoint_carries_them(qwen, tmp_path, kind):
    path = tmp_path / "m"
    with_defaults(qwen).save(path) if kind == "orbax" else export(with_defaults(qwen), path)
    assert load(path).head.defaults == MADE_FOR


@pytest.mark.parametrize("kind", ["orbax", "hugging_face"])
def test_a_checkpoint_without_them_loads_and_has_none(qwen, tmp_path, kind):
    path = tmp_path / "m"
    qwen.save(path) if kind == "orbax" else export(qwen, path)
    text = (path / ("meta/metadata" if kind == "orbax" else "config.json")).read_text()
    head = json.loads(text)["head" if kind == "orbax" else "zip_rc"]
    assert set(head) == {"grid", "label", "first_id", "used_ids"}, "as old versions wrote it"
    assert load(path).head.defaults is None


def test_they_are_no_part_of_what_a_model_is(lm):
    """Digests name models in the records of runs, which must go on as they were begun."""
    assert with_defaults(lm).head == lm.head
    assert with_defaults(lm).digest() == lm.digest()


@pytest.mark.parametrize(
    "bad", [{"interval": 0}, {"window": 2.5}, {"max_tokens": True}, {"interval": 2**31}]
)
def test_impossible_ones_are_refused(bad):
    with pytest.raises(
        UsageError, match=rf"{next(iter(bad))}=.* of a head's defaults: it counts tokens"
    ):
        dataclasses.replace(MADE_FOR, **bad)


@pytest.mark.parametrize("bad", [5, {"interval": 3}, {"interval": 0, "window": 1, "max_tokens": 2}])
def test_a_checkpoint_with_damaged_ones_is_refused(lm, tmp_path, bad):
    lm.save(tmp_path / "m")
    path = tmp_path / "m" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["head"]["defaults"] = bad
    del meta["digests"]
    path.write_text(json.dumps(meta))
    with pytest.raises(
        UsageError, match="another version of this package wrote it, or it was damaged"
    ):
        load(tmp_path / "m")


def test_a_training_stage_takes_them_from_the_decode_section_of_its_config():
    config = load_config("configs/chain_sum.yaml", ["decode.window=5"])
    assert head_defaults(config) == HeadDefaults(interval=8, window=5, max_tokens=128)


def test_decode_without_options_uses_them():
    """9 tokens at most, decided every 3."""
    lm = with_defaults(tiny_lm())
    named = decode(lm, ["1 + 2 ="], n=2, **MADE_FOR.to_dict())
    assert [r.trace for r in decode(lm, ["1 + 2 ="], n=2)] == [r.trace for r in named]
    assert max(len(p.token_ids) for p in named[0].prefixes) == 9
    assert {d.step for d in named[0].trace} >= {0, 3}


def test_the_shipped_model_carries_what_its_config_decodes_with():
    shipped = load("embedded:chain_sum_zip").head.defaults
    assert shipped == head_defaults(load_config("configs/chain_sum.yaml"))


def test_the_shipped_model_adapts_without_any_option(capsys):
    """`zip-rc decode embedded:chain_sum_zip --prompt ...` answers, and pauses samples."""
    (result,) = decode(load("embedded:chain_sum_zip"), [QUESTION])
    assert result.finish_reason == "stop"
    paused = [p for p in result.prefixes if p.state == "paused"]
    assert any(p.token_ids for p in paused), "something was begun and then paused"
    assert sum(len(p.token_ids) for p in result.prefixes) == result.usage.tokens
    assert main(["decode", "embedded:chain_sum_zip", "--prompt", QUESTION]) == 0
    assert result.text in capsys.readouterr().out
