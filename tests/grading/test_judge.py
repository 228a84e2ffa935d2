"""A language model as the judge, against a real HTTP server on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from harness.judge_server import completion, serving
from zip_rc_jax.config import GradeConfig, JudgeConfig, PipelineConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.rollouts import Rollout, read_metadata, read_rollouts, write_rollouts
from zip_rc_jax.grading.judge import Judge
from zip_rc_jax.pipeline.grade import make_grades
from zip_rc_jax.runtime.errors import UsageError

PROMPT = "{question}|{answer}|{response}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def problem(number=0):
    return Problem(number, 0, 0, f"q{number}", f"a{number}", "math")


def config(server, **settings):
    settings = {"prompt": PROMPT, "backoff": 0.01, "model": "m", **settings}
    return JudgeConfig(base_url=server.url, **settings)


def by_the_answer(number, body):
    """Right where the response is the reference answer."""
    _, answer, response = body["messages"][-1]["content"].split("|")
    word = "CORRECT" if answer == response else "INCORRECT"
    return 200, {}, completion(f"Maybe VERDICT: CORRECT? I compare.\n**Verdict: {word}**")


ITEMS = [(problem(i), f"a{i if i % 3 else 9}") for i in range(8)]
SCORES = [float(i % 3 != 0) for i in range(8)]


def journal(directory):
    return [
        json.loads(line)
        for path in sorted(pathlib.Path(directory).glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_the_verdict_that_stands_last_in_the_reply_is_the_score(tmp_path):
    with serving(by_the_answer) as server, Judge(config(server), tmp_path) as judge:
        assert judge.grade_many(ITEMS) == SCORES
        assert sorted(server.asked()) == sorted(f"q{p.index}|{p.answer}|{r}" for p, r in ITEMS)
        _, path, headers, body = server.requests[0]
        assert path == "/v1/chat/completions"
        assert "Authorization" not in headers
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 1024)


def test_prompts_and_replies_are_kept_and_nothing_is_asked_again(tmp_path):
    with serving(by_the_answer) as server:
        with Judge(config(server), tmp_path) as judge:
            judge.grade_many(ITEMS)
        rows = journal(tmp_path)
        assert len(rows) == 8
        assert {row["messages"][-1]["content"] for row in rows} == set(server.asked())
        assert all("erdict:" in row["reply"] and row["usage"] for row in rows)
        with Judge(config(server), tmp_path) as judge:
            assert judge.grade_many(ITEMS) == SCORES
            assert judge.asked == 0
            assert judge.score(problem(1), "new") == 0.0
            assert judge.asked == 1
        # Kept replies are read again, so another rule for them needs no request either.
        always = config(server, right="compare", wrong="NEVER SAID")
        with Judge(always, tmp_path) as judge:
            assert judge.grade_many(ITEMS) == [1.0] * 8
            assert judge.asked == 0
        with Judge(config(server, system="Be strict."), tmp_path) as judge:  # another question
            judge.score(*ITEMS[0])
            assert judge.asked == 1
            assert server.requests[-1][-1]["messages"][0]["content"] == "Be strict."


def test_equal_questions_are_asked_once(tmp_path):
    with serving(by_the_answer) as server, Judge(config(server), tmp_path) as judge:
        assert judge.grade_many([ITEMS[1]] * 6) == [1.0] * 6
        assert len(server.requests) == 1


def test_braces_of_a_response_are_text(tmp_path):
    with serving(by_the_answer) as server, Judge(config(server), tmp_path) as judge:
        judge.score(problem(), "{answer} \\frac{1}{2} {0} {}")
        assert server.asked() == ["q0|a0|{answer} \\frac{1}{2} {0} {}"]


def test_limits_and_faults_of_the_server_are_waited_for(tmp_path):
    """429 with a time to wait, 500, 503, a lost connection, and what is no completion."""
    faults = {
        0: (429, {"Retry-After": "0.4"}, b"slow down"),
        1: (500, {}, b"oops"),
        2: (503, {}, b""),
        3: (0, {}, b""),
        4: (200, {}, b"<html>"),
        5: (200, {}, b'{"choices": []}'),
        6: (200, {}, completion(["no", "text"])),
    }

    def answer(number, body):
        return faults.get(number) or by_the_answer(number, body)

    with serving(answer) as server, Judge(config(server, retries=7), tmp_path) as judge:
        assert judge.score(problem(), "a0") == 1.0
        times = [at for at, *_ in server.requests]
        assert len(times) == 8
        assert times[1] - times[0] >= 0.4  # as the server asked
        assert times[7] - times[6] >= 0.01 * 2**6  # the backoff doubles
    assert len(journal(tmp_path)) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((429, {}, b"quota"), r"it answers with status 429 \(quota\), in 3 attempts"),
        ((0, {}, b""), "it cannot be reached"),
        ((200, {}, b"{}"), "it answers with '{}', which is no chat completion"),
    ],
)
def test_a_server_that_never_answers_ends_the_run_and_keeps_what_was_judged(
    tmp_path, fault, message
):
    def answer(number, body):
        return fault if number else by_the_answer(number, body)

    with serving(answer) as server:
        judge = Judge(config(server, retries=2, concurrency=1), tmp_path)
        with judge, pytest.raises(UsageError, match=message) as told:
            judge.grade_many(ITEMS)
        assert "what was judged is kept" in str(told.value)
        assert len(str(told.value)) < 900
        assert len(server.requests) == 4  # nothing else was asked
    assert len(journal(tmp_path)) == 1


def test_a_refusal_is_told_at_once_and_the_key_is_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")

    def answer(number, body):
        return 401, {}, b"bad key sk-secret"

    with serving(answer) as server:
        judge = Judge(config(server, api_key_env="MY_KEY"), tmp_path)
        with judge, pytest.raises(UsageError, match=r"status 401 \(bad key \*\*\*\)") as told:
            judge.score(problem(), "a0")
        assert len(server.requests) == 1
        assert server.requests[0][2]["Authorization"] == "Bearer sk-secret"
    assert "secret" not in str(told.value)


def test_the_key_goes_to_no_other_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(by_the_answer) as other:

        def answer(number, body):
            return 307, {"Location": f"{other.url}/chat/completions"}, b""

        with serving(answer) as server:
            settings = config(server, api_key_env="MY_KEY")
            with Judge(settings, tmp_path) as judge, pytest.raises(UsageError, match="status 307"):
                judge.score(problem(), "a0")
        assert not other.requests


def test_replies_that_nobody_can_read_are_asked_again_then_wrong_and_told(tmp_path):
    def answer(number, body):
        content = body["messages"][-1]["content"]
        if content.startswith("q1") and content not in server.asked()[:number]:
            return 200, {}, completion(None)
        if content.startswith("q2"):
            return 200, {}, completion("I would rather not say")
        return by_the_answer(number, body)

    with serving(answer) as server:
        with Judge(config(server, concurrency=1), tmp_path) as judge:
            with pytest.warns(UserWarning, match="'I would rather not say' matches neither"):
                assert judge.grade_many(ITEMS[:4]) == [0.0, 1.0, 0.0, 0.0]
            assert judge.unreadable == 1
        counts = Counter(text.split("|")[0] for text in server.asked())
        assert counts == {"q0": 1, "q1": 2, "q2": 2, "q3": 1}
        with Judge(config(server, unreadable="stop"), tmp_path) as judge:
            with pytest.raises(UsageError, match="matches neither.*nor do 1 others"):
                judge.score(*ITEMS[2])
            assert judge.asked == 0


def test_requests_keep_to_their_number_a_minute(tmp_path):
    with serving(by_the_answer) as server:
        with Judge(config(server, requests_per_minute=600), tmp_path) as judge:
            judge.grade_many(ITEMS[:5])
        times = sorted(at for at, *_ in server.requests)
    assert times[-1] - times[0] >= 4 * 0.1 - 0.05


RUN = """
import sys
from zip_rc_jax.config import JudgeConfig
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grading.judge import Judge
url, directory = sys.argv[1:]
config = JudgeConfig(base_url=url, model="m", prompt="{question}|{answer}|{response}",
                     concurrency=2)
with Judge(config, directory) as judge:
    judge.grade_many([(Problem(i, 0, 0, f"q{i}", f"a{i}", "math"), "a1") for i in range(40)])
"""


def test_a_run_that_is_killed_goes_on_without_asking_again(tmp_path):
    def answer(number, body):
        if number >= 6:
            time.sleep(1000 if number < 40 and killing else 0)
        return by_the_answer(number, body)

    killing = True
    items = [(problem(i), "a1") for i in range(40)]
    with serving(answer) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, server.url, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            end = time.monotonic() + 300
            while (
                len(server.requests) < 8 or len(journal(tmp_path)) < 6
            ) and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
        killing = False
        kept = journal(tmp_path)
        assert len(kept) == 6
        with open(tmp_path / "0.jsonl", "a") as file:
            file.write('{"key": "half a line')  # what a kill in the middle of a line leaves
        with Judge(config(server), tmp_path) as judge:
            assert judge.grade_many(items) == [float(i == 1) for i in range(40)]
            assert judge.asked == 34
        asked = Counter(server.asked())
        judged = {row["messages"][-1]["content"] for row in kept}
        assert all(asked[text] == 1 for text in judged)
    assert len(journal(tmp_path)) == 40  # every line is whole


def test_two_runs_at_once_write_files_of_their_own(tmp_path):
    with serving(by_the_answer) as server:
        with Judge(config(server), tmp_path) as first, Judge(config(server), tmp_path) as second:
            first.score(*ITEMS[0])
            second.score(*ITEMS[1])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["0-2.jsonl", "0.jsonl"]
        with Judge(config(server), tmp_path) as judge:
            judge.grade_many(ITEMS[:2])
            assert judge.asked == 0


def test_a_damaged_journal_is_told_by_its_line(tmp_path):
    (tmp_path / "0.jsonl").write_text('{"key": "a", "reply": "b"}\n{"key": 3}\n')
    settings = JudgeConfig(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(UsageError, match=r"line 2 of .*0\.jsonl.*delete this line"):
        Judge(settings, tmp_path)


def test_text_without_utf8_is_asked_and_kept(tmp_path):
    with serving(by_the_answer) as server:
        for asked in (1, 0):
            with Judge(config(server), tmp_path) as judge:
                assert judge.score(problem(), "\ud800 \0 é") == 0.0
                assert judge.asked == asked


def rollout(number):
    return Rollout(
        prompt_index=number, sample_index=0, level=0, seed=0, task="", prompt="p",
        question=f"q{number}", answer="a1", entry_json="", prompt_token_ids=np.array([1]),
        output_token_ids=np.array([3]), response=f"a{number % 2}", finished=True,
    )  # fmt: skip


def test_the_grade_stage_asks_it_and_keeps_the_journal_in_the_run_directory(tmp_path):
    write_rollouts(tmp_path / "rollouts", [rollout(i) for i in range(4)], metadata={})
    with serving(by_the_answer) as server:
        file = tmp_path / "run.yaml"
        file.write_text(
            f"run_dir: {tmp_path}\ngrade:\n  grader: judge\n  judge:\n"
            f"    base_url: {server.url}\n    model: m\n    prompt: '{PROMPT}'\n"
        )
        make_grades(load_config(file))
    assert [r.correct for r in read_rollouts(tmp_path / "graded")] == [0.0, 1.0, 0.0, 1.0]
    assert len(journal(tmp_path / "judge")) == 4
    record = read_metadata(tmp_path / "graded")["grade"]
    assert record["judge"]["model"] == "m"
    assert "base_url" not in record["judge"]


def test_the_grade_stage_counts_what_has_no_readable_verdict(tmp_path, capsys):
    write_rollouts(tmp_path / "rollouts", [rollout(i) for i in range(4)], metadata={})

    def answer(number, body):
        unsure = body["messages"][-1]["content"].startswith(("q1", "q2"))
        return (200, {}, completion("Hm.")) if unsure else by_the_answer(number, body)

    with serving(answer) as server:
        settings = GradeConfig(grader="judge", judge=config(server))
        with pytest.warns(UserWarning, match="matches neither"):
            make_grades(PipelineConfig(run_dir=str(tmp_path), grade=settings))
    assert [r.correct for r in read_rollouts(tmp_path / "graded")] == [0.0, 0.0, 0.0, 1.0]
    assert "no readable verdict on 2 responses" in capsys.readouterr().err


def test_a_pickled_judge_reads_the_same_journal(tmp_path):
    with serving(by_the_answer) as server:
        with Judge(config(server), tmp_path) as judge:
            judge.score(*ITEMS[1])
        with pickle.loads(pickle.dumps(judge)) as copy:
            assert copy.score(*ITEMS[1]) == 1.0
            assert copy.asked == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, r"base_url='localhost:8000': it is no http"),
        ({"base_url": "http://me:pw@host/v1"}, "with a user or password"),
        ({"model": ""}, r"grade\.judge\.model=''"),
        ({"prompt": "Is it right?"}, r"does not contain \{response\}"),
        ({"right": "("}, r"grade\.judge\.right='\(': it is no regular expression"),
        ({"wrong": "a*"}, "it matches an empty reply"),
        ({"timeout": 0}, r"grade\.judge\.timeout=0"),
        ({"retries": -1}, r"grade\.judge\.retries=-1"),
        ({"unreadable": "skip"}, r"grade\.judge\.unreadable='skip'"),
        ({"concurrency": 0}, r"grade\.judge\.concurrency=0"),
    ],
)
def test_settings_that_no_judge_can_follow_are_refused(settings, message):
    ready = {"base_url": "http://localhost:1/v1", "model": "m"}
    with pytest.raises(UsageError, match=message) as told:
        GradeConfig(grader="judge", judge=JudgeConfig(**ready | settings))
    assert len(str(told.value)) < 900


def test_a_judge_that_nobody_asks_and_a_key_that_is_absent_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="nothing would read it"):
        PipelineConfig(grade=GradeConfig(judge=JudgeConfig(model="m")))
    monkeypatch.delenv("NO_KEY", raising=False)
    settings = JudgeConfig(base_url="http://localhost:1/v1", model="m", api_key_env="NO_KEY")
    with pytest.raises(UsageError, match="NO_KEY.*not set.*export NO_KEY"):
        Judge(settings, tmp_path)
