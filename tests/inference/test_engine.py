"""The decoder on a scripted model: continue, pause, resume, branch, stop; then on a tiny real
transformer."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import reference_search as reference
from harness import scripted
from harness.engines import (
    BRANCHING,
    CONFIG,
    FORKING,
    FORKS,
    HOPELESS,
    MIXED,
    PRICED,
    REAL,
    REAL_PROMPTS,
    check,
    check_script,
    exact,
)
from harness.scripted import EOS, FIRST_FILLER, GRID, Plan, Script, ScriptedNetwork
from harness.small_tokenizers import chatml, gemma, llama
from harness.tiny import TINY_GRID, TINY_MODEL, randomised
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.head import cell_log_probs
from zip_rc_jax.inference import api
from zip_rc_jax.inference import state as state_module
from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Prefix, Result
from zip_rc_jax.inference.tree import ROOT, Branch, best_prefix, voted_prefix
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, param_axes
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, single_device
from zip_rc_jax.search.inputs import SearchInputs
from zip_rc_jax.search.policies import decide


def events(script, prompts, config=CONFIG, seed=0):
    return list(Engine(script.lm(), config, seed, ScriptedNetwork()).run(prompts))


def run(script, prompts, config=CONFIG, seed=0):
    """Results in prompt order, each checked against everything that must always hold."""
    found = {
        e.prompt_index: e.result
        for e in events(script, prompts, config, seed)
        if isinstance(e, ResultEvent)
    }
    results = [found[i] for i in range(len(prompts))]
    for result in results:
        check(result, config)
        check_script(result, script, config)
    return results


# ---- continue, pause, resume, branch, stop


def test_continue_a_promising_group_runs_to_its_end_when_tokens_are_free():
    result = run(MIXED, ["x y"], dataclasses.replace(CONFIG, beta=0.0))[0]
    assert [p.finish_reason for p in result.prefixes] == ["stop"] * 4
    assert [len(p.token_ids) for p in result.prefixes] == [
        MIXED.plans[MIXED.plan_of(p.token_ids)].length for p in result.prefixes
    ]
    assert result.usage.serial_steps == max(len(p.token_ids) for p in result.prefixes)
    assert result.usage.prompt_tokens == 2


def test_pause_what_is_not_worth_its_tokens_is_paused_and_stays():
    script = Script([Plan(20, 0.95), Plan(20, 0.02)], root=(0.5, 20))
    config = dataclasses.replace(CONFIG, alpha=1.0, beta=0.08)
    result = run(script, ["x"], config, seed=1)[0]
    plans = {p.id: script.plan_of(p.token_ids) for p in result.prefixes if p.token_ids}
    assert set(plans.values()) == {0, 1}, "the seed draws both"
    for p in result.prefixes:
        if plans.get(p.id) == 1:
            assert (p.state, len(p.token_ids)) == ("paused", 4), (
                "paused at the first decision after the root"
            )
    best = result.prefixes[result.prefix_id]
    assert (script.plan_of(best.token_ids), best.finish_reason, result.finish_reason) == (
        0,
        "stop",
        "stop",
    )


def test_resume_a_paused_prefix_goes_on_when_the_favourite_disappoints():
    favourite = Plan(20, lambda t: 0.9 if t < 9 else 0.01)
    script = Script([favourite, Plan(20, 0.5)], root=(0.5, 20))
    config = dataclasses.replace(CONFIG, alpha=1.0, beta=0.2, n=2, window=1)
    for seed in range(20):
        result = run(script, ["x"], config, seed)[0]
        drawn = [script.plan_of(p.token_ids) for p in result.prefixes if p.token_ids]
        if sorted(drawn) == [0, 1]:
            break
    assert sorted(drawn) == [0, 1]
    second = drawn.index(1)
    history = [d.multiplicity[d.prefix_ids.index(second)] for d in result.trace]
    assert re.fullmatch("1+0+1+", "".join(map(str, history))), "extended, paused, extended again"
    assert result.prefixes[second].finish_reason == "stop"
    assert result.prefix_id == second


def test_branch_an_early_promising_prefix_is_copied_and_copies_go_different_ways():
    forks = apart = 0
    for result in run(FORKING, ["x", "y", "z x", "y y"], FORKS):
        for p in [p for p in result.prefixes if p.parent >= 0]:
            forks += 1
            parent = result.prefixes[p.parent]
            assert 0 < p.fork_position < len(p.token_ids)
            if len(parent.token_ids) == len(p.token_ids) == 18:
                apart += p.token_ids != parent.token_ids
        multiplicities = [
            m
            for d in result.trace
            for i, m in zip(d.prefix_ids, d.multiplicity, strict=True)
            if i >= 0
        ]
        assert (max(multiplicities) >= 2) == any(p.parent >= 0 for p in result.prefixes)
    assert forks >= 3
    assert apart >= 2


def test_branching_may_start_new_samples_of_the_root_later():
    """The first samples disappoint, so new ones are drawn."""
    script = Script([Plan(18, lambda t: 0.01), Plan(8, 0.9)], root=(0.6, 8), draw=(0.8, 0.2, 1e-9))
    late = 0
    for result in run(
        script,
        ["x", "y", "z", "x x"],
        dataclasses.replace(BRANCHING, alpha=1.0, beta=0.15, max_num_seqs=32),
    ):
        late += sum(d.multiplicity[-1] for d in result.trace[1:] if d.prefix_ids[-1] == -1)
    assert late > 0


def test_stop_as_soon_as_nothing_left_is_worth_its_price():
    script = Script([Plan(5, 0.97), Plan(22, 0.5)], root=(0.7, 12))
    results = run(script, ["x", "y", "z"], dataclasses.replace(CONFIG, alpha=1.0, beta=0.1))
    stopped_early = [
        r for r in results if any(p.state == "paused" and len(p.token_ids) > 1 for p in r.prefixes)
    ]
    assert stopped_early, "the seed draws both plans in some prompt"
    for result in stopped_early:
        assert result.prefixes[result.prefix_id].expected_reward == pytest.approx(0.97, abs=0.01)
        ended = [
            d
            for d in result.trace
            if any(
                f and script.plan_of(result.prefixes[i].token_ids) == 0
                for i, f in zip(d.prefix_ids, d.finished, strict=True)
            )
        ]
        assert ended == [result.trace[-1]], "the decision that first sees it finished is the last"


# ---- the end of a group


def test_a_group_does_not_end_before_one_prefix_has_finished():
    result = run(HOPELESS, ["x"], dataclasses.replace(CONFIG, beta=1.0))[0]
    assert [p.finish_reason for p in result.prefixes].count("stop") >= 1
    assert result.finish_reason == "stop"
    assert result.expected_remaining == 0.0


def test_abstaining_ends_it_at_once_and_says_so():
    result = run(HOPELESS, ["x"], dataclasses.replace(CONFIG, beta=1.0, allow_no_answer=True))[0]
    assert (
        result.finish_reason,
        result.text,
        result.value_text,
        result.vote_text,
        result.prefix_id,
    ) == ("abstain", "", "", "", -1)
    assert (result.usage.tokens, result.usage.serial_steps, len(result.trace)) == (0, 0, 1)
    assert result.expected_reward == pytest.approx(
        float(HOPELESS.root.sum(1) @ GRID.reward_centres), abs=1e-5
    )
    assert result.expected_remaining == pytest.approx(
        float(HOPELESS.root.sum(0) @ GRID.length_midpoints), abs=1e-3
    )


def test_abstaining_is_allowed_not_required():
    result = run(MIXED, ["x"], dataclasses.replace(CONFIG, beta=0.001, allow_no_answer=True))[0]
    assert result.finish_reason == "stop"


def test_abstention_may_come_after_some_tokens():
    script = Script([Plan(22, lambda t: 0.01, lambda t: 31)], root=(0.6, 5))
    result = run(script, ["x"], dataclasses.replace(CONFIG, beta=0.2, allow_no_answer=True))[0]
    assert result.finish_reason == "abstain"
    assert 0 < result.usage.tokens == sum(len(p.token_ids) for p in result.prefixes)
    assert all(p.finish_reason == "paused" for p in result.prefixes)


def test_the_token_limit_ends_a_prefix_with_the_reason_length():
    script = Script([Plan(40, 0.6)])
    config = dataclasses.replace(CONFIG, beta=0.0, n=2)
    result = run(script, ["x"], config)[0]
    assert [(p.finish_reason, len(p.token_ids)) for p in result.prefixes] == [("length", 24)] * 2
    assert result.finish_reason == "length"
    odd = run(script, ["x"], dataclasses.replace(config, max_tokens=23))[0]
    assert {len(p.token_ids) for p in odd.prefixes} == {23}, (
        "also when it is no multiple of the interval"
    )


def test_extra_stop_ids_end_a_prefix():
    stop = FIRST_FILLER + 1
    config = dataclasses.replace(CONFIG, strategy="fixed", stop_token_ids=(stop,))
    result = next(
        e.result
        for e in events(Script([Plan(20, 0.5)]), ["x"], config)
        if isinstance(e, ResultEvent)
    )
    assert all(
        p.finish_reason == "stop" and p.token_ids[-1] in (stop, EOS) for p in result.prefixes
    )
    assert any(p.token_ids[-1] == stop for p in result.prefixes)
    assert not any(stop in p.token_ids[:-1] for p in result.prefixes)


# ---- the start


@pytest.mark.parametrize("candidates", ["published", "exhaustive"])
@pytest.mark.parametrize("beta", [0.0, 0.02, 0.1, 0.5])
def test_at_the_root_the_number_of_samples_is_the_one_that_the_utility_asks_for(candidates, beta):
    config = dataclasses.replace(
        CONFIG, beta=beta, alpha=1.0, candidates=candidates, add_back=False
    )
    decision = run(MIXED, ["x"], config)[0].trace[0]
    joints, unfinished = [MIXED.root] * 4, [True] * 4
    scale = reference.normaliser(joints, [0] * 4, GRID.length_edges)
    scores = {
        (k, b): reference.utility(joints, unfinished, [1] * k + [0] * (4 - k), b, alpha=1.0,
        beta=beta, scale=scale,
                                  centres=GRID.reward_centres, edges=GRID.length_edges, skill=1.0)
        for k in range(1, 5) for b in range(-1, GRID.n_length) if b != 0
    }  # fmt: skip
    assert decision.utility == pytest.approx(max(scores.values()), abs=1e-5)
    assert scores[sum(decision.multiplicity), decision.planned_pause_bin] == pytest.approx(
        max(scores.values()), abs=1e-5
    )
    assert decision.tokens == (0, 0, 0, 0)


def test_the_price_changes_how_many_samples_start():
    counts = [
        sum(
            run(MIXED, ["x"], dataclasses.replace(CONFIG, beta=b, alpha=1.0))[0]
            .trace[0]
            .multiplicity
        )
        for b in (0.0, 0.1, 0.5)
    ]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (4, 1)


# ---- independence


PROMPTS = ["x", "y y", "z", "x y z", "y", "z z z z", "x x", "y z", "z y"]


@pytest.fixture(scope="module")
def together():
    return run(MIXED, PROMPTS, PRICED)


def test_results_do_not_depend_on_prompt_order(together):
    order = [5, 2, 8, 0, 7, 1, 3, 6, 4]
    again = run(MIXED, [PROMPTS[i] for i in order], PRICED)
    for result, i in zip(again, order, strict=True):
        assert exact(together[i]) == exact(result)
        assert [p.expected_reward for p in result.prefixes] == pytest.approx(
            [p.expected_reward for p in together[i].prefixes], abs=1e-5
        )


def test_results_do_not_depend_on_batch_mates(together):
    for i in (0, 3, 5):
        alone = run(MIXED, [PROMPTS[i]], PRICED)[0]
        assert exact(alone) == exact(together[i])
        assert alone.usage.tokens == together[i].usage.tokens
        assert alone.usage.serial_steps == together[i].usage.serial_steps


@pytest.mark.parametrize("rows", [4, 8, 64])
def test_results_do_not_depend_on_the_size_of_the_pool(together, rows):
    """With 4 rows one prompt runs at a time, with 64 all nine: continuous batching changes nothing
    but the clock."""
    for a, b in zip(
        run(MIXED, PROMPTS, dataclasses.replace(PRICED, max_num_seqs=rows)), together, strict=True
    ):
        assert exact(a) == exact(b)


def test_branching_results_do_not_depend_on_the_pool_either():
    wide = run(FORKING, PROMPTS, FORKS)
    narrow = run(FORKING, PROMPTS[::-1], dataclasses.replace(FORKS, max_num_seqs=8))[::-1]
    assert any(p.parent >= 0 for r in wide for p in r.prefixes)
    assert [exact(r) for r in wide] == [exact(r) for r in narrow]


def test_freed_rows_go_to_the_next_prompt_at_once():
    """Two prompts fit.

    The short one ends first, and the third is admitted while the long one still runs.
    """
    script = Script([Plan(3, 0.5), Plan(23, 0.5)], draw=(0.5, 0.5, 1e-9))
    config = dataclasses.replace(CONFIG, strategy="fixed", n=1, max_num_seqs=2)
    log = events(script, PROMPTS, config)
    live, overlap = {}, False
    for event in log:
        if isinstance(event, StepEvent):
            live[event.prompt_index] = event.decision.finished.count(False)
            running = [i for i, rows in live.items() if rows]
            assert len(running) <= 2
            overlap |= len(running) == 2 and running[1] - running[0] > 1
    assert overlap
    assert sorted(e.prompt_index for e in log if isinstance(e, ResultEvent)) == list(range(9))


def test_the_same_prompt_and_seed_give_the_same_tokens_and_another_seed_others():
    a, b, c = (
        run(MIXED, ["x y", "x y"], dataclasses.replace(CONFIG, strategy="fixed"), seed)
        for seed in (3, 3, 4)
    )
    assert exact(a[0]) == exact(b[0]) == exact(a[1])
    assert exact(a[0]) != exact(c[0])
    other = run(MIXED, ["y x"], dataclasses.replace(CONFIG, strategy="fixed"), 3)[0]
    assert [p.token_ids for p in other.prefixes] != [p.token_ids for p in a[0].prefixes], (
        "the prompt is part of the key"
    )


def test_eight_samples_start_with_the_four():
    four, eight = (
        run(MIXED, ["x", "y"], dataclasses.replace(CONFIG, strategy="fixed", n=n)) for n in (4, 8)
    )
    for a, b in zip(four, eight, strict=True):
        assert [p.token_ids for p in a.prefixes] == [p.token_ids for p in b.prefixes[:4]]
        assert len({p.token_ids for p in b.prefixes}) > 4, "samples differ"


def test_an_engine_can_run_again_and_remembers_nothing():
    engine = Engine(MIXED.lm(), PRICED, 0, ScriptedNetwork())
    first, second = (
        [exact(e.result) for e in engine.run(["x", "y"]) if isinstance(e, ResultEvent)]
        for _ in range(2)
    )
    assert first == second


# ---- streaming


@pytest.mark.parametrize(
    "config",
    [PRICED, dataclasses.replace(BRANCHING, alpha=0.0, beta=0.1)],
    ids=["published", "branching"],
)
def test_streaming_adds_up_to_the_results(config):
    log = events(MIXED, PROMPTS[:5], config)
    for end in [e for e in log if isinstance(e, ResultEvent)]:
        mine = [e for e in log if isinstance(e, StepEvent) and e.prompt_index == end.prompt_index]
        assert log.index(end) > max(map(log.index, mine)), "the result comes last"
        assert tuple(e.decision for e in mine) == end.result.trace
        for p in end.result.prefixes:
            assert "".join(e.new_text.get(p.id, "") for e in mine) == p.text
            assert sum((e.new_tokens.get(p.id, ()) for e in mine), ()) == p.token_ids


def test_a_result_is_plain_data():
    result = run(MIXED, ["x"], PRICED)[0]
    data = json.loads(json.dumps(result.to_dict()))
    assert data["prefixes"][0]["token_ids"] == list(result.prefixes[0].token_ids)
    assert data["usage"]["tokens"] == result.usage.tokens


# ---- baselines on the same engine


def test_fixed_runs_every_sample_to_its_end():
    for result in run(
        MIXED, PROMPTS[:4], dataclasses.replace(CONFIG, strategy="fixed", beta=100.0)
    ):
        assert [p.finish_reason for p in result.prefixes] == ["stop"] * 4
        assert all(d.planned_pause_bin == -1 and np.isnan(d.utility) for d in result.trace)


def random_inputs(rng, prompts=60, n=5):
    joint = (
        rng.dirichlet(np.full(GRID.n_cells, 0.3), (prompts, n))
        .reshape(prompts, n, 3, 4)
        .astype(np.float32)
    )
    exists = rng.random((prompts, n)) < 0.85
    exists[:, 0] = True
    unfinished = rng.random((prompts, n)) < rng.random((prompts, 1))
    prices = np.full((2, prompts), 0.1, np.float32)
    tokens, none = rng.integers(0, 20, (prompts, n)), np.zeros(prompts, np.int32)
    return SearchInputs(
        joint, unfinished, tokens, exists, none, *prices, must_extend=~(exists & ~unfinished).any(1)
    )


def expected_choice(strategy, inputs, p, config):
    """One prompt by the definition: finished prefixes always stay, and while nothing has finished
    something goes on."""
    slots = [i for i in range(inputs.exists.shape[1]) if inputs.exists[p, i]]
    live, finished = (
        [i for i in slots if inputs.unfinished[p, i]],
        [i for i in slots if not inputs.unfinished[p, i]],
    )
    reward = {
        i: sum(inputs.joint[p, i, b].sum() * GRID.reward_centres[b] for b in range(3))
        for i in slots
    }
    if strategy == "fixed":
        kept = live
    elif strategy == "reward_threshold":
        kept = [i for i in live if reward[i] >= config.reward_threshold]
        if not kept and not finished:
            kept = [max(live, key=reward.get)]
    elif strategy == "length_budget":
        kept = [i for i in live if inputs.tokens_so_far[p, i] < config.length_budget]
        if not kept and not finished:
            kept = live
    else:
        kept = [] if 2 * len(finished) >= len(slots) else live
    return [int(i in kept or i in finished) for i in range(inputs.exists.shape[1])]


@pytest.mark.parametrize(
    "strategy", ["fixed", "reward_threshold", "length_budget", "half_finished"]
)
def test_pruning_strategies_follow_their_definitions(strategy):
    budget = 9 if strategy == "length_budget" else 0
    config = dataclasses.replace(
        CONFIG, strategy=strategy, reward_threshold=0.45, length_budget=budget
    )
    inputs = random_inputs(np.random.default_rng(1))
    choice = decide(inputs, grid=GRID, config=config)
    wanted = [expected_choice(strategy, inputs, p, config) for p in range(60)]
    assert choice.multiplicity.tolist() == wanted
    assert (choice.planned_pause_bin == -1).all()
    assert np.isnan(choice.utility).all()
    if strategy != "fixed":
        assert wanted != [expected_choice("fixed", inputs, p, config) for p in range(60)]


def test_reward_threshold_drops_what_falls_below_it():
    script = Script(
        [Plan(18, lambda t: 0.8), Plan(18, lambda t: 0.8 if t < 6 else 0.1)], root=(0.5, 20)
    )
    config = dataclasses.replace(CONFIG, strategy="reward_threshold", window=1)
    results = run(script, PROMPTS[:4], config)
    drawn = [[script.plan_of(p.token_ids) for p in r.prefixes] for r in results]
    assert any(0 in d and 1 in d for d in drawn)
    for result, plans in zip(results, drawn, strict=True):
        for p, plan in zip(result.prefixes, plans, strict=True):
            if 0 in plans:
                assert (p.finish_reason, len(p.token_ids)) == (
                    ("stop", 18) if plan == 0 else ("paused", 8)
                )


def test_length_budget_drops_what_exceeds_it_and_half_finished_drops_the_rest():
    script = Script([Plan(7, 0.5), Plan(20, 0.5)])
    budget = run(
        script, PROMPTS[:4], dataclasses.replace(CONFIG, strategy="length_budget", length_budget=10)
    )
    half = run(script, PROMPTS[:4], dataclasses.replace(CONFIG, strategy="half_finished"))
    mixed = 0
    for a, b in zip(budget, half, strict=True):
        plans = [script.plan_of(p.token_ids) for p in a.prefixes]
        short = plans.count(0)
        mixed += 0 < short < 4
        assert {
            len(p.token_ids) for p, plan in zip(a.prefixes, plans, strict=True) if plan == 1
        } <= ({12} if short else {20})
        assert {
            len(p.token_ids) for p, plan in zip(b.prefixes, plans, strict=True) if plan == 1
        } <= ({8} if short >= 2 else {20})
    assert mixed


# ---- the answer


def prefix(i, text, reward, state="finished", reason="stop"):
    return Prefix(i, -1, 0, (), text, state, reason, reward, 0.0)


def test_the_answer_by_value_and_by_vote():
    candidates = [
        prefix(0, "so Answer: 3", 0.4),
        prefix(1, "hm Answer: 4", 0.6),
        prefix(2, "thus Answer: 3", 0.5),
        prefix(3, "Answer: 5", 0.99, "paused", "paused"),
        prefix(4, "Answer: 6", 0.95, reason="length"),
        prefix(5, "no mark", 0.97),
    ]
    assert best_prefix(candidates[:5]).id == 1, "paused and cut-off prefixes do not answer"
    assert best_prefix(candidates).id == 5
    assert voted_prefix([candidates[0], candidates[1], candidates[2], candidates[3]]).id == 2, (
        "0.4 + 0.5 for 3 against 0.6 for 4"
    )
    assert best_prefix([candidates[3], candidates[4]]).id == 4, (
        "a cut-off prefix only if no other has finished"
    )
    assert voted_prefix([candidates[5]]).id == 5, "without any answer the vote is the value"
    assert best_prefix([candidates[3]]) is voted_prefix([candidates[3]]) is None
    assert best_prefix([prefix(0, "a", 0.5), prefix(1, "b", 0.5)]).id == 0


def test_the_config_chooses_which_of_the_two_is_returned():
    for answer in ("value", "vote"):
        for result in run(MIXED, PROMPTS[:3], dataclasses.replace(PRICED, answer=answer)):
            assert result.text == (result.value_text if answer == "value" else result.vote_text)
            assert result.text == result.prefixes[result.prefix_id].text


# ---- bad input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"prompts=\[\]: there is nothing to decode"),
        ("x y", r"prompts given as one string.*pass \[prompt\]"),
        ({"role": "user", "content": "x"}, r"prompts of type dict: a list of prompts is expected"),
        (None, r"prompts of type NoneType: a list of prompts is expected"),
        (["x", ""], r"prompt 1: it is empty"),
        (["x", "   "], r"prompt 1: it is empty"),
        (["x", "x unheard y"], r"text with \['unheard'\].*lacks these words"),
        (
            ["x", " ".join(["y"] * 41)],
            r"prompt 1 of 41 tokens with max_tokens=24: the model has 64 positions\. Fix: shorten "
            r"it to 40 tokens",
        ),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_compiled(monkeypatch, prompts, message):
    def never(*args, **kwargs):
        raise AssertionError("compiled")

    for name in ("prefill", "advance", "edit", "empty_pool"):
        monkeypatch.setattr(state_module, name, never)
    with pytest.raises(UsageError, match=message):
        next(Engine(MIXED.lm(), CONFIG, 0, ScriptedNetwork()).run(prompts))


def test_the_longest_prompt_that_fits_is_decoded():
    result = run(
        Script([Plan(40, 0.6)]), [" ".join(["y"] * 40)], dataclasses.replace(CONFIG, n=1, beta=0.0)
    )[0]
    assert len(result.prefixes[0].token_ids) == 24


@pytest.mark.parametrize(
    "ids", [(-1,), (scripted.HEAD.used_ids,), (scripted.HEAD.first_id,), (10_000,)]
)
def test_impossible_stop_ids_are_refused(ids):
    with pytest.raises(
        UsageError, match=rf"stop_token_ids \[{ids[0]}\].*0\.\.{scripted.HEAD.used_ids - 1}"
    ):
        Engine(MIXED.lm(), dataclasses.replace(CONFIG, stop_token_ids=ids), 0, ScriptedNetwork())


def test_ids_that_the_head_took_are_no_stop_ids():
    lm = chat_lm(gemma())
    taken = lm.head.first_id + 2
    assert taken < lm.head.used_ids
    with pytest.raises(
        UsageError,
        match=rf"stop_token_ids \[{taken}\]: .*without the reserved {lm.head.first_id}\.\.",
    ):
        Engine(lm, dataclasses.replace(CHATTY, stop_token_ids=(taken, 1)), 0)


@pytest.mark.parametrize("reserved", [True, False])
def test_prompts_with_reserved_or_unused_ids_are_refused(reserved):
    lm = chat_lm(gemma())
    name = "<unused2>" if reserved else "<unused20>"
    i = gemma().backend.token_to_id(name)
    assert (lm.head.first_id <= i < lm.head.last_id) == reserved
    with pytest.raises(
        UsageError, match=rf"prompt 1 with ids {i} \({name}\): they are reserved or unused"
    ):
        Engine(lm, CHATTY, 0).processor.tokenize(["fine", f"not {name} so {name}"])
    chat = [{"role": "user", "content": f"say {name}"}]
    with pytest.raises(UsageError, match=rf"prompt 0 with ids {i} \({name}\)"):
        api.decode(lm, [chat], CHATTY)


def test_ids_past_the_models_rows_are_refused():
    """Gemma's text models have one row fewer than their tokenizer has ids."""
    lm = chat_lm(gemma())
    last = gemma().size - 1
    body = lm.params["body"] | {"embed": lm.params["body"]["embed"][:last]}
    short = dataclasses.replace(
        lm,
        config=dataclasses.replace(lm.config, vocab_size=last),
        params=lm.params | {"body": body},
    )
    text = gemma().backend.id_to_token(last).replace("▁", " ")
    assert last in gemma().encode(text)
    with pytest.raises(UsageError, match=rf"prompt 0 with ids {last} "):
        Engine(short, CHATTY, 0).processor.tokenize([text])


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UsageError, match="without a ZIP head"):
        Engine(dataclasses.replace(MIXED.lm(), head=None), CONFIG, 0, ScriptedNetwork())


# ---- chats

CHATTY = DecodeConfig(n=2, max_num_seqs=4, interval=4, window=4, max_tokens=8, beta=0.05)
CHAT = [{"role": "user", "content": "What is 17 + 25?"}]


@functools.cache
def chat_lm(tokenizer):
    config = dataclasses.replace(TINY_MODEL, vocab_size=tokenizer.size, max_positions=160)
    lm = LanguageModel.create(config, tokenizer, 5).with_head(TINY_GRID, "value")
    return dataclasses.replace(lm, params=randomised(lm.params, 5))


def test_a_chat_is_decoded_as_the_text_that_the_template_makes_of_it():
    lm = chat_lm(chatml())
    prompts = [
        CHAT,
        chatml().chat(CHAT, enable_thinking=False),
        "What is 17 + 25?",
        (*CHAT, {"role": "assistant", "content": "42"}),
    ]
    texts = [p if isinstance(p, str) else chatml().chat(p, enable_thinking=False) for p in prompts]
    results = api.decode(lm, prompts, CHATTY, chat_template_kwargs={"enable_thinking": False})
    raw = api.decode(lm, texts, CHATTY)
    assert [exact(r) for r in results] == [exact(r) for r in raw]
    assert [r.prompt for r in results] == texts
    assert texts[0] == texts[1]
    assert texts[0].endswith("</think>\n\n")
    template = chatml().template_hash
    assert [r.template_hash for r in results] == [template, None, None, template]
    assert {r.template_hash for r in raw} == {None}
    for result in results:
        again = Result.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again.template_hash == result.template_hash
    streamed = api.decode_stream(
        lm, prompts, CHATTY, chat_template_kwargs={"enable_thinking": False}
    )
    found = {e.prompt_index: e.result for e in streamed if isinstance(e, ResultEvent)}
    assert [found[i].template_hash for i in range(4)] == [template, None, None, template]
    assert [exact(found[i]) for i in range(4)] == [exact(r) for r in results]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        (
            CHAT,
            {},
            r"prompts given as one chat: a list of prompts is expected\. Fix: pass \[messages\]",
        ),
        ("hello", {}, r"prompts given as one string"),
        ([], {}, r"there is nothing to decode"),
        ([["hello"]], {}, r"a chat is a list of dicts with a role"),
        (
            ["hello", "you"],
            {"enable_thinking": False},
            r"chat_template_kwargs=\{'enable_thinking': False\}: every prompt is a string",
        ),
        (
            ["hello", CHAT],
            {"enable": False},
            r"argument 'enable': the model's template takes no such",
        ),
    ],
)
@pytest.mark.parametrize("decoder", [api.decode, api.decode_stream])
def test_bad_chats_are_refused_at_once(monkeypatch, decoder, prompts, arguments, message):
    monkeypatch.setattr(Engine, "run", None)
    with pytest.raises(UsageError, match=message):
        decoder(chat_lm(chatml()), prompts, CHATTY, chat_template_kwargs=arguments)


def test_a_model_without_a_chat_template_takes_raw_prompts_only(lm):
    with pytest.raises(
        UsageError, match=r"the tokenizer has no chat template\. Fix: pass raw prompts"
    ):
        api.decode(lm, [CHAT], CONFIG)


# ---- the real transformer


def decode(lm, prompts, config, seed=0):
    found = {
        e.prompt_index: e.result
        for e in Engine(lm, config, seed).run(prompts)
        if isinstance(e, ResultEvent)
    }
    for result in found.values():
        check(result, config)
    return [found[i] for i in range(len(prompts))]


def window_means(lm, prompt, ids, finished, window):
    """Expected reward and remaining length of a prefix from one full forward without cache."""
    prompt_ids = lm.tokenizer.encode(prompt)
    tokens = jnp.asarray([prompt_ids + list(ids)])
    padded = jnp.pad(tokens, ((0, 0), (0, 40 - tokens.shape[1])))
    positions = jnp.arange(40)[None]
    hidden = FORWARD(lm.config, lm.params["body"], padded, positions)
    log_joint = np.asarray(cell_log_probs(hidden[0] @ lm.params["zip_rows"].T, lm.head.grid))
    # Joint i follows i generated tokens; the one behind the end token does not count.
    at = range(len(ids) + (not finished))[-window:]
    joint = np.mean([np.exp(log_joint[len(prompt_ids) - 1 + i]) for i in at], axis=0)
    return joint.sum(1) @ lm.head.grid.reward_centres, joint.sum(0) @ lm.head.grid.length_midpoints


FORWARD = jax.jit(
    lambda config, body, tokens, positions: forward_packed(
        config, body, tokens, positions, jnp.ones_like(tokens), layout=single_device()
    ),
    static_argnums=0,
)


@pytest.mark.parametrize(
    "config",
    [
        REAL,
        dataclasses.replace(REAL, strategy="fixed"),
        dataclasses.replace(REAL, candidates="branching", alpha=1.0, beta=0.1, n=6),
    ],
    ids=["published", "fixed", "branching"],
)
def test_predictions_are_the_means_of_a_full_forward_over_the_window(lm, config):
    """Every prefix at its end, finished or paused, forked or not."""
    kinds, short, deep = set(), 0, 0
    for result in decode(lm, REAL_PROMPTS, config):
        for p in result.prefixes:
            finished = p.state == "finished"
            reward, remaining = window_means(
                lm, result.prompt, p.token_ids, finished, config.window
            )
            assert p.expected_reward == pytest.approx(reward, abs=1e-4)
            assert p.expected_remaining == pytest.approx(0.0 if finished else remaining, abs=1e-2)
            kinds.add((p.finish_reason, p.parent >= 0))
            short += len(p.token_ids) < config.window
            deep += len(p.token_ids) > 2 * config.window
        for decision in result.trace:
            for i, tokens, finished, found in zip(
                decision.prefix_ids,
                decision.tokens,
                decision.finished,
                decision.expected_reward,
                strict=True,
            ):
                ids = result.prefixes[i].token_ids[:tokens] if i >= 0 else ()
                assert found == pytest.approx(
                    window_means(lm, result.prompt, ids, finished, config.window)[0], abs=1e-4
                )
    assert deep
    assert {reason for reason, _ in kinds} >= (
        {"stop", "paused"} if config.strategy == "zip_rc" else {"stop"}
    )
    assert any(forked for _, forked in kinds) == (config.candidates == "branching")


def test_the_tokens_of_the_real_model_do_not_depend_on_batch_mates_or_the_pool(lm):
    config = dataclasses.replace(REAL, strategy="fixed")
    together = decode(lm, REAL_PROMPTS, config)
    narrow = decode(lm, REAL_PROMPTS[::-1], dataclasses.replace(config, max_num_seqs=4))[::-1]
    for a, b in zip(together, narrow, strict=True):
        assert [p.token_ids for p in a.prefixes] == [p.token_ids for p in b.prefixes]


@given(
    text=st.text(alphabet="a é数😀 ", min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 60)),
    family=st.sampled_from([chatml, gemma, llama]),
)
def test_streamed_text_waits_for_the_last_token_of_a_character(text, cuts, family):
    """Bytes are tokens of their own here, so that a decision may fall into the middle of a
    character."""
    tokenizer = family()
    ids = tuple(tokenizer.encode(text))
    branch, shown = Branch(0, ROOT, 0, None), []
    for end in sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)}):
        branch.tokens = ids[:end]
        shown.append(branch.new_text(tokenizer, last=end == len(ids)))
        assert tokenizer.decode(ids).startswith("".join(shown)), "never half a character"
    assert "".join(shown) == tokenizer.decode(ids)


def test_no_prefix_holds_an_id_that_is_not_the_tokenizers(lm):
    """Even when reserved and padding rows shout."""
    loud = dataclasses.replace(lm, params={**lm.params, "zip_rows": 50 + lm.params["zip_rows"]})
    for result in decode(loud, REAL_PROMPTS, dataclasses.replace(REAL, strategy="fixed")):
        assert max(max(p.token_ids) for p in result.prefixes) < lm.head.used_ids


@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2)])
def test_decoding_on_a_mesh_equals_one_device(lm, data, tensor):
    layout = Layout(make_mesh(data=data, tensor=tensor), DECODE_RULES)
    axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    meshed = dataclasses.replace(lm, layout=layout, params=layout.shard(lm.params, axes))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(meshed.params)} == {8}
    alone, spread = (
        decode(lm, REAL_PROMPTS, REAL),
        decode(meshed, REAL_PROMPTS, dataclasses.replace(REAL, max_num_seqs=8 * (REAL.n + 1))),
    )
    for a, b in zip(alone, spread, strict=True):
        assert exact(a) == exact(b)
        assert [p.expected_reward for p in a.prefixes] == pytest.approx(
            [p.expected_reward for p in b.prefixes], abs=1e-5
        )
        assert [d.utility for d in a.trace] == pytest.approx([d.utility for d in b.trace], abs=1e-5)
