"""Best-of-n by an external reward model: scores of finished samples, and what scoring costs."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config.reward_model import RewardModelConfig
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool, baseline_point
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.models.io.chat import template_time
from zip_rc_jax.models.io.reward_models import RewardCheckpoint
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.reward_model import RewardModel, forward_parameters, up_to_pooled
from zip_rc_jax.predictions import BATCH_TOKENS, ScoringConfig, hidden_batches
from zip_rc_jax.runtime.distributed import gather
from zip_rc_jax.runtime.errors import UsageError

Conversation = Sequence[Mapping[str, Any]]

WEIGHTED = "reward_model_weighted"
BEST = "reward_model_best_of_n"
PROBE = "zip-rc probe 17"


# ---- scores of texts


def score(
    model: RewardModel,
    conversations: Sequence[Conversation],
    *,
    batch_tokens: int = BATCH_TOKENS,
    title: str = "",
    **chat_template_kwargs: Any,
) -> np.ndarray:
    """The reward model's raw score of each conversation, whose last turn is the assistant's.

    Args:
      batch_tokens: most tokens of one forward, padding included.
      title: of a progress bar; empty for none.
      chat_template_kwargs: variables of the reward model's template.

    Returns:
      float32 `[N]`. A score may be negative; only differences within one prompt mean something.

    Raises:
      UsageError: the template refuses a conversation, or one is too long for the model.
    """
    ids = [
        conversation_ids(model.tokenizer, turns, model.pad_id, chat_template_kwargs)
        for turns in conversations
    ]
    _check_lengths(ids, model.config.max_positions)
    return score_ids(model, ids, batch_tokens=batch_tokens, title=title)


def conversation_ids(
    tokenizer: Tokenizer,
    turns: Conversation,
    pad_id: int | None,
    chat_template_kwargs: Mapping[str, Any],
) -> list[int]:
    """What a reward model reads of a finished conversation: ids up to the token that is scored.

    They are those of `apply_chat_template` in transformers, cut by `up_to_pooled`. A tokenizer that
    begins every text with a token of its own does so here too, once.

    Raises:
      UsageError: no template, or it refuses the turns or an argument.
    """
    text = tokenizer.finished_chat(turns, **chat_template_kwargs)
    return up_to_pooled(tokenizer.encode_prompt(text, chat=True), pad_id)


@jax.jit
def _scores(weights: jax.Array, hidden: jax.Array, at: jax.Array) -> jax.Array:
    """`[rows]` float32 from hidden states `[rows, width, d_model]` at positions `at [rows]`."""
    pooled = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    return jnp.matmul(pooled, weights, preferred_element_type=jnp.float32)


def score_ids(
    model: RewardModel,
    ids: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    title: str = "",
) -> np.ndarray:
    """Raw scores, float32 `[N]`, read at the last id of each sequence.

    Sequences of like length share a batch, and batches run over all devices of the model's layout.

    Args: see `score`.
    """
    found = np.empty(len(ids), np.float32)
    if not len(ids):
        return found
    lengths = np.array([len(one) for one in ids])

    def read(numbers: list[int]) -> list[np.ndarray]:
        return [np.asarray(ids[i], np.int32) for i in numbers]

    for batch in hidden_batches(model, lengths, read, ScoringConfig(batch_tokens), title):
        at = np.zeros(len(batch.hidden), np.int32)
        at[: len(batch.members)] = lengths[batch.members] - 1
        scores = gather(_scores(model.params["score"], batch.hidden, at))
        found[batch.members] = scores[: len(batch.members)]
    return found


def _check_lengths(ids: Sequence[Sequence[int]], positions: int) -> None:
    """Raises UsageError for sequences that the model cannot read whole: nothing is cut."""
    lengths = np.array([len(one) for one in ids], np.int64)
    long = int((lengths > positions).sum())
    if long:
        raise UsageError(
            f"{long} of {len(ids)} conversations for the reward model",
            f"the longest has {lengths.max()} tokens, and the model has {positions} positions",
            "lower decode.max_tokens, or use a reward model that reads more",
        )


# ---- samples of an evaluation


class RewardModelScorer:
    """Scores the samples of some problems, as `SelfEvaluation` does by asking the policy.

    What must be refused is refused when this is made, before anything is decoded. The weights are
    loaded by the call, and freed after it.

    Attributes:
      checkpoint: the reward model on disk.
      parameter_ratio: parameters of the reward model over those of the policy, both without
        embeddings (`forward_parameters`). One token that the reward model reads costs this many
        tokens of the policy.
    """

    def __init__(
        self,
        policy: LanguageModel,
        conversations: Sequence[Conversation],
        settings: RewardModelConfig,
        *,
        max_tokens: int,
        now: datetime.datetime | None = None,
    ):
        """Args:
          policy: whose samples are scored. Its layout is that of the reward model too.
          conversations: the turns of each problem, up to the sample: system, examples, question.
          max_tokens: most tokens of a sample.
          now: what a template that writes the date sees; None for the clock.

        Raises:
          UsageError: no such reward model; its tokenizer has no chat template; the template refuses
            the turns or an argument, or leaves the sample out; or prompt and sample would not fit
            the model. A sample is taken to have `max_tokens` tokens of the reward model too.
        """
        self.checkpoint = RewardCheckpoint.open(settings.path)
        self.settings, self.layout, self.time = settings, policy.layout, now
        self.conversations = [self._own_system(turns) for turns in conversations]
        score_parameters = self.checkpoint.config.d_model
        own = forward_parameters(self.checkpoint.config) + score_parameters
        self.parameter_ratio = own / forward_parameters(policy.config)
        self._check(max_tokens)

    def _own_system(self, turns: Conversation) -> list[dict[str, Any]]:
        """The turns with the system turn that the settings ask for."""
        given = self.settings.system
        if given is None:
            return [dict(turn) for turn in turns]
        rest = [dict(turn) for turn in turns if turn["role"] != "system"]
        return [{"role": "system", "content": given}, *rest] if given else rest

    def _check(self, max_tokens: int) -> None:
        tokenizer, positions = self.checkpoint.tokenizer, self.checkpoint.config.max_positions
        where = f"evaluate.reward_model.path={self.settings.path}"
        if tokenizer.chat_template is None:
            raise UsageError(
                where,
                "its tokenizer has no chat template, so nothing says what it was trained to read",
                "save the template that it was trained with as chat_template.jinja beside "
                "config.json",
            )
        longest = 0
        for turns in self.conversations:
            try:
                ids = self._ids(turns, PROBE)
            except UsageError as error:
                fix = error.fix
                if self.settings.system is None and turns[0]["role"] == "system":
                    fix = f'{fix}; or set evaluate.reward_model.system: ""'
                raise UsageError(f"{where}: {error.value}", error.reason, fix) from None
            longest = max(longest, len(ids))
        turns = self.conversations[0]
        if self._ids(turns, PROBE) == self._ids(turns, PROBE.replace("17", "23")):
            raise UsageError(
                where,
                "its chat template leaves the assistant's answer out",
                "correct the template, or evaluate.reward_model.chat_template_kwargs",
            )
        longest += max_tokens - len(tokenizer.encode(PROBE))
        if longest > positions:
            raise UsageError(
                f"evaluate.reward_model with decode.max_tokens={max_tokens}",
                f"prompt and sample may have {longest} tokens, and the reward model has "
                f"{positions} positions",
                "lower decode.max_tokens, or use a reward model that reads more",
            )

    def _ids(self, turns: Conversation, response: str) -> list[int]:
        """What the reward model reads of one sample."""
        asked = [*turns, {"role": "assistant", "content": response}]
        kwargs, pad_id = self.settings.chat_template_kwargs, self.checkpoint.pad_id
        with template_time(self.time):
            return conversation_ids(self.checkpoint.tokenizer, asked, pad_id, kwargs)

    def __call__(self, samples: Sequence[Sequence[Rollout]]) -> tuple[np.ndarray, np.ndarray]:
        """Scores the samples of every problem, as many of each.

        Returns:
          `[P, N]` float64, raw scores. They may be negative, so `reward_model_curves` weights votes
            with their sigmoid.
          `[P, N]` float64, tokens of the policy that each score costs: `parameter_ratio` times the
            tokens read, prompt included. A model as large as the policy pays 1 a token. Nothing is
            taken from a cache: the reward model has not seen the prompt.

        Raises:
          UsageError: a sample has more tokens in the reward model's vocabulary than fit. It is
            raised before a weight is loaded, and no sample is cut.
        """
        ids = [
            self._ids(turns, sample.response)
            for turns, row in zip(self.conversations, samples, strict=True)
            for sample in row
        ]
        _check_lengths(ids, self.checkpoint.config.max_positions)
        model = self.checkpoint.load(layout=self.layout, dtype=self.settings.dtype)
        settings = self.settings
        scores = score_ids(model, ids, batch_tokens=settings.batch_tokens, title="reward model")
        shape = (len(samples), len(samples[0]))
        read = np.array([len(one) for one in ids], np.float64).reshape(shape)
        return scores.astype(np.float64).reshape(shape), self.parameter_ratio * read


def reward_model_curves(
    pool: SamplePool,
    scores: np.ndarray,
    extra: np.ndarray,
    *,
    serial_steps: float = 1.0,
    draws: Draws | None = None,
    ns: Sequence[int] | None = None,
) -> dict[str, tuple[BaselinePoint, ...]]:
    """Best-of-n by an external reward model at n = 1..N: method -> points ascending in n.

    Source: a baseline of ZIP-RC (arXiv 2512.01457).

    - `reward_model_weighted`: the answer with the largest sum of sigmoid(score). A raw score may be
      negative, and a sum of such would prefer answers that few samples give. The sigmoid is what
      the models were trained with: the Bradley-Terry loss is the logarithm of one.
    - `reward_model_best_of_n`: the sample with the highest raw score. (The sigmoid of large scores
      rounds to 1, which would make ties.)

    With one sample there is nothing to choose, so nothing is scored.

    Args:
      scores, extra: `[P, N]`, of `RewardModelScorer`. Compute counts `extra` of every sample.
      serial_steps: latency of scoring, in decoding steps of the policy. All samples of a prompt
        are scored in one parallel forward, which reads each parameter once, as one decoding step
        does. So the evaluation passes `parameter_ratio`; 1 for a model as large as the policy.
      draws: see `baseline_point`.
      ns: another choice of n.
    """
    sizes = range(1, pool.n_samples + 1) if ns is None else ns
    raw = np.asarray(scores, np.float64)
    more, unit = np.asarray(extra, np.float64).mean(1), pool.mean_length
    found = {}
    for name, method, values in (
        (WEIGHTED, "weighted_best_of_n", sigmoid(raw)),
        (BEST, "best_of_n", raw),
    ):
        judged = dataclasses.replace(pool, value=values)
        points = [baseline_point(judged, method, n, draws) for n in sizes]
        found[name] = tuple(
            dataclasses.replace(
                p,
                method=name,
                compute=p.compute + (p.n * more / unit if p.n > 1 else 0),
                latency=p.latency + (serial_steps / unit if p.n > 1 else 0),
            )
            for p in points
        )
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    """`1 / (1 + exp(-x))`, without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))
