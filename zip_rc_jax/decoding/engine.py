"""The decoder's outer loop: once per interval, decide for all prompts in flight, then move rows.

Host code. A prompt is admitted when the pool has room for it, runs until its best action extends nothing, and gives its rows back at
once (continuous batching across prompts). The jitted work is in `rows` (stepping) and `meta_actions` (deciding).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.decoding import memory
from zip_rc_jax.decoding.groups import ROOT, Branch, Group, failure
from zip_rc_jax.decoding.network import Network, TransformerNetwork
from zip_rc_jax.decoding.placement import Move, Place, Shard, live_rows_first
from zip_rc_jax.decoding.requests import Intake, Job, Prompt, Refusal, Request, prompt_hash
from zip_rc_jax.decoding.results import Decision, Result
from zip_rc_jax.decoding.rows import Lanes, Rows, StepSettings, advance, bucket, copy_rows, empty_rows, fine_bucket, prefill
from zip_rc_jax.decoding.sampling import Filters, Sampling
from zip_rc_jax.decoding.strategies import View, choose
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import unstack
from zip_rc_jax.zip_head import ZipHead


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """What streaming yields for one prompt at one decision.

    Attributes:
      prompt_index: which prompt.
      decision: the meta-action: what is predicted for every prefix, and what is done with it.
      new_tokens: per prefix id, the tokens generated since the last event. A new fork begins with those that it shares with its parent.
      new_text: per prefix id, the text gained since the last event; added up it is the prefix's text. A character of several tokens
        appears with the last of them.
    """

    prompt_index: int
    decision: Decision
    new_tokens: dict[int, tuple[int, ...]]
    new_text: dict[int, str]


@dataclasses.dataclass(frozen=True)
class ResultEvent:
    """The end of one prompt."""

    prompt_index: int
    result: Result


class Queue:
    """Requests in order, read one at a time and no earlier than asked for."""

    def __init__(self, jobs: Iterable[Job | Refusal]):
        self._source = iter(jobs)
        self._next: Job | Refusal | None = None

    def peek(self) -> Job | Refusal | None:
        """The next request; None at the end. Reading it blocks as long as the source does."""
        if self._next is None:
            self._next = next(self._source, None)
        return self._next

    def pop(self) -> None:
        """Goes on to the request after the one that `peek` returned."""
        self._next = None


def transformer_network(lm: LanguageModel) -> tuple[TransformerNetwork, dict[str, Any]]:
    """The network that decodes with `lm`, and its parameters. On CPU layers are unrolled, see `models.transformer.unstack`."""
    unrolled = lm.layout.mesh.devices.flat[0].platform == "cpu"
    body = unstack(lm.config, lm.params["body"]) if unrolled else lm.params["body"]
    network = TransformerNetwork(lm.config, lm.layout, str(body["embed"].dtype), unrolled)
    return network, {"body": body, "table": lm.folded_table()}


class Engine:
    """Decodes prompts with one model and one configuration. Construct once, `run` many times; compiled programs are shared."""

    def __init__(
        self,
        lm: LanguageModel,
        config: DecodeConfig,
        seed: int,
        network: Network | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Args:
          network: replaces the transformer (a scripted model in tests); it then gets `lm.params` as they are.
          chat_template_kwargs: variables of the chat template.
          clock: seconds; time budgets and `Usage.seconds` follow it.

        Raises:
          UsageError: the model has no head, or a stop id is not one that the policy can emit.
        """
        if lm.head is None:
            raise UsageError("model without a ZIP head", "the search reads the joint from reserved logits", "train one with `zip-rc train`")
        lm.layout.sharding(("batch",), (config.rows,))  # rows that do not divide over the mesh are refused here
        self.lm, self.config, self.clock = lm, config, clock
        self.head: ZipHead = lm.head
        network, self.params = transformer_network(lm) if network is None else (network, lm.params)
        self.intake = Intake(lm, config, seed, chat_template_kwargs or {}, self._check_memory)
        self.settings = StepSettings(
            network=network,
            head=self.head,
            vocab_size=lm.config.vocab_size,
            filters=Filters.of([config.sampling]),
            window=config.window,
        )
        self.eos_ids = lm.tokenizer.eos_ids
        self.branching = config.strategy == "zip_rc" and config.candidates == "branching"
        self.shards = self.settings.network.layout.mesh.shape["data"]
        self.rows = config.rows // self.shards  # of each shard
        self.per_prompt = config.n + self.branching  # most rows of one prompt
        if self.per_prompt > self.rows:
            raise UsageError(
                f"rows={config.rows} on {self.shards} shards with n={config.n}",
                f"all prefixes of a prompt lie in one shard, and each has {self.rows} rows",
                f"set rows to at least {self.per_prompt * self.shards}",
            )
        self._known_to_fit: set[tuple[int, int]] = set()

    def _pool_slots(self, tokens: int, listed: bool) -> int:
        """Slots of rows that hold `tokens`: just enough for a list, which is known as a whole; else rounded, as more may come."""
        return -(-tokens // 32) * 32 if listed else fine_bucket(tokens, self.lm.config.max_positions)

    def _check_memory(self, job: Job, listed: bool) -> None:
        """Raises UsageError if the rows that this job needs do not fit into the device's memory."""
        slots, prompt = self._pool_slots(job.slots, listed), fine_bucket(len(job.ids), job.slots, least=16)
        if (slots, prompt) in self._known_to_fit:
            return
        held = (self.lm.params, self.params)  # the caller holds the first, and they share most arrays

        def needed(rows: int, slots: int) -> memory.Estimate:
            prompts = bucket(max(1, rows // self.per_prompt), rows, least=1)
            return memory.estimate(self.settings, held, rows, slots, prompts, min(prompt, slots))

        devices = self.settings.network.layout.mesh.devices
        limit = memory.device_limit(devices.flat[0], devices.size)
        memory.check_fits(needed, limit, self.rows, slots, len(job.ids), self.shards, int(self.branching))
        self._known_to_fit.add((slots, prompt))

    def run(self, prompts: Iterable[Prompt | Request], on_error: str | None = None) -> Iterator[StepEvent | ResultEvent]:
        """Decodes all prompts; yields an event per decision and a result per prompt, as they come.

        Any iterable will do. An iterator is read one prompt at a time, and only when there is a free row for it, so that what is held
        depends on `rows` and not on the number of prompts. Closing the generator frees everything.

        Args:
          on_error: see `Intake.jobs`. A model that fails on one prompt (logits that are not finite) never ends the run: that prompt's
            result has the finish reason "error".

        Raises:
          UsageError: see `Intake.jobs`; for a sequence it is raised on the first `next`, before any compilation.
        """
        yield from self.decode(self.intake.jobs(prompts, on_error))

    def decode(self, jobs: Iterable[Job | Refusal]) -> Iterator[StepEvent | ResultEvent]:
        """`run` for what `Intake.jobs` returned."""
        queue, groups = Queue(jobs), list[Group]()
        pool, shards = None, [Shard(list(range(self.rows))) for _ in range(self.shards)]
        # A list tells how long the rows must be; otherwise they grow with what is read.
        longest = max((job.slots for job in jobs if isinstance(job, Job)), default=0) if isinstance(jobs, list) else 0
        while groups or queue.peek() is not None:
            if not groups and isinstance(job := queue.peek(), Job) and (pool is None or job.slots > pool.tokens.shape[2]):
                pool = None  # is freed before its successor is made
                pool = empty_rows(self.settings, self.rows + 1, self._pool_slots(longest or job.slots, longest > 0))  # with a scratch row
            batch, refused = self._next_batch(queue, pool, shards)
            yield from refused
            if pool is None:
                continue
            pool, admitted, failed = self._admit(pool, shards, batch)
            yield from failed
            groups += admitted
            pool, events = self._decide(pool, shards, groups)
            yield from events
            for group in [g for g in groups if not g.live()]:
                groups.remove(group)
                self._release(group, shards[group.shard])
                result = group.result(self.clock() - group.started, self.head.grid, self.lm.tokenizer)
                yield ResultEvent(group.job.number, result)
            if groups:
                pool = self._advance(pool, shards, groups)

    # Admission.

    def _next_batch(self, queue: Queue, pool: Rows | None, shards: list[Shard]) -> tuple[list[list[Job]], list[ResultEvent]]:
        """Per shard, the waiting requests that its free rows can hold; and the results of those that cannot be decoded at all.

        Each is promised all the rows it may ever need, in one shard. A request whose prefixes may become longer than the rows waits until
        no other is in flight. Requests of fewer samples than the engine's do not make a batch larger than its memory was estimated for.
        """
        batch: list[list[Job]] = [[] for _ in shards]
        refused: list[ResultEvent] = []
        room = [len(shard.free) - shard.promised for shard in shards]
        while max(room) > self.branching and (request := queue.peek()) is not None:
            if isinstance(request, Refusal):
                refused.append(ResultEvent(request.number, failure(request, request.reason)))
            elif pool is None or request.slots > pool.tokens.shape[2] or max(room) < request.config.n + self.branching:
                break
            else:
                best = int(np.argmax(room))
                if len(batch[best]) == self.rows // self.per_prompt:
                    break
                room[best] -= request.config.n + self.branching
                batch[best].append(request)
            queue.pop()
        return batch, refused

    def _admit(self, pool: Rows, shards: list[Shard], batch: list[list[Job]]) -> tuple[Rows, list[Group], list[ResultEvent]]:
        """Prefills the prompts of a batch; also returns the results of those that the model fails on."""
        if not any(batch):
            return pool, [], []
        width = bucket(max(map(len, batch)), self.rows, least=1)  # a padded prompt costs as much as a real one
        longest = max(len(job.ids) for part in batch for job in part)
        tokens = np.zeros((len(shards), width, fine_bucket(longest, pool.tokens.shape[2], least=16)), np.int32)
        length, hashes = np.ones(tokens.shape[:2], np.int32), np.zeros(tokens.shape[:2], np.uint32)
        for s, part in enumerate(batch):
            for lane, job in enumerate(part):
                length[s, lane], hashes[s, lane] = len(job.ids), prompt_hash(job.ids)
                tokens[s, lane, : length[s, lane]] = job.ids
        now = self.clock()
        source, root = prefill(self.settings, self.params, *(jnp.asarray(x) for x in (tokens, length, hashes)))
        joints, fault = np.asarray(root), np.asarray(source.done)

        groups: list[Group] = []
        failed: list[ResultEvent] = []
        copies: list[list[Move]] = [[] for _ in shards]
        for s, (shard, part) in enumerate(zip(shards, batch, strict=True)):
            for lane, job in enumerate(part):
                if fault[s, lane]:
                    error = "the model's logits after the prompt are not finite"
                    failed.append(ResultEvent(job.number, failure(job, error, self.clock() - now)))
                    continue
                group = Group(job, now, root_joint=joints[s, lane], shard=s)
                if self.branching:
                    group.root_row, group.promised = shard.take(), job.config.n
                    shard.promised += group.promised
                    copies[s].append((lane, group.root_row, 0))
                else:
                    group.branches = [Branch(i, ROOT, 0, shard.take(), joint=joints[s, lane]) for i in range(job.config.n)]
                    copies[s] += [(lane, b.row, b.id) for b in group.branches if b.row is not None]
                groups.append(group)
        return self._copy(pool, source, copies, longest), groups, failed

    def _copy(self, pool: Rows, source: Rows | None, moves: list[list[Move]], longest: int) -> Rows:
        """Carries out the moves of every shard, in order; `longest` is the longest prefix that may move."""
        count = [len(part) for part in moves]
        if not any(count):
            return pool
        table = np.zeros((len(moves), bucket(max(count)), 3), np.int32)
        for part, row in zip(moves, table, strict=True):
            row[: len(part)] = np.reshape(part, (-1, 3))
        slots = fine_bucket(longest, pool.tokens.shape[2])
        return copy_rows(self.settings, pool, source, jnp.asarray(table), jnp.asarray(count, jnp.int32), slots)

    # Stepping.

    def _advance(self, pool: Rows, shards: list[Shard], groups: list[Group]) -> Rows:
        """One interval of decode steps for the live rows, then prefixes that have ended give their rows back."""
        pool, width = self._live_rows_first(pool, shards, groups)
        live = [
            (g, b, g.shard * width + b.row, len(b.tokens) + quota)
            for g in groups
            for b, quota in zip(g.live(), g.quotas(self.config.interval), strict=True)
            if b.row is not None
        ]
        longest = max(len(g.job.ids) + len(b.tokens) for g, b, _, _ in live) + self.config.interval
        pool, stepped = advance(
            dataclasses.replace(self.settings, filters=Filters.of(g.job.config.sampling for g in groups)),
            self.params,
            pool,
            self._lanes([(lane, g.job, quota) for g, _, lane, quota in live], len(shards), width),
            jnp.int32(self.config.interval),
            fine_bucket(longest, pool.tokens.shape[2]),
        )
        tokens, length, done, fault, joint = (np.asarray(x) for x in stepped)
        used = dict.fromkeys((g.job.number for g in groups), 0)
        dirty: list[list[int]] = [[] for _ in shards]
        for group, branch, lane, _ in live:
            generated = tuple(tokens[lane, len(group.job.ids) : length[lane]].tolist())
            used[group.job.number] = max(used[group.job.number], len(generated) - len(branch.tokens))
            branch.tokens, branch.joint = generated, joint[lane].copy()
            if done[lane]:
                assert branch.row is not None
                shards[group.shard].give(branch.row)
                branch.live, branch.finished, branch.failed = False, not fault[lane], bool(fault[lane])
                branch.stopped = branch.finished and generated[-1] in self._stop_ids(group.job)
                if fault[lane]:
                    dirty[group.shard].append(branch.row)
                    group.error = f"the model's logits after the {len(generated)} tokens of prefix {branch.id} are not finite"
                branch.row = None
        for group in groups:
            group.steps += used[group.job.number]
        return self._clear(pool, dirty)

    def _clear(self, pool: Rows, dirty: list[list[int]]) -> Rows:
        """Empties rows: what is not finite in their cache would reach the next prefix there, since a masked slot still counts 0 times."""
        if not any(dirty):
            return pool
        slots = pool.tokens.shape[2]
        return self._copy(pool, empty_rows(self.settings, 1, slots), [[(0, row, 0) for row in part] for part in dirty], slots)

    def _lanes(self, rows: list[tuple[int, Job, int]], shards: int, width: int) -> Lanes:
        """The requests of the rows to step, given as (lane, job, quota), in arrays `[shards, width]`."""
        jobs = {lane: job for lane, job, _ in rows}
        filler = rows[0][1]  # lanes that are not stepped need some request
        every = [jobs.get(lane, filler) for lane in range(shards * width)]
        stop_ids = np.full((len(every), bucket(max(len(self._stop_ids(job)) for job in jobs.values()), least=4)), -1, np.int32)
        active, quota = np.zeros(len(every), bool), np.zeros(len(every), np.int32)
        for lane, job, most in rows:
            active[lane], quota[lane] = True, most
            stop_ids[lane, : len(self._stop_ids(job))] = self._stop_ids(job)
        sampling = Sampling.stack([job.config.sampling for job in every])
        max_tokens = np.array([job.config.max_tokens for job in every], np.int32)
        lanes = Lanes(active, np.array([job.key for job in every], np.uint32), quota, max_tokens, stop_ids, sampling)
        return jax.tree.map(lambda x: jnp.asarray(x.reshape(shards, width, *x.shape[1:])), lanes)

    def _stop_ids(self, job: Job) -> tuple[int, ...]:
        return (*self.eos_ids, *job.config.stop_token_ids)

    def _live_rows_first(self, pool: Rows, shards: list[Shard], groups: list[Group]) -> tuple[Rows, int]:
        """Moves rows so that the live ones of every shard are among its first `width`. Returns the pool and `width`."""
        members = [[g for g in groups if g.shard == s] for s in range(len(shards))]
        live = [[Place(b, "row") for g in part for b in g.live()] for part in members]
        width = fine_bucket(max(map(len, live)), self.rows, least=8)
        moves = []
        for shard, part, alive in zip(shards, members, live, strict=True):
            paused = [Place(b, "row") for g in part for b in g.branches if b.row is not None and not b.live]
            paused += [Place(g, "root_row") for g in part if g.root_row is not None]
            moves.append(live_rows_first(alive, paused, shard, width, scratch=self.rows))
        return self._copy(pool, None, moves, max(g.longest for g in groups)), width

    # Deciding.

    def _decide(self, pool: Rows, shards: list[Shard], groups: list[Group]) -> tuple[Rows, list[StepEvent]]:
        """One meta-action for every group, all in one jitted call; then rows are forked and prefixes paused or resumed."""
        if not groups:
            return pool, []
        choice, now = choose(self._view(groups), self.head.grid, self.config), self.clock()
        forks: list[list[Move]] = [[] for _ in shards]
        events = []
        for p, group in enumerate(groups):
            copies = choice.multiplicity[p, : len(group.branches)].tolist()
            starts = int(choice.multiplicity[p, self.config.n]) if self.branching else 0
            future_bin, utility = int(choice.future_bin[p]), float(choice.utility[p])
            extends = starts > 0 or any(k for k, b in zip(copies, group.branches, strict=True) if not b.finished)
            # A budget that runs out together with the search ended nothing.
            group.reason = "error" if group.error else group.exhausted(now) if extends else ""
            if group.reason:
                copies, starts, future_bin, utility = [int(b.finished) for b in group.branches], 0, -1, math.nan
            decision = group.record(copies, starts if self.branching else None, future_bin, utility, self.head.grid)
            group.trace.append(decision)
            events.append(self._event(group, decision, last=not extends or bool(group.reason)))
            for branch, k in zip(list(group.branches), copies, strict=True):
                if branch.finished or branch.failed:
                    continue
                branch.live = k > 0
                forks[group.shard] += [self._grow(shards, group, branch, branch.row) for _ in range(k - 1)]
            forks[group.shard] += [self._grow(shards, group, None, group.root_row) for _ in range(starts)]
        return self._copy(pool, None, forks, max(g.longest for g in groups)), events

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
        alpha, beta = np.zeros(shape[0], np.float32), np.zeros(shape[0], np.float32)
        for p, group in enumerate(groups):
            for slot, branch in enumerate(group.branches):
                joint[p, slot], tokens[p, slot] = branch.joint, len(branch.tokens)
                unfinished[p, slot], exists[p, slot] = not branch.finished, True
            if self.branching:
                joint[p, n] = group.root_joint
                unfinished[p, n] = exists[p, n] = True
            free_rows[p] = group.promised
            must_extend[p] = not group.job.config.abstain and not any(b.finished for b in group.branches)
            alpha[p], beta[p] = group.job.config.alpha, group.job.config.beta
        tables = joint.reshape(*shape, grid.n_reward, grid.n_length)
        return View(tables, unfinished, tokens, exists, free_rows, must_extend, alpha, beta)

    def _event(self, group: Group, decision: Decision, last: bool) -> StepEvent:
        """What the prefixes of the group have gained since the last decision."""
        tokens, text = {}, {}
        for branch in group.branches:
            if len(branch.tokens) > branch.streamed:
                tokens[branch.id] = branch.tokens[branch.streamed :]
                branch.streamed = len(branch.tokens)
            if new := branch.new_text(self.lm.tokenizer, last):
                text[branch.id] = new
        return StepEvent(group.job.number, decision, tokens, text)

    @staticmethod
    def _release(group: Group, shard: Shard) -> None:
        shard.promised -= group.promised
        for row in [group.root_row, *(b.row for b in group.branches)]:
            if row is not None:
                shard.give(row)
