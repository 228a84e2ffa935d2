"""A tiny training run in processes of its own: `zip-rc train` as a user starts it, to be watched,
killed and started again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from harness.tiny import TINY_GRID, tiny_lm
from zip_rc_jax.data.rollouts import Rollout, write_rollouts
from zip_rc_jax.runtime.distributed import COORDINATOR, HEARTBEAT, PROCESS_ID, PROCESSES

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 900  # a process that takes longer hangs
CONFIG = """
run_dir: {directory}/run
policy: {{path: {directory}/policy}}
data: {directory}/data
grid: {{value_centres: {centres}, length_edges: {edges}}}
final:
  {{label: value, steps: {steps}, batch_rows: 6, row_tokens: 48, learning_rate: 1.0e-2, kl_weight: 1.0, kl_top_k: 5, log_every: 1,
    eval_rollouts: 16, evaluations: 2, loss_chunk: 64, save_seconds: {save_seconds}}}
"""  # noqa: E501


def rollouts(count=64, seed=0):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 18, (count, 4))
    return [
        Rollout(
            prompt_index=i // 2, sample_index=i % 2, level=0, seed=0, task="chain_sum", prompt="",
            question="", answer="", entry_json="",
            prompt_token_ids=prompts[i // 2], output_token_ids=[*rng.integers(1, 18, rng.integers(3,
            12)), 0], response="",
            finished=bool(i % 5), correct=float(rng.integers(2)), value=float(rng.random()),
        )
        for i in range(count)
    ]  # fmt: skip


def prepare(directory, *, steps, save_seconds=60.0):
    """Writes policy, rollouts and config; returns the config's path."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_lm().without_head().save(directory / "policy")
    write_rollouts(directory / "data", rollouts(), metadata={"made": "by hand"})
    path = directory / "config.yaml"
    centres, edges = list(TINY_GRID.reward_centres), list(TINY_GRID.length_edges)
    path.write_text(
        CONFIG.format(
            directory=directory,
            centres=centres,
            edges=edges,
            steps=steps,
            save_seconds=save_seconds,
        )
    )
    return path


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@dataclasses.dataclass
class Started:
    """Processes of one run, and the files that their output goes to."""

    processes: list[subprocess.Popen]
    logs: list[pathlib.Path]

    def wait(self):
        """Exit statuses, in order."""
        end = time.monotonic() + SECONDS
        return [process.wait(max(1, end - time.monotonic())) for process in self.processes]

    def text(self, index=0):
        return self.logs[index].read_text()

    def account(self, statuses):
        """What each process has written, with its exit status (None: it still runs)."""
        return "\n".join(
            f"---- process {index}, status {status}\n{self.text(index)}"
            for index, status in enumerate(statuses)
        )

    def stop(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a launcher's children too
            process.wait()


@contextlib.contextmanager
def started(arguments, directory, *, count=1, devices=1, command=None):
    """Starts `zip-rc ARGUMENTS` in `count` processes with `devices` CPU devices each.

    What still runs in the end is killed.

    Args:
      directory: for the logs.
      command: instead of `zip-rc`; called with the number of the process, it gives the words before
        the arguments.
    """
    here = Started([], [])
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("XLA_FLAGS", COORDINATOR, PROCESSES, PROCESS_ID)
    }
    # Programs are small: compiling them well would take longer than running them.
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(directory / "xla"),
        # A machine under load may hold a healthy process back for ten seconds.
        HEARTBEAT: "20",
        "PYTHONFAULTHANDLER": "1",  # a crash leaves its stack in the log
    }
    environment["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    )
    port = free_port()
    try:
        for index in range(count):
            several = (
                {COORDINATOR: f"localhost:{port}", PROCESSES: str(count), PROCESS_ID: str(index)}
                if count > 1
                else {}
            )
            here.logs.append(directory / f"log_{index}_{time.monotonic_ns()}")
            words = command(index) if command else [sys.executable, "-m", "zip_rc_jax"]
            with here.logs[-1].open("w") as log:
                here.processes.append(
                    subprocess.Popen(
                        [*words, *map(str, arguments)],
                        env=environment | several,
                        cwd=ROOT,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
        yield here
    finally:
        here.stop()


def cut(path):
    """Cuts the largest file below `path`, a checkpoint say, in half."""
    largest = max(
        (file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def records(stage):
    """The complete lines of metrics.jsonl, without what the clock decides."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in record.items() if "per_second" not in k} for record in found]


def wait_for_step(stage, step, here):
    """Returns once a run has logged `step`; it must still be alive until then."""
    end = time.monotonic() + SECONDS
    while not any(record["step"] >= step for record in records(stage)):
        statuses = [process.poll() for process in here.processes]
        assert not any(status is not None for status in statuses), here.account(statuses)
        assert time.monotonic() < end, here.account(statuses)
        time.sleep(0.02)
