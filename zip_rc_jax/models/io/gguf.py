"""GGUF files as if they were Hugging Face checkpoints: names, shapes and settings are translated,
blocks are dequantised."""

from __future__ import annotations

import functools
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from zip_rc_jax.config import RopeScaling
from zip_rc_jax.models.attention.full import rope_frequencies
from zip_rc_jax.models.io.families import FAMILIES, MOST_LAYERS, Family
from zip_rc_jax.models.io.huggingface import short
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

with optional_import():
    import gguf

ARCHITECTURES = {  # GGUF's name -> ours
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "lfm2": "lfm2",
    "gemma3": "gemma3_text",
}


KNOWN_VERSIONS = (2, 3)
REQUANTISE = "quantise it to another type, such as Q8_0 or Q4_K_M"

# Metadata that changes no number here, without "{architecture}.".
HARMLESS = frozenset({
    "vocab_size", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon",
    "rope.scaling.finetuned", "expert_used_count",
    "rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor",
    "expert_weights_scale", "expert_weights_norm", "expert_gating_func",
    "expert_feed_forward_length",
})  # fmt: skip
# What `_settings` reads.
READ = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
})  # fmt: skip
READ_TOO = {
    "llama": frozenset[str](),
    "qwen2": frozenset[str](),
    "qwen3": frozenset[str](),
    "lfm2": frozenset({"shortconv.l_cache"}),
    "gemma3": frozenset({
        "attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping",
        "rope.freq_base_swa",
        "attn_logit_softcapping",  # llama.cpp and transformers do not apply it to Gemma 3
    }),
}  # fmt: skip
# Values that change nothing, of what is not read. Any other key is refused unless it is 0, false or
# empty.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_scale": (0, 1), "residual_scale": (0, 1), "embedding_scale": (0, 1),
    "attention.causal": (True,), "expert_count": (0,),
    "rope.scaling.attn_factor": (0, 1), "rope.scaling.yarn_attn_factor": (0, 1),
    "attention.output_scale": (0, 1),
}  # fmt: skip


class _Reader(gguf.GGUFReader):
    """`gguf` reads past the end as if nothing were there, and believes counts of 2**60."""

    def _get(
        self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None
    ) -> np.ndarray:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(
                f"it has {len(self.data)} bytes and says that there are at least {end}"
            )
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(
        self, orig_offs: Any, raw_type: Any
    ) -> tuple[int, list[np.ndarray], list[int], list[gguf.GGUFValueType]]:
        """As `gguf` does, but arrays are not taken apart into memory maps of single numbers.

        For a vocabulary of 150,000 tokens and as many merges, that takes 15 s and 0.5 GB.
        """
        start = int(orig_offs)
        if gguf.GGUFValueType(raw_type) != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(start, raw_type)
        kind, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
        item, first, size = gguf.GGUFValueType(kind[0]), start + 12, int(count[0])
        types = [gguf.GGUFValueType.ARRAY, *([item] if size else [])]
        if item == gguf.GGUFValueType.STRING:
            end, texts = self._texts(first, size)
            return end - start, [kind, count, *texts], list(range(2, 2 + size)), types
        if item not in self.gguf_scalar_to_np:
            return super()._get_field_parts(start, raw_type)  # a list of lists
        numbers = self._get(first, self.gguf_scalar_to_np[item], size)
        return first + numbers.nbytes - start, [kind, count, numbers], [2] if size else [], types

    def _texts(self, offset: int, count: int) -> tuple[int, list[np.ndarray]]:
        """The bytes of `count` strings from `offset` on, uint8, and where they end."""
        plain = self.data.view(np.ndarray)
        memory, length_at = plain.data, struct.Struct("<Q").unpack_from
        texts, end = [], offset
        for _ in range(count):
            start = end + 8
            end = start + length_at(memory, start - 8)[0]  # struct.error where the file ends
            if end > len(plain):
                raise ValueError(f"it has {len(plain)} bytes, and a string of it ends at {end}")
            texts.append(plain[start:end])
        return end, texts


def open_gguf(path: pathlib.Path, where: str, broken: str) -> gguf.GGUFReader:
    """Reads metadata and the list of tensors.

    Args:
      where: the file, for messages.
      broken: what to say of a damaged file.

    Raises:
      UsageError: no GGUF file, a damaged one, or one of another version, byte order or with unknown
        tensor types.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UsageError(where, f"{broken} ({short(error)})", "pass a .gguf file") from None
    if len(start) == 8 and start[:4] == b"GGUF":
        version, swapped = struct.unpack("<I", start[4:])[0], struct.unpack(">I", start[4:])[0]
        if version not in KNOWN_VERSIONS and swapped in (1, *KNOWN_VERSIONS):
            raise UsageError(
                where,
                "its numbers are big endian",
                "convert it with `gguf-convert-endian FILE little`",
            )
        if version not in KNOWN_VERSIONS:
            known = ", ".join(map(str, KNOWN_VERSIONS))
            reason = f"it is of GGUF version {version}, and versions {known} are read"
            raise UsageError(
                where, reason, "convert the original model again with a current llama.cpp"
            )
    elif len(start) >= 4:
        raise UsageError(
            where,
            f"{broken} (it does not begin with 'GGUF')",
            "pass a GGUF file, or download it again",
        )
    try:
        return _Reader(path)
    except RecursionError:
        raise UsageError(where, f"{broken} (lists within lists)", "download it again") from None
    except Exception as error:  # whatever a reader of damaged bytes runs into
        if "GGMLQuantizationType" in str(error):
            raise UsageError(
                where,
                f"it has tensors of a type that the gguf package does not know ({short(error)})",
                REQUANTISE,
            ) from None
        raise UsageError(where, f"{broken} ({short(error)})", "download it again") from None


def contents(field: Any, where: str) -> Any:
    """The value of a metadata field. Raises UsageError for a damaged one."""
    try:
        return field.contents()
    except Exception as error:
        raise UsageError(
            f"{where}: {str(field.name)[:80]}",
            f"it cannot be read ({short(error)})",
            "download it again",
        ) from None


class GgufSource:
    """One GGUF file.

    llama.cpp keeps some tensors otherwise than Hugging Face does: queries and keys of Llama with
    interleaved rotary pairs, Gemma's norms with 1 added, LFM2's convolutions without their middle
    axis. Reading undoes that.

    Attributes:
      settings: what config.json would say.

    Raises:
      UsageError: a damaged file, an unknown architecture, metadata or tensor type, or several files
        of one model.
    """

    def __init__(self, path: pathlib.Path):
        self.where = str(path)
        self._reader = open_gguf(path, f"GGUF file {path}", "it is truncated or damaged")
        self._architecture = self._required("general.architecture")
        if not isinstance(self._architecture, str) or self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            named = repr(self._architecture)[:60]
            raise UsageError(
                f"GGUF architecture {named} of {path}",
                f"the known ones are {known}",
                "use one of them",
            )
        if self._number("split.count", 1) > 1:
            raise UsageError(
                f"GGUF file {path}",
                "it is one of several parts",
                "merge them with llama-gguf-split --merge",
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._check_tensor_types()
        self._check_metadata()
        self.family = next(f for f in FAMILIES if f.model_type == ARCHITECTURES[self._architecture])
        self.settings = self._settings()
        self._stored = self._names(self.family, self.settings["num_hidden_layers"])
        translated = set(self._stored.values())
        self.shapes = {name: self._shape(name) for name in self._stored}
        # What has no Hugging Face name keeps its own, so that it is reported and not dropped.
        self.shapes |= {
            name: self._stored_shape(name)
            for name in self._tensors
            if name not in translated and name != "rope_freqs.weight"
        }

    def _check_tensor_types(self) -> None:
        """Raises UsageError for tensors that are no floating-point numbers and cannot be
        dequantised."""
        for kind in sorted({tensor.tensor_type for tensor in self._reader.tensors}):
            if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                continue
            try:
                gguf.quants.dequantize(
                    np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind
                )
            except Exception:
                name = next(
                    tensor.name for tensor in self._reader.tensors if tensor.tensor_type == kind
                )
                reason = (
                    f"its tensors are of type {kind.name} (the first is {name[:80]}), which "
                    "cannot be expanded to numbers"
                )
                raise UsageError(f"GGUF file {self.where}", reason, REQUANTISE) from None

    def _check_metadata(self) -> None:
        """Raises UsageError for a setting of the architecture that nothing here implements, unless
        it changes nothing."""
        prefix = f"{self._architecture}."
        known = READ | READ_TOO[self._architecture] | HARMLESS
        for name in self._reader.fields:
            key = name.removeprefix(prefix)
            if not name.startswith(prefix) or key in known or key.startswith(("vision.", "mm.")):
                continue
            value = self._field(name)
            neutral = (
                value in NEUTRAL.get(key, (0, None, "", []))
                if not isinstance(value, list)
                else not any(value)
            )
            if key == "attention.sliding_window":  # of a family without sliding layers
                neutral = neutral or (
                    self._whole(value) and value >= self._size(f"{prefix}context_length")
                )
            if key == "attention.scale":
                neutral = neutral or (
                    isinstance(value, float) and abs(value * self._head_dim() ** 0.5 - 1) < 1e-5
                )
            if key.endswith(("_swa", "_length_mla")) or key == "rope.dimension_count_swa":
                neutral = neutral or value == self._head_dim()
            if not neutral:
                raise UsageError(
                    f"GGUF file {self.where}",
                    f"its setting {name}={str(value)[:60]} is not implemented",
                    "use another model",
                )

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[self._stored[name]]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            self._stored_shape(tensor.name)
        )
        if self._architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # biases too
            heads = self.settings[
                "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            ]
            array = (
                array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        if self._architecture == "gemma3" and "norm" in name:
            array = array - np.float32(1)
        return array.reshape(self.shapes[name])

    def _names(self, family: Family, layers: int) -> dict[str, str]:
        """Hugging Face name -> GGUF name of every tensor that is there."""
        table = gguf.get_tensor_name_map(
            next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self._architecture), layers
        )
        names = {}
        for theirs in family.names.values():
            for name in {theirs.format(layer=layer) for layer in range(layers)}:
                stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
                if stored not in self._tensors and name == family.names["final_norm"]:
                    stored = "output_norm.weight"  # some LFM2 files
                if stored in self._tensors:
                    names[name] = stored
        return names

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[stored].shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._stored_shape(self._stored[name])
        return (
            (shape[0], 1, shape[1])
            if name.endswith("conv.conv.weight") and len(shape) == 2
            else shape
        )

    # Metadata.

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else contents(field, f"GGUF file {self.where}")

    def _required(self, key: str) -> Any:
        value = self._field(key)
        if value is None:
            raise UsageError(
                f"GGUF file {self.where}", f"its metadata has no {key!r}", "convert the model again"
            )
        return value

    @staticmethod
    def _whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def _checked(self, key: str, value: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        if not fits(value):
            raise UsageError(
                f"GGUF file {self.where}",
                f"its metadata {key}={str(value)[:60]} is no {kind}",
                "convert the model again",
            )
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        """A positive whole number. A list with one value for all layers counts as that value."""
        value = self._required(key) if default is None else self._field(key, default)
        if isinstance(value, list) and value and all(x == value[0] for x in value):
            value = value[0]
        return self._checked(key, value, lambda x: self._whole(x) and 0 < x < 2**31, "size")

    def _number(self, key: str, default: float) -> float:
        return self._checked(
            key,
            self._field(key, default),
            lambda x: isinstance(x, (int, float)) and abs(x) < 1e30,
            "number",
        )

    def _head_dim(self) -> int:
        key = functools.partial("{}.{}".format, self._architecture)
        usual = max(
            1, self._size(key("embedding_length")) // self._size(key("attention.head_count"))
        )
        return self._size(key("attention.key_length"), usual)

    def _settings(self) -> dict[str, Any]:
        key = functools.partial("{}.{}".format, self._architecture)
        heads, width, layers = (
            self._size(key(k)) for k in ("attention.head_count", "embedding_length", "block_count")
        )
        self._checked(key("block_count"), layers, lambda x: x <= MOST_LAYERS, "number of layers")
        kv_heads = self._field(key("attention.head_count_kv"), heads)
        kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
        self._checked(
            key("attention.head_count_kv"),
            kv_heads,
            lambda x: len(x) == layers and all(self._whole(n) and n >= 0 for n in x),
            "head count",
        )
        if len(set(kv_heads) - {0}) > 1:
            raise UsageError(
                f"GGUF file {self.where}",
                "its layers have different numbers of key heads",
                "use another model",
            )
        head_dim = self._head_dim()
        for name in ("rope.dimension_count", "attention.value_length"):
            if self._size(key(name), head_dim) != head_dim:
                stated = self._field(key(name))
                reason = (
                    f"its {key(name)} is {stated}, and heads have {head_dim} channels; only "
                    "equal numbers are implemented"
                )
                raise UsageError(f"GGUF file {self.where}", reason, "use another model")
        settings: dict[str, Any] = {
            "model_type": self.family.model_type,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1])
            if "token_embd.weight" in self._tensors
            else 0,
            "hidden_size": width,
            "intermediate_size": self._size(key("feed_forward_length")),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(kv_heads, default=heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._size(key("context_length")),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }
        # Stored as float32; the decimal that was meant is what Hugging Face configs say.
        self._required(key("attention.layer_norm_rms_epsilon"))
        stored = (
            self._number(key("attention.layer_norm_rms_epsilon"), 0),
            self._number(key("rope.freq_base"), 10000.0),
        )
        eps, theta = (float(str(np.float32(value))) for value in stored)
        settings["norm_eps" if self._architecture == "lfm2" else "rms_norm_eps"] = eps
        rope = {"rope_theta": theta, "rope_type": "default"} | self._rope_scaling(
            key, head_dim, theta
        )
        settings["rope_parameters"] = rope
        if self._architecture in ("llama", "qwen3"):
            settings["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if self._architecture == "llama":
            settings["mlp_bias"] = "blk.0.ffn_gate.bias" in self._tensors
        if self._architecture == "lfm2":
            settings |= {
                "block_auto_adjust_ff_dim": False,
                "layer_types": ["full_attention" if count else "conv" for count in kv_heads],
                "conv_L_cache": self._size(key("shortconv.l_cache")),
                "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in self._tensors),
            }
        if self._architecture == "gemma3":
            local = {
                "rope_theta": self._number(key("rope.freq_base_swa"), 10000.0),
                "rope_type": "default",
            }
            period = self._field(key("attention.sliding_window_pattern"), 6)
            if not isinstance(period, list):
                period = self._size(key("attention.sliding_window_pattern"), 6)
            slides = (
                period
                if isinstance(period, list)
                else [(layer + 1) % period != 0 for layer in range(layers)]
            )
            settings |= {
                "rope_parameters": {"full_attention": rope, "sliding_attention": local},
                "layer_types": [
                    "sliding_attention" if slide else "full_attention" for slide in slides
                ],
                "sliding_window": self._size(key("attention.sliding_window")),
                "final_logit_softcapping": self._number(key("final_logit_softcapping"), 0) or None,
                # As llama.cpp: the 27B alone scales by the width per head.
                "query_pre_attn_scalar": width // heads if layers == 62 else head_dim,
            }
        return settings

    def _rope_scaling(self, key: Any, head_dim: int, theta: float) -> dict[str, Any]:
        """The scaling of the rotary frequencies.

        Llama 3.1's is stored as one divisor per frequency.
        """
        kind = self._field(key("rope.scaling.type"), "linear")  # as llama.cpp
        if "rope_freqs.weight" in self._tensors:
            stored = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32)
            for factor in (8.0, 32.0):  # Llama 3.1 and 3.2
                scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
                divisors = rope_frequencies(head_dim, theta, RopeScaling()) / rope_frequencies(
                    head_dim, theta, scaling
                )
                if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-4):
                    settings = {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                    }
                    return settings | {"original_max_position_embeddings": 8192}
            raise UsageError(
                f"rope_freqs of {self.where}",
                "they are not those of Llama 3.1 or 3.2",
                "load the Hugging Face checkpoint",
            )
        if kind == "linear":
            factor = float(
                self._number(key("rope.scaling.factor"), self._number(key("rope.scale_linear"), 0))
            )
            return {} if factor in (0, 1) else {"rope_type": "linear", "factor": factor}
        if kind != "none":
            raise UsageError(
                f"rope scaling {str(kind)[:60]!r} of {self.where}",
                "'linear' and Llama 3.1's are implemented",
                "use another model",
            )
        return {}
