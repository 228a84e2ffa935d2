"""The same seed and prompt give the same tokens and the same decisions, whatever else there is:
batch mates, their order, the size of the
pool, the buckets that shapes are rounded to, the number of devices, and how prompts and results are
passed.
"""

from __future__ import annotations

import dataclasses

import jax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.company import CONFIGS, PROMPTS, alone, decoded, on_mesh, same
from harness.engines import REAL, REAL_PROMPTS
from harness.scripted import ScriptedNetwork
from zip_rc_jax import decode, decode_stream
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.requests import Request
from zip_rc_jax.models.io.load import load

pytestmark = pytest.mark.optimized  # bits are compared between programs of several shapes

LONG = " ".join("y" * 36)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=8),
    rows=st.sampled_from([4, 16]),
    lazy=st.booleans(),
)
@example(name="published", prompts=[*PROMPTS, LONG, "x"], rows=16, lazy=False)
@example(name="branching", prompts=[*PROMPTS[::-1], "x", "x"], rows=16, lazy=True)
def test_a_prompt_is_decoded_as_if_it_were_alone(name, prompts, rows, lazy):
    """In any company, any order, a pool of any size, read as a list or lazily; also twice in one
    batch."""
    for prompt, result in zip(prompts, decoded(name, prompts, rows, lazy=lazy)[0], strict=True):
        same(result, alone(name, prompt))


@pytest.mark.parametrize(
    ("name", "devices"), [("published", 8), pytest.param("branching", 2, marks=pytest.mark.slow)]
)
def test_the_number_of_devices_does_not_matter(name, devices):
    for prompt, result in zip(
        PROMPTS, decoded(name, PROMPTS, rows=4 * devices, devices=devices)[0], strict=True
    ):
        same(result, alone(name, prompt))


@pytest.mark.parametrize("name", ["published", pytest.param("branching", marks=pytest.mark.slow)])
def test_the_buckets_of_shapes_do_not_matter(name):
    for prompt, result in zip(PROMPTS, decoded(name, PROMPTS, buckets=True)[0], strict=True):
        same(result, alone(name, prompt))


@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
    prompt=st.sampled_from(PROMPTS),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_a_request_with_a_seed_is_decoded_as_an_engine_with_that_seed_would(seeds, prompt):
    for seed, result in zip(
        seeds, decoded("published", [Request(prompt, seed=s) for s in seeds])[0], strict=True
    ):
        same(result, decoded("published", [prompt], rows=4, seed=seed)[0][0])


@given(few=st.integers(1, 3), prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_more_samples_begin_with_the_samples_of_fewer(few, prompts):
    for prompt, result in zip(
        prompts, decoded("fixed", [Request(p, n=few) for p in prompts])[0], strict=True
    ):
        assert [p.token_ids for p in result.prefixes] == [
            p.token_ids for p in alone("fixed", prompt).prefixes[:few]
        ]


@pytest.mark.parametrize("interval", [5, 24])
def test_without_decisions_the_interval_does_not_matter(interval):
    config, script = CONFIGS["fixed"]
    engine = Engine(
        script.lm(), dataclasses.replace(config, interval=interval), 7, ScriptedNetwork()
    )
    found = {e.prompt_index: e.result for e in engine.run(PROMPTS) if isinstance(e, ResultEvent)}
    for i, prompt in enumerate(PROMPTS):
        assert [p.token_ids for p in found[i].prefixes] == [
            p.token_ids for p in alone("fixed", prompt).prefixes
        ]


# ---- the real transformer


@pytest.mark.slow
def test_a_transformer_gives_the_same_answers_on_two_devices_and_in_other_company(lm):
    together = decode(lm, REAL_PROMPTS, REAL)
    spread = decode(
        on_mesh(lm, 2, 1), REAL_PROMPTS[::-1], dataclasses.replace(REAL, max_num_seqs=8)
    )[::-1]
    for a, b in zip(together, spread, strict=True):
        same(a, b)


def test_more_samples_of_a_transformer_begin_with_the_samples_of_fewer(lm):
    config = dataclasses.replace(REAL, strategy="fixed", n=8)
    more, fewer = (decode(lm, REAL_PROMPTS[:2], dataclasses.replace(config, n=n)) for n in (8, 4))
    for a, b in zip(more, fewer, strict=True):
        assert [p.token_ids for p in a.prefixes[:4]] == [p.token_ids for p in b.prefixes]
        assert len({p.token_ids for p in a.prefixes}) == 8


def test_streaming_gives_the_results_of_decoding_and_shows_what_led_to_them(lm):
    together = decode(lm, REAL_PROMPTS, REAL)
    events = list(decode_stream(lm, REAL_PROMPTS, REAL))
    found = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    for i, result in enumerate(together):
        same(found[i], result)
        steps = [e for e in events if isinstance(e, StepEvent) and e.prompt_index == i]
        assert tuple(e.decision for e in steps) == found[i].trace
        for p in result.prefixes:
            assert sum((e.new_tokens.get(p.id, ()) for e in steps), ()) == p.token_ids
            assert "".join(e.new_text.get(p.id, "") for e in steps) == p.text


@pytest.mark.slow
def test_smollm2_gives_the_same_tokens_in_any_company(smollm2_gguf):
    lm = load(smollm2_gguf).with_head(Grid.authors("value"), "value")
    chats = [
        [{"role": "user", "content": text}]
        for text in ("Name a mammal.", "What is 7 plus 5?", "Write a haiku about the sea.")
    ]
    config = DecodeConfig(
        n=3, max_num_seqs=9, interval=8, window=4, max_tokens=24, top_p=0.95, strategy="fixed"
    )
    together = decode(lm, chats, config)
    for chat, result in zip(chats, together, strict=True):
        same(decode(lm, [chat], dataclasses.replace(config, max_num_seqs=4))[0], result)
    for a, b in zip(
        decode(on_mesh(lm, 2, 1), chats[::-1], dataclasses.replace(config, max_num_seqs=8))[::-1],
        together,
        strict=True,
    ):
        same(a, b)
    assert len({p.token_ids for r in together for p in r.prefixes}) == 9
    # A head that is not trained predicts the same for every prefix, so its rows are drawn at random
    # for decisions to differ.
    rows = jax.random.normal(jax.random.key(0), lm.params["zip_rows"].shape) / 8
    lm = dataclasses.replace(lm, params=lm.params | {"zip_rows": rows})
    config = dataclasses.replace(config, strategy="zip_rc", beta=0.02, alpha=0.5)
    together = decode(lm, chats, config)
    for chat, result in zip(chats, together, strict=True):
        same(
            decode(lm, [chat], dataclasses.replace(config, max_num_seqs=4))[0],
            result,
            longest=lm.head.grid.length_edges[-1],
        )
    assert len({d.multiplicity for r in together for d in r.trace}) > 2
