"""A language model with its ZIP head: what is loaded, trained, decoded and saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig, to_dict
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import HeadDefaults, ZipHead, fit_vocabulary, fold, padded_vocab_size, reserve
from zip_rc_jax.models.io.digests import json_digest, named_leaves
from zip_rc_jax.models.io.stored import DIGESTS, groups, read_arrays, read_meta, with_digests
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.transformer import init_params, unembedding
from zip_rc_jax.runtime.distributed import gather, is_primary
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import Layout, single_device
from zip_rc_jax.runtime.storage import fit_path, writing

FORMAT = "zip_rc_jax/2"


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A transformer, its tokenizer and (once attached) its ZIP head.

    Attributes:
      config: sizes.
      tokenizer: text <-> ids.
      params: `{"body": transformer parameters, "zip_rows": [cells, d_model]}`; no "zip_rows"
        without a head.
      head: grid, label kind and reserved range; None for a plain policy.
      layout: mesh and sharding rules that decoding uses.
      info: how it was made (JSON-able).
      generation_config: what the checkpoint's generation_config.json says; {} if there was none.
        Nothing reads it unless asked to.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    params: dict[str, Any]
    head: ZipHead | None = None
    layout: Layout = dataclasses.field(default_factory=single_device)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, config: ModelConfig, tokenizer: Tokenizer, seed: int) -> LanguageModel:
        """Random parameters.

        Raises UsageError if the vocabulary is smaller than the tokenizer's.
        """
        if config.vocab_size < tokenizer.size:
            raise UsageError(
                f"model.vocab_size={config.vocab_size}",
                f"the tokenizer uses {tokenizer.size} ids",
                "raise it",
            )
        return cls(config, tokenizer, {"body": init_params(config, seed)})

    def with_head(
        self,
        grid: Grid,
        label: str,
        first_id: int | None = None,
        *,
        defaults: HeadDefaults | None = None,
    ) -> LanguageModel:
        """The same model with a fresh head for `grid`: zero rows (a uniform joint) at ids that the
        tokenizer never emits.

        Next-token logits at all other ids stay as they are, and so do the rows of the embedding and
        unembedding at reserved ids.

        Args:
          first_id: first reserved id; default `reserve`'s choice, rows beyond the tokenizer or its
            placeholders. Where those are too few, the vocabulary is padded to a multiple of 128.
          defaults: interval, window and max_tokens that decoding takes where its caller names none.

        Raises:
          UsageError: `first_id` puts cells on ids that the tokenizer uses, or past what padding
            would give.
        """
        # a tokenizer may know ids that have no row
        named, vocab_size = self.tokenizer.size, self.config.vocab_size
        if first_id is None:
            reserved = reserve(self.tokenizer.free_ids(vocab_size), grid, named)
            first_id = named if reserved is None else reserved
        head = ZipHead(grid, label, first_id, self.tokenizer.used, defaults)
        if head.last_id > vocab_size:
            vocab_size = max(vocab_size, padded_vocab_size(named, grid))
        head.check(vocab_size, self.tokenizer.free_ids(vocab_size))
        body = dict(self.params["body"])
        for name in ("embed", "unembed"):
            if name in body:
                body[name] = fit_vocabulary(body[name], vocab_size)
        rows = jnp.zeros((grid.n_cells, self.config.d_model), jnp.float32)
        config = dataclasses.replace(self.config, vocab_size=vocab_size)
        return dataclasses.replace(
            self, config=config, head=head, params={"body": body, "zip_rows": rows}
        )

    def without_head(self) -> LanguageModel:
        """The plain policy: no head, and no vocabulary rows past the tokenizer's ids."""
        used = min(self.tokenizer.used, self.config.vocab_size)
        body = {
            name: leaf[:used] if name in ("embed", "unembed") else leaf
            for name, leaf in self.params["body"].items()
        }
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, vocab_size=used),
            head=None,
            params={"body": body},
        )

    def folded_table(self) -> jax.Array:
        """`[vocab_size, d_model]` unembedding with the reserved rows folded in: one matmul gives
        next-token logits and joint."""
        table = unembedding(self.config, self.params["body"])
        return fold(table, self.params["zip_rows"], self.head) if self.head else table

    def digest(self) -> str:
        """Hash of parameters, config and head: the identity of this model in the records of what
        was made from it.

        With several processes all must call it, as everything else here.
        """
        config = to_dict(self.config)
        if config["attention_output_bias"]:  # its default is left out, as in records before it was
            del config["attention_output_bias"]
        hasher = hashlib.blake2b(
            json.dumps([config, self.head and self.head.identity()]).encode(), digest_size=16
        )
        for leaf in jax.tree.leaves(self.params):
            hasher.update(np.ascontiguousarray(gather(leaf)).tobytes())
        return hasher.hexdigest()

    def save(self, path: str | pathlib.Path, dtype: Any = None) -> None:
        """Writes an Orbax checkpoint: parameters, and config + grid + reserved range + tokenizer as
        JSON inside it.

        Orbax writes to a temporary name and renames, so the path is complete or absent. An existing
        model there is replaced. What was written is then read back, and compared with digests that
        `load` will compare too. Reading takes room on the devices for 1 GiB more, or for the
        largest array.

        Args:
          dtype: store parameters in this dtype (default: as they are).

        Raises:
          UsageError: something else is there, the path is one where Orbax loses arrays, it could
            not be written (for want of room perhaps), or what was read back is something else.
        """
        import orbax.checkpoint as ocp  # a third of the time that JAX takes to import

        target = fit_path(path, "model path").absolute()
        _check_replaceable(target)
        params = (
            self.params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), self.params)
        )
        meta = with_digests(
            {
                "format": FORMAT,
                "model": to_dict(self.config),
                "head": self.head.to_dict() if self.head else None,
                "dtype": str(jax.tree.leaves(params)[0].dtype),
                "tokenizer": self.tokenizer.to_dict(),
                "info": self.info,
                **({"generation_config": self.generation_config} if self.generation_config else {}),
            },
            params,
        )
        with (
            writing(f"model {path}"),
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
        ):
            args = ocp.args.Composite(
                params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)
            )
            checkpointer.save(target, args, force=True)
        try:
            if json_digest(read_meta(target)) != json_digest(meta):
                raise UsageError(f"model {path}", "its meta/metadata is another", "write it again")
            for group in groups(dict(named_leaves(params))):
                read_arrays(target, group, meta[DIGESTS]["params"])
        except UsageError as error:
            if is_primary():
                shutil.rmtree(target, ignore_errors=True)
            reason = (
                f"what was read back is not what was written ({error.reason}), so it was "
                "deleted again"
            )
            raise UsageError(
                f"model {path}",
                reason,
                "look at the disk, or choose a path on another one; then do it again",
            ) from error


def _check_replaceable(path: pathlib.Path) -> None:
    """Raises UsageError if something else than a checkpoint is there: Orbax would delete it."""
    if path.is_dir() and (
        (path / "_CHECKPOINT_METADATA").is_file()
        or (path / "params").is_dir()
        or not any(path.iterdir())
    ):
        return
    if os.path.lexists(path):
        what = "a directory that is no model" if path.is_dir() else "a file"
        raise UsageError(
            f"model path {path}",
            f"{what} is there, which is not overwritten",
            "choose another path, or delete it first",
        )
