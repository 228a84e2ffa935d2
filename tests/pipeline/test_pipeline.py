"""The stages from policy to report on a random policy in seconds: files, resumption, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.problem_sources import gym, gym_problems
from zip_rc_jax.cli.evaluate import run_evaluation
from zip_rc_jax.config import PromptConfig, to_dict
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.rollouts import PartialRollouts, read_rollouts
from zip_rc_jax.data.worked_solutions import parse_question, vocabulary, write_solution
from zip_rc_jax.evaluation.rollout_predictions import final_values, predict_rollouts
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.pipeline.grade import make_grades
from zip_rc_jax.pipeline.label import make_labels
from zip_rc_jax.pipeline.parquet import asks_for_reasoning
from zip_rc_jax.pipeline.policy import LARGEST_NUMBER, make_policy, solution_rollouts
from zip_rc_jax.pipeline.rollouts import make_rollouts, sampling_layout
from zip_rc_jax.pipeline.run_dir import load_policy, run_directory
from zip_rc_jax.pipeline.seeds import with_own_samples
from zip_rc_jax.pipeline.train import train_stage
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.training import train_head
from zip_rc_jax.training.trainer import Interrupted

SMALL = [
    "mesh.fsdp=1",
    "policy.path=''",
    "model.n_layers=2",
    "policy.examples=256",
    "policy.train.steps=2",
    "policy.train.batch_rows=4",
    "rollout.prompts=24",
    "rollout.rows=8",
    "rollout.max_tokens=12",
    "critic.steps=3",
    "critic.batch_rows=4",
    "critic.eval_rollouts=8",
    "final.steps=3",
    "final.batch_rows=4",
    "final.eval_rollouts=8",
    "lite.steps=3",
    "lite.batch_rows=4",
    "lite.eval_rollouts=8",
    "decode.max_tokens=12",
    "decode.max_num_seqs=32",
    "evaluate.prompts=8",
    "evaluate.betas=[0.05]",
    "evaluate.bootstrap=50",
]


def small_config(directory, *overrides):
    policy = load_config("configs/chain_sum_policy.yaml").policy
    config = load_config(
        "configs/chain_sum_demo.yaml", [*SMALL, f"run_dir={directory}", *overrides]
    )
    train = dataclasses.replace(policy.train, steps=2, batch_rows=4)
    return dataclasses.replace(
        config, policy=dataclasses.replace(policy, path="", examples=256, train=train)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory after all stages, and its config."""
    config = small_config(tmp_path_factory.mktemp("run"))
    make_policy(config)
    make_rollouts(config)
    make_grades(config)
    train_stage(config, "critic")
    make_labels(config)
    train_stage(config, "final")
    train_stage(config, "lite")
    run_evaluation(config, ["evaluate"])
    return run_directory(config), config


def test_train_head_gives_the_model_of_the_stage_bit_for_bit(finished):
    """From the records alone, without a directory."""
    directory, config = finished
    lm = load_policy(config).with_head(config.grid.grid("correct"), "correct")
    trained = train_head(
        lm, read_rollouts(directory / "graded"), config.critic, validation_last=config.label.last
    )
    jax.tree.map(np.testing.assert_array_equal, trained.params, load(directory / "critic").params)


def test_rollouts_are_samples_of_the_training_problems(finished):
    directory, config = finished
    rollouts = read_rollouts(directory / "rollouts")
    found = gym_problems(config.problems, "train", 24)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [
        (p, s) for p in range(24) for s in range(2)
    ]
    tokenizer = load(directory / "policy").tokenizer
    for r in rollouts:
        assert r.prompt == found[r.prompt_index].question
        assert list(r.prompt_token_ids) == tokenizer.encode(r.prompt)
        assert r.response == tokenizer.decode(list(r.output_token_ids))
        assert len(r.output_token_ids) <= 12
        assert r.finished == (r.output_token_ids[-1] in tokenizer.eos_ids)


def test_value_labels_are_the_critics_mean_over_the_last_positions(finished):
    directory, config = finished
    rollouts = read_rollouts(directory / "labelled")
    found = predict_rollouts(load(directory / "critic"), rollouts, ScoringConfig(256))
    np.testing.assert_allclose(
        [r.value for r in rollouts], final_values(found, config.label.last), atol=1e-6
    )
    np.testing.assert_allclose(
        rollouts[0].value, found[0].reward[-config.label.last :].mean(), atol=1e-6
    )


def test_a_stage_can_start_from_the_rows_of_another(finished, tmp_path):
    directory, config = finished
    for stage in ("labelled", "lite", "critic", "policy"):
        (tmp_path / stage).symlink_to(directory / stage)
    warm = dataclasses.replace(
        config,
        run_dir=str(tmp_path),
        final=dataclasses.replace(config.final, rows_from="lite", learning_rate=1e-12),
    )
    rows = train_stage(warm, "final").params["zip_rows"]
    np.testing.assert_allclose(rows, load(directory / "lite").params["zip_rows"], atol=1e-9)
    other = dataclasses.replace(
        warm, run_dir=str(tmp_path / "other"), data=str(directory / "labelled")
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "policy").symlink_to(directory / "policy")
    with pytest.raises(UsageError, match="run `zip-rc train --stage lite` first"):
        train_stage(other, "final")
    (tmp_path / "other" / "critic").symlink_to(directory / "critic")
    with pytest.raises(UsageError, match="its head is .*correct"):
        train_stage(
            dataclasses.replace(other, final=dataclasses.replace(warm.final, rows_from="critic")),
            "final",
        )


def test_lite_moves_only_the_reserved_rows(finished):
    directory, _ = finished
    policy, lite = load(directory / "policy"), load(directory / "lite")
    for name in ("embed", "unembed", "final_norm"):
        used = policy.tokenizer.size
        np.testing.assert_array_equal(
            lite.params["body"][name][:used], policy.params["body"][name][:used]
        )
    assert np.any(np.asarray(lite.params["zip_rows"]) != 0)


def test_the_report_holds_what_it_promises(finished):
    directory, config = finished
    report = directory / "report"
    for name in ("report.html", "pareto.png", "results.jsonl", "pool.jsonl", "metadata.json"):
        assert (report / name).stat().st_size > 500, name
    rows = [json.loads(line) for line in (report / "results.jsonl").read_text().splitlines()]
    settings = (
        len(config.evaluate.alphas) * len(config.evaluate.betas) * len(config.evaluate.candidates)
        + 3
    )
    assert len(rows) == settings * 8
    metadata = json.loads((report / "metadata.json").read_text())
    assert metadata["drift"]["lite/kl_start_trained_per_token"] == 0
    assert metadata["drift"]["lite/largest_logit_difference"] == 0
    assert metadata["config"]["decode"] == json.loads(json.dumps(to_dict(config.decode)))


def test_every_stage_can_be_called_again_and_does_nothing(finished, monkeypatch):
    directory, config = finished
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*.array_record*")}
    monkeypatch.setattr(Engine, "run", lambda *_, **__: pytest.fail("decoded again"))
    make_rollouts(config)
    make_grades(config)
    train_stage(config, "critic")
    make_labels(config)
    train_stage(config, "final")
    run_evaluation(config, ["evaluate"])
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*.array_record*")}


def test_a_run_of_another_split_is_not_gone_on_with(finished):
    directory, _ = finished
    sources = {
        s: json.loads((directory / s / "settings.json").read_text())["source"]
        for s in ("policy", "critic", "lite", "final")
    }
    assert [s for s, source in sources.items() if "validation" in source] == [
        "critic",
        "lite",
        "final",
    ]


def test_other_settings_in_the_same_run_directory_are_refused(finished):
    _, config = finished
    other = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, seed=1))
    with pytest.raises(UsageError, match="other settings"):
        make_rollouts(other)


def test_interrupted_rollouts_resume_to_the_same_dataset(finished, tmp_path, monkeypatch):
    directory, config = finished
    again = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        policy=dataclasses.replace(config.policy, path=str(directory / "policy")),
    )
    again = dataclasses.replace(again, rollout=dataclasses.replace(again.rollout, prompts=40))
    whole = dataclasses.replace(again, run_dir=str(tmp_path / "whole"))
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return run_all(*arguments)

    monkeypatch.setattr("zip_rc_jax.pipeline.rollouts.run_all", interrupted)
    with pytest.raises(Interrupted):
        make_rollouts(again)
    assert not (tmp_path / "run" / "rollouts").exists()
    monkeypatch.setattr(
        "zip_rc_jax.pipeline.rollouts.run_all", lambda *a: calls.append(1) or run_all(*a)
    )
    make_rollouts(again)
    assert len(calls) == 3  # chunks of 16 prompts: one before the signal, two after
    make_rollouts(whole)
    for a, b in zip(
        read_rollouts(tmp_path / "run" / "rollouts"),
        read_rollouts(tmp_path / "whole" / "rollouts"),
        strict=True,
    ):
        np.testing.assert_array_equal(a.output_token_ids, b.output_token_ids)


def test_equal_texts_have_seeds_of_their_own_which_no_later_text_changes():
    texts = ["a", "b", "a", "a", "b"]
    requests = with_own_samples(texts, 7)
    assert [r.prompt for r in requests] == texts
    assert [r.seed for r in requests[:2]] == [7, 7], (
        "a text that comes once has the samples of the seed itself"
    )
    seeds = [r.seed for r in requests]
    assert len({seeds[0], seeds[2], seeds[3]}) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert with_own_samples(texts[:3], 7) == requests[:3]
    assert with_own_samples(texts, 8)[2].seed != seeds[2]


def test_equal_problems_are_sampled_anew_however_the_work_is_cut(finished, tmp_path):
    directory, config = finished
    one_digit = gym(
        "chain_sum", ({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},)
    )
    policy = dataclasses.replace(config.policy, path=str(directory / "policy"))
    config = dataclasses.replace(config, problems=one_digit, policy=policy)
    made = []
    for rows in (8, 2):  # chunks of 16 problems, and of 4
        settings = dataclasses.replace(config.rollout, prompts=40, rows=rows)
        made.append(
            read_rollouts(
                make_rollouts(
                    dataclasses.replace(config, rollout=settings, run_dir=str(tmp_path / f"{rows}"))
                )
            )
        )
    outputs = [[tuple(r.output_token_ids) for r in rollouts] for rollouts in made]
    assert outputs[0] == outputs[1]
    found = {}
    for r, tokens in zip(made[0], outputs[0], strict=True):
        found.setdefault(r.prompt, []).append(tokens)
    repeated = [tokens for tokens in found.values() if len(tokens) > 2]
    assert repeated, "some of the few sums come twice"
    assert all(len(set(tokens)) == len(tokens) for tokens in repeated)


@pytest.fixture
def second_run(finished, tmp_path):
    """Another run directory with the policy, rollouts and critic of the finished one, and a config
    that labels 16 rollouts a chunk."""
    directory, config = finished
    for stage in ("policy", "rollouts", "critic"):
        (tmp_path / stage).symlink_to(directory / stage)
    return dataclasses.replace(config, run_dir=str(tmp_path))


def test_grading_and_labelling_lose_no_chunk_and_are_shared_by_processes(
    finished, second_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("zip_rc_jax.pipeline.grade.GRADED_ROLLOUTS", 10)
    monkeypatch.setattr("zip_rc_jax.pipeline.label.LABELLED_ROLLOUTS", 16)
    added: list[int] = []
    add = PartialRollouts.add

    def one(self, number, rollouts):
        add(self, number, rollouts)
        added.append(number)
        if len(added) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PartialRollouts, "add", one)
    for make, name, chunks in ((make_grades, "graded", 5), (make_labels, "labelled", 3)):
        added.clear()
        with pytest.raises(Interrupted, match=f"stopped after 1 of {chunks} chunks"):
            make(second_run)
        # the second of two processes, which makes its part and leaves the rest to the first
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "share", lambda items: items[1::2])
            patch.setattr(distributed, "is_primary", lambda: False)
            make(second_run)
            assert len(added) == 1 + (chunks - 1) // 2
            assert not (tmp_path / name).exists()
        make(second_run)
        assert sorted(added) == list(range(chunks)), "none is made twice"
        assert not (tmp_path / f".{name}.partial").exists()
        mine, whole = read_rollouts(tmp_path / name), read_rollouts(finished[0] / name)
        np.testing.assert_array_equal([r.correct for r in mine], [r.correct for r in whole])
        np.testing.assert_allclose([r.value for r in mine], [r.value for r in whole], atol=1e-6)


def test_sampling_and_labelling_give_the_same_on_all_accelerators_of_a_host(
    finished, second_run, tmp_path, monkeypatch
):
    directory, _ = finished
    for stage in ("rollouts", "label"):
        monkeypatch.setattr(f"zip_rc_jax.pipeline.{stage}.devices_worth_using", lambda: 4)
    (tmp_path / "rollouts").unlink()
    make_rollouts(second_run)
    for a, b in zip(
        read_rollouts(tmp_path / "rollouts"), read_rollouts(directory / "rollouts"), strict=True
    ):
        np.testing.assert_array_equal(a.output_token_ids, b.output_token_ids)
    make_grades(second_run)
    make_labels(second_run)
    mine, whole = read_rollouts(tmp_path / "labelled"), read_rollouts(directory / "labelled")
    np.testing.assert_allclose([r.value for r in mine], [r.value for r in whole], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "samples", "devices", "used"),
    [
        (256, 2, 8, 8),
        (64, 2, 6, 4),
        (8, 8, 4, 1),
        (8, 4, 4, 2),
        (7, 1, 4, 1),
        (7, 1, 8, 7),
        (8, 16, 4, 1),
    ],
)
def test_sampling_takes_the_devices_that_its_rows_divide_over(
    rows, samples, devices, used, monkeypatch
):
    monkeypatch.setattr("zip_rc_jax.pipeline.rollouts.devices_worth_using", lambda: devices)
    assert sampling_layout(rows, samples).mesh.devices.size == used


@pytest.mark.slow
def test_an_evaluation_gives_the_same_on_all_accelerators_of_a_host(
    finished, second_run, tmp_path, monkeypatch
):
    """On three, over which the 64 rows that predictions are made for do not divide."""
    directory, _ = finished
    for stage in ("final", "lite"):
        (tmp_path / stage).symlink_to(directory / stage)
    used, run = [], Engine.run

    def counted(self, prompts, **options):
        used.append(self.lm.layout.mesh.devices.size)
        return run(self, prompts, **options)

    monkeypatch.setattr(Engine, "run", counted)
    monkeypatch.setattr("zip_rc_jax.pipeline.rollouts.devices_worth_using", lambda: 3)
    run_evaluation(
        dataclasses.replace(
            second_run, decode=dataclasses.replace(second_run.decode, max_num_seqs=33)
        ),
        ["evaluate"],
    )
    assert set(used) == {3}
    mine, whole = (
        (where / "report" / "results.jsonl").read_text().splitlines()
        for where in (tmp_path, directory)
    )
    assert mine == whole
    mine, whole = (
        json.loads((where / "report" / "metadata.json").read_text())
        for where in (tmp_path, directory)
    )
    for part in ("quality", "drift"):
        assert mine[part] == pytest.approx(whole[part], abs=1e-5, nan_ok=True)


def test_stages_out_of_order_say_what_to_run_first(tmp_path, finished):
    directory, config = finished
    empty = dataclasses.replace(
        config,
        run_dir=str(tmp_path),
        policy=dataclasses.replace(config.policy, path=str(directory / "policy")),
    )
    with pytest.raises(UsageError, match="zip-rc grade"):
        train_stage(empty, "critic")
    with pytest.raises(UsageError, match="no such directory"):
        run_evaluation(empty, [])
    with pytest.raises(UsageError, match="zip-rc train --stage policy"):
        make_rollouts(
            dataclasses.replace(empty, policy=dataclasses.replace(config.policy, path=""))
        )


def test_a_policy_can_start_from_a_model(tmp_path, finished):
    directory, config = finished
    start = load(directory / "policy")
    slow = dataclasses.replace(config.policy.train, learning_rate=1e-9)
    config = dataclasses.replace(
        config,
        run_dir=str(tmp_path),
        policy=dataclasses.replace(config.policy, start="", train=slow),
    )
    scratch = train_stage(config, "policy")
    shutil.rmtree(tmp_path / "policy")
    begun = dataclasses.replace(
        config, policy=dataclasses.replace(config.policy, start=str(directory / "policy"))
    )
    found = train_stage(begun, "policy")

    def distance(lm):
        return max(
            float(jnp.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(lm.params), jax.tree.leaves(start.params), strict=True)
        )

    assert distance(found) < 1e-7
    assert distance(scratch) > 1e-4


def test_solutions_that_do_not_fit_behind_their_prompts_are_refused(finished):
    _, config = finished
    short = dataclasses.replace(
        config.policy, train=dataclasses.replace(config.policy.train, row_tokens=16)
    )
    tokenizer = word_level(vocabulary(LARGEST_NUMBER))
    with pytest.raises(
        UsageError,
        match=r"row_tokens=16: problem 0 has a prompt of 13 tokens.* Fix: make the rows longer",
    ):
        solution_rollouts(dataclasses.replace(config, policy=short), tokenizer)


def test_worked_solutions_are_for_chain_sums_alone(finished):
    other = dataclasses.replace(
        finished[1], problems=gym("products", ({"min_terms": 2, "max_terms": 2},))
    )
    with pytest.raises(
        UsageError, match="task 'products': worked solutions .* Fix: set policy.path"
    ):
        solution_rollouts(other, word_level(vocabulary(LARGEST_NUMBER)))


# Worked solutions: checked by doing the sums again.


def read_passes(text):
    """Steps `(before, operator, term, result, separator, carried, redone)` of each pass, and the
    answer. `redone` is None or the total
    after "wait".
    """
    body, answer = text.split(" Answer: ")
    passes = []
    for part in body.split(" check "):
        words, steps = part.split(), []
        total, i = int(words[0]), 1
        while i < len(words):
            op, term, equals, result, separator, carried = words[i : i + 6]
            assert equals == "="
            i += 6
            redone = None
            if words[i : i + 1] == ["wait"]:
                redone, i = int(words[i + 1]), i + 2
            steps.append((total, op, int(term), int(result), separator, int(carried), redone))
            total = int(carried) if redone is None else redone
        passes.append((steps, total))
    return passes, int(answer)


def test_worked_solutions_follow_the_question_and_slip_as_often_as_asked():
    config = load_config("configs/chain_sum_policy.yaml")
    policy = dataclasses.replace(
        config.policy, unsure=0.3, slip_unsure=0.6, slip_sure=0.1, redo=0.4
    )
    tokenizer, rng = word_level(vocabulary(LARGEST_NUMBER)), random.Random(0)
    seen = {"unsure": [], "slip_unsure": [], "slip_sure": [], "redo": []}
    for p in gym_problems(config.problems, "train", 400):
        terms, operators = parse_question(p.question)
        solution = write_solution(p.question, policy, rng)
        assert tokenizer.decode(tokenizer.encode(solution)) == solution
        passes, answer = read_passes(solution)
        assert answer == passes[-1][1]
        for steps, _ in passes:
            assert [(op, term) for _, op, term, *_ in steps] == list(
                zip(operators, terms[1:], strict=True)
            )
            for before, op, term, result, separator, carried, redone in steps:
                # arithmetic never slips, carrying does
                assert result == (before + term if op == "+" else before - term)
                unsure = separator == "?"
                seen["unsure"].append(unsure)
                seen["slip_unsure" if unsure else "slip_sure"].append(carried != result)
                if unsure:
                    seen["redo"].append(redone is not None)
                else:
                    assert redone is None
    for name, events in seen.items():
        rate = getattr(policy, name)
        assert abs(np.mean(events) - rate) < 4 * (rate * (1 - rate) / len(events)) ** 0.5, name


def test_without_slips_every_solution_is_right():
    config = load_config("configs/chain_sum_policy.yaml")
    policy = dataclasses.replace(config.policy, slip_unsure=0.0, slip_sure=0.0)
    for p in gym_problems(config.problems, "train", 40):
        assert read_passes(write_solution(p.question, policy, random.Random(p.index)))[1] == int(
            p.answer
        )


@pytest.mark.slow
def test_another_beta_of_an_evaluation_decodes_only_what_is_new(finished, tmp_path, monkeypatch):
    """What was decoded stands, unless it depends on what has changed; and the search has `decode.n`
    prefixes, not those of the pool."""
    directory, config = finished
    for part in ("policy", "final", "lite"):
        (tmp_path / part).symlink_to(directory / part)
    shutil.copytree(directory / "report", tmp_path / "report")
    fewer = dataclasses.replace(config.evaluate, betas=(0.05, 0.02), bootstrap=20, drift_rollouts=8)
    decoded = []
    init = Engine.__init__
    monkeypatch.setattr(
        Engine,
        "__init__",
        lambda self, lm, c, *rest: (decoded.append(c), init(self, lm, c, *rest))[1],
    )
    run_evaluation(dataclasses.replace(config, run_dir=str(tmp_path), evaluate=fewer), ["evaluate"])
    assert {(c.strategy, c.beta) for c in decoded} == {("zip_rc", 0.02)}
    decoded.clear()
    half = dataclasses.replace(config.decode, n=4)
    run_evaluation(
        dataclasses.replace(config, run_dir=str(tmp_path), evaluate=fewer, decode=half),
        ["evaluate"],
    )
    assert {(c.strategy, c.n) for c in decoded} == {
        ("zip_rc", 4),
        *((s, 4) for s in ("reward_threshold", "half_finished", "length_budget")),
    }


@pytest.mark.parametrize(
    ("prompt", "template", "reasons"),
    [
        ({"style": "raw"}, "{{ enable_thinking }}", False),
        ({"style": "chat"}, "no such switch", False),
        ({"style": "chat"}, "{{ enable_thinking }}", True),
        (
            {"style": "chat", "chat_template_kwargs": {"enable_thinking": False}},
            "{{ enable_thinking }}",
            False,
        ),
    ],
)
def test_rollouts_reason_where_the_template_can_and_is_not_told_not_to(prompt, template, reasons):
    assert asks_for_reasoning(to_dict(PromptConfig(**prompt)), template) == reasons
