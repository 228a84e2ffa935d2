"""What counts as a held-out question in the training problems: against a slow reference."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.problem_sources import gym_problems
from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.data.problems import problem_set
from zip_rc_jax.data.problems.overlap import CONTAINED, HeldOut, question_tokens
from zip_rc_jax.runtime.errors import UsageError

CITY = (
    "A fog bank rolls in from the ocean to cover a city. It takes 10 minutes to cover every 3 "
    "miles of the city. If the city is 42 miles across, how many minutes will it take to cover it?"
)


def reference(held, question, n):
    """The rules of the module, word by word: the first held-out question that is repeated."""
    tokens = question_tokens(question)
    others = [question_tokens(text) for text in held]
    if tokens in others:
        return others.index(tokens)

    def grams(text):
        return {text[i : i + n] for i in range(len(text) - n + 1)}

    def signs(text):
        return [token for token in text if not token[0].isalpha()]

    for number, other in enumerate(others):
        if others.index(other) != number or not grams(other):
            continue
        share = len(grams(other) & grams(tokens)) / len(grams(other))
        mine, long = signs(other), signs(tokens)
        run = any(long[i : i + len(mine)] == mine for i in range(len(long) - len(mine) + 1))
        if share >= CONTAINED and run:
            return number
    return -1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is  3 + 4?", "what is 3 + 4"),
        ("Find $x^2$ \\left( y \\right)", "find x^2(y)"),
        ("He has 1,000 apples; she has 2.", "He has 1000 apples, she has 2"),
        ("\uff17 \u2212 2", "7 - 2"),
        ('"Wow!" she said.', "wow she said"),
    ],
)
def test_case_spaces_punctuation_and_forms_of_characters_make_no_other_question(a, b):
    assert question_tokens(a) == question_tokens(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("(2 + 3) * 4", "2 + 3 * 4"),
        ("4 + 3 - 2", "4 - 3 + 2"),
        ("What is 5!", "What is 5"),
        ("3.5 apples", "35 apples"),
        ("(1,2)", "(12)"),
        ("x < 2", "x > 2"),
    ],
)
def test_digits_operators_and_brackets_make_another_question(a, b):
    assert question_tokens(a) != question_tokens(b)


WORDS = st.lists(st.sampled_from(["the", "cat", "has", "7", "12", "+", "apples"]), max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, min_size=1, max_size=5))
def test_the_fast_comparison_follows_the_rules_of_the_slow_one(held, asked):
    held, asked = ([" ".join(words) for words in texts] for texts in (held, asked))
    found = HeldOut(held, 4).repeated_by(asked)
    wanted = [reference(held, text, 4) for text in asked]
    assert found.of.tolist() == wanted
    assert found.equal + found.contained == sum(x >= 0 for x in wanted)


def test_a_question_inside_a_longer_text_or_with_a_changed_word_is_found():
    held = HeldOut([CITY])
    texts = [
        f"Solve the task. {CITY} Put the answer into \\boxed.",
        CITY.replace("fog bank", "cloud bank"),
        CITY.upper(),
        CITY.replace("42", "45"),  # the template with other numbers has another answer
        "How many minutes will it take to cover it?",
    ]
    found = held.repeated_by(texts)
    assert found.any.tolist() == [True, True, True, False, False]
    assert (found.equal, found.contained) == (1, 2)
    assert held.seen_in(texts).tolist() == [True]
    assert held.seen_in(texts[3:]).tolist() == [False]
    assert not HeldOut([CITY], ngram=0).repeated_by(texts[:2]).any.any()


@pytest.mark.parametrize("name", ["gsm_symbolic", "chain_sum"])
def test_templates_are_not_dropped_for_their_words(name):
    """The same sentences with other numbers: only equal questions go, whatever they share."""
    held = gym_problems(name, "heldout", 120)
    train = gym_problems(name, "train", 240)
    found = HeldOut([p.question for p in held]).repeated_by([p.question for p in train])
    assert found.contained <= 2
    assert not found.any.all()
    assert found.equal == sum(
        question_tokens(p.question) in {question_tokens(q.question) for q in held} for p in train
    )


def test_many_questions_of_one_template_are_compared_with_many():
    """The worst case: a comparison of all pairs of texts would take hours."""
    rng = random.Random(0)
    texts = [
        f"Tom has {rng.randrange(10**6)} apples and gives {rng.randrange(10**6)} of them to his "
        f"friend {rng.choice('ABCDEF')}. How many apples does he have left in the end?"
        for _ in range(22_000)
    ]
    held, asked = texts[:2000], texts[2000:]
    found = HeldOut(held).repeated_by([*asked, held[5]])
    assert found.of[-1] == 5
    assert found.any.sum() == 1


def written(path, rows):
    import json

    path.write_text("\n".join(json.dumps({"question": q, "answer": 1}) for q in rows))
    return f"jsonl:{path}"


def test_overlaps_are_dropped_refused_or_kept_and_counted_in_each_case(tmp_path):
    train = written(tmp_path / "train.jsonl", ["a?", "B!", f"Solve: {CITY}", "c?"])
    held = written(tmp_path / "held.jsonl", ["b", CITY])
    config = ProblemsConfig(train, held)
    avoid = problem_set(config, "heldout").problems
    found = problem_set(config, "train", avoid=avoid)
    assert [p.question for p in found.problems] == ["a?", "c?"]
    assert [p.index for p in found.problems] == [0, 1]
    (source,) = found.record["sources"]
    assert (source["repeat_heldout"], source["contain_heldout"]) == (1, 1)
    with pytest.raises(UsageError, match=r"3 problems: .*\(without 2 held-out ones\) has 2"):
        problem_set(config, "train", 3, avoid=avoid)
    kept = problem_set(ProblemsConfig(train, held, overlap="keep"), "train", avoid=avoid)
    assert len(kept) == 4
    assert (kept.record["repeat_heldout"], kept.record["contain_heldout"]) == (1, 1)
    with pytest.raises(UsageError, match=r"2 of 4 training problems: they are held-out.*'B!'"):
        problem_set(ProblemsConfig(train, held, overlap="refuse"), "train", avoid=avoid)
    same = ProblemsConfig(held, held)
    with pytest.raises(UsageError, match="every problem of it is a held-out one"):
        problem_set(same, "train", avoid=avoid)


def test_a_generator_makes_others_in_the_place_of_held_out_ones():
    levels = ({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},)
    config = ProblemsConfig(SourceConfig("gym:chain_sum", levels=levels))
    avoid = problem_set(config, "heldout", 40).problems
    found = problem_set(config, "train", 60, avoid=avoid)
    assert len(found) == 60
    held = {p.question for p in avoid}
    assert not {p.question for p in found.problems} & held
    everything = problem_set(config, "train", 200).problems
    fresh = [p.seed for p in everything if p.question not in held]
    assert [p.seed for p in found.problems] == fresh[:60]
    assert problem_set(config, "train", 7, avoid=avoid).problems == found.problems[:7]
    avoid = problem_set(config, "heldout", 3000).problems
    with pytest.raises(UsageError, match=r"that it made are held-out questions.*overlap=keep"):
        problem_set(config, "train", 60, avoid=avoid)
    assert np.all(HeldOut([p.question for p in avoid]).seen_in([p.question for p in avoid]))
