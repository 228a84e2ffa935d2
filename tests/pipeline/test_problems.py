"""What is trained on and what is evaluated on: told, compared, and never silently something
else."""

from __future__ import annotations

import dataclasses
import json

import pytest

from harness.problem_sources import gym, gym_problems
from harness.rollouts import make_rollouts
from zip_rc_jax.config import (
    EvaluateConfig,
    PipelineConfig,
    PolicyConfig,
    ProblemsConfig,
    RolloutConfig,
    SourceConfig,
)
from zip_rc_jax.data.problems import hub, problem_set
from zip_rc_jax.data.rollouts import write_rollouts
from zip_rc_jax.grading.summary import summarize
from zip_rc_jax.pipeline import problems as problems_module
from zip_rc_jax.pipeline import rollouts as rollouts_module
from zip_rc_jax.pipeline.problems import (
    evaluation_problems,
    protected,
    readable,
    trained_on,
    training_problems,
)
from zip_rc_jax.pipeline.rollouts import make_rollouts as rollout_stage
from zip_rc_jax.runtime.errors import UsageError


def jsonl(path, questions, answer="1"):
    rows = [json.dumps({"question": q, "answer": answer}) for q in questions]
    path.write_text("\n".join(rows) + "\n")
    return f"jsonl:{path}"


def run_of(tmp_path, problems, data=None, questions=()):
    """A run directory as training leaves it: the record of `final`, and rollouts of questions."""
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    settings = {"source": {"data": {"graded": {"rollouts": data}}}} if data else {}
    (run / "final" / "settings.json").write_text(json.dumps(settings))
    if questions:
        made = [
            dataclasses.replace(r, question=q, response="x")
            for r, q in zip(make_rollouts(len(questions)), questions, strict=True)
        ]
        write_rollouts(run / "rollouts", made, metadata={})
    return PipelineConfig(run_dir=str(run), problems=problems, evaluate=EvaluateConfig(prompts=0))


def test_an_evaluation_on_the_held_out_seeds_of_the_training_says_so(tmp_path):
    problems = ProblemsConfig("gym:gcd")
    record = problem_set(problems, "train", 30).record
    config = run_of(tmp_path, problems, {"problems": record})
    config = dataclasses.replace(config, evaluate=EvaluateConfig(prompts=6))
    found = evaluation_problems(config)
    assert found.notes == (
        "trained on 30 problems of gym:gcd, evaluated on 6 held-out problems of the same",
    )
    assert list(found.found.problems) == gym_problems("gcd", "heldout", 6)


def test_an_evaluation_on_another_source_says_so_and_counts_what_was_trained_on(tmp_path):
    held = jsonl(tmp_path / "held.jsonl", ["a?", "b?", "c?"])
    train = ProblemsConfig("gym:gcd")
    record = problem_set(train, "train", 30).record
    config = run_of(
        tmp_path, ProblemsConfig("gym:gcd", held), {"problems": record}, ["x?", "B?", "y?"]
    )
    found = evaluation_problems(config)
    assert found.notes[0] == (
        f"trained on 30 problems of gym:gcd, evaluated on 3 problems of {held}"
    )
    assert found.notes[1].startswith("warning: 1 of 3 held-out problems were trained on, such as ")
    assert found.record["seen_in_training"] == 1
    assert found.record["trained"]["sources"] == ["gym:gcd"]
    refusing = dataclasses.replace(config.problems, overlap="refuse")
    with pytest.raises(UsageError, match=r"1 of 3 held-out problems were trained on: such as"):
        evaluation_problems(dataclasses.replace(config, problems=refusing))


def test_rollouts_from_elsewhere_are_never_evaluated_on_generators_without_a_word(tmp_path):
    """Once `zip-rc evaluate` reported on chain sums after training on `data=theirs.parquet`."""
    config = run_of(tmp_path, ProblemsConfig("gym:chain_sum"), {"parquet": "d1ge5t"})
    config = dataclasses.replace(config, evaluate=EvaluateConfig(prompts=5))
    with pytest.raises(
        UsageError,
        match=r"was trained on the rollouts of a Parquet table \(digest d1ge5t\), not on "
        r"problems\.train \(gym:chain_sum\)\. Fix: set problems\.heldout",
    ):
        evaluation_problems(config)
    with pytest.raises(UsageError, match=r"data='theirs\.parquet'.*are those of that file"):
        evaluation_problems(dataclasses.replace(config, data="theirs.parquet"))
    held = dataclasses.replace(config.problems, heldout=(SourceConfig("gym:gcd"),))
    found = evaluation_problems(dataclasses.replace(config, problems=held))
    assert found.notes == (
        "trained on the rollouts of a Parquet table (digest d1ge5t), evaluated on 5 problems of "
        "gym:gcd",
    )
    record = tmp_path / "run" / "final" / "trained_on.json"
    record.write_text(json.dumps({"data": "theirs.parquet"}))
    assert trained_on(config).title == "the rollouts of theirs.parquet (digest d1ge5t)"


def test_local_mistakes_are_found_before_the_network_is_asked(tmp_path, monkeypatch):
    """Also where the hub holds the held-out problems, which are read first otherwise."""
    monkeypatch.setattr(hub, "needs_network", lambda source: source.kind == "hf")
    monkeypatch.setattr(problems_module, "needs_network", lambda source: source.kind == "hf")
    monkeypatch.setattr(hub, "hub_rows", lambda _: pytest.fail("the hub was asked"))
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\n')
    heldout = SourceConfig("hf:openai/gsm8k/main", split="test")
    config = PipelineConfig(
        run_dir=str(tmp_path / "run"),
        problems=ProblemsConfig(f"jsonl:{tmp_path}/bad.jsonl", heldout),
    )
    with pytest.raises(UsageError, match="no column `answer`"):
        training_problems(config, 0)
    with pytest.raises(UsageError, match="no column `answer`"):
        evaluation_problems(config)


def test_without_a_held_out_source_there_is_no_evaluation_of_a_file(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", ["a?"])
    with pytest.raises(UsageError, match=r"problems\.heldout=\[\].*no other problems than those"):
        evaluation_problems(run_of(tmp_path, ProblemsConfig(train)))
    with pytest.raises(UsageError, match=r"problems\.heldout=\[\]: there are no problems"):
        evaluation_problems(PipelineConfig(run_dir=str(tmp_path / "run")))


def test_a_run_of_an_earlier_version_names_its_task(tmp_path):
    config = run_of(tmp_path, ProblemsConfig("gym:gcd"), {"task": {"name": "gcd", "levels": []}})
    found = trained_on(config)
    assert (found.sources, found.title) == (("gym:gcd",), "problems of gym:gcd")
    (tmp_path / "run" / "final" / "settings.json").write_text("{")
    assert trained_on(config) is None


def test_training_leaves_out_what_an_evaluation_would_take(tmp_path, capsys):
    train = jsonl(tmp_path / "train.jsonl", ["a?", "b?", "c?"])
    held = jsonl(tmp_path / "held.jsonl", ["B"])
    config = PipelineConfig(problems=ProblemsConfig(train, held))
    assert [p.question for p in training_problems(config, 0).problems] == ["a?", "c?"]
    said = capsys.readouterr()
    assert "1 training problems are held-out ones" in said.out + said.err
    generated = dataclasses.replace(config, problems=ProblemsConfig("gym:gcd"))
    assert protected(generated) == (), "how many will be taken is not known yet"


def test_answers_that_no_grader_can_read_are_found():
    answers = ["72", r"\frac{1}{2}", "(3, 4)", r"\text{Evelyn}", "x^2 + 1", "10%", "Monday", "{"]
    prose = (
        "First he buys seventy apples and then his sister gives him two more of her own, thus the "
        "total of all is seventy two."
    )
    assert readable([*answers, prose, r"\boxed{"]) == [True] * 7 + [False, False] + [
        readable([r"\boxed{"])[0]
    ]


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ({}, r"problems\.train=\[\]: there are no problems to work on"),
        ({"train": "jsonl:{}/none.jsonl"}, "there is no such file"),
        ({"train": "jsonl:{}/prose.jsonl"}, "no grader can read its answer"),
        ({"train": "jsonl:{}/same.jsonl", "heldout": "jsonl:{}/same.jsonl"}, "every problem of"),
        (
            {"train": "jsonl:{}/same.jsonl", "heldout": "jsonl:{}/same.jsonl", "overlap": "refuse"},
            "2 of 2 training problems: they are held-out ones",
        ),
    ],
)
def test_rollout_refuses_bad_problems_before_a_model_is_loaded(
    tmp_path, monkeypatch, problems, message
):
    jsonl(tmp_path / "same.jsonl", ["a?", "b?"])
    jsonl(tmp_path / "prose.jsonl", ["a?"], " ".join(["word"] * 30))
    monkeypatch.setattr(
        rollouts_module, "load_policy", lambda *_: pytest.fail("a model was loaded")
    )
    found = ProblemsConfig(**{k: v.format(tmp_path) for k, v in problems.items()})
    config = PipelineConfig(
        run_dir=str(tmp_path / "run"),
        problems=found,
        policy=PolicyConfig(path="embedded:chain_sum_policy"),
        rollout=RolloutConfig(prompts=0),
    )
    with pytest.raises(UsageError, match=message):
        rollout_stage(config)


def test_a_missing_policy_is_found_before_problems_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        rollouts_module, "training_problems", lambda *_: pytest.fail("problems were read")
    )
    config = PipelineConfig(run_dir=str(tmp_path / "run"), problems=gym("gcd"))
    for path, message in (("", r"policy\.path=''"), ("./no/model", "there is no such file")):
        policy = PolicyConfig(path=path)
        with pytest.raises(UsageError, match=message):
            rollout_stage(dataclasses.replace(config, policy=policy))


def test_grades_are_counted_by_the_names_of_levels():
    names = ("Level 2", "Algebra", "3", "")
    made = [
        dataclasses.replace(r, task="math", level=i, level_name=name, response="x", correct=1.0)
        for i, (r, name) in enumerate(zip(make_rollouts(4), names, strict=True))
    ]
    assert (
        list(summarize(made))
        == [
            "",
            "math Level 2",
            "math Algebra",
            "math level 3",
            "math level 3",
        ][:4]
    )
