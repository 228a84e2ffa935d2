"""Tiny random Hugging Face models of every family, and ours read from their files."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.forwards import LAYOUT
from zip_rc_jax.models.io.families import read_config
from zip_rc_jax.models.io.huggingface import SafetensorsSource
from zip_rc_jax.models.io.weights import load_params

VOCAB, ROWS, WIDTH = 80, 4, 14  # longer than every sliding window below
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, WIDTH)).astype(np.int32)

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 150,
}
# The models of one family differ from the defaults of its config class in every value that matters,
# as test_families checks.
MODELS = {
    "llama": ("llama", _SIZES | {
        "num_hidden_layers": 3, "head_dim": 10, "intermediate_size": 56, "hidden_act": "gelu",
        "rms_norm_eps": 0.02,
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": _LLAMA3 | {"rope_theta": 321.0},
    }),
    "llama_untied": ("llama", _SIZES | {
        "num_hidden_layers": 2, "num_key_value_heads": 6, "intermediate_size": 40,
        "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }),
    "qwen2": ("qwen2", _SIZES | {
        "num_hidden_layers": 3, "intermediate_size": 56, "hidden_act": "gelu",
        "rms_norm_eps": 0.02, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 321.0},
    }),
    "qwen2_sliding": ("qwen2", _SIZES | {
        "num_hidden_layers": 4, "head_dim": 10, "intermediate_size": 40, "rms_norm_eps": 0.01,
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }),
    "qwen3": ("qwen3", _SIZES | {
        "num_hidden_layers": 3, "head_dim": 10, "intermediate_size": 56, "hidden_act": "relu",
        "rms_norm_eps": 0.02,
        "tie_word_embeddings": True, "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 321.0},
    }),
    "qwen3_sliding": ("qwen3", _SIZES | {
        "num_hidden_layers": 5, "head_dim": 12, "intermediate_size": 40, "rms_norm_eps": 0.01,
        "use_sliding_window": True,
        "sliding_window": 5, "layer_types": [f"{kind}_attention" for kind in ("sliding", "full",
        "sliding", "sliding", "full")],
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }),
    "lfm2": ("lfm2", _SIZES | {
        "num_hidden_layers": 7, "head_dim": 10, "intermediate_size": 70, "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.3,
        "norm_eps": 0.02, "conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention",
        "full_attention", "conv"],
        "rope_parameters": _LLAMA3 | {"rope_theta": 321.0},
    }),
    "lfm2_tied": ("lfm2", _SIZES | {
        "num_hidden_layers": 4, "intermediate_size": 40, "block_auto_adjust_ff_dim": False,
        "norm_eps": 0.01,
        "full_attn_idxs": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }),
    "gemma3": ("gemma3_text", _SIZES | {
        "num_hidden_layers": 5, "head_dim": 10, "intermediate_size": 56,
        "hidden_activation": "silu", "rms_norm_eps": 0.02,
        "tie_word_embeddings": False, "attention_bias": True, "query_pre_attn_scalar": 7,
        "sliding_window": 5,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0,
        "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full",
        "sliding")],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 321.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    }),
    "gemma3_tied": ("gemma3_text", _SIZES | {
        "num_hidden_layers": 8, "head_dim": 12, "query_pre_attn_scalar": 12,
        "intermediate_size": 40, "rms_norm_eps": 0.01,
        "sliding_window": 5,
    }),
}  # fmt: skip


def torch_model(name, auto=AutoModelForCausalLM, **changes):
    """The model `MODELS[name]`, with other settings: float32, eager attention, every parameter
    random (norms and biases too).

    `auto`: another head on it, such as `AutoModelForSequenceClassification`.
    """
    model_type, settings = MODELS[name]
    config = AutoConfig.for_model(model_type, **settings | changes)
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            else:
                parameter[:] = noise / parameter[0].numel() ** 0.5
    return model


def torch_logits(model, tokens):
    """Logits `[B, T, V]` of one forward of all tokens."""
    with torch.no_grad():
        return (
            model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False)
            .logits.float()
            .numpy()
        )


def load(directory, dtype=jnp.float32):
    """Family, config and parameters of a checkpoint directory."""
    path = directory / "config.json"
    family, config = read_config(json.loads(path.read_text()), str(path))
    return family, config, load_params(config, family, SafetensorsSource(directory), dtype, LAYOUT)


def error(ours, theirs):
    """Largest difference, relative to the largest logit."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
