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
from zip_rc_jax.decoding.placement import Move, Place, Shard, live_rows_first
from zip_rc_jax.decoding.results import Decision, Prefix, Result, Usage
from zip_rc_jax.decoding.rows import Rows, StepSettings, advance, bucket, copy_rows, empty_rows, prefill, slot_bucket
from zip_rc_jax.decoding.strategies import View, choose
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import unstack
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
    shard: int
    root_row: int | None = None
    promised: int = 0  # rows that prefixes which branching may add will take
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


def _longest(groups: Sequence[Group]) -> int:
    """Tokens of the longest prefix, prompt included."""
    return max(len(g.prompt_ids) + max((len(b.tokens) for b in g.branches), default=0) for g in groups)


def transformer_network(lm: LanguageModel) -> tuple[TransformerNetwork, dict[str, Any]]:
    """The network that decodes with `lm`, and its parameters. On CPU layers are unrolled, see `models.transformer.unstack`."""
    unrolled = lm.layout.mesh.devices.flat[0].platform == "cpu"
    body = unstack(lm.config, lm.params["body"]) if unrolled else lm.params["body"]
    network = TransformerNetwork(lm.config, lm.layout, str(body["embed"].dtype), unrolled)
    return network, {"body": body, "table": lm.folded_table()}


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
        network, self.params = transformer_network(lm) if network is None else (network, lm.params)
        self.settings = StepSettings(
            network=network,
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
        self.branching = config.strategy == "zip_rc" and config.candidates == "branching"
        self.shards = self.settings.network.layout.mesh.shape["data"]
        self.rows = config.rows // self.shards  # of each shard
        if config.n + self.branching > self.rows:
            raise UsageError(
                f"rows={config.rows} on {self.shards} shards with n={config.n}",
                f"all prefixes of a prompt lie in one shard, and each has {self.rows} rows",
                f"set rows to at least {(config.n + self.branching) * self.shards}",
            )

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
        pool = empty_rows(self.settings, self.rows + 1, -(-(max(map(len, ids)) + self.config.max_tokens) // 32) * 32)
        shards = [Shard(list(range(self.rows))) for _ in range(self.shards)]
        waiting = collections.deque(enumerate(prompts))
        groups: list[Group] = []
        while waiting or groups:
            pool, admitted = self._admit(pool, shards, waiting, ids)
            groups += admitted
            pool, events = self._decide(pool, shards, groups)
            yield from events
            for group in [g for g in groups if not g.live()]:
                groups.remove(group)
                self._release(group, shards[group.shard])
                yield ResultEvent(group.number, self._result(group))
            if groups:
                pool = self._advance(pool, shards, groups)

    # Admission.

    def _admit(self, pool: Rows, shards: list[Shard], waiting: collections.deque, ids: list[list[int]]) -> tuple[Rows, list[Group]]:
        """Prefills as many waiting prompts as the free rows can hold. Each is promised all the rows it may ever need, in one shard."""
        need = self.config.n + self.branching
        batch: list[list[tuple[int, str]]] = [[] for _ in shards]
        while waiting:
            room = [len(shard.free) - shard.promised - need * len(b) for shard, b in zip(shards, batch, strict=True)]
            best = int(np.argmax(room))
            if room[best] < need:
                break
            batch[best].append(waiting.popleft())
        width = max(map(len, batch))
        if not width:
            return pool, []
        width = bucket(width, self.rows, least=1)  # a padded prompt costs as much as a real one
        longest = max(len(ids[i]) for part in batch for i, _ in part)
        tokens = np.zeros((len(shards), width, slot_bucket(longest, pool.tokens.shape[2], least=16)), np.int32)
        length, hashes = np.ones(tokens.shape[:2], np.int32), np.zeros(tokens.shape[:2], np.uint32)
        for s, part in enumerate(batch):
            for lane, (number, _) in enumerate(part):
                length[s, lane], hashes[s, lane] = len(ids[number]), prompt_hash(ids[number])
                tokens[s, lane, : length[s, lane]] = ids[number]
        source, root = prefill(self.settings, self.params, *(jnp.asarray(x) for x in (tokens, length, hashes)))
        joints = np.asarray(root)

        groups: list[Group] = []
        copies: list[list[Move]] = [[] for _ in shards]
        now = time.perf_counter()
        for s, (shard, part) in enumerate(zip(shards, batch, strict=True)):
            for lane, (number, prompt) in enumerate(part):
                group = Group(number, prompt, ids[number], now, root_joint=joints[s, lane], shard=s)
                if self.branching:
                    group.root_row, group.promised = shard.take(), self.config.n
                    shard.promised += group.promised
                    copies[s].append((lane, group.root_row, 0))
                else:
                    group.branches = [Branch(i, ROOT, 0, shard.take(), joint=joints[s, lane]) for i in range(self.config.n)]
                    copies[s] += [(lane, b.row, b.id) for b in group.branches if b.row is not None]
                groups.append(group)
        return self._copy(pool, source, copies, longest), groups

    def _copy(self, pool: Rows, source: Rows | None, moves: list[list[Move]], longest: int) -> Rows:
        """Carries out the moves of every shard, in order; `longest` is the longest prefix that may move."""
        count = [len(part) for part in moves]
        if not any(count):
            return pool
        table = np.zeros((len(moves), bucket(max(count)), 3), np.int32)
        for part, row in zip(moves, table, strict=True):
            row[: len(part)] = np.reshape(part, (-1, 3))
        slots = slot_bucket(longest, pool.tokens.shape[2])
        return copy_rows(self.settings, pool, source, jnp.asarray(table), jnp.asarray(count, jnp.int32), slots)

    # Stepping.

    def _advance(self, pool: Rows, shards: list[Shard], groups: list[Group]) -> Rows:
        """One interval of decode steps for the live rows, then finished prefixes give their rows back."""
        pool, width = self._live_rows_first(pool, shards, groups)
        live = [(g, b, g.shard * width + b.row) for g in groups for b in g.live() if b.row is not None]
        longest = max(len(g.prompt_ids) + len(b.tokens) for g, b, _ in live) + self.config.interval
        active = np.zeros(len(shards) * width, bool)
        active[[lane for _, _, lane in live]] = True
        pool, stepped = advance(
            self.settings,
            self.params,
            pool,
            jnp.asarray(active.reshape(len(shards), width)),
            jnp.int32(self.config.interval),
            self.key,
            slot_bucket(longest, pool.tokens.shape[2]),
        )
        tokens, length, done, joint = (np.asarray(x) for x in stepped)
        used = dict.fromkeys((g.number for g in groups), 0)
        for group, branch, lane in live:
            generated = tuple(tokens[lane, len(group.prompt_ids) : length[lane]].tolist())
            used[group.number] = max(used[group.number], len(generated) - len(branch.tokens))
            branch.tokens, branch.joint = generated, joint[lane].copy()
            if done[lane]:
                assert branch.row is not None
                shards[group.shard].give(branch.row)
                branch.finished, branch.live, branch.row = True, False, None
                branch.stopped = generated[-1] in self.settings.stop_ids
        for group in groups:
            group.steps += used[group.number]
        return pool

    def _live_rows_first(self, pool: Rows, shards: list[Shard], groups: list[Group]) -> tuple[Rows, int]:
        """Moves rows so that the live ones of every shard are among its first `width`. Returns the pool and `width`."""
        members = [[g for g in groups if g.shard == s] for s in range(len(shards))]
        live = [[Place(b, "row") for g in part for b in g.live()] for part in members]
        width = bucket(max(map(len, live)), self.rows)
        moves = []
        for shard, part, alive in zip(shards, members, live, strict=True):
            paused = [Place(b, "row") for g in part for b in g.branches if b.row is not None and not b.live]
            paused += [Place(g, "root_row") for g in part if g.root_row is not None]
            moves.append(live_rows_first(alive, paused, shard, width, scratch=self.rows))
        return self._copy(pool, None, moves, _longest(groups)), width

    # Deciding.

    def _decide(self, pool: Rows, shards: list[Shard], groups: list[Group]) -> tuple[Rows, list[StepEvent]]:
        """One meta-action for every group, all in one jitted call; then rows are forked and prefixes paused or resumed."""
        if not groups:
            return pool, []
        choice = choose(self._view(groups), self.head.grid, self.config)
        forks: list[list[Move]] = [[] for _ in shards]
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
                forks[group.shard] += [self._grow(shards, group, branch, branch.row) for _ in range(copies - 1)]
            if self.branching:
                starts = int(multiplicity[self.config.n])
                forks[group.shard] += [self._grow(shards, group, None, group.root_row) for _ in range(starts)]
        return self._copy(pool, None, forks, _longest(groups)), events

    def _grow(self, shards: list[Shard], group: Group, parent: Branch | None, source: int | None) -> Move:
        """A new live prefix of the group, in one of the rows it was promised: a copy of `parent`, or of the root (None)."""
        assert source is not None
        row, number = shards[group.shard].take(), len(group.branches)
        group.promised -= 1
        shards[group.shard].promised -= 1
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
            free_rows[p] = group.promised
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

    @staticmethod
    def _release(group: Group, shard: Shard) -> None:
        shard.promised -= group.promised
        for row in [group.root_row, *(b.row for b in group.branches)]:
            if row is not None:
                shard.give(row)

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
