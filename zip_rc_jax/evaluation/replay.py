"""What a decode would have done with stored samples: every decision again, without a model.

All samples of a prompt start at the root, and a sample's tokens do not depend on its company. So
the joint of each sample at each decision point is all that a decode needs. The decisions are those
of `search.decide`, in its own compiled programs; here is only what the engine does with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.plugins import ANSWER_CHOICES
from zip_rc_jax.data.sample_pool import PoolFiles, unpacked
from zip_rc_jax.evaluation.baselines import SamplePool
from zip_rc_jax.evaluation.selection import vote_rewards
from zip_rc_jax.grading.votes import NO_ANSWER, answer_groups
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.state import bucket
from zip_rc_jax.inference.tree import expectations
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.inputs import SearchInputs
from zip_rc_jax.search.policies import decide, starts_from_root

NUMBERS_AT_ONCE = 2**23  # of the joints that are decided on together
_CLOSE = 1e-9  # sums of votes this close are added exactly, as the decoder does


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayPool:
    """`N` samples of each of `P` prompts, in memory, with the joints of one window.

    Attributes:
      grid: of the joints, `C` cells.
      stride, window: tokens between joints, and how many tokens a joint is the mean of.
      max_tokens: of the decode.
      stops: whether stop strings may have ended samples.
      extractor, equivalence: how votes read and compare answers, see `answer_groups`.
      length, computed: int32 `[P, N]`, see `PoolSample`.
      stopped: bool `[P, N]`, ended before `max_tokens`.
      correct, value: float64 `[P, N]`, reward, and expected reward at the end.
      answer_id: int64 `[P, N]`; -1 is no answer.
      level: int64 `[P]`.
      texts: of the samples of those prompts whose subsets must be grouped one by one.
      root: float32 `[P, C]`.
      end: `[P, N, C]`, as stored.
      joints: `[M, C]`, as stored: all joints of all samples, one sample after the other.
      first: int64 `[P, N]`, where those of each sample begin. Entry `k` is after `(k + 1) * stride`
        tokens.
      kind: how `end` and `joints` are stored, see `sample_pool.packed`.
      tries: how many rows in a row are tries of one problem, see `SamplePool`.
    """

    grid: Grid
    stride: int
    window: int
    max_tokens: int
    stops: bool
    extractor: Any
    equivalence: Any
    length: np.ndarray
    computed: np.ndarray
    stopped: np.ndarray
    correct: np.ndarray
    value: np.ndarray
    answer_id: np.ndarray
    level: np.ndarray
    texts: dict[int, list[str]]
    root: np.ndarray
    end: np.ndarray
    joints: np.ndarray
    first: np.ndarray
    kind: str
    tries: int = 1

    def samples(self) -> SamplePool:
        """What fixed methods read of it."""
        arrays = (self.correct, self.answer_id, self.value, self.length, self.level)
        return SamplePool(*arrays, tries=self.tries)

    @property
    def n_prompts(self) -> int:
        return self.length.shape[0]

    @property
    def n_samples(self) -> int:
        return self.length.shape[1]

    @property
    def mean_length(self) -> np.ndarray:
        """`[P]` float64, mean tokens of one sample of each prompt: the unit of cost."""
        return self.samples().mean_length

    def joint_at(self, prompt: np.ndarray, sample: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Float32 `[..., C]` that is decided on after `tokens` tokens of each sample: multiples of
        the stride, or all that it has."""
        length = self.length[prompt, sample]
        ended = tokens >= length
        found = np.asarray(self.root[prompt])
        within = (tokens > 0) & ~ended
        place = self.first[prompt, sample] + tokens // self.stride - 1
        found[within] = unpacked(self.joints[place[within]], self.kind)
        found[ended] = unpacked(self.end[prompt[ended], sample[ended]], self.kind)
        return found


def load_pool(
    files: PoolFiles,
    *,
    samples: int | None = None,
    window: int | None = None,
    unfinished: str = "graded",
) -> ReplayPool:
    """Reads what a replay needs of a pool.

    Args:
      samples: the first so many of every prompt; None takes all.
      window: of the joints, a multiple of the stride; None takes the one that was decoded with.
      unfinished: what a sample that `max_tokens` cut off is worth, see `GradeConfig`.

    Raises:
      UsageError: a damaged pool, one without so many samples, or a window that it does not give.
    """
    about = files.metadata
    grid, kind = Grid.from_dict(about["grid"]), about["joints"]
    stride, own = about["stride"], about["window"]
    window = own if window is None else window
    check_window(window, about)
    prompts, stored = about["prompts"], about["samples"]
    samples = stored if samples is None else samples
    if samples > stored:
        raise UsageError(
            f"{samples} samples of pool {files.directory}",
            f"it has {stored} of every prompt",
            f"use at most {stored}, or delete the pool to make a larger one",
        )
    shape = (prompts, samples)
    integer = {name: np.zeros(shape, np.int32) for name in ("length", "computed")}
    floating = {name: np.zeros(shape) for name in ("correct", "value")}
    stopped, answer_id = np.zeros(shape, bool), np.full(shape, NO_ANSWER, np.int64)
    level, first = np.zeros(prompts, np.int64), np.zeros(shape, np.int64)
    root = np.zeros((prompts, grid.n_cells), np.float32)
    texts: dict[int, list[str]] = {}
    ends: list[np.ndarray] = []
    joints: list[np.ndarray] = []
    count = 0
    names = ("root", "joints", "end") if window == own else ("root", "blocks", "tail")
    for number, record in enumerate(files.records((*names, "token_ids"))):
        p, k = divmod(number, stored)
        if (record["prompt_index"], record["sample_index"]) != (p, k):
            reason = f"sample {number} is of prompt {record['prompt_index']}, not {p}"
            raise UsageError(f"pool {files.directory}", reason, "delete it to make it again")
        if k >= samples:
            continue
        here = p, k
        length = integer["length"][here] = len(record["token_ids"])
        integer["computed"][here], stopped[here] = record["computed"], record["stopped"]
        cut = unfinished == "wrong" and not record["stopped"]
        floating["correct"][here] = 0.0 if cut else record["correct"]
        answer_id[here], level[p] = record["answer_id"], record["level"]
        if not record["separable"]:
            texts.setdefault(p, []).append(record["text"])
        root[p] = unpacked(record["root"], kind)
        if window == own:
            along, end = record["joints"], record["end"]
            floating["value"][here] = record["value"]
        else:
            blocks, tail = (unpacked(record[name], kind) for name in ("blocks", "tail"))
            along = windowed(blocks, root[p], stride, window)
            end = windowed_end(tail, int(length), stride, window)
            floating["value"][here] = expectations(end, grid)[0]
        first[here], count = count, count + len(along)
        joints.append(np.array(along))
        ends.append(np.array(end))
    dtype = ends[0].dtype if ends else np.float32
    flat = np.concatenate(joints) if count else np.zeros((0, grid.n_cells), dtype)
    shaping = about["settings"]["decode"]
    return ReplayPool(
        grid=grid,
        stride=stride,
        window=window,
        max_tokens=shaping["max_tokens"],
        stops=bool(shaping["stop"]),
        extractor=shaping["answer_extractor"],
        equivalence=shaping["answer_equivalence"],
        **integer,
        stopped=stopped,
        **floating,
        answer_id=answer_id,
        level=level,
        texts=texts,
        root=root,
        end=np.stack(ends).reshape(*shape, -1),
        joints=flat,
        first=first,
        kind=kind if window == own else "float32",
        tries=about.get("tries", 1),
    )


def windowed(blocks: np.ndarray, root: np.ndarray, stride: int, window: int) -> np.ndarray:
    """Mean joint `[K, C]` over the last `window` joints after S, 2S, ... tokens, from
    `PoolSample.blocks` `[K, C]` and joint number 0 `[C]`."""
    # Joints 0..t are t + 1: the root counts until the window has passed it.
    sums = np.cumsum(blocks.astype(np.float64) * stride, 0)
    wide = window // stride
    tokens = stride * np.arange(1, len(blocks) + 1)
    before = np.zeros_like(sums)
    before[wide:] = sums[:-wide] if len(sums) > wide else 0
    total = sums - before + np.where(tokens < window, 1, 0)[:, None] * root
    return (total / np.minimum(tokens + 1, window)[:, None]).astype(np.float32)


def windowed_end(tail: np.ndarray, length: int, stride: int, window: int) -> np.ndarray:
    """Mean joint `[C]` over the last `window` joints of a sample of `length` tokens, from
    `PoolSample.tail`."""
    used = tail[: window // stride].astype(np.float64)
    sizes = np.minimum(stride, length - stride * np.arange(len(used)))
    return ((used * sizes[:, None]).sum(0) / sizes.sum()).astype(np.float32)


# ---- what a pool gives


def check_window(window: int, about: dict[str, Any]) -> None:
    """Raises UsageError for a window that a pool with the metadata `about` does not give."""
    stride, own = about["stride"], about["window"]
    if window != own and window % stride:
        raise UsageError(
            f"window={window}",
            f"the pool has the mean joint of every {stride} tokens, and the windows of {own}",
            f"use {own} or a multiple of {stride}, or make a pool with a smaller replay.stride",
        )


def check_replayable(config: DecodeConfig, about: dict[str, Any]) -> None:
    """Checks that a pool with the metadata `about` decides as a decode with `config` would.

    Raises:
      UsageError: it starts prefixes from others, or depends on what no pool holds.
    """
    stride, decode = about["stride"], about["settings"]["decode"]
    online = "decode it online, by `zip-rc evaluate`"
    if starts_from_root(config):
        raise UsageError(
            f"candidates={config.candidates!r} in a replay",
            "it starts prefixes in the middle of others, and a pool holds samples from the root",
            f"use candidates='published' or 'exhaustive', or {online}",
        )
    if config.time_budget:
        reason = "a replay has no clock of the decode"
        raise UsageError(f"time_budget={config.time_budget:g} in a replay", reason, online)
    if not ANSWER_CHOICES.is_builtin(config.answer):
        reason = "it reads the prefixes of a decode, and a replay has none"
        raise UsageError(f"answer={config.answer!r} in a replay", reason, "use 'value' or 'vote'")
    if config.max_tokens != decode["max_tokens"]:
        raise UsageError(
            f"max_tokens={config.max_tokens} in a replay",
            f"the pool's samples were drawn with {decode['max_tokens']}",
            f"use {decode['max_tokens']}, or make a pool with decode.max_tokens="
            f"{config.max_tokens}",
        )
    if config.interval % stride:
        raise UsageError(
            f"interval={config.interval}",
            f"the pool has a joint every {stride} tokens",
            f"use a multiple of {stride}, or make a pool with a smaller replay.stride",
        )
    if config.token_budget and stride != 1:
        raise UsageError(
            f"token_budget={config.token_budget} with a pool of stride {stride}",
            "a budget that runs short is shared, so prefixes rest between the stored joints",
            "make a pool with replay.stride=1, or leave the budget out",
        )
    if decode["stop"] and config.interval != stride:
        raise UsageError(
            f"interval={config.interval} with stop strings and a pool of stride {stride}",
            "tokens past a stop string are computed up to the end of an interval, and the pool "
            "knows that of its own",
            f"use interval={stride}",
        )
    check_window(config.window, about)
    if config.n > about["samples"]:
        raise UsageError(
            f"n={config.n} in a replay",
            f"the pool has {about['samples']} samples of every prompt",
            f"use at most {about['samples']}, or delete the pool and set replay.samples",
        )


# ---- replay


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayDecision:
    """One meta-action of one replayed decode, as `outputs.Decision` tells of it.

    Tuples have one entry per sample.
    """

    step: int
    multiplicity: tuple[int, ...]
    planned_pause_bin: int
    utility: float
    tokens: tuple[int, ...]
    finished: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """A setting replayed on `S` subsets of `n` samples of `P` prompts.

    Attributes:
      by_value, by_vote: int64 `[P, S]`, the sample that is the answer, as its number in the pool;
        -1 for none.
      correct_by_value, correct_by_vote, correct_by_majority: float64 `[P, S]`, see `OnlineRun`.
      tokens, serial_steps: int64 `[P, S]`, what it would have cost.
      n_started, n_finished: int64 `[P, S]`, samples with any token, and those that ended.
      reason: `[P, S]`, "token_budget" where the budget ended it, "" elsewhere.
      lengths: int32 `[P, S, n]`, tokens of every sample when it ended.
      traces: `[P][S]` decisions, where they were asked for.
    """

    by_value: np.ndarray
    by_vote: np.ndarray
    correct_by_value: np.ndarray
    correct_by_vote: np.ndarray
    correct_by_majority: np.ndarray
    tokens: np.ndarray
    serial_steps: np.ndarray
    n_started: np.ndarray
    n_finished: np.ndarray
    reason: np.ndarray
    lengths: np.ndarray
    traces: list[list[list[ReplayDecision]]] | None = None


def replay(
    pool: ReplayPool,
    config: DecodeConfig,
    members: np.ndarray,
    prices: Sequence[tuple[float, float]] | None = None,
    *,
    traces: bool = False,
) -> list[Replayed]:
    """Replays one setting at several prices.

    Args:
      config: of the decode. `check_replayable` says which a pool gives.
      members: int `[S, n]`, samples of each subset, ascending. Subset `0 .. n - 1` is what an
        online decode of n samples draws.
      prices: (alpha, beta) of each result; None for those of `config`.
      traces: keep every decision.

    Memory: joints of at most `NUMBERS_AT_ONCE` numbers are gathered at once.
    """
    prices = [(config.alpha, config.beta)] if prices is None else list(prices)
    members = np.asarray(members, np.int64)
    subsets, n = members.shape
    each = pool.n_prompts * subsets
    total = len(prices) * each
    size = max(1, NUMBERS_AT_ONCE // (n * pool.grid.n_cells))
    parts = []
    for start in range(0, total, size):
        number = np.arange(start, min(start + size, total))
        price, rest = number // each, number % each
        alpha, beta = (np.array([p[i] for p in prices], np.float32)[price] for i in (0, 1))
        group = _Groups(pool, config, rest // subsets, members[rest % subsets], alpha, beta, traces)
        group.run()
        parts.append(group.outcome())
    columns = {
        name: np.concatenate([part[name] for part in parts])
        for name in parts[0]
        if name != "traces"
    }
    kept = [trace for part in parts for trace in part["traces"]] if traces else []

    def of_price(i: int) -> Replayed:
        here = slice(i * each, (i + 1) * each)
        shape = (pool.n_prompts, subsets)
        found = {name: x[here].reshape(*shape, *x.shape[1:]) for name, x in columns.items()}
        mine = kept[here]
        rows = [mine[p * subsets : (p + 1) * subsets] for p in range(pool.n_prompts)]
        return Replayed(**found, traces=rows if traces else None)

    return [of_price(i) for i in range(len(prices))]


class _Groups:
    """Decodes that are replayed together: `V` groups of `n` samples each."""

    def __init__(
        self,
        pool: ReplayPool,
        config: DecodeConfig,
        prompt: np.ndarray,
        sample: np.ndarray,
        alpha: np.ndarray,
        beta: np.ndarray,
        traces: bool,
    ):
        """Args: `prompt`, `alpha`, `beta` `[V]` and `sample` `[V, n]` say what each group is."""
        self.pool, self.config = pool, config
        self.prompt, self.sample, self.alpha, self.beta = prompt, sample, alpha, beta
        at = prompt[:, None], sample
        self.length = pool.length[at].astype(np.int64)
        # What an interval computes past a stop string.
        self.computed = pool.computed[at].astype(np.int64)
        self.tokens = np.zeros_like(self.length)
        self.dropped = np.zeros(len(prompt), np.int64)
        self.steps = np.zeros(len(prompt), np.int64)
        self.budget_spent = np.zeros(len(prompt), bool)
        self.traces: list[list[ReplayDecision]] | None = [[] for _ in prompt] if traces else None

    @property
    def finished(self) -> np.ndarray:
        return self.tokens >= self.length

    @property
    def used(self) -> np.ndarray:
        """`[V]`, tokens that each group has spent."""
        return self.tokens.sum(1) + self.dropped

    def run(self) -> None:
        """Decides and extends until every group extends nothing."""
        active = np.arange(len(self.prompt))
        while len(active):
            multiplicity, planned_pause_bin, utility = self._decide(active)
            live = (multiplicity > 0) & ~self.finished[active]
            extends = live.any(1)
            budget = self.config.token_budget
            # A budget that runs out together with the search ended nothing.
            spent = extends & (self.used[active] >= budget) if budget else np.zeros_like(extends)
            self.budget_spent[active[spent]] = True
            if self.traces is not None:
                kept = np.where(spent[:, None], self.finished[active], multiplicity)
                planned_pause_bin = np.where(spent, -1, planned_pause_bin)
                utility = np.where(spent, np.nan, utility)
                self._record(active, kept, planned_pause_bin, utility)
            goes_on = extends & ~spent
            active, live = active[goes_on], live[goes_on]
            self._extend(active, live)

    def _decide(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Multiplicity `[A, n]`, future bin `[A]` and utility `[A]` of the active groups."""
        grid, count, n = self.pool.grid, len(active), self.sample.shape[1]
        # Padded as the engine does, so that a jitted policy compiles seldom.
        size = bucket(count)
        joint = np.full((size, n, grid.n_cells), 1 / grid.n_cells, np.float32)
        joint[:count] = self.pool.joint_at(
            np.broadcast_to(self.prompt[active, None], (count, n)),
            self.sample[active],
            self.tokens[active],
        )
        finished = self.finished[active]

        def padded(values: np.ndarray, dtype: Any) -> np.ndarray:
            found = np.zeros((size, *values.shape[1:]), dtype)
            found[:count] = values
            return found

        inputs = SearchInputs(
            joint=joint.reshape(size, n, grid.n_reward, grid.n_length),
            unfinished=padded(~finished, bool),
            tokens_so_far=padded(self.tokens[active], np.int32),
            exists=padded(np.ones((count, n)), bool),
            max_new_prefixes=np.zeros(size, np.int32),
            alpha=padded(self.alpha[active], np.float32),
            beta=padded(self.beta[active], np.float32),
            must_extend=padded(
                np.full(count, not self.config.allow_no_answer) & ~finished.any(1), bool
            ),
        )
        if self.config.evidence == "answers":
            answer = padded(self._answers(active), np.int32)
            inputs = dataclasses.replace(inputs, answer=answer)
        action = decide(inputs, grid=grid, config=self.config)
        return action.multiplicity[:count], action.planned_pause_bin[:count], action.utility[:count]

    def _extend(self, active: np.ndarray, live: np.ndarray) -> None:
        """One interval of the samples `live` `[A, n]`."""
        quota = np.full(live.shape, self.config.interval)
        if self.config.token_budget and len(active):
            # Where it runs short the live samples share what is left; the first get more.
            left, count = self.config.token_budget - self.used[active], live.sum(1)
            share = (left // count)[:, None] + (np.cumsum(live, 1) - 1 < (left % count)[:, None])
            quota = np.minimum(quota, share)
        before = self.tokens[active]
        new = np.where(live, np.minimum(quota, self.computed[active] - before), 0)
        self.tokens[active] = np.minimum(before + new, self.length[active])
        self.dropped[active] += (before + new - self.tokens[active]).sum(1)
        self.steps[active] += new.max(1, initial=0)

    def _record(
        self,
        active: np.ndarray,
        multiplicity: np.ndarray,
        planned_pause_bin: np.ndarray,
        utility: np.ndarray,
    ) -> None:
        assert self.traces is not None
        finished = self.finished
        for row, group in enumerate(active.tolist()):
            self.traces[group].append(
                ReplayDecision(
                    step=int(self.steps[group]),
                    multiplicity=tuple(multiplicity[row].astype(int).tolist()),
                    planned_pause_bin=int(planned_pause_bin[row]),
                    utility=float(utility[row]),
                    tokens=tuple(self.tokens[group].tolist()),
                    finished=tuple(finished[group].tolist()),
                )
            )

    # ---- answers

    def outcome(self) -> dict[str, Any]:
        """The columns of `Replayed`, `[V]` each."""
        pool, at, finished = self.pool, (self.prompt[:, None], self.sample), self.finished
        ids, value = self._answers(np.arange(len(self.prompt))), pool.value[at]
        best = best_sample(value, finished, pool.stopped[at])
        voted = voted_sample(value, finished, pool.stopped[at], ids)
        cut = self.budget_spent & (best < 0)
        if cut.any():
            best[cut] = voted[cut] = self._cut(np.flatnonzero(cut))
        chosen = {"value": best, "vote": voted}[self.config.answer]
        reward = np.take_along_axis(value, np.maximum(chosen, 0)[:, None], 1)[:, 0]
        withheld = (chosen < 0) | (~cut & (reward < self.config.abstain_below))
        if self.config.abstain_below and cut.any():
            rows = np.flatnonzero(cut)
            withheld[rows] = [
                r < self.config.abstain_below for r in self._rewards(rows, chosen[rows])
            ]
        best, voted = np.where(withheld, -1, best), np.where(withheld, -1, voted)

        def number(slot: np.ndarray) -> np.ndarray:
            found = np.take_along_axis(self.sample, np.maximum(slot, 0)[:, None], 1)[:, 0]
            return np.where(slot < 0, -1, found)

        def correct(slot: np.ndarray) -> np.ndarray:
            right = pool.correct[self.prompt, np.maximum(number(slot), 0)]
            return np.where(slot < 0, 0.0, right)

        return {
            "by_value": number(best),
            "by_vote": number(voted),
            "correct_by_value": correct(best),
            "correct_by_vote": correct(voted),
            "correct_by_majority": majority_rewards(pool.correct[at], ids, finished),
            "tokens": self.used,
            "serial_steps": self.steps,
            "n_started": (self.tokens > 0).sum(1),
            "n_finished": finished.sum(1),
            "reason": np.where(self.budget_spent, "token_budget", ""),
            "lengths": self.tokens.astype(np.int32),
            "traces": self.traces,
        }

    def _answers(self, groups: np.ndarray) -> np.ndarray:
        """Answer groups `[A, n]` of the finished samples of `groups`; -1 elsewhere."""
        prompt, sample, finished = self.prompt[groups], self.sample[groups], self.finished[groups]
        ids = np.where(finished, self.pool.answer_id[prompt[:, None], sample], NO_ANSWER)
        # Which answers are one may depend on which others there are, so these are grouped alone.
        for row in np.flatnonzero(np.isin(prompt, list(self.pool.texts))):
            texts = self.pool.texts[int(prompt[row])]
            slots = np.flatnonzero(finished[row])
            mine = [texts[i] for i in sample[row, slots]]
            ids[row, slots] = answer_groups(mine, self.pool.extractor, self.pool.equivalence)
        return ids

    def _rewards(self, rows: np.ndarray, slots: np.ndarray) -> list[float]:
        """Expected reward of one sample of each group as it is now."""
        at = self.prompt[rows], self.sample[rows, slots], self.tokens[rows, slots]
        return [expectations(joint, self.pool.grid)[0] for joint in self.pool.joint_at(*at)]

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        """Of groups that a budget ended: the most promising sample with any token, -1 if none."""
        found = []
        for row in rows:
            slots = np.flatnonzero(self.tokens[row])
            rewards = self._rewards(np.full(len(slots), row), slots)
            found.append(slots[int(np.argmax(rewards))] if len(slots) else -1)
        return np.asarray(found)


def best_sample(value: np.ndarray, finished: np.ndarray, stopped: np.ndarray) -> np.ndarray:
    """`[V]`, what `tree.best_prefix` chooses among samples `[V, n]`; -1 where none has finished."""
    whole = finished & stopped
    among = np.where(whole.any(1, keepdims=True), whole, finished)
    best = np.where(among, value, -np.inf).argmax(1)
    return np.where(among.any(1), best, -1)


def voted_sample(
    value: np.ndarray, finished: np.ndarray, stopped: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """`[V]`, what `tree.voted_prefix` chooses among samples `[V, n]` with answers `ids`."""
    votes = finished & (ids != NO_ANSWER)
    same = (ids[:, :, None] == ids[:, None, :]) & votes[:, :, None] & votes[:, None, :]
    score = np.where(votes, np.einsum("vij,vj->vi", same, value), -np.inf)
    top = score.argmax(1)
    rows = np.arange(len(value))
    # Rounded sums that are close are added exactly; of equal ones the first answer wins.
    rival = votes & ~same[rows, top]
    close = (np.where(rival, score, -np.inf).max(1) >= score[rows, top] - _CLOSE) & votes.any(1)
    for row in np.flatnonzero(close):
        slots = np.flatnonzero(votes[row])
        exact = [math.fsum(value[row, same[row, slot]].tolist()) for slot in slots]
        top[row] = slots[int(np.argmax(exact))]
    best = best_sample(value, same[rows, top], stopped)
    return np.where(votes.any(1), best, best_sample(value, finished, stopped))


def majority_rewards(correct: np.ndarray, ids: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """`[V]`, what `baselines.majority_reward` gives for the finished ones among samples
    `[V, n]`."""
    return vote_rewards(ids, np.ones(ids.shape), correct, finished)


def replayed_in_order(
    pool_of: Callable[[int], ReplayPool],
    settings: Iterable[DecodeConfig],
    members: dict[int, np.ndarray],
) -> Iterator[Replayed]:
    """Replays settings, those together that differ in their prices alone; results in order.

    Args:
      pool_of: the pool with joints of a window.
      members: subsets by n.
    """
    ordered = list(settings)
    groups: dict[DecodeConfig, list[int]] = {}
    for number, setting in enumerate(ordered):
        groups.setdefault(dataclasses.replace(setting, alpha=0, beta=0), []).append(number)
    found: dict[int, Replayed] = {}
    following = 0
    for numbers in groups.values():
        setting = ordered[numbers[0]]
        prices = [(ordered[i].alpha, ordered[i].beta) for i in numbers]
        results = replay(pool_of(setting.window), setting, members[setting.n], prices)
        found |= dict(zip(numbers, results, strict=True))
        while following in found:
            yield found.pop(following)
            following += 1
