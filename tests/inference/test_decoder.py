"""A decoder is prepared once and called many times, by several threads and tasks at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from harness.company import same
from harness.engines import MIXED, PRICED, REAL, REAL_PROMPTS, exact
from harness.scripted import ScriptedNetwork
from harness.tiny import tiny_lm
from zip_rc_jax import (
    DecodeConfig,
    Decoder,
    Request,
    ResultEvent,
    StepEvent,
    UsageError,
    decode,
    decode_stream,
)
from zip_rc_jax.inference import state
from zip_rc_jax.inference.engine import ENGINE_OPTIONS, Engine
from zip_rc_jax.inference.memory import shard_bytes
from zip_rc_jax.inference.running_batch import RunningBatch
from zip_rc_jax.inference.sharing import OwnSession, SharedEngine
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh
from zip_rc_jax.search.policies import fixed

PROMPTS = ["x", "y y", "z", "x y z", "y", "z z"]


# ---- calls that share an engine, one step at a time (a scripted model)


def shared(config=PRICED):
    return SharedEngine(Engine(MIXED.lm(), config, 0, ScriptedNetwork()))


def enter(engine, prompts):
    return engine.enter(engine.engine.processor.tokenize(prompts))


def drained(session):
    return list(iter(session.next, None))


def alone(prompts):
    return drained(enter(shared(), prompts))


def results(events):
    found = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [found[i] for i in range(len(found))]


def same_events(events, others):
    """The same decisions in the same order, with the same tokens and text."""
    for a, b in zip(results(events), results(others), strict=True):
        same(a, b)
    for p in {e.prompt_index for e in others}:
        told, wanted = (
            [e for e in x if isinstance(e, StepEvent) and e.prompt_index == p]
            for x in (events, others)
        )
        assert [(e.new_tokens, e.new_text, e.decision.multiplicity) for e in told] == [
            (e.new_tokens, e.new_text, e.decision.multiplicity) for e in wanted
        ]


def test_calls_that_take_turns_get_the_events_that_they_get_alone():
    engine = shared()
    first, second = enter(engine, PROMPTS[:3]), enter(engine, PROMPTS[2:])
    found = [], []
    for turn in range(1000):
        session, events = (first, found[0]) if turn % 2 else (second, found[1])
        if (event := session.next()) is not None:
            events.append(event)
    same_events(found[0], alone(PROMPTS[:3]))
    same_events(found[1], alone(PROMPTS[2:]))


def test_their_prompts_run_in_one_batch(monkeypatch):
    steps, advance = [], state.advance
    monkeypatch.setattr(state, "advance", lambda *a: (steps.append(1), advance(*a))[1])
    for prompt in PROMPTS[:2]:
        alone([prompt])
    apart = len(steps)
    steps.clear()
    engine = shared()
    sessions = [enter(engine, [prompt]) for prompt in PROMPTS[:2]]
    assert [len(results(drained(session))) for session in sessions] == [1, 1]
    assert len(steps) < apart


def test_a_call_that_nobody_reads_from_keeps_its_events_and_holds_up_no_other():
    engine = shared()
    idle, busy = enter(engine, PROMPTS[:2]), enter(engine, PROMPTS[2:4])
    same_events(drained(busy), alone(PROMPTS[2:4]))
    same_events(drained(idle), alone(PROMPTS[:2]))


def test_an_abandoned_call_gives_its_slots_to_the_next():
    """There are slots for one prompt; the second call waits for them."""
    engine = shared(dataclasses.replace(PRICED, max_num_seqs=PRICED.n))
    first, second = enter(engine, [PROMPTS[3]]), enter(engine, [PROMPTS[0]])
    assert isinstance(first.next(), StepEvent)
    first.close()
    assert first.next() is None
    same_events(drained(second), alone([PROMPTS[0]]))


def test_what_waits_for_an_abandoned_call_is_never_decoded(monkeypatch):
    admitted, prefill = [], RunningBatch.prefill
    monkeypatch.setattr(
        RunningBatch, "prefill", lambda self, *a: (admitted.extend(a[-1]), prefill(self, *a))[1]
    )
    engine = shared(dataclasses.replace(PRICED, max_num_seqs=PRICED.n))
    first, second = enter(engine, [PROMPTS[3]]), enter(engine, PROMPTS[:3])
    first.next()
    second.close()
    drained(first)
    assert len(admitted) == 1


def test_a_failure_of_the_device_is_told_to_one_call_and_the_other_begins_anew(monkeypatch):
    engine = shared()
    first, second = enter(engine, PROMPTS[:2]), enter(engine, PROMPTS[2:4])
    second_events = [second.next() for _ in range(3)]
    monkeypatch.setattr(state, "advance", lambda *_: (_ for _ in ()).throw(RuntimeError("device")))
    while first.inbox:
        first.next()
    with pytest.raises(RuntimeError, match="device"):
        drained(first)
    first.close()
    monkeypatch.undo()
    same_events(second_events + drained(second), alone(PROMPTS[2:4]))


def test_the_loop_ends_with_the_last_call():
    engine = shared()
    sessions = [enter(engine, PROMPTS[:2]) for _ in range(2)]
    sessions[0].next()
    assert engine._loop is not None
    sessions[0].close()
    assert engine._loop is not None
    sessions[1].close()
    assert engine._loop is None
    assert not engine._tickets


def test_threads_get_what_they_get_alone():
    engine = shared()
    expected = [alone(PROMPTS[i : i + 2]) for i in range(4)]

    def call(i):
        session = enter(engine, PROMPTS[i % 4 : i % 4 + 2])
        try:
            return drained(session)
        finally:
            session.close()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(16)))
    for i, events in enumerate(found):
        same_events(events, expected[i % 4])
    assert engine._loop is None


# ---- requests with strategies of their own


def test_requests_of_several_strategies_share_a_batch_and_decode_as_if_they_were_alone():
    names = ["zip_rc", "fixed"]
    requests = [Request(p, strategy=name) for p in PROMPTS[:2] for name in names]
    found = results(list(Engine(MIXED.lm(), PRICED, 0, ScriptedNetwork()).run(requests)))
    for i, name in enumerate(names):
        config = dataclasses.replace(PRICED, strategy=name)
        expected = results(list(Engine(MIXED.lm(), config, 0, ScriptedNetwork()).run(PROMPTS[:2])))
        for a, b in zip(found[i::2], expected, strict=True):
            same(a, b)


@pytest.mark.parametrize(
    ("config", "strategy", "reason"),
    [
        (dataclasses.replace(PRICED, candidates="branching"), "fixed", "begins otherwise"),
        (PRICED, fixed, "a policy of your own"),
        (dataclasses.replace(PRICED, strategy=fixed), "zip_rc_", "it must be one of"),
        (PRICED, "length_budget", "needs a budget"),
    ],
)
def test_a_strategy_that_the_engine_cannot_mix_is_refused(config, strategy, reason):
    with pytest.raises(UsageError, match=reason):
        Request("x", strategy=strategy).over(config)


# ---- the decoder (a tiny transformer)

SMALL = dataclasses.replace(REAL, n=2, max_num_seqs=8, max_tokens=9)


@pytest.fixture(scope="module")
def decoder(lm):
    return Decoder(lm, SMALL)


@pytest.fixture(scope="module")
def expected(lm):
    return decode(lm, REAL_PROMPTS, SMALL)


def test_every_way_to_call_it_gives_the_same_results(decoder, expected):
    ways = [
        decoder(REAL_PROMPTS),
        decoder.decode(REAL_PROMPTS),
        decoder.decode(iter(REAL_PROMPTS)),
        results(decoder.stream(REAL_PROMPTS)),
        asyncio.run(decoder.adecode(REAL_PROMPTS)),
        asyncio.run(decoder.adecode(iter(REAL_PROMPTS))),
        asyncio.run(collected(decoder.astream(REAL_PROMPTS))),
    ]
    for found in ways:
        for a, b in zip(found, expected, strict=True):
            same(a, b)


async def collected(events):
    return results([event async for event in events])


def test_every_option_may_differ_from_call_to_call(lm, decoder, expected):
    options = {"seed": 3, "beta": 0.3, "temperature": 0.7, "max_tokens": 5, "n": 3}
    for a, b in zip(
        decoder(REAL_PROMPTS[:2], **options),
        decode(lm, REAL_PROMPTS[:2], SMALL, **options),
        strict=True,
    ):
        same(a, b)
    for a, b in zip(decoder(REAL_PROMPTS[:2]), expected, strict=False):
        same(a, b)
    assert (decoder.config, decoder.lm) == (SMALL, lm), "a call changes nothing of the decoder"
    with pytest.raises(UsageError, match="did you mean 'beta'"):
        decoder(["3"], betta=1)


def test_options_of_a_request_compile_nothing(decoder):
    decoder(REAL_PROMPTS[:2], min_p=0.1)
    programs = [f._cache_size() for f in (state.advance, state.prefill, state.edit)]
    decoder(
        REAL_PROMPTS[:2],
        beta=0.5,
        alpha=0.9,
        temperature=0.6,
        min_p=0.2,
        seed=4,
        answer="vote",
        token_budget=30,
    )
    assert [f._cache_size() for f in (state.advance, state.prefill, state.edit)] == programs


def test_a_call_inside_a_stream_of_the_same_thread_is_answered(decoder, expected):
    inner = None
    outer = []
    for event in decoder.stream(REAL_PROMPTS[:2]):
        outer.append(event)
        inner = inner or decoder(REAL_PROMPTS[2:4])
    for a, b in zip(results(outer) + inner, expected[:4], strict=True):
        same(a, b)


def test_real_threads_and_tasks_get_what_a_call_alone_gets(lm, decoder):
    """Lists, iterators, streams and other seeds, at the same time; one of them is wrong, and one is
    abandoned.
    """
    plans = [(REAL_PROMPTS[i : i + 2], i % 3) for i in range(4)]
    expected = [decode(lm, prompts, SMALL, seed=seed) for prompts, seed in plans]
    start = threading.Barrier(6)

    def by(way):
        def call(i):
            start.wait(60)
            prompts, seed = plans[i]
            if way == "stream":
                return results(decoder.stream(prompts, seed=seed))
            return decoder.decode(iter(prompts) if way == "iterator" else prompts, seed=seed)

        return call

    def wrong():
        start.wait(60)
        with pytest.raises(UsageError, match="prompt 1: it is empty"):
            decoder(["3", ""])

    def abandoned():
        start.wait(60)
        events = decoder.stream(REAL_PROMPTS)
        next(events)
        events.close()

    with ThreadPoolExecutor(6) as pool:
        ways = ("list", "stream", "iterator", "list")
        calls = [pool.submit(by(way), i) for i, way in enumerate(ways)]
        others = [pool.submit(wrong), pool.submit(abandoned)]
        found = [call.result(300) for call in calls]
        for other in others:
            other.result(300)

    async def together():
        tasks = [decoder.adecode(prompts, seed=seed) for prompts, seed in plans]
        return await asyncio.gather(*tasks, decoder.adecode([""]), return_exceptions=True)

    *gathered, refused = asyncio.run(together())
    assert isinstance(refused, UsageError)
    for wanted, a, b in zip(expected, found, gathered, strict=True):
        for x, y, z in zip(wanted, a, b, strict=True):
            same(x, y)
            same(x, z)


def test_a_cancelled_task_gives_everything_back(decoder):
    before = live_bytes()

    async def cancelled():
        task = asyncio.create_task(decoder.adecode(REAL_PROMPTS * 4))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with contextlib.aclosing(decoder.astream(REAL_PROMPTS)) as events:
            async for _ in events:
                break

    asyncio.run(cancelled())  # waits for the threads, too
    assert live_bytes() == before


# ---- memory, counted and not timed


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@contextlib.contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def own_lm(lm):
    """The same parameters in a model that no other decoder is of."""
    return dataclasses.replace(lm)


def test_calls_of_a_decoder_copy_no_parameters(own_lm):
    lm = own_lm
    decode(lm, ["3"], SMALL)  # what compilation keeps is there from now on
    before = live_bytes()
    events = decode_stream(lm, ["3"], SMALL)
    next(events)
    with_copies = live_bytes() - before
    events.close()
    decoder = Decoder(lm, SMALL)
    held = live_bytes()
    ours = {id(x) for x in jax.tree.leaves(lm.params)}
    copies = shard_bytes(
        [x for x in jax.tree.leaves(decoder._prepared.params) if id(x) not in ours]
    )
    assert held - before == copies > 0
    for _ in range(2):
        events = decoder.stream(["3"])
        next(events)
        assert live_bytes() - held == with_copies - copies, "the slots alone"
        events.close()
        assert live_bytes() == held


def test_decoders_of_one_model_share_the_copies_and_the_last_one_frees_them(own_lm):
    lm = own_lm
    with no_collector():
        before = sum(x.nbytes for x in jax.live_arrays())
        first = Decoder(lm, SMALL)
        held = sum(x.nbytes for x in jax.live_arrays())
        second = Decoder(lm, SMALL, beta=0.5)
        decode(lm, ["3"], SMALL)
        assert sum(x.nbytes for x in jax.live_arrays()) == held
        del first
        assert sum(x.nbytes for x in jax.live_arrays()) == held
        gone = weakref.ref(second)
        list(second.stream(["3"]))
        next(second.stream(["3"]))
        del second
        assert gone() is None
        assert sum(x.nbytes for x in jax.live_arrays()) == before


def test_a_model_is_freed_though_it_was_decoded_with():

    lm = tiny_lm()
    gone = weakref.ref(lm)
    with no_collector():
        Decoder(lm, SMALL)
        del lm
        assert gone() is None


# ---- what is wrong shows when it is made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "beta=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"stop_token_ids": (10_000,)}, r"stop_token_ids \[10000\]"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs=5"),
        ({"betta": 1}, "did you mean 'beta'"),
    ],
)
def test_bad_settings_are_refused_when_the_decoder_is_made(lm, options, message):
    with pytest.raises(UsageError, match=message):
        Decoder(lm, SMALL, **options)


def test_a_model_without_a_head_is_refused(lm):
    with pytest.raises(UsageError, match="without a ZIP head"):
        Decoder(lm.without_head())


def test_requests_of_one_call_keep_their_own_options(lm, decoder):
    found = decoder([Request("3", seed=1), Request("3", seed=2, max_tokens=4)])
    (one,), (two,) = (
        decode(lm, ["3"], SMALL, seed=1),
        decode(lm, ["3"], SMALL, seed=2, max_tokens=4),
    )
    assert [exact(r) for r in found] == [exact(one), exact(two)]


def test_two_threads_may_launch_programs_of_the_same_devices():
    """Two loops on a mesh of two devices: each program must reach both devices in one order."""
    layout = Layout(make_mesh(data=2), DECODE_RULES)
    lm = dataclasses.replace(MIXED.lm(), layout=layout)
    network = ScriptedNetwork(layout=layout)
    config = dataclasses.replace(PRICED, max_num_seqs=8)
    engines = [Engine(lm, config, 0, network) for _ in range(4)]

    def call(engine):
        session = OwnSession(engine.run(iter(PROMPTS)))
        return results(drained(session))

    expected = results(alone(PROMPTS))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, engines):
            for a, b in zip(found, expected, strict=True):
                same(a, b)


# Options that are read for each call or request, and not by the engine that calls share.
OF_A_CALL = {
    *("alpha", "beta", "answer", "answer_extractor", "answer_equivalence"),
    *("allow_no_answer", "abstain_below", "max_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "stop_token_ids", "stop", "system", "continue_final_message"),
    *("generation_config", "token_budget", "time_budget", "add_special_tokens"),
}


def test_every_option_is_of_the_shared_engine_or_of_a_call():
    """An option that is neither would be lost on its way to the search."""
    assert {field.name for field in dataclasses.fields(DecodeConfig)} == {
        *ENGINE_OPTIONS,
        *OF_A_CALL,
    }
    assert not OF_A_CALL & set(ENGINE_OPTIONS)


def test_an_own_policy_sees_the_options_of_its_call(lm):
    seen = []

    def recording(inputs, *, grid, config):
        seen.append((config.alpha, config.max_tokens, config.temperature))
        return fixed(inputs, grid=grid, config=config)

    decoder = Decoder(lm, dataclasses.replace(REAL, strategy=recording))
    for options in ({"alpha": 0.25, "max_tokens": 7}, {"alpha": 0.75, "temperature": 0.5}):
        seen.clear()
        decoder(REAL_PROMPTS[:1], **options)
        expected = dataclasses.replace(REAL, **options)
        assert set(seen) == {(expected.alpha, expected.max_tokens, expected.temperature)}
