"""The decoder's outer loop: once per interval, decide for all prompts in flight, then move rows.

Host code. A prompt is admitted when the pool has room for it, runs until its best action extends nothing, and gives its rows back at
once (continuous batching across prompts). The jitted work is in `rows` (stepping) and `meta_actions` (deciding).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.answers import extract_answer
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.decoding.network import Network, TransformerNetwork
from zip_rc_jax.decoding.results import Decision, Prefix, Result, Usage
from zip_rc_jax.decoding.rows import Rows, StepSettings, advance, bucket, copy_rows, fork_rows, padded, prefill
from zip_rc_jax.decoding.strategies import View, choose
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.zip_head import ZipHead

ROOT = -1


@dataclasses.dataclass
class Branch:
    """Host record of one prefix. `row` is None once it has finished and its row was given back."""

    id: int
    parent: int
    fork_position: int
    row: int | None
    live: bool = True
    finished: bool = False
    stopped: bool = False  # by a stop id, rather than by max_tokens
    tokens: tuple[int, ...] = ()
    shown: int = 0  # tokens already streamed
    joint: Any = None


@dataclasses.dataclass
class Group:
    """Host record of one prompt in flight."""

    number: int
    prompt: str
    prompt_ids: list[int]
    started: float
    root_joint: Any
    root_row: int | None = None
    spare: list[int] = dataclasses.field(default_factory=list)  # rows for prefixes that branching may add
    branches: list[Branch] = dataclasses.field(default_factory=list)
    trace: list[Decision] = dataclasses.field(default_factory=list)
    steps: int = 0

    def live(self) -> list[Branch]:
        return [b for b in self.branches if b.live]


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """What streaming yields for one prompt at one decision.

    Attributes:
      prompt_index: which prompt.
      decision: the meta-action.
      new_text: per prefix id, the text generated since the last event.
    """

    prompt_index: int
    decision: Decision
    new_text: dict[int, str]


@dataclasses.dataclass(frozen=True)
class ResultEvent:
    """The end of one prompt."""

    prompt_index: int
    result: Result


def prompt_hash(ids: Sequence[int]) -> int:
    """32-bit hash of a prompt's ids: its identity in the randomness, the same in every batch."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=4).digest(), "little")


def _slots(tokens: int, most: int | None = None) -> int:
    """Slot counts come in multiples of 64, at most the pool's: few programs, and little unwritten cache is read."""
    wanted = -(-tokens // 64) * 64
    return wanted if most is None else min(wanted, most)


class Engine:
    """Decodes prompts with one model and one configuration. Construct once, `run` many times; compiled programs are shared."""

    def __init__(self, lm: LanguageModel, config: DecodeConfig, seed: int, network: Network | None = None):
        """Args: `network` replaces the transformer (a scripted model in tests); it then gets `lm.params` as they are.

        Raises:
          UsageError: the model has no head, or a stop id is not one that the policy can emit.
        """
        if lm.head is None:
            raise UsageError("model without a ZIP head", "the search reads the joint from reserved logits", "train one with `zip-rc train`")
        lm.layout.sharding(("batch",), (config.rows,))  # rows that do not divide over the mesh are refused here
        self.lm, self.config = lm, config
        self.head: ZipHead = lm.head
        self.settings = StepSettings(
            network=network or TransformerNetwork(lm.config, lm.layout, str(lm.params["body"]["embed"].dtype)),
            head=self.head,
            vocab_size=lm.config.vocab_size,
            sampling=config.sampling,
            window=config.window,
            max_tokens=config.max_tokens,
            stop_ids=tuple(sorted({*lm.tokenizer.eos_ids, *config.stop_token_ids})),
        )
        head, sampleable = self.head, self.head.sampleable(lm.config.vocab_size)
        bad = [i for i in config.stop_token_ids if not (0 <= i < len(sampleable) and sampleable[i])]
        if bad:
            reason = f"the policy can only emit ids 0..{head.used_ids - 1}, without the reserved {head.first_id}..{head.last_id - 1}"
            raise UsageError(f"stop_token_ids {bad}", reason, "remove them")
        self.unreadable = lm.tokenizer.unused_ids(lm.config.vocab_size)  # [V] ids that no prompt may hold
        self.unreadable[head.first_id : head.last_id] = True
        self.key = jax.random.key(seed)
        self.params = {"body": lm.params["body"], "table": lm.folded_table()} if network is None else lm.params
        self.branching = config.strategy == "zip_rc" and config.candidates == "branching"

    def check(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts.

        Raises:
          UsageError: no prompts, an empty prompt, an unknown word, an id that is reserved or never used, or a prompt that leaves no room
            for `max_tokens`.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts given as one string", "a list of prompts is expected", "pass [prompt]")
        if not prompts:
            raise UsageError("prompts=[]", "there is nothing to decode", "pass at least one prompt")
        ids = []
        for number, prompt in enumerate(prompts):
            encoded = self.lm.tokenizer.encode(prompt)
            if not encoded:
                raise UsageError(f"prompt {number}", "it is empty", "leave it out")
            strange = sorted({i for i in encoded if i >= len(self.unreadable) or self.unreadable[i]})
            if strange:
                tokens = ", ".join(f"{i} ({self.lm.tokenizer.backend.id_to_token(i)})" for i in strange[:5])
                raise UsageError(
                    f"prompt {number} with ids {tokens}",
                    "they are reserved or unused: the model cannot read them",
                    "take them out of the text",
                )
            room = self.lm.config.max_positions - self.config.max_tokens
            if len(encoded) > room:
                raise UsageError(
                    f"prompt {number} of {len(encoded)} tokens with max_tokens={self.config.max_tokens}",
                    f"the model has {self.lm.config.max_positions} positions",
                    f"shorten it to {max(room, 0)} tokens or lower max_tokens to {max(self.lm.config.max_positions - len(encoded), 0)}",
                )
            ids.append(encoded)
        return ids

    def run(self, prompts: Sequence[str]) -> Iterator[StepEvent | ResultEvent]:
        """Decodes all prompts; yields an event per decision and a result per prompt, as they come.

        Raises:
          UsageError: see `check`; raised on the first `next`, before any compilation.
        """
        ids = self.check(prompts)
        slots = -(-(max(map(len, ids)) + self.config.max_tokens) // 32) * 32
        pool = Rows.empty(self.settings, self.config.rows, slots)
        free = list(range(self.config.rows))
        waiting = collections.deque(enumerate(prompts))
        groups: list[Group] = []
        while waiting or groups:
            pool, admitted = self._admit(pool, free, waiting, ids)
            groups += admitted
            pool, events = self._decide(pool, groups)
            yield from events
            for group in [g for g in groups if not g.live()]:
                groups.remove(group)
                self._release(group, free)
                yield ResultEvent(group.number, self._result(group))
            if groups:
                pool = self._advance(pool, free, groups)

    # Admission.

    def _admit(self, pool: Rows, free: list[int], waiting: collections.deque, ids: list[list[int]]) -> tuple[Rows, list[Group]]:
        """Prefills as many waiting prompts as the free rows can hold. Each reserves all the rows it may ever need."""
        need = self.config.n + self.branching
        count = min(len(waiting), len(free) // need)
        if not count:
            return pool, []
        batch = [waiting.popleft() for _ in range(count)]
        longest = max(len(ids[i]) for i, _ in batch)
        width = bucket(count)
        tokens = np.zeros((width, _slots(longest, pool.tokens.shape[1])), np.int32)
        for lane, (number, _) in enumerate(batch):
            tokens[lane, : len(ids[number])] = ids[number]
        lengths = padded([len(ids[i]) for i, _ in batch], width, 1)
        hashes = jnp.asarray([prompt_hash(ids[i]) for i, _ in batch] + [0] * (width - count), jnp.uint32)
        source = prefill(self.settings, self.params, jnp.asarray(tokens), lengths, hashes)
        joints = np.asarray(source.mean_joint())

        groups: list[Group] = []
        copies: list[tuple[int, int, int]] = []  # from lane, to row, branch id
        now = time.perf_counter()
        for lane, (number, prompt) in enumerate(batch):
            group = Group(number, prompt, ids[number], now, root_joint=joints[lane])
            if self.branching:
                group.root_row = free.pop()
                group.spare = [free.pop() for _ in range(self.config.n)]
                copies.append((lane, group.root_row, 0))
            else:
                for branch_id in range(self.config.n):
                    row = free.pop()
                    group.branches.append(Branch(branch_id, ROOT, 0, row, joint=joints[lane]))
                    copies.append((lane, row, branch_id))
            groups.append(group)
        return copy_rows(pool, source, *self._moves(copies)), groups

    def _moves(self, moves: list[tuple[int, int, int]]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Source, target and branch number of rows to copy, padded to few shapes (a target past the pool is dropped)."""
        size = bucket(len(moves))
        sources, targets, numbers = (list(column) for column in zip(*moves, strict=True))
        return padded(sources, size, 0), padded(targets, size, self.config.rows), padded(numbers, size, 0)

    # Stepping.

    def _advance(self, pool: Rows, free: list[int], groups: list[Group]) -> Rows:
        """One interval of decode steps for the live rows, then finished prefixes give their rows back."""
        live = [(g, b, b.row) for g in groups for b in g.live() if b.row is not None]
        index = [row for _, _, row in live]
        longest = max(len(g.prompt_ids) + len(b.tokens) for g, b, _ in live) + self.config.interval
        slots = _slots(longest, pool.tokens.shape[1])
        steps = jnp.int32(self.config.interval)
        lanes = padded(index, bucket(len(index), self.config.rows), self.config.rows)
        pool, joints = advance(self.settings, self.params, pool, lanes, steps, self.key, slots)
        tokens, length, done, joint = (np.asarray(x) for x in (pool.tokens, pool.length, pool.done, joints))
        used = dict.fromkeys((g.number for g in groups), 0)
        for group, branch, row in live:
            generated = tuple(tokens[row, len(group.prompt_ids) : length[row]].tolist())
            used[group.number] = max(used[group.number], len(generated) - len(branch.tokens))
            branch.tokens, branch.joint = generated, joint[row].copy()
            if done[row]:
                branch.finished, branch.live, branch.row = True, False, None
                branch.stopped = generated[-1] in self.settings.stop_ids
                free.append(row)
        for group in groups:
            group.steps += used[group.number]
        return pool

    # Deciding.

    def _decide(self, pool: Rows, groups: list[Group]) -> tuple[Rows, list[StepEvent]]:
        """One meta-action for every group, all in one jitted call; then rows are forked and prefixes paused or resumed."""
        if not groups:
            return pool, []
        choice = choose(self._view(groups), self.head.grid, self.config)
        forks: list[tuple[int, int, int]] = []  # from row, to row, branch id
        events = []
        for p, group in enumerate(groups):
            multiplicity = choice.multiplicity[p]
            decision = self._record(group, multiplicity, int(choice.future_bin[p]), float(choice.utility[p]))
            group.trace.append(decision)
            events.append(StepEvent(group.number, decision, self._new_text(group)))
            for branch, copies in zip(list(group.branches), multiplicity.tolist(), strict=False):
                if branch.finished:
                    continue
                branch.live = copies > 0
                forks += [self._grow(group, branch, branch.row) for _ in range(copies - 1)]
            if self.branching:
                forks += [self._grow(group, None, group.root_row) for _ in range(int(multiplicity[self.config.n]))]
        if forks:
            pool = fork_rows(pool, *self._moves(forks))
        return pool, events

    def _grow(self, group: Group, parent: Branch | None, source: int | None) -> tuple[int, int, int]:
        """A new live prefix of the group, in one of its spare rows: a copy of `parent`, or of the root (None)."""
        assert source is not None
        row, number = group.spare.pop(), len(group.branches)
        if parent is None:
            group.branches.append(Branch(number, ROOT, 0, row, joint=group.root_joint))
        else:
            group.branches.append(Branch(number, parent.id, len(parent.tokens), row, tokens=parent.tokens, joint=parent.joint))
        return source, row, number

    def _view(self, groups: list[Group]) -> View:
        """The prefixes of all groups as arrays, padded to few shapes."""
        grid, n = self.head.grid, self.config.n
        shape = (bucket(len(groups)), n + self.branching)
        joint = np.full((*shape, grid.n_cells), 1 / grid.n_cells, np.float32)
        unfinished, exists = np.zeros(shape, bool), np.zeros(shape, bool)
        tokens = np.zeros(shape, np.int32)
        free_rows, must_extend = np.zeros(shape[0], np.int32), np.zeros(shape[0], bool)
        for p, group in enumerate(groups):
            for slot, branch in enumerate(group.branches):
                joint[p, slot], tokens[p, slot] = branch.joint, len(branch.tokens)
                unfinished[p, slot], exists[p, slot] = not branch.finished, True
            if self.branching:
                joint[p, n] = group.root_joint
                unfinished[p, n] = exists[p, n] = True
            free_rows[p] = len(group.spare)
            must_extend[p] = not self.config.abstain and not any(b.finished for b in group.branches)
        return View(joint.reshape(*shape, grid.n_reward, grid.n_length), unfinished, tokens, exists, free_rows, must_extend)

    def _expectations(self, joint: np.ndarray) -> tuple[float, float]:
        grid = self.head.grid
        table = joint.reshape(grid.n_reward, grid.n_length)
        return float(table.sum(1) @ grid.reward_centres), float(table.sum(0) @ grid.length_midpoints)

    def _record(self, group: Group, multiplicity: np.ndarray, future_bin: int, utility: float) -> Decision:
        # (id, copies, joint, tokens, finished) of every prefix, and of the root where it is one of the choices.
        rows = [(b.id, int(k), b.joint, len(b.tokens), b.finished) for b, k in zip(group.branches, multiplicity, strict=False)]
        if self.branching:
            rows.append((ROOT, int(multiplicity[self.config.n]), group.root_joint, 0, False))
        ids, copies, joints, tokens, finished = zip(*rows, strict=True)
        expected = [self._expectations(joint) for joint in joints]
        return Decision(
            step=group.steps,
            prefix_ids=ids,
            multiplicity=copies,
            future_bin=future_bin,
            utility=utility,
            expected_reward=tuple(reward for reward, _ in expected),
            expected_remaining=tuple(0.0 if end else length for (_, length), end in zip(expected, finished, strict=True)),
            tokens=tokens,
            finished=finished,
        )

    def _new_text(self, group: Group) -> dict[int, str]:
        """Text that each prefix has gained since the last decision; at first, a fork shows the text that it shares with its parent."""
        gained = {}
        for branch in group.branches:
            before, branch.shown = branch.shown, len(branch.tokens)
            if branch.shown > before:
                gained[branch.id] = self.lm.tokenizer.decode(branch.tokens[before:])
        return gained

    # Ending.

    def _release(self, group: Group, free: list[int]) -> None:
        free += group.spare + [b.row for b in group.branches if b.row is not None]
        if group.root_row is not None:
            free.append(group.root_row)

    def _result(self, group: Group) -> Result:
        prefixes = []
        for b in group.branches:
            reward, remaining = self._expectations(b.joint)
            reason = ("stop" if b.stopped else "length") if b.finished else "paused"
            state = "finished" if b.finished else "paused"
            text = self.lm.tokenizer.decode(b.tokens)
            remaining = 0.0 if b.finished else remaining
            prefixes.append(Prefix(b.id, b.parent, b.fork_position, b.tokens, text, state, reason, reward, remaining))
        usage = Usage(
            prompt_tokens=len(group.prompt_ids),
            tokens=sum(len(p.token_ids) - p.fork_position for p in prefixes),
            serial_steps=group.steps,
            seconds=time.perf_counter() - group.started,
        )
        best, voted = best_prefix(prefixes), voted_prefix(prefixes)
        chosen = voted if self.config.answer == "vote" else best
        if chosen is None or voted is None:
            reward, remaining = self._expectations(group.root_joint)
            return Result(group.prompt, "", ROOT, "abstain", reward, remaining, "", "", tuple(prefixes), tuple(group.trace), usage)
        assert best is not None
        return Result(
            prompt=group.prompt,
            text=chosen.text,
            prefix_id=chosen.id,
            finish_reason=chosen.finish_reason,
            expected_reward=chosen.expected_reward,
            expected_remaining=chosen.expected_remaining,
            value_text=best.text,
            vote_text=voted.text,
            prefixes=tuple(prefixes),
            trace=tuple(group.trace),
            usage=usage,
        )


def best_prefix(prefixes: Sequence[Prefix]) -> Prefix | None:
    """The finished prefix with the highest value; one cut off at max_tokens only if no other has finished. Ties go to the first."""
    finished = [p for p in prefixes if p.state == "finished"]
    stopped = [p for p in finished if p.finish_reason == "stop"]
    return max(stopped or finished, key=lambda p: p.expected_reward, default=None)


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
