"""From a name to a `LanguageModel`: our Orbax checkpoints, Hugging Face directories and hub names,
GGUF files; and back to Hugging Face."""

from __future__ import annotations

import dataclasses
import pathlib
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import LENGTH_COUNTS, ModelConfig
from zip_rc_jax.config.checks import one_of
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead
from zip_rc_jax.models.io import huggingface
from zip_rc_jax.models.io.families import read_config, write_config
from zip_rc_jax.models.io.generation import FILE as GENERATION_FILE
from zip_rc_jax.models.io.head_files import attach_head, read_head
from zip_rc_jax.models.io.reward_models import SCORE, is_reward_model
from zip_rc_jax.models.io.stored import DIGESTS, read_meta, read_model_params
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.io.weights import load_params, read_params
from zip_rc_jax.models.language_model import FORMAT, LanguageModel
from zip_rc_jax.models.transformer import param_axes, param_shapes, unembedding
from zip_rc_jax.runtime.buckets import is_bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import Layout, single_device
from zip_rc_jax.runtime.storage import in_short, writing
from zip_rc_jax.runtime.working_copy import fetched

ZIP_BLOCK = "zip_rc"


def embedded(name: str) -> pathlib.Path:
    """A model or config that ships inside the package, for example "chain_sum_policy".

    Raises UsageError for an unknown name.
    """
    path = pathlib.Path(str(resources.files("zip_rc_jax"))) / "assets" / name
    if not path.exists():
        known = sorted(p.name for p in path.parent.iterdir() if p.is_dir())
        raise UsageError(
            f"embedded {name!r}", f"the package ships {', '.join(known)}", "use one of these"
        )
    return path


def load(
    path: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
    zip_label: str | None = None,
    zip_first_id: int | None = None,
    zip_length_counts: str | None = None,
    head: str | pathlib.Path | None = None,
) -> LanguageModel:
    """Loads a model straight onto the devices of `layout`, tensor by tensor.

    Args:
      path: one of
        a checkpoint of this package, or a training directory that holds one as `model/`;
        "embedded:NAME" for one that ships with the package;
        a Hugging Face directory (config.json, safetensors, tokenizer): Llama, Qwen2, Qwen3, LFM2
        or Gemma 3; a GGUF file of one of these families (quantised blocks are expanded);
        a Hugging Face model id such as "Qwen/Qwen3-1.7B", downloaded if it is no local path.
      dtype: of the parameters in memory, e.g. "bfloat16".
      layout: default one device.
      zip_label, zip_first_id: for the paper authors' checkpoints, which do not say where their
        joint lies: "correct" (2x8 cells) or "value" (7x8), and the first reserved id (151669 with
          Qwen3). Checkpoints that we wrote know it.
      zip_length_counts: with `zip_label`, whether the lengths that the joint was trained on count
        the end token. The authors' code counts "without_end" (the default), so the edges of the
        grid are one token higher than theirs (see `Grid.counting_the_end_token`), and all that
        reads the head counts as everywhere here. "with_end" takes their edges as they are.

    Raises:
      UsageError: nothing there, an unknown format or architecture, damaged or incomplete files, an
        impossible reserved range, or a head of another model.
    """
    if head is None:
        return _load(path, dtype, layout, zip_label, zip_first_id, zip_length_counts)
    read_head(head)  # what is wrong with it is said before the model is read
    return attach_head(_load(path, dtype, layout, zip_label, zip_first_id, zip_length_counts), head)


def _load(
    path: str | pathlib.Path,
    dtype: Any,
    layout: Layout | None,
    zip_label: str | None,
    zip_first_id: int | None,
    zip_length_counts: str | None,
) -> LanguageModel:
    """`load` without a head of another file."""
    layout, dtype = layout or single_device(), jnp.dtype(dtype)
    if (zip_label is None) != (zip_first_id is None):
        raise UsageError(
            f"zip_label={zip_label}, zip_first_id={zip_first_id}",
            "one without the other says nothing",
            "give both or neither",
        )
    if zip_length_counts is not None:
        one_of("zip_length_counts", zip_length_counts, LENGTH_COUNTS)
        if zip_label is None:
            raise UsageError(
                f"zip_length_counts={zip_length_counts!r} without zip_label",
                "it is about a joint that the checkpoint does not describe",
                "give zip_label and zip_first_id too, or leave it out",
            )
    given = None
    if zip_label is not None and zip_first_id is not None:
        given = _Given(zip_label, zip_first_id, zip_length_counts)
    local = _local(path)
    if local.suffix == ".gguf" and local.is_file():
        return _load_gguf(local, dtype, layout, given)
    huggingface.refuse_adapter(local)
    if (local / huggingface.CONFIG).is_file():
        return _load_huggingface(local, dtype, layout, given)
    if given and local.is_dir():
        if (local / "meta").is_dir() or (local / "model").is_dir():
            raise UsageError(
                f"zip_label={zip_label!r} for {path}",
                "only foreign checkpoints need it",
                "leave it out",
            )
        raise UsageError(
            f"model {path}",
            f"there is no {huggingface.CONFIG} there",
            "pass the directory that holds it",
        )
    return _load_orbax(local, dtype, layout)


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a model of any kind that `load` reads, without its weights.

    Raises:
      UsageError: see `load`.
    """
    local = _local(path, weights=False)
    if local.suffix == ".gguf" and local.is_file():
        return Tokenizer.from_gguf(local)
    if (local / huggingface.CONFIG).is_file():
        return Tokenizer.from_pretrained(local)
    local, meta = _orbax_meta(local)
    try:
        return Tokenizer.from_dict(meta["tokenizer"])
    except MemoryError:
        raise
    except Exception as error:  # the tokenizer's library raises a bare Exception
        raise _other_version(local, error) from None


def _local(path: str | pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """Where a model lies on this machine; that of a hub name is downloaded."""
    name = str(path)
    if name.startswith("embedded:"):
        return embedded(name.removeprefix("embedded:"))
    if is_bucket(name):
        return fetched(name, "model")
    return huggingface.local_copy(path, weights=weights)


class _Given(NamedTuple):
    """What the caller says about a head that the checkpoint does not describe; see `load`."""

    label: str
    first_id: int
    length_counts: str | None

    def grid(self) -> Grid:
        grid = Grid.authors(self.label)
        return grid if self.length_counts == "with_end" else grid.counting_the_end_token()


def _load_huggingface(
    path: pathlib.Path, dtype: Any, layout: Layout, given: _Given | None
) -> LanguageModel:
    settings = huggingface.read_json(path / huggingface.CONFIG)
    block = settings.pop(ZIP_BLOCK, None)
    family, config = read_config(settings, str(path / huggingface.CONFIG))
    source = huggingface.SafetensorsSource(path)
    if is_reward_model(settings) or SCORE in source.shapes:
        raise UsageError(
            f"model {path}",
            "it is a reward model: it scores texts and predicts no token",
            "load it with `zip_rc_jax.load_reward_model`; as a policy, pass a ...ForCausalLM model",
        )
    tokenizer = Tokenizer.from_pretrained(path).limited(config.vocab_size)
    head = _head(block, given, tokenizer, config, str(path))
    params = load_params(config, family, source, dtype, layout)
    written = path / GENERATION_FILE
    generation = huggingface.read_json(written) if written.is_file() else {}
    info = {"source": str(path)}
    lm = LanguageModel(config, tokenizer, {"body": params}, None, layout, info, generation)
    return _with_rows(lm, head)


def _load_gguf(
    path: pathlib.Path, dtype: Any, layout: Layout, given: _Given | None
) -> LanguageModel:
    from zip_rc_jax.models.io.gguf import GgufSource

    source = GgufSource(path)
    family, config = read_config(source.settings, str(path))
    tokenizer = Tokenizer.from_gguf(path).limited(config.vocab_size)
    head = _head(None, given, tokenizer, config, str(path))
    params = load_params(config, family, source, dtype, layout)
    return _with_rows(
        LanguageModel(config, tokenizer, {"body": params}, None, layout, {"source": str(path)}),
        head,
    )


def _head(
    block: dict[str, Any] | None,
    given: _Given | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    where: str,
) -> ZipHead | None:
    """The head that config.json describes, or that the caller does, checked against tokenizer and
    vocabulary."""
    if block is None and given is None:
        return None
    if block is not None:
        try:
            head = ZipHead.from_dict(block)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{ZIP_BLOCK} block of {where}",
                f"it is damaged ({error!r})",
                "export the model again",
            ) from None
        if given and given[:2] != (head.label, head.first_id):
            raise UsageError(
                f"zip_label, zip_first_id = {given[:2]}",
                f"{where} says {(head.label, head.first_id)}",
                "leave them out",
            )
        if given and given.length_counts is not None:
            raise UsageError(
                f"zip_length_counts={given.length_counts!r}",
                f"{where} says where its length bins end: {list(head.grid.length_edges)}",
                "leave it out",
            )
    else:
        assert given is not None
        head = ZipHead(given.grid(), given.label, given.first_id, tokenizer.used)
    _check(head, tokenizer, config, where)
    return head


def _check(head: ZipHead, tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Raises UsageError for a head that does not fit the tokenizer or the vocabulary beside it."""
    if head.used_ids != tokenizer.used:
        raise UsageError(
            f"model {where}",
            f"it says {head.used_ids} used ids, its tokenizer uses {tokenizer.used}",
            "export it again",
        )
    head.check(config.vocab_size, tokenizer.free_ids(config.vocab_size))


def _with_rows(lm: LanguageModel, head: ZipHead | None) -> LanguageModel:
    """Attaches a head whose rows lie in the unembedding."""
    if head is None:
        return lm
    rows = unembedding(lm.config, lm.params["body"])[head.first_id : head.last_id]
    return dataclasses.replace(lm, head=head, params={**lm.params, "zip_rows": rows})


def _orbax_meta(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Where one of our checkpoints lies, and its meta data."""
    if (path / "model").is_dir() and not (path / "meta").is_dir():
        path = path / "model"
    if not path.is_dir():
        raise UsageError(
            f"model {path}",
            "there is no such directory",
            "pass a checkpoint written by `zip-rc train`, or a published model",
        )
    meta = read_meta(path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UsageError(
            f"model {path}",
            "it was not written by this package",
            "pass a checkpoint written by `zip-rc train`",
        )
    return path, meta


def _other_version(path: pathlib.Path, error: Exception) -> UsageError:
    reason = f"another version of this package wrote it, or it was damaged ({in_short(error)})"
    return UsageError(f"model {path}", reason, "use that version, or copy or train it again")


def _load_orbax(path: pathlib.Path, dtype: Any, layout: Layout) -> LanguageModel:
    path, meta = _orbax_meta(path)
    try:
        config = ModelConfig.from_dict(meta["model"])
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        head = ZipHead.from_dict(meta["head"]) if meta["head"] else None
        info = dict(meta["info"])
        generation = dict(meta.get("generation_config", {}))
        shapes, axes = _shapes(config, head), _axes(config, head)
    except MemoryError:
        raise
    # a checkpoint without digests may hold anything, and the tokenizer's library raises a bare
    # Exception
    except Exception as error:
        raise _other_version(path, error) from None
    if head:
        _check(head, tokenizer, config, str(path))
    wanted = jax.tree.map(
        lambda s, a: jax.ShapeDtypeStruct(s.shape, dtype, sharding=layout.sharding(a, s.shape)),
        shapes,
        axes,
    )
    params = read_model_params(path, wanted, meta.get(DIGESTS, {}).get("params"))
    return LanguageModel(config, tokenizer, params, head, layout, info, generation)


def _shapes(config: ModelConfig, head: ZipHead | None) -> dict[str, Any]:
    rows = (
        {"zip_rows": jax.ShapeDtypeStruct((head.grid.n_cells, config.d_model), jnp.float32)}
        if head
        else {}
    )
    return {"body": param_shapes(config)} | rows


def _axes(config: ModelConfig, head: ZipHead | None) -> dict[str, Any]:
    return {"body": param_axes(config)} | ({"zip_rows": ("cells", "embed")} if head else {})


def export(lm: LanguageModel, directory: str | pathlib.Path, *, dtype: Any = jnp.bfloat16) -> str:
    """Writes a Hugging Face directory that other engines load; complete or absent.

    The reserved rows are folded into the unembedding, and config.json says in its `zip_rc` block
    where they lie, on which grid and with which label. Tensors that training did not touch come out
    bit-identical to the checkpoint that was loaded, if `dtype` is its.

    Args:
      dtype: of the written tensors.

    Returns:
      a sentence that says whether the embedding had to be untied.

    Raises:
      UsageError: `directory` exists, or no Hugging Face architecture can express the model.
    """
    config, body, note = lm.config, dict(lm.params["body"]), "The unembedding was written as it is."
    if lm.head:
        table = lm.folded_table()
        note = "The reserved rows were folded into the unembedding."
        reserved = slice(lm.head.first_id, lm.head.last_id)
        if config.tied and not np.array_equal(
            np.asarray(table[reserved]), np.asarray(body["embed"][reserved])
        ):
            config = dataclasses.replace(config, tied=False)
            note = (
                "The reserved rows were folded into the unembedding, which is therefore no "
                "longer tied to the embedding."
            )
        if not config.tied:
            body["unembed"] = table
    family, settings = write_config(config)
    for role in ("bos", "pad"):  # or other engines take the numbers that are usual in the family
        token = lm.tokenizer.special_tokens.get(f"{role}_token")
        settings[f"{role}_token_id"] = (
            None if token is None else lm.tokenizer.backend.token_to_id(token)
        )
    if lm.head:
        settings[ZIP_BLOCK] = lm.head.to_dict()
    tensors = read_params(config, family, body, dtype)
    with writing(f"model {directory}"):
        huggingface.write_checkpoint(
            pathlib.Path(directory).absolute(),
            settings,
            tensors,
            lm.tokenizer,
            str(jnp.dtype(dtype)),
            lm.generation_config,
        )
    return note
