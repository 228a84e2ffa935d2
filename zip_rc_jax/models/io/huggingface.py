"""Hugging Face checkpoint directories: config.json, safetensors shards, tokenizer files."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.temporaries import temporary_directory

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 2 * 2**30
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what is read


class SafetensorsSource:
    """The shards of a directory.

    Nothing stays open or mapped between reads, so the pages of the file do not pile up in memory.

    Raises:
      UsageError: no safetensors, a missing, truncated or damaged shard, or tensors that are no
        floating-point numbers.
    """

    def __init__(self, directory: pathlib.Path):
        self.where = str(directory)
        self._shard: dict[str, pathlib.Path] = {}
        self._stored: dict[str, str] = {}  # our spelling of a name -> the file's
        self.shapes: dict[str, tuple[int, ...]] = {}
        _refuse_other_formats(directory)
        for path in self._shards(directory):
            with _open(path) as file:
                for stored in file.keys():  # noqa: SIM118  (it is no dict)
                    name = _plain_name(stored)
                    if name is None:
                        continue
                    if name in self._shard:
                        reason = (
                            f"tensor {name[:80]} is there twice, also in {self._shard[name].name}"
                        )
                        raise UsageError(f"shard {path}", reason, "download the checkpoint again")
                    part = file.get_slice(stored)
                    if part.get_dtype() not in FLOATS:
                        reason = (
                            f"tensor {name[:80]} is of type {part.get_dtype()}; "
                            f"floating-point numbers are read: {', '.join(FLOATS)}"
                        )
                        raise UsageError(
                            f"shard {path}",
                            reason,
                            "use the checkpoint in bfloat16, which is not quantised",
                        )
                    self._shard[name], self._stored[name] = path, stored
                    self.shapes[name] = tuple(part.get_shape())

    @staticmethod
    def _shards(directory: pathlib.Path) -> list[pathlib.Path]:
        paths = [directory / SINGLE]
        if (directory / INDEX).is_file():
            try:
                names = read_json(directory / INDEX).get("weight_map")
            except UsageError as error:
                raise UsageError(
                    f"{directory / INDEX}", f"it is damaged ({error.reason})", error.fix
                ) from None
            if (
                not isinstance(names, dict)
                or not names
                or not all(isinstance(name, str) for name in names.values())
            ):
                reason = "it is damaged (its weight_map does not name a file for each tensor)"
                raise UsageError(f"{directory / INDEX}", reason, "download it again")
            files = sorted(set(names.values()))
            for name in files:
                if (
                    pathlib.PurePath(name).name != name
                    or "\0" in name
                    or name in ("", ".", "..")
                    or len(name) > 250
                ):
                    reason = f"it is damaged (shard {repr(name)[:60]} is no file of this directory)"
                    raise UsageError(f"{directory / INDEX}", reason, "download it again")
            if paths[0].is_file() and SINGLE not in files:
                reason = f"{SINGLE} and {INDEX} are both there, and they name different files"
                raise UsageError(
                    f"checkpoint {directory}",
                    reason,
                    "delete the one that does not belong to the model",
                )
            paths = [directory / name for name in files]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            other = [path.name for path in directory.glob("*.bin")]
            fix = (
                f"convert {other[0][:80]} to safetensors"
                if other
                else "download the checkpoint again"
            )
            raise UsageError(
                f"checkpoint {directory}", f"{', '.join(absent[:5])[:300]} is not there", fix
            )
        return paths

    def read(self, name: str) -> np.ndarray:
        with _open(self._shard[name]) as file:
            return file.get_tensor(self._stored[name])


def refuse_adapter(directory: pathlib.Path) -> None:
    """Raises UsageError for a directory with a LoRA adapter and no weights of a whole model."""
    if (directory / "adapter_config.json").is_file() and not any(
        directory.glob("model*.safetensors")
    ):
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        raise UsageError(
            f"model {directory}",
            f"it is an adapter (LoRA) for {str(base)[:80]}, not a whole model",
            "merge it into that model (`merge_and_unload` of the package peft), save the result, "
            "and pass that directory",
        )


def _refuse_other_formats(directory: pathlib.Path) -> None:
    """Raises UsageError for adapters and for directories that another file says are quantised."""
    refuse_adapter(directory)
    for name in ("quantize_config.json", "quant_config.json"):  # of GPTQ and AWQ
        if (directory / name).is_file():
            raise UsageError(
                f"{directory / name}",
                "quantised Hugging Face checkpoints are not read",
                "use the bfloat16 one",
            )


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(
            f"shard {path}", f"it is truncated or damaged ({short(error)})", "download it again"
        ) from None


def _plain_name(stored: str) -> str | None:
    """The name as a text-only checkpoint spells it; None for tensors that no text model reads
    (vision towers, old RoPE buffers)."""
    if stored.startswith(
        (
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        )
    ):
        return None
    if stored.endswith("rotary_emb.inv_freq"):
        return None
    return re.sub(
        r"^(language_model\.model|model\.language_model)\.", "model.", stored
    ).removeprefix("language_model.")


def short(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file, with or without a byte-order mark.

    Raises UsageError for any other, and for an empty one.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path}", f"it cannot be read ({short(error)})", "download it again"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path}",
            "it cannot be read (it is not UTF-8)",
            "download it again, or save it as UTF-8",
        ) from None
    if not text.strip("\0 \t\r\n"):
        raise UsageError(f"{path}", "it cannot be read (it is empty)", "download it again")
    return text


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises UsageError for a file that is not a JSON object."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path}", f"it cannot be read ({short(error)})", "download it again"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}", "it is not a JSON object", "download it again")
    return value


def local_copy(path: str | pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """Where a model lies: the path itself, or the local copy of a model id of the hub.

    Args:
      weights: see `download`.

    Raises:
      UsageError: see `download`.
    """
    name, local = str(path), pathlib.Path(path).expanduser().absolute()
    is_id = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    if local.exists() or not is_id or name.endswith(".gguf"):
        return local
    return download(name, weights=weights)


def download(name: str, *, weights: bool = True) -> pathlib.Path:
    """The local copy of a model of the Hugging Face hub, downloaded now if need be.

    Args:
      weights: False leaves out the tensors, for what reads the tokenizer alone.

    Raises:
      UsageError: there is no such model, or no network.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        patterns = [x for x in _WANTED if weights or x != "*.safetensors"]
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    # HTTPError: also of a proxy, or in the middle
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UsageError(
            f"model {name!r}",
            f"it is no local path, and the hub did not give it ({reason})",
            "check the name, network and HF_TOKEN",
        ) from None


def write_checkpoint(
    directory: pathlib.Path,
    settings: dict[str, Any],
    tensors: Iterator[tuple[str, np.ndarray]],
    tokenizer: Any,
    dtype: str,
    generation: dict[str, Any] | None = None,
) -> None:
    """Writes config.json, generation_config.json, tokenizer files and safetensors shards; complete
    or absent.

    Args:
      settings: config.json, without dtype and end-of-sequence ids.
      tensors: name and array of every tensor; one shard of them (2 GiB) is held at a time.
      tokenizer: a `Tokenizer`.
      generation: further entries of generation_config.json.

    Raises:
      UsageError: `directory` exists.
    """
    from transformers import AutoConfig

    if directory.exists():
        raise UsageError(
            f"directory {directory}", "it exists and is not overwritten", "choose another path"
        )
    with temporary_directory(directory) as temporary:
        temporary.mkdir()
        eos = list(tokenizer.eos_ids)
        rest = {key: value for key, value in settings.items() if key != "model_type"}
        AutoConfig.for_model(
            settings["model_type"], **rest, dtype=dtype, eos_token_id=eos
        ).save_pretrained(temporary)
        written = read_json(temporary / CONFIG)
        written |= _older_spellings(written)
        (temporary / CONFIG).write_text(
            json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        said = json.dumps({**(generation or {}), "eos_token_id": eos}, indent=2)
        (temporary / "generation_config.json").write_text(said + "\n", encoding="utf-8")
        tokenizer.save_pretrained(temporary)
        _write_shards(temporary, tensors)
        temporary.rename(directory)


def _older_spellings(settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads where 5 writes `rope_parameters` and `dtype`.

    It ignores both without a word and takes the usual base of the family, unscaled. 5 understands
    these spellings beside its own.
    """
    full, older = settings["rope_parameters"], {"torch_dtype": settings["dtype"]}
    if "full_attention" in full:  # Gemma 3
        older["rope_local_base_freq"] = full["sliding_attention"]["rope_theta"]
        full = full["full_attention"]
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    return older | {
        "rope_theta": full["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }


def _write_shards(directory: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Fills shards in the given order; their final names are known when their number is."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / SINGLE)
        return
    names = [
        f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))
    ]
    for number, name in enumerate(names):
        (directory / f"{number}.safetensors").rename(directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {t: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
