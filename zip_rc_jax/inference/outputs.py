"""What a decode returns: the answer, every prefix of the tree, every decision, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prefix:
    """One branch of the tree of one prompt.

    Attributes:
      id: number within the prompt; samples of the root come first, forks later.
      parent: id of the prefix it was forked from; -1 is the root (the prompt).
      fork_position: generated tokens shared with the parent.
      token_ids: all generated tokens, shared ones included, end-of-sequence token included.
      text: decoded without special tokens, and cut before the stop string that ended it.
      state: "finished", "paused", or "failed" (the model's logits after it are not finite).
      finish_reason: "stop" (end token, stop id or stop string), "length" (max_tokens), "paused",
        "error".
      expected_reward: mean over the last `window` tokens of the joint's expected reward.
      expected_remaining: same for remaining tokens.
      stop_reason: the stop string or the id of `stop_token_ids` that ended it; None for an end
        token, and where nothing did.
      logprobs: log-probability of each token under the model's policy: softmax over all ids that it
        may emit, at temperature 1, before temperature, filters and repetition penalty (as vLLM's
        logprobs). Float32 values.
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
    stop_reason: str | int | None = None
    logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decision:
    """One meta-action. Tuples have one entry per prefix in `prefix_ids`.

    Attributes:
      step: serial decode steps of this prompt so far.
      prefix_ids: all prefixes at this moment; -1 is the root.
      multiplicity: 0 = pause (or, for a finished prefix, drop), 1 = continue (or keep), 2+ =
        branch.
      planned_pause_bin: planned pause bin, -1 for none.
      utility: of the chosen action (NaN for strategies that have none).
      expected_reward, expected_remaining, tokens: of each prefix, before the action.
      finished: whether each prefix has ended.
      joints: `[prefixes, B_V, B_T]` float32, what was decided on: the mean joint over the last
        `window` tokens of each prefix. None unless `return_joints` asked for it. Two decisions are
        compared without it.
    """

    step: int
    prefix_ids: tuple[int, ...]
    multiplicity: tuple[int, ...]
    planned_pause_bin: int
    utility: float
    expected_reward: tuple[float, ...]
    expected_remaining: tuple[float, ...]
    tokens: tuple[int, ...]
    finished: tuple[bool, ...]
    joints: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Cost of one prompt.

    Attributes:
      prompt_tokens: tokens of the prompt.
      tokens: generated tokens of all prefixes; a shared prefix counts once. Those that were
        computed past a stop string, up to the end of its interval, count too, though no prefix
        holds them.
      serial_steps: decode steps in which at least one prefix of the prompt was live.
      seconds: wall-clock from admission to the end of the prompt (other prompts share the machine
        meanwhile).
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
      finish_reason: of the answer prefix; "abstain" where none finished or its expected reward is
        below `abstain_below`; "token_budget" or "time_budget" if that ended the search: the answer
        is what had finished until then, else the most promising unfinished prefix; "error" if the
        prompt could not be decoded or the model failed on it: no answer, though some prefixes may
        have finished.
      expected_reward, expected_remaining: of the answer prefix, also of one withheld by
        `abstain_below`; of the root where there is no such prefix (NaN if the model never saw the
        prompt).
      value_text: text of the finished prefix with the highest value.
      vote_text: text of the most valuable prefix of the answer group with the largest sum of
        values. `text` is one of these two, unless
        `answer` is a function.
      prefixes, trace, usage: see the classes.
      template_hash: `Tokenizer.template_hash` of the template that rendered the prompt; None for a
        raw prompt.
      error: what went wrong, "" if nothing did.
      prompt_token_ids: what the model read, special tokens included. Empty if the prompt could not
        be read.
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

    def to_dict(self, *, logprobs: bool = False, joints: bool = False) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON.

        Args:
          logprobs, joints: include these, which are several times as large as all the rest.
        """
        data = dataclasses.asdict(self)
        for prefix in data["prefixes"]:
            if not logprobs:
                del prefix["logprobs"]
        for decision in data["trace"]:
            arrays = decision.pop("joints")
            if joints and arrays is not None:
                decision["joints"] = arrays.tolist()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """Inverse of `to_dict`, also after JSON (where tuples are lists and NaN is null)."""

        def tuples(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else math.nan if value is None else value

        def prefix(x: dict[str, Any]) -> Prefix:
            read = {k: v if k == "stop_reason" else tuples(v) for k, v in x.items()}
            return Prefix(**read)

        def decision(x: dict[str, Any]) -> Decision:
            joints = None if x.get("joints") is None else np.asarray(x["joints"], np.float32)
            read = {k: tuples(v) for k, v in x.items() if k != "joints"}
            if "future_bin" in read:  # its name until 0.2
                read["planned_pause_bin"] = read.pop("future_bin")
            return Decision(**read, joints=joints)

        expected = {name: tuples(data[name]) for name in ("expected_reward", "expected_remaining")}
        prefixes = tuple(map(prefix, data["prefixes"]))
        trace = tuple(map(decision, data["trace"]))
        made = {"prefixes": prefixes, "trace": trace, "usage": Usage(**data["usage"])}
        ids = {"prompt_token_ids": tuple(data.get("prompt_token_ids", ()))}
        return cls(**{**data, **expected, **made, **ids})
