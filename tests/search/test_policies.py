"""A policy or a utility of one's own takes the place of the built-in ones, and a wrong one is
refused by name."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.engines import BRANCHING, CONFIG, MIXED
from harness.scripted import ScriptedNetwork
from zip_rc_jax.config import DecodeConfig, to_dict
from zip_rc_jax.config.plugins import POLICIES
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search import (
    MetaAction,
    SearchInputs,
    choose_meta_action,
    decide,
    register_policy,
    register_utility,
    search,
    search_inputs,
)
from zip_rc_jax.search.utility import candidate_utility, expected_compute, expected_max

GRID = Grid((0.0, 0.5, 1.0), (0, 8, 16, 64))
SMALL = DecodeConfig(n=4, alpha=0.3, beta=0.1)


def groups(prompts=5, slots=4, seed=0):
    """Joint, unfinished, tokens so far."""
    rng = np.random.default_rng(seed)
    joint = (
        rng.dirichlet(np.full(GRID.n_cells, 0.4), (prompts, slots))
        .reshape(prompts, slots, 3, 3)
        .astype(np.float32)
    )
    return joint, rng.random((prompts, slots)) < 0.7, rng.integers(0, 40, (prompts, slots))


def inputs(config=SMALL, **options) -> SearchInputs:
    return search_inputs(*groups(), grid=GRID, config=config, **options)


def decode(strategy, config=CONFIG, prompts=("x y",), **options):
    engine = Engine(
        MIXED.lm(), dataclasses.replace(config, strategy=strategy, **options), 0, ScriptedNetwork()
    )
    return [e.result for e in engine.run(list(prompts)) if isinstance(e, ResultEvent)]


def only_the_first(inputs, *, grid, config):
    """Extends the first live prefix, and keeps what has finished."""
    first = inputs.live & (np.cumsum(inputs.live, 1) == 1)
    return MetaAction.of((first & ~inputs.finished.any(1, keepdims=True)) | inputs.finished)


def two_then_a_fork(inputs, *, grid, config):
    """From the root two samples, and a copy of the first as soon as there is room."""
    assert inputs.has_root
    live = inputs.live & ~inputs.is_root
    multiplicity = (live | inputs.finished).astype(np.int32)
    for p in range(len(multiplicity)):
        if not inputs.exists[p, :-1].any():
            multiplicity[p, -1] = min(2, inputs.max_new_prefixes[p])
        elif live[p, 0] and inputs.exists[p, :-1].sum() == 2:
            multiplicity[p, 0] = 2
    return MetaAction.of(multiplicity)


# ---- a policy of one's own


def test_a_policy_of_ones_own_decides_every_decision_of_a_decode():
    (result,) = decode(only_the_first)
    lengths = [len(p.token_ids) for p in result.prefixes]
    assert lengths[0] > 0
    assert lengths[1:] == [0, 0, 0]
    assert result.prefix_id == 0
    assert all(d.multiplicity[1:] == (0, 0, 0) for d in result.trace)


def test_a_policy_of_ones_own_starts_samples_from_the_root_and_forks():
    (result,) = decode(two_then_a_fork, BRANCHING)
    assert [p.parent for p in result.prefixes] == [-1, -1, 0]
    assert result.prefixes[2].fork_position == CONFIG.interval
    assert result.trace[0].prefix_ids == (-1,)


def test_a_name_a_path_and_the_function_itself_are_the_same_policy():
    name = "the_first_alone"
    assert register_policy(name)(only_the_first) is only_the_first
    sys.modules["a_module_of_mine"] = sys.modules[__name__]
    try:
        decisions = [
            decide(
                inputs(), grid=GRID, config=dataclasses.replace(SMALL, strategy=strategy)
            ).multiplicity.tolist()
            for strategy in (only_the_first, name, "a_module_of_mine:only_the_first")
        ]
    finally:
        del sys.modules["a_module_of_mine"]
    assert decisions[0] == decisions[1] == decisions[2]
    assert name in POLICIES.names


def test_a_jitted_policy_and_a_policy_with_settings_are_functions_like_any_other():
    @jax.jit
    def all_live(inputs):
        return MetaAction(inputs.exists.astype(jnp.int32), jnp.full(5, -1), jnp.zeros(5))

    @dataclasses.dataclass(frozen=True)
    class Longest:
        tokens: int

        def __call__(self, inputs, *, grid, config):
            return MetaAction.of(
                (inputs.live & (inputs.tokens_so_far < self.tokens)) | inputs.finished
            )

    def traced(inputs, *, grid, config):
        return all_live(inputs)

    assert decide(
        inputs(), grid=GRID, config=dataclasses.replace(SMALL, strategy=traced)
    ).multiplicity.all()
    mine = decide(inputs(), grid=GRID, config=dataclasses.replace(SMALL, strategy=Longest(20)))
    budget = dataclasses.replace(SMALL, strategy="length_budget", length_budget=20)
    own, builtin = mine.multiplicity, decide(inputs(), grid=GRID, config=budget).multiplicity
    finished = inputs().finished.any(1)
    np.testing.assert_array_equal(own[finished], builtin[finished])


def test_the_adaptive_search_is_a_policy_like_the_others():
    given = inputs()
    expected = choose_meta_action(*groups(), grid=GRID, config=SMALL)
    for action in (search(given, grid=GRID, config=SMALL), decide(given, grid=GRID, config=SMALL)):
        np.testing.assert_array_equal(action.multiplicity, expected.multiplicity)
        np.testing.assert_array_equal(action.utility, expected.utility)


# ---- what a policy must not return


def returns(change):
    """A policy whose decision would be right but for `change(multiplicity, inputs)`."""

    def policy(inputs, *, grid, config):
        return change((inputs.live | inputs.finished).astype(np.int32), inputs)

    return policy


def with_value(p, slot, value):
    def change(multiplicity, inputs):
        multiplicity[p, slot] = value
        return MetaAction.of(multiplicity)

    return returns(change)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (returns(lambda m, _: m), r"returned a ndarray: a decision is a "
                                  r"MetaAction.*MetaAction\.of"),
        (returns(lambda m, _: None), r"returned a NoneType"),
        (returns(lambda m, _: MetaAction.of(m[:, :3])), r"multiplicity of shape \(5, 3\): the "
                                                        r"inputs have \(5, 4\)"),
        (returns(lambda m, _: MetaAction.of(m * 0.5)), r"multiplicity of dtype float64: it holds "
                                                       r"whole numbers"),
        (returns(lambda m, _: MetaAction(m, np.zeros(4, int), np.zeros(5))),
        r"planned_pause_bin of shape \(4,\)"),
        (returns(lambda m, _: MetaAction(m, np.full(5, 3), np.zeros(5))),
        r"planned_pause_bin 3: the grid has bins 0 to 2"),
        (returns(lambda m, _: MetaAction(m, np.zeros(5, int), np.zeros(5, int))),
        r"utility of dtype int64"),
        (with_value(1, 2, -1), r"multiplicity -1 for prefix 2 of prompt 1: it counts copies"),
        (with_value(3, 1, 1), r"multiplicity 1 for prefix 1 of prompt 3: the slot is empty"),
        (with_value(0, 0, 2), r"multiplicity 2 for prefix 0 of prompt 0: the prefix has finished"),
        (with_value(2, 0, 2), r"adds 1 prefixes to prompt 2: max_new_prefixes allows "
                              r"0.*candidates='branching'"),
        (returns(lambda m, i: MetaAction.of(i.finished)), r"extends nothing of prompt 4: none of "
                                                          r"its prefixes has finished"),
    ],
)  # fmt: skip
def test_a_decision_that_no_decoder_can_carry_out_is_refused_by_name(policy, message):
    joint, unfinished, tokens = groups()
    unfinished[:] = True
    unfinished[0] = False
    exists = np.ones((5, 4), bool)
    exists[3, 1] = False
    must = np.arange(5) == 4
    given = search_inputs(
        joint,
        unfinished,
        tokens,
        grid=GRID,
        config=SMALL,
        exists=exists,
        must_extend=must,
        max_new_prefixes=np.zeros(5, int),
    )
    with pytest.raises(UsageError, match=r"^policy .*" + message) as refusal:
        decide(given, grid=GRID, config=dataclasses.replace(SMALL, strategy=policy))
    assert "Fix: " in str(refusal.value)


def test_a_wrong_decision_ends_the_decode_before_any_step():
    calls = []

    def wrong(inputs, *, grid, config):
        calls.append(1)
        return MetaAction.of(-np.ones(inputs.exists.shape, int))

    with pytest.raises(UsageError, match="multiplicity -1 for prefix 0 of prompt 0"):
        decode(wrong)
    assert calls == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "half_finishd"},
            r"strategy='half_finishd': it must be one of zip_rc, fixed.*did you mean "
            r"'half_finished'",
        ),
        (
            {"strategy": lambda inputs: None},
            r"strategy=<function.*it cannot be called with \(inputs, \*, grid, config\)",
        ),
        ({"strategy": 3}, r"strategy=3: it is neither a name nor a function"),
        (
            {"strategy": "no_such_module_here:policy"},
            r"strategy='no_such_module_here:policy': importing it fails \(ModuleNotFoundError",
        ),
        (
            {"strategy": "math:policy"},
            r"strategy='math:policy': importing it fails \(AttributeError",
        ),
        ({"utility": "samplng"}, r"utility='samplng'.*did you mean 'sampling'"),
        (
            {"utility": lambda terms: 0},
            r"utility=<function.*cannot be called with \(terms, multiplicity, unfinished",
        ),
        (
            {"answer": "votes"},
            r"answer='votes': it must be one of value, vote.*did you mean 'vote'",
        ),
        ({"answer": lambda: None}, r"answer=<function.*cannot be called with \(prefixes\)"),
        ({"answer_extractor": 7}, r"answer_extractor=7"),
        (
            {"answer_equivalence": lambda a: True},
            r"answer_equivalence=<function.*cannot be called with \(a, b\)",
        ),
        ({"answer_equivalence": "textual"}, r"answer_equivalence='textual'.*grader, text"),
    ],
)
def test_a_setting_that_names_no_function_is_refused_when_it_is_made(options, message):
    with pytest.raises(UsageError, match=message) as refusal:
        DecodeConfig(**options)
    assert len(str(refusal.value)) <= 900


def test_two_functions_cannot_have_one_name():
    register_policy("mine_alone")(only_the_first)
    with pytest.raises(
        UsageError, match=r"strategy name 'mine_alone': another function has it already"
    ):
        register_policy("mine_alone")(two_then_a_fork)
    with pytest.raises(UsageError, match=r"strategy name 'fixed'"):
        register_policy("fixed")(only_the_first)
    with pytest.raises(UsageError, match=r"strategy name 'a:b'"):
        register_policy("a:b")


def test_a_file_records_a_function_by_its_name_and_refuses_one_without():
    def nameless(inputs, *, grid, config):
        return only_the_first(inputs, grid=grid, config=config)

    assert (
        to_dict(DecodeConfig(strategy=two_then_a_fork))["strategy"] == f"{__name__}:two_then_a_fork"
    )
    with pytest.raises(
        UsageError, match=r"strategy=<function.*no name leads back to this function"
    ):
        to_dict(DecodeConfig(strategy=nameless))
    register_policy("nameless")(nameless)
    assert to_dict(DecodeConfig(strategy=nameless))["strategy"] == "nameless"
    assert to_dict(DecodeConfig())["strategy"] == "zip_rc"


# ---- a utility of one's own


def value_less_tokens(
    terms, multiplicity, unfinished, *, alpha, beta, normalizer, selection_exponent, grid
):
    """E[max] less a fixed price per token. Neither the paper's latency nor its normalizer."""
    weights = multiplicity.astype(terms.value.dtype)
    return expected_max(terms.log_reward_cdf, weights, grid) - 0.004 * expected_compute(
        terms.length, weights * unfinished[:, None]
    )


def by_hand(joint, unfinished, keep):
    """`value_less_tokens` of one candidate without a planned pause, over all outcomes of the
    rewards."""
    best, tokens = np.zeros(3), 0.0
    best[0] = 1
    for i in np.flatnonzero(keep):
        reward = joint[i].sum(1)
        outer = np.outer(best, reward)
        best = np.array(
            [
                sum(outer[a, b] for a in range(3) for b in range(3) if max(a, b) == c)
                for c in range(3)
            ]
        )
        tokens += unfinished[i] * joint[i].sum(0) @ GRID.length_midpoints
    return best @ GRID.reward_centres - 0.004 * tokens


def test_a_utility_of_ones_own_is_what_the_search_maximizes():
    joint, unfinished, tokens = groups(seed=3)
    config = dataclasses.replace(SMALL, candidates="exhaustive", utility=value_less_tokens)
    action = choose_meta_action(joint, unfinished, tokens, grid=GRID, config=config)
    planless = np.asarray(action.planned_pause_bin) == -1
    assert planless.any()
    for p in np.flatnonzero(planless):
        subsets = [(np.arange(16)[k] >> np.arange(4)) & 1 for k in range(16)]
        candidates = [s | ~unfinished[p] for s in subsets]
        assert float(action.utility[p]) == pytest.approx(
            max(by_hand(joint[p], unfinished[p], c) for c in candidates), abs=1e-5
        )
    paper = choose_meta_action(
        joint, unfinished, tokens, grid=GRID, config=dataclasses.replace(config, utility="sampling")
    )
    assert (np.asarray(action.multiplicity) != np.asarray(paper.multiplicity)).any()


@pytest.mark.parametrize("candidates", ["published", "branching"])
def test_the_papers_utility_under_another_name_decides_the_same(candidates):
    joint, unfinished, tokens = groups()
    unfinished[:, -1] = True
    register_utility("copied")(candidate_utility)
    decisions = [
        choose_meta_action(
            joint,
            unfinished,
            tokens,
            grid=GRID,
            config=dataclasses.replace(SMALL, candidates=candidates, utility=u),
        )
        for u in ("sampling", "copied")
    ]
    np.testing.assert_array_equal(decisions[0].multiplicity, decisions[1].multiplicity)


def wrong_utility(change):
    @functools.wraps(value_less_tokens)
    def utility(*args, **prices):
        return change(value_less_tokens(*args, **prices))

    return utility


@pytest.mark.parametrize(
    ("utility", "message"),
    [
        (
            wrong_utility(lambda u: u[..., 0]),
            r"returned float32\[16, 17\]: every candidate has one floating number",
        ),
        (wrong_utility(lambda u: u > 0), r"returned bool\[16, 17, 3\]"),
        (wrong_utility(lambda u: u * np.asarray(u).mean()), r"JAX cannot trace it.*use jax\.numpy"),
        (
            wrong_utility(lambda u: u.at[2, 3, 1].set(jnp.nan)),
            r"it is NaN for a candidate of prompt 2",
        ),
    ],
)
def test_a_wrong_utility_is_refused_by_name(utility, message):
    with pytest.raises(UsageError, match=r"^utility <function .*" + message):
        choose_meta_action(*groups(), grid=GRID, config=dataclasses.replace(SMALL, utility=utility))


# ---- an answer of one's own


def shortest(prefixes):
    return min(
        (p for p in prefixes if p.state == "finished"), key=lambda p: len(p.token_ids), default=None
    )


def test_a_rule_of_ones_own_chooses_the_answer():
    (result,) = decode("fixed", answer=shortest)
    lengths = {p.id: len(p.token_ids) for p in result.prefixes}
    assert len(set(lengths.values())) > 1
    assert lengths[result.prefix_id] == min(lengths.values())
    (none,) = decode("fixed", answer=lambda prefixes: None)
    assert (none.text, none.prefix_id, none.finish_reason) == ("", -1, "abstain")


def test_an_answer_that_is_none_of_the_prefixes_is_refused_by_name():
    with pytest.raises(
        UsageError, match=r"answer <function .*it returned 'text', which is none of the prefixes"
    ):
        decode("fixed", answer=lambda prefixes: "text")


def test_a_vote_uses_the_extractor_and_the_equivalence_of_the_configuration():
    """Every text is an answer, and all are the same one: then the vote is won by the most valuable
    of all."""
    (all_same,) = decode(
        "fixed", answer="vote", answer_extractor=str, answer_equivalence=lambda a, b: True
    )
    assert all_same.vote_text == all_same.value_text == all_same.text
    (apart,) = decode("fixed", answer="vote", answer_extractor=lambda text: None)
    assert apart.vote_text == apart.value_text
