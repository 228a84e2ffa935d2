"""What training keeps of a body that it does not change: hidden states, and a teacher's policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.rollout_predictions import rollout_batches
from zip_rc_jax.head import ZipHead
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import unembedding
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime.distributed import gather
from zip_rc_jax.runtime.sharding import Layout
from zip_rc_jax.training.loss import FullTeacher, TopK, VocabChunking, teacher_top_k
from zip_rc_jax.training.step import cast_teacher, policy_ids


def labelled_features(
    lm: LanguageModel, rollouts: Sequence[Rollout], settings: ScoringConfig
) -> np.ndarray:
    """Final hidden states at all labelled positions, rollout after rollout: float32 `[N,
    d_model]`."""
    result: list[np.ndarray] = [np.empty(0)] * len(rollouts)
    for hidden, spans in rollout_batches(lm, rollouts, settings, "features"):
        gathered = gather(hidden.astype(jnp.float32))
        for lane, (i, span) in enumerate(spans):
            result[i] = gathered[lane, span].copy()
    return np.concatenate(result)


@functools.partial(jax.jit, static_argnames=("model", "head", "layout", "train"))
def _top_k(
    model: ModelConfig,
    head: ZipHead,
    layout: Layout,
    train: TrainConfig,
    teacher: FullTeacher,
    labelled: jax.Array,
) -> TopK:
    vocabulary = VocabChunking(model, layout, train.loss_chunk)
    ids = policy_ids(head, model, train)
    return teacher_top_k(vocabulary, teacher, labelled, ids, train.kl_top_k)


def teacher_features(lm: LanguageModel, rollouts: Sequence[Rollout], train: TrainConfig) -> TopK:
    """What the policy of `lm`, frozen, says at all labelled positions, rollout after rollout: numpy
    arrays `[N, k]`.

    Raises:
      ValueError: the model has no head, so it is not known which ids the policy may emit.
    """
    if lm.head is None:
        raise ValueError("the model has no ZIP head")
    policy = dataclasses.replace(
        lm, params={**lm.params, "body": cast_teacher(lm.params["body"], train)}
    )
    table = unembedding(lm.config, policy.params["body"])
    result: list[TopK | None] = [None] * len(rollouts)
    for hidden, spans in rollout_batches(policy, rollouts, ScoringConfig.of(train), "teacher"):
        labelled = np.zeros(hidden.shape[:2], bool)
        for lane, (_, span) in enumerate(spans):
            labelled[lane, span] = True
        gathered = gather(
            _top_k(lm.config, lm.head, lm.layout, train, FullTeacher(hidden, table), labelled)
        )
        for lane, (i, span) in enumerate(spans):
            result[i] = TopK(*(x[lane, span].copy() for x in gathered))
    return TopK(
        *(
            np.concatenate(arrays)
            for arrays in zip(*(r for r in result if r is not None), strict=True)
        )
    )
