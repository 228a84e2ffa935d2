"""The decoder's outer loop: once per interval, decide for all prompts in flight, then move rows.

Host code, with continuous batching across prompts. A prompt is admitted when the pool has room for
it, runs until its best action extends nothing, and then gives its rows back.

A prompt takes rows as its prefixes begin, not before. So more prompts are in flight than could all
have all their prefixes at once. One that finds no free rows waits with its decision made;
`placement.safe` says why never all wait. Which prompts are stepped together depends on the pool.
What is decided for each does not.

The jitted work is in `state` (stepping) and `meta_actions` (deciding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.head import ZipHead
from zip_rc_jax.inference import memory
from zip_rc_jax.inference.arrays import lanes_of, search_inputs_of
from zip_rc_jax.inference.network import Network, TransformerNetwork, page_size
from zip_rc_jax.inference.outputs import Decision, Result
from zip_rc_jax.inference.placement import Move, Place, Shard, live_rows_first, safe
from zip_rc_jax.inference.requests import (
    Prompt,
    RejectedRequest,
    Request,
    RequestProcessor,
    TokenizedRequest,
    prompt_hash,
    shared_prefix,
)
from zip_rc_jax.inference.sampler import Filters
from zip_rc_jax.inference.scheduler import (
    Queue,
    fresh,
    largest_prefills,
    members,
    next_batch,
    next_to_step,
)
from zip_rc_jax.inference.state import (
    DecodeSpec,
    DecodeState,
    Stepped,
    advance,
    bucket,
    copy_rows,
    empty_rows,
    fine_bucket,
    prefill,
)
from zip_rc_jax.inference.stopping import find_stop
from zip_rc_jax.inference.tree import Action, Branch, SearchTree, failure
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.stacks import unstack
from zip_rc_jax.models.transformer import unembedding
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.policies import decide, starts_from_root


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """What streaming yields for one prompt at one decision.

    Attributes:
      prompt_index: which prompt.
      decision: the meta-action: what is predicted for every prefix, and what is done with it.
      new_tokens: per prefix id, the tokens generated since the last event. A new fork begins with
        those that it shares with its parent.
      new_text: per prefix id, the text gained since the last event; added up it is the prefix's
        text. A character of several tokens appears with the last of them.
      new_logprobs: per prefix id, the log-probabilities of `new_tokens`, see `Prefix.logprobs`.
    """

    prompt_index: int
    decision: Decision
    new_tokens: dict[int, tuple[int, ...]]
    new_text: dict[int, str]
    new_logprobs: dict[int, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ResultEvent:
    """The end of one prompt."""

    prompt_index: int
    result: Result


JointObserver = Callable[[int, int, np.ndarray], None]
"""Is told of every interval of every prefix: the number of the prompt, the id of the prefix, and
`[T, C]` float32, what the head says after each of the `T` new tokens. The joint after the last
token of a prefix that ends is not read, so what stands there means nothing."""


# What the engine decides and compiles with. All other options belong to a request.
ENGINE_OPTIONS = (
    "n",
    "interval",
    "window",
    "candidates",
    "add_back",
    "evidence",
    "wrong_answers",
    "strategy",
    "utility",
    "reward_threshold",
    "length_budget",
    "selection_exponent",
    "joint_temperature",
    "joint_top_p",
    "max_num_seqs",
)


def check_head(lm: LanguageModel) -> None:
    """Raises UsageError for a model without a head."""
    if lm.head is None:
        reason = "the search reads the joint from reserved logits"
        raise UsageError("model without a ZIP head", reason, "train one with `zip-rc train`")


def transformer_network(lm: LanguageModel) -> tuple[TransformerNetwork, dict[str, Any]]:
    """The network that decodes with `lm`, and its parameters.

    On CPU layers are unrolled, see `models.stacks.unstack`. On TPU and GPU the cache lies in
    pages, and each sequence is read only as far as it is long.

    Raises:
      UsageError: the copies that this makes do not fit into the device's memory.
    """
    devices = lm.layout.mesh.devices
    unrolled = devices.flat[0].platform == "cpu"
    copied = [
        lm.params["body"]["blocks"] if unrolled else {},
        unembedding(lm.config, lm.params["body"]),
    ]
    memory.check_parameters(lm.params, copied, memory.device_limit(devices.flat[0], devices.size))
    body = unstack(lm.config, lm.params["body"]) if unrolled else lm.params["body"]
    dtype, page = str(body["embed"].dtype), page_size(lm.layout.platform)
    network = TransformerNetwork(lm.config, lm.layout, dtype, unrolled, page)
    return network, {"body": body, "table": lm.folded_table()}


@dataclasses.dataclass(eq=False)
class Prepared:
    """What decoding needs of a model: the network and its parameters. On CPU most are copies."""

    network: TransformerNetwork
    params: dict[str, Any]


_PREPARED: weakref.WeakKeyDictionary[LanguageModel, weakref.ref[Prepared]]
_PREPARED = weakref.WeakKeyDictionary()
_PREPARING = threading.Lock()
# Held while programs of several devices are launched: all devices must get those of two threads in
# one order.
_LAUNCHING = threading.RLock()


def prepared(lm: LanguageModel) -> Prepared:
    """`transformer_network(lm)`, made once and shared by all that hold it at the same time.

    It is not kept: the copies would nearly double the memory of a model as long as it lives.

    Raises:
      UsageError: see `transformer_network`.
    """
    with _PREPARING:
        held = _PREPARED.get(lm)
        prepared = held() if held is not None else None
        if prepared is None:
            prepared = Prepared(*transformer_network(lm))
            _PREPARED[lm] = weakref.ref(prepared)
        return prepared


def pool_slots(tokens: int, listed: bool, max_positions: int) -> int:
    """Slots of rows that hold `tokens`: just enough for a list, which is known as a whole; else
    rounded, as more may come."""
    return -(-tokens // 32) * 32 if listed else fine_bucket(tokens, max_positions)


def _extends(group: SearchTree, action: Action) -> bool:
    """Whether an action makes any prefix of the prompt longer, or starts one."""
    return bool(action.starts) or any(
        copies and not branch.finished
        for branch, copies in zip(group.branches, action.multiplicity, strict=True)
    )


class _MemoryCheck:
    """Whether the device has room for rows and prompts of some length.

    It knows the engine's arrays, and not the engine.
    """

    def __init__(
        self,
        settings: DecodeSpec,
        held: Any,
        config: DecodeConfig,
        rows: int,
        shards: int,
        max_positions: int,
    ):
        """Args: `held` are all parameters, those of the caller too: most arrays are the same;
        `rows` of each of the `shards`."""
        self.settings, self.held, self.config, self.rows, self.shards = (
            settings,
            held,
            config,
            rows,
            shards,
        )
        self.max_positions = max_positions
        self.known_to_fit: set[tuple[int, int]] = set()

    def __call__(self, tokens: int, prompt_tokens: int, listed: bool) -> None:
        """Raises UsageError if rows of `tokens` tokens and prompts of `prompt_tokens` do not fit
        into the device's memory together."""
        slots, prompt = (
            pool_slots(tokens, listed, self.max_positions),
            fine_bucket(prompt_tokens, tokens, least=16),
        )
        if (slots, prompt) in self.known_to_fit:
            return

        def needed(rows: int, slots: int, window: int = self.config.window) -> memory.Estimate:
            settings = dataclasses.replace(self.settings, window=window)
            sizes = largest_prefills(max(1, rows // self.config.n), min(prompt, slots))
            estimates = [
                memory.estimate(settings, self.held, rows, slots, min(count, rows), tokens)
                for count, tokens in sizes
            ]
            return max(estimates, key=lambda estimate: estimate.total)

        devices = self.settings.network.layout.mesh.devices
        limit = memory.device_limit(devices.flat[0], devices.size)
        memory.check_fits(
            needed,
            limit,
            self.config.n,
            self.rows,
            slots,
            prompt_tokens,
            self.shards,
            self.config.window,
        )
        self.known_to_fit.add((slots, prompt))


class Engine:
    """Decodes prompts with one model and one configuration.

    Construct once, `run` many times; compiled programs are shared.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: DecodeConfig,
        seed: int,
        network: Network | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        observer: JointObserver | None = None,
    ):
        """Args:
          network: replaces the transformer (a scripted model in tests); it then gets `lm.params` as
            they are.
          observer: gets the joint after every token, which the host does not see otherwise.
          chat_template_kwargs: variables of the chat template.
          clock: seconds; time budgets and `Usage.seconds` follow it.

        Raises:
          UsageError: the model has no head, or a stop id is not one that the policy can emit.
        """
        check_head(lm)
        assert lm.head is not None
        if config.generation_config:
            reason = "the engine does not read the checkpoint's sampling values"
            raise UsageError("generation_config=True", reason, "pass them, or use a Decoder")
        self.lm, self.config, self.clock = lm, config, clock
        self._observer = observer
        self.head: ZipHead = lm.head
        self._prepared = prepared(lm) if network is None else None
        if self._prepared is not None:
            network, self.params = self._prepared.network, self._prepared.params
        else:
            self.params = lm.params
        assert network is not None
        self.settings = DecodeSpec(
            network=network,
            head=self.head,
            vocab_size=lm.config.vocab_size,
            filters=Filters.of([config.sampling]),
            window=config.window,
        )
        self.eos_ids = lm.tokenizer.eos_ids
        # A short convolution keeps its last inputs only, not what they were in the middle of a
        # prompt.
        self.shares_prefixes = "conv" not in lm.config.kinds
        self.branching = starts_from_root(config)
        self.shards = self.settings.network.layout.mesh.shape["data"]
        self.rows = config.seqs_per_shard(self.shards)
        is_multidevice = self.settings.network.layout.mesh.size > 1
        self._launching = _LAUNCHING if is_multidevice else contextlib.nullcontext()
        # Nothing that the engine holds holds the engine: it is freed, with its copies of the model,
        # as soon as nobody holds it.
        self._memory_check = _MemoryCheck(
            self.settings,
            (lm.params, self.params),
            config,
            self.rows,
            self.shards,
            lm.config.max_positions,
        )
        self.processor = self.processor_for(config, seed, chat_template_kwargs)

    def processor_for(
        self,
        config: DecodeConfig,
        seed: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestProcessor:
        """Reads the requests of one call.

        Args:
          config: differs from the engine's in options that are not in `ENGINE_OPTIONS`.

        Raises:
          UsageError: see `RequestProcessor`.
        """
        variables = {} if chat_template_kwargs is None else chat_template_kwargs
        return RequestProcessor(self.lm, config, seed, variables, self._memory_check)

    def run(
        self, prompts: Iterable[Prompt | Request], on_error: str | None = None, stream: bool = True
    ) -> Iterator[StepEvent | ResultEvent]:
        """Decodes all prompts; yields an event per decision and a result per prompt, as they come.

        Any iterable will do. An iterator is read one prompt at a time, when there is a free row for
        it. So memory depends on `rows` and not on the number of prompts. While the iterator blocks,
        nothing is decoded. What it raises is raised when the prompts in flight have ended. Closing
        the generator frees everything.

        Args:
          stream: False yields results only, and spares the text of every prefix at every decision.
          on_error: see `RequestProcessor.tokenize`. A model that fails on one prompt (logits that
            are not finite) never ends the run: that prompt's result has the finish reason "error".

        Raises:
          UsageError: see `RequestProcessor.tokenize`; for a sequence it is raised on the first
            `next`, before any compilation.
        """
        yield from self.decode(self.processor.tokenize(prompts, on_error), stream)

    def decode(
        self, jobs: Iterable[TokenizedRequest | RejectedRequest] | Queue, stream: bool = True
    ) -> Iterator[StepEvent | ResultEvent]:
        """`run` for what `RequestProcessor.tokenize` returned, or for a queue."""
        queue = jobs if isinstance(jobs, Queue) else Queue(jobs)
        groups = list[SearchTree]()
        pool, shards = None, [Shard(list(range(self.rows))) for _ in range(self.shards)]
        try:
            while groups or queue.peek() is not None:
                # Cancellation: callers that went away give their rows back first.
                if abandoned := queue.abandoned():
                    self._drop(abandoned, shards, groups)
                    continue
                # The pool: made for the first prompt, and again for a longer one while it is empty.
                if (
                    not groups
                    and isinstance(job := queue.peek(), TokenizedRequest)
                    and (pool is None or job.slots > pool.tokens.shape[2])
                ):
                    pool = None  # is freed before its successor is made
                    longest = queue.longest()
                    most = self.lm.config.max_positions
                    slots = pool_slots(longest or job.slots, longest > 0, most)
                    with self._launching:
                        pool = empty_rows(self.settings, self.rows + 1, slots)  # with a scratch row
                slots = 0 if pool is None else pool.tokens.shape[2]
                # Admission: batch after batch while there is room. Only the decision for a batch
                # shows how many rows its prompts really take.
                while True:
                    batch, refused = next_batch(
                        queue, slots, shards, groups, most=self.rows // self.config.n
                    )
                    for request in refused:
                        yield ResultEvent(request.number, failure(request, request.reason))
                    if pool is None or not any(batch):
                        break
                    with self._launching:
                        pool, admitted, failed = self._admit(pool, shards, groups, batch)
                    yield from failed
                    groups += admitted
                    with self._launching:
                        pool, events, ended = self._decide(pool, shards, groups, stream)
                    yield from events
                    yield from self._results(ended)
                if pool is None:
                    continue
                # One interval of decode steps, then the next decisions.
                before = sum(g.used for g in groups)
                with self._launching:
                    pool = self._advance(pool, shards, groups)
                    new = sum(g.used for g in groups) - before
                    pool, events, ended = self._decide(pool, shards, groups, stream)
                queue.stepped(sum(self.rows - len(shard.free) for shard in shards), new)
                yield from events
                yield from self._results(ended)
            pool = None  # whoever keeps the error keeps this frame
            if queue.failure is not None:
                raise queue.failure
        finally:
            # The traceback of the failure holds the queue's frames and this one: left there, it
            # would hold itself and the model.
            queue.failure = None

    def _drop(self, numbers: set[int], shards: list[Shard], groups: list[SearchTree]) -> None:
        """Ends prompts that nobody waits for any more, and gives their rows back."""
        for group in [g for g in groups if g.job.number in numbers]:
            groups.remove(group)
            for row in group.rows():
                shards[group.shard].give(row)

    # Admission.

    def _admit(
        self,
        pool: DecodeState,
        shards: list[Shard],
        groups: list[SearchTree],
        batch: list[list[TokenizedRequest]],
    ) -> tuple[DecodeState, list[SearchTree], list[ResultEvent]]:
        """Prefills the prompts of a batch.

        A prompt that shares a beginning with another one, in flight or in the batch, comes second
        and continues from that one's row.

        Returns:
          the pool, the trees of the prompts, and the results of prompts that the model fails on.
        """
        known = [[g.job.ids for g in part] for part in members(groups, len(shards))]
        first = (
            [fresh(part, ids) for part, ids in zip(batch, known, strict=True)]
            if self.shares_prefixes
            else batch
        )
        numbers = {job.number for part in first for job in part}
        rest = [[job for job in part if job.number not in numbers] for part in batch]
        admitted: list[SearchTree] = []
        failed: list[ResultEvent] = []
        for parts in (first, rest):
            pool, more, wrong = self._prefill(pool, shards, [*groups, *admitted], parts)
            admitted, failed = admitted + more, failed + wrong
        return pool, sorted(admitted, key=lambda g: g.job.number), failed

    def _prefill(
        self,
        pool: DecodeState,
        shards: list[Shard],
        groups: list[SearchTree],
        batch: list[list[TokenizedRequest]],
    ) -> tuple[DecodeState, list[SearchTree], list[ResultEvent]]:
        """Prefills these prompts, from the rows of `groups` as far as they begin the same way."""
        if not any(batch):
            return pool, [], []
        # The batch as arrays. The width is tight: a padded prompt costs as much as a real one.
        width = bucket(max(map(len, batch)), self.rows, least=1)
        longest = max(len(job.ids) for part in batch for job in part)
        tokens = np.zeros(
            (len(shards), width, fine_bucket(longest, pool.tokens.shape[2], least=16)), np.int32
        )
        length, hashes = np.ones(tokens.shape[:2], np.int32), np.zeros(tokens.shape[:2], np.uint32)
        stems = np.zeros((*tokens.shape[:2], 2), np.int32)
        for s, part in enumerate(batch):
            sources = (
                [(g.job.ids, g.rows()[0]) for g in groups if g.shard == s]
                if self.shares_prefixes
                else []
            )
            for lane, job in enumerate(part):
                length[s, lane], hashes[s, lane] = len(job.ids), prompt_hash(job.ids)
                tokens[s, lane, : length[s, lane]] = job.ids
                stems[s, lane] = max(
                    ((row, shared_prefix(job.ids, ids)) for ids, row in sources),
                    key=lambda x: x[1],
                    default=(0, 0),
                )
        # The prefill; it copies the shared beginnings from the pool, if there are any.
        now = self.clock()
        known: tuple[Any, ...] = ()
        if stems[..., 1].any():
            known = (
                pool,
                stems,
                bucket(int((length - stems[..., 1]).max()), tokens.shape[2], least=16),
            )
        source, root = prefill(self.settings, self.params, tokens, length, hashes, *known)
        joints, fault = np.asarray(root), np.asarray(source.done)

        # A tree and a row for every prompt that the model did not fail on.
        admitted: list[SearchTree] = []
        failed: list[ResultEvent] = []
        copies: list[list[Move]] = [[] for _ in shards]
        for s, (shard, part) in enumerate(zip(shards, batch, strict=True)):
            for lane, job in enumerate(part):
                if fault[s, lane]:
                    error = "the model's logits after the prompt are not finite"
                    failed.append(ResultEvent(job.number, failure(job, error, self.clock() - now)))
                    continue
                row = shard.take()
                group = SearchTree(job, now, joints[s, lane], s, row)
                if not self.branching:
                    group.branches = [group.sample(i) for i in range(job.config.n)]
                copies[s].append((lane, row, 0))
                admitted.append(group)
        return self._copy(pool, source, copies, longest), admitted, failed

    def _copy(
        self, pool: DecodeState, source: DecodeState | None, moves: list[list[Move]], longest: int
    ) -> DecodeState:
        """Carries out the moves of every shard, in order; `longest` is the longest prefix that may
        move."""
        count = [len(part) for part in moves]
        if not any(count):
            return pool
        table = np.zeros((len(moves), bucket(max(count), least=256), 3), np.int32)
        for part, row in zip(moves, table, strict=True):
            row[: len(part)] = np.reshape(part, (-1, 3))
        slots = fine_bucket(longest, pool.tokens.shape[2])
        return copy_rows(self.settings, pool, source, table, np.asarray(count, np.int32), slots)

    # Stepping.

    def _advance(
        self, pool: DecodeState, shards: list[Shard], groups: list[SearchTree]
    ) -> DecodeState:
        """One interval of decode steps for prompts that are ready.

        Prefixes that have ended give their rows back.
        """
        # Which rows: those to step become the first ones of their shard.
        stepped, width = next_to_step(groups, len(shards), self.rows)
        if not stepped:
            return pool
        pool = self._live_rows_first(pool, shards, groups, stepped, width)
        live = [
            (g, b, g.shard * width + b.row, len(b.tokens) + quota)
            for g in stepped
            for b, quota in zip(g.live(), g.quotas(self.config.interval), strict=True)
            if b.row is not None
        ]
        # What is compiled for: buckets of lengths and stop ids, and filters that a prompt asks for.
        longest = max(len(g.job.ids) + len(b.tokens) for g, b, _, _ in live) + self.config.interval
        most_ids = bucket(max(len(self._stop_ids(g.job)) for g in stepped), least=4)
        strings = any(g.job.config.stop for g in stepped)
        settings = dataclasses.replace(
            self.settings,
            filters=Filters.of(g.job.config.sampling for g in stepped),
            history=self.config.interval if strings or self._observer is not None else 0,
        )
        # The steps themselves, on the device.
        pool, after = advance(
            settings,
            self.params,
            pool,
            lanes_of(
                [(lane, g.job, quota) for g, _, lane, quota in live],
                self._stop_ids,
                most_ids,
                (len(shards), width),
            ),
            np.int32(self.config.interval),
            fine_bucket(longest, pool.tokens.shape[2]),
        )
        # Back to the host: tokens, log-probabilities and joints of every prefix.
        read = jax.tree.map(np.asarray, after)
        used = dict.fromkeys((g.job.number for g in stepped), 0)
        dirty: list[list[int]] = [[] for _ in shards]
        for group, branch, lane, _ in live:
            if read.fault[lane]:
                assert branch.row is not None
                dirty[group.shard].append(branch.row)
            before = len(branch.tokens)
            ended = self._grow(group, branch, read, lane)
            new = int(read.length[lane]) - len(group.job.ids) - before
            used[group.job.number] = max(used[group.job.number], new)
            if ended:
                assert branch.row is not None
                shards[group.shard].give(branch.row)
                branch.live, branch.row = False, None
        for group in stepped:
            group.steps += used[group.job.number]
            group.action, group.ready = None, False
        return self._clear(pool, dirty)

    def _grow(self, group: SearchTree, branch: Branch, read: Stepped, lane: int) -> bool:
        """Takes over what an interval made of a prefix. Returns whether the prefix has ended."""
        # New tokens.
        job, before = group.job, len(branch.tokens)
        new = slice(len(job.ids) + before, int(read.length[lane]))
        branch.tokens += tuple(read.tokens[lane, new].tolist())
        branch.logprobs += tuple(read.logprobs[lane, new].tolist())
        branch.joint = read.joint[lane].copy()
        if self._observer is not None:
            assert read.history is not None
            joints = np.asarray(read.history[lane, : len(branch.tokens) - before])
            self._observer(job.number, branch.id, joints)
        # A stop string: what was generated behind it is dropped.
        window = self.config.window
        if job.config.stop:
            assert branch.history is not None
            assert read.history is not None
            history = branch.history.extended(read.history[lane, : len(branch.tokens) - before])
            branch.history = history.last(window)
            branch.stop = find_stop(
                self.lm.tokenizer.decode, branch.tokens, before, job.config.stop
            )
            if branch.stop is not None:
                length = branch.stop.length
                group.dropped += len(branch.tokens) - length
                branch.tokens, branch.logprobs = branch.tokens[:length], branch.logprobs[:length]
                branch.joint = history.mean_of_finished(length, window)
                branch.finished = branch.stopped = True
                return True
        # The end of the sequence, or a model that failed.
        if not read.done[lane]:
            return False
        branch.failed = bool(read.fault[lane])
        branch.finished = not branch.failed
        branch.stopped = branch.finished and branch.tokens[-1] in self._stop_ids(job)
        if branch.failed:
            after = f"after the {len(branch.tokens)} tokens of prefix {branch.id}"
            group.error = f"the model's logits {after} are not finite"
        return True

    def _clear(self, pool: DecodeState, dirty: list[list[int]]) -> DecodeState:
        """Empties rows whose cache holds values that are not finite.

        A masked slot still counts 0 times, and 0 times NaN would reach the next prefix there.
        """
        if not any(dirty):
            return pool
        slots = pool.tokens.shape[2]
        return self._copy(
            pool,
            empty_rows(self.settings, 1, slots),
            [[(0, row, 0) for row in part] for part in dirty],
            slots,
        )

    def _stop_ids(self, job: TokenizedRequest) -> tuple[int, ...]:
        return (*self.eos_ids, *job.config.stop_token_ids)

    def _live_rows_first(
        self,
        pool: DecodeState,
        shards: list[Shard],
        groups: list[SearchTree],
        stepped: list[SearchTree],
        width: int,
    ) -> DecodeState:
        """Moves rows so that the ones to step are among the first `width` of every shard."""
        moves = []
        longest = 0
        chosen = {g.job.number for g in stepped}
        for shard, part in zip(shards, members(groups, len(shards)), strict=True):
            live = [Place(b, "row") for g in part if g.job.number in chosen for b in g.live()]
            others = [
                Place(b, "row")
                for g in part
                for b in g.branches
                if b.row is not None and not (b.live and g.job.number in chosen)
            ]
            others += [Place(g, "root_row") for g in part if g.root_row is not None]
            length = {row: tokens for g in part for row, tokens in g.lengths().items()}
            moves.append(live_rows_first(live, others, shard, width, scratch=self.rows))
            longest = max(
                [longest, *(length.get(row, 0) for move in moves[-1] for row in move[:2])]
            )
        return self._copy(pool, None, moves, longest)

    # Deciding.

    def _decide(
        self, pool: DecodeState, shards: list[Shard], groups: list[SearchTree], stream: bool
    ) -> tuple[DecodeState, list[StepEvent], list[SearchTree]]:
        """One meta-action for every prompt that needs one, all in one jitted call.

        Finished prompts are removed and returned; waiting prompts get their rows in order.
        """
        # Decide.
        undecided = [g for g in groups if g.action is None]
        for group, action in zip(undecided, self._actions(undecided), strict=True):
            group.action = action
        # Finish: prompts whose action extends nothing, that failed, or whose budget is spent.
        now, events, ended = self.clock(), list[StepEvent](), list[SearchTree]()
        for group in [g for g in groups if not g.ready]:
            assert group.action is not None
            extends = _extends(group, group.action)
            # A budget that runs out together with the search ended nothing.
            group.reason = "error" if group.error else group.exhausted(now) if extends else ""
            if group.reason:
                kept, starts = (
                    [int(b.finished) for b in group.branches],
                    0 if self.branching else None,
                )
                group.action = dataclasses.replace(
                    group.action,
                    multiplicity=kept,
                    starts=starts,
                    planned_pause_bin=-1,
                    utility=math.nan,
                )
            if group.reason or not extends:
                events += self._record(group, group.action, stream, last=True)
                groups.remove(group)
                for row in group.rows():
                    shards[group.shard].give(row)
                ended.append(group)
        # Start and fork, in the order of admission, where rows are free and nobody can be left
        # without any (`placement.safe`).
        begun: list[list[Move]] = [[] for _ in shards]
        longest = 0
        for shard, part, moves in zip(shards, members(groups, len(shards)), begun, strict=True):
            accounts = {g.job.number: g.account for g in part}
            for group in [g for g in part if not g.ready]:
                assert group.action is not None
                rows, (claim, held) = group.wanted(group.action), accounts[group.job.number]
                after = accounts | {group.job.number: (claim - rows, held + rows)}
                if rows > len(shard.free) or not safe(len(shard.free) - rows, after.values()):
                    continue
                accounts = after
                group.ready = True
                events += self._record(group, group.action, stream, last=False)
                new = group.begin(group.action, shard.take)
                moves += new
                longest = max(
                    [
                        longest,
                        *(
                            len(group.job.ids) + len(group.branches[number].tokens)
                            for _, _, number in new
                        ),
                    ]
                )
                if not group.steps:
                    shard.taken.append(sum(group.account[1:]))
        return self._copy(pool, None, begun, longest), events, ended

    def _results(self, ended: list[SearchTree]) -> Iterator[ResultEvent]:
        for group in ended:
            yield ResultEvent(
                group.job.number,
                group.result(self.clock() - group.started, self.head.grid, self.lm.tokenizer),
            )

    def _actions(self, groups: list[SearchTree]) -> list[Action]:
        """What its strategy decides for each group."""
        strategies = list[Any]()
        for group in groups:
            if group.job.config.strategy not in strategies:
                strategies.append(group.job.config.strategy)
        decided = dict[int, Action]()
        for strategy in strategies:
            same = [g for g in groups if g.job.config.strategy == strategy]
            config = self.config
            if strategy != config.strategy:
                config = dataclasses.replace(config, strategy=strategy)
            numbers = [g.job.number for g in same]
            decided |= zip(numbers, self._actions_of_one(same, config), strict=True)
        return [decided[g.job.number] for g in groups]

    def _actions_of_one(self, groups: list[SearchTree], config: DecodeConfig) -> list[Action]:
        """What the strategy of `config` decides for each group."""
        # All prompts in one call, on arrays whose shapes come in buckets.
        inputs = search_inputs_of(
            groups,
            self.head.grid,
            self.config.n,
            self.branching,
            bucket(len(groups)),
            self.lm.tokenizer if self.config.evidence == "answers" else None,
        )
        choice = decide(inputs, grid=self.head.grid, config=config)
        reward = inputs.joint.sum(-1) @ np.asarray(self.head.grid.reward_centres)
        remaining = inputs.joint.sum(-2) @ np.asarray(self.head.grid.length_midpoints)
        # Back to one record for each prompt, without the padding.
        columns = (choice.multiplicity, choice.planned_pause_bin, choice.utility, reward, remaining)
        return [
            Action(
                copies[: len(g.branches)],
                copies[-1] if self.branching else None,
                planned_pause_bin,
                utility,
                *expected,
            )
            for g, copies, planned_pause_bin, utility, *expected in zip(
                groups, *(c[: len(groups)].tolist() for c in columns), strict=True
            )
        ]

    def _record(
        self, group: SearchTree, action: Action, stream: bool, last: bool
    ) -> list[StepEvent]:
        """Puts the decision into the trace; the event that tells of it, if it is streamed."""
        grid = self.head.grid
        decision = group.record(action, (grid.n_reward, grid.n_length))
        if not (stream and group.job.streamed):
            return []
        return [StepEvent(group.job.number, decision, *group.progress(self.lm.tokenizer, last))]
