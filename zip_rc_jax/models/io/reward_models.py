"""Reward models of Hugging Face: sequence-classification checkpoints with one label."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.models.io import huggingface
from zip_rc_jax.models.io.families import Family, filled_settings, read_config, tensors
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.io.weights import check_names, load_params
from zip_rc_jax.models.reward_model import RewardModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import Layout, single_device

SCORE = "score.weight"
KIND = "ForSequenceClassification"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")  # transformers has no such class for LFM2


def load_reward_model(
    path: str | pathlib.Path, *, layout: Layout | None = None, dtype: Any = jnp.float32
) -> RewardModel:
    """Loads a reward model straight onto the devices of `layout`, tensor by tensor.

    Args:
      path: a Hugging Face directory (config.json, safetensors, tokenizer) of a Llama, Qwen2, Qwen3
        or Gemma 3 sequence-classification model with one label; or a model id such as
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B", downloaded if it is no local path.
      layout: default one device.
      dtype: of the parameters in memory, e.g. "bfloat16".

    Raises:
      UsageError: nothing there, another kind of model (a causal LM, several labels, an unknown
        body), or damaged or incomplete files.
    """
    return RewardCheckpoint.open(path).load(layout=layout, dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardCheckpoint:
    """A reward model on disk, whose names and shapes are checked. No weight is read before `load`.

    So what must be refused is refused early, and the weights take memory only while they are used.

    Attributes:
      where: its directory.
      family, config: of the body; see `RewardModel`.
      tokenizer, pad_id: see `RewardModel`.
      source: its tensors.
    """

    where: str
    family: Family
    config: ModelConfig
    tokenizer: Tokenizer
    pad_id: int | None
    source: huggingface.SafetensorsSource

    @classmethod
    def open(cls, path: str | pathlib.Path) -> RewardCheckpoint:
        """Reads config.json, the tokenizer and the list of tensors.

        Raises:
          UsageError: see `load_reward_model`.
        """
        directory = huggingface.local_copy(path)
        huggingface.refuse_adapter(directory)
        given = _settings(directory, str(path))
        where = str(directory / huggingface.CONFIG)
        family, config = read_config(given, where)
        _check_kind(given, family, where)
        config = dataclasses.replace(config, tied=True)
        pad_id = filled_settings(family, given).get("pad_token_id")
        if pad_id is not None and (not isinstance(pad_id, int) or isinstance(pad_id, bool)):
            reason = "it is no token id"
            raise UsageError(f"{where}: pad_token_id={shown(pad_id)}", reason, "correct it")
        source = huggingface.SafetensorsSource(directory)
        _check_score(source, config)
        # A repeated unembedding belongs to the causal LM that the body was taken from.
        ignored = {SCORE, family.names["unembed"]}
        check_names(source, list(tensors(family, config)), ignored)
        for name in ignored:
            source.shapes.pop(name, None)
        tokenizer = Tokenizer.from_pretrained(directory).limited(config.vocab_size)
        return cls(str(directory), family, config, tokenizer, pad_id, source)

    def load(self, *, layout: Layout | None = None, dtype: Any = jnp.float32) -> RewardModel:
        """Reads the weights; see `load_reward_model`.

        Raises:
          UsageError: a damaged file, or a tensor that is not finite.
        """
        layout, dtype = layout or single_device(), jnp.dtype(dtype)
        score = self.source.read(SCORE)[0].astype(dtype)
        if not np.isfinite(score.astype(np.float32)).all():
            raise UsageError(
                f"tensor {SCORE} of {self.where}",
                "it holds NaN or infinite numbers",
                "download it again",
            )
        body = load_params(self.config, self.family, self.source, dtype, layout)
        sharding = layout.sharding((None,), score.shape)
        weights = jax.make_array_from_callback(score.shape, sharding, lambda index: score[index])
        params, info = {"body": body, "score": weights}, {"source": self.where}
        return RewardModel(self.config, self.tokenizer, params, self.pad_id, layout, info)


def _settings(directory: pathlib.Path, path: str) -> dict[str, Any]:
    """config.json of a directory.

    Raises UsageError where there is none.
    """
    if (directory / huggingface.CONFIG).is_file():
        return huggingface.read_json(directory / huggingface.CONFIG)
    fix = "pass a Hugging Face directory or model id of a sequence-classification model"
    if directory.suffix == ".gguf":
        reason = "the score head of a reward model is not read from GGUF files"
    elif (directory / "meta").is_dir() or (directory / "model").is_dir():
        reason = "it is a policy written by this package, and gives no score"
    elif directory.is_dir():
        reason = f"there is no {huggingface.CONFIG} there"
    else:
        reason = "there is no such directory"
    raise UsageError(f"reward model {path}", reason, fix)


def is_reward_model(given: dict[str, Any]) -> bool:
    """Whether a config.json describes a sequence-classification model."""
    return any(name.endswith(KIND) for name in _architectures(given))


def _architectures(given: dict[str, Any]) -> list[str]:
    stated = given.get("architectures")
    return [str(name) for name in stated] if isinstance(stated, list) else []


def _check_kind(given: dict[str, Any], family: Family, where: str) -> None:
    """Raises UsageError for a causal LM, a body without such a class, or several labels."""
    stated = _architectures(given)
    if stated and not is_reward_model(given):
        raise UsageError(
            f"reward model {where}",
            f"it is a {', '.join(stated)[:100]}, which gives no score",
            f"pass a ...{KIND} model; a policy is loaded by `zip_rc_jax.load`",
        )
    if family.model_type not in FAMILIES:
        raise UsageError(
            f"reward model {where}",
            f"its body is {family.model_type}, and bodies of {', '.join(FAMILIES)} are known",
            "use a reward model on one of these",
        )
    labels = given.get("num_labels")
    if isinstance(given.get("id2label"), dict):
        labels = len(given["id2label"])
    if labels not in (None, 1):
        raise _several_labels(where, labels)


def _several_labels(where: str, labels: Any) -> UsageError:
    return UsageError(
        f"reward model {where}: num_labels={shown(labels)}",
        "a reward is one number",
        "use a model with one label; a classifier of several classes is no reward model",
    )


def _check_score(source: huggingface.SafetensorsSource, config: ModelConfig) -> None:
    """Raises UsageError unless there is one row of score weights, without a bias."""
    shape = source.shapes.get(SCORE)
    if shape is None:
        others = [name for name in source.shapes if not name.startswith("model.")]
        names = f" (beside the body it has {', '.join(others[:3])[:200]})" if others else ""
        raise UsageError(
            f"reward model {source.where}",
            f"it has no {SCORE}{names}",
            f"use a checkpoint that transformers saved as a ...{KIND} model",
        )
    if len(shape) == 2 and shape[0] != 1:
        raise _several_labels(source.where, shape[0])
    if shape != (1, config.d_model):
        raise UsageError(
            f"tensor {SCORE} of {source.where}",
            f"its shape is {shape} instead of {(1, config.d_model)}",
            "check config.json, or download the checkpoint again",
        )
