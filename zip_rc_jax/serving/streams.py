"""From the decisions of a search to a stream of text that is never taken back.

`certain` streams what every prefix that may still be the answer begins with. `best` streams the
most promising prefix, and says how much of it to keep when another one overtakes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.plugins import ANSWER_CHOICES
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.engine import StepEvent
from zip_rc_jax.inference.outputs import Decision, Result
from zip_rc_jax.inference.stopping import UNFINISHED_CHARACTER
from zip_rc_jax.inference.tree import ROOT
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.serving import answers
from zip_rc_jax.serving.translation import Plan


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a stream says next.

    Attributes:
      text: to be put behind what is kept.
      keep: characters of the text so far that stay (`revise`); None keeps all.
      tokens: how many tokens of the answer are certain now.
    """

    text: str = ""
    keep: int | None = None
    tokens: int = 0


def may_withhold(config: DecodeConfig) -> bool:
    """Whether a search may end without an answer though a prefix has text."""
    chosen_here = ANSWER_CHOICES.is_builtin(config.answer)
    return config.allow_no_answer or config.abstain_below > 0 or not chosen_here


class PrefixTexts:
    """The text, tokens and log-probabilities of every prefix of one prompt, as events tell them."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.logprobs: dict[int, tuple[float, ...]] = {}

    def take(self, event: StepEvent) -> None:
        for number, new in event.new_text.items():
            self.text[number] = self.text.get(number, "") + new
        for number, ids in event.new_tokens.items():
            self.tokens[number] = self.tokens.get(number, ()) + ids
        for number, values in event.new_logprobs.items():
            self.logprobs[number] = self.logprobs.get(number, ()) + values


def candidates(decision: Decision, n: int) -> list[int]:
    """Prefixes that may still become the answer; none where a new one may begin at the root.

    A paused prefix may be resumed, and a finished one may be chosen in the end.
    """
    numbers = [number for number in decision.prefix_ids if number != ROOT]
    return numbers if ROOT not in decision.prefix_ids or len(numbers) == n else []


def common(parts: Sequence[str] | Sequence[tuple[int, ...]]) -> int:
    """How many first items (characters, tokens) are the same in all parts; 0 without any."""
    if not parts:
        return 0
    # What the least and the greatest share, all between them share too.
    ordered: list[Any] = sorted(parts)
    least, greatest = ordered[0], ordered[-1]
    pairs = zip(least, greatest, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(least))


class CertainStream:
    """Streams the common beginning of all prefixes that may still be the answer."""

    def __init__(self, config: DecodeConfig):
        self._n, self._waits = config.n, may_withhold(config)
        self._sent = ""

    def step(self, texts: PrefixTexts, decision: Decision) -> Delta:
        numbers = [] if self._waits else candidates(decision, self._n)
        parts = [texts.text.get(number, "") for number in numbers]
        tokens = common([texts.tokens.get(number, ()) for number in numbers])
        length = common(parts)
        if length <= len(self._sent):
            return Delta(tokens=tokens)
        new, self._sent = parts[0][len(self._sent) : length], parts[0][:length]
        return Delta(new, tokens=tokens)

    def end(self, result: Result) -> Delta:
        """Raises RuntimeError if the answer does not begin with what was sent."""
        if not result.text.startswith(self._sent):
            raise RuntimeError("the answer does not begin with the text that was certain")
        return Delta(result.text[len(self._sent) :])


class BestStream:
    """Streams the prefix with the highest P(correct), and corrects what it sent."""

    def __init__(self, config: DecodeConfig):
        self._sent, self._best = "", ROOT

    def step(self, texts: PrefixTexts, decision: Decision) -> Delta:
        reward = dict(zip(decision.prefix_ids, decision.expected_reward, strict=True))
        begun = [number for number in reward if texts.text.get(number)]
        if not begun:
            return Delta()
        # The one that is shown stays where none is better.
        self._best = max(begun, key=lambda number: (reward[number], number == self._best))
        return self._to(texts.text[self._best])

    def end(self, result: Result) -> Delta:
        return self._to(result.text)

    def _to(self, text: str) -> Delta:
        keep = common([self._sent, text])
        revised = keep < len(self._sent)
        self._sent = text
        return Delta(text[keep:], keep if revised else None)


class ChoiceStream:
    """The chunks of one choice."""

    def __init__(
        self, plan: Plan, index: int, header: dict[str, Any], tokenizer: Tokenizer, grid: Grid
    ):
        self._plan, self._index, self._header, self._grid = plan, index, header, grid
        self._tokenizer, self._config = tokenizer, plan.jobs[index].config
        self._texts, self._logprobs_sent = PrefixTexts(), 0
        best = plan.mode == "best"
        self._stream = BestStream(self._config) if best else CertainStream(self._config)
        self.has_text = False

    def begin(self) -> list[dict[str, Any]]:
        """The chunk that opens a turn."""
        if not self._plan.chat:
            return []
        return [self._chunk({"role": "assistant", "content": ""}, None, None, None)]

    def step(self, event: StepEvent) -> dict[str, Any]:
        self._texts.take(event)
        delta = self._stream.step(self._texts, event.decision)
        logprobs = None
        if self._plan.logprobs and delta.tokens > self._logprobs_sent:
            number = candidates(event.decision, self._config.n)[0]
            ids = self._texts.tokens[number][: delta.tokens]
            logprobs = self._logprobs(ids, self._texts.logprobs[number][: delta.tokens])
        said = answers.plain_numbers(answers.progress(event.decision))
        if self._plan.introspect:
            told = self._texts.text, event.new_text, self._plan, self._index, self._grid
            said["introspection"] = answers.weighed(event.decision, *told)
        return self._text_chunk(delta, logprobs, None, said)

    def end(self, result: Result) -> dict[str, Any]:
        answers.check_result(result)
        delta = self._stream.end(result)
        logprobs = self._logprobs(*answers.tokens_of(result), last=True)
        reason = answers.FINISH_REASONS[result.finish_reason]
        said = answers.account(result, self._plan, self._index, self._grid)
        refusal = answers.refusal(result, self._config.abstain_below)
        return self._text_chunk(delta, logprobs, reason, said, refusal)

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[float], last: bool = False
    ) -> dict[str, Any] | None:
        """Those that were not sent yet; tokens of an unfinished character wait."""
        if not self._plan.logprobs:
            return None
        if not last:
            pieces = self._tokenizer.pieces(list(ids))
            count = len(pieces)
            while count and (not pieces[count - 1] or UNFINISHED_CHARACTER in pieces[count - 1]):
                count -= 1
            ids, logprobs = ids[:count], logprobs[:count]
        first = self._logprobs_sent
        if len(ids) <= first:
            return None
        self._logprobs_sent = len(ids)
        return answers.logprobs_of(self._plan, self._tokenizer, ids, logprobs, first)

    def _text_chunk(
        self,
        delta: Delta,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        said: dict[str, Any],
        refusal: str | None = None,
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"content": delta.text} if delta.text else {}
        self.has_text = self.has_text or bool(delta.text)
        if refusal is not None:
            content["refusal"] = refusal
        if delta.keep is not None:
            said = said | {"revise": {"keep": delta.keep}}
        return self._chunk(content, logprobs, reason, said)

    def _chunk(
        self,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
        said: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._index}
        if self._plan.chat:
            choice["delta"] = content
        else:
            choice["text"] = content.get("content", "")
        choice |= {"logprobs": logprobs, "finish_reason": reason}
        chunk = self._header | {"choices": [choice]}
        if self._plan.include_usage:
            chunk["usage"] = None
        return chunk if said is None else chunk | {"zip_rc": said}
