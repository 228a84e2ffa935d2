"""Killed and stopped while chunks are joined: what stays on the disk, what is said, and that the
same command ends as if nothing was."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from harness.processes import SECONDS, started
from harness.rollouts import assert_same, make_rollouts
from zip_rc_jax.cli import main as cli
from zip_rc_jax.data.parquet import GenerationInfo, write_parquet
from zip_rc_jax.data.rollouts import read_rollouts, write_rollouts
from zip_rc_jax.pipeline.chunks import write_in_chunks
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.signals import Interrupted, stop_signal, stops_with_a_word
from zip_rc_jax.runtime.storage import write_text
from zip_rc_jax.runtime.temporaries import SILENT_SECONDS, remove_leftovers, temporary_path

# `zip-rc` whose joining of chunks never comes to an end, and says when it is at it.
NEVER_JOINED = """
import sys, time
from zip_rc_jax.data.rollouts import PartialRollouts
whole = PartialRollouts.all
def never(self, ids=None):
    while True:
        for rollout in whole(self, ids):
            yield rollout
            print("joining", file=sys.stderr, flush=True)
            time.sleep(0.01)
PartialRollouts.all = never
from zip_rc_jax.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def config(tmp_path):
    """Of a run that grades twelve rollouts."""
    write_rollouts(tmp_path / "data", make_rollouts(12), metadata={"made": "by hand"})
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\ndata: {tmp_path}/data\n")
    return path


@contextlib.contextmanager
def joining(config):
    """A process that grades, at the moment when it joins its chunks."""
    with started(
        ["grade", config], config.parent, command=lambda _: [sys.executable, "-c", NEVER_JOINED]
    ) as here:
        end = time.monotonic() + SECONDS
        while "joining" not in here.text():
            assert here.processes[0].poll() is None, here.text()
            assert time.monotonic() < end
            time.sleep(0.02)
        yield here


def names(directory):
    """What lies there besides the progress of stages, which stays for `zip-rc status`."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".progress")


def test_a_kill_while_chunks_are_joined_leaves_nothing_for_ever(config):
    run = config.parent / "run"
    with joining(config) as here:
        (temporary,) = run.glob(".graded.*.tmp")
        assert remove_leftovers(run) == [], "its process lives"
        assert f"-{here.processes[0].pid}-" in temporary.name
        here.processes[0].kill()
        assert here.wait() == [-9]
    assert temporary.is_dir(), "a kill leaves it"
    assert cli.main(["grade", str(config)]) == 0
    assert names(run) == ["graded", "grades.json"]
    graded = read_rollouts(run / "graded")
    assert [r.output_token_ids.tolist() for r in graded] == [
        r.output_token_ids.tolist() for r in make_rollouts(12)
    ]


def test_a_sigterm_while_chunks_are_joined_says_what_is_kept_and_how_to_go_on(config):
    run = config.parent / "run"
    with joining(config) as here:
        here.processes[0].send_signal(signal.SIGTERM)
        assert here.wait() == [130], here.text()
        last = here.text().strip().splitlines()[-1]
    assert (
        last
        == "zip-rc grade: grade: stopped while its chunks were joined. All of them are kept. The "
        "same command resumes."
    )
    assert names(run) == [".graded.partial"], "no half of a dataset"
    assert cli.main(["grade", str(config)]) == 0
    assert names(run) == ["graded", "grades.json"]


def test_what_a_kill_after_the_last_rename_left_goes_with_the_next_call(config):
    run = config.parent / "run"
    assert cli.main(["grade", str(config)]) == 0
    (run / ".graded.partial").mkdir()
    (run / ".graded.partial/chunk-00000000.jsonl").write_text("old")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = temporary_path(run / "graded")
    leftover = leftover.with_name(leftover.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    (leftover / "replaced").mkdir(parents=True)
    assert cli.main(["grade", str(config)]) == 0
    assert names(run) == ["graded", "grades.json"]


def chunked(directory, items, make):
    return write_in_chunks("test", directory, {"seed": 1}, items, 2, make)


def test_a_signal_that_comes_while_the_last_files_are_written_is_not_lost(tmp_path, monkeypatch):
    """The dataset is finished, and what would come after it does not begin."""
    rmtree = shutil.rmtree

    def signalled(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return rmtree(*args, **more)

    monkeypatch.setattr("zip_rc_jax.data.rollouts.shutil.rmtree", signalled)
    with pytest.raises(Interrupted, match="stopped. .*graded is finished"):
        chunked(tmp_path / "graded", range(4), lambda part: make_rollouts(len(part)))
    monkeypatch.undo()
    assert len(read_rollouts(tmp_path / "graded")) == 4
    assert names(tmp_path) == ["graded"]


# ---- whose temporaries they are


def aged(path, seconds):
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (time.time() - seconds,) * 2)


def renamed(path, of, to):
    return path.rename(path.with_name(re.sub(of, to, path.name)))


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_only_temporaries_of_the_dead_are_removed(tmp_path, kind):
    def made(change=None, age=0.0, name="graded"):
        path = temporary_path(tmp_path / name)
        if kind == "file":
            path.write_text("half")
        else:
            (path / "inner").mkdir(parents=True)
            (path / "inner/shard").write_text("half")
        path = renamed(path, *change) if change else path
        aged(path, age)
        return path

    pid, old = os.getpid(), SILENT_SECONDS + 3600
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = made(age=old)
    of_the_dead = made((f"-{pid}-", f"-{dead.pid}-"))
    # a process of this number began at another time
    same_number = made((r"-([0-9]+)-([0-9a-f]{8})\.tmp", r"-1-\2.tmp"))
    elsewhere, elsewhere_silent = (
        made((r"\.[0-9a-f]{8}-", ".00000000-"), age=age) for age in (60, old)
    )
    earlier, earlier_silent = (
        made((r"\.[0-9a-f]{8}-[0-9]+-[0-9]+-", "."), age=age) for age in (60, old)
    )
    foreign = [
        tmp_path / name
        for name in (
            ".graded.tmp",
            "graded.tmp",
            ".graded.partial",
            ".graded.0123.tmp",
            ".graded.x-1-2-3.tmp",
        )
    ]
    for path in foreign:
        path.mkdir()
        aged(path, old)
    other = made((f"-{pid}-", f"-{dead.pid}-"), name="labelled")
    removed = {of_the_dead, same_number, elsewhere_silent, earlier_silent}
    assert set(remove_leftovers(tmp_path, "graded")) == removed
    assert {*tmp_path.iterdir()} == {mine, elsewhere, earlier, other, *foreign}
    assert remove_leftovers(tmp_path) == [other]
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_a_living_process_of_another_number_keeps_its_temporaries(tmp_path):
    code = (
        "import sys, pathlib, time; from zip_rc_jax.runtime.temporaries import temporary_path\n"
        + (
            f"temporary_path(pathlib.Path({str(tmp_path / 'graded')!r})).mkdir(); print('made', "
            "flush=True); time.sleep(600)"
        )
    )
    here = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert here.stdout.readline() == "made\n"
        (temporary,) = tmp_path.iterdir()
        aged(temporary, 2 * SILENT_SECONDS)  # it hangs, and lives
        assert remove_leftovers(tmp_path) == []
    finally:
        here.kill()
    # Before its parent asks for its status it is a zombie, which still has a number.
    os.waitid(os.P_PID, here.pid, os.WEXITED | os.WNOWAIT)
    assert remove_leftovers(tmp_path) == [temporary]
    here.wait()
    here.stdout.close()


def test_every_writer_names_its_temporaries_so_and_leaves_none(tmp_path, monkeypatch):
    seen = []
    replace, rename = pathlib.Path.replace, pathlib.Path.rename
    monkeypatch.setattr(
        pathlib.Path, "replace", lambda self, to: seen.append(self.name) or replace(self, to)
    )
    monkeypatch.setattr(
        pathlib.Path,
        "rename",
        lambda self, to: seen.append(self.parent.parent.name) or rename(self, to),
    )
    rollouts = [r for r in make_rollouts(9) if len(r.output_token_ids)]
    write_rollouts(tmp_path / "r", rollouts, metadata={})
    write_text(tmp_path / "t.txt", "x")
    unlabelled = [r for r in rollouts if r.correct != r.correct and r.value != r.value]
    write_parquet(
        tmp_path / "p.parquet", unlabelled, settings=GenerationInfo("m", 1.0, 0.0, 9, False)
    )
    monkeypatch.undo()
    assert (
        len(
            [
                name
                for name in seen
                if re.fullmatch(
                    rf"\..+\.[0-9a-f]{{8}}-{os.getpid()}-[0-9]+-[0-9a-f]{{8}}\.tmp", name
                )
            ]
        )
        >= 3
    )
    assert names(tmp_path) == ["p.parquet", "r", "t.txt"]


def test_leftovers_beside_a_parquet_file_and_chunks_go_too(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    partial = tmp_path / ".graded.partial"
    partial.mkdir()
    for path in (tmp_path / "p.parquet", partial / "chunk-00000000.jsonl"):
        leftover = temporary_path(path)
        leftover.with_name(leftover.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")).write_text(
            "half"
        )
    rollouts = [
        r
        for r in make_rollouts(9)
        if len(r.output_token_ids) and r.correct == r.correct and r.value == r.value
    ]
    write_parquet(
        tmp_path / "p.parquet", rollouts, settings=GenerationInfo("m", 1.0, 0.0, 9, False)
    )
    assert_same(read_rollouts(chunked(tmp_path / "graded", range(3),
    lambda part: make_rollouts(len(part)))), [
        *make_rollouts(2), *make_rollouts(1)], tolerance=1e-7)  # fmt: skip
    assert names(tmp_path) == ["graded", "p.parquet"]


def test_of_several_processes_the_first_one_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    removed = []
    monkeypatch.setattr(
        "zip_rc_jax.pipeline.chunks.remove_leftovers", lambda *args: removed.append(args)
    )
    chunked(tmp_path / "graded", range(3), lambda part: make_rollouts(len(part)))
    assert removed == []


# ---- signals


@pytest.fixture
def default_signals():
    """SIGTERM and SIGHUP are handled as in a terminal. Under nohup a hang-up is ignored."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["evaluate", "decode", "grade", "export"])
def test_a_command_that_is_asked_to_stop_says_so_and_ends_as_after_ctrl_c(
    tmp_path, capsys, monkeypatch, number, command
):
    before = signal.getsignal(number)

    def asked(*_):
        os.kill(os.getpid(), number)
        time.sleep(600)

    monkeypatch.setattr(f"zip_rc_jax.cli.{command}.run", asked)
    (tmp_path / "c.yaml").write_text("{}")
    arguments = {
        "decode": ["model", "--prompt", "x"],
        "export": ["model", str(tmp_path / "out")],
    }.get(command, [str(tmp_path / "c.yaml")])
    assert cli.main([command, *arguments]) == 130
    again = "resumes" if command in ("evaluate", "grade") else "starts over"
    assert (
        capsys.readouterr().err
        == f"zip-rc {command}: stopped by {number.name}. The same command {again}.\n"
    )
    assert signal.getsignal(number) == before, "it is as it was"


def test_under_nohup_a_terminal_that_is_gone_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops_with_a_word(), stop_signal() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_signals")
def test_within_a_step_signals_are_collected_and_raise_nothing():
    with stops_with_a_word():
        with stop_signal() as received:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)
        assert received == [15, 1, 2]
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


# ---- the same bytes

WRITES = """
import sys; sys.path.insert(0, "tests")
from harness.rollouts import make_rollouts
from zip_rc_jax.data.parquet import GenerationInfo, write_parquet
from zip_rc_jax.data.rollouts import write_rollouts
rollouts = make_rollouts(40)
write_rollouts(sys.argv[1] + "/r", rollouts, metadata={"b": 1, "a": {"d": [2], "c": 3}})
labelled = [r for r in rollouts if len(r.output_token_ids) and r.correct == r.correct and r.value == r.value]
write_parquet(sys.argv[1] + "/p.parquet", labelled, settings=GenerationInfo("m", 1.0, 0.0, 9, False), metadata={"b": 1, "a": 2})
"""  # noqa: E501


@pytest.mark.slow
def test_equal_rollouts_are_equal_bytes_in_every_file_whoever_writes_them(tmp_path):
    """Three processes of other hash seeds.

    Protocol buffers order the fields of an example by an address, another one in each.
    """
    here = []
    for seed in ("1", "2", "3"):
        (tmp_path / seed).mkdir()
        here.append(
            subprocess.Popen(
                [sys.executable, "-c", WRITES, str(tmp_path / seed)],
                env={**os.environ, "PYTHONHASHSEED": seed},
            )
        )
    assert [process.wait(SECONDS) for process in here] == [0, 0, 0]
    files = [
        {
            p.relative_to(tmp_path / seed): p.read_bytes()
            for p in (tmp_path / seed).rglob("*")
            if p.is_file()
        }
        for seed in "123"
    ]
    assert len(files[0]) == 7  # a shard, three files of TFDS and ours, digests, summary, the table
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        assert [str(name) for name in other if other[name] != files[0][name]] == []
