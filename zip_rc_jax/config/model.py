"""The shape of a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from zip_rc_jax.config.checks import check_types, one_of, require

LAYER_TYPES = ("attention", "sliding", "conv")
ROPE_SCALINGS = ("none", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pretraining.

    Attributes:
      kind: "none", "linear" (all frequencies divided by `factor`), or "llama3" (Llama 3.1: long
        wavelengths divided, short ones kept, those between interpolated).
      factor: how much longer the context became.
      low_freq_factor, high_freq_factor, original_positions: of "llama3": wavelengths above
        `original_positions / low_freq_factor` are long, below `original_positions /
        high_freq_factor` short.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        check_types(RopeScaling, vars(self))
        one_of("rope_scaling.kind", self.kind, ROPE_SCALINGS)
        require(
            0 < self.factor < math.inf,
            f"rope_scaling.factor={self.factor}",
            "frequencies are divided by it",
            "use a positive number",
        )
        require(
            self.kind != "llama3" or 0 < self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling low_freq_factor={self.low_freq_factor}, "
            f"high_freq_factor={self.high_freq_factor}",
            "they bound the wavelengths that are interpolated",
            "make low_freq_factor the smaller one",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer for all families (Llama, Qwen2, Qwen3, LFM2, Gemma 3).

    Nothing has a hidden default inside the layers.

    Attributes:
      vocab_size: rows of the embedding, padding included.
      d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff: the usual widths; `n_heads` is a
      multiple of `n_kv_heads`. layer_types: per layer "attention" (full causal), "sliding" (causal
        within `sliding_window` tokens) or "conv" (LFM2's gated short convolution); empty means
        attention everywhere.
      sliding_window: tokens that a sliding layer sees, its own included.
      conv_kernel, conv_bias: taps of the short convolution; biases on it and on its projections.
      rope_theta, rope_scaling: base and scaling of the rotary position embedding.
      sliding_rope_theta: base for sliding layers, unscaled (Gemma 3); 0 means that they rotate as
        the others.
      rms_eps: epsilon of every RMSNorm.
      norm_plus_one: norms multiply by `1 + scale` (Gemma).
      qk_norm: RMSNorm on queries and keys per head (Qwen3, LFM2, Gemma 3).
      post_norms: RMSNorm also on the output of attention and MLP (Gemma 3).
      attention_bias, mlp_bias: biases on the projections.
      attention_output_bias: with `attention_bias`, also on the output projection (not in Qwen2).
      attention_scale: scores are multiplied by it; 0 means `head_dim ** -0.5`.
      logit_softcap: `c * tanh(x / c)` on the final logits; 0 switches it off.
      activation: of the gated MLP: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      scale_embedding: multiply embeddings by `sqrt(d_model)` (Gemma).
      tied: unembedding = embedding.
      max_positions: longest sequence in tokens, prompt included.
    """

    vocab_size: int = 384
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 384
    layer_types: tuple[str, ...] = ()
    sliding_window: int = 0
    conv_kernel: int = 0
    conv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    sliding_rope_theta: float = 0.0
    rms_eps: float = 1e-6
    norm_plus_one: bool = False
    qk_norm: bool = True
    post_norms: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = True
    mlp_bias: bool = False
    attention_scale: float = 0.0
    logit_softcap: float = 0.0
    activation: str = "silu"
    scale_embedding: bool = False
    tied: bool = False
    max_positions: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        check_types(ModelConfig, vars(self))
        for field in (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "max_positions",
        ):
            require(
                getattr(self, field) > 0,
                f"model.{field}={getattr(self, field)}",
                "sizes are positive",
                "give a positive number",
            )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}",
            "every key/value head serves a whole group of query heads",
            "make n_heads a multiple of n_kv_heads",
        )
        for field in ("rope_theta", "rms_eps"):
            value = getattr(self, field)
            require(
                math.isfinite(value) and value > 0,
                f"model.{field}={value}",
                "it must be positive and finite",
                "use a positive number",
            )
        for field in ("sliding_rope_theta", "attention_scale", "logit_softcap"):
            value = getattr(self, field)
            require(
                math.isfinite(value) and value >= 0,
                f"model.{field}={value}",
                "0 switches it off",
                "use a number >= 0",
            )
        require(
            self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim}",
            "RoPE rotates pairs of channels",
            "make it even",
        )
        one_of("model.activation", self.activation, ACTIVATIONS)
        for kind in self.layer_types:
            one_of("model.layer_types", kind, LAYER_TYPES)
        require(
            len(self.layer_types) in (0, self.n_layers),
            f"model.layer_types of {len(self.layer_types)} entries",
            f"there are n_layers={self.n_layers} layers",
            "give one type per layer, or none",
        )
        require(
            ("sliding" in self.layer_types) == (self.sliding_window > 0),
            f"model.sliding_window={self.sliding_window} with "
            f"layer_types={str(self.layer_types)[:100]}",
            "a window belongs to sliding layers, and every sliding layer needs it",
            "set both or neither",
        )
        require(
            ("conv" in self.layer_types) == (self.conv_kernel > 0),
            f"model.conv_kernel={self.conv_kernel} with layer_types={str(self.layer_types)[:100]}",
            "a kernel belongs to conv layers, and every conv layer needs it",
            "set both or neither",
        )
        require(
            set(self.layer_types) != {"conv"},
            "model.layer_types all 'conv'",
            "the cache counts its slots in attention layers",
            "give the model at least one attention layer",
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""
        return cls(**{**data, "rope_scaling": RopeScaling(**data.get("rope_scaling", {}))})

    @property
    def has_output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias and self.attention_output_bias

    @property
    def kinds(self) -> tuple[str, ...]:
        """The type of every layer."""
        return self.layer_types or ("attention",) * self.n_layers
