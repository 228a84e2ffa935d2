"""A forked process never shares its parent's grading worker: grades do not cross, locks do not
hang, and no worker outlives its owner."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grading import grader as grading
from zip_rc_jax.grading.grader import Grader, equivalent, grade

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning"
)
COUNT = 40


def misgraded(grader: Grader, start: int, count: int = COUNT) -> list[int]:
    """Which of `count` grades are not the right ones; every one needs the worker, and every other
    answer is wrong."""
    bad = []
    for k in range(start, start + count):
        response = f"Answer: \\sqrt{{{k * k if k % 2 else k * k + 1}}}"
        score = grader.score(
            Problem(0, 0, 0, "?", f"\\frac{{\\sqrt{{{4 * k * k}}}}}{{2}}", "math"), response
        )
        bad += [k] if score != float(k % 2) else []
    return bad


def in_a_fork(work) -> tuple[int, int]:
    """(process id, read end of a pipe) of a child that writes repr(work()) and ends without
    cleaning up."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, repr(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    return pid, reading


def said(child: tuple[int, int]) -> str:
    pid, reading = child
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    for _ in range(600):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_parent_and_children_grade_at_once_and_every_grade_is_right():
    with Grader() as grader:
        assert misgraded(grader, 1_000, 4) == []
        children = [in_a_fork(lambda i=i: misgraded(grader, 10_000 * i)) for i in (2, 3, 4)]
        assert misgraded(grader, 1_000) == []
        assert [said(child) for child in children] == ["[]"] * 3


@pytest.mark.slow
def test_a_fork_while_another_thread_grades_hangs_nobody():
    """The lock and the pipes are in use at the fork, and a grade is on its way."""
    with Grader() as grader:
        assert misgraded(grader, 1_000, 4) == []
        stop, wrong = threading.Event(), []

        def keep_grading():
            while not stop.is_set():
                wrong.extend(misgraded(grader, 2_000, 5))

        thread = threading.Thread(target=keep_grading)
        thread.start()
        children = [in_a_fork(lambda i=i: misgraded(grader, 10_000 * i, 10)) for i in (2, 3)]
        grandchild = in_a_fork(lambda: said(in_a_fork(lambda: misgraded(grader, 50_000, 10))))
        answers = [said(child) for child in (*children, grandchild)]
        stop.set()
        thread.join()
        assert wrong == []
        assert answers == ["[]", "[]", "'[]'"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_every_kind_grade_right(method):
    with Grader() as grader:
        misgraded(grader, 1_000, 2)
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.starmap_async(
                misgraded, [(grader, 1_000 * i, 8) for i in range(1, 5)]
            ).get(timeout=200)
        assert found == [[]] * 4
        assert misgraded(grader, 1_000, 4) == []


def test_the_shared_grader_of_the_module_is_another_one_after_a_fork():
    assert grade("math", "\\sqrt{4}", "Answer: \\frac{\\sqrt{16}}{2}") == 1.0
    worker = grading._shared_grader()._worker
    child = in_a_fork(
        lambda: (
            grading._shared_grader()._worker is None,
            equivalent("\\sqrt{9}", "\\sqrt{3}\\sqrt{3}"),
            equivalent("\\sqrt{9}", "\\sqrt{8}"),
        )
    )
    assert said(child) == "(True, True, False)"
    assert grading._shared_grader()._worker is worker
    assert equivalent("\\sqrt{25}", "\\sqrt{5}\\sqrt{5}")


def test_a_child_that_ends_leaves_the_parents_worker_alone():
    """Also where it closes the grader, collects it, or runs the clean-up of the interpreter."""
    with Grader() as grader:
        misgraded(grader, 1_000, 2)
        worker = grader._worker._process
        for end in (
            lambda: grader.close(),
            lambda: (grading._GRADERS.clear(), gc.collect()),
            lambda: sys.exit(0),
        ):
            pid = os.fork()
            if pid == 0:
                try:
                    end()
                finally:
                    os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        assert worker.poll() is None
        assert misgraded(grader, 1_000, 4) == []
        assert grader._worker._process is worker


CHILD = """
import os, sys, time
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grading.grader import Grader
grader = Grader()
def work():
    assert grader.score(Problem(0, 0, 0, "?", "\\\\sqrt{4}", "math"), "Answer: \\\\sqrt{16}/2") == 1.0
    return grader._worker._process.pid
first = work()
pid = os.fork()
if pid == 0:
    print(os.getpid(), work(), flush=True)
    time.sleep(600)
print(os.getpid(), first, flush=True)
sys.stdout.flush()
time.sleep(600)
"""  # noqa: E501


@pytest.mark.slow
def test_no_worker_outlives_the_process_that_started_it():
    """Neither the parent's, although a child of it lives on, nor the child's; both die by
    SIGKILL."""
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    workers = {
        int(line.split()[0]): int(line.split()[1])
        for line in (process.stdout.readline(), process.stdout.readline())
    }
    child = next(pid for pid in workers if pid != process.pid)
    try:
        assert len({*workers.values()}) == 2
        assert all(map(alive, workers.values()))
        process.kill()
        process.wait()
        assert gone(workers[process.pid])
        assert all(map(alive, (child, workers[child])))
    finally:
        os.kill(child, signal.SIGKILL)
    assert gone(workers[child])
    process.stdout.close()


def test_a_pickled_grader_is_a_new_one_with_its_own_worker():
    with Grader(timeout=3.0) as grader:
        misgraded(grader, 1_000, 2)
        with pickle.loads(pickle.dumps(grader)) as other:
            assert other.timeout == 3.0
            assert other._worker is None
            assert misgraded(other, 1_000, 2) == []
            assert other._worker._process.pid != grader._worker._process.pid
