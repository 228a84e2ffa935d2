"""The decoder's outer loop: admit, step an interval, decide, emit.

Host code, with continuous batching across prompts. A prompt is admitted when there is room for what
its sequences will probably need, runs until its best action extends nothing, and then gives
everything back. Where the guess was wrong, sequences wait, or leave for host memory (`paging`).
Which sequences are stepped together depends on the room. What is decided for each prompt does not.

The jitted work is in `state` (stepping) and `search` (deciding); `running_batch` carries out what
decisions mean for pages and slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.head import ZipHead
from zip_rc_jax.inference.arrays import Lane, lanes_of
from zip_rc_jax.inference.decisions import decided, extends, stopped
from zip_rc_jax.inference.intervals import JointObserver, take_over
from zip_rc_jax.inference.memory import PoolMemory
from zip_rc_jax.inference.network import Network
from zip_rc_jax.inference.outputs import Decision, Result
from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.prepared import check_head, prepared
from zip_rc_jax.inference.requests import (
    Prompt,
    RejectedRequest,
    Request,
    RequestProcessor,
    TokenizedRequest,
)
from zip_rc_jax.inference.running_batch import Prefilled, RunningBatch
from zip_rc_jax.inference.sampler import Filters
from zip_rc_jax.inference.scheduler import Queue, next_batch, next_to_step
from zip_rc_jax.inference.state import DecodeSpec, Stepped, bucket, fine_bucket
from zip_rc_jax.inference.tree import Action, SearchTree, failure
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.policies import starts_from_root


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


# Held while programs of several devices are launched: all devices must get those of two threads in
# one order.
_LAUNCHING = threading.RLock()


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
        self.branching = starts_from_root(config)
        self.shards = self.settings.network.layout.mesh.shape["data"]
        self.rows = config.seqs_per_shard(self.shards)
        is_multidevice = self.settings.network.layout.mesh.size > 1
        self._launching = _LAUNCHING if is_multidevice else contextlib.nullcontext()
        # Nothing that the engine holds holds the engine: it is freed, with its copies of the model,
        # as soon as nobody holds it.
        self._memory = PoolMemory(
            self.settings, (lm.params, self.params), config, lm.config.max_positions
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
        return RequestProcessor(self.lm, config, seed, variables, self._memory.check)

    def run(
        self, prompts: Iterable[Prompt | Request], on_error: str | None = None, stream: bool = True
    ) -> Iterator[StepEvent | ResultEvent]:
        """Decodes all prompts; yields an event per decision and a result per prompt, as they come.

        Any iterable will do. An iterator is read one prompt at a time, when there is room for it.
        So memory depends on `max_num_seqs` and not on the number of prompts. While the iterator
        blocks, nothing is decoded. What it raises is raised when the prompts in flight have ended.
        Closing the generator frees everything.

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
        running: RunningBatch | None = None
        try:
            while groups or (running and running.incomplete) or queue.peek() is not None:
                # Callers that went away give back what their prompts hold.
                if abandoned := queue.abandoned():
                    self._drop(abandoned, running, groups)
                    continue
                # Arrays on the device: for the first prompt, and again for a longer one while none
                # is in flight.
                is_empty = not groups and not (running and running.incomplete)
                if is_empty and self._has_outgrown(running, queue.peek()):
                    running = None  # is freed before its successor is made
                    running = self._new_batch(queue)
                # Admit: batch after batch while there is room.
                while True:
                    most = max(1, self.rows // self.config.n)
                    batch, refused = next_batch(queue, running, most)
                    for request in refused:
                        yield ResultEvent(request.number, failure(request, request.reason))
                    if running is None or not batch:
                        break
                    with self._launching:
                        events = self._start(groups, running.prefill(self.params, batch))
                        decisions, ended = self._decide(running, groups, stream)
                    yield from [*events, *decisions]
                    yield from self._results(ended)
                if running is None:
                    continue
                # A chunk of a long prompt, one interval of decode steps, then the next decisions.
                with self._launching:
                    planned = running.plan()
                    events = self._start(groups, running.prefill_next(self.params, planned))
                    new = self._step(running, groups, planned)
                    decisions, ended = self._decide(running, groups, stream)
                queue.stepped(running.slots_in_use, new)
                yield from [*events, *decisions]
                yield from self._results(ended)
            running = None  # whoever keeps the error keeps this frame
            if queue.failure is not None:
                raise queue.failure
        finally:
            # The traceback of the failure holds the queue's frames and this one: left there, it
            # would hold itself and the model.
            queue.failure = None

    def _has_outgrown(
        self, running: RunningBatch | None, job: TokenizedRequest | RejectedRequest | None
    ) -> bool:
        return isinstance(job, TokenizedRequest) and (
            running is None or job.slots > running.sizes.tokens
        )

    def _new_batch(self, queue: Queue) -> RunningBatch:
        """Room for the next request of the queue, or for all if they are known."""
        job, longest = queue.peek(), queue.longest()
        assert isinstance(job, TokenizedRequest)
        sizes, host_pages = self._memory.sizes(longest or job.slots, longest > 0)
        kinds = self.lm.config.kinds
        with self._launching:
            return RunningBatch(
                self.settings,
                sizes,
                host_pages,
                # A short convolution keeps its last inputs only, not what they were in the middle
                # of a prompt.
                share="conv" not in kinds,
                clock=self.clock,
                window=self.lm.config.sliding_window if set(kinds) == {"sliding"} else 0,
            )

    def _drop(
        self, numbers: set[int], running: RunningBatch | None, groups: list[SearchTree]
    ) -> None:
        """Ends prompts that nobody waits for any more."""
        if running is None:
            return
        running.abandon(numbers)
        for group in [g for g in groups if g.job.number in numbers]:
            self._end(running, groups, group)

    def _end(self, running: RunningBatch, groups: list[SearchTree], group: SearchTree) -> None:
        """Takes a prompt out; it gives back all that it holds."""
        groups.remove(group)
        for sequence in group.sequences():
            running.stop(group.shard, sequence)

    # Admission.

    def _start(
        self, groups: list[SearchTree], prefilled: list[Prefilled]
    ) -> list[StepEvent | ResultEvent]:
        """Trees of prompts that are computed join `groups`.

        Returns:
          the results of prompts that the model fails on.
        """
        failed: list[StepEvent | ResultEvent] = []
        for found in prefilled:
            job, since = found.admitted.job, found.admitted.since
            if found.fault:
                error = "the model's logits after the prompt are not finite"
                failed.append(ResultEvent(job.number, failure(job, error, self.clock() - since)))
                continue
            group = SearchTree(job, since, found.joint, found.admitted.shard, found.admitted.root)
            if not self.branching:
                group.branches = [group.sample(i) for i in range(job.config.n)]
            groups.append(group)
        return failed

    # Stepping.

    def _step(
        self,
        running: RunningBatch,
        groups: list[SearchTree],
        planned: list[list[PagedSequence]],
    ) -> int:
        """One interval of decode steps for the sequences that can run.

        Args:
          planned: what `RunningBatch.plan` says.

        Returns:
          tokens that it generated.
        """
        # Which sequences, and in which lanes.
        of_prompt = {g.held_as: g for g in groups}
        hurried = {prompt for prompt, g in of_prompt.items() if g.job.config.time_budget}
        planned = [[s for s in part if s.prompt in of_prompt] for part in planned]
        chosen, width = next_to_step(planned, hurried, self.rows)
        placed = running.arrange(chosen, width)
        lanes = [
            Lane(s * width + at, sequence, of_prompt[sequence.prompt])
            for s, (part, places) in enumerate(zip(chosen, placed, strict=True))
            for sequence, at in zip(part, places, strict=True)
        ]
        if not lanes:
            return 0
        # What is compiled for: buckets of lengths and stop ids, and filters that a prompt asks for.
        stepped = list({id(lane.tree): lane.tree for lane in lanes}.values())
        longest = max(lane.sequence.table.length for lane in lanes) + self.config.interval
        most_ids = bucket(max(len(self._stop_ids(g.job)) for g in stepped), least=4)
        strings = any(g.job.config.stop for g in stepped)
        settings = dataclasses.replace(
            self.settings,
            filters=Filters.of(g.job.config.sampling for g in stepped),
            history=self.config.interval if strings or self._observer is not None else 0,
        )
        pages = running.table_width(fine_bucket(longest, running.sizes.tokens))
        shape = (self.shards, width)
        inputs = lanes_of(
            lanes,
            self._stop_ids,
            most_ids,
            shape,
            0 if running.whole else pages,
            running.sizes.slots,
        )
        # The steps themselves, on the device; then tokens and joints of every prefix.
        read = running.step(settings, self.params, inputs, self.config.interval, longest)
        before = sum(g.used for g in groups)
        for lane in lanes:
            self._take_over(running, lane, read)
        return sum(g.used for g in groups) - before

    def _take_over(self, running: RunningBatch, lane: Lane, read: Stepped) -> None:
        """What an interval made of the sequence in a lane."""
        group, sequence = lane.tree, lane.sequence
        branch = group.branches[sequence.branch]
        written, ended = take_over(
            group,
            branch,
            read,
            lane.number,
            tokenizer=self.lm.tokenizer,
            window=self.config.window,
            stop_ids=self._stop_ids(group.job),
            observer=self._observer,
        )
        group.since = max(group.since, written)
        if ended:
            running.ended(len(branch.tokens))
            running.stop(group.shard, sequence, discard=branch.failed)
            branch.live, branch.sequence = False, None
        else:
            running.advance(group.shard, sequence, written)

    def _stop_ids(self, job: TokenizedRequest) -> tuple[int, ...]:
        return (*self.eos_ids, *job.config.stop_token_ids)

    # Deciding.

    def _decide(
        self, running: RunningBatch, groups: list[SearchTree], stream: bool
    ) -> tuple[list[StepEvent], list[SearchTree]]:
        """One meta-action for every prompt whose sequences have run, all in one jitted call.

        Prompts that are finished are removed and returned.
        """
        settled = [g for g in groups if not any(s.due for s in g.sequences())]
        actions = decided(settled, self.config, self.head.grid, self.lm.tokenizer)
        now, events, ended = self.clock(), list[StepEvent](), list[SearchTree]()
        for group, action in zip(settled, actions, strict=True):
            group.steps, group.since = group.steps + group.since, 0
            goes_on = extends(group, action)
            # A budget that runs out together with the search ended nothing.
            group.reason = "error" if group.error else group.exhausted(now) if goes_on else ""
            if group.reason or not goes_on:
                action = stopped(group, action) if group.reason else action
                events += self._record(group, action, stream, last=True)
                self._end(running, groups, group)
                ended.append(group)
                continue
            events += self._record(group, action, stream, last=False)
            self._begin(running, group, action)
        return events, ended

    def _begin(self, running: RunningBatch, group: SearchTree, action: Action) -> None:
        """Starts and forks sequences as decided, and says what each has to do until the next
        decision."""
        unborn, first = group.unborn, not group.steps
        new = group.begin(action)
        for i, (branch, parent) in enumerate(new, 1):
            source = group.root if parent is None else parent.sequence
            assert source is not None
            if i < unborn:
                branch.sequence = running.fork(group.shard, source, branch.id)
                continue
            # Nothing begins at the root after the last one.
            root, group.root = group.root, None
            assert root is not None
            if parent is None:
                branch.sequence = running.rename(group.shard, root, branch.id)
            else:
                running.stop(group.shard, root)
                branch.sequence = running.fork(group.shard, source, branch.id)
        if first:
            running.began(len(new))
        for sequence in group.sequences():
            sequence.live, sequence.due = False, 0
            sequence.utility, sequence.remaining = action.reward[-1], action.remaining[-1]
        quotas = group.quotas(self.config.interval)
        for branch, quota in zip(group.live(), quotas, strict=True):
            assert branch.sequence is not None
            most = group.job.config.max_tokens - len(branch.tokens)
            branch.sequence.live, branch.sequence.due = True, min(quota, most)
        for branch in group.branches:
            if branch.sequence is not None:
                known = branch.id if branch.id < len(action.multiplicity) else branch.parent
                branch.sequence.utility = action.reward[known]
                branch.sequence.remaining = action.remaining[known]

    def _results(self, ended: list[SearchTree]) -> Iterator[ResultEvent]:
        for group in ended:
            yield ResultEvent(
                group.job.number,
                group.result(self.clock() - group.started, self.head.grid, self.lm.tokenizer),
            )

    def _record(
        self, group: SearchTree, action: Action, stream: bool, last: bool
    ) -> list[StepEvent]:
        """Puts the decision into the trace; the event that tells of it, if it is streamed."""
        grid = self.head.grid
        decision = group.record(action, (grid.n_reward, grid.n_length))
        if not (stream and group.job.streamed):
            return []
        return [StepEvent(group.job.number, decision, *group.progress(self.lm.tokenizer, last))]
