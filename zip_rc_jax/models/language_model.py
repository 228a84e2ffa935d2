"""A language model with its ZIP head: what is loaded, trained, decoded and saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tokenizers

from zip_rc_jax.config import ModelConfig, to_dict
from zip_rc_jax.errors import UsageError
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.tokenizer import Tokenizer
from zip_rc_jax.models.transformer import init_params, param_axes, param_shapes, unembedding
from zip_rc_jax.sharding import Layout, single_device
from zip_rc_jax.zip_head import ZipHead, fit_vocabulary, fold, padded_vocab_size

FORMAT = "zip_rc_jax/1"


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A transformer, its tokenizer and (once attached) its ZIP head.

    Attributes:
      config: sizes.
      tokenizer: text <-> ids.
      params: `{"body": transformer parameters, "zip_rows": [cells, d_model]}`; no "zip_rows" without a head.
      head: grid, label kind and reserved range; None for a plain policy.
      layout: mesh and sharding rules that decoding uses.
      info: how it was made (JSON-able).
    """

    config: ModelConfig
    tokenizer: Tokenizer
    params: dict[str, Any]
    head: ZipHead | None = None
    layout: Layout = dataclasses.field(default_factory=single_device)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, config: ModelConfig, tokenizer: Tokenizer, seed: int) -> LanguageModel:
        """Random parameters. Raises UsageError if the vocabulary is smaller than the tokenizer's."""
        if config.vocab_size < tokenizer.size:
            raise UsageError(f"model.vocab_size={config.vocab_size}", f"the tokenizer uses {tokenizer.size} ids", "raise it")
        return cls(config, tokenizer, {"body": init_params(config, seed)})

    def with_head(self, grid: Grid, label: str) -> LanguageModel:
        """The same model with a fresh head for `grid`: zero rows (a uniform joint) at the first ids that the tokenizer does not use.

        If too few ids are unused, the vocabulary is padded to a multiple of 128. Next-token logits do not change.
        """
        used = self.tokenizer.size
        head = ZipHead(grid, label, used, used)
        vocab_size = max(self.config.vocab_size, padded_vocab_size(used, grid))
        body = dict(self.params["body"])
        for name in ("embed", "unembed"):
            if name in body:
                body[name] = fit_vocabulary(body[name], vocab_size)
        rows = jnp.zeros((grid.n_cells, self.config.d_model), jnp.float32)
        config = dataclasses.replace(self.config, vocab_size=vocab_size)
        return dataclasses.replace(self, config=config, head=head, params={"body": body, "zip_rows": rows})

    def without_head(self) -> LanguageModel:
        """The plain policy: no head, and no vocabulary rows past the tokenizer's ids."""
        used = self.tokenizer.size
        body = {name: leaf[:used] if name in ("embed", "unembed") else leaf for name, leaf in self.params["body"].items()}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, vocab_size=used), head=None, params={"body": body})

    def folded_table(self) -> jax.Array:
        """`[vocab_size, d_model]` unembedding with the reserved rows folded in: one matmul gives next-token logits and joint."""
        table = unembedding(self.config, self.params["body"])
        return fold(table, self.params["zip_rows"], self.head) if self.head else table

    def digest(self) -> str:
        """Hash of parameters, config and head: the identity of this model in the records of what was made from it."""
        hasher = hashlib.blake2b(json.dumps([to_dict(self.config), self.head and self.head.to_dict()]).encode(), digest_size=16)
        for leaf in jax.tree.leaves(self.params):
            hasher.update(np.ascontiguousarray(leaf).tobytes())
        return hasher.hexdigest()

    def save(self, path: str | pathlib.Path, dtype: Any = None) -> None:
        """Writes an Orbax checkpoint: parameters, and config + grid + reserved range + tokenizer as JSON inside it.

        Orbax writes to a temporary name and renames, so the path is complete or absent. An existing model there is replaced.

        Args:
          dtype: store parameters in this dtype (default: as they are).
        """
        params = self.params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), self.params)
        meta = {
            "format": FORMAT,
            "model": to_dict(self.config),
            "head": self.head.to_dict() if self.head else None,
            "dtype": str(jax.tree.leaves(params)[0].dtype),
            "eos_tokens": list(self.tokenizer.eos_tokens),
            "tokenizer": json.loads(self.tokenizer.backend.to_str()),
            "info": self.info,
        }
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
            checkpointer.save(pathlib.Path(path).absolute(), args, force=True)


def embedded(name: str) -> pathlib.Path:
    """A model or config that ships inside the package, for example "chain_sum_policy". Raises UsageError for an unknown name."""
    path = pathlib.Path(str(resources.files("zip_rc_jax"))) / "assets" / name
    if not path.exists():
        known = sorted(p.name for p in path.parent.iterdir())
        raise UsageError(f"embedded {name!r}", f"the package ships {', '.join(known)}", "use one of these")
    return path


def load(path: str | pathlib.Path, *, dtype: Any = jnp.float32, layout: Layout | None = None) -> LanguageModel:
    """Loads a model saved by `LanguageModel.save`, straight onto the devices of `layout`.

    Args:
      path: the checkpoint, a training directory that holds one as `model/`, or "embedded:NAME" for one that ships with the package.
      dtype: of the parameters in memory.
      layout: default one device.

    Raises:
      UsageError: nothing there, not one of our checkpoints, half-written, or its reserved range is impossible.
    """
    layout = layout or single_device()
    name = str(path)
    path = embedded(name.removeprefix("embedded:")) if name.startswith("embedded:") else pathlib.Path(path).absolute()
    if (path / "model").is_dir() and not (path / "meta").is_dir():
        path = path / "model"
    if not path.is_dir():
        raise UsageError(f"model {path}", "there is no such directory", "pass a checkpoint written by `zip-rc train`")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            meta = checkpointer.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise UsageError(f"model {path}", f"it is no complete checkpoint ({_first_line(error)})", "train or copy it again") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UsageError(f"model {path}", "it was not written by this package", "pass a checkpoint written by `zip-rc train`")
        config = ModelConfig(**meta["model"])
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(meta["tokenizer"])), tuple(meta["eos_tokens"]))
        head = ZipHead.from_dict(meta["head"]) if meta["head"] else None
        if head:
            if head.used_ids != tokenizer.size:
                raise UsageError(
                    f"model {path}", f"it says {head.used_ids} used ids, its tokenizer uses {tokenizer.size}", "export it again"
                )
            head.check(config.vocab_size)
        shapes: dict[str, Any] = {"body": param_shapes(config)}
        axes: dict[str, Any] = {"body": param_axes(config)}
        if head:
            shapes["zip_rows"] = jax.ShapeDtypeStruct((head.grid.n_cells, config.d_model), jnp.float32)
            axes["zip_rows"] = ("cells", "embed")
        wanted = jax.tree.map(lambda s, a: jax.ShapeDtypeStruct(s.shape, dtype, sharding=layout.sharding(a, s.shape)), shapes, axes)
        try:
            params = checkpointer.restore(path, ocp.args.Composite(params=ocp.args.StandardRestore(wanted))).params
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise UsageError(f"model {path}", f"its parameters are incomplete ({_first_line(error)})", "train or copy it again") from None
    return LanguageModel(config, tokenizer, params, head, layout, meta["info"])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
