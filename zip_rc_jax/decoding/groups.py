"""Host records of the prompts in flight and of their prefixes, and what becomes of them: decisions, text as it grows, results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.answers import extract_answer
from zip_rc_jax.decoding.requests import Job, Refusal
from zip_rc_jax.decoding.results import Decision, Prefix, Result, Usage
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.tokenizer import Tokenizer

ROOT = -1
UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass
class Branch:
    """One prefix. `row` is None once it has ended and its row was given back."""

    id: int
    parent: int
    fork_position: int
    row: int | None
    live: bool = True
    finished: bool = False
    stopped: bool = False  # by a stop id, rather than by max_tokens
    failed: bool = False  # the logits after its last token are not finite
    tokens: tuple[int, ...] = ()
    streamed: int = 0  # tokens that were streamed
    shown: int = 0  # tokens whose text was streamed
    anchor: int = 0  # where the text streamed last begins
    joint: Any = None

    def new_text(self, tokenizer: Tokenizer, last: bool) -> str:
        """What its text has gained since the last call. Bytes of an unfinished character wait for the rest, except at the `last` call."""
        # How a token reads may depend on the one before it, so the text streamed last is decoded once more together with the new one.
        before = tokenizer.decode(self.tokens[self.anchor : self.shown])
        text = tokenizer.decode(self.tokens[self.anchor :])
        if text.endswith(UNFINISHED_CHARACTER) and not last:
            return ""
        new = text[len(before) :]
        if new:  # special tokens have no text, so none can begin what follows them
            self.anchor = self.shown
        self.shown = len(self.tokens)
        return new


@dataclasses.dataclass
class Group:
    """One prompt in flight.

    Attributes:
      promised: rows that prefixes which branching may add will take.
      reason: why it was stopped before the search ended it: "error", "token_budget", "time_budget", or "".
      error: what went wrong.
    """

    job: Job
    started: float
    root_joint: Any
    shard: int
    root_row: int | None = None
    promised: int = 0
    branches: list[Branch] = dataclasses.field(default_factory=list)
    trace: list[Decision] = dataclasses.field(default_factory=list)
    steps: int = 0
    reason: str = ""
    error: str = ""

    def live(self) -> list[Branch]:
        return [b for b in self.branches if b.live]

    @property
    def used(self) -> int:
        """Tokens generated so far; a shared prefix counts once."""
        return sum(len(b.tokens) - b.fork_position for b in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the longest prefix, prompt included."""
        return len(self.job.ids) + max((len(b.tokens) for b in self.branches), default=0)

    def quotas(self, interval: int) -> list[int]:
        """Tokens that each live prefix may add now: `interval`, or its share of what is left of the token budget (the first get more)."""
        live = len(self.live())
        if not self.job.config.token_budget:
            return [interval] * live
        share, more = divmod(self.job.config.token_budget - self.used, live)
        return [min(interval, share + (i < more)) for i in range(live)]

    def exhausted(self, now: float) -> str:
        """Which budget is spent, "" if none is."""
        config = self.job.config
        if config.token_budget and self.used >= config.token_budget:
            return "token_budget"
        return "time_budget" if config.time_budget and now - self.started >= config.time_budget else ""

    def record(self, multiplicity: Sequence[int], root: int | None, future_bin: int, utility: float, grid: Grid) -> Decision:
        """The decision that gives each prefix its `multiplicity`, and the root (None where it is no choice) its number of new samples."""
        # (id, copies, joint, tokens, finished) of every prefix
        rows = [(b.id, int(k), b.joint, len(b.tokens), b.finished) for b, k in zip(self.branches, multiplicity, strict=True)]
        if root is not None:
            rows.append((ROOT, root, self.root_joint, 0, False))
        ids, copies, joints, tokens, finished = zip(*rows, strict=True)
        expected = [expectations(joint, grid) for joint in joints]
        return Decision(
            step=self.steps,
            prefix_ids=ids,
            multiplicity=copies,
            future_bin=future_bin,
            utility=utility,
            expected_reward=tuple(reward for reward, _ in expected),
            expected_remaining=tuple(0.0 if end else length for (_, length), end in zip(expected, finished, strict=True)),
            tokens=tokens,
            finished=finished,
        )

    def result(self, seconds: float, grid: Grid, tokenizer: Tokenizer) -> Result:
        """The outcome, once nothing is live any more."""
        prefixes = []
        for b in self.branches:
            reward, remaining = expectations(b.joint, grid)
            state = "finished" if b.finished else "failed" if b.failed else "paused"
            reason = {"finished": "stop" if b.stopped else "length", "failed": "error", "paused": "paused"}[state]
            text = tokenizer.decode(b.tokens)
            remaining = 0.0 if b.finished else remaining
            prefixes.append(Prefix(b.id, b.parent, b.fork_position, b.tokens, text, state, reason, reward, remaining))
        usage = Usage(len(self.job.ids), self.used, self.steps, seconds)
        best, voted = best_prefix(prefixes), voted_prefix(prefixes)
        if best is None and self.reason.endswith("budget"):
            best = voted = cut_prefix(prefixes)
        chosen = voted if self.job.config.answer == "vote" else best
        withheld = chosen is not None and chosen.expected_reward < self.job.config.abstain_below
        common: dict[str, Any] = {
            "prompt": self.job.prompt,
            "prefixes": tuple(prefixes),
            "trace": tuple(self.trace),
            "usage": usage,
            "template_hash": self.job.template_hash,
            "error": self.error,
        }
        if chosen is None or best is None or voted is None or withheld or self.error:
            reward, remaining = expectations(self.root_joint, grid)
            if withheld and chosen is not None:
                reward, remaining = chosen.expected_reward, chosen.expected_remaining
            reason = "abstain" if withheld and not self.error else self.reason or "abstain"
            return Result(
                text="",
                prefix_id=ROOT,
                finish_reason=reason,
                expected_reward=reward,
                expected_remaining=remaining,
                value_text="",
                vote_text="",
                **common,
            )
        return Result(
            text=chosen.text,
            prefix_id=chosen.id,
            finish_reason=self.reason or chosen.finish_reason,
            expected_reward=chosen.expected_reward,
            expected_remaining=chosen.expected_remaining,
            value_text=best.text,
            vote_text=voted.text,
            **common,
        )


def failure(job: Job | Refusal, error: str, seconds: float = 0.0) -> Result:
    """The result of a prompt of which nothing was generated because of `error`."""
    tokens, template_hash = (len(job.ids), job.template_hash) if isinstance(job, Job) else (0, None)
    usage = Usage(tokens, 0, 0, seconds)
    return Result(job.prompt, "", ROOT, "error", math.nan, math.nan, "", "", (), (), usage, template_hash, error)


def expectations(joint: np.ndarray, grid: Grid) -> tuple[float, float]:
    """Expected reward and expected remaining tokens of a joint `[C]`."""
    table = joint.reshape(grid.n_reward, grid.n_length)
    return float(table.sum(1) @ grid.reward_centres), float(table.sum(0) @ grid.length_midpoints)


def best_prefix(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The finished prefix with the highest value; one cut off at max_tokens only if no other has finished. Ties go to the first."""
    finished = [p for p in prefixes if p.state == "finished"]
    stopped = [p for p in finished if p.finish_reason == "stop"]
    return max(stopped or finished, key=lambda p: p.expected_reward, default=None)


def cut_prefix(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The prefix with the highest value among those with any token. Ties go to the first."""
    return max((p for p in prefixes if p.token_ids), key=lambda p: p.expected_reward, default=None)


def voted_prefix(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The most valuable finished prefix of the answer with the largest sum of values; without any answer, `best_prefix`."""
    finished = [p for p in prefixes if p.state == "finished"]
    groups: dict[str, list[Prefix]] = {}
    for p in finished:
        answer = extract_answer(p.text)
        if answer is not None:
            groups.setdefault(answer, []).append(p)
    if not groups:
        return best_prefix(prefixes)
    return best_prefix(max(groups.values(), key=lambda members: sum(p.expected_reward for p in members)))
