"""How a head is trained, and on which mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from zip_rc_jax.config.checks import check_types, counts, one_of, require

TRAIN_STAGES = ("policy", "critic", "final", "lite")
LABELS = ("correct", "value")
KL_KINDS = ("forward_topk", "forward", "reverse")
TRAINABLE = ("all", "zip_rows")
KL_MASKS = ("unused", "cells")
MEANS_OVER = ("positions", "rollouts")
UNFINISHED_LENGTHS = ("censored", "ended")
LENGTH_COUNTS = ("with_end", "without_end")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "plain", "chunked", "splash")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run of the joint head. Defaults are the authors' recipe (method, section 3).

    Attributes:
      label: "correct" or "value": which field of the rollouts is the reward.
      trainable: "all", or "zip_rows" for ZIP-RC-Lite (every next-token logit stays bit-identical).
      steps: optimizer steps; the cosine schedule ends exactly there.
      epochs: passes over the rollouts instead of steps, such as the authors' 2. Exactly one of the
        two is not 0; in a file, the one that is given sets the other to 0.
      batch_rows, row_tokens: a step sees `batch_rows` packed rows of `row_tokens` tokens.
      learning_rate: peak; linear warm-up over `warmup` of the steps, then cosine to 0.
      kl_weight: weight of the KL to the frozen starting policy; 0 switches the teacher off.
      kl_kind: "forward_topk" (authors: KL(teacher || student), teacher cut to its `kl_top_k`
        likeliest ids and renormalised), "forward" (full vocabulary), or "reverse" (paper:
        KL(student || teacher)).
      kl_mask: ids that take no part in the divergence. "unused": all that the policy never emits
        (the cells and every other row past the tokenizer). "cells": the cells alone, as in the
        authors' published code, so the padding rows stay in both normalisers.
      unfinished_length: what a rollout that was cut off says about length. "censored": it is longer
        than was seen. "ended": it ended there, as in the authors' published code.
      mean_over: what the losses of a step are a mean of. "positions": all labelled positions alike.
        "rollouts": the means of its rollouts, as in the authors' published code, so a position of
        a short rollout counts more.
      lm_weight: weight of the next-token cross-entropy on the responses (used to pretrain the demo
        policy).
      joint_weight: weight of the joint cross-entropy.
      cache_features: with trainable="zip_rows", run the frozen body once over all rollouts and keep
        its final hidden states in host memory (4 * d_model bytes per labelled position). Rows then
        hold labelled positions only, and a step costs next to nothing.
      cache_teacher: with kl_kind="forward_topk", run the frozen policy once over all rollouts and
        keep its likeliest ids in host memory (8 * kl_top_k bytes per labelled position). No teacher
        lies on the devices then, and a step has no forward pass of it.
      rows_from: stage ("critic" or "lite") whose trained reserved rows are the starting point;
        empty starts from zeros. On few data a trained head first keeps the body from chasing a
        random one.
      zip_lr_multiplier: the reserved rows learn this many times faster than the body.
      remat: the backward pass computes every layer's activations again instead of keeping them.
      loss_chunk: positions, over all rows of the batch, whose next-token logits exist at the same
        time (4 * vocab_size bytes each, a few times). Large chunks read the unembedding less often.
      compute_dtype: "float32" or "bfloat16" for products and activations. Parameters, their
        gradients, the optimizer, norms, softmax and losses are float32 in either case.
      attention: "plain" builds all scores, "chunked" blocks of them with XLA alone, "splash" blocks
        in a TPU kernel; "auto" chooses by platform and length (see `models.attention`).
      pack_batches: batches that are packed together: more let more rollouts find a row they fit
        into, and shuffle their rows.
      max_skipped: steps in a row with a non-finite loss or gradient (each changes nothing) after
        which training stops.
      save_seconds: a checkpoint at least this often, and on SIGINT / SIGTERM.
      keep_checkpoints: the newest that are kept.
      log_every: steps between metric records.
      eval_rollouts: held-back rollouts for the validation metrics (within-prompt AUC among them).
      evaluations: how often in the run they are computed, the last time at its end.
    """

    label: str = "correct"
    trainable: str = "all"
    steps: int = 1000
    batch_rows: int = 16
    row_tokens: int = 32768
    learning_rate: float = 3e-5
    warmup: float = 0.05
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    kl_weight: float = 0.0
    kl_kind: str = "forward_topk"
    kl_top_k: int = 32
    kl_mask: str = "unused"
    unfinished_length: str = "censored"
    mean_over: str = "positions"
    lm_weight: float = 0.0
    joint_weight: float = 1.0
    cache_features: bool = False
    cache_teacher: bool = False
    rows_from: str = ""
    zip_lr_multiplier: float = 1.0
    loss_chunk: int = 2048
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: bool = True
    seed: int = 0
    pack_batches: int = 4
    max_skipped: int = 10
    save_seconds: float = 60.0
    keep_checkpoints: int = 2
    log_every: int = 50
    eval_rollouts: int = 2048
    evaluations: int = 10
    epochs: float = 0.0

    def __post_init__(self) -> None:
        check_types(TrainConfig, vars(self))
        require(
            0 <= self.epochs < math.inf,
            f"epochs={self.epochs}",
            "it counts passes over the rollouts",
            "use a positive number, or 0 where steps are counted",
        )
        require(
            not (self.steps and self.epochs),
            f"steps={self.steps} with epochs={self.epochs}",
            "each says how long to train",
            "set steps=0 to count epochs, or epochs=0 to count steps",
        )
        one_of("label", self.label, LABELS)
        one_of("trainable", self.trainable, TRAINABLE)
        one_of("kl_kind", self.kl_kind, KL_KINDS)
        one_of("kl_mask", self.kl_mask, KL_MASKS)
        one_of("mean_over", self.mean_over, MEANS_OVER)
        one_of("unfinished_length", self.unfinished_length, UNFINISHED_LENGTHS)
        one_of("rows_from", self.rows_from, ("", "critic", "lite"))
        one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        one_of("attention", self.attention, ATTENTIONS)
        if not self.epochs:
            counts("steps", self.steps)
        for field in (
            "batch_rows",
            "row_tokens",
            "kl_top_k",
            "loss_chunk",
            "log_every",
            "evaluations",
            "pack_batches",
            "max_skipped",
            "keep_checkpoints",
        ):
            counts(field, getattr(self, field))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        """Each number on its own."""
        for field in ("learning_rate", "clip", "zip_lr_multiplier", "save_seconds"):
            require(
                getattr(self, field) > 0,
                f"{field}={getattr(self, field)}",
                "it must be positive",
                "use a positive number",
            )
        for field in ("kl_weight", "lm_weight", "joint_weight", "weight_decay"):
            require(
                getattr(self, field) >= 0,
                f"{field}={getattr(self, field)}",
                "it is a weight",
                "use a number >= 0",
            )
        for field in (
            "learning_rate",
            "zip_lr_multiplier",
            "kl_weight",
            "lm_weight",
            "joint_weight",
            "weight_decay",
        ):
            require(
                math.isfinite(getattr(self, field)),
                f"{field}=inf",
                "it multiplies numbers",
                "use a finite number",
            )
        for field in ("adam_b1", "adam_b2"):
            value = getattr(self, field)
            require(
                0 <= value < 1,
                f"{field}={value}",
                "it is the decay of a running mean",
                "use a number in [0, 1)",
            )
        for field in ("seed", "eval_rollouts"):
            require(
                getattr(self, field) >= 0,
                f"{field}={getattr(self, field)}",
                "it cannot be negative",
                "use a number >= 0",
            )
            require(
                getattr(self, field) < 2**32,
                field,
                "a number of more than 32 bits stands there",
                "use one from 0 to 4294967295",
            )
        require(
            0 <= self.warmup < 1,
            f"warmup={self.warmup}",
            "it is the fraction of steps spent warming up",
            "use a number in [0, 1)",
        )

    def _check_combinations(self) -> None:
        """Settings that exclude or need each other."""
        require(
            self.kl_weight + self.lm_weight + self.joint_weight > 0,
            "kl_weight=0, lm_weight=0, joint_weight=0",
            "nothing would be trained",
            "give at least one a positive weight",
        )
        require(
            self.trainable == "zip_rows" or not self.cache_features,
            f"cache_features=true with trainable={self.trainable!r}",
            "the features change when the body is trained",
            "set trainable=zip_rows",
        )
        require(
            not self.cache_teacher or (self.kl_weight > 0 and self.kl_kind == "forward_topk"),
            f"cache_teacher=true with kl_weight={self.kl_weight}, kl_kind={self.kl_kind!r}",
            "only the likeliest ids of a teacher are kept",
            "set kl_weight and kl_kind=forward_topk, or cache_teacher=false",
        )
        require(
            self.kl_mask == "unused" or (self.kl_weight > 0 and self.lm_weight == 0),
            f"kl_mask={self.kl_mask!r} with kl_weight={self.kl_weight}, lm_weight={self.lm_weight}",
            "it belongs to the KL, and the next-token loss knows only ids that the policy may emit",
            "set kl_weight and lm_weight=0, or leave kl_mask out",
        )
        require(
            not (self.trainable == "zip_rows" and (self.kl_weight or self.lm_weight)),
            f"trainable='zip_rows' with kl_weight={self.kl_weight}, lm_weight={self.lm_weight}",
            "the next-token logits do not depend on the reserved rows, so these losses have no "
            "gradient",
            "set both to 0",
        )


def in_full_length(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """A section of a file or an override, in which `steps` or `epochs` replaces the other one that
    was there before."""
    found = dict(settings)
    if found.get("epochs") and "steps" not in found:
        found["steps"] = 0
    if found.get("steps") and "epochs" not in found:
        found["epochs"] = 0.0
    return found


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How training is laid over the devices of all processes (see `sharding.py`).

    It changes where numbers lie, not what is trained.

    Attributes:
      data: groups of devices that each hold all parameters and take a share of the rows.
      fsdp: devices of a group that split rows, parameters and optimizer state among them. It
        divides `d_model`.
      tensor: devices that split heads, MLP and vocabulary, and see the same rows. It divides
        `n_heads`, `n_kv_heads`, `d_ff` and `vocab_size`.
      -1 on one axis is what the others leave over.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(MeshConfig, vars(self))
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            require(
                size >= 1 or size == -1,
                f"mesh.{axis}={size}",
                "it counts devices",
                "use a positive number, or -1 for the rest",
            )
        require(
            list(sizes.values()).count(-1) <= 1,
            "mesh " + " ".join(f"{axis}={size}" for axis, size in sizes.items()),
            "only one axis can be what the others leave over",
            "give the other axes a size",
        )
