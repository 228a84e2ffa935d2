"""Parity with Hugging Face: tiny torch models of every family against ours, read from the files
that torch saves, and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.forwards import continued, empty, full, gather, padded, prefill, step
from harness.hf_models import (
    MODELS,
    ROWS,
    TOKENS,
    VOCAB,
    WIDTH,
    error,
    load,
    torch_logits,
    torch_model,
)
from zip_rc_jax.config import ModelConfig, RopeScaling
from zip_rc_jax.models.io import huggingface
from zip_rc_jax.models.io.families import FAMILIES, Family, read_config, write_config
from zip_rc_jax.models.io.huggingface import SafetensorsSource, write_checkpoint
from zip_rc_jax.models.io.weights import load_params, read_params
from zip_rc_jax.models.transformer import init_params, param_axes
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Pair:
    """A torch model and ours, read from `directory`, where torch saved it."""

    name: str
    directory: pathlib.Path
    torch: torch.nn.Module
    family: Family
    config: ModelConfig
    params: dict[str, Any]


def saved_and_read(name, directory) -> Pair:
    model = torch_model(name)
    model.save_pretrained(directory)
    return Pair(name, directory, model, *load(directory))


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> Pair:
    return saved_and_read(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Pair:
    """One small pair, for what does not depend on the family."""
    return saved_and_read("llama_untied", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def expected(pair) -> np.ndarray:
    return torch_logits(pair.torch, TOKENS)


# ---- what is compared

# Settings that no forward depends on, or that must be the default; all others differ from it in
# some model of the family.
BOOKKEEPING = {
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label",
    "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "transformers_version",
}  # fmt: skip
IRRELEVANT = {
    "initializer_range": "the parameters are loaded",
    "attention_dropout": "of training",
    "use_cache": "how, not what",
    "pretraining_tp": "nothing reads it any more",
    "bos_token_id": "the tokenizer's",
    "eos_token_id": "the tokenizer's",
    "pad_token_id": "the tokenizer's",
    "max_window_layers": "layer_types says it",
    "full_attn_idxs": "layer_types says it",
    "_sliding_window_pattern": "layer_types says it",
    "use_bidirectional_attention": "refused unless it is the default",
    "rope_parameters.sliding_attention.rope_type": "refused unless it is the default",
}


def flat(settings, prefix=""):
    """Nested settings with dotted names."""
    found = {}
    for name, value in settings.items():
        found |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES])
def test_the_models_differ_from_the_defaults_in_every_setting_that_matters(family):
    configs = [
        torch_model(name).config for name, (model_type, _) in MODELS.items() if model_type == family
    ]
    default = flat(type(configs[0])().to_dict())
    same = {
        name
        for name, value in default.items()
        if all(flat(config.to_dict()).get(name, value) == value for config in configs)
    }
    assert {name for name in same if name.split(".")[0] not in BOOKKEEPING} <= IRRELEVANT.keys()


def test_the_sequences_are_longer_than_the_window_and_differ(pair):
    assert pair.config.sliding_window < WIDTH - 2
    assert len(np.unique(TOKENS[:, 0])) == ROWS


# ---- forward


def test_full_forward(pair, expected):
    assert error(full(pair.config, pair.params, TOKENS), expected) < TOLERANCE


def test_every_parameter_matters_to_the_comparison(pair, expected):
    """What could be zeroed without a trace would not have been compared."""
    for path, _ in jax.tree_util.tree_leaves_with_path(pair.params):
        changed = jax.tree_util.tree_map_with_path(
            lambda p, x, path=path: x * 0 if p == path else x, pair.params
        )
        assert error(full(pair.config, changed, TOKENS), expected) > 10 * TOLERANCE, (
            jax.tree_util.keystr(path)
        )


def test_cached_decoding_from_every_split_point(pair, expected):
    for split in range(1, WIDTH):
        lengths = np.full(ROWS, split)
        out, cache = prefill(pair.config, pair.params, padded(TOKENS, lengths), lengths)
        assert error(out[:, :split], expected[:, :split]) < TOLERANCE
        for t in range(split, WIDTH):
            out, cache = step(pair.config, pair.params, cache, TOKENS[:, t], np.full(ROWS, t))
            assert error(out, expected[:, t]) < TOLERANCE


def test_cached_decoding_of_gathered_and_branched_rows_of_different_lengths(pair):
    lengths, index, at, steps = (
        np.array([9, 6, 11, 3]),
        np.array([2, 0, 0, 1]),
        np.array([1, 3, 0, 2]),
        6,
    )
    _, cache = prefill(pair.config, pair.params, padded(TOKENS, lengths), lengths)
    pool = gather(empty(pair.config, ROWS), cache, index, at)
    source, position = np.zeros_like(TOKENS), np.zeros(ROWS, int)
    source[at], position[at] = TOKENS[index], lengths[index]
    continuation = np.random.default_rng(1).integers(0, VOCAB, (ROWS, steps)).astype(np.int32)
    whole = torch_logits(pair.torch, continued(source, position, continuation))
    for t in range(steps):
        out, pool = step(pair.config, pair.params, pool, continuation[:, t], position + t)
        assert error(out, whole[np.arange(ROWS), position + t]) < TOLERANCE


def test_cached_decoding_equals_that_of_torch(pair):
    split, tokens = 8, torch.from_numpy(TOKENS.astype(np.int64))
    _, cache = prefill(
        pair.config, pair.params, padded(TOKENS, np.full(ROWS, split)), np.full(ROWS, split)
    )
    with torch.no_grad():
        theirs = pair.torch(tokens[:, :split], use_cache=True)
        for t in range(split, WIDTH):
            theirs = pair.torch(
                tokens[:, t : t + 1], past_key_values=theirs.past_key_values, use_cache=True
            )
            ours, cache = step(pair.config, pair.params, cache, TOKENS[:, t], np.full(ROWS, t))
            assert error(ours, theirs.logits[:, 0].numpy()) < TOLERANCE


# ---- writing

TOKENIZER = types.SimpleNamespace(eos_ids=(1,), save_pretrained=lambda directory: None)


def export(pair, directory):
    """Ours, written as a Hugging Face checkpoint."""
    family, settings = write_config(pair.config)
    write_checkpoint(
        directory,
        settings,
        read_params(pair.config, family, pair.params, jnp.float32),
        TOKENIZER,
        "float32",
    )


def read_by_torch(directory):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def test_torch_reads_what_we_write_and_gives_the_same_logits(pair, expected, tmp_path):
    export(pair, tmp_path / "model")
    np.testing.assert_array_equal(torch_logits(read_by_torch(tmp_path / "model"), TOKENS), expected)
    family, config, params = load(tmp_path / "model")
    assert (family, config) == (pair.family, pair.config)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


def test_config_json_says_the_same_to_transformers_4(pair, tmp_path):
    """It knows no `rope_parameters` and, before 4.56, no `dtype`: without the older names it would
    rotate by the family's usual base."""
    export(pair, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    rope = pair.torch.config.rope_parameters
    rotation = rope.get("full_attention", rope)
    assert settings["rope_theta"] == rotation["rope_theta"]
    scaling = {name: value for name, value in rotation.items() if name != "rope_theta"}
    assert settings["rope_scaling"] == (None if scaling == {"rope_type": "default"} else scaling)
    assert settings.get("rope_local_base_freq") == (
        rope["sliding_attention"]["rope_theta"] if "sliding_attention" in rope else None
    )
    assert settings["torch_dtype"] == "float32"
    # transformers 5 reads the older names, the newer ones and both beside each other as the same
    # model.
    older, newer = (
        {"rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype"},
        {"rope_parameters", "dtype"},
    )
    for left_out in (set(), older, newer):
        kept = {name: value for name, value in settings.items() if name not in left_out}
        assert read_config(kept, "x") == (pair.family, pair.config)
        (tmp_path / "config.json").write_text(json.dumps(kept))
        found = AutoConfig.from_pretrained(tmp_path)
        assert (found.rope_parameters, found.dtype) == (rope, torch.float32)
        assert not older & found.to_dict().keys()


def test_bfloat16_survives_reading_and_writing_bit_by_bit(pair, tmp_path):
    torch_model(pair.name).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    family, config, params = load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    written = dict(read_params(config, family, params, jnp.bfloat16))
    assert written.keys() == stored.keys()
    for name, array in written.items():
        assert (array.dtype, array.shape) == (stored[name].dtype, stored[name].shape)
        np.testing.assert_array_equal(array.view(np.uint16), stored[name].view(np.uint16), name)


@pytest.mark.parametrize("pair", ["lfm2_tied"], indirect=True)
def test_bfloat16_parameters_stay_near_torch_in_float32(pair, expected):
    _, config, params = load(pair.directory, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert np.abs(full(config, params, TOKENS) - expected).mean() < 0.1 * np.abs(expected).mean()


def test_parameters_are_read_straight_into_their_shards(plain):
    layout = Layout(make_mesh(fsdp=2, tensor=2), TRAIN_RULES)
    params = load_params(
        plain.config, plain.family, SafetensorsSource(plain.directory), jnp.float32, layout
    )
    jax.tree.map(np.testing.assert_array_equal, params, plain.params)
    axes = param_axes(plain.config)
    jax.tree.map(
        lambda x, names: np.testing.assert_equal(
            x.sharding.is_equivalent_to(layout.sharding(names), x.ndim), True
        ),
        params,
        axes,
    )
    assert params["blocks"]["0_attention"]["gate"].addressable_shards[0].data.shape == (2, 24, 20)


def test_a_config_that_no_family_has_is_not_written(pair):
    for impossible in (
        {"scale_embedding": not pair.config.scale_embedding},
        {"norm_plus_one": not pair.config.norm_plus_one},
    ):
        with pytest.raises(UsageError, match=NO_FAMILY):
            write_config(dataclasses.replace(pair.config, **impossible))


NO_FAMILY = "no Hugging Face architecture has this combination"
OWN = ModelConfig(
    vocab_size=VOCAB, d_model=48, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=40,
    rope_theta=77.0, max_positions=200
)  # fmt: skip
KINDS = ("sliding", "sliding", "attention", "sliding")
GEMMA = dataclasses.replace(
    OWN, layer_types=KINDS, sliding_window=5, norm_plus_one=True, post_norms=True,
    scale_embedding=True, activation="gelu_tanh"
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "changes", "model_type"),
    [
        (OWN, {"layer_types": ("attention",) * 4}, "qwen3"),
        (OWN, {"layer_types": ("attention",) * 4, "qk_norm": False}, "llama"),
        (OWN, {"attention_scale": 32**-0.5}, "qwen3"),
        (OWN, {"rope_scaling": RopeScaling("linear", factor=2.0, original_positions=4096)},
        "qwen3"),
        (OWN, {"rope_scaling": RopeScaling("none", factor=2.0)}, "qwen3"),
        (OWN, {"sliding_rope_theta": 5.0, "conv_bias": True}, "qwen3"),
        (OWN, {"layer_types": KINDS, "sliding_window": 5, "sliding_rope_theta": 77.0}, "qwen3"),
        (OWN, {"layer_types": KINDS, "sliding_window": 5, "rope_scaling": RopeScaling("linear",
        factor=2.0)}, "qwen3"),
        (GEMMA, {}, "gemma3_text"),
        (GEMMA, {"sliding_rope_theta": 5.0}, "gemma3_text"),
    ],
    ids=[
        "full attention by name", "full attention by name, no "
                                  "norms", "the usual scale by number", "parts of other scalings",
        "a factor without "
        "scaling", "settings of layers that are not "
                   "there", "one base, twice", "scaled sliding layers",
        "Gemma with the usual scale and one base", "Gemma with the usual scale",
    ],
)  # fmt: skip
def test_a_model_is_written_however_its_config_spells_it(config, changes, model_type, tmp_path):
    """Models of our own, as torch computes what was written."""
    config = dataclasses.replace(config, **changes)
    params = init_params(config, 0)
    export(types.SimpleNamespace(config=config, params=params), tmp_path / "model")
    model = read_by_torch(tmp_path / "model")
    assert model.config.model_type == model_type
    assert error(full(config, params, TOKENS), torch_logits(model, TOKENS)) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        # of its layers only the full ones can be scaled
        (GEMMA, {"rope_scaling": RopeScaling("linear", factor=2.0)}),
        (GEMMA, {"attention_scale": 2.0}),  # written as 1 / scale^2, a whole number
        (OWN, {"attention_scale": 0.5}),
        (OWN, {"layer_types": KINDS, "sliding_window": 5, "sliding_rope_theta": 5.0}),
    ],
)
def test_what_would_be_another_model_is_not_written(config, changes):
    with pytest.raises(UsageError, match=NO_FAMILY):
        write_config(dataclasses.replace(config, **changes))


def test_shards_are_written_and_read(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    export(plain, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model")[2], plain.params)
    np.testing.assert_array_equal(
        torch_logits(read_by_torch(tmp_path / "model"), TOKENS), torch_logits(plain.torch, TOKENS)
    )


def test_an_existing_directory_is_not_overwritten(plain, tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path}.*exists"):
        export(plain, tmp_path)


# ---- other spellings of the same model


def rewritten(pair, directory, change=lambda tensors: None, settings=None):
    """A copy of the checkpoint after `change` of its tensors, with other contents of
    config.json."""
    shutil.copytree(pair.directory, directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors) or tensors, directory / "model.safetensors")
    if settings is not None:
        (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("pair", ["gemma3"], indirect=True)
@pytest.mark.parametrize(
    ("prefix", "head", "vision"),
    [
        (
            "model.language_model.",
            "lm_head.weight",
            ("model.vision_tower.x.weight", "model.multi_modal_projector.y"),
        ),
        (
            "language_model.model.",
            "language_model.lm_head.weight",
            ("vision_tower.x.weight", "multi_modal_projector.y"),
        ),
    ],
)
def test_a_multimodal_gemma_is_read_as_its_text_model(pair, prefix, head, vision, tmp_path):
    def rename(tensors):
        named = {
            head if name == "lm_head.weight" else prefix + name.removeprefix("model."): x
            for name, x in tensors.items()
        }
        return named | {name: np.ones(3, np.float32) for name in vision}

    text = json.loads((pair.directory / "config.json").read_text())
    settings = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {},
    }
    family, config, params = load(rewritten(pair, tmp_path, rename, settings))
    assert (family, config) == (pair.family, pair.config)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


@pytest.mark.parametrize("pair", ["llama", "lfm2_tied"], indirect=True)
def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(pair, tmp_path):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def contradict(tensors):
        repeat(tensors)
        tensors["lm_head.weight"][0, 0] += 1

    jax.tree.map(
        np.testing.assert_array_equal,
        load(rewritten(pair, tmp_path / "repeats", repeat))[2],
        pair.params,
    )
    with pytest.raises(
        UsageError, match="lm_head.weight of .*tied to the embedding, but they differ"
    ):
        load(rewritten(pair, tmp_path / "contradicts", contradict))


def test_old_spellings_of_config_json_are_understood():
    """`rope_theta` and `rope_scaling` beside each other, LFM2's block_ff_dim, Gemma's
    sliding_window_pattern: as published files say it."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    scaling["original_max_position_embeddings"] = 8192
    llama = read_config(
        {
            "model_type": "llama",
            "rope_theta": 5e5,
            "rope_scaling": scaling,
            "max_position_embeddings": 131072,
        },
        "x",
    )[1]
    assert (llama.rope_theta, llama.rope_scaling.kind, llama.rope_scaling.factor) == (
        5e5,
        "llama3",
        8.0,
    )
    lfm2 = {
        "model_type": "lfm2",
        "block_ff_dim": 6656,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "hidden_size": 1024,
    }
    lfm2 |= {
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "full_attn_idxs": [2],
        "rope_theta": 1e6,
        "tie_embedding": True,
    }
    config = read_config(lfm2, "x")[1]
    assert (config.d_ff, config.kinds, config.tied) == (
        4608,
        ("conv", "conv", "attention", "conv"),
        True,
    )
    gemma = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window_pattern": 3,
        "sliding_window": 512,
    }
    gemma |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = read_config(gemma, "x")[1]
    assert [i for i, kind in enumerate(config.kinds) if kind == "attention"] == [2, 5]
    assert (
        config.rope_theta,
        config.rope_scaling.kind,
        config.rope_scaling.factor,
        config.sliding_rope_theta,
    ) == (1e6, "linear", 8.0, 1e4)


# ---- errors


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != NORM}, f"1 missing \\({NORM}\\)"),
        (
            lambda t: t | {"model.layers.1.surplus.weight": np.ones(3)},
            "1 not in this architecture \\(model.layers.1.surplus.weight\\)",
        ),
        (
            lambda t: t | {NORM: t[NORM][1:]},
            f"1 of another shape \\({NORM} \\(47,\\) instead of \\(48,\\)\\)",
        ),
        (lambda t: t | {NORM: t[NORM] * np.nan}, f"tensors {NORM} of .*NaN"),
        (
            lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"] / 0},
            "tensors model.embed_tokens.weight of .*infinite",
        ),
    ],
    ids=["missing", "extra", "mis-shaped", "NaN", "infinite"],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_wrong_tensor_is_named(plain, change, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        load(rewritten(plain, tmp_path, change))


def test_a_truncated_missing_or_unindexed_shard_is_named(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    directory = tmp_path / "model"
    export(plain, directory)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 20, 3, 0):
        shard.write_bytes(content[:kept])
        with pytest.raises(UsageError, match=f"shard {shard}: it is truncated or damaged"):
            SafetensorsSource(directory)
    shard.unlink()
    with pytest.raises(UsageError, match=f"checkpoint {directory}: {shard.name} is not there"):
        SafetensorsSource(directory)
    for damaged in ("{", "[]", '{"weight_map": 3}', "{}"):
        (directory / huggingface.INDEX).write_text(damaged)
        with pytest.raises(UsageError, match=f"{huggingface.INDEX}: it is damaged"):
            SafetensorsSource(directory)


def test_a_directory_without_safetensors_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"checkpoint {tmp_path}: model.safetensors is not there"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="convert pytorch_model.bin to safetensors"):
        SafetensorsSource(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "mamba"},
        "where: model_type 'mamba'.*llama, qwen2, qwen3, lfm2, gemma3_text"),
        ({}, "where: model_type None"),
        ({"model_type": "llama", "quantization_config": BITS}, "where: quantization_config"),
        ({"model_type": "gemma3", "text_config": {}, "quantization_config": BITS},
        "where: quantization_config"),
        ({"model_type": "gemma3", "text_config": {"quantization_config": BITS}},
        "where: quantization_config"),
        ({"model_type": "qwen2", "rope_scaling": YARN}, "rope_type 'yarn'"),
        ({"model_type": "qwen3", "rope_scaling": YARN}, "rope_type 'yarn'"),
        ({"model_type": "gemma3_text", "rope_scaling": YARN}, "rope_type 'yarn'"),
        ({"model_type": "llama", "hidden_act": "mish"}, "activation 'mish'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention=True"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
            "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": LINEAR}},
            "rope_type of sliding_attention='linear'",
        ),
        ({"model_type": "llama", "hidden_size": "wide"}, "where: it is no valid llama "
                                                         "config.*hidden_size"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "n_kv_heads=5"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_implemented_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        read_config(settings, "where")


FOREIGN = {
    "partial_rotary_factor": 0.5, "num_experts": 8, "num_local_experts": 4, "logit_scale": 0.5,
    "logits_scaling": 8.0, "clip_qkv": 4.0,
    "residual_multiplier": 0.2, "embedding_multiplier": 12.0, "attention_multiplier": 0.1,
    "alibi": True, "parallel_attn": True,
    "attention_chunk_size": 64, "no_rope_layers": [1, 0], "rotary_pct": 0.25,
    "is_encoder_decoder": True,
}  # fmt: skip


@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_family_computes_is_refused_by_name(model_type, name):
    with pytest.raises(UsageError, match=f"{name}={re.escape(repr(FOREIGN[name]))}.*implemented"):
        read_config({"model_type": model_type, name: FOREIGN[name]}, "where")
    for harmless in (
        None,
        *([0] if name not in ("partial_rotary_factor", "rotary_pct") else [1.0]),
    ):
        if harmless != 0 or name != "no_rope_layers":
            assert read_config({"model_type": model_type, name: harmless}, "where") == read_config(
                {"model_type": model_type}, "where"
            )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "lfm2"])
@pytest.mark.parametrize("name", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_soft_caps_of_other_families_are_refused(model_type, name):
    with pytest.raises(UsageError, match=f"{name}=30.0: it is not implemented"):
        read_config({"model_type": model_type, name: 30.0}, "where")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_sliding", "lfm2", "gemma3"])
@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_partial_rotation_is_refused_wherever_it_is_stated(name, factor):
    model_type, settings = MODELS[name]
    rope = torch_model(name).config.rope_parameters
    inside = (
        {kind: part | {"partial_rotary_factor": factor} for kind, part in rope.items()}
        if "full_attention" in rope
        else None
    )
    for stated in (
        {"partial_rotary_factor": factor},
        {"rope_parameters": inside or rope | {"partial_rotary_factor": factor}},
    ):
        with pytest.raises(UsageError, match=f"partial_rotary_factor={factor}"):
            read_config({"model_type": model_type} | settings | stated, "where")


WRONG = [
    "x",
    -1,
    0,
    2**60,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    [1],
    {},
    True,
    {"a": {"b": 1}},
    "y" * 3_000_000,
]


def settings_of(name):
    """Every setting of a tiny model's config.json."""
    return json.loads(json.dumps(torch_model(name).config.to_dict()))


@pytest.mark.parametrize("name", ["llama_untied", "qwen3_sliding", "lfm2", "gemma3"])
def test_no_wrong_value_of_a_config_is_a_traceback_or_fills_the_memory(name):
    """A sentence of at most 600 characters that names the file, or a config of the size that was
    stated."""
    settings = settings_of(name)
    _, right = read_config(settings, "where")
    sizes = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    }
    read, refused = 0, dict[tuple[str, int], str]()
    for key in settings:
        for number, value in enumerate(WRONG):
            try:
                _, found = read_config(settings | {key: value}, "where")
            except UsageError as problem:
                refused[key, number] = str(problem)
            else:
                read += 1
                assert key not in sizes or found != right, (key, str(value)[:20])
                assert len(found.kinds) <= 512
    assert read > 20, "what is not about numbers may hold anything"
    assert {key for key, _ in refused} >= sizes
    assert max(map(len, refused.values())) < 600
    unnamed = {
        key
        for (key, number), text in refused.items()
        if "where" not in text and key not in text and "model." not in text
    }
    assert unnamed <= {"rope_parameters", "layer_types", "hidden_act", "hidden_activation"}, (
        "these name what they hold"
    )


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "head_dim",
        "num_hidden_layers",
    ],
)
def test_a_size_that_no_file_holds_is_refused_before_anything_is_allocated(plain, key, tmp_path):
    for value in (2**31 - 1, 10_000, 2**20):
        settings = json.loads((plain.directory / "config.json").read_text()) | {key: value}
        with pytest.raises(UsageError) as found:
            load(rewritten(plain, tmp_path, settings=settings))
        assert len(str(found.value)) < 900


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int16, "I16"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.complex64, "C64"),
    ],
)
def test_tensors_that_are_no_floating_point_numbers_are_refused_by_type(
    plain, dtype, name, tmp_path
):
    shutil.copytree(plain.directory, tmp_path, dirs_exist_ok=True)
    tensors = load_torch(plain.directory / "model.safetensors")
    key = "model.layers.0.mlp.gate_proj.weight"
    save_torch(tensors | {key: tensors[key].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UsageError,
        match=f"shard {tmp_path}.*tensor {key} is of type {name}; floating-point numbers are "
        "read.*bfloat16",
    ):
        load(tmp_path)


def test_float64_tensors_are_read(plain, tmp_path):
    found = load(
        rewritten(
            plain,
            tmp_path,
            lambda tensors: {name: array.astype(np.float64) for name, array in tensors.items()},
        )
    )[2]
    jax.tree.map(np.testing.assert_array_equal, found, plain.params)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": 3}, "it is damaged"),
        ({"a": ["x"]}, "it is damaged"),
        ({"a": None}, "it is damaged"),
        ([], "it is damaged"),
        ({}, "it is damaged"),
        ({"a": "../other/model.safetensors"}, "it is damaged .*no file of this directory"),
        ({"a": "/etc/passwd"}, "it is damaged .*no file of this directory"),
        ({"a": "x\0y"}, "it is damaged .*no file of this directory"),
        ({"a": "x" * 300}, "it is damaged .*no file of this directory"),
        ({"a": ""}, "it is damaged .*no file of this directory"),
        ({"a": "other.safetensors"}, "both there"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_that_names_no_files_is_refused(plain, weight_map, words, tmp_path):
    shutil.copytree(plain.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UsageError, match=words) as found:
        SafetensorsSource(tmp_path)
    assert len(str(found.value)) < 600


def test_a_tensor_in_two_shards_is_refused(plain, tmp_path):
    directory = rewritten(plain, tmp_path)
    shutil.copy(directory / "model.safetensors", directory / "second.safetensors")
    index = {"a": "model.safetensors", "b": "second.safetensors"}
    (directory / huggingface.INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(
        UsageError,
        match=r"second.safetensors: tensor \S+ is there twice, also in model.safetensors",
    ):
        SafetensorsSource(directory)


def test_adapters_are_told_from_models(plain, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )
    save_file(
        {"base_model.model.x.lora_A.weight": np.ones((2, 2), np.float32)},
        tmp_path / "adapter_model.safetensors",
    )
    words = "it is an adapter .LoRA. for org/base, not a whole model. Fix: merge it into that model"
    with pytest.raises(UsageError, match=words):
        huggingface.refuse_adapter(tmp_path)
    shutil.copy(plain.directory / "config.json", tmp_path)
    with pytest.raises(UsageError, match=words):
        SafetensorsSource(tmp_path)
    rewritten(plain, tmp_path)  # a whole model beside it is read
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[2], plain.params)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantised_directories_are_refused_before_their_tensors_are_read(plain, name, tmp_path):
    directory = rewritten(plain, tmp_path)
    (directory / name).write_text(json.dumps({"bits": 4}))
    with pytest.raises(
        UsageError, match=f"{name}: quantised Hugging Face checkpoints are not read"
    ):
        SafetensorsSource(directory)


def test_flipped_bytes_in_the_header_of_a_shard_are_no_traceback(plain, tmp_path):
    directory = rewritten(plain, tmp_path)
    whole = (directory / "model.safetensors").read_bytes()
    rng, refused = np.random.default_rng(0), list[str]()
    for _ in range(150):
        changed = bytearray(whole)
        changed[rng.integers(0, 600)] = rng.integers(0, 256)
        (directory / "model.safetensors").write_bytes(changed)
        try:
            load(directory)
        except UsageError as problem:
            refused.append(str(problem))
    assert len(refused) > 100
    assert max(map(len, refused)) < 1000
    assert all(str(directory) in text for text in refused)
