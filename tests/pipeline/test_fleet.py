"""A fleet: the machines of a real local Ray cluster, which are killed, come late, or do not fit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from harness.processes import ROOT
from harness.stores import gcs_emulator, machine
from zip_rc_jax.cli.main import main
from zip_rc_jax.models.io.load import load
from zip_rc_jax.pipeline.fleet import check_address, worker_environment, worker_options
from zip_rc_jax.runtime.claims import Claims
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.locks import only_process

CONFIG = "configs/chain_sum_demo.yaml"
SMALL = ["rollout.rows=2", "rollout.max_tokens=48", "rollout.samples=2"]
SECONDS = 400  # a command that takes longer hangs


# ---- without a cluster


@pytest.mark.parametrize(
    ("resources", "options"),
    [
        ({"CPU": 200.0, "TPU": 4.0}, {"num_cpus": 0, "resources": {"TPU": 4.0}}),
        ({"CPU": 64.0, "GPU": 8.0}, {"num_cpus": 0, "num_gpus": 8.0}),
        ({"CPU": 2.0}, {"num_cpus": 1}),
        ({"CPU": 0.0, "memory": 1e9}, None),
    ],
)
def test_a_worker_takes_all_accelerators_of_its_machine(resources, options):
    assert worker_options(resources) == options


def test_a_worker_of_a_slice_does_not_wait_for_the_chips_of_others():
    assert worker_environment({"TPU": 4.0}) == {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
    }
    assert worker_environment({"GPU": 1.0}) == {}
    assert worker_environment({"CPU": 8.0}) == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    "address", ["nowhere", "host:", ":6379", "host:99999", "http://h:1", "a b:1"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError, match=r"--fleet .*neither auto nor HOST:PORT.*ray start --head"):
        check_address(address)


def test_an_address_where_nobody_listens_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=r"nobody listens there \(Connection refused\)"):
        check_address(f"127.0.0.1:{port}")
    check_address("auto")


def test_a_missing_ray_is_named_with_its_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["grade", CONFIG, f"run_dir={tmp_path}", "--fleet", "auto"]) == 2
    assert "pip install 'zip-rc-jax[fleet]'" in capsys.readouterr().err


# ---- on a cluster


@contextlib.contextmanager
def cluster(nodes=2):
    """A cluster whose head has no work to give, and so many machines of one CPU."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "JAX_PLATFORMS")}
    os.environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def command(run_dir, *arguments, address=None, stage="rollout", logs=None):
    """A command in a process of its own; `log` is what it has said so far."""
    fleet = ["--fleet", address] if address else []
    words = [sys.executable, "-m", "zip_rc_jax", stage, CONFIG, *SMALL, f"run_dir={run_dir}"]
    path = (logs or run_dir.parent) / f"log-{time.monotonic_ns()}"
    with path.open("wb") as log:
        process = subprocess.Popen([*words, *arguments, *fleet], stdout=log, stderr=log, cwd=ROOT)
    process.log = path.read_text
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(process):
    assert process.wait(SECONDS) == 0, process.log()


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def workers(run_dir):
    """Process ids of the workers that live, as the progress file says."""
    for path in (run_dir / ".progress").glob("rollout.*.json"):
        with contextlib.suppress(OSError, ValueError):
            found = re.findall(r":(\d+) [\d.e+]+/s", json.loads(path.read_bytes())["note"])
            return [int(pid) for pid in found if is_alive(int(pid))]
    return []


@contextlib.contextmanager
def held(pids):
    """Processes that stand still meanwhile, so that a fast machine leaves work for others."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_until(condition, process):
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.log()
        assert time.monotonic() < end, process.log()
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of 600 problems."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    with command(run_dir, "rollout.prompts=600") as process:
        finish(process)
    return files(run_dir / "rollouts")


@pytest.mark.slow
def test_workers_killed_ten_times_end_with_the_bytes_of_one_process(tmp_path, alone):
    draw, run_dir = random.Random(1), tmp_path / "run"
    with cluster() as machines:
        with command(run_dir, "rollout.prompts=600", address=machines.address) as process:
            for number in range(10):
                seen = wait_until(lambda: workers(run_dir), process)
                time.sleep(draw.random() / 2)
                victim = draw.choice(seen)
                with held(set(seen) - {victim}):
                    os.kill(victim, signal.SIGKILL)
                    said = number + 1
                    wait_until(lambda n=said: process.log().count("was lost") >= n, process)
            finish(process)
        assert "chunks are made again" in process.log()
    assert files(run_dir / "rollouts") == alone
    assert not (run_dir / ".rollouts.partial").exists()


@pytest.mark.slow
def test_a_machine_that_is_lost_and_one_that_comes_late(tmp_path, alone):
    run_dir = tmp_path / "run"
    with cluster(nodes=0) as machines:
        first = machines.add_node(num_cpus=1)
        with command(run_dir, "rollout.prompts=600", address=machines.address) as process:
            with held(wait_until(lambda: workers(run_dir), process)):
                machines.add_node(num_cpus=1)
                wait_until(lambda: len(workers(run_dir)) == 2, process)
                machines.remove_node(first, allow_graceful=False)
            wait_until(lambda: "was lost" in process.log(), process)
            finish(process)
    assert files(run_dir / "rollouts") == alone


@pytest.mark.slow
def test_a_fleet_that_is_stopped_keeps_its_chunks_and_one_process_goes_on(tmp_path, alone):
    run_dir = tmp_path / "run"
    with cluster() as machines:
        for how in (signal.SIGTERM, signal.SIGINT):
            with command(run_dir, "rollout.prompts=600", address=machines.address) as process:
                pids = wait_until(lambda: workers(run_dir), process)
                process.send_signal(how)
                assert process.wait(60) == 130
                assert re.search(r"stopped with \d+ of 150 chunks.*resumes", process.log())
            end = time.monotonic() + 30
            while any(map(is_alive, pids)):
                assert time.monotonic() < end, "workers end with the fleet"
                time.sleep(0.1)
            (run_dir / ".progress").rename(run_dir / f".progress-{how}")
    with command(run_dir, "rollout.prompts=600") as process:
        finish(process)
    assert files(run_dir / "rollouts") == alone


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_the_stages_after_it_are_made_by_a_fleet_too(tmp_path):
    """Rollouts, grades and labels by a fleet, beside those of one process."""
    names = {"rollout": "rollouts", "grade": "graded", "label": "labelled"}
    tiny = ["rollout.prompts=64", "critic.steps=2", "critic.batch_rows=4", "critic.eval_rollouts=8"]
    with cluster() as machines:
        for run_dir, address in ((tmp_path / "a", None), (tmp_path / "b", machines.address)):
            for stage in ("rollout", "grade", "train", "label"):
                more = ["--stage", "critic"] if stage == "train" else []
                given = None if stage == "train" else address
                with command(run_dir, *tiny, *more, address=given, stage=stage) as process:
                    finish(process)
    for name in names.values():
        assert files(tmp_path / "a" / name) == files(tmp_path / "b" / name)


@pytest.mark.slow
def test_machines_that_do_not_fit_are_named_with_the_reason(tmp_path):
    run_dir = tmp_path / "run"
    with cluster(nodes=0) as machines:
        # Without git nobody knows that this is the same checkout.
        unlike = {"GIT_DIR": "/nowhere", "ZIP_RC_COMMIT": "0ther"}
        other = machines.add_node(num_cpus=1, env_vars=unlike)
        with command(run_dir, "rollout.prompts=64", address=machines.address) as process:
            assert process.wait(SECONDS) == 2
        assert re.search(r"worker on \S+: it has zip-rc-jax .*0ther.* results would", process.log())
        machines.remove_node(other)
        model = tmp_path / "home"
        model.mkdir()
        load("embedded:chain_sum_policy").save(model / "policy")
        machines.add_node(num_cpus=1, env_vars={"HOME": "/nowhere"})
        os.environ["HOME"], before = str(model), os.environ["HOME"]
        try:
            policy = "policy.path=~/policy"
            with command(run_dir, "rollout.prompts=64", policy, address=machines.address) as found:
                assert found.wait(SECONDS) == 2
        finally:
            os.environ["HOME"] = before
        reason = r"on \S+: policy.path='~/policy': there is no such.*all machines must see"
        assert re.search(reason, found.log())


@pytest.mark.slow
def test_a_second_fleet_in_a_run_directory_is_told_who_holds_it(tmp_path):
    run_dir = tmp_path / "run"
    with cluster() as machines, only_process(run_dir / ".rollouts.partial", "rollout in"):
        with command(run_dir, "rollout.prompts=64", address=machines.address) as process:
            assert process.wait(SECONDS) == 2
        assert f"process {os.getpid()} on {os.uname().nodename}" in process.log()


@pytest.mark.slow
def test_an_address_where_something_else_listens_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with command(tmp_path / "run", "rollout.prompts=64", address=address) as process:
            assert process.wait(SECONDS) == 2
        assert re.search(r"--fleet 127.0.0.1:\d+: .*ray start", process.log(), re.S)


@pytest.mark.slow
def test_a_fleet_on_a_bucket_reads_there_and_its_driver_writes_there(tmp_path):
    """Grades of rollouts that lie in the bucket alone; a second fleet is refused meanwhile."""
    tiny = ["rollout.prompts=64"]
    for stage in ("rollout", "grade"):
        with command(tmp_path / "run", *tiny, stage=stage) as process:
            finish(process)
    with gcs_emulator("runs"), cluster() as machines:
        url = "gs://runs/mine"
        copy = machine(url)
        shutil.copytree(tmp_path / "run" / "rollouts", copy.root / "rollouts")
        copy.sync()
        address = machines.address
        with Claims(copy.bucket, ".claims/graded") as other:
            other.take("join")
            with command(url, address=address, stage="grade", logs=tmp_path) as process:
                assert process.wait(SECONDS) == 2
            assert f"process {os.getpid()} on {os.uname().nodename}" in process.log()
        with command(url, address=address, stage="grade", logs=tmp_path) as process:
            finish(process)
        reader = machine(url, 1)
        assert reader.fetch(["graded"])
        assert files(reader.root / "graded") == files(tmp_path / "run" / "graded")
        assert reader.bucket.names(".graded.partial") == []
