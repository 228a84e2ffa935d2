"""What the policy says of its own samples when it is asked, in one more turn of the chat: the
self-evaluation of the paper's baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.prompts import conversations, prompt_of, prompt_time
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.rollout_predictions import first_logits
from zip_rc_jax.inference.requests import equal_tokens
from zip_rc_jax.models.io.chat import template_time
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime.errors import UsageError


class SelfEvaluation:
    """Asks `config.evaluate.self_evaluation.question` about samples of some problems."""

    def __init__(self, lm: LanguageModel, found: Sequence[Problem], config: PipelineConfig):
        """Raises:
        UsageError: the two replies begin with the same token; the template refuses the turns or an
          argument; or a sample of `decode.max_tokens` together with the question would not fit the
          model.
        """
        self.lm, self.config, self.settings = lm, config, config.evaluate.self_evaluation
        self.turns, self.time = conversations(found, config), prompt_time(config, lm.tokenizer)
        # Variables of the template, by the prompt variant of each problem.
        self.kwargs = [
            prompt_of(config.prompt, p.question).chat_template_kwargs
            | self.settings.chat_template_kwargs
            for p in found
        ]
        yes, no = (lm.tokenizer.encode(reply)[0] for reply in (self.settings.yes, self.settings.no))
        if yes == no:
            raise UsageError(
                f"evaluate.self_evaluation with yes={self.settings.yes!r}, no={self.settings.no!r}",
                "both begin with the same token, by which they are told apart",
                "choose replies that begin differently",
            )
        self.replies = (yes, no)
        longest = (
            max(
                len(self._asked(turns, "", kwargs))
                for turns, kwargs in zip(self.turns, self.kwargs, strict=True)
            )
            + config.decode.max_tokens
        )
        if longest > lm.config.max_positions:
            raise UsageError(
                f"evaluate.self_evaluation with decode.max_tokens={config.decode.max_tokens}",
                f"prompt, sample and question may have {longest} tokens, and the model has "
                f"{lm.config.max_positions} positions",
                "lower decode.max_tokens, shorten the question, or leave it out",
            )

    def _asked(
        self, turns: Sequence[dict[str, str]], response: str, kwargs: dict[str, Any]
    ) -> list[int]:
        """The conversation up to where the reply begins, as ids."""
        asked = [
            *turns,
            {"role": "assistant", "content": response},
            {"role": "user", "content": self.settings.question},
        ]
        tokenizer, added = self.lm.tokenizer, self.config.decode.add_special_tokens
        with template_time(self.time):
            return tokenizer.encode_prompt(
                tokenizer.chat(asked, **kwargs), chat=True, add_special_tokens=added
            )

    def __call__(self, samples: Sequence[Sequence[Rollout]]) -> tuple[np.ndarray, np.ndarray]:
        """Asks about the samples of every problem, as many of each.

        Returns:
          `[P, N]` float64, the probability of "yes" against "no", and `[P, N]` int64, tokens that
          asking takes: those that do not lie in the sample's cache, and the reply's one.
        """
        asked, extra = list[Rollout](), list[int]()
        for turns, kwargs, row in zip(self.turns, self.kwargs, samples, strict=True):
            for sample in row:
                ids = self._asked(turns, sample.response, kwargs)
                asked.append(
                    dataclasses.replace(
                        sample,
                        prompt_token_ids=np.asarray(ids),
                        output_token_ids=np.asarray(self.replies[:1]),
                    )
                )
                # What was drawn last was never an input, so it is in no cache.
                held = [*sample.prompt_token_ids.tolist(), *sample.output_token_ids[:-1].tolist()]
                extra.append(len(ids) - equal_tokens(ids, held) + 1)
        settings = ScoringConfig(self.config.label.batch_tokens)
        yes, no = (
            first_logits(self.lm, asked, self.replies, settings, "self-evaluation")
            .astype(np.float64)
            .T
        )
        shape = (len(samples), len(samples[0]))
        return (1 / (1 + np.exp(no - yes))).reshape(shape), np.array(extra).reshape(shape)
