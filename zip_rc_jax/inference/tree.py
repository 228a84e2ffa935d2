"""Host records of the prompts in flight and of their prefixes, and what becomes of them: decisions,
text as it grows, results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.plugins import ANSWER_CHOICES
from zip_rc_jax.grading.votes import NO_ANSWER, answer_groups
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.outputs import Decision, Prefix, Result, Usage
from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.requests import RejectedRequest, TokenizedRequest
from zip_rc_jax.inference.stopping import UNFINISHED_CHARACTER, JointHistory, Stop, withheld
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.runtime.errors import UsageError

ROOT = -1


@dataclasses.dataclass
class Branch:
    """One prefix. `sequence` says where it is: None before it first runs, and once it has ended."""

    id: int
    parent: int
    fork_position: int
    sequence: PagedSequence | None = None
    live: bool = False
    finished: bool = False
    stopped: bool = False  # by a stop id, rather than by max_tokens
    failed: bool = False  # the logits after its last token are not finite
    tokens: tuple[int, ...] = ()
    streamed: int = 0  # tokens that were streamed
    shown: int = 0  # tokens whose text was streamed
    anchor: int = 0  # where the text streamed last begins
    joint: Any = None
    logprobs: tuple[float, ...] = ()
    history: JointHistory | None = None  # only where a stop string may end it
    stop: Stop | None = None  # the stop string that ended it
    held: str = ""  # text that may be the beginning of a stop string, and was not streamed yet
    told: int = 0  # characters that were streamed

    @property
    def ended(self) -> bool:
        return self.finished or self.failed

    def text(self, tokenizer: Tokenizer) -> str:
        """Its text, up to the stop string that ended it."""
        return tokenizer.decode(self.tokens) if self.stop is None else self.stop.text

    def new_text(self, tokenizer: Tokenizer, last: bool, stop: Sequence[str] = ()) -> str:
        """What its text has gained since the last call.

        Text that may begin one of the strings `stop` waits for the rest. So do bytes of an
        unfinished character. At the `last` call nothing waits.
        """
        gained = self._gained(tokenizer, last)
        if not stop:
            return gained
        self.held += gained
        if self.stop is not None:
            new, self.held = self.stop.text[self.told :], ""
        else:
            keep = 0 if last else withheld(self.held, stop)
            new = self.held[: len(self.held) - keep]
            self.held = self.held[len(new) :]
        self.told += len(new)
        return new

    def _gained(self, tokenizer: Tokenizer, last: bool) -> str:
        """As `new_text`, without stop strings."""
        if self.shown == len(self.tokens):
            return ""
        # How a token reads may depend on the one before it, so the text streamed last is decoded
        # once more together with the new one.
        before = tokenizer.decode(self.tokens[self.anchor : self.shown])
        text = tokenizer.decode(self.tokens[self.anchor :])
        if text.endswith(UNFINISHED_CHARACTER) and not last:
            return ""
        new = text[len(before) :]
        if new:  # special tokens have no text, so none can begin what follows them
            self.anchor = self.shown
        self.shown = len(self.tokens)
        return new


@dataclasses.dataclass(frozen=True)
class Action:
    """What was decided for one prompt.

    Attributes:
      multiplicity: of every prefix.
      starts: new samples of the root; None where that is no choice.
      planned_pause_bin, utility: as in `Decision`.
      reward, remaining: what is expected of every prefix, and last of the root; tokens.
    """

    multiplicity: list[int]
    starts: int | None
    planned_pause_bin: int
    utility: float
    reward: list[float]
    remaining: list[float]


@dataclasses.dataclass
class SearchTree:
    """One prompt in flight.

    Attributes:
      root: the prompt without any generated token, which all prefixes begin as; the last one to
        begin takes it over.
      steps: serial decode steps until the last decision; `since`: those after it.
      reason: why it was stopped before the search ended it: "error", "token_budget", "time_budget",
        or "".
      error: what went wrong.
    """

    job: TokenizedRequest
    started: float
    root_joint: Any
    shard: int
    root: PagedSequence | None
    branches: list[Branch] = dataclasses.field(default_factory=list)
    trace: list[Decision] = dataclasses.field(default_factory=list)
    steps: int = 0
    since: int = 0
    reason: str = ""
    error: str = ""
    dropped: int = 0  # tokens that were computed past a stop string
    _answers: dict[int, int] = dataclasses.field(default_factory=dict)

    def live(self) -> list[Branch]:
        return [b for b in self.branches if b.live]

    @property
    def unborn(self) -> int:
        """Prefixes that may still begin."""
        return self.job.config.n - sum(b.sequence is not None or b.ended for b in self.branches)

    def begin(self, action: Action) -> list[tuple[Branch, Branch | None]]:
        """Makes live what `action` extends.

        Returns the prefixes that have no sequence yet, each with the one that it begins as; None is
        the root.
        """
        new: list[tuple[Branch, Branch | None]] = []
        for branch, k in zip(list(self.branches), action.multiplicity, strict=True):
            if branch.ended:
                continue
            branch.live = k > 0
            if branch.live and branch.sequence is None:
                new.append((branch, None))
            new += [(self._grow(branch), branch) for _ in range(k - 1)]
        return new + [(self._grow(None), None) for _ in range(action.starts or 0)]

    def sample(self, number: int) -> Branch:
        """A prefix without any token."""
        history = JointHistory(self.root_joint[None]) if self.job.config.stop else None
        return Branch(number, ROOT, 0, joint=self.root_joint, history=history)

    def _grow(self, parent: Branch | None) -> Branch:
        """A new live prefix: a copy of `parent`, or of the root (None)."""
        number = len(self.branches)
        if parent is None:
            branch = self.sample(number)
            branch.live = True
        else:
            branch = Branch(
                number,
                parent.id,
                len(parent.tokens),
                live=True,
                tokens=parent.tokens,
                joint=parent.joint,
            )
            branch.logprobs, branch.history = parent.logprobs, parent.history
        self.branches.append(branch)
        return branch

    def sequences(self) -> list[PagedSequence]:
        """All that it holds, the root's first."""
        held = [self.root, *(b.sequence for b in self.branches)]
        return [sequence for sequence in held if sequence is not None]

    @property
    def held_as(self) -> int:
        """The number of the prompt among those admitted."""
        return self.sequences()[0].prompt

    @property
    def used(self) -> int:
        """Tokens generated so far; a shared prefix counts once."""
        return self.dropped + sum(len(b.tokens) - b.fork_position for b in self.branches)

    def quotas(self, interval: int) -> list[int]:
        """Tokens that each live prefix may add now: `interval`, or its share of what is left of the
        token budget (the first get more)."""
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
        return (
            "time_budget" if config.time_budget and now - self.started >= config.time_budget else ""
        )

    def record(self, action: Action, shape: tuple[int, int]) -> Decision:
        """The decision that `action` is, before it is carried out; it becomes part of the trace.

        Args:
          shape: of a joint.
        """
        finished = [b.finished for b in self.branches]
        remaining = [
            0.0 if end else length
            for length, end in zip(action.remaining[: len(finished)], finished, strict=True)
        ]
        root = action.starts is not None
        joints = None
        if self.job.joints:
            rows = [b.joint for b in self.branches] + [self.root_joint] * root
            joints = np.stack(rows).reshape(len(rows), *shape)
        decision = Decision(
            step=self.steps,
            prefix_ids=tuple(range(len(finished))) + (ROOT,) * root,
            multiplicity=(*action.multiplicity, *[action.starts or 0] * root),
            planned_pause_bin=action.planned_pause_bin,
            utility=action.utility,
            expected_reward=(*action.reward[: len(finished)], *action.reward[-1:] * root),
            expected_remaining=(*remaining, *action.remaining[-1:] * root),
            tokens=(*(len(b.tokens) for b in self.branches), *[0] * root),
            finished=(*finished, *[False] * root),
            joints=joints,
        )
        self.trace.append(decision)
        return decision

    def answers(self, tokenizer: Tokenizer) -> list[int]:
        """Of every prefix the number of its answer, see `answer_groups`; `NO_ANSWER` of those that
        have not finished."""
        finished = [i for i, b in enumerate(self.branches) if b.finished]
        if len(finished) != len(self._answers):
            config = self.job.config
            texts = [self.branches[i].text(tokenizer) for i in finished]
            numbers = answer_groups(texts, config.answer_extractor, config.answer_equivalence)
            self._answers = dict(zip(finished, numbers, strict=True))
        return [self._answers.get(i, NO_ANSWER) for i in range(len(self.branches))]

    def progress(
        self, tokenizer: Tokenizer, last: bool
    ) -> tuple[dict[int, tuple[int, ...]], dict[int, str], dict[int, tuple[float, ...]]]:
        """Per prefix, the tokens, the text and the log-probabilities that it has gained since the
        last call; `last` as in `Branch.new_text`."""
        tokens, text, logprobs = {}, {}, {}
        for branch in self.branches:
            if len(branch.tokens) > branch.streamed:
                tokens[branch.id] = branch.tokens[branch.streamed :]
                logprobs[branch.id] = branch.logprobs[branch.streamed :]
                branch.streamed = len(branch.tokens)
            if new := branch.new_text(tokenizer, last, self.job.config.stop):
                text[branch.id] = new
        return tokens, text, logprobs

    def _prefix(self, b: Branch, grid: Grid, tokenizer: Tokenizer) -> Prefix:
        """A branch that is not live any more, as callers see it."""
        reward, remaining = expectations(b.joint, grid)
        state = "finished" if b.finished else "failed" if b.failed else "paused"
        stopped = "stop" if b.stopped else "length"
        reason = {"finished": stopped, "failed": "error", "paused": "paused"}[state]
        stop_reason: str | int | None = None
        if b.stop is not None:
            stop_reason = b.stop.string
        elif b.stopped and b.tokens[-1] not in tokenizer.eos_ids:
            stop_reason = b.tokens[-1]
        return Prefix(
            id=b.id,
            parent=b.parent,
            fork_position=b.fork_position,
            token_ids=b.tokens,
            text=b.text(tokenizer),
            state=state,
            finish_reason=reason,
            expected_reward=reward,
            expected_remaining=0.0 if b.finished else remaining,
            stop_reason=stop_reason,
            logprobs=b.logprobs,
        )

    def result(self, seconds: float, grid: Grid, tokenizer: Tokenizer) -> Result:
        """The outcome, once nothing is live any more."""
        prefixes = [self._prefix(b, grid, tokenizer) for b in self.branches]
        usage = Usage(len(self.job.ids), self.used, self.steps, seconds)
        config = self.job.config
        best, voted = (
            best_prefix(prefixes),
            voted_prefix(prefixes, config.answer_extractor, config.answer_equivalence),
        )
        if best is None and self.reason.endswith("budget"):
            best = voted = cut_prefix(prefixes)
        chosen = (
            {"value": best, "vote": voted}[config.answer]
            if ANSWER_CHOICES.is_builtin(config.answer)
            else _chosen(prefixes, config.answer)
        )
        withheld = chosen is not None and chosen.expected_reward < config.abstain_below
        common: dict[str, Any] = {
            "prompt": self.job.prompt,
            "prefixes": tuple(prefixes),
            "trace": tuple(self.trace),
            "usage": usage,
            "template_hash": self.job.template_hash,
            "error": self.error,
            "prompt_token_ids": tuple(self.job.ids),
        }
        if chosen is None or withheld or self.error:
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
            value_text=best.text if best else "",
            vote_text=voted.text if voted else "",
            **common,
        )


def failure(job: TokenizedRequest | RejectedRequest, error: str, seconds: float = 0.0) -> Result:
    """The result of a prompt that generated nothing because of `error`."""
    ids, template_hash = (
        (tuple(job.ids), job.template_hash) if isinstance(job, TokenizedRequest) else ((), None)
    )
    usage = Usage(len(ids), 0, 0, seconds)
    none = math.nan
    return Result(
        job.prompt, "", ROOT, "error", none, none, "", "", (), (), usage, template_hash, error, ids
    )


def expectations(joint: np.ndarray, grid: Grid) -> tuple[float, float]:
    """Expected reward and expected remaining tokens of a joint `[C]`."""
    table = joint.reshape(grid.n_reward, grid.n_length)
    # see `Grid.expected_reward`
    reward = np.clip(
        table.sum(1) @ grid.reward_centres, grid.reward_centres[0], grid.reward_centres[-1]
    )
    return float(reward), float(table.sum(0) @ grid.length_midpoints)


def _chosen(prefixes: Sequence[Prefix], answer: Any) -> Prefix | None:
    """What a function of the caller's chooses.

    Raises UsageError for anything but one of the prefixes or None.
    """
    chosen = ANSWER_CHOICES.resolve(answer)(tuple(prefixes))
    if chosen is None or any(chosen is p for p in prefixes):
        return chosen
    raise UsageError(
        f"answer {shown(answer)}",
        f"it returned {shown(chosen)}, which is none of the prefixes",
        "return one of them, or None",
    )


def best_prefix(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The finished prefix with the highest value; one cut off at max_tokens only if no other has
    finished. Ties go to the first."""
    finished = [p for p in prefixes if p.state == "finished"]
    stopped = [p for p in finished if p.finish_reason == "stop"]
    return max(stopped or finished, key=lambda p: p.expected_reward, default=None)


def cut_prefix(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The prefix with the highest value among those with any token. Ties go to the first."""
    return max((p for p in prefixes if p.token_ids), key=lambda p: p.expected_reward, default=None)


def voted_prefix(
    prefixes: Sequence[Prefix], extractor: Any = "stated", equivalence: Any = "grader"
) -> Prefix | None:
    """The most valuable finished prefix of the answer with the largest sum of values; without any
    answer, `best_prefix`.

    Equal answers vote together, however they are written: see `votes.answer_groups`, also for the
    arguments.
    """
    finished = [p for p in prefixes if p.state == "finished"]
    groups: dict[int, list[Prefix]] = {}
    numbers = answer_groups([p.text for p in finished], extractor, equivalence)
    for p, number in zip(finished, numbers, strict=True):
        if number != NO_ANSWER:
            groups.setdefault(number, []).append(p)
    if not groups:
        return best_prefix(prefixes)
    # A rounded sum would depend on the order of the prefixes.
    return best_prefix(
        max(groups.values(), key=lambda members: math.fsum(p.expected_reward for p in members))
    )
