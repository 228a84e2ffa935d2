"""What decoding needs of a device is known before anything is allocated, and what is not needed any
more is given back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import re
import weakref

import jax
import jax.numpy as jnp
import pytest

from harness.engines import CONFIG, MIXED, REAL, REAL_PROMPTS, exact
from harness.processes import rollouts
from harness.scripted import ScriptedNetwork
from zip_rc_jax import Request, decode, decode_stream
from zip_rc_jax.config import DecodeConfig, ModelConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.evaluation.rollout_predictions import predict_rollouts
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead
from zip_rc_jax.inference import memory
from zip_rc_jax.inference import prepared as prepared_module
from zip_rc_jax.inference import state as state_module
from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.inference.network import TransformerNetwork, page_size
from zip_rc_jax.inference.sampler import ALL_FILTERS, Filters
from zip_rc_jax.inference.state import (
    DecodeSpec,
    PoolSizes,
    PrefillInputs,
    abstract_lanes,
    advance,
    empty_pool,
    prefill,
)
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.paged_cache import pages_of
from zip_rc_jax.models.transformer import param_shapes
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, single_device

MODEL = ModelConfig(
    vocab_size=2048,
    d_model=64,
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    head_dim=16,
    d_ff=192,
    tied=True,
    max_positions=1024,
)


def rows_of(rows, slots):
    """A pool in which a page is a whole sequence; one page more is for swaps."""
    return PoolSizes(rows, slots, rows + 1)


def settings_on(layout):
    grid = Grid.authors("value")
    head = ZipHead(grid, "value", MODEL.vocab_size - grid.n_cells, MODEL.vocab_size - grid.n_cells)
    return DecodeSpec(
        TransformerNetwork(MODEL, layout, "float32"), head, MODEL.vocab_size, ALL_FILTERS, 16
    )


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 2)])
def test_the_estimate_of_the_rows_is_what_the_pool_takes(data, tensor):
    settings = settings_on(Layout(make_mesh(data=data, tensor=tensor), DECODE_RULES))
    found = memory.estimate(settings, {}, rows_of(5, 96), 1, 64)
    pool = empty_pool(settings, rows_of(5, 96))
    device = settings.network.layout.mesh.devices.flat[1 % (data * tensor)]
    held = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(pool)
        for shard in x.addressable_shards
        if shard.device == device
    )
    assert found.rows == held


@pytest.mark.parametrize(("name", "chips"), [("qwen3_1.7b", 4), ("lfm2_1.2b", 4), ("lfm2_350m", 4)])
def test_the_rollouts_of_a_shipped_config_fit_a_host_of_v5e(name, chips):
    """A chip has 16 GB, and a program may use 15.75 GiB.

    Every chip has its own rows, and the whole model. Each row finds pages for half a response of
    5,000 tokens, which it has on average.
    """
    config, layout = load_config(f"configs/{name}.yaml"), single_device()
    model, r = config.model, config.rollout
    grid = config.grid.grid("correct")
    used = model.vocab_size - grid.n_cells
    network = TransformerNetwork(model, layout, config.dtype, page=page_size("tpu"), kernel="tpu")
    settings = DecodeSpec(
        network, ZipHead(grid, "correct", used, used), model.vocab_size, Filters.of([r.sampling]), 1
    )
    shapes = {
        "body": param_shapes(model),
        "table": jax.ShapeDtypeStruct((model.vocab_size, model.d_model), jnp.float32),
    }
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype, sharding=layout.sharding(())), shapes
    )
    rows, prompt = r.rows // chips, 256
    decode = DecodeConfig(n=r.samples, max_num_seqs=rows, max_tokens=r.max_tokens)
    pool = memory.PoolMemory(
        settings, params, decode, model.max_positions, limit=int(15.75 * 2**30)
    )
    pool.check(prompt + r.max_tokens, prompt, listed=False)
    sizes, _ = pool.sizes(prompt + r.max_tokens, listed=False)
    assert sizes.pages >= rows * pages_of(prompt + 5000 // 2, network.page)


@pytest.mark.parametrize(
    ("rows", "slots", "prompts", "prompt_slots"), [(8, 512, 1, 256), (32, 256, 8, 192)]
)
def test_the_compiler_needs_no_more_than_the_estimate_and_not_much_less(
    rows, slots, prompts, prompt_slots
):
    settings = settings_on(single_device())
    params = {
        "body": param_shapes(MODEL),
        "table": jax.ShapeDtypeStruct((MODEL.vocab_size, MODEL.d_model), jnp.float32),
    }
    scalar, pool = (
        jax.ShapeDtypeStruct((), jnp.int32),
        memory.abstract_pool(settings, rows_of(rows, slots)),
    )
    step = (
        advance.lower(settings, params, pool, abstract_lanes(1, rows), scalar, slots)
        .compile()
        .memory_analysis()
    )
    shape = (1, prompts)
    number = jax.ShapeDtypeStruct(shape, jnp.int32)
    table, tokens = (jax.ShapeDtypeStruct((*shape, n), jnp.int32) for n in (1, prompt_slots))
    inputs = PrefillInputs(number, table, tokens, number, number)
    first = prefill.lower(settings, params, pool, inputs, prompt_slots).compile().memory_analysis()
    needed = max(
        m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes for m in (step, first)
    )
    assert (
        needed
        <= memory.estimate(settings, {}, rows_of(rows, slots), prompts, prompt_slots).temporaries
        <= 3 * needed
    )


def test_shared_parameters_count_once(lm):
    one = memory.shard_bytes(lm.params)
    assert one == sum(x.nbytes for x in jax.tree.leaves(lm.params))
    table = jnp.zeros((4, 4))
    assert (
        memory.shard_bytes((lm.params, {"body": lm.params["body"], "table": table}))
        == one + table.nbytes
    )


def limited(monkeypatch, limit):
    monkeypatch.setattr(memory, "device_limit", lambda device, count: limit)


@pytest.mark.parametrize("candidates", ["published", "branching"])
def test_what_does_not_fit_is_refused_with_the_largest_n_and_length_that_do(
    monkeypatch, lm, candidates
):
    config = dataclasses.replace(REAL, candidates=candidates, n=8, max_num_seqs=40)
    needed = {}
    monkeypatch.setattr(
        memory, "check_fits", lambda estimate, *rest: needed.update(estimate=estimate)
    )
    Engine(lm, config, 0).processor.tokenize(REAL_PROMPTS[:1])
    estimate = needed["estimate"]
    monkeypatch.undo()

    def never(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(state_module, "empty_pool", never)
    limit = estimate(6, 32).total
    limited(monkeypatch, limit)
    with pytest.raises(
        UsageError, match=r"max_num_seqs=40 of 32 tokens: decoding needs .* MiB per device .* Fix: "
    ) as refusal:
        Engine(lm, config, 0).processor.tokenize(REAL_PROMPTS[:1])
    n, rows = map(
        int, re.search(r"n=(\d+) or less with max_num_seqs=(\d+)", str(refusal.value)).groups()
    )
    assert estimate(rows, 32).total <= limit < estimate(rows + 1, 32).total
    assert (n, rows) == (6, 6)
    Engine(lm, dataclasses.replace(config, n=n, max_num_seqs=rows), 0).processor.tokenize(
        REAL_PROMPTS[:1]
    )
    with pytest.raises(UsageError):
        Engine(
            lm, dataclasses.replace(config, n=n + 1, max_num_seqs=rows + 1), 0
        ).processor.tokenize(REAL_PROMPTS[:1])


def test_where_the_n_asked_for_fits_in_fewer_rows_it_is_not_replaced(monkeypatch, lm):
    config = dataclasses.replace(REAL, n=4, max_num_seqs=40)
    engine = Engine(lm, config, 0)
    limited(
        monkeypatch,
        memory.estimate(engine.settings, (lm.params, engine.params), rows_of(6, 32), 2, 16).total,
    )
    with pytest.raises(
        UsageError,
        match=r"max_num_seqs=40 of 32 tokens: .* Fix: use max_num_seqs=6 or fewer \(n=4 fits\)",
    ) as refusal:
        engine.processor.tokenize(REAL_PROMPTS[:1])
    assert "n=6" not in str(refusal.value)
    Engine(lm, dataclasses.replace(config, max_num_seqs=6), 0).processor.tokenize(REAL_PROMPTS[:1])


def test_where_only_one_short_row_fits_that_is_said(monkeypatch, lm):
    config = dataclasses.replace(REAL, max_tokens=80)
    engine = Engine(lm, config, 0)
    limited(
        monkeypatch,
        memory.estimate(engine.settings, (lm.params, engine.params), rows_of(1, 64), 1, 16).total,
    )
    fix = (
        r"Fix: use n=1 with max_num_seqs=1 and keep prompt and max_tokens within 64 tokens "
        r"\(the longest prompt has 4\)"
    )
    with pytest.raises(UsageError, match=fix):
        engine.processor.tokenize(REAL_PROMPTS[:1])
    Engine(
        lm, dataclasses.replace(config, n=1, max_num_seqs=1, max_tokens=60), 0
    ).processor.tokenize(REAL_PROMPTS[:1])


def test_the_length_that_fits_is_named_too(monkeypatch, lm):
    long = dataclasses.replace(REAL, max_tokens=80)
    engine = Engine(lm, REAL, 0)
    fits = memory.estimate(
        engine.settings, (lm.params, engine.params), rows_of(REAL.max_num_seqs, 64), 4, 16
    ).total
    limited(monkeypatch, fits)
    with pytest.raises(
        UsageError,
        match=r"max_num_seqs=16 of 96 tokens.*keep prompt and max_tokens within 64 tokens \(the "
        r"longest prompt has 4\)",
    ):
        Engine(lm, long, 0).processor.tokenize(REAL_PROMPTS[:1])
    Engine(lm, dataclasses.replace(REAL, max_tokens=60), 0).processor.tokenize(REAL_PROMPTS[:1])
    limited(monkeypatch, memory.shard_bytes((lm.params, engine.params)) + 1000)
    with pytest.raises(UsageError, match="Fix: not even one sample fits: use a smaller model"):
        Engine(lm, REAL, 0).processor.tokenize(REAL_PROMPTS[:1])


def test_a_model_whose_copies_do_not_fit_is_refused_before_they_are_made(monkeypatch, lm):
    lm = dataclasses.replace(lm)  # whose copies no engine that is still there shares
    held = memory.shard_bytes((lm.params, Engine(lm, REAL, 0).params))
    monkeypatch.setattr(
        prepared_module, "unstack", lambda *_: pytest.fail("the copies are made all the same")
    )
    limited(monkeypatch, held - 1)
    with pytest.raises(
        UsageError,
        match=r"a model of .* per device: decoding copies .* Fix: use a smaller model, a lower "
        r"precision",
    ):
        Engine(lm, REAL, 0)
    monkeypatch.undo()
    limited(monkeypatch, held)
    Engine(lm, REAL, 0)


def test_the_longest_rows_and_another_requests_longest_prompt_must_fit_together(monkeypatch, lm):
    engine = Engine(lm, dataclasses.replace(REAL, max_tokens=90), 0)
    long_rows, long_prompt = Request(REAL_PROMPTS[0]), Request(" ".join("3" * 80), max_tokens=1)
    asked = []
    monkeypatch.setattr(
        memory,
        "check_fits",
        lambda needed, limit, n, rows, slots, *rest: asked.append(needed(rows, slots).total),
    )
    for prompts in ([long_rows], [long_prompt], [long_rows, long_prompt]):
        engine._memory.known_to_fit.clear()
        engine.processor.tokenize(prompts)
    monkeypatch.undo()
    first, second, _, together = asked
    assert max(first, second) < together
    limited(monkeypatch, together - 1)
    engine._memory.known_to_fit.clear()
    engine.processor.tokenize([long_rows])
    engine.processor.tokenize([long_prompt])
    for prompts in ([long_rows, long_prompt], [long_prompt, long_rows]):
        with pytest.raises(UsageError, match="max_num_seqs=16 of 96 tokens: decoding needs"):
            engine.processor.tokenize(prompts)
    assert [
        type(job).__name__
        for job in engine.processor.tokenize([long_rows, long_prompt], on_error="result")
    ] == ["TokenizedRequest", "RejectedRequest"]


def test_in_a_stream_only_the_prompt_that_needs_too_much_is_refused(monkeypatch):
    prompts = ["x", " ".join("y" * 60), "z"]
    engine = Engine(MIXED.lm(max_positions=128), CONFIG, 0, ScriptedNetwork())
    limited(
        monkeypatch,
        memory.estimate(
            engine.settings, engine.params, rows_of(CONFIG.max_num_seqs, 64), 4, 25
        ).total,
    )
    found = {
        e.prompt_index: e.result for e in engine.run(iter(prompts)) if isinstance(e, ResultEvent)
    }
    assert [found[i].finish_reason == "error" for i in range(3)] == [False, True, False]
    assert "decoding needs" in found[1].error


def test_the_limit_of_a_device(monkeypatch, tmp_path):
    class Device:
        stats = None

        def memory_stats(self):
            return self.stats

    device = Device()
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    physical = memory.device_limit(device, 1)
    with open("/proc/meminfo") as file:
        assert physical == pytest.approx(
            1024 * int(re.search(r"MemTotal: +(\d+) kB", file.read()).group(1)), rel=1e-3
        )
    assert memory.device_limit(device, 8) == physical // 8, "the devices of a CPU share its memory"
    (tmp_path / "v2").write_text("max\n")
    assert memory.device_limit(device, 1) == physical
    (tmp_path / "v1").write_text("1000000\n")
    assert memory.device_limit(device, 2) == 500000
    device.stats = {"bytes_limit": 123, "bytes_in_use": 7}
    assert memory.device_limit(device, 8) == 123


# ---- what is given back


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize("how", ["close", "leave the loop", "to the end"])
def test_a_consumer_that_stops_early_frees_everything(lm, how):
    list(decode_stream(lm, REAL_PROMPTS, REAL))  # what compilation keeps is there from now on
    before = live_bytes()
    events = decode_stream(lm, REAL_PROMPTS, REAL)
    next(events)
    held = live_bytes() - before
    sizes = rows_of(REAL.max_num_seqs, 32)
    pool = memory.estimate(Engine(lm, REAL, 0).settings, {}, sizes, 1, 32).rows
    assert held >= pool, "the pool is there meanwhile"
    if how == "close":
        events.close()
        assert list(events) == []
    elif how == "leave the loop":
        for _ in events:
            break
        del events
    else:
        assert list(events)
    assert live_bytes() == before


def test_after_an_early_stop_a_new_decode_works(lm):
    expected = decode(lm, REAL_PROMPTS, REAL)
    engine = Engine(lm, REAL, 0)
    for count in (1, 7):
        events = engine.run(REAL_PROMPTS)
        for _ in range(count):
            next(events)
        events.close()
    found = {
        e.prompt_index: e.result for e in engine.run(REAL_PROMPTS) if isinstance(e, ResultEvent)
    }
    assert [exact(found[i]) for i in range(len(expected))] == [exact(r) for r in expected]


# ---- what is given back at once, without Python's collector of cycles


@contextlib.contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def held():
    return sum(x.nbytes for x in jax.live_arrays())


def decode_all(lm):
    decode(lm, REAL_PROMPTS, REAL)


def close_early(lm):
    events = decode_stream(lm, REAL_PROMPTS, REAL)
    next(events)
    events.close()


def abandon(lm):
    next(decode_stream(lm, REAL_PROMPTS, REAL))


def never_start(lm):
    decode_stream(lm, iter(REAL_PROMPTS), REAL)


def bad_prompt_in_a_list(lm):
    with pytest.raises(UsageError):
        decode(lm, [*REAL_PROMPTS, "unheard"], REAL)


def bad_prompt_in_a_stream(lm):
    decode(lm, iter([*REAL_PROMPTS, "unheard", None, [{}]]), REAL)


def bad_prompt_that_a_stream_raises_for(lm):
    with pytest.raises(UsageError):
        decode(lm, iter([*REAL_PROMPTS, "unheard"]), REAL, on_error="raise")


def failing(kind):
    yield from REAL_PROMPTS
    raise kind("the source fails")


def source_that_raises(lm):
    with pytest.raises(OSError, match="the source fails"):
        decode(lm, failing(OSError), REAL)


def source_that_is_interrupted(lm):
    with pytest.raises(KeyboardInterrupt):
        decode(lm, failing(KeyboardInterrupt), REAL)


def source_that_raised_before_an_early_close(lm):
    events = decode_stream(
        lm,
        itertools.chain(["1 + 2 ="], failing(OSError)),
        dataclasses.replace(REAL, max_num_seqs=64),
    )
    next(events)
    next(events)
    events.close()


class Interrupting(dict):
    def items(self):
        raise KeyboardInterrupt


def chat_that_is_interrupted(lm):
    chatty = dataclasses.replace(
        lm, tokenizer=Tokenizer(lm.tokenizer.backend, ("<eos>",), "{{ messages[0].content }}")
    )
    with pytest.raises(KeyboardInterrupt):
        decode(chatty, ["1 + 2 =", [Interrupting(role="user", content="1")]], REAL)


def device_that_fails(lm):
    def failing(*_):
        raise RuntimeError("device")

    events = Engine(lm, REAL, 0).run(REAL_PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "advance", failing)
        with pytest.raises(RuntimeError, match="device"):
            list(events)


def what_does_not_fit(lm):
    limit = memory.shard_bytes((lm.params, Engine(lm, REAL, 0).params)) + 1000
    with pytest.MonkeyPatch.context() as patch:
        limited(patch, limit)
        with pytest.raises(UsageError):
            decode(lm, REAL_PROMPTS, REAL)


def impossible_options(lm):
    with pytest.raises(UsageError):
        decode(lm, REAL_PROMPTS, REAL, stop_token_ids=(10_000,))
    with pytest.raises(UsageError):
        decode(lm, REAL_PROMPTS, REAL, seed=-1)


def label(lm):
    list(predict_rollouts(lm, rollouts(8), ScoringConfig(256)))


ENDS = [
    decode_all, close_early, abandon, never_start, bad_prompt_in_a_list, bad_prompt_in_a_stream,
    bad_prompt_that_a_stream_raises_for,
    source_that_raises, source_that_is_interrupted, source_that_raised_before_an_early_close,
    chat_that_is_interrupted, device_that_fails,
    what_does_not_fit, impossible_options, label,
]  # fmt: skip


@pytest.mark.parametrize("end", ENDS, ids=lambda f: f.__name__)
def test_nothing_that_lies_on_a_device_waits_for_the_collector(lm, end):
    """However a decode ends, what it copied of the model and its rows are freed when the last name
    for them goes, and not in a while."""
    for _ in range(2):  # what compilation keeps is there from now on
        end(lm)
    with no_collector():
        before = held()
        for _ in range(3):
            end(lm)
        assert held() == before


def test_an_engine_is_freed_when_its_last_name_goes(lm):
    with no_collector():
        engine = Engine(lm, REAL, 0)
        gone = weakref.ref(engine)
        list(engine.run(REAL_PROMPTS[:2]))
        del engine
        assert gone() is None


# ---- which setting is to blame


def test_a_window_that_is_to_blame_is_named_with_the_largest_that_fits(lm, monkeypatch):
    with pytest.raises(
        UsageError,
        match=r"window=2147483647 with max_num_seqs=16 of 32 tokens: .* its last 2147483647 "
        r"tokens, .*Fix: use window=(\d+) or less",
    ):
        decode(lm, REAL_PROMPTS, dataclasses.replace(REAL, window=2**31 - 1))
    engine = Engine(lm, REAL, 0)
    wider = dataclasses.replace(engine.settings, window=300)
    limited(
        monkeypatch,
        memory.estimate(
            wider, (lm.params, engine.params), rows_of(REAL.max_num_seqs, 32), 4, 16
        ).total,
    )
    with pytest.raises(UsageError) as refusal:
        Engine(lm, dataclasses.replace(REAL, window=5000), 0).processor.tokenize(REAL_PROMPTS[:1])
    most = int(re.search(r"use window=(\d+) or less", str(refusal.value)).group(1))
    Engine(lm, dataclasses.replace(REAL, window=most), 0).processor.tokenize(REAL_PROMPTS[:1])
    with pytest.raises(UsageError):
        Engine(lm, dataclasses.replace(REAL, window=most + 1), 0).processor.tokenize(
            REAL_PROMPTS[:1]
        )


def test_settings_of_any_size_are_refused_with_a_name(lm):
    """The product of two of them is past 64 bits."""
    for options in (
        {"max_num_seqs": 2**31 - 1},
        {"max_num_seqs": 2**31 - 1, "window": 2**31 - 1},
        {"max_num_seqs": 2**31 - 1, "n": 2**31 - 1},
    ):
        with pytest.raises(UsageError, match="max_num_seqs=2147483647"):
            decode(lm, REAL_PROMPTS, dataclasses.replace(REAL, **options))
