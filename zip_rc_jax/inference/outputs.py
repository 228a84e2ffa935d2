"""What a decode returns: the answer, every prefix of the tree, every decision, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prefix:
    """One branch of the tree of one prompt.

    Attributes:
      id: number within the prompt; samples of the root come first, forks later.
      parent: id of the prefix it was forked from; -1 is the root (the prompt).
      fork_position: generated tokens shared with the parent.
      token_ids: all generated tokens, shared ones included, end-of-sequence token included.
      text: decoded without special tokens.
      state: "finished", "paused", or "failed" (the model's logits after it are not finite).
      finish_reason: "stop" (end token), "length" (max_tokens), "paused", "error".
      expected_reward: mean over the last `window` tokens of the joint's expected reward.
      expected_remaining: same for remaining tokens.
    """

    id: int
    parent: int
    fork_position: int
    token_ids: tuple[int, ...]
    text: str
    state: str
    finish_reason: str
    expected_reward: float
    expected_remaining: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """One meta-action. Tuples have one entry per prefix in `prefix_ids`.

    Attributes:
      step: serial decode steps of this prompt so far.
      prefix_ids: all prefixes at this moment; -1 is the root.
      multiplicity: 0 = pause (or, for a finished prefix, drop), 1 = continue (or keep), 2+ = branch.
      future_bin: planned pause bin, -1 for none.
      utility: of the chosen action (NaN for strategies that have none).
      expected_reward, expected_remaining, tokens: of each prefix, before the action.
      finished: whether each prefix has ended.
    """

    step: int
    prefix_ids: tuple[int, ...]
    multiplicity: tuple[int, ...]
    future_bin: int
    utility: float
    expected_reward: tuple[float, ...]
    expected_remaining: tuple[float, ...]
    tokens: tuple[int, ...]
    finished: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Usage:
    """Cost of one prompt.

    Attributes:
      prompt_tokens: tokens of the prompt.
      tokens: generated tokens of all prefixes; a shared prefix counts once.
      serial_steps: decode steps in which at least one prefix of the prompt was live.
      seconds: wall-clock from admission to the end of the prompt (other prompts share the machine meanwhile).
    """

    prompt_tokens: int
    tokens: int
    serial_steps: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one prompt.

    Attributes:
      prompt: as given, as the chat template rendered it, or as the given token ids decode.
      text: the answer prefix's text ("" where there is no answer).
      prefix_id: id of the answer prefix, -1 where there is none.
      finish_reason: of the answer prefix; "abstain" where none finished or its expected reward is below `abstain_below`; "token_budget"
        or "time_budget" if that ended the search: the answer is what had finished until then, else the most promising unfinished prefix;
        "error" if the prompt could not be decoded or the model failed on it: no answer, though some prefixes may have finished.
      expected_reward, expected_remaining: of the answer prefix, also of one withheld by `abstain_below`; of the root where there is no
        such prefix (NaN if the model never saw the prompt).
      value_text: text of the finished prefix with the highest value.
      vote_text: text of the most valuable prefix of the answer group with the largest sum of values. `text` is one of these two.
      prefixes, trace, usage: see the classes.
      template_hash: `Tokenizer.template_hash` of the template that rendered the prompt; None for a raw prompt.
      error: what went wrong, "" if nothing did.
      prompt_token_ids: what the model read, special tokens included. Empty if the prompt could not be read.
    """

    prompt: str
    text: str
    prefix_id: int
    finish_reason: str
    expected_reward: float
    expected_remaining: float
    value_text: str
    vote_text: str
    prefixes: tuple[Prefix, ...]
    trace: tuple[Decision, ...]
    usage: Usage
    template_hash: str | None = None
    error: str = ""
    prompt_token_ids: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """Inverse of `to_dict`, also after JSON (where tuples are lists and NaN is null)."""

        def tuples(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else math.nan if value is None else value

        expected = {name: tuples(data[name]) for name in ("expected_reward", "expected_remaining")}
        prefixes = tuple(Prefix(**{k: tuples(v) for k, v in x.items()}) for x in data["prefixes"])
        trace = tuple(Decision(**{k: tuples(v) for k, v in x.items()}) for x in data["trace"])
        made = {"prefixes": prefixes, "trace": trace, "usage": Usage(**data["usage"])}
        ids = {"prompt_token_ids": tuple(data.get("prompt_token_ids", ()))}
        return cls(**{**data, **expected, **made, **ids})
