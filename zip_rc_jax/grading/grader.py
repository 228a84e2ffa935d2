"""Grading of responses: find the answer, then the task's own exact scorer.

No text can crash or hang it.

Maths: `plain` reads numbers, units, choices and lists, and math-verify compares formulas, in the
  worker. Neither has a tolerance.
reasoning-gym: the task's scorer, with checks where it gives full marks for a wrong answer
(`overrated.overrated`).

Processes: a grader that a fork carries into a child starts a worker of its own there. A pickled one
  is a new grader.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import pathlib
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from zip_rc_jax.config.checks import shown
from zip_rc_jax.data.problems import MATH, Problem
from zip_rc_jax.data.problems.gym import create
from zip_rc_jax.grading import plain
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.overrated import overrated
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

# Scorers that only compare bounded strings and decimals run here; every other one runs in the
# worker process.
DECIMAL_TASKS = ("chain_sum", "products")
# beyond it (or four times the reference answer) an answer is wrong without a look
MAX_ANSWER_CHARS = 4_000
START_SECONDS = 120.0


class Gradable(Protocol):
    """What grading needs of a `Problem` or a `Rollout`."""

    @property
    def task(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def entry_json(self) -> str: ...


def correct(score: float) -> float:
    """1.0 for a full score, else 0.0: reasoning-gym gives part of the score for, say, the right
    number inside a longer text."""
    return float(score >= 1.0)


class Grader:
    """Scores responses; owns the worker process, which starts when first needed.

    Usable from any thread; close it or use `with`.

    Attributes:
      timeout: seconds one answer may take in the worker. After that the worker is killed and the
        answer is wrong.
    """

    def __init__(self, timeout: float = 5.0):
        self.timeout = timeout
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._scores_tasks = False  # else the worker is spared the import of reasoning-gym
        _GRADERS.add(self)

    def __reduce__(self) -> tuple[type[Grader], tuple[float]]:
        return Grader, (self.timeout,)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker. The grader may be used again; a new worker then starts."""
        with self._lock:
            self._stop()

    def score(self, problem: Gradable, response: str) -> float:
        """The task's own score of the answer in `response`, in [0, 1]; 0.0 for no answer, or for
        one that breaks the scorer.

        Raises:
          UsageError: reasoning-gym has no such task, or its scorer needs the entry, which
            `entry_json` does not give.
        """
        answer = extract_answer(response)
        if answer is None or len(answer) > max(MAX_ANSWER_CHARS, 4 * len(problem.answer)):
            return 0.0
        if problem.task == MATH:
            return float(self._same(problem.answer, answer))
        ending = problem.answer[-1:]
        if ending in (".", "!", "?") and answer[-1:] != ending and answer + ending in response:
            answer += ending  # a sentence is the answer, with what ends it
        score = self._task_score(problem, answer)
        # the end of a sentence
        if score < 1.0 and answer[-1:] in (".", "!") and problem.answer[-1:] != answer[-1:]:
            score = max(score, self._task_score(problem, answer.rstrip(".!")))
        return _bounded(score)

    def _task_score(self, problem: Gradable, answer: str) -> float:
        score = self._scorers_own(problem, answer) if answer else 0.0
        return 0.0 if score >= 1.0 and overrated(problem.task, problem.answer, answer) else score

    def _scorers_own(self, problem: Gradable, answer: str) -> float:
        simple = _simple_scorer(problem.task)
        if simple is None:
            if not check_entry(problem):
                raise UsageError(
                    f"task {problem.task!r}",
                    "its scorer needs the whole entry",
                    "pass the problem's entry_json",
                )
            request = {
                "task": problem.task,
                "question": problem.question,
                "gold": problem.answer,
                "answer": answer,
            }
            score = self._ask({"task": request | check_entry(problem)})
            if score < 0:
                raise UsageError(
                    f"task {problem.task!r}, {problem.entry_json}",
                    "reasoning-gym now generates another problem there",
                    "use the version (and PYTHONHASHSEED) that made the problems",
                )
            return _bounded(score)
        try:
            return _bounded(simple(answer, {"answer": problem.answer}))
        except Exception:  # a scorer that cannot read the answer has not found it right
            return 0.0

    def grade_many(self, items: Iterable[tuple[Gradable, str]]) -> list[float]:
        """`score` of each (problem, response), in order."""
        return [self.score(problem, response) for problem, response in items]

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers to a maths problem are the same one.

        Symmetric, and bounded in time like a grade; nan equals nothing.
        """
        return self._same(a, b)

    def _same(self, a: str, b: str) -> bool:
        """Numbers, words, lists of them and equal texts are compared here; for formulas the worker
        is asked."""
        try:
            return plain.equal(a, b, _undecided)
        except _Undecided:
            first, second = sorted((a, b))
            return self._ask({"math": {"gold": first, "answer": second}}) == 1.0

    def _ask(self, request: dict[str, Any]) -> float:
        with self._lock:
            if "task" in request and not self._scores_tasks:
                self._stop()
                self._scores_tasks = True
            reply = self._reply(request)
        return 0.0 if reply is None else float(reply["score"])

    def _reply(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What the worker says; None if it is too slow or dies. The lock is held."""
        # a worker that died may have been killed from outside: the answer gets a second one
        for _ in range(2):
            if self._worker is None:
                self._worker = _Worker(self.timeout, self._arguments())
            try:
                return self._worker.ask(request, self.timeout)
            except queue.Empty:  # too slow
                self._stop()
                return None
            except (OSError, ValueError):  # died
                self._stop()
        return None

    def _arguments(self) -> list[str]:
        """What the worker is started with: whether it scores the tasks of reasoning-gym, and not
        mathematics alone."""
        return ["tasks"] if self._scores_tasks else []

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def check_entry(problem: Gradable) -> dict[str, Any]:
    """`options`, `seed` and `index` of the problem's reasoning-gym entry; {} without an
    `entry_json`, or with an empty object.

    Raises:
      UsageError: `entry_json` is something else.
    """
    if not problem.entry_json:
        return {}
    kinds = {"options": dict, "seed": int, "index": int}
    try:
        entry = json.loads(problem.entry_json)
        right = entry == {} or (
            {*entry} == {*kinds} and all(type(entry[name]) is kind for name, kind in kinds.items())
        )
    except (ValueError, TypeError, RecursionError):
        right = False
    if not right or (entry and (entry["index"] < 0 or entry["index"] >= 2**40)):
        raise UsageError(
            f"entry_json {problem.entry_json!r}",
            "it is no JSON object of options (an object), seed and index (whole numbers)",
            "correct it, or leave it empty where the scorer of the task needs no more than the "
            "answer",
        )
    return entry


def grade(
    task: str, answer: str, response: str, *, question: str = "", entry_json: str = ""
) -> float:
    """The score of the answer that `response` states, in [0, 1]: `grade("math", "1/2", "So it is
    \\boxed{0.5}.")` is 1.0.

    Numbers, words and lists are compared in this process. Formulas and the tasks that could hang or
    evaluate text wait for a worker process: one for all calls of this function and of `equivalent`.
    It starts when first needed (seconds), takes one answer at a time, and ends with this process.
    Safe in threads and after a fork. For a worker of your own use `with Grader() as grader`.

    Args:
      task: "math" (no reasoning-gym is needed), or the name of a reasoning-gym task, whose own
        scorer gives the score.
      answer: the reference answer, as text.
      response: what the model wrote, reasoning included; 0.0 where it states no answer.
      question, entry_json: of a `Problem`, for tasks whose scorer needs the whole entry.

    Raises:
      UsageError: a value that is no text, no such task, or a task whose scorer needs the entry.
    """
    texts = {
        "task": task,
        "answer": answer,
        "response": response,
        "question": question,
        "entry_json": entry_json,
    }
    for name, text in texts.items():
        _check_text(name, text)
    return _shared_grader().score(Problem(0, 0, 0, question, answer, task, entry_json), response)


def equivalent(a: str, b: str) -> bool:
    """Whether two answers to a maths problem are the same one: `equivalent("1/2", "0.5")`.

    Symmetric; nan equals nothing.

    Formulas are compared in the worker of `grade`, within its time limit; formulas that take longer
    count as different.

    Raises:
      UsageError: a value that is no text.
    """
    _check_text("a", a)
    _check_text("b", b)
    return _shared_grader().equivalent(a, b)


def _check_text(name: str, value: str) -> None:
    if not isinstance(value, str):
        raise UsageError(
            f"{name}={shown(value)}",
            f"it is a {type(value).__name__}, and answers are texts",
            f"pass str({name})",
        )


@functools.cache
def _shared_grader() -> Grader:
    grader = Grader()
    atexit.register(grader.close)
    return grader


@functools.cache
def _simple_scorer(task: str) -> Callable[[str, dict[str, Any]], float] | None:
    """`score_answer` of a task whose scorer needs only the reference answer and cannot hang, else
    None."""
    with optional_import():
        from reasoning_gym.dataset import ProceduralDataset
        from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        create(task, {}, seed=0, size=1)  # raises, with the nearest names
    scorer = DATASETS[task][0].score_answer
    if task in DECIMAL_TASKS or scorer is ProceduralDataset.score_answer:
        return functools.partial(scorer, None)  # these two kinds read nothing of their dataset
    return None


def _bounded(score: float) -> float:
    return 0.0 if math.isnan(score) else min(max(float(score), 0.0), 1.0)


class _Undecided(Exception):
    """Formulas that only the worker compares."""


def _undecided(a: str, b: str) -> bool:
    if a == b:
        return True
    raise _Undecided


_GRADERS: weakref.WeakSet[Grader] = weakref.WeakSet()
# held while a worker starts: a fork in between would give its pipes to the child
_STARTING = threading.Lock()
# of the parent; kept, since collecting one would wait for a process that is not ours
_INHERITED: list[_Worker] = []


def _in_the_child() -> None:
    """After a fork: locks that other threads held, and workers that belong to the parent, are
    replaced."""
    global _STARTING
    _STARTING = threading.Lock()
    for grader in list(_GRADERS):
        grader._lock = threading.Lock()
        if grader._worker is not None:
            grader._worker.abandon()
            _INHERITED.append(grader._worker)
            grader._worker = None


def _before_a_fork() -> None:
    _STARTING.acquire()


def _in_the_parent() -> None:
    _STARTING.release()


os.register_at_fork(
    before=_before_a_fork, after_in_parent=_in_the_parent, after_in_child=_in_the_child
)


class _Worker:
    """`worker.py` in its own process.

    A thread reads its replies, so that waiting for one can time out on every platform.

    Its pipes are unbuffered: a buffer that a fork copies would be written twice, and its lock could
      be held for ever.
    """

    def __init__(self, timeout: float, arguments: list[str]):
        """Args: see `Grader._arguments`.

        Raises UsageError for a grader of the user's that cannot be imported.
        """
        script = pathlib.Path(__file__).with_name("worker.py")
        with _STARTING:
            self._process = subprocess.Popen(
                # -P: our modules must not shadow the library's
                [
                    sys.executable,
                    "-P",
                    str(script),
                    str(max(1, math.ceil(timeout))),
                    *arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # Ctrl-C ends the run, but must not make the answer in hand wrong
                start_new_session=True,
            )
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            first = json.loads(self._replies.get(timeout=START_SECONDS))
        except (queue.Empty, ValueError):
            self.kill()
            raise RuntimeError(
                "the grading process did not start; `python -c 'import math_verify'` may say why"
            ) from None
        except BaseException:  # Ctrl-C during the start
            self.kill()
            raise
        if "error" in first:
            self.kill()
            raise UsageError(
                f"grade.grader={shown(arguments[1])}",
                f"importing it fails in the grader's process ({first['error']})",
                "write module:function of a module that Python finds",
            )

    def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while data := self._process.stdout.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._replies.put(line)
        self._replies.put(b"")  # the process ended: not JSON, so whoever waits fails at once

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        left = memoryview(json.dumps(request).encode() + b"\n")
        while left:
            left = left[self._process.stdin.write(left) :]
        return json.loads(self._replies.get(timeout=timeout))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def abandon(self) -> None:
        """In a forked child: lets go of the parent's worker without a word to it.

        It must see its input end when the parent dies.
        """
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.returncode = 0  # so that subprocess never waits for it here
