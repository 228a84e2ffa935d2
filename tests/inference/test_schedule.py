"""Room is lent as prefixes begin: more prompts are in flight than could all have all their prefixes
on the device, none waits for ever, and none decodes otherwise for it. Prompts that begin alike are
prefilled once.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.company import CONFIGS, PROMPTS, alone, on_mesh, same
from harness.engines import CONFIG, FORKING, FORKS, MIXED, PRICED, REAL, REAL_PROMPTS
from harness.scripted import Plan, Script, ScriptedNetwork
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax.inference import prefill as prefill_module
from zip_rc_jax.inference import state
from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.page_table import PageTable
from zip_rc_jax.inference.prefill import PAIRS, chunk_tokens, largest_prefills, together
from zip_rc_jax.inference.requests import WORTH_SHARING, Request, shared_prefix
from zip_rc_jax.inference.scheduler import WIDE, Queue, next_to_step
from zip_rc_jax.inference.state import bucket
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh

pytestmark = pytest.mark.optimized  # bits are compared between programs of several shapes


def decoded(script, config, prompts, seed=7):
    """Results in order, and the most prompts that were in flight at once."""
    engine = Engine(script.lm(), config, seed, ScriptedNetwork())
    running, most, found = set(), 0, {}
    for event in engine.run(prompts):
        if isinstance(event, StepEvent):
            running.add(event.prompt_index)
            most = max(most, len(running))
        elif isinstance(event, ResultEvent):
            found[event.prompt_index] = event.result
            running.discard(event.prompt_index)
    return [found[i] for i in range(len(prompts))], most


# ---- lending room


@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=4, max_size=12),
    rows=st.integers(3, 7),
)
@example(name="branching", prompts=[*PROMPTS, *PROMPTS], rows=3)
@example(name="published", prompts=[*PROMPTS, *PROMPTS], rows=5)
@example(name="fixed", prompts=[*PROMPTS, *PROMPTS], rows=7)
def test_prompts_that_wait_for_rows_all_end_and_decode_as_if_they_were_alone(name, prompts, rows):
    config, script = CONFIGS[name]
    results, most = decoded(script, dataclasses.replace(config, max_num_seqs=rows), prompts)
    assert most <= rows, "every prompt in flight holds a row"
    for prompt, result in zip(prompts, results, strict=True):
        same(result, alone(name, prompt))


def test_more_prompts_are_in_flight_than_could_all_start_all_their_samples():
    """One sample is all that a prompt is worth here, so with its root it holds two rows where it
    may hold four."""
    script = Script([Plan(12, 0.5)], root=(0.5, 12))
    config = dataclasses.replace(PRICED, alpha=1.0, beta=0.5)
    results, most = decoded(script, config, ["x", "y", "z"] * 8)
    assert {sum(len(p.token_ids) > 0 for p in r.prefixes) for r in results} == {1}
    assert config.n == 4
    assert 4 < most <= config.max_num_seqs == 16


def test_where_every_sample_runs_no_more_prompts_are_in_flight_than_fit():
    config = dataclasses.replace(PRICED, strategy="fixed")
    assert decoded(MIXED, config, ["x", "y", "z"] * 8)[1] <= config.max_num_seqs // 2


def test_all_rows_are_taken_before_the_first_step(monkeypatch):
    """Also where each prompt wants fewer of them than the engine lets one have."""
    active, advance = [], state.advance

    def counted(settings, params, pool, lanes, *rest):
        active.append(int(lanes.active.sum()))
        return advance(settings, params, pool, lanes, *rest)

    monkeypatch.setattr(state, "advance", counted)
    config = dataclasses.replace(CONFIG, strategy="fixed")
    assert (config.n, config.max_num_seqs) == (4, 16)
    decoded(MIXED, config, [Request("x", n=1, seed=s) for s in range(20)])
    assert active[0] == config.max_num_seqs


def test_long_prompts_are_prefilled_in_parts_and_decoded_alike(monkeypatch):
    shapes, compute = [], state.prefill

    def counted(settings, params, pool, prompts, steps):
        shapes.append(prompts.tokens.shape[1:])
        return compute(settings, params, pool, prompts, steps)

    monkeypatch.setattr(state, "prefill", counted)
    # short ones first: the long one must not join them
    prompts = ["x", "x y z", "z", " ".join("y" * 30), " ".join("z" * 20)]
    config = dataclasses.replace(PRICED, max_num_seqs=16)
    whole, _ = decoded(MIXED, config, prompts)
    assert shapes[0] == (4, 32)
    shapes.clear()
    monkeypatch.setattr(prefill_module, "TOKENS", 64)
    parts, _ = decoded(MIXED, config, prompts)
    assert shapes
    assert all(count * tokens <= 64 for count, tokens in shapes)
    for a, b in zip(whole, parts, strict=True):
        same(a, b)
    assert [together(64, 64 // n) for n in (64, 7, 2, 1)] == [64, 4, 2, 1]
    assert [together(8, 1000), together(5, 8)] == [1, 5], (
        "one at a time at least, and all that there is room for"
    )


@given(most=st.integers(1, 64), longest=st.integers(1, 40_000), tokens=st.integers(1, 40_000))
def test_no_prefill_is_larger_than_those_that_the_memory_is_checked_for(most, longest, tokens):
    tokens = min(tokens, longest)
    lanes = bucket(together(most, tokens), least=1)
    assert lanes * chunk_tokens(tokens) * tokens <= 2 * PAIRS
    assert any(
        lanes <= count and tokens <= padded and chunk_tokens(tokens) <= chunk_tokens(padded)
        for count, padded in largest_prefills(most, longest)
    )


def calls_of(monkeypatch):
    """Names of the programs that run from now on, with the tokens that a prefill computes."""
    calls, prefill, advance = [], state.prefill, state.advance

    def prefilled(settings, params, pool, prompts, steps):
        calls.append(("prefill", steps))
        return prefill(settings, params, pool, prompts, steps)

    def advanced(*arguments):
        calls.append(("advance", 0))
        return advance(*arguments)

    monkeypatch.setattr(state, "prefill", prefilled)
    monkeypatch.setattr(state, "advance", advanced)
    return calls


def test_a_long_prompt_is_computed_in_chunks_between_the_intervals_of_the_others(monkeypatch):
    prompts = ["x", " ".join("y" * 30), "x y z", " ".join("z" * 29)]
    whole, _ = decoded(MIXED, CONFIG, prompts)
    monkeypatch.setattr(prefill_module, "PAIRS", 256)
    assert [chunk_tokens(padded) for padded in (16, 24, 32, 300)] == [16, 8, 8, 1]
    calls = calls_of(monkeypatch)
    parts, _ = decoded(MIXED, CONFIG, prompts)
    for a, b in zip(whole, parts, strict=True):
        same(a, b)
    chunks = [steps for name, steps in calls if name == "prefill"]
    assert chunks.count(8) == 8, "two prompts of four chunks each"
    first = calls.index(("advance", 0))
    after = [name for name, _ in calls[first:]]
    assert ("prefill", "prefill") not in itertools.pairwise(after), "an interval between any two"


@pytest.mark.parametrize("layers", [("attention",) * 2, ("conv", "attention")])
def test_chunks_of_a_transformer_give_the_tokens_of_the_whole_prompt(monkeypatch, layers):
    kernel = 3 if "conv" in layers else 0
    model = dataclasses.replace(TINY_MODEL, n_layers=2, layer_types=layers, conv_kernel=kernel)
    lm = tiny_lm(dataclasses.replace(model, max_positions=128))

    prompts, config = ALIKE[-3:], dataclasses.replace(REAL, n=2, max_tokens=8)

    def results():
        events = Engine(lm, config, 0).run(prompts)
        found = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
        return [found[i] for i in range(len(prompts))]

    whole = results()
    monkeypatch.setattr(prefill_module, "PAIRS", 256)
    for a, b in zip(whole, results(), strict=True):
        same(a, b)


def test_who_goes_away_while_the_prompt_is_computed_gives_everything_back(monkeypatch):
    monkeypatch.setattr(prefill_module, "PAIRS", 32)
    engine = Engine(MIXED.lm(), CONFIG, 0, ScriptedNetwork())
    queue = Queue(engine.processor.tokenize([" ".join("y" * 30), "x"]))
    abandoned, batches, new_batch = [set(), set(), {0}], [], engine._new_batch
    queue.abandoned = lambda: abandoned.pop(0) if abandoned else set()
    monkeypatch.setattr(engine, "_new_batch", lambda q: batches.append(new_batch(q)) or batches[-1])
    events = list(engine.decode(queue, stream=False))
    assert [e.prompt_index for e in events] == [1]
    (batch,) = batches
    assert not batch.slots_in_use
    assert not batch.incomplete


def test_a_copy_is_as_long_as_what_moves_and_not_as_the_longest_prompt(monkeypatch):
    slots, edit = [], state.edit
    monkeypatch.setattr(state, "edit", lambda *a: (slots.append(a[-1]), edit(*a))[1])
    engine = Engine(FORKING.lm(max_positions=128), FORKS, 7, ScriptedNetwork())
    long = " ".join("y" * 100)
    list(engine.run([long, "x", "z x", "y y"]))
    assert set(slots) == {128}
    slots.clear()
    list(engine.run([Request(long, n=1), "x", "z x", "y y"]))
    assert 64 in slots, "while the long prompt is in flight, copies of short ones are short"


def test_the_last_sample_takes_over_what_the_root_has(monkeypatch):
    """So a prompt of `n` samples copies its small state `n - 1` times."""
    copied, edit = [], state.edit

    def counted(settings, pool, edits, tokens):
        copied.append((int(edits.slot_count.sum()), int(edits.page_count.sum())))
        return edit(settings, pool, edits, tokens)

    monkeypatch.setattr(state, "edit", counted)
    config = dataclasses.replace(CONFIG, strategy="fixed")
    decoded(MIXED, config, ["x", "y y"])
    slots, pages = map(sum, zip(*copied, strict=True))
    assert slots == 2 * (config.n - 1)
    assert pages == 2 * (config.n - 1), "and its page, when the others first write"


# ---- which sequences are stepped together


def planned(sizes, first=0):
    """Sequences of prompts that have so many each, of one shard."""
    return [
        PagedSequence(first + prompt, branch, PageTable(), 0, live=True, due=1)
        for prompt, size in enumerate(sizes)
        for branch in range(size)
    ]


def prompts_of(sequences):
    return sorted({s.prompt for s in sequences})


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=60), rows=st.sampled_from([64, 100, 480])
)
def test_prompts_wait_only_where_most_others_fill_a_narrower_program(sizes, rows):
    sizes = [
        size
        for size, total in zip(sizes, itertools.accumulate(sizes), strict=True)
        if total <= rows
    ]
    (stepped,), width = next_to_step([planned(sizes)], set(), rows)
    assert len(stepped) <= width <= rows
    assert len(stepped) >= 7 / 8 * sum(sizes)
    assert stepped[0].prompt == 0, "the oldest never waits"
    assert len(stepped) == sum(sizes[prompt] for prompt in prompts_of(stepped)), "as a whole"
    if len(stepped) < sum(sizes):
        assert WIDE <= width < sum(sizes)


def test_a_prompt_whose_time_is_limited_does_not_wait():
    def stepped(sizes, hurried=()):
        (chosen,), _ = next_to_step([planned(sizes)], set(hurried), 64)
        return prompts_of(chosen)

    assert stepped([8] * 5 + [1]) == [0, 1, 2, 3, 4, 5]
    assert stepped([8] * 4 + [1]) == [0, 1, 2, 3]
    assert 4 in stepped([8] * 4 + [1], hurried=[4])


def test_all_shards_are_stepped_to_the_same_width():
    both = [planned([8] * 4), planned([8], first=4)]
    assert next_to_step(both, set(), 64) == (both, 32)


# ---- prompts that begin alike

STEM = " ".join(["1 + 2 = 3 so wait a b c 9"] * 4)
ALIKE = [*(f"{STEM} {p}" for p in REAL_PROMPTS), *REAL_PROMPTS[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_what_prompts_share_is_prefilled_once_and_changes_no_token(monkeypatch, devices):
    computed, compute = [], state.prefill

    def counted(settings, params, pool, prompts, steps):
        computed.append((prompts.length - prompts.start, steps))
        return compute(settings, params, pool, prompts, steps)

    monkeypatch.setattr(state, "prefill", counted)
    config = dataclasses.replace(REAL, n=3, max_num_seqs=6 * devices, max_tokens=12)
    model = tiny_lm(dataclasses.replace(TINY_MODEL, max_positions=128))
    spread = on_mesh(model, devices, 1) if devices > 1 else model

    def results(lm, prompts):
        found = {
            e.prompt_index: e.result
            for e in Engine(lm, config, 0).run(prompts)
            if isinstance(e, ResultEvent)
        }
        return [found[i] for i in range(len(prompts))]

    together = results(spread, ALIKE)
    assert all((rest <= steps).all() for rest, steps in computed)
    whole = sum(len(model.tokenizer.encode(p)) for p in ALIKE)
    assert sum(int(rest[rest > 1].sum()) for rest, _ in computed) < whole - 2 * len(
        model.tokenizer.encode(STEM)
    )
    config = dataclasses.replace(config, max_num_seqs=6)
    for prompt, result in zip(ALIKE, together, strict=True):
        same(results(model, [prompt])[0], result)


def test_a_prompt_leaves_at_least_one_token_to_compute():
    ids = list(range(100))
    assert shared_prefix(ids, ids) == 99
    assert shared_prefix(ids, ids[:50]) == 50
    assert shared_prefix(ids[:50], ids) == 49
    assert shared_prefix([*ids[:40], 7], ids) == 40
    assert shared_prefix(ids, [*ids[: WORTH_SHARING - 1], 0]) == 0
    assert shared_prefix(ids[:WORTH_SHARING], ids) == 0


def test_a_model_that_keeps_its_last_inputs_only_shares_nothing():
    """The state of a short convolution in the middle of another prompt is gone."""
    mixed = dataclasses.replace(
        TINY_MODEL, n_layers=2, layer_types=("conv", "attention"), conv_kernel=3
    )
    mixed_lm = dataclasses.replace(MIXED.lm(), config=mixed)
    for lm, shares in ((mixed_lm, False), (MIXED.lm(), True)):
        engine = Engine(lm, CONFIG, 0, ScriptedNetwork())
        assert engine._new_batch(Queue(engine.processor.tokenize(["x"]))).share == shares


@pytest.mark.parametrize("max_num_seqs", [1, 5])
def test_fewer_sequences_than_a_prompt_has_samples_decode_one_prompt_at_a_time(max_num_seqs):
    """On two shards, where 1 and 5 do not divide either. The results are those of a large pool."""
    config, script = CONFIGS["branching"]
    prompts = list(PROMPTS[:3])
    network = ScriptedNetwork(layout=Layout(make_mesh(data=2), DECODE_RULES))
    lm = dataclasses.replace(script.lm(), layout=network.layout)
    engine = Engine(lm, dataclasses.replace(config, max_num_seqs=max_num_seqs), 7, network)
    assert engine.rows == max(config.n, -(-max_num_seqs // 2)) == config.n
    found = {e.prompt_index: e.result for e in engine.run(prompts) if isinstance(e, ResultEvent)}
    for i, prompt in enumerate(prompts):
        same(found[i], alone("branching", prompt))
