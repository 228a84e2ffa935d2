"""Runs in buckets: machines share chunks, whatever fails, and the result is that of one machine on
a local disk, byte for byte."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from harness.processes import prepare, records
from harness.processes import started as processes
from harness.rollouts import make_rollouts
from harness.stores import faulty_proxy, gcs_emulator, machine, memory_store, now_and_then
from zip_rc_jax.cli.main import main
from zip_rc_jax.data.rollouts import PartialRollouts, write_rollouts
from zip_rc_jax.models.io.load import load
from zip_rc_jax.pipeline import chunks
from zip_rc_jax.pipeline.chunks import write_in_chunks
from zip_rc_jax.pipeline.run_dir import CLAIMS
from zip_rc_jax.runtime import claims, working_copy
from zip_rc_jax.runtime.buckets import Bucket
from zip_rc_jax.runtime.claims import Claims
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.working_copy import MARKER

URL = "memory://b/run"
ITEMS = make_rollouts(46)
SIZE = 4  # of a chunk, so that the last one is short


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(chunks, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.5)
    with memory_store() as store:
        yield store


def graded(part):
    return [dataclasses.replace(x, correct=float(x.seed % 2)) for x in part]


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone") / "graded"
    write_in_chunks("grade", directory, {"a": 1}, ITEMS, SIZE, graded)
    return files(directory)


def share(copies, make=graded, settings=None):
    """The same stage on several machines at once. Returns what each raised."""
    raised = []

    def run(copy):
        try:
            write_in_chunks("grade", copy.root / "graded", settings or {"a": 1}, ITEMS, SIZE, make)
            copy.sync()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(copy,)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def fetched(alone):
    reader = machine(URL, 99)
    assert reader.fetch(["graded"])
    assert files(reader.root / "graded") == alone
    left = [x for x in reader.bucket.names() if not x.startswith(("graded/", ".claims/"))]
    assert left == [], "no chunk is left"


@pytest.mark.parametrize("count", [1, 3])
def test_machines_share_the_chunks_and_make_each_of_them_once(memory, alone, count):
    made = collections.Counter()

    def make(part):
        made[part[0].seed] += 1
        time.sleep(0.002)
        return graded(part)

    assert share([machine(URL, n) for n in range(count)], make) == []
    assert sorted(made.values()) == [1] * 12
    fetched(alone)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_among_failures_and_listings_that_lag(memory, alone, seed):
    memory.before = staticmethod(now_and_then(0.15, seed))
    memory.after = staticmethod(now_and_then(0.1, seed + 100))
    memory.lag = seed * 3
    assert share([machine(URL, n) for n in range(3)]) == []
    memory.before = memory.after = staticmethod(lambda operation, path: None)
    memory.lag = 0
    fetched(alone)


@pytest.mark.parametrize("seed", range(4))
def test_the_chunks_of_a_machine_that_fails_are_made_by_the_others(memory, alone, seed):
    draw, lock = random.Random(seed), threading.Lock()
    left = [3]  # machines that may fail

    def make(part):
        with lock:
            if left[0] > 1 and draw.random() < 0.3:
                left[0] -= 1
                raise ZeroDivisionError
        return graded(part)

    raised = share([machine(URL, n) for n in range(3)], make)
    assert len(raised) == 3 - left[0]
    fetched(alone)


def test_permission_that_is_taken_away_in_the_middle_stops_with_a_word_and_resumes(memory, alone):
    taken, begun = [], []

    def refuse(operation, path):
        if taken:
            raise PermissionError(13, "denied")

    def make(part):
        begun.append(part[0].seed)
        if len(begun) == 6:
            taken.append(True)
        return graded(part)

    memory.before = staticmethod(refuse)
    [error] = share([machine(URL)], make)
    assert isinstance(error, UsageError)
    assert "access is denied" in str(error)
    taken.clear()
    made = []

    def rest(part):
        made.append(part[0].seed)
        return graded(part)

    assert share([machine(URL, 1)], rest) == []
    assert not set(made) & set(begun[:5]), "finished chunks are kept"
    assert sorted(made + begun[:5]) == sorted(x.seed for x in ITEMS[::SIZE])
    fetched(alone)


def test_a_machine_that_comes_when_all_is_done_makes_nothing(memory, alone):
    assert share([machine(URL)]) == []

    def never(part):
        raise AssertionError

    assert share([machine(URL, 1)], never) == []
    fetched(alone)


def test_a_machine_with_other_settings_is_refused_and_told_which(memory):
    PartialRollouts(
        machine(URL).root / ".graded.partial", fingerprint={"a": 1, "chunk_size": SIZE}
    ).add(0, ITEMS[:SIZE])
    [error] = share([machine(URL, 1)], settings={"a": 2})
    assert isinstance(error, UsageError)
    assert "a" in str(error)
    assert "restore these settings" in str(error)


def test_a_damaged_chunk_in_the_bucket_is_named(memory):
    copy = machine(URL)
    PartialRollouts(copy.root / ".graded.partial", fingerprint={"a": 1, "chunk_size": SIZE}).add(
        0, graded(ITEMS[:SIZE])
    )
    name = ".graded.partial/chunk-00000000.jsonl"
    bucket = Bucket(URL)
    bucket.write(name, bucket.read(name).replace(b'"correct": 1.0', b'"correct": 0.0'))
    [error] = share([machine(URL, 1)])
    assert "do not fit the digest" in str(error)


# ---- commands


@pytest.fixture
def rollouts_in_bucket(memory, tmp_path):
    """What `zip-rc grade` reads, in the bucket and in a local run directory."""
    items = [dataclasses.replace(x, correct=float("nan"), response=f"so {x.answer}") for x in ITEMS]
    copy = machine(URL)
    for directory in (copy.root, tmp_path / "run"):
        write_rollouts(directory / "rollouts", items, metadata={"rollout": {}})
    copy.sync()
    return tmp_path


def grade(run_dir):
    return main(["grade", "configs/chain_sum_demo.yaml", f"run_dir={run_dir}"])


def test_a_command_on_a_bucket_gives_the_files_of_a_local_run(rollouts_in_bucket, capsys):
    assert grade(rollouts_in_bucket / "run") == 0
    said = capsys.readouterr().err
    assert grade(URL) == 0
    there = re.sub(r"\d+ chunks here", "", capsys.readouterr().err)
    assert there.splitlines()[:-1] == said.splitlines()[:-1]
    reader = machine(URL, 1)
    reader.fetch(["graded", "grades.json"])
    assert files(reader.root / "graded") == files(rollouts_in_bucket / "run" / "graded")
    assert json.loads((reader.root / "grades.json").read_bytes())["all"]["responses"] == 46
    assert grade(URL) == 0, "it is there already"
    # Another process's command, which has nothing yet.
    working_copy._copies.clear()
    assert grade(URL) == 0


def test_a_bucket_without_permission_is_refused_before_any_work(memory, capsys):
    def refuse(operation, path):
        if operation == "pipe_file":
            raise PermissionError(13, "denied")

    memory.before = staticmethod(refuse)
    assert grade(URL) == 2
    said = capsys.readouterr().err
    assert said.startswith("zip-rc grade: run_dir: memory://b/run/.zip_rc_")
    assert "access is denied" in said
    assert "storage.objectAdmin" in said


def test_missing_inputs_are_named_by_their_address(memory, capsys):
    assert grade(URL) == 2
    assert "memory://b/run/rollouts: there is no such directory" in capsys.readouterr().err


def test_two_commands_of_one_training_are_kept_apart(memory, capsys):
    with Claims(Bucket(URL), CLAIMS) as holder:
        holder.take("critic")
        config = "configs/chain_sum_demo.yaml"
        assert main(["train", config, "--stage", "critic", f"run_dir={URL}"]) == 2
    said = capsys.readouterr().err
    assert f"process {os.getpid()} on " in said
    assert "is at work there" in said


# ---- processes, on the emulator


def started(arguments, tmp_path, number):
    log = (tmp_path / f"log-{number}").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "zip_rc_jax", *arguments],
        stderr=log,
        stdout=log,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "ZIP_RC_WORK": str(tmp_path / f"work-{number}")},
    )


SMALL = ["rollout.prompts=480", "rollout.rows=8", "rollout.max_tokens=48", "rollout.samples=2"]


@pytest.mark.slow
def test_killed_processes_on_a_bucket_end_with_the_bytes_of_one_on_a_disk(tmp_path):
    """Three processes sample; each is killed or stopped at a random time; others go on."""
    config, draw = "configs/chain_sum_demo.yaml", random.Random(1)
    command = ["rollout", config, *SMALL]
    assert started([*command, f"run_dir={tmp_path / 'run'}"], tmp_path, "alone").wait() == 0
    with gcs_emulator("runs") as url:
        target = [*command, "run_dir=gs://runs/mine"]
        bucket = Bucket("gs://runs/mine")
        for number, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
            process = started(target, tmp_path, number)
            before = len(bucket.names(".rollouts.partial"))
            deadline = time.monotonic() + 240
            while len(bucket.names(".rollouts.partial")) <= before + 1:
                assert process.poll() is None, (tmp_path / f"log-{number}").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(draw.random())
            process.send_signal(how)
            assert process.wait() == (130 if how == signal.SIGTERM else -9)
            assert not bucket.exists(f"rollouts/{MARKER}")
        last = [started(target, tmp_path, n) for n in ("a", "b")]
        assert [x.wait() for x in last] == [0, 0], (tmp_path / "log-a").read_text()
        made = [(tmp_path / f"log-{n}").read_text() for n in ("a", "b")]
        assert all("done in" in text for text in made)
        reader = machine("gs://runs/mine")
        assert reader.fetch(["rollouts"])
        assert files(reader.root / "rollouts") == files(tmp_path / "run" / "rollouts")
        assert bucket.names(".rollouts.partial") == []
        assert url in os.environ["STORAGE_EMULATOR_HOST"]


@pytest.mark.slow
def test_processes_that_know_each_other_share_a_bucket_too(tmp_path):
    """As on a TPU pod, where they divide the chunks beforehand; then training is refused."""
    words = ["configs/chain_sum_demo.yaml", *SMALL, "rollout.prompts=96"]
    with processes(["rollout", *words, f"run_dir={tmp_path / 'run'}"], tmp_path) as here:
        assert here.wait() == [0], here.text()
    with gcs_emulator("runs"):
        there = [*words, "run_dir=gs://runs/mine"]
        with processes(["rollout", *there], tmp_path, count=2) as here:
            assert here.wait() == [0, 0], here.text()
        with processes(["grade", *there], tmp_path, count=2) as here:
            assert here.wait() == [0, 0], here.text()
        reader = machine("gs://runs/mine")
        assert reader.fetch(["rollouts", "graded"]) == ["rollouts", "graded"]
        assert files(reader.root / "rollouts") == files(tmp_path / "run" / "rollouts")
        assert not [x for x in reader.bucket.names() if ".partial" in x]
        with processes(["train", *there, "--stage", "critic"], tmp_path, count=2) as here:
            assert here.wait() == [2, 2], here.text()
        assert "mount the bucket (gcsfuse)" in here.text()


@pytest.mark.slow
def test_a_training_killed_on_a_bucket_goes_on_elsewhere_bit_for_bit(tmp_path):
    """Every process has a disk of its own, so all that it goes on from lay in the bucket."""
    config = prepare(tmp_path, steps=60, save_seconds=0.2)
    command = ["train", config, "--stage", "final"]
    with processes(command, tmp_path) as here:
        assert here.wait() == [0], here.text()
    with gcs_emulator("runs"):
        bucket = Bucket("gs://runs/mine")
        command.append("run_dir=gs://runs/mine")
        for how in (signal.SIGKILL, signal.SIGTERM):
            before = checkpoints(bucket)
            with processes(command, tmp_path) as here:
                while max(checkpoints(bucket)) <= max(before):
                    assert here.processes[0].poll() is None, here.text()
                    time.sleep(0.05)
                here.processes[0].send_signal(how)
                assert here.wait() == [130 if how == signal.SIGTERM else -9], here.text()
        reached = max(checkpoints(bucket))
        with processes(command, tmp_path) as here:
            assert here.wait() == [0], here.text()
        assert 0 < reached < 60
        reader = machine("gs://runs/mine")
        reader.fetch(["final"])
        assert len(checkpoints(bucket)) <= 3, "old checkpoints are deleted there too"
        assert records(reader.root / "final") == records(tmp_path / "run" / "final")
        found, expected = load(reader.root / "final"), load(tmp_path / "run" / "final")
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def checkpoints(bucket):
    """Steps of the complete checkpoints, and 0."""
    found = (re.fullmatch(rf"final/checkpoints/(\d+)/{MARKER}", x) for x in bucket.names("final"))
    return {0, *(int(match[1]) for match in found if match)}


def at_random(rate, seed):
    """HTTP failures, never more than three in a row."""
    draw, row, lock = random.Random(seed), [0], threading.Lock()

    def fault(number):
        with lock:
            if row[0] < 3 and draw.random() < rate:
                row[0] += 1
                return draw.choice([429, 503, "drop", "lost"])
            row[0] = 0
            return None

    return fault


@pytest.mark.slow
def test_nothing_is_lost_among_http_failures_of_the_emulator(alone, tmp_path, monkeypatch):
    """The requests of gcsfs itself: refused, dropped, and carried out without an answer."""
    monkeypatch.setattr(chunks, "WAIT_SECONDS", 0.1)
    with gcs_emulator("runs") as url:
        machine("gs://runs/warm")  # gcsfs is imported
        with faulty_proxy(url, at_random(0.1, 1)) as statuses:
            assert share([machine("gs://runs/mine", n) for n in range(2)]) == []
        assert {429, 503, 0} <= set(statuses)
        reader = machine("gs://runs/mine", 9)
        assert reader.fetch(["graded"])
        assert files(reader.root / "graded") == alone


@pytest.mark.slow
def test_permission_taken_away_on_the_emulator_is_said_and_nothing_is_lost(alone, monkeypatch):
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.5)
    with gcs_emulator("runs") as url:
        machine("gs://runs/warm")
        with faulty_proxy(url, lambda number: 403 if number > 20 else None):
            [error] = share([machine("gs://runs/mine")])
        assert isinstance(error, UsageError)
        assert "access is denied" in str(error)
        before = len(Bucket("gs://runs/mine").names(".graded.partial"))
        assert before > 1
        assert share([machine("gs://runs/mine", 1)]) == []
        reader = machine("gs://runs/mine", 2)
        assert reader.fetch(["graded"])
        assert files(reader.root / "graded") == alone


STAGES = ("rollout", "grade", "train critic", "label", "train lite", "train final")
TINY = [
    *("rollout.prompts=24", "rollout.rows=8", "rollout.max_tokens=12", "decode.max_tokens=12"),
    *("evaluate.prompts=8", "evaluate.betas=[0.05]", "evaluate.bootstrap=50", "replay.samples=8"),
    *(f"{x}.steps=3" for x in ("critic", "lite", "final")),
    *(f"{x}.batch_rows=4" for x in ("critic", "lite", "final")),
    *(f"{x}.eval_rollouts=8" for x in ("critic", "lite", "final")),
]


@pytest.mark.slow
def test_a_whole_run_on_a_bucket_is_the_one_on_a_disk(memory, tmp_path, capsys):
    """Every command starts with nothing but the bucket, as on a new machine."""

    def command(words, run_dir):
        working_copy._copies.clear()
        name, *stage = words.split()
        overrides = [f"run_dir={run_dir}", *TINY]
        stage = ["--stage", *stage] if stage else []
        status = main([name, "configs/chain_sum_demo.yaml", *stage, *overrides])
        said = capsys.readouterr()
        assert status == 0, said.err
        return re.sub(r"(?m)^.*(ETA|done in|tok/s).*\n?", "", said.err).replace(str(run_dir), "RUN")

    for words in (*STAGES, "evaluate", "replay", "replay"):
        local, there = command(words, tmp_path / "run"), command(words, URL)
        assert without_paths(there) == without_paths(local), words
    reader = machine(URL, 1)
    reader.fetch(["rollouts", "graded", "labelled", "report", "replay", "final", "pool"])
    for name in ("rollouts", "graded", "pool"):
        ours, theirs = files(tmp_path / "run" / name), files(reader.root / name)
        if name == "pool":  # it names the times of the model's files
            for changing in ("metadata.json", "digests.json"):
                ours.pop(changing), theirs.pop(changing)
        assert ours == theirs
    for name in ("report/results.jsonl", "report/pool.jsonl", "report/table.json"):
        assert stable(reader.root / name) == stable(tmp_path / "run" / name)
    found, expected = load(reader.root / "final"), load(tmp_path / "run" / "final")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def stable(path):
    """A file without the seconds in it."""
    return without_paths(re.sub(r'"[a-z_]*(seconds|time)[a-z_]*": [^,}]*', "", path.read_text()))


def without_paths(text):
    return re.sub(r"(/tmp\S+|memory:\S+)", "PATH", text)
