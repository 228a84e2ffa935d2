"""Decoding for callers.

A `Decoder` is prepared once and called many times. `decode` and `decode_stream` call one once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.plugins import POLICIES
from zip_rc_jax.config.renamed import new_names
from zip_rc_jax.head import ZipHead
from zip_rc_jax.inference.engine import ENGINE_OPTIONS, Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.prepared import check_head, prepared
from zip_rc_jax.inference.requests import Prompt, RejectedRequest, Request, TokenizedRequest
from zip_rc_jax.inference.sharing import Event, OwnSession, Session, SharedEngine
from zip_rc_jax.models.io.generation import FILE, sampling_values
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest

ALIASES = {"max_new_tokens": "max_tokens"}


def defaults_of(head: ZipHead | None) -> DecodeConfig:
    """How to decode where the caller says nothing.

    Interval, window and max_tokens are the head's, if it says any; all else is `DecodeConfig()`.
    """
    said = head.defaults if head else None
    if said is None:
        return DecodeConfig()
    return DecodeConfig(interval=said.interval, window=said.window, max_tokens=said.max_tokens)


def resolve(
    config: DecodeConfig | None,
    options: dict[str, Any],
    head: ZipHead | None = None,
    generation: Mapping[str, Any] | None = None,
) -> DecodeConfig:
    """`config` with `options` on top (`max_new_tokens` is an alias of `max_tokens`).

    A `config` is whole and leaves nothing open. Without one, `defaults_of(head)` stands below the
    options. With `generation_config`, sampling options that are not among `options` and are at
    their defaults in `config` take the checkpoint's values.

    Args:
      generation: the checkpoint's generation_config.json; None if it is not known yet, then the
        switch stays.

    Raises:
      UsageError: an option that no one reads, one given under both its names, an impossible value,
        or what `sampling_values` raises.
    """
    known = [f.name for f in dataclasses.fields(DecodeConfig)]
    options = new_names(DecodeConfig, options)
    renamed = {ALIASES.get(name, name): value for name, value in options.items()}
    if len(renamed) < len(options):
        raise UsageError(
            f"decoding options {', '.join(options)}",
            "two of them are the same one",
            f"leave out {', '.join(ALIASES)}",
        )
    for name in renamed:
        if name not in known:
            fix = nearest(name, known, "the options are")
            raise UsageError(
                f"decoding option {name!r}", "nothing reads it, and options are never ignored", fix
            )
    base = defaults_of(head) if config is None else config
    asked = renamed.get("generation_config", base.generation_config)
    if generation is None or asked is not True:
        return dataclasses.replace(base, **renamed)
    default = DecodeConfig()
    values = sampling_values(generation).items()
    taken = {k: v for k, v in values if getattr(base, k) == getattr(default, k)}
    try:
        return dataclasses.replace(base, **taken | renamed | {"generation_config": False})
    except UsageError as error:
        value = f"{error.value} (with {shown(taken)} of the checkpoint's {FILE})"
        raise UsageError(value, error.reason, error.fix) from None


@dataclasses.dataclass(frozen=True)
class _Told:
    """What a call wants to be told: decisions as they are made, and the joints of all decisions."""

    streamed: bool
    joints: bool

    def mark(self, job: TokenizedRequest | RejectedRequest) -> TokenizedRequest | RejectedRequest:
        if isinstance(job, RejectedRequest):
            return job
        return dataclasses.replace(job, streamed=self.streamed, joints=self.joints)


class Decoder:
    """A model that is ready to decode. Prepare it once, and call it many times.

    It may be called from any number of threads and asyncio tasks.

    ```
    decoder = Decoder(lm, n=8, beta=0.02)
    results = decoder(["4 + 3 ="])                       # the same as decoder.decode(...)
    for event in decoder.stream(["4 + 3 ="]): ...
    results = await decoder.adecode(["4 + 3 ="], beta=0.1)
    ```

    It holds what decoding needs of the parameters until it is dropped: on CPU a copy of nearly all
    of them, elsewhere a copy of the unembedding. Two decoders of one model share it. Nothing else
    is kept between calls.

    Several calls at a time:
      - Each gets the results that it would get alone, for randomness is fold(seed, prompt hash,
        branch, position). Tokens and decisions are equal, predictions up to rounding (tested on
        CPU); a `time_budget` follows the clock, which all share.
      - Calls with lists of prompts and the same `ENGINE_OPTIONS` share one set of slots: their
        prompts run in one batch. Any other call has slots of its own while it runs: `max_num_seqs`
        of them, as the memory check assumes for one call.
      - What is wrong with one call is raised to that call alone. If the device fails, the call that
        drove it is told; the prompts of the others are decoded again.
      - A stream that is closed or dropped, and an asyncio task that is cancelled, give their slots
        back at the next decision.

    Every option may be another one for each call. New values of `ENGINE_OPTIONS` may compile
    programs of their own, and so do the first uses of temperature 0, top_k, top_p,
    repetition_penalty and stop; all others never do.

    Attributes:
      lm: the model.
      config: what calls start from.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: DecodeConfig | None = None,
        *,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        """Args:
          lm: a model with a ZIP head, from `load`.
          config, seed, chat_template_kwargs, options: of calls that do not say otherwise; see
            `decode`.

        Raises:
          UsageError: the model has no head, its copies do not fit the device, or bad options.
        """
        check_head(lm)
        self.lm = lm
        self.config = resolve(config, options, lm.head, lm.generation_config)
        self._seed, self._variables = seed, chat_template_kwargs
        self._prepared = prepared(lm)
        self._engines: weakref.WeakValueDictionary[DecodeConfig, SharedEngine]
        self._engines = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._shared(self.config).engine.processor_for(self.config, seed, chat_template_kwargs)

    def decode(
        self,
        prompts: Iterable[Prompt | Request],
        *,
        seed: int | None = None,
        on_error: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        return_joints: bool = False,
        **options: Any,
    ) -> list[Result]:
        """One `Result` per prompt, in order; see the function `decode`.

        Arguments left out are the decoder's.
        """
        told = _Told(False, return_joints)
        return _results(
            _events(self._start(prompts, told, seed, on_error, chat_template_kwargs, options))
        )

    __call__ = decode

    def stream(
        self,
        prompts: Iterable[Prompt | Request],
        *,
        seed: int | None = None,
        on_error: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        return_joints: bool = False,
        **options: Any,
    ) -> Iterator[StepEvent | ResultEvent]:
        """Every decision as it is made; see the function `decode_stream`.

        Arguments left out are the decoder's.
        """
        told = _Told(True, return_joints)
        return _events(self._start(prompts, told, seed, on_error, chat_template_kwargs, options))

    async def adecode(
        self,
        prompts: Iterable[Prompt | Request],
        *,
        seed: int | None = None,
        on_error: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        return_joints: bool = False,
        **options: Any,
    ) -> list[Result]:
        """As `decode`, in a thread of asyncio's, so that the event loop goes on meanwhile.

        Cancelling the task gives its slots back.
        """
        told = _Told(False, return_joints)
        arguments = (prompts, told, seed, on_error, chat_template_kwargs, options)
        async with _AsyncSession(lambda: self._start(*arguments)()) as session:
            return await asyncio.to_thread(lambda: _results(iter(session.next, None)))

    async def astream(
        self,
        prompts: Iterable[Prompt | Request],
        *,
        seed: int | None = None,
        on_error: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        return_joints: bool = False,
        **options: Any,
    ) -> AsyncIterator[StepEvent | ResultEvent]:
        """As `stream`, for `async for`. Close it (`contextlib.aclosing`) to stop early."""
        told = _Told(True, return_joints)
        arguments = (prompts, told, seed, on_error, chat_template_kwargs, options)
        async with _AsyncSession(lambda: self._start(*arguments)()) as session:
            while (event := await asyncio.to_thread(session.next)) is not None:
                yield event

    def _shared(self, config: DecodeConfig) -> SharedEngine:
        """The engine of all calls with these `ENGINE_OPTIONS`. It lives as long as one of them.

        A custom policy gets the whole config and may read any option. So its calls share an engine
        only if all their options are the same.
        """
        key = config
        if POLICIES.is_builtin(config.strategy):
            key = DecodeConfig(**{name: getattr(config, name) for name in ENGINE_OPTIONS})
        with self._lock:
            engine = self._engines.get(key)
            if engine is None:
                engine = self._engines[key] = SharedEngine(Engine(self.lm, key, self._seed))
            return engine

    def _start(
        self,
        prompts: Iterable[Prompt | Request],
        told: _Told,
        seed: int | None,
        on_error: str | None,
        variables: dict[str, Any] | None,
        options: dict[str, Any],
    ) -> Callable[[], Session]:
        """Checks the arguments of a call, and reads its prompts if they are a sequence.

        Returns what begins the call.
        """
        config = resolve(self.config, options, None, self.lm.generation_config)
        shared = self._shared(config)
        seed = self._seed if seed is None else seed
        processor = shared.engine.processor_for(
            config, seed, self._variables if variables is None else variables
        )
        jobs = processor.tokenize(prompts, on_error)
        mine = (told.mark(job) for job in jobs)
        if isinstance(jobs, Sequence):
            listed = list[TokenizedRequest | RejectedRequest](mine)
            return lambda: shared.enter(listed)
        # Reading an iterator may block, so no other call shares its loop.
        return lambda: OwnSession(shared.engine.decode(mine))


def _events(start: Callable[[], Session]) -> Iterator[Event]:
    """The events of a call, which begins with the first of them.

    It ends with the last one, or when the iterator is closed or dropped.
    """
    session = start()
    try:
        while (event := session.next()) is not None:
            yield event
    finally:
        session.close()


def _results(events: Iterable[Event | None]) -> list[Result]:
    """All results, in the order of the prompts."""
    results = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [results[i] for i in range(len(results))]


class _AsyncSession:
    """A session that is begun in a thread, and closed however its task ends."""

    def __init__(self, start: Callable[[], Session]):
        self._start = start
        self._begun: list[Session] = []
        self._left = False

    def _begin(self) -> Session:
        session = self._start()
        self._begun.append(session)
        if self._left:  # the task was cancelled meanwhile
            session.close()
        return session

    async def __aenter__(self) -> Session:
        try:
            return await asyncio.to_thread(self._begin)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: Any) -> None:
        self._left = True
        for session in self._begun:
            session.close()


def decode(
    lm: LanguageModel,
    prompts: Iterable[Prompt | Request],
    config: DecodeConfig | None = None,
    *,
    seed: int = 0,
    on_error: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    return_joints: bool = False,
    **options: Any,
) -> list[Result]:
    """Answers every prompt with the adaptive search (paper, section 4).

    The same seed and prompt give the same tokens whatever else is in the batch (tested on CPU; a
    `time_budget` follows the clock). That holds for a prompt that occurs twice, too. Give two
    `Request`s different seeds to get different samples.

    It prepares the model for this one call, and keeps nothing. A `Decoder` prepares it once for
    many calls.

    Args:
      lm: a model with a ZIP head, from `load`.
      prompts: each one of
        a text that is already templated;
        a chat (`[{"role": "user", "content": ...}]`) for the model's own template;
        token ids, a list of whole numbers or a 1-D integer array, which are read as they are;
        a `Request`, which holds one of these and options of its own.
        A flat list of ids is refused, for it could be one prompt or many: pass `[ids]`.
      config: the search and its limits, all of them. Without it interval, window and max_tokens are
        those that the head was made for (a checkpoint carries them), and all else is
        `DecodeConfig()`.
      on_error: what happens to a prompt that cannot be decoded (empty, too long, reserved ids,
        ...): "raise", before anything is decoded if `prompts` is a sequence; or "result", a
        `Result` with the finish reason "error". Default: raise for a sequence, a result for any
        other iterable. A model that fails on a prompt gives such a result in any case.
      chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": False}`.
      return_joints: every `Decision` carries the joints that it was made on.
      options: fields of `DecodeConfig` to override, e.g. `n=4, beta=0.02, max_new_tokens=512`.

    Returns:
      one `Result` per prompt, in order.

    Raises:
      UsageError: bad prompts (see `on_error`) or options, before any compilation.
    """
    decoder = Decoder(lm, config, seed=seed, chat_template_kwargs=chat_template_kwargs, **options)
    return decoder.decode(prompts, on_error=on_error, return_joints=return_joints)


def decode_stream(
    lm: LanguageModel,
    prompts: Iterable[Prompt | Request],
    config: DecodeConfig | None = None,
    *,
    seed: int = 0,
    on_error: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    return_joints: bool = False,
    **options: Any,
) -> Iterator[StepEvent | ResultEvent]:
    """As `decode`, but yields a `StepEvent` at every decision and a `ResultEvent` at each end.

    Results equal those of `decode`. An iterator of prompts is read only as slots become free, so
    it may be endless. While it has no next prompt ready, nothing is decoded. A consumer that stops
    early (`close`, or leaving the loop) frees everything.
    """
    decoder = Decoder(lm, config, seed=seed, chat_template_kwargs=chat_template_kwargs, **options)
    return decoder.stream(prompts, on_error=on_error, return_joints=return_joints)
