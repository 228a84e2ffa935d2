"""GGUF files, written as llama.cpp's converter writes them, against the torch models that they were
made from."""

from __future__ import annotations

import re
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from harness.forwards import full
from harness.gguf_files import ARCHITECTURES, NAMES, read, stored_array, write
from harness.hf_models import TOKENS, VOCAB, error, torch_logits, torch_model
from zip_rc_jax.models.io.families import read_config
from zip_rc_jax.models.io.gguf import GgufSource, open_gguf
from zip_rc_jax.runtime.errors import UsageError

TOLERANCE = 1e-4

# ---- llama.cpp's conventions


# ---- the same model

PLAIN = {"rope_type": "default", "rope_theta": 321.0}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 321.0}
LONG = {"max_position_embeddings": 10_000}
# GGUF has no key for activations, and none for the scale and the soft cap of Gemma's scores: models
# differ from those of test_families.
MODELS = {
    "llama, tied, biases": ("llama", {"hidden_act": "silu", "rope_parameters": PLAIN}),
    "llama, untied": ("llama_untied", {}),
    "llama, linear": ("llama_untied", {"rope_parameters": LINEAR}),
    "llama 3.1": ("llama", {"hidden_act": "silu", "rope_parameters": LLAMA31} | LONG),
    "llama 3.2": (
        "llama",
        {
            "hidden_act": "silu",
            "rope_parameters": LLAMA31 | {"factor": 32.0},
            "tie_word_embeddings": False,
        }
        | LONG,
    ),
    "qwen2, tied": ("qwen2", {"hidden_act": "silu"}),
    "qwen2, untied": ("qwen2_sliding", {"use_sliding_window": False, "layer_types": None}),
    "qwen3, tied, biases": ("qwen3", {"hidden_act": "silu"}),
    "qwen3, untied": ("qwen3_sliding", {"use_sliding_window": False, "layer_types": None}),
    "lfm2, untied, biases": ("lfm2", {"rope_parameters": PLAIN}),
    "lfm2, tied": ("lfm2_tied", {}),
    "gemma3": ("gemma3_tied", {"final_logit_softcapping": 3.0}),
    "gemma3, linear": (
        "gemma3_tied",
        {
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": PLAIN | {"rope_theta": 50.0},
            }
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_config_and_the_logits_of_its_model(name, tmp_path):
    base, changes = MODELS[name]
    model = torch_model(base, **changes)
    write(tmp_path / "model.gguf", model)
    config, params = read(tmp_path / "model.gguf")
    assert config == read_config(model.config.to_dict(), "")[1]
    assert error(full(config, params, TOKENS), torch_logits(model, TOKENS)) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["llama, tied, biases", "qwen2, untied", "qwen3, untied", "lfm2, tied", "gemma3"]
)
def test_the_files_above_mean_the_same_to_transformers(name, tmp_path):
    """Its tensors, as its own reader of GGUF gives them (a whole model would need the package
    `accelerate`)."""
    base, changes = MODELS[name]
    model = torch_model(base, **changes)
    write(tmp_path / "model.gguf", model)
    found = load_gguf_checkpoint(
        str(tmp_path / "model.gguf"), return_tensors=True, model_to_load=model
    )["tensors"]
    state = {name: tensor for name, tensor in model.state_dict().items() if name in found}
    assert model.state_dict().keys() - found.keys() <= {"lm_head.weight"}
    for key, tensor in state.items():  # 1 was added to Gemma's norms and taken away again
        np.testing.assert_allclose(
            found[key].reshape(tensor.shape),
            tensor,
            atol=3e-7 if base == "gemma3_tied" else 0,
            err_msg=key,
        )


def test_quantised_and_half_precision_matrices_are_what_gguf_dequantises(tmp_path):
    kinds = {
        "token_embd": Quantization.Q8_0, "output": Quantization.F16, "attn_q": Quantization.Q4_1,
        "attn_k": Quantization.Q8_0,
        "attn_v": Quantization.BF16, "attn_output": Quantization.F16, "ffn_gate": Quantization.Q4_1,
        "ffn_up": Quantization.Q8_0,
        "ffn_down": Quantization.Q4_1,
    }  # fmt: skip
    model = torch_model(
        "llama_untied",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    before = torch_logits(model, TOKENS)
    kept = write(tmp_path / "model.gguf", model, kind=lambda stored: kinds[stored.split(".")[-2]])
    state = model.state_dict()
    for name, array in kept.items():
        # row i of the file is row order[i] of the model
        order = stored_array(name, np.arange(len(array)), model.config, "llama")
        state[name][order] = torch.from_numpy(array)
    assert error(before, torch_logits(model, TOKENS)) > 10 * TOLERANCE, (
        "quantising changed the model"
    )
    config, params = read(tmp_path / "model.gguf")
    assert error(full(config, params, TOKENS), torch_logits(model, TOKENS)) < TOLERANCE


def test_older_lfm2_files_call_the_last_norm_output_norm(tmp_path, monkeypatch):
    model = torch_model("lfm2_tied")
    write(tmp_path / "new.gguf", model)
    monkeypatch.setitem(NAMES, r"model\.embedding_norm\.", "output_norm.")
    write(tmp_path / "old.gguf", model)
    jax.tree.map(
        np.testing.assert_array_equal,
        read(tmp_path / "new.gguf")[1],
        read(tmp_path / "old.gguf")[1],
    )


def without(monkeypatch, *methods):
    """The writer leaves out what these methods of it add."""
    for method in methods:
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda writer, value: None)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("llama_untied", {}),
        ("qwen3", {"hidden_act": "silu"}),
        ("lfm2_tied", {"full_attn_idxs": [0, 1, 2, 3]}),
        ("gemma3_tied", {}),
    ],
)
def test_without_keys_there_are_as_many_key_heads_as_heads_and_the_base_is_10000(
    base, changes, tmp_path, monkeypatch
):
    """The defaults of llama.cpp, also in families whose models on Hugging Face have others."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    rope = (
        {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 50.0}}
        if base == "gemma3_tied"
        else rope
    )
    model = torch_model(base, **changes, num_key_value_heads=6, rope_parameters=rope)
    without(monkeypatch, "add_head_count_kv", "add_rope_freq_base")
    write(tmp_path / "model.gguf", model)
    config, params = read(tmp_path / "model.gguf")
    assert config == read_config(model.config.to_dict(), "")[1]
    assert error(full(config, params, TOKENS), torch_logits(model, TOKENS)) < TOLERANCE


OLD_FACTOR = "llama.rope.scale_linear"


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        (lambda writer: writer.add_rope_scaling_factor(3.0), 3.0),
        (lambda writer: writer.add_float32(OLD_FACTOR, 3.0), 3.0),
        (lambda writer: (writer.add_rope_scaling_factor(3.0), writer.add_float32(OLD_FACTOR, 5.0)),
        3.0),
        (lambda writer: writer.add_rope_scaling_factor(0.0), None),
        (lambda writer: writer.add_rope_scaling_factor(1.0), None),
        (lambda writer: None, None),
        (lambda writer: (writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        writer.add_float32(OLD_FACTOR, 3.0)), 3.0),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), None),
        (lambda writer: (writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        writer.add_rope_scaling_factor(3.0)), None),
    ],
    ids=[
        "factor", "old factor", "both factors", "factor 0", "factor 1", "nothing",
        "linear, old factor", "linear, no factor", "none, factor",
    ],
)  # fmt: skip
def test_a_factor_without_a_type_of_scaling_is_linear(extra, factor, tmp_path):
    rope = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    model = torch_model("llama_untied", rope_parameters=rope | {"rope_theta": 321.0})
    # the same parameters
    plain = torch_model(
        "llama_untied", rope_parameters={"rope_type": "default", "rope_theta": 321.0}
    )
    write(tmp_path / "model.gguf", plain, extra=extra)
    config, params = read(tmp_path / "model.gguf")
    assert config == read_config(model.config.to_dict(), "")[1]
    assert error(full(config, params, TOKENS), torch_logits(model, TOKENS)) < TOLERANCE


@pytest.mark.parametrize(
    ("pattern", "full"), [(None, [5]), (3, [2, 5]), ([False] + [True] * 7, [0])]
)
def test_every_sixth_layer_of_gemma_attends_fully_unless_the_file_says_otherwise(
    pattern, full, tmp_path
):
    write(
        tmp_path / "model.gguf",
        torch_model("gemma3_tied"),
        extra=lambda writer: pattern and writer.add_sliding_window_pattern(pattern),
    )
    source = GgufSource(tmp_path / "model.gguf")
    kinds = read_config(source.settings, source.where)[1].kinds
    assert [i for i, kind in enumerate(kinds) if kind == "attention"] == full


def test_the_largest_gemma_scales_scores_by_width_per_head(tmp_path):
    """llama.cpp knows the 27B by its 62 layers; 48 channels over 6 heads are 8, though a head has
    12."""
    model = torch_model("gemma3_tied", num_hidden_layers=62, query_pre_attn_scalar=8)
    write(tmp_path / "model.gguf", model)
    source = GgufSource(tmp_path / "model.gguf")
    assert read_config(source.settings, source.where)[1].attention_scale == 8**-0.5


# ---- errors


def refused(path, words):
    with pytest.raises(UsageError, match=words):
        read(path)


def test_a_truncated_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, torch_model("llama_untied"))
    content = path.read_bytes()
    for kept in (len(content) - 64, len(content) // 2, 1000, 100, 10, 0):
        path.write_bytes(content[:kept])
        refused(path, f"GGUF file {path}: it is truncated or damaged")
    path.write_bytes(b"PK" + content)
    refused(path, f"GGUF file {path}: it is truncated or damaged")
    refused(tmp_path / "absent.gguf", f"GGUF file {tmp_path / 'absent.gguf'}")


def test_an_unknown_architecture_or_missing_metadata_is_named(tmp_path):
    for architecture, words in [
        ("phi3", "GGUF architecture 'phi3' of .*llama, qwen2, qwen3, lfm2, gemma3"),
        ("llama", "its metadata has no 'llama.attention.head_count'"),
    ]:
        writer = gguf.GGUFWriter(tmp_path / architecture, architecture)
        writer.add_tensor("token_embd.weight", np.ones((VOCAB, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / architecture, words)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            lambda writer: writer.add_uint16("split.count", 2),
            "one of several parts.*llama-gguf-split --merge",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.full(4, 1.5, np.float32)),
            "rope_freqs of .*not those of Llama 3.1 or 3.2",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(5, np.float32)),
            "rope_freqs of .*not those of Llama 3.1 or 3.2",
        ),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "rope scaling 'yarn'",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.surplus.weight", np.ones(3, np.float32)),
            "1 not in this .*blk.0.surplus.weight",
        ),
        (
            lambda writer: writer.add_tensor("blk.2.attn_norm.weight", np.ones(48, np.float32)),
            "1 not in this .*blk.2.attn_norm.weight",
        ),
    ],
    ids=[
        "split",
        "foreign rope_freqs",
        "rope_freqs of another width",
        "yarn",
        "unknown tensor",
        "a layer too many",
    ],
)
def test_what_is_not_understood_is_named(extra, words, tmp_path):
    write(tmp_path / "model.gguf", torch_model("llama_untied"), extra=extra)
    refused(tmp_path / "model.gguf", words)


def test_a_missing_tensor_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMES, r"model\.norm\.", "foreign_norm.")
    write(tmp_path / "model.gguf", torch_model("llama_untied"))
    refused(
        tmp_path / "model.gguf",
        "1 missing \\(model.norm.weight\\); 1 not in this architecture \\(foreign_norm.weight\\)",
    )


KEYS_THAT_CHANGE_NUMBERS = {
    "rope.dimension_count": 4, "attention.value_length": 4, "expert_count": 8, "logit_scale": 0.5,
    "attention.scale": 0.5,
    "attention.clamp_kqv": 8.0, "attention.max_alibi_bias": 8.0, "residual_scale": 0.5,
    "embedding_scale": 2.0, "nextn_predict_layers": 1,
    "use_parallel_residual": True, "attention.causal": False, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "rope.scaling.attn_factor": 1.5, "attention.sliding_window": 5, "attention.key_length_swa": 4,
    "rope.dimension_count_swa": 4,
    "interleave_moe_layer_step": 2, "some_new_key": 3,
}  # fmt: skip


def add(writer, key, value):
    {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }[type(value)](key, value)


@pytest.mark.parametrize("key", KEYS_THAT_CHANGE_NUMBERS)
@pytest.mark.parametrize("base", ["llama_untied", "qwen3_sliding"])
def test_metadata_that_is_not_implemented_is_refused_by_name(base, key, tmp_path, monkeypatch):
    without(monkeypatch, "add_rope_dimension_count", "add_value_length")
    model = torch_model(
        base,
        **({"use_sliding_window": False, "layer_types": None} if base == "qwen3_sliding" else {}),
    )
    name = f"{ARCHITECTURES[model.config.model_type]}.{key}"
    write(
        tmp_path / "model.gguf",
        model,
        extra=lambda writer: add(writer, name, KEYS_THAT_CHANGE_NUMBERS[key]),
    )
    refused(tmp_path / "model.gguf", f"{re.escape(name)}.*implemented")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 0),
        ("logit_scale", 1.0),
        ("attention.causal", True),
        ("attention.scale", 8**-0.5),
        ("attention.sliding_window", 200),
        ("attention.clamp_kqv", 0.0),
        ("vocab_size", VOCAB),
        ("tensor_data_layout", "Meta AI original pth"),
        ("rope.scaling.finetuned", False),
        ("some_new_key", 0),
    ],
)
def test_metadata_that_changes_nothing_is_no_obstacle(key, value, tmp_path, monkeypatch):
    model = torch_model("llama_untied")
    without(monkeypatch, "add_vocab_size")
    write(tmp_path / "model.gguf", model, extra=lambda writer: add(writer, f"llama.{key}", value))
    assert (
        error(full(*read(tmp_path / "model.gguf"), TOKENS), torch_logits(model, TOKENS)) < TOLERANCE
    )


WRONG_METADATA = [
    ("attention.head_count", "x"), ("attention.head_count", 0), ("block_count", 2**31),
    ("block_count", "3"), ("embedding_length", 0),
    ("feed_forward_length", True), ("context_length", 1.5), ("attention.layer_norm_rms_epsilon",
    "x"), ("rope.freq_base", -1.0),
    ("rope.freq_base", float("nan")), ("attention.key_length", 0), ("attention.head_count_kv", "x"),
    ("attention.head_count_kv", 0),
    ("attention.key_length", 7),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG_METADATA, ids=str)
def test_metadata_of_wrong_types_and_sizes_is_no_traceback(key, value, tmp_path, monkeypatch):
    methods = {
        "rope.freq_base": "add_rope_freq_base",
        "attention.layer_norm_rms_epsilon": "add_layer_norm_rms_eps",
        "block_count": "add_block_count",
    }
    methods |= {
        "attention.head_count": "add_head_count",
        "attention.head_count_kv": "add_head_count_kv",
        "context_length": "add_context_length",
    }
    methods |= {
        "embedding_length": "add_embedding_length",
        "feed_forward_length": "add_feed_forward_length",
        "attention.key_length": "add_key_length",
    }
    without(monkeypatch, methods[key], "add_rope_dimension_count", "add_value_length")
    write(
        tmp_path / "model.gguf",
        torch_model("llama_untied"),
        extra=lambda writer: add(writer, f"llama.{key}", value),
    )
    with pytest.raises(UsageError) as found:
        read(tmp_path / "model.gguf")
    assert len(str(found.value)) < 700


def header(path, changes):
    """A tiny valid file, with bytes of its header replaced."""
    write(path, torch_model("llama_untied"))
    content = bytearray(path.read_bytes())
    for at, new in changes.items():
        content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("changes", "words", "not_words"),
    [
        (
            {4: b"\1\0\0\0"},
            "GGUF version 1, and versions 2, 3 are read.*current llama.cpp",
            "download",
        ),
        ({4: b"\x63\0\0\0"}, "GGUF version 99", "download"),
        ({4: b"\0\0\0\3"}, "big endian.*gguf-convert-endian", "download"),
        ({0: b"lmgg"}, "does not begin with 'GGUF'", "x" * 9),
        ({8: b"\xff" * 8}, "truncated or damaged", "x" * 9),
        ({16: b"\xff" * 8}, "truncated or damaged", "x" * 9),
        ({24: b"\xff" * 8}, "truncated or damaged", "x" * 9),
    ],
    ids=[
        "version 1",
        "version 99",
        "big endian",
        "older magic",
        "2^64 tensors",
        "2^64 fields",
        "a name of 2^64 bytes",
    ],
)
def test_a_file_of_another_kind_is_told_from_a_damaged_one(changes, words, not_words, tmp_path):
    with pytest.raises(UsageError, match=words) as found:
        read(header(tmp_path / "model.gguf", changes))
    assert not_words not in str(found.value)
    assert len(str(found.value)) < 500


def test_an_array_of_2_to_the_60_numbers_is_refused_at_once(tmp_path):
    """Where the package `gguf` would loop over nothing for ever."""
    name = b"general.tags"
    field = (
        len(name).to_bytes(8, "little")
        + name
        + (9).to_bytes(4, "little")
        + (4).to_bytes(4, "little")
        + (2**60).to_bytes(8, "little")
    )
    (tmp_path / "m.gguf").write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + field
    )
    refused(tmp_path / "m.gguf", "truncated or damaged")


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64"])
def test_whole_numbers_are_no_weights(kind, tmp_path):
    array = np.ones(
        48,
        {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}[kind],
    )
    write(
        tmp_path / "model.gguf",
        torch_model("llama_untied"),
        extra=lambda writer: writer.add_tensor("blk.0.x.weight", array),
    )
    refused(
        tmp_path / "model.gguf",
        f"its tensors are of type {kind} .the first is blk.0.x.weight.*Q8_0 or Q4_K_M",
    )


@pytest.mark.parametrize("kind", [Quantization.Q8_K, Quantization.Q1_0, Quantization.Q8_1])
def test_a_type_that_cannot_be_expanded_is_named(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    write(
        tmp_path / "model.gguf",
        torch_model("llama_untied"),
        extra=lambda writer: writer.add_tensor(
            "blk.0.x.weight", np.zeros((2, size), np.uint8), raw_dtype=kind
        ),
    )
    with pytest.raises(
        UsageError, match=f"its tensors are of type {kind.name}.*quantise it to another type"
    ) as found:
        read(tmp_path / "model.gguf")
    assert "download" not in str(found.value)
    assert block > 1


def test_a_tensor_type_that_nobody_knows_is_no_damage(tmp_path):
    write(tmp_path / "model.gguf", torch_model("llama_untied"))
    content = (tmp_path / "model.gguf").read_bytes()
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    (tmp_path / "model.gguf").write_bytes(
        content[:at] + (77).to_bytes(4, "little") + content[at + 4 :]
    )
    refused(
        tmp_path / "model.gguf",
        "tensors of a type that the gguf package does not know .*77.*quantise it to another type",
    )


@pytest.mark.slow
def test_flipped_and_missing_bytes_are_no_traceback(tmp_path):
    """Every 97th cut, and 400 bytes changed one at a time: a sentence, or a model."""
    path = tmp_path / "model.gguf"
    write(path, torch_model("llama_untied"))
    whole, rng, refusals = path.read_bytes(), np.random.default_rng(0), list[str]()
    head = whole.index(b"token_embd.weight") + 2000
    cuts = [whole[:kept] for kept in range(0, head, 97)]
    flips = []
    for _ in range(400):
        changed = bytearray(whole)
        changed[rng.integers(0, head)] = rng.integers(0, 256)
        flips.append(bytes(changed))
    for content in (*cuts, *flips):
        path.write_bytes(content)
        try:
            read(path)
        except UsageError as problem:
            refusals.append(str(problem))
    assert len(refusals) > len(cuts) + 100
    assert max(map(len, refusals)) < 1000


# ---- long lists


def many_lists(path, tokens):
    """A file of metadata alone: a vocabulary, and lists of all types."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_token_list(tokens)
    writer.add_array("numbers", list(range(-5, 5)))
    writer.add_array("flags", [True, False, True])
    writer.add_array("fractions", [0.5, -1.25])
    writer.add_array("lists", [[1, 2], [3, 4]])
    writer.add_string("text", "ünï")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_lists_of_all_types_are_what_gguf_reads(tmp_path):
    path = many_lists(tmp_path / "lists.gguf", ["", "a", "日本", " long " * 50])
    ours, theirs = open_gguf(path, "", "").fields, gguf.GGUFReader(path).fields
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        assert ours[name].contents() == field.contents(), name
        assert ours[name].types == field.types, name


def test_a_vocabulary_takes_a_few_times_its_bytes_of_memory(tmp_path):
    count = 20_000
    path = many_lists(tmp_path / "long.gguf", [f"token number {i}" for i in range(count)])
    tracemalloc.start()
    fields = open_gguf(path, "", "").fields
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert fields["tokenizer.ggml.tokens"].contents()[count - 1] == f"token number {count - 1}"
    assert used < 200 * count  # gguf's own reader takes 1,250


def test_a_list_of_strings_that_leaves_the_file_is_damage(tmp_path):
    whole = many_lists(tmp_path / "whole.gguf", ["abc"] * 100).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(whole.index(b"abc"), whole.index(b"numbers"), 101):
        cut.write_bytes(whole[:size])
        with pytest.raises(UsageError, match="broken"):
            open_gguf(cut, "file", "broken")
