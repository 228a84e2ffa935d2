"""`zip-rc status`: what it says is what the files and the processes are."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import time

import pytest

from harness.processes import prepare, started, wait_for_step
from harness.rollouts import make_rollouts
from harness.stores import machine, memory_store
from zip_rc_jax.cli.main import main
from zip_rc_jax.data.rollouts import PartialRollouts, write_rollouts
from zip_rc_jax.pipeline.status import RESULTS, run_status
from zip_rc_jax.runtime import progress_file
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.progress_file import ProgressFile, local_file, recorded
from zip_rc_jax.runtime.signals import Interrupted
from zip_rc_jax.runtime.temporaries import this_process

ROLLOUTS = [
    dataclasses.replace(x, correct=float("nan"), response=f"so {x.answer}")
    for x in make_rollouts(10)
]


def stages(run_dir):
    return {one.stage: one for one in run_status(str(run_dir)).stages}


def states(run_dir):
    return {name: one.state for name, one in stages(run_dir).items() if one.state != "absent"}


def told(directory, stage="rollout", **changes):
    """A progress file as a process leaves it."""
    written = {}
    file = ProgressFile(stage, written.__setitem__, 0)
    file.begin("sampling", 100, 0)
    file.update(40, "fine")
    [(name, data)] = written.items()
    about = json.loads(data) | changes
    path = directory / name.replace(this_process(), str(about["process"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about))
    return path


def test_a_finished_stage_is_done_and_what_it_made_is_all_that_counts(tmp_path):
    write_rollouts(tmp_path / "rollouts", ROLLOUTS, metadata={"rollout": {}})
    assert main(["grade", "configs/chain_sum_demo.yaml", f"run_dir={tmp_path}"]) == 0
    assert states(tmp_path) == {"rollout": "done", "grade": "done"}
    [path] = (tmp_path / ".progress").iterdir()
    about = json.loads(path.read_bytes())
    assert (about["stage"], about["state"], about["done"], about["total"]) == (
        *("grade", "done"),
        *(10, 10),
    )
    assert (about["host"], about["pid"], about["error"]) == (platform.node(), os.getpid(), None)


def test_a_process_at_work_is_running_with_its_rate_and_end(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: clock[0])
    with recorded(local_file(tmp_path, "rollout", 1)), progress("rollout", 100, 20) as bar:
        assert stages(tmp_path)["rollout"].state == "running"
        for seconds, done in ((60, 30), (80, 70)):  # the first also waited for the compiler
            clock[0] = seconds
            bar(done, f"{done} done")
        found = stages(tmp_path)["rollout"]
    assert (found.state, found.done, found.total, found.rate, found.eta) == (
        *("running", 70, 100),
        *(2.0, 15.0),
    )
    assert found.workers[0].note == "70 done"
    assert states(tmp_path) == {"rollout": "stopped"}, "no result is there"


def test_the_file_is_written_now_and_then_and_not_at_every_step(tmp_path):
    written = []
    file = ProgressFile("rollout", lambda name, data: written.append(data), 3600)
    with recorded(file), progress("rollout", 1000) as bar:
        for done in range(1000):
            bar(done, None)
        assert len(written) == 1
    assert len(written) == 2, "and at the end"
    assert json.loads(written[-1])["done"] == 999


def test_a_failure_is_kept_with_its_message(tmp_path):
    def fail(error):
        with recorded(local_file(tmp_path, "grade", 1)), progress("grade", 5):
            raise error

    with pytest.raises(ValueError, match="of no use"):
        fail(ValueError("it is of no use"))
    found = stages(tmp_path)["grade"]
    assert (found.state, found.error) == ("failed", "it is of no use")
    with pytest.raises(Interrupted):
        fail(Interrupted("stopped after 3 chunks"))
    found = stages(tmp_path)["grade"]
    assert (found.state, found.workers[0].error) == ("stopped", "stopped after 3 chunks")


def test_a_command_that_fails_before_its_work_leaves_no_file(tmp_path):
    assert main(["grade", "configs/chain_sum_demo.yaml", f"run_dir={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_written_stops_nobody(tmp_path):
    (tmp_path / ".progress").write_text("a file in its place")
    with recorded(local_file(tmp_path, "grade", 1)), progress("grade", 5) as bar:
        bar(3, None)
    assert (tmp_path / ".progress").read_text() == "a file in its place"


def test_dead_and_silent_processes_are_told_apart(tmp_path):
    host, _, start = this_process().split("-")
    dead, far = f"{host}-4000000-{start}", "ffffffff-1-1"
    told(tmp_path, process=dead)
    told(tmp_path, "grade", process=far, host="elsewhere", updated=time.time() - 1000)
    told(tmp_path, "label", process=far, host="elsewhere", updated=time.time() - 20)
    told(tmp_path, "critic", process=far, host="elsewhere", updated=time.time() + 1e6)
    found = stages(tmp_path)
    assert {name: found[name].workers[0].state for name in ("rollout", "grade", "label")} == {
        "rollout": "killed",
        "grade": "silent",
        "label": "running",
    }
    assert found["rollout"].state == found["grade"].state == "stopped"
    assert found["critic"].workers[0].silent == 0, "its clock is ahead"


def test_files_that_are_damaged_or_of_later_versions_are_passed_over(tmp_path):
    told(tmp_path).write_text("{")
    told(tmp_path, "grade", format=2)
    told(tmp_path, "label", done="many")
    assert states(tmp_path) == {}


def test_what_an_interruption_kept_is_counted(tmp_path):
    partial = PartialRollouts(tmp_path / ".rollouts.partial", fingerprint={})
    for number in range(3):
        partial.add(number, ROLLOUTS[:2])
    for step in (5, 10):
        (tmp_path / "final" / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "final" / "checkpoints" / str(step) / "x").write_text("")
    found = stages(tmp_path)
    assert (found["rollout"].state, found["rollout"].kept) == ("stopped", "3 chunks")
    assert (found["final"].state, found["final"].kept) == ("stopped", "checkpoint of step 10")


def test_a_bucket_is_read_as_a_directory_and_its_units_by_their_markers(tmp_path, capsys):
    url = "memory://b/run"
    with memory_store():
        copy = machine(url)
        write_rollouts(copy.root / "rollouts", ROLLOUTS, metadata={"rollout": {}})
        copy.sync()
        assert main(["grade", "configs/chain_sum_demo.yaml", f"run_dir={url}"]) == 0
        assert states(url) == {"rollout": "done", "grade": "done"}
        assert stages(url)["grade"].done == 10
        copy.bucket.delete(["graded/.zip-rc-unit.json"])
        assert states(url)["grade"] == "stopped"
        capsys.readouterr()
        assert main(["status", url]) == 0
        assert capsys.readouterr().out.startswith(f"{url}\n  policy    absent\n  rollout   done")
        assert main(["status", "memory://b/other"]) == 2
    assert "there is nothing in the bucket" in capsys.readouterr().err


def test_the_command_prints_lines_or_json(tmp_path, capsys):
    told(tmp_path, process="ffffffff-1-1", host="far", rate=2.0)
    told(tmp_path, "grade", process="ffffffff-1-1", state="failed", error="no room\x07")
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path)
    assert lines[2].startswith("  rollout   running   40/100  2/s  until 20")
    assert lines[2].endswith("(30 s)")
    assert "on far: running  2/s  fine, last word 0 s ago" in lines[3]
    assert main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["stage"] for one in found["stages"]] == list(RESULTS)
    assert found["stages"][1]["workers"][0]["host"] == "far"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/nothing"], "there is no such directory"),
        (["gs://"], "names no bucket"),
        (["configs", "--watch", "0"], "--watch 0.0: it counts seconds"),
    ],
)
def test_what_cannot_be_watched_is_refused(arguments, message, capsys):
    assert main(["status", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_is_seen_running_killed_and_done(tmp_path):
    config = prepare(tmp_path, steps=150, save_seconds=0.2)
    command, run = ["train", config, "--stage", "final"], tmp_path / "run"
    with started(command, tmp_path) as here:
        wait_for_step(run / "final", 20, here)
        found = stages(run)["final"]
        assert (found.state, found.total) == ("running", 150)
        here.processes[0].send_signal(signal.SIGKILL)
        here.wait()
    found = stages(run)["final"]
    assert (found.state, found.workers[0].state) == ("stopped", "killed")
    assert found.kept.startswith("checkpoint of step ")
    with started(command, tmp_path) as here:
        assert here.wait() == [0], here.text()
    found = stages(run)["final"]
    assert (found.state, found.done) == ("done", 150)
    assert len(found.workers) == 1, "the files of dead processes are removed"
