"""The section `problems`: its short forms and mistakes, and the section `task` before it."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.problem_sources import gym
from zip_rc_jax.config import ProblemsConfig, SourceConfig, TrainConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.config.filters import Filter
from zip_rc_jax.data.problems import problem_set, with_seeds
from zip_rc_jax.runtime.errors import UsageError


@pytest.fixture
def load(tmp_path):
    def read(text, *overrides):
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml", overrides)

    return read


MINE = SourceConfig("jsonl:mine.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "problems: {train: jsonl:mine.jsonl}",
        "problems: {train: [jsonl:mine.jsonl]}",
        "problems: {train: {source: jsonl:mine.jsonl}}",
        "problems:\n  train:\n    - source: jsonl:mine.jsonl",
    ],
)
def test_a_source_is_a_text_an_object_or_a_list_of_them(load, text):
    assert (
        load(text).problems == ProblemsConfig(train=(MINE,)) == ProblemsConfig("jsonl:mine.jsonl")
    )


def test_the_command_line_replaces_sources_or_changes_one_of_them(load):
    text = "problems: {train: [jsonl:mine.jsonl, gym:gcd]}"
    assert load(text, "problems.train=csv:a.csv").problems.train == (SourceConfig("csv:a.csv"),)
    changed = load(text, "problems.train[1].count=5", "problems.train.filter=level > 2").problems
    assert changed.train == (
        SourceConfig("jsonl:mine.jsonl", filter="level > 2"),
        SourceConfig("gym:gcd", count=5),
    )
    same = load(text, "problems.heldout=${problems.train}", "problems.heldout[1].seed=7").problems
    assert same.heldout == (MINE, SourceConfig("gym:gcd", seed=7))
    with pytest.raises(UsageError, match=r"problems\.train.*2.*has 2 sources, counted from 0"):
        load(text, "problems.train[2].count=5")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mine.jsonl", r"'mine\.jsonl'.*: it is not one of gym:\.\.\., jsonl:.*Fix: write for"),
        ("'gym:'", r"it is not one of"),
        ("{source: jsonl:a, sourc: b}", r"problems\.train\[0\]\.sourc.*did you mean 'source'"),
        ("{source: jsonl:a, weight: 0}", r"weight=0.*it is a share.*number > 0"),
        ("{source: jsonl:a, weight: .inf}", r"weight=inf.*use a finite number"),
        ("{source: jsonl:a, count: -1}", r"count=-1"),
        ("{source: jsonl:a, count: x}", r"count='x'.* is not a whole number"),
        ("{source: jsonl:a, shuffle: x}", r"shuffle='x'.*whole number"),
        ("{source: jsonl:a, answer_from: last}", r"answer_from.*auto, text, hash, boxed"),
        ("{source: jsonl:a, question: 5}", r"question=5 of a problem source.*: it is no text"),
        ("{source: jsonl:a, split: test}", r"split='test'.*only hf:\.\.\. and tfds:\.\.\. have"),
        ("{source: jsonl:a, seed: 5}", r"seed=5.*only generators .* have it"),
        ("{source: gym:gcd, filter: level > 2}", r"filter=.*generated problems have no such"),
        ("{source: gym:gcd, levels: [1]}", r"levels\[0\]=1.*no object of options"),
        ("{source: gym:gcd, span: 0}", r"span=0"),
        ("[[gym:gcd]]", r"problems\.train\[0\]=.*no source of problems"),
        ("{source: jsonl:a, filter: 'len(question) > 5'}", r"'len\(question\)'.*no comparison"),
    ],
)
def test_an_impossible_source_names_value_reason_and_fix(load, source, message):
    with pytest.raises(UsageError, match=message):
        load(f"problems: {{train: {source}}}")


def test_overlap_and_ngram_are_checked():
    with pytest.raises(UsageError, match="overlap='warn': it must be one of drop, refuse, keep"):
        ProblemsConfig(overlap="warn")
    with pytest.raises(UsageError, match=r"ngram=2: so few words in a row are in many texts"):
        ProblemsConfig(ngram=2)


# The section `task` of 0.2.


@pytest.mark.filterwarnings("ignore:task was renamed")
@pytest.mark.parametrize("seeds", [{}, {"heldout_seed": 3_000_000_000}, {"train_seed": 70}])
def test_a_section_task_becomes_the_same_problems(load, seeds):
    levels = ({"min_terms": 2, "max_terms": 2}, {"name": "gcd"}, {"min_terms": 4, "max_terms": 4})
    written = ", ".join(f"{k}: {v}" for k, v in seeds.items())
    old = load(
        f"task: {{name: chain_sum, levels: [{{min_terms: 2, max_terms: 2}}, {{name: gcd}}, "
        f"{{min_terms: 4, max_terms: 4}}]{', ' if written else ''}{written}}}"
    ).problems
    wanted = gym("chain_sum", levels, **seeds)
    assert old == wanted
    assert problem_set(old, "heldout", 9).problems == problem_set(wanted, "heldout", 9).problems
    if not seeds:
        today = ProblemsConfig(SourceConfig("gym:chain_sum", levels=levels))
        assert with_seeds(today).heldout == old.heldout


def test_a_section_task_warns_and_does_not_mix_with_problems(load):
    with pytest.warns(DeprecationWarning, match="task was renamed to problems.*next release"):
        found = load("task: {name: gcd}", "task.heldout_seed=5000000000").problems
    assert (found.train[0].source, found.heldout[0].seed) == ("gym:gcd", 5_000_000_000)
    with pytest.raises(UsageError, match=r"task\.name with a section problems.*two names of one"):
        load("problems: {train: gym:gcd}", "task.name=lcm")
    with (
        pytest.warns(DeprecationWarning, match="task was renamed"),
        pytest.raises(UsageError, match=r"task\.nam.*did you mean 'name'"),
    ):
        load("task: {nam: gcd}")


# How much is trained on.


def test_steps_or_epochs_is_given_and_the_later_one_counts(load):
    text = "critic: {steps: 12}\nfinal: {epochs: 2}"
    config = load(text)
    assert (config.critic.steps, config.critic.epochs) == (12, 0)
    assert (config.final.steps, config.final.epochs) == (0, 2)
    config = load(text, "critic.epochs=1.5", "final.steps=7")
    assert (config.critic.steps, config.critic.epochs) == (0, 1.5)
    assert (config.final.steps, config.final.epochs) == (7, 0)
    with pytest.raises(UsageError, match=r"steps=3 with epochs=2.*Fix: set steps=0"):
        load("critic: {steps: 3, epochs: 2}")
    with pytest.raises(UsageError, match="epochs=-1"):
        TrainConfig(steps=0, epochs=-1)


def test_null_takes_all_problems(load):
    config = load("rollout: {prompts: null}\nevaluate: {prompts: 5}", "evaluate.prompts=null")
    assert (config.rollout.prompts, config.evaluate.prompts) == (0, 0)


# Filters.


@pytest.mark.parametrize(
    ("text", "row", "wanted"),
    [
        ("level >= 4", {"level": 4}, True),
        ("1 < level <= 3", {"level": 4}, False),
        ("subject in ['Algebra', 'Geometry'] and not level == 2", {"subject": "Algebra"}, True),
        ("subject not in ['Algebra']", {"subject": "Algebra"}, False),
        ("answer is not None or level == -1", {"level": -1}, True),
        ("'cat' in question", {"question": "a cat"}, True),
    ],
)
def test_a_filter_compares_columns_with_literals(text, row, wanted):
    assert Filter.parse(text)(row) is wanted


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "question.upper() == 'A'",
        "question[0] == 'A'",
        "[x for x in question]",
        "lambda: 1",
        "a := 1",
        "f'{question}'",
        "level + 1 > 2",
        "level >",
        "x" * 3000,
        "(" * 500 + "1" + ")" * 500,
        "b'a' == question",
    ],
)
def test_a_filter_of_anything_else_is_refused(text):
    with pytest.raises(UsageError, match="Fix: compare columns with") as caught:
        Filter.parse(text)
    assert len(str(caught.value)) < 900


VALUES = st.one_of(st.integers(-3, 3), st.booleans(), st.none())
NAMES = st.sampled_from(["level", "count"])
COMPARED = st.tuples(NAMES, st.sampled_from(["==", "!=", "in", "not in"]), VALUES).map(
    lambda x: f"{x[0]} {x[1]} {f'[{x[2]}, 1]' if 'in' in x[1] else x[2]}"
)
EXPRESSIONS = st.recursive(
    COMPARED,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join).map("({})".format),
        inner.map("not ({})".format),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, VALUES, VALUES)
def test_a_filter_is_what_python_makes_of_it(text, level, count):
    row = {"level": level, "count": count}
    code = compile(ast.parse(text, mode="eval"), "filter", "eval")
    assert Filter.parse(text)(row) == bool(eval(code, {"__builtins__": {}}, row))
