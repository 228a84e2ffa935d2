"""Published model families: a family is a mapping between config.json and `ModelConfig`, and a
table of tensor names.

Everything here is about names and settings; the arrays are moved in `weights`. Configs are read and
written through `transformers` (its config classes know every default and every older spelling),
which needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from zip_rc_jax.config import ModelConfig, RopeScaling
from zip_rc_jax.models.io.huggingface import short
from zip_rc_jax.models.stacks import segments
from zip_rc_jax.models.transformer import Params, param_shapes
from zip_rc_jax.runtime.errors import UsageError

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
MOST_LAYERS = 512  # as llama.cpp; `stacks.segments` takes their cube
# Bounds of what a config.json says: beyond them nothing real lies, and a list of 2**60 layers would
# fill the memory.
_WHOLE = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "block_ff_dim",
    "max_position_embeddings"), 2**31 - 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
    "block_multiple_of"), 2**31 - 1),
    "num_hidden_layers": MOST_LAYERS, "sliding_window_pattern": MOST_LAYERS, "conv_L_cache": 4096,
}  # fmt: skip
_POSITIVE = (
    "rms_norm_eps", "norm_eps", "query_pre_attn_scalar", "final_logit_softcapping", "rope_theta",
    "rope_local_base_freq",
    "block_ffn_dim_multiplier",
)  # fmt: skip
_TRUTHS = (
    "tie_word_embeddings", "tie_embedding", "attention_bias", "mlp_bias", "conv_bias",
    "use_sliding_window", "block_auto_adjust_ff_dim",
    "use_bidirectional_attention",
)  # fmt: skip
# Settings of other architectures that change the numbers, with the values that change nothing. No
# family here reads them, and neither does transformers: a config.json that has one describes
# another model than its model_type says.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), (0,
    1)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "residual_multiplier", "embedding_multiplier",
    "scale_emb", "scale_depth"), (0, 1)),
    **dict.fromkeys(("clip_qkv", "alibi", "use_alibi", "parallel_attn", "use_parallel_residual",
    "attention_chunk_size"), (0,)),
    **dict.fromkeys(("attention_multiplier", "attention_scale", "mup_width_multiplier",
    "router_logit_softcapping"), (0,)),
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rope_interleaved": (0,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,), "is_encoder_decoder": (0,),
}  # fmt: skip
LAYER_NAMES = {"full_attention": "attention", "sliding_attention": "sliding", "conv": "conv"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of `transformers`.

    Attributes:
      model_type, architecture: as in config.json.
      read: settings of a config.json with all defaults filled in -> `ModelConfig`.
      write: the inverse, without sizes that all families spell the same.
      names: our parameter -> tensor name; "{layer}" stands for the layer's number.
    """

    model_type: str
    architecture: str
    read: Callable[[dict[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor of a checkpoint lies in our parameters.

    Attributes:
      name: in the checkpoint.
      shape: there.
      path: our parameter, as keys.
      layer: index along the leading axis "layers" of that parameter; None if it has none.
      part: shape of the tensor in our layout, without the layer axis.
      kind: "same" (only reshaped), "matrix" (torch keeps `[out, in]`, we keep `[in, out]`) or
        "conv" (`[d, 1, W]` <-> `[W, d]`).
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None
    part: tuple[int, ...]
    kind: str

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """A view where possible, so that reading a slice of the result reads only that slice of the
        file."""
        if self.kind == "conv":
            return array[:, 0].T
        return (array.T if self.kind == "matrix" else array).reshape(self.part)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "conv":
            return array.T[:, None]
        return (
            array.reshape(self.shape[::-1]).T
            if self.kind == "matrix"
            else array.reshape(self.shape)
        )


_MATRICES = {"q", "k", "v", "o", "gate", "up", "down", "conv_in", "conv_out"}


def tensors(family: Family, config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of this family and config holds."""
    shapes = param_shapes(config)
    for name in ("embed", "final_norm") if config.tied else ("embed", "final_norm", "unembed"):
        shape = shapes[name].shape
        yield Tensor(family.names[name], shape, (name,), None, shape, "same")
    for stack in (stack for segment in segments(config.kinds) for stack in segment.stacks):
        for name, leaf in shapes["blocks"][stack.name].items():
            part = leaf.shape[1:]
            kind = "conv" if name == "conv" else "matrix" if name in _MATRICES else "same"
            split = len(part) - 1 if name == "o" else 1  # input axes come first
            matrix = (int(np.prod(part[split:])), int(np.prod(part[:split])))
            shape = {
                "conv": (part[-1], 1, part[0]),
                "matrix": matrix,
                "same": (int(np.prod(part)),),
            }[kind]
            for index, layer in enumerate(stack.layers):
                yield Tensor(
                    family.names[name].format(layer=layer),
                    shape,
                    ("blocks", stack.name, name),
                    index,
                    part,
                    kind,
                )


def leaf(params: Params, path: tuple[str, ...]) -> Any:
    """The parameter at `path`."""
    for key in path:
        params = params[key]
    return params


# Settings that several families share.


def _positive(value: Any) -> bool:
    """Whether a setting is absent or a positive number that float32 can hold."""
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
    )


def _check_settings(given: dict[str, Any], where: str) -> None:
    """Checks types and sizes before anything is made of them, and that nothing asks for what no
    family computes.

    Raises:
      UsageError: a setting of the wrong type or size, or one that is not implemented.
    """

    def wrong(name: str, kind: str) -> UsageError:
        reason = (
            f"it is no valid {given['model_type']} config ({name}={repr(given[name])[:60]} "
            f"is {kind})"
        )
        return UsageError(where, reason, "correct it, or download the file again")

    for name, most in _WHOLE.items():
        value = given.get(name)
        if value is None and name in ("num_key_value_heads", "head_dim", "sliding_window"):
            continue
        if name in given and not (
            isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        ):
            raise wrong(name, f"no whole number from 1 to {most}")
    for name in _POSITIVE:
        if not _positive(given.get(name)):
            raise wrong(name, "no positive number")
    for name in _TRUTHS:
        if not isinstance(given.get(name), (bool, type(None))):
            raise wrong(name, "neither true nor false")
    capped = dict.fromkeys(
        ()
        if given["model_type"] == "gemma3_text"
        else ("final_logit_softcapping", "attn_logit_softcapping"),
        (0,),
    )
    for name, neutral in (_FOREIGN | capped).items():
        if given.get(name) is not None and given[name] not in neutral:
            raise UsageError(
                f"{where}: {name}={repr(given[name])[:60]}",
                "it is not implemented",
                "use another checkpoint",
            )


def _refuse(given: dict[str, Any], **wanted: Any) -> None:
    """Raises UsageError for a setting whose value this transformer does not implement."""
    for name, value in wanted.items():
        if given.get(name, value) not in (value, None):
            raise UsageError(
                f"config.json {name}={repr(given[name])[:60]}",
                f"only {value!r} is implemented",
                "use another checkpoint",
            )


def _activation(name: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise UsageError(
            f"activation {repr(name)[:60]}",
            f"this transformer knows {', '.join(ACTIVATION_NAMES)}",
            "use another checkpoint",
        )
    return ACTIVATION_NAMES[name]


def _write_activation(ours: str) -> str:
    return next(name for name, value in ACTIVATION_NAMES.items() if value == ours)


def _rope(given: dict[str, Any]) -> tuple[float, RopeScaling]:
    """Base and scaling from the `rope_parameters` of one layer type."""
    kind = given.get("rope_type", "default")
    _refuse(given, partial_rotary_factor=1.0)
    for name in (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        if not _positive(given.get(name)):
            raise UsageError(
                f"config.json rope {name}={repr(given[name])[:60]}",
                "it is no positive number",
                "correct it",
            )
    theta = float(given["rope_theta"])
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", float(given["factor"]))
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return theta, RopeScaling(
            "llama3",
            float(given["factor"]),
            low,
            high,
            int(given["original_max_position_embeddings"]),
        )
    raise UsageError(
        f"rope_type {repr(kind)[:60]}",
        "'default', 'linear' and 'llama3' are implemented",
        "use another checkpoint",
    )


def _write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_theta": theta,
        "rope_type": "default" if scaling.kind == "none" else scaling.kind,
    }
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = (
            scaling.low_freq_factor,
            scaling.high_freq_factor,
        )
        rope["original_max_position_embeddings"] = scaling.original_positions
    return rope


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    heads = given["num_attention_heads"]
    return {
        "vocab_size": given["vocab_size"],
        "d_model": given["hidden_size"],
        "n_layers": given["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": given["num_key_value_heads"] or heads,
        "head_dim": given.get("head_dim") or given["hidden_size"] // heads,
        "tied": bool(given["tie_word_embeddings"]),
        "max_positions": given["max_position_embeddings"],
    }


def _write_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
    }


def _layers(given: dict[str, Any]) -> dict[str, Any]:
    """`layer_types` (empty when all layers attend fully, as a model without them) and the window of
    sliding layers."""
    kinds = tuple(LAYER_NAMES[name] for name in given.get("layer_types") or ())
    return {
        "layer_types": () if set(kinds) <= {"attention"} else kinds,
        "sliding_window": given["sliding_window"] if "sliding" in kinds else 0,
    }


def _write_layers(config: ModelConfig) -> list[str]:
    names = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    return [names[kind] for kind in config.kinds]


# Llama (also SmolLM2).


def _read_llama(given: dict[str, Any]) -> ModelConfig:
    theta, scaling = _rope(given["rope_parameters"])
    return ModelConfig(
        **_sizes(given),
        d_ff=given["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=given["rms_norm_eps"],
        qk_norm=False,
        attention_bias=given["attention_bias"],
        mlp_bias=given["mlp_bias"],
        activation=_activation(given["hidden_act"]),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": _write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.rms_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": _write_activation(config.activation),
    }


_LAYER = "model.layers.{layer}."
_LLAMA_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
    "mixer_norm": _LAYER + "input_layernorm.weight",
    "mlp_norm": _LAYER + "post_attention_layernorm.weight",
    **{name: f"{_LAYER}self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")},
    **{f"{name}_bias": f"{_LAYER}self_attn.{name}_proj.bias" for name in ("q", "k", "v", "o")},
    **{name: f"{_LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"{name}_bias": f"{_LAYER}mlp.{name}_proj.bias" for name in ("gate", "up", "down")},
}


# Qwen2 (also Qwen2.5).


def _read_qwen2(given: dict[str, Any]) -> ModelConfig:
    theta, scaling = _rope(given["rope_parameters"])
    return ModelConfig(
        **_sizes(given),
        **_layers(given),
        d_ff=given["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=given["rms_norm_eps"],
        qk_norm=False,
        attention_bias=True,
        attention_output_bias=False,
        activation=_activation(given["hidden_act"]),
    )


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": _write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.rms_eps,
        "hidden_act": _write_activation(config.activation),
        "layer_types": _write_layers(config),
        "use_sliding_window": config.sliding_window > 0,
        "sliding_window": config.sliding_window or None,
    }


# Qwen3.


def _read_qwen3(given: dict[str, Any]) -> ModelConfig:
    theta, scaling = _rope(given["rope_parameters"])
    return ModelConfig(
        **_sizes(given),
        **_layers(given),
        d_ff=given["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=given["rms_norm_eps"],
        qk_norm=True,
        attention_bias=given["attention_bias"],
        activation=_activation(given["hidden_act"]),
    )


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": _write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.rms_eps,
        "attention_bias": config.attention_bias,
        "hidden_act": _write_activation(config.activation),
        "layer_types": _write_layers(config),
        "use_sliding_window": config.sliding_window > 0,
        "sliding_window": config.sliding_window or None,
    }


_QWEN3_NAMES = _LLAMA_NAMES | {
    f"{name}_norm": f"{_LAYER}self_attn.{name}_norm.weight" for name in ("q", "k")
}


# Gemma 3 (text).


def _read_gemma3(given: dict[str, Any]) -> ModelConfig:
    _refuse(given, use_bidirectional_attention=False)
    theta, scaling = _rope(given["rope_parameters"]["full_attention"])
    sliding_theta, sliding_scaling = _rope(given["rope_parameters"]["sliding_attention"])
    _refuse(
        {"rope_type of sliding_attention": sliding_scaling.kind},
        **{"rope_type of sliding_attention": "none"},
    )
    layers = _layers(given)
    return ModelConfig(
        **_sizes(given),
        **layers,
        d_ff=given["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_rope_theta=sliding_theta if layers["sliding_window"] else 0.0,
        rms_eps=given["rms_norm_eps"],
        norm_plus_one=True,
        qk_norm=True,
        post_norms=True,
        attention_bias=given["attention_bias"],
        attention_scale=given["query_pre_attn_scalar"] ** -0.5,
        # No `attention_softcap`: Gemma 3 dropped it, and transformers and llama.cpp do not apply a
        # stated attn_logit_softcapping.
        logit_softcap=given["final_logit_softcapping"] or 0.0,
        activation=_activation(given["hidden_activation"]),
        scale_embedding=True,
    )


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": _write_rope(config.rope_theta, config.rope_scaling),
            "sliding_attention": _write_rope(
                config.sliding_rope_theta or config.rope_theta, RopeScaling()
            ),
        },
        "rms_norm_eps": config.rms_eps,
        "attention_bias": config.attention_bias,
        # of 0 there is no root
        "query_pre_attn_scalar": max(
            1, round((config.attention_scale or config.head_dim**-0.5) ** -2)
        ),
        "final_logit_softcapping": config.logit_softcap or None,
        "hidden_activation": _write_activation(config.activation),
        "layer_types": _write_layers(config),
        "sliding_window": config.sliding_window or None,
    }


_GEMMA3_NAMES = _QWEN3_NAMES | {
    "mixer_post_norm": _LAYER + "post_attention_layernorm.weight",
    "mlp_norm": _LAYER + "pre_feedforward_layernorm.weight",
    "mlp_post_norm": _LAYER + "post_feedforward_layernorm.weight",
}


# LFM2.


def _read_lfm2(given: dict[str, Any]) -> ModelConfig:
    theta, scaling = _rope(given["rope_parameters"])
    width = given["intermediate_size"]
    # the published 350M and 1.2B state another width than the one they use
    if given["block_auto_adjust_ff_dim"]:
        multiple = given["block_multiple_of"]
        width = int(2 * width / 3)
        width = multiple * -(-int((given["block_ffn_dim_multiplier"] or 1) * width) // multiple)
    kinds = tuple(LAYER_NAMES[name] for name in given["layer_types"])
    return ModelConfig(
        **_sizes(given),
        d_ff=width,
        layer_types=() if set(kinds) == {"attention"} else kinds,
        conv_kernel=given["conv_L_cache"] if "conv" in kinds else 0,
        conv_bias=given["conv_bias"] and "conv" in kinds,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=given["norm_eps"],
        qk_norm=True,
    )


def _write_lfm2(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": _write_rope(config.rope_theta, config.rope_scaling),
        "norm_eps": config.rms_eps,
        "block_auto_adjust_ff_dim": False,
        "layer_types": _write_layers(config),
        "conv_L_cache": config.conv_kernel,
        "conv_bias": config.conv_bias,
    }


_LFM2_NAMES = _QWEN3_NAMES | {
    "final_norm": "model.embedding_norm.weight",
    "mixer_norm": _LAYER + "operator_norm.weight",
    "mlp_norm": _LAYER + "ffn_norm.weight",
    "q_norm": _LAYER + "self_attn.q_layernorm.weight",
    "k_norm": _LAYER + "self_attn.k_layernorm.weight",
    "o": _LAYER + "self_attn.out_proj.weight",
    "gate": _LAYER + "feed_forward.w1.weight",
    "up": _LAYER + "feed_forward.w3.weight",
    "down": _LAYER + "feed_forward.w2.weight",
    "conv_in": _LAYER + "conv.in_proj.weight",
    "conv_in_bias": _LAYER + "conv.in_proj.bias",
    "conv": _LAYER + "conv.conv.weight",
    "conv_bias": _LAYER + "conv.conv.bias",
    "conv_out": _LAYER + "conv.out_proj.weight",
    "conv_out_bias": _LAYER + "conv.out_proj.bias",
}

FAMILIES = (
    Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, _LLAMA_NAMES),
    Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, _LLAMA_NAMES),
    Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, _QWEN3_NAMES),
    Family("lfm2", "Lfm2ForCausalLM", _read_lfm2, _write_lfm2, _LFM2_NAMES),
    Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, _GEMMA3_NAMES),
)


def read_config(given: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Family and config of a config.json.

    Args:
      given: its contents; a multimodal Gemma 3 stands for its text model.
      where: the file, for messages.

    Raises:
      UsageError: an unknown architecture, a quantised checkpoint, or a setting that this
        transformer does not implement.
    """
    quantised = given.get("quantization_config")
    if not isinstance(given.get("text_config", {}), dict) and given.get("model_type") == "gemma3":
        raise UsageError(f"{where}: text_config", "it is no object", "download the file again")
    given = _of_the_text(given)
    model_type = given.get("model_type")
    family = next((f for f in FAMILIES if f.model_type == model_type), None)
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise UsageError(
            f"{where}: model_type {repr(model_type)[:60]}",
            f"the families are {known}",
            "use a checkpoint of one of them",
        )
    if quantised or given.get("quantization_config"):
        raise UsageError(
            f"{where}: quantization_config",
            "quantised Hugging Face checkpoints are not read",
            "use the bfloat16 one",
        )
    _check_settings(given, where)
    try:
        config = family.read(filled_settings(family, given))
    except UsageError:
        raise
    # config classes of transformers run into whatever a damaged file holds
    except Exception as error:
        raise UsageError(
            f"{where}", f"it is no valid {model_type} config ({short(error)})", "download it again"
        ) from error
    heads, head_dim = max(config.n_heads, config.n_kv_heads), config.head_dim
    if (
        not math.prod((config.d_model, max(config.vocab_size, config.d_ff, heads * head_dim)))
        < 2**40
    ):
        raise UsageError(
            f"{where}",
            "its sizes make a matrix of more than 2^40 numbers",
            "correct it, or download the file again",
        )
    return family, config


def _of_the_text(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the text model, where a config.json describes a multimodal Gemma 3."""
    if "text_config" in given and given.get("model_type") == "gemma3":
        return {"model_type": "gemma3_text", **given["text_config"]}
    return given


def filled_settings(family: Family, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the text model of a config.json, with all defaults of the family filled in."""
    from transformers import AutoConfig

    settings = {
        key: value
        for key, value in _of_the_text(given).items()
        if key not in ("model_type", "transformers_version")
    }
    return AutoConfig.for_model(family.model_type, **settings).to_dict()


def canonical(config: ModelConfig) -> ModelConfig:
    """Of all spellings of the same model one: defaults are resolved, and what no layer looks at has
    its default."""
    kinds, scaling = set(config.kinds), config.rope_scaling
    if scaling.kind != "llama3":
        scaling = (
            RopeScaling(scaling.kind, scaling.factor) if scaling.kind == "linear" else RopeScaling()
        )
    sliding_theta = config.sliding_rope_theta if "sliding" in kinds else 0.0
    # else 0 means scaled, and a number unscaled
    if "sliding" in kinds and not sliding_theta and scaling.kind == "none":
        sliding_theta = config.rope_theta
    return dataclasses.replace(
        config,
        layer_types=() if kinds == {"attention"} else config.layer_types,
        conv_bias=config.conv_bias and "conv" in kinds,
        attention_output_bias=config.attention_output_bias or not config.attention_bias,
        rope_scaling=scaling,
        sliding_rope_theta=sliding_theta,
        attention_scale=config.attention_scale or config.head_dim**-0.5,
    )


def write_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can express `config` exactly (however it is spelt), and the settings of
    its config.json.

    Raises:
      UsageError: no family can (for example conv layers with a Gemma norm).
    """
    for family in FAMILIES:
        settings = {"model_type": family.model_type} | _write_sizes(config) | family.write(config)
        try:
            if canonical(read_config(settings, "export")[1]) == canonical(config):
                return family, settings | {"architectures": [family.architecture]}
        except UsageError:
            continue
    raise UsageError(
        f"model {config}",
        "no Hugging Face architecture has this combination",
        "save it as an Orbax checkpoint",
    )
