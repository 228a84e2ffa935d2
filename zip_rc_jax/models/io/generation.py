"""The sampling values of a checkpoint's own generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zip_rc_jax.config.checks import shown
from zip_rc_jax.runtime.errors import UsageError

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# About ids, lengths, caches and the file itself: nothing that says how a token is drawn.
NO_SAMPLING = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config"),
    *("transformers_version", "_from_model_config", "return_dict_in_generate", "output_scores"),
    *("output_attentions", "output_hidden_states", "output_logits", "num_return_sequences"),
    *("trust_remote_code", "chat_format", "max_window_size", "disable_compile"),
}
# With these values an option changes nothing.
OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "early_stopping": (False,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "low_memory": (False,),
    "top_h": (),
    "penalty_alpha": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


def sampling_values(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling options that a generation_config.json names, under the names of `DecodeConfig`.

    `do_sample: false` is a temperature of 0. What it does not name is left out, since the defaults
    of transformers are not taken.

    Raises:
      UsageError: it is empty, or sets something that this package does not do; that is named.
    """
    name = f"the checkpoint's {FILE}"
    fix = "leave out generation_config, and name the sampling options yourself"
    if not generation:
        raise UsageError(name, "the checkpoint has none", fix)
    known = {*SAMPLING, *NO_SAMPLING, "do_sample"}
    given = {key: value for key, value in generation.items() if value is not None}
    unknown = [k for k, v in given.items() if k not in known and v not in OFF.get(k, ())]
    if unknown:
        listed = ", ".join(f"{key}={shown(given[key], 40)}" for key in unknown[:8])
        raise UsageError(f"{name} with {listed}", "nothing here does that", fix)
    values = {key: given[key] for key in SAMPLING if key in given}
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    return values
