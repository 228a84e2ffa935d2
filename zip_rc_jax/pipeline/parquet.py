"""The dataset of a stage as a Parquet file in the schema of the ZIP-RC authors' code."""

from __future__ import annotations

import pathlib
from typing import Any

from zip_rc_jax.config import PipelineConfig, PromptConfig, to_dict
from zip_rc_jax.data.parquet import (
    GenerationInfo,
    open_rollouts,
    read_generation,
    read_parquet_metadata,
    write_parquet,
)
from zip_rc_jax.data.rollouts import RolloutSource, summary_of
from zip_rc_jax.pipeline.run_dir import load_policy, run_directory, source_path
from zip_rc_jax.runtime.errors import UsageError


def export_parquet(config: PipelineConfig, directory: pathlib.Path) -> pathlib.Path:
    """Writes the dataset of a stage also as `run_dir/STAGE.parquet`, in the authors' schema;
    nothing if that is there already.

    Raises:
      UsageError: another file has that name, or it is unknown how the rollouts were sampled.
    """
    path = directory.with_name(f"{directory.name}.parquet")
    source = RolloutSource(directory)
    if not path.exists():
        write_parquet(path, source, settings=_generation(config, source), metadata=source.metadata)
    elif read_parquet_metadata(path) != source.metadata:
        raise UsageError(
            f"file {path}",
            f"it was not written from {directory}, or something else rewrote it",
            "rename or delete it",
        )
    return path


def _generation(
    config: PipelineConfig, source: RolloutSource
) -> GenerationInfo | list[GenerationInfo]:
    """How the rollouts of a stage's dataset were sampled, from the metadata of the stages before
    it.
    """
    origin = source.metadata
    while parent := origin.get("graded") or origin.get("rollouts"):
        origin = parent
    if "parquet" in origin:
        if not config.data or open_rollouts(source_path(config, ""))[1] != origin:
            raise UsageError(
                "format=parquet",
                "these rollouts come from a Parquet file, and its model_id, temperature, ... "
                "stand only there",
                "pass the same data=FILE to `zip-rc grade --format parquet`, then "
                "data=run_dir/graded.parquet to `zip-rc label`",
            )
        return read_generation(source_path(config, ""))
    policy = load_policy(config, dtype=config.dtype)
    if origin.get("policy") != policy.digest():
        raise UsageError(
            f"policy.path={config.policy.path!r}",
            "another policy sampled these rollouts",
            "set it to that one",
        )
    sampling, longest = origin["rollout"], int(summary_of(source).prompt.max(initial=0))
    template = policy.tokenizer.chat_template or ""

    def info(prompt: dict[str, Any]) -> GenerationInfo:
        return GenerationInfo(
            model_id=config.policy.path or str(run_directory(config) / "policy"),
            temperature=sampling["temperature"],
            min_p=sampling["min_p"],
            max_model_len=min(policy.config.max_positions, longest + sampling["max_tokens"]),
            reasoning_enabled=asks_for_reasoning(prompt, template),
        )

    prompt = origin["prompt"]
    if not prompt.get("variants"):
        return info(prompt)
    settings = PromptConfig(**prompt)
    infos = [info(to_dict(settings.variant(i))) for i in range(len(settings.variants))]
    return [infos[rollout.variant] for rollout in source]


def asks_for_reasoning(prompt: dict[str, Any], template: str) -> bool:
    """Whether these prompts let the model think first: templates that can (Qwen3's) do unless
    `enable_thinking` is false.
    """
    return (
        prompt["style"] == "chat"
        and "enable_thinking" in template
        and bool(prompt["chat_template_kwargs"].get("enable_thinking", True))
    )
