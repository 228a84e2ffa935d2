"""GGUF files as if they were Hugging Face checkpoints: names, shapes and settings are translated, blocks are dequantised."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import gguf
import numpy as np

from zip_rc_jax.config import RopeScaling
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.attention import rope_frequencies
from zip_rc_jax.models.families import FAMILIES, Family

ARCHITECTURES = {  # GGUF's name -> ours
    "llama": "llama",
    "qwen3": "qwen3",
    "lfm2": "lfm2",
    "gemma3": "gemma3_text",
}


class GgufSource:
    """One GGUF file.

    llama.cpp keeps some tensors otherwise than Hugging Face does: queries and keys of Llama with interleaved rotary pairs, Gemma's
    norms with 1 added, LFM2's convolutions without their middle axis. Reading undoes that.

    Attributes:
      settings: what config.json would say.

    Raises:
      UsageError: a damaged file, an unknown architecture, or several files of one model.
    """

    def __init__(self, path: pathlib.Path):
        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError, KeyError) as error:
            raise UsageError(f"GGUF file {path}", f"it is truncated or damaged ({error})", "download it again") from None
        self._architecture = self._required("general.architecture")
        if self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UsageError(f"GGUF architecture {self._architecture!r} of {path}", f"the known ones are {known}", "use one of them")
        if self._field("split.count", 1) > 1:
            raise UsageError(f"GGUF file {path}", "it is one of several parts", "merge them with llama-gguf-split --merge")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.family = next(f for f in FAMILIES if f.model_type == ARCHITECTURES[self._architecture])
        self.settings = self._settings()
        self._stored = self._names(self.family, self.settings["num_hidden_layers"])
        translated = set(self._stored.values())
        self.shapes = {name: self._shape(name) for name in self._stored}
        # What has no Hugging Face name keeps its own, so that it is reported and not dropped.
        self.shapes |= {name: self._stored_shape(name) for name in self._tensors if name not in translated and name != "rope_freqs.weight"}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[self._stored[name]]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self._stored_shape(tensor.name))
        if self._architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # biases too
            heads = self.settings["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if self._architecture == "gemma3" and "norm" in name:
            array = array - np.float32(1)
        return array.reshape(self.shapes[name])

    def _names(self, family: Family, layers: int) -> dict[str, str]:
        """Hugging Face name -> GGUF name of every tensor that is there."""
        table = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self._architecture), layers)
        found = {}
        for theirs in family.names.values():
            for name in {theirs.format(layer=layer) for layer in range(layers)}:
                stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
                if stored not in self._tensors and name == family.names["final_norm"]:
                    stored = "output_norm.weight"  # some LFM2 files
                if stored in self._tensors:
                    found[name] = stored
        return found

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[stored].shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._stored_shape(self._stored[name])
        return (shape[0], 1, shape[1]) if name.endswith("conv.conv.weight") and len(shape) == 2 else shape

    # Metadata.

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self._field(key)
        if value is None:
            raise UsageError(f"GGUF file {self.where}", f"its metadata has no {key!r}", "convert the model again")
        return value

    def _settings(self) -> dict[str, Any]:
        key = functools.partial("{}.{}".format, self._architecture)
        heads, width, layers = (self._required(key(k)) for k in ("attention.head_count", "embedding_length", "block_count"))
        kv_heads = self._field(key("attention.head_count_kv"), heads)
        kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
        head_dim = self._field(key("attention.key_length"), width // heads)
        settings: dict[str, Any] = {
            "model_type": self.family.model_type,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in self._tensors else 0,
            "hidden_size": width,
            "intermediate_size": self._required(key("feed_forward_length")),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(kv_heads, default=heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._required(key("context_length")),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }
        # Stored as float32; the decimal that was meant is what Hugging Face configs say.
        stored = self._required(key("attention.layer_norm_rms_epsilon")), self._field(key("rope.freq_base"), 10000.0)
        eps, theta = (float(str(np.float32(value))) for value in stored)
        settings["norm_eps" if self._architecture == "lfm2" else "rms_norm_eps"] = eps
        rope = {"rope_theta": theta, "rope_type": "default"} | self._rope_scaling(key, head_dim, theta)
        settings["rope_parameters"] = rope
        if self._architecture in ("llama", "qwen3"):
            settings["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if self._architecture == "llama":
            settings["mlp_bias"] = "blk.0.ffn_gate.bias" in self._tensors
        if self._architecture == "lfm2":
            settings |= {
                "block_auto_adjust_ff_dim": False,
                "layer_types": ["full_attention" if count else "conv" for count in kv_heads],
                "conv_L_cache": self._required(key("shortconv.l_cache")),
                "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in self._tensors),
            }
        if self._architecture == "gemma3":
            local = {"rope_theta": float(self._field(key("rope.freq_base_swa"), 10000.0)), "rope_type": "default"}
            period = self._field(key("attention.sliding_window_pattern"), 6)
            slides = period if isinstance(period, list) else [(layer + 1) % period != 0 for layer in range(layers)]
            settings |= {
                "rope_parameters": {"full_attention": rope, "sliding_attention": local},
                "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
                "sliding_window": self._required(key("attention.sliding_window")),
                "final_logit_softcapping": self._field(key("final_logit_softcapping")),
                # As llama.cpp: the 27B alone scales by the width per head.
                "query_pre_attn_scalar": width // heads if layers == 62 else head_dim,
            }
        return settings

    def _rope_scaling(self, key: Any, head_dim: int, theta: float) -> dict[str, Any]:
        """The scaling of the rotary frequencies. Llama 3.1's is stored as one divisor per frequency."""
        kind = self._field(key("rope.scaling.type"), "linear")  # as llama.cpp
        if "rope_freqs.weight" in self._tensors:
            stored = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32)
            for factor in (8.0, 32.0):  # Llama 3.1 and 3.2
                scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
                divisors = rope_frequencies(head_dim, theta, RopeScaling()) / rope_frequencies(head_dim, theta, scaling)
                if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-4):
                    settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
                    return settings | {"original_max_position_embeddings": 8192}
            raise UsageError(f"rope_freqs of {self.where}", "they are not those of Llama 3.1 or 3.2", "load the Hugging Face checkpoint")
        if kind == "linear":
            factor = float(self._field(key("rope.scaling.factor"), self._field(key("rope.scale_linear"), 0)))
            return {} if factor in (0, 1) else {"rope_type": "linear", "factor": factor}
        if kind != "none":
            raise UsageError(f"rope scaling {kind!r} of {self.where}", "'linear' and Llama 3.1's are implemented", "use another model")
        return {}
