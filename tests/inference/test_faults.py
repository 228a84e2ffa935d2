"""Limits and faults: what goes wrong with one prompt, or ends it early, is said in its result and
concerns no other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import scripted
from harness.engines import (
    BRANCHING,
    CONFIG,
    FORKING,
    HOPELESS,
    MIXED,
    PRICED,
    REAL,
    REAL_PROMPTS,
    check,
    check_script,
    exact,
)
from harness.scripted import FIRST_PLAN, HEAD, Plan, Script, ScriptedNetwork
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax import decode
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference.api import resolve
from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import Request
from zip_rc_jax.inference.running_batch import RunningBatch
from zip_rc_jax.models.io import chat
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.runtime.errors import UsageError

PROMPTS = ["x", "y y", "z", "x y z", "y", "x x"]
FAULTY = "z y x"  # the prompt that a faulty network fails on ends with this word order


@dataclasses.dataclass(frozen=True)
class FaultyNetwork(ScriptedNetwork):
    """Fails on rows whose prompt is `FAULTY` once they have `params["fault"]["at"]` generated
    tokens (never if that is negative)."""

    def logits(self, params, tokens, positions, last, live, cache, slots):
        logits, kept = super().logits(params, tokens, positions, last, live, cache, slots)
        shards, lanes = cache.tokens.shape[0], len(tokens)
        history = kept.tokens[:, : lanes // shards, :slots].reshape(lanes, slots)
        words, fault = jnp.asarray(scripted.TOKENIZER.encode(FAULTY)), params["fault"]
        mine = (history[:, : len(words)] == words).all(1)
        wrong = (
            mine
            & (positions[jnp.arange(lanes), last] == len(words) - 1 + fault["at"])
            & (fault["at"] >= 0)
        )
        return jnp.where(wrong[:, None] & fault["ids"], fault["value"], logits), kept


def results_of(events):
    found = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [found[i] for i in range(len(found))]


def engine(config=CONFIG, script=MIXED, seed=0, fault=None, at=-1, **options):
    """An engine whose model writes `value` over the logits of the ids `first .. last - 1` in the
    `at`-th place of the faulty prompt."""
    first, last, value = fault or (0, 64, math.nan)
    ids = (jnp.arange(64) >= first) & (jnp.arange(64) < last)
    lm = script.lm(max_positions=128)
    faulty = dataclasses.replace(
        lm,
        params=lm.params
        | {"fault": {"at": jnp.int32(at), "ids": ids, "value": jnp.float32(value)}},
    )
    return Engine(faulty, config, seed, FaultyNetwork(), **options)


def run(prompts, config=CONFIG, on_error=None, **options):
    return results_of(engine(config, **options).run(prompts, on_error))


# ---- a model that fails


FORKED = dataclasses.replace(BRANCHING, alpha=1.0, beta=0.1)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (PRICED, (0, 64, math.nan)),
        (PRICED, (FIRST_PLAN, FIRST_PLAN + 1, math.inf)),
        (PRICED, (HEAD.first_id + 3, HEAD.first_id + 4, math.nan)),
        (PRICED, (HEAD.first_id, HEAD.last_id, -math.inf)),
        (PRICED, (HEAD.last_id, HEAD.last_id + 1, math.nan)),
        (PRICED, (HEAD.used_ids, HEAD.used_ids + 1, math.inf)),
        (FORKED, (0, 64, math.nan)),
    ],
    ids=[
        "NaN",
        "one infinity",
        "one cell NaN",
        "no joint",
        "padding NaN",
        "padding infinity",
        "branching",
    ],
)
def test_logits_that_are_not_finite_end_their_prompt_and_no_other(config, fault):
    healthy = run(PROMPTS, config)
    at = 3
    found = run([*PROMPTS[:3], FAULTY, *PROMPTS[3:]], config, fault=fault, at=at)
    failed = found.pop(3)
    assert [exact(r) for r in found] == [exact(r) for r in healthy]
    assert (
        failed.finish_reason,
        failed.text,
        failed.value_text,
        failed.vote_text,
        failed.prefix_id,
    ) == ("error", "", "", "", -1)
    broken = [p for p in failed.prefixes if p.state == "failed"]
    assert broken
    assert f"the {at} tokens of prefix {broken[-1].id} are not finite" in failed.error
    for p in broken:
        assert (len(p.token_ids), p.finish_reason) == (at, "error"), (
            "what was generated before the fault is kept"
        )
        assert np.isfinite([p.expected_reward, p.expected_remaining]).all(), (
            "as predicted at the last decision"
        )
    assert failed.usage.tokens == sum(len(p.token_ids) - p.fork_position for p in failed.prefixes)
    assert not any(
        m
        for m, done in zip(failed.trace[-1].multiplicity, failed.trace[-1].finished, strict=True)
        if not done
    )


def test_a_fault_on_the_prompt_itself():
    events = list(engine(PRICED, at=0).run([*PROMPTS[:2], FAULTY, *PROMPTS[2:]]))
    found = results_of(events)
    failed = found.pop(2)
    assert [exact(r) for r in found] == [exact(r) for r in run(PROMPTS, PRICED)]
    assert (failed.finish_reason, failed.prefixes, failed.trace, failed.usage.tokens) == (
        "error",
        (),
        (),
        0,
    )
    assert failed.error == "the model's logits after the prompt are not finite"
    assert failed.usage.prompt_tokens == 3
    assert not any(isinstance(e, StepEvent) and e.prompt_index == 2 for e in events)


def test_prefixes_that_had_finished_are_kept_but_give_no_answer():
    script = Script([Plan(4, 0.9), Plan(22, 0.5)])
    config = dataclasses.replace(CONFIG, strategy="fixed")
    for seed in range(20):
        (result,) = run([FAULTY], config, script=script, seed=seed, at=9)
        states = sorted(p.state for p in result.prefixes)
        if len(set(states)) == 2:
            break
    assert set(states) == {"failed", "finished"}
    assert (result.finish_reason, result.text) == ("error", "")
    assert {len(p.token_ids) for p in result.prefixes if p.state == "finished"} == {4}


def test_results_of_failed_prompts_survive_json():
    failed = run([FAULTY, "x"], PRICED, at=0)[0]
    text = json.dumps(
        {
            k: None if isinstance(v, float) and math.isnan(v) else v
            for k, v in failed.to_dict().items()
        },
        allow_nan=False,
    )
    again = Result.from_dict(json.loads(text))
    assert math.isnan(again.expected_reward)
    assert again.error == failed.error


def test_what_is_not_finite_in_the_cache_does_not_reach_the_next_prefix_in_that_row():
    """The word "d" has no finite embedding.

    A row that has read it goes to the next prompt, which attends to it with weight 0.
    """
    lm = tiny_lm(dataclasses.replace(TINY_MODEL, tied=False))
    (d,) = lm.tokenizer.encode("d")

    def with_embedding(value):
        body = lm.params["body"]
        return dataclasses.replace(
            lm, params=lm.params | {"body": body | {"embed": body["embed"].at[d].set(value)}}
        )

    # The second prompt overwrites the first 64 slots of its rows, and looks at what lies beyond
    # once it grows past them. It never reads the word, which ends its prefixes.
    prompts = [
        " ".join(["1 + 2 = 3 so wait a b c 9"] * 7),
        Request(" ".join(["4 + 5 = 9 so"] * 10), stop_token_ids=(d,)),
    ]
    config = DecodeConfig(
        n=4, max_num_seqs=4, interval=4, window=4, max_tokens=18, strategy="fixed"
    )
    (failed, mine), (_, theirs) = (
        results_of(Engine(with_embedding(x), config, 0).run(prompts)) for x in (jnp.nan, 0.0)
    )
    assert failed.finish_reason == "error"
    assert (
        max(
            p.usage.prompt_tokens + len(x.token_ids)
            for p in (failed,)
            for x in p.prefixes
            if x.state == "failed"
        )
        > 64
    )
    assert max(len(p.token_ids) for p in theirs.prefixes) > 4
    assert exact(mine) == exact(theirs)


def test_the_last_token_of_a_prefix_stays_out_of_the_cache():
    """The word "d" ends the first prompt, and its keys are not finite: nobody ever reads them."""
    lm = tiny_lm(dataclasses.replace(TINY_MODEL, tied=False))
    (d,) = lm.tokenizer.encode("d")
    body = lm.params["body"]
    sick = dataclasses.replace(
        lm, params=lm.params | {"body": body | {"embed": body["embed"].at[d].set(jnp.nan)}}
    )
    config = DecodeConfig(
        n=1,
        max_num_seqs=1,
        interval=4,
        window=4,
        max_tokens=60,
        strategy="fixed",
        stop_token_ids=(d,),
    )
    prompts = [Request(f"{i} + 2 = 3 so", seed=i) for i in range(6)]
    found, well = (results_of(Engine(model, config, 0).run(prompts)) for model in (sick, lm))
    ended = [r.prefixes[0].token_ids[-1] == d for r in well]
    assert any(ended[:-1]), "one of them ends with the word, and another takes its row"
    assert [exact(r) for r in found] == [exact(r) for r in well]


@dataclasses.dataclass(frozen=True)
class MeaninglessWhereNotLive(ScriptedNetwork):
    """As `Network.logits` allows, and as the kernel for GPUs does."""

    def logits(self, params, tokens, positions, last, live, cache, slots):
        logits, cache = super().logits(params, tokens, positions, last, live, cache, slots)
        return jnp.where(live[:, None], logits, jnp.roll(logits, 1, axis=1)), cache


@pytest.mark.parametrize("budget", range(9, 27, 2))
def test_a_row_that_rests_on_its_share_of_a_budget_goes_on_as_if_it_had_not(budget):
    """While another prompt runs on, it is stepped too.

    Its next token comes from the logits of its last one.
    """
    config = dataclasses.replace(CONFIG, strategy="fixed", n=2, max_num_seqs=16, interval=8)
    prompts = [*(Request(p, token_budget=budget) for p in PROMPTS), "z"]
    lm = Script([Plan(4, 0.5), Plan(30, 0.5)]).lm()
    found, expected = (
        results_of(Engine(lm, config, 0, network()).run(prompts))
        for network in (MeaninglessWhereNotLive, ScriptedNetwork)
    )
    assert [exact(r) for r in found] == [exact(r) for r in expected]


# ---- prompts that cannot be decoded


BAD = {
    "": "it is empty",
    "x unheard": "lacks these words",
    " ".join("y" * 105): "the model has 128 positions",
    "\ud800": "it is not text that can be encoded",
}


def test_a_bad_prompt_in_a_stream_becomes_its_result_and_the_others_are_decoded():
    good = run(PROMPTS, PRICED)
    mixed = [p for pair in itertools.zip_longest(PROMPTS, BAD) for p in pair if p is not None]
    for found in (run(iter(mixed), PRICED), run(mixed, PRICED, on_error="result")):
        assert [exact(r) for p, r in zip(mixed, found, strict=True) if p not in BAD] == [
            exact(r) for r in good
        ]
        for prompt, result in zip(mixed, found, strict=True):
            if prompt in BAD:
                assert (result.prompt, result.finish_reason, result.text, result.prefixes) == (
                    prompt,
                    "error",
                    "",
                    (),
                )
                assert BAD[prompt] in result.error
                assert "Fix: " in result.error


def test_bad_prompts_alone_need_no_model():
    assert [r.finish_reason for r in run(iter(BAD))] == ["error"] * len(BAD)
    assert run(iter([])) == []


def test_any_number_of_bad_prompts_in_a_row_stops_nothing():
    endless = engine(PRICED).run(itertools.chain(["x"], itertools.repeat("")))
    found = itertools.takewhile(
        lambda e: e.prompt_index != 0 or not isinstance(e, ResultEvent), endless
    )
    # the good prompt ends while the bad ones go on
    ended = sum(isinstance(e, ResultEvent) for e in found)
    assert 0 < ended < 10_000
    assert (
        next(
            e for e in engine(PRICED).run(itertools.repeat("")) if isinstance(e, ResultEvent)
        ).result.finish_reason
        == "error"
    )


def test_what_the_source_raises_is_raised_when_the_prompts_before_have_ended():
    def prompts():
        yield from PROMPTS
        raise OSError("the file is gone")

    found = []
    with pytest.raises(OSError, match="the file is gone"):
        found.extend(engine(PRICED).run(prompts()))
    assert [exact(r) for r in results_of(found)] == [exact(r) for r in run(PROMPTS, PRICED)]


def test_raising_is_the_rule_for_a_list_and_a_choice_for_a_stream():
    with pytest.raises(UsageError, match="prompt 1: it is empty"):
        run(["x", ""])
    with pytest.raises(UsageError, match="prompt 1: it is empty"):
        run(iter(["x", ""]), on_error="raise")
    with pytest.raises(UsageError, match=r"on_error='ignore': it is one of raise, result"):
        run(["x"], on_error="ignore")


def test_the_public_function_takes_both(lm):
    found = decode(lm, [*REAL_PROMPTS[:4], "unheard"], REAL, on_error="result")
    assert [r.finish_reason == "error" for r in found] == [False] * 4 + [True]
    assert [exact(r) for r in found[:4]] == [exact(r) for r in decode(lm, REAL_PROMPTS, REAL)[:4]]
    assert [r.finish_reason for r in decode(lm, iter(["unheard", ""]), REAL)] == ["error", "error"]


# ---- prompts read lazily


def test_no_more_is_read_than_the_rows_can_hold():
    read = finished = most = 0

    def prompts():
        nonlocal read
        for prompt in itertools.islice(itertools.cycle(PROMPTS), 40):
            read += 1
            yield prompt

    for event in engine(dataclasses.replace(PRICED, max_num_seqs=8)).run(prompts()):
        most = max(most, read - finished)
        finished += isinstance(event, ResultEvent)
    assert (read, finished) == (40, 40)
    assert most <= (8 - PRICED.n) + 1 + 1, (
        "a prompt comes when n rows are free, every other one holds a row, and one is read ahead"
    )


def test_a_stream_gives_the_results_of_the_list_also_when_it_outgrows_its_rows():
    prompts = ["x", "y y", " ".join("y" * 40), "z", " ".join("z" * 37), "x"]
    config = dataclasses.replace(PRICED, max_tokens=60, max_num_seqs=8)
    listed, streamed = (run(p, config) for p in (prompts, iter(prompts)))
    assert [exact(r) for r in listed] == [exact(r) for r in streamed]
    assert [r.usage.tokens for r in listed] == [r.usage.tokens for r in streamed]


# ---- budgets


def with_budget(budget, config=PRICED, prompts=PROMPTS, script=MIXED):
    return run(
        [Request(p, token_budget=budget) if i == 2 else p for i, p in enumerate(prompts)],
        config,
        script=script,
    )


@pytest.mark.parametrize(
    "config",
    [PRICED, dataclasses.replace(CONFIG, strategy="fixed"), FORKED],
    ids=["published", "fixed", "branching"],
)
def test_a_token_budget_is_never_exceeded_and_changes_no_other_prompt(config):
    script = FORKING if config is FORKED else MIXED
    free = run(PROMPTS, config, script=script)
    needed = free[2].usage.tokens
    assert needed > 12
    for budget in (1, 3, 10, needed - 1, needed, needed + 1):
        found = with_budget(budget, config, script=script)
        assert [exact(r) for i, r in enumerate(found) if i != 2] == [
            exact(r) for i, r in enumerate(free) if i != 2
        ]
        result = found[2]
        assert result.usage.tokens == min(budget, needed), "all of it is used, and not a token more"
        if budget < needed:
            assert result.finish_reason == "token_budget"
            assert result.text
            assert not any(
                m
                for m, done in zip(
                    result.trace[-1].multiplicity, result.trace[-1].finished, strict=True
                )
                if not done
            )
        else:
            assert exact(result) == exact(free[2]), "a budget that suffices is not felt"


def test_after_the_budget_the_answer_is_what_was_found_until_then():
    script = Script([Plan(5, 0.3), Plan(22, 0.9)])
    for budget in (12, 30):
        result = run(
            [Request("x y", token_budget=budget)],
            dataclasses.replace(CONFIG, strategy="fixed"),
            script=script,
        )[0]
        assert result.finish_reason == "token_budget"
        finished = [p for p in result.prefixes if p.state == "finished"]
        answer = result.prefixes[result.prefix_id]
        if finished:
            assert answer.state == "finished", (
                "a finished prefix answers, even where another promises more"
            )
            assert any(p.expected_reward > answer.expected_reward for p in result.prefixes)
        else:
            assert answer.expected_reward == max(
                p.expected_reward for p in result.prefixes if p.token_ids
            )
        assert result.text == result.value_text == answer.text
        assert bool(finished) == (budget == 30)


def test_the_budget_of_the_engine_holds_for_every_prompt():
    for result in run(PROMPTS, dataclasses.replace(PRICED, token_budget=7)):
        assert (result.usage.tokens, result.finish_reason) == (7, "token_budget")


def test_a_time_budget_ends_a_prompt_at_the_decision_after_it():
    ticks = [0.0]
    config = dataclasses.replace(CONFIG, strategy="fixed", interval=2)
    results = {}
    for event in engine(config, Script([Plan(20, 0.5)]), clock=lambda: ticks[0]).run(
        ["x", Request("y", time_budget=3.0), Request("z", time_budget=100.0)]
    ):
        if isinstance(event, ResultEvent):
            results[event.prompt_index] = event.result
        elif event.prompt_index == 2:  # the last of the three at every decision
            ticks[0] += 1.0
    assert [results[i].finish_reason for i in range(3)] == ["stop", "time_budget", "stop"]
    assert {len(p.token_ids) for p in results[1].prefixes} == {6}, (
        "decisions at 0, 1, 2 and 3 seconds; the last one stops"
    )
    assert results[1].usage.seconds == pytest.approx(4.0)
    assert results[1].text


def test_a_budget_spent_before_anything_was_generated():
    (result,) = run([Request("x", time_budget=0.5)], clock=iter(range(100)).__next__)
    assert (result.finish_reason, result.text, result.prefix_id, result.usage.tokens) == (
        "time_budget",
        "",
        -1,
        0,
    )


# ---- options of one request


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (FORKED, {"n": 2}),
        (FORKED, {"alpha": 0.0, "token_budget": 11}),
        (PRICED, {"n": 2}),
        (PRICED, {"max_tokens": 9}),
        (PRICED, {"alpha": 1.0, "beta": 0.4}),
        (PRICED, {"beta": 0.0}),
        (PRICED, {"temperature": 0.0, "n": 1}),
        (PRICED, {"temperature": 0.7, "top_k": 2, "top_p": 0.9, "min_p": 0.1}),
        (PRICED, {"stop_token_ids": (scripted.FIRST_FILLER,)}),
        (PRICED, {"answer": "vote"}),
        (PRICED, {"allow_no_answer": True, "beta": 1.0}),
        (PRICED, {"token_budget": 11}),
    ],
    ids=lambda value: (
        "branching" if value is FORKED else "published" if value is PRICED else str(value)
    ),
)
def test_a_request_is_decoded_as_an_engine_with_its_options_would_alone(base, options):
    found = run(["x x", Request("x y z", **options), "y y"], base)
    alone = run(["x y z"], dataclasses.replace(base, **options))[0]
    assert exact(found[1]) == exact(alone)
    plain = run(["x x", "y y"], base)
    assert [exact(found[0]), exact(found[2])] == [exact(r) for r in plain]


def test_a_seed_of_its_own_gives_other_samples_of_the_same_prompt():
    fixed = dataclasses.replace(CONFIG, strategy="fixed")
    a, b, c, d = run(
        ["x y", Request("x y", seed=1), Request("x y", seed=2), Request("x y", seed=0)], fixed
    )
    assert exact(a) == exact(d)
    assert len({tuple(p.token_ids for p in r.prefixes) for r in (a, b, c)}) == 3
    assert exact(b) == exact(run(["x y"], fixed, seed=1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 5}, r"n=5 of a request: the engine has n=4\. Fix: use at most 4"),
        ({"max_tokens": 25}, r"max_tokens=25 of a request"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"stop_token_ids": (HEAD.first_id,)}, rf"stop_token_ids \[{HEAD.first_id}\]"),
        ({"token_budget": -1}, r"token_budget=-1"),
        ({"time_budget": math.inf}, r"time_budget=inf"),
        ({"abstain_below": 2.0}, r"abstain_below=2.0"),
        ({"n": "2"}, r"n='2': it is not a whole number"),
        ({"top_k": 2.5}, r"top_k=2.5: it is not a whole number"),
        ({"token_budget": True}, r"token_budget=True: it is not a whole number"),
        ({"temperature": "hot"}, r"temperature='hot': it is not a number"),
        ({"allow_no_answer": "no"}, r"allow_no_answer='no': it is not true or false"),
        ({"stop_token_ids": 5}, r"stop_token_ids=5: it is not a list of ids"),
        ({"stop_token_ids": (1.5,)}, r"stop_token_ids=\(1.5,\): it is not a list of ids"),
        ({"seed": "x"}, r"seed='x': it is not a whole number of 32 bits"),
        (
            {"seed": -1},
            r"seed=-1: it is not a whole number of 32 bits\. Fix: use one from 0 to 4294967295",
        ),
        ({"seed": 2**32}, r"seed=4294967296: it is not a whole number of 32 bits"),
    ],
)
def test_impossible_options_of_a_request_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        run(["x", Request("y", **options)])
    found = run(iter(["x", Request("y", **options), "z"]))
    assert [r.finish_reason == "error" for r in found] == [False, True, False], (
        "in a stream it costs nobody else anything"
    )


def test_options_that_belong_to_the_engine_are_no_options_of_a_request():
    with pytest.raises(TypeError, match="window"):
        Request("x", window=3)


# ---- abstention


def test_an_answer_below_the_threshold_is_withheld():
    for reward, threshold in ((0.3, 0.2), (0.3, 0.4)):
        script = Script([Plan(6, reward)])
        plain = run(["x"], script=script)[0]
        (result,) = run(["x"], dataclasses.replace(CONFIG, abstain_below=threshold), script=script)
        if reward < threshold:
            assert (result.finish_reason, result.text, result.vote_text, result.prefix_id) == (
                "abstain",
                "",
                "",
                -1,
            )
            assert result.expected_reward == pytest.approx(plain.expected_reward), (
                "how good the withheld answer looked"
            )
            assert result.prefixes == plain.prefixes
        else:
            assert exact(result) == exact(plain)


def test_abstention_of_one_request_only():
    config = dataclasses.replace(CONFIG, beta=1.0)
    found = run(["x", Request("y", allow_no_answer=True), "z"], config, script=HOPELESS)
    assert [r.finish_reason for r in found] == ["stop", "abstain", "stop"]


def test_what_budgets_and_options_leave_is_still_consistent():
    """The invariants of every decode, on prompts whose options do not change what they mean."""
    for result in run(
        [Request("x", n=3), Request("y y", beta=0.01), Request("z", top_k=1)], PRICED
    ):
        check(result, PRICED)
        check_script(result, MIXED, PRICED)


# ---- anything at all as a prompt


class Silent:
    """Cannot be printed."""

    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __repr__


class Loud:
    def __repr__(self):
        return "x" * 3_000_000


class FailingMapping(dict):
    def get(self, *_):
        raise LookupError("get")

    items = __getitem__ = keys = get


class FailingSequence(list):
    def __len__(self):
        raise ArithmeticError("len")

    __iter__ = __getitem__ = __len__


class FailingIds:
    def __iter__(self):
        raise ZeroDivisionError("ids")


def itself():
    chat = [{"role": "user"}]
    chat[0]["content"] = chat
    return chat


HUGE_NUMBER = 10**5000
JUNK = {
    "None": None,
    "a number": 5,
    "a huge number": HUGE_NUMBER,
    "bytes": b"x",
    "a list of texts": ["x"],
    "a list of lists": [[["x"]]],
    "a list of None": [None],
    "an empty list": [],
    "an array": np.zeros(3),
    "a set": {"x"},
    "a chat that is a dict": {"role": "user", "content": "x"},
    "a generator": (x for x in "x"),
    "a type": str,
    "what cannot be printed": Silent(),
    "what prints 3 MB": Loud(),
    "a chat that contains itself": itself(),
    "a mapping that fails": [FailingMapping(role="user", content="x")],
    "a sequence that fails": FailingSequence([{"role": "user", "content": "x"}]),
    "a chat of junk": [{"role": "user", "content": Loud()}],
    "a chat with a huge number": [{"role": "user", "content": "x", "n": [HUGE_NUMBER]}],
    "half of a surrogate pair": "x \ud800",
    "NULs": "\0\0",
    "a megabyte": "y " * 500_000,
    "an unknown word of a megabyte": "u" * 1_000_000,
    "a request in a request": Request(Request("x")),
    **{
        f"{name}={kind}": Request("x", **{name: value})
        for name in ("seed", "n", "max_tokens", "alpha", "temperature", "top_k", "token_budget",
        "time_budget", "allow_no_answer", "answer")
        for kind, value in {
            "10**400": 10**400, "-10**5000": -HUGE_NUMBER, "a list of huge numbers": [HUGE_NUMBER],
            "silent": Silent(), "3 MB": Loud(),
            "array": np.zeros(2), "complex": 1j, "bytes": b"1",
        }.items()
    },
    **{
        f"stop_token_ids={kind}": Request("x", stop_token_ids=value)
        for kind, value in {
            "text": "ab", "bytes": b"ab", "mapping": {1: 2}, "huge": (HUGE_NUMBER,), "bool": (True,
            ), "None": (None,),
            "endless": itertools.count(), "failing": FailingIds(), "silent": (Silent(),),
            "many": range(1_000_000),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_a_list_with_junk_is_refused_before_anything_is_decoded_and_by_its_number(
    junk, monkeypatch
):
    decoder = engine(PRICED)
    monkeypatch.setattr(RunningBatch, "prefill", None)
    with pytest.raises(UsageError, match="prompt 1") as refusal:
        next(decoder.run(["x", junk, "y"]))
    assert len(str(refusal.value)) < 1000
    assert "\n" not in str(refusal.value)


def test_junk_in_a_stream_costs_no_other_prompt_anything():
    good = run(PROMPTS, PRICED)
    junk = {
        **JUNK,
        "a generator": (x for x in "x"),
        "stop_token_ids=endless": Request("x", stop_token_ids=itertools.count()),
    }
    mixed = [
        x
        for i, bad in enumerate(junk.values())
        for x in ([PROMPTS[i // 12]] if i % 12 == 0 and i // 12 < len(PROMPTS) else []) + [bad]
    ]
    assert sum(isinstance(x, str) and x in PROMPTS for x in mixed) == len(PROMPTS)
    for found in (run(iter(mixed), PRICED), run(mixed, PRICED, on_error="result")):
        assert [
            exact(r)
            for x, r in zip(mixed, found, strict=True)
            if isinstance(x, str) and x in PROMPTS
        ] == [exact(r) for r in good]
        for number, (x, result) in enumerate(zip(mixed, found, strict=True)):
            if not (isinstance(x, str) and x in PROMPTS):
                assert result.finish_reason == "error"
                assert f"prompt {number}" in result.error
                assert len(result.error) < 1000


def test_scalars_of_numpy_are_numbers_as_any_others():
    options = {
        "seed": 3,
        "n": 2,
        "max_tokens": 9,
        "alpha": 0.5,
        "beta": 0.25,
        "temperature": 0.5,
        "top_k": 2,
        "token_budget": 11,
        "allow_no_answer": True,
    }
    kinds = {int: np.int64, float: np.float32, bool: np.bool_}
    theirs = {name: kinds[type(value)](value) for name, value in options.items()} | {
        "stop_token_ids": np.array([FIRST_PLAN + 2])
    }
    options["stop_token_ids"] = (FIRST_PLAN + 2,)
    ours, numpys = run([Request("x y", **options), Request(np.str_("x y"), **theirs)], PRICED)
    assert exact(ours) == exact(numpys)
    assert json.dumps(numpys.to_dict())
    config = dataclasses.replace(
        PRICED, n=np.int8(4), beta=np.float64(0.5), add_back=np.bool_(True)
    )
    assert [type(x) for x in (config.n, config.beta, config.add_back)] == [int, float, bool]


FAILING_TEMPLATES = {
    "ValueError": "{{ [].index(1) }}",
    "IndexError": "{{ [].pop() }}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "RecursionError": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "TypeError": "{{ 'a' + 1 }}",
    "UndefinedError": "{{ a.b.c }}",
    "too long": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = 1 %}{% endfor "
    "%}{% endfor %}",
    "too large": "{{ 'x' * 10 ** 12 }}",
}


@pytest.mark.parametrize("failing", FAILING_TEMPLATES.values(), ids=FAILING_TEMPLATES)
def test_a_template_that_fails_on_one_chat_costs_no_other(failing, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    template = (
        "{% if messages[0].content == 'bad' %}" + failing + "{% endif %}{{ messages[0].content }}"
    )
    script = MIXED.lm(max_positions=128)
    lm = dataclasses.replace(
        script, tokenizer=Tokenizer(script.tokenizer.backend, ("<eos>",), template)
    )
    chats = [[{"role": "user", "content": x}] for x in ("x", "bad", "y")]
    found = results_of(Engine(lm, PRICED, 0, ScriptedNetwork()).run(iter(chats)))
    assert [exact(found[0]), exact(found[2])] == [
        exact(r) for r in results_of(Engine(lm, PRICED, 0, ScriptedNetwork()).run(["x", "y"]))
    ]
    assert (
        "prompt 1: chat messages: the model's template refuses them" in found[1].error
        or "calls itself" in found[1].error
    )
    with pytest.raises(UsageError, match="prompt 1: chat messages"):
        Engine(lm, PRICED, 0, ScriptedNetwork()).run(chats).__next__()


# ---- any options at all

ANY_SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(),
    st.text(max_size=5), st.binary(max_size=3),
    st.complex_numbers(), st.fractions(), st.decimals(), st.floats(width=32).map(np.float32),
    st.integers(0, 255).map(np.uint8),
)  # fmt: skip
ANYTHING = st.recursive(
    ANY_SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
)
FIELDS = [f.name for f in dataclasses.fields(Request) if f.name != "prompt"]
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(0, 5), "max_tokens": st.integers(0, 30), "alpha": st.floats(0, 1),
        "beta": st.floats(0, 2),
        "top_k": st.integers(0, 5), "top_p": st.floats(0, 1), "min_p": st.floats(0, 1),
        "temperature": st.floats(0, 3),
        "token_budget": st.integers(0, 20), "seed": st.integers(0, 9),
        "stop_token_ids": st.lists(st.integers(0, 20), max_size=3),
        "answer": st.sampled_from(["value", "vote"]), "allow_no_answer": st.booleans(),
    },
)  # fmt: skip


@functools.cache
def steady():
    """An engine for all examples, and what it says of a good prompt."""
    found = engine(dataclasses.replace(PRICED, max_num_seqs=8))
    return found, exact(results_of(found.run(["x y"]))[0])


@pytest.mark.slow
@settings(max_examples=150)
@given(
    prompt=st.just("x") | ANYTHING,
    options=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=2) | PLAUSIBLE,
)
def test_any_request_is_decoded_or_refused_and_concerns_no_other(prompt, options):
    decoder, good = steady()
    found = results_of(decoder.run(iter(["x y", Request(prompt, **options)])))
    assert exact(found[0]) == good
    assert bool(found[1].error) == (found[1].finish_reason == "error")
    assert len(found[1].error) < 1000


@settings(max_examples=300)
@given(
    options=st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(DecodeConfig)]), ANYTHING, max_size=3
    )
)
def test_any_options_make_a_configuration_or_a_refusal(options):
    refusal = None
    try:
        config = resolve(None, options)
    except UsageError as error:
        refusal = str(error)
    if refusal is None:
        json.dumps(dataclasses.asdict(config), allow_nan=False)
        hash(config)
    else:
        assert 0 < len(refusal) < 1000
