"""Generated problems: reproducible, disjoint between splits and levels, and loud about
mistakes."""

from __future__ import annotations

import json
import time

import pytest
import reasoning_gym

from harness.problem_sources import gym, gym_problems
from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.data.problems import problem_set, with_seeds
from zip_rc_jax.runtime.errors import UsageError

SPLITS = ("train", "heldout")
LEVELS = (
    {"min_terms": 2, "max_terms": 2},
    {"min_terms": 4, "max_terms": 4},
    {"min_terms": 6, "max_terms": 6},
)
TASK = gym(levels=LEVELS, train_seed=10, heldout_seed=10_000)


def test_levels_take_turns_and_have_their_own_options():
    for i, problem in enumerate(gym_problems(TASK, "train", 10)):
        assert (problem.index, problem.level, problem.task) == (i, i % 3, "chain_sum")
        terms = problem.question.split(": ")[1].removesuffix(" =").split()[::2]
        assert len(terms) == LEVELS[i % 3]["min_terms"]


@pytest.mark.parametrize("name", ["chain_sum", "countdown", "list_functions", "gsm_symbolic"])
def test_a_problem_is_the_entry_that_it_refers_to(name):
    """Also for datasets that draw something once for all their entries, where the seed of one entry
    is not enough."""
    for problem in gym_problems(name, "heldout", 4):
        reference = json.loads(problem.entry_json)
        dataset = reasoning_gym.create_dataset(
            name, seed=reference["seed"], size=reference["index"] + 1, **reference["options"]
        )
        entry = dataset[reference["index"]]
        assert (problem.question, problem.answer) == (entry["question"], str(entry["answer"]))
        assert problem.seed == reference["seed"] + reference["index"]


def test_the_first_problems_do_not_depend_on_how_many_are_asked_for():
    assert gym_problems(TASK, "train", 50)[:7] == gym_problems(TASK, "train", 7)


@pytest.mark.parametrize(("train_seed", "heldout_seed"), [(10, 10_000), (10_000, 10)])
def test_no_seed_is_shared_between_splits_or_levels(train_seed, heldout_seed):
    problems = gym("chain_sum", LEVELS, train_seed, heldout_seed)
    most = abs(heldout_seed - train_seed) // 3 * 3
    seeds = [p.seed for split in SPLITS for p in gym_problems(problems, split, most)]
    assert len(set(seeds)) == len(seeds) == 2 * most
    with pytest.raises(
        UsageError, match=r"3 levels have 3330 seeds each, and 3331 are .*Fix: set span to 9993"
    ):
        gym_problems(problems, "train", most + 1)


def test_held_out_seeds_and_those_of_examples_follow_where_none_are_given():
    """The seeds of 0.2: training from 0, evaluation from 1,000,000,000."""
    seeded = with_seeds(ProblemsConfig("gym:gcd", examples="gym:gcd"))
    found = [getattr(seeded, split)[0] for split in (*SPLITS, "examples")]
    assert [(s.source, s.seed) for s in found] == [
        ("gym:gcd", 0),
        ("gym:gcd", 1_000_000_000),
        ("gym:gcd", 2_000_000_000),
    ]
    mixed = with_seeds(
        ProblemsConfig((SourceConfig("gym:gcd", seed=5), SourceConfig("gym:lcm", seed=25)))
    )
    assert [s.seed for s in mixed.heldout] == [1_000_000_025, 1_000_000_045]
    other = with_seeds(ProblemsConfig("gym:gcd", "gym:gcd"))
    assert other.heldout[0].seed == 1_000_000_000, "the same generator gets other seeds"
    with pytest.raises(UsageError, match=r"heldout gym:gcd with seed=7.*training has seeds 0 to"):
        with_seeds(ProblemsConfig("gym:gcd", SourceConfig("gym:gcd", seed=7)))


def test_fifty_thousand_problems_take_seconds():
    start = time.process_time()
    assert len(gym_problems(gym(levels=LEVELS), "train", 50_000)) == 50_000
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("source", "count", "message"),
    [
        ({"source": "gym:chain_sums"}, 3, "no such dataset.*did you mean 'chain_sum'"),
        (
            {"levels": ({"min_term": 2},)},
            3,
            "'min_term' of chain_sum.*did you mean 'min_terms'",
        ),
        ({"levels": ({"seed": 2},)}, 3, "'seed'.*remove it"),
        ({"levels": ({"min_terms": 5, "max_terms": 2},)}, 3, "max_terms must be >= min_terms"),
        ({"levels": ({"min_terms": "two"},)}, 3, "levels.*two"),
        # passes reasoning-gym's own validation
        ({"levels": ({"min_digits": 1.5},)}, 3, "levels.*1.5"),
        ({"seed": -5}, 3, "ignores the sign"),
        ({"count": -1}, 3, "count=-1"),
        ({}, 0, "a generator has no end.*Fix: say how many: rollout.prompts"),
        ({"count": 5}, 6, "6 problems: gym:chain_sum has 5"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mistakes_are_named_with_their_fix(source, count, message):
    with pytest.raises(UsageError, match=message):
        problem_set(
            ProblemsConfig(SourceConfig(**{"source": "gym:chain_sum", **source})), "train", count
        )


def test_an_unknown_split_or_a_negative_number_is_refused():
    with pytest.raises(UsageError, match="split='test'.*train, heldout"):
        problem_set(TASK, "test", 3)
    with pytest.raises(UsageError, match="count=-1"):
        problem_set(TASK, "train", -1)


def test_problems_that_no_other_process_can_repeat_are_refused(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UsageError, match=r"hash seed.*set PYTHONHASHSEED=0"):
        gym_problems("word_ladder")
