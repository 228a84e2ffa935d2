"""A GGUF file of a random model, written by the `gguf` package."""

from __future__ import annotations

import re

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Quantization

from harness.forwards import LAYOUT
from zip_rc_jax.models.io.families import read_config
from zip_rc_jax.models.io.gguf import GgufSource
from zip_rc_jax.models.io.weights import load_params

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "lfm2": "lfm2",
    "gemma3_text": "gemma3",
}


NAMES = {
    r"model\.embed_tokens\.": "token_embd.",
    r"model\.norm\.": "output_norm.",
    r"model\.embedding_norm\.": "token_embd_norm.",
    r"lm_head\.": "output.",
    r"model\.layers\.(\d+)\.": r"blk.\1.",
    r"(input_layernorm|operator_norm)\.": "attn_norm.",
    r"self_attn\.([qkv])_proj\.": r"attn_\1.",
    r"self_attn\.o(ut)?_proj\.": "attn_output.",
    r"self_attn\.([qk])_(layer)?norm\.": r"attn_\1_norm.",
    r"pre_feedforward_layernorm\.": "ffn_norm.",
    r"post_feedforward_layernorm\.": "post_ffw_norm.",
    r"(mlp\.gate_proj|feed_forward\.w1)\.": "ffn_gate.",
    r"(mlp\.up_proj|feed_forward\.w3)\.": "ffn_up.",
    r"(mlp\.down_proj|feed_forward\.w2)\.": "ffn_down.",
    r"(?<!short)conv\.(in_proj|out_proj|conv)\.": r"shortconv.\1.",
}


def stored_name(name, architecture):
    """llama.cpp's name of a Hugging Face tensor."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name, count=1)
    return name.replace(
        "post_attention_layernorm.",
        "post_attention_norm." if architecture == "gemma3" else "ffn_norm.",
    )


def stored_array(name, array, config, architecture):
    """A tensor as llama.cpp keeps it: interleaved rotary pairs in Llama, Gemma's norms with 1
    added, 2D convolutions."""
    if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return (
            array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            .swapaxes(1, 2)
            .reshape(array.shape)
        )
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return array + 1
    return array.squeeze(1) if name.endswith("conv.conv.weight") else array


def llama3_divisors(head_dim, rope):
    """What each rotary frequency is divided by, as `generate_extra_tensors` of the converter writes
    it out."""
    frequencies = 1.0 / rope["rope_theta"] ** (
        np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    )
    low, high, old = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    found = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < old / high:
            found.append(1.0)
        elif wavelength > old / low:
            found.append(rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(found, np.float32)


def write_metadata(writer, config, architecture, ff_width):
    head_dim, rope = getattr(config, "head_dim", None), config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(ff_width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "lfm2":
        writer.add_head_count_kv(
            [
                config.num_key_value_heads if kind == "full_attention" else 0
                for kind in config.layer_types
            ]
        )
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(head_dim, rope))


def write(path, model, kind=lambda stored: Quantization.F32, extra=lambda writer: None):
    """Writes a torch model; matrices are quantised as `kind(stored name)` says, vectors and
    convolutions stay float32.

    Returns:
      The Hugging Face names and, in the file's layout, what can be read back of their tensors.
    """
    config, architecture, state = (
        model.config,
        ARCHITECTURES[model.config.model_type],
        model.state_dict(),
    )
    writer = gguf.GGUFWriter(path, architecture)
    ff_width = next(
        len(tensor)
        for name, tensor in state.items()
        if name.endswith(("up_proj.weight", "w1.weight"))
    )
    write_metadata(writer, config, architecture, ff_width)
    extra(writer)
    kept = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored, array = (
            stored_name(name, architecture),
            np.ascontiguousarray(stored_array(name, tensor.numpy(), config, architecture)),
        )
        quantization = kind(stored) if tensor.ndim == 2 else Quantization.F32
        data = gguf.quants.quantize(array, quantization)
        writer.add_tensor(stored, data, raw_dtype=quantization)
        kept[name] = gguf.quants.dequantize(data, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def read(path):
    """Config and parameters of a file."""
    source = GgufSource(path)
    family, config = read_config(source.settings, source.where)
    assert family == source.family
    return config, load_params(config, family, source, jnp.float32, LAYOUT)
