"""What is done in a run directory, what runs there, at what rate, until when, and what failed.

It reads names and small files alone, of a local run directory or of one in a bucket, and writes
nothing.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from zip_rc_jax.runtime.buckets import Bucket, is_bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress_file import FOLDER, FORMAT
from zip_rc_jax.runtime.storage import parse_json
from zip_rc_jax.runtime.temporaries import is_gone
from zip_rc_jax.runtime.working_copy import MARKER

SILENT_SECONDS = 300.0  # a process of another machine that said nothing for so long may be gone
# Stage -> what it makes, in the order of a run. A folder without this file is not finished.
RESULTS = {
    "policy": "policy/model",
    "rollout": "rollouts",
    "grade": "graded",
    "critic": "critic/model",
    "label": "labelled",
    "lite": "lite/model",
    "final": "final/model",
    "evaluate": "report/metadata.json",
    "replay": "replay/results.json",
}
TRAINED = ("policy", "critic", "lite", "final")


@dataclasses.dataclass(frozen=True)
class Worker:
    """One process that worked on a stage.

    Attributes:
      state: "running", "done", "stopped", "failed"; "killed" for one that ended without a word;
        "silent" for one of another machine that wrote nothing for five minutes.
      host, pid: of it.
      done, total, rate, eta, note, error: see `runtime/progress_file.py`.
      silent: seconds since its last word.
    """

    state: str
    host: str
    pid: int
    done: int
    total: int | None
    rate: float | None
    eta: float | None
    note: str
    error: str | None
    silent: float


@dataclasses.dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
      state: "done", "running", "failed", "stopped" (something is there and nobody is at work) or
        "absent".
      done, total: as on the progress bar; None where nobody says it.
      rate: per second, of all who are at work.
      eta: seconds until it is done at that rate.
      kept: what an interruption leaves, in words, e.g. "12 chunks".
      error: of the newest worker, if that failed.
      workers: newest first.
    """

    stage: str
    state: str
    done: int | None = None
    total: int | None = None
    rate: float | None = None
    eta: float | None = None
    kept: str = ""
    error: str | None = None
    workers: tuple[Worker, ...] = ()


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """A run directory at one moment.

    Attributes:
      run_dir: as it was given.
      time: seconds since 1970.
      stages: all of `RESULTS`, in order.
    """

    run_dir: str
    time: float
    stages: tuple[StageStatus, ...]


def run_status(run_dir: str) -> RunStatus:
    """Looks at a run directory.

    Raises:
      UsageError: there is none, or the bucket cannot be read.
    """
    names, read = _bucket_files(run_dir) if is_bucket(run_dir) else _local_files(run_dir)
    now = time.time()
    told: dict[str, list[tuple[float, Worker]]] = {}
    for name in sorted(x for x in names if x.startswith(f"{FOLDER}/")):
        stage, found = _worker(read(name), now)
        if found is not None:
            told.setdefault(stage, []).append(found)
    of_bucket = is_bucket(run_dir)
    stages = [
        _stage(stage, names, [w for _, w in sorted(told.get(stage, ()), key=_newest)], of_bucket)
        for stage in RESULTS
    ]
    return RunStatus(run_dir, now, tuple(stages))


def _newest(pair: tuple[float, Worker]) -> tuple[bool, float]:
    return pair[1].state not in ("running", "silent"), -pair[0]


def _stage(
    stage: str, names: frozenset[str], workers: Sequence[Worker], of_bucket: bool
) -> StageStatus:
    result = RESULTS[stage]
    mark = f"{result}/{MARKER}" if of_bucket else result
    is_file = "." in result.rpartition("/")[2]
    there = result in names if is_file else (mark in names or _has(names, result, of_bucket))
    at_work = [w for w in workers if w.state == "running"]
    kept = "" if there and stage not in ("evaluate", "replay") else _kept(stage, names)
    last = workers[0] if workers else None
    if at_work:
        state = "running"
    elif there and (last is None or last.state != "failed"):
        state = "done"
    elif last is not None and last.state == "failed":
        state = "failed"
    else:
        state = "stopped" if kept or workers else "absent"
    about = StageStatus(stage, state, kept=kept, workers=tuple(workers))
    if last is None:
        return about
    if state == "failed":
        about = dataclasses.replace(about, error=last.error)
    # Machines that share chunks count those of all, so the largest counts are the newest.
    counted = at_work or [last]
    done, total = max(w.done for w in counted), last.total
    rate = max((w.rate for w in at_work if w.rate), default=None)
    eta = None if rate is None or total is None else max(0, total - done) / rate
    return dataclasses.replace(about, done=done, total=total, rate=rate, eta=eta)


def _has(names: frozenset[str], folder: str, of_bucket: bool) -> bool:
    return not of_bucket and any(x.startswith(f"{folder}/") for x in names)


def _kept(stage: str, names: frozenset[str]) -> str:
    """What an interruption left, in words."""

    def count(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, name)) for name in names)

    if stage in TRAINED:
        found = {re.match(rf"{stage}/checkpoints/(\d+)/", name) for name in names}
        steps = [int(match[1]) for match in found if match]
        return f"checkpoint of step {max(steps)}" if steps else ""
    if stage == "evaluate":
        number = count(r"report/(.+/)?\.partial/(.+/)?[^/]+\.json")
        return f"{number} decodes" if number else ""
    if stage == "replay":
        number = count(r"(pools/)?\.[^/]+\.partial/samples-\d+\.json")
        return f"{number} files of a pool" if number else ""
    number = count(rf"\.{RESULTS[stage]}\.partial/chunk-\d+\.jsonl")
    return f"{number} chunks" if number else ""


def _worker(data: bytes | None, now: float) -> tuple[str, tuple[float, Worker] | None]:
    """Stage, and what a progress file says; None for one that cannot be read, or of a later
    format."""
    try:
        about = parse_json(data or b"")
        if about["format"] != FORMAT:
            return "", None
        silent = max(0.0, now - float(about["updated"]))
        state = str(about["state"])
        if state == "running" and is_gone(about["process"]):
            state = "killed"
        elif (
            state == "running" and silent > SILENT_SECONDS and about["host"] != os.uname().nodename
        ):
            state = "silent"
        worker = Worker(
            state,
            str(about["host"]),
            int(about["pid"]),
            int(about["done"]),
            None if about["total"] is None else int(about["total"]),
            about["rate"],
            about["eta"],
            str(about["note"]),
            about["error"],
            silent,
        )
        return str(about["stage"]), (float(about["updated"]), worker)
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", None


def _bucket_files(run_dir: str) -> tuple[frozenset[str], Any]:
    bucket = Bucket(run_dir)
    names = frozenset(bucket.names())
    if not names:
        raise UsageError(
            f"run_dir {run_dir!r}", "there is nothing in the bucket", "correct the address"
        )
    return names, bucket.read


def _local_files(run_dir: str) -> tuple[frozenset[str], Any]:
    root = pathlib.Path(run_dir).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"run_dir {run_dir!r}", "there is no such directory", "pass that of a stage"
        )
    names = set()
    for folder, _, files in os.walk(root):
        here = pathlib.Path(folder).relative_to(root).as_posix()
        names |= {f"{here}/{name}" if here != "." else name for name in files}

    def read(name: str) -> bytes | None:
        try:
            return (root / name).read_bytes()
        except OSError:
            return None

    return frozenset(names), read


def lines(status: RunStatus) -> list[str]:
    """The status for people: a line for each stage, and under it what belongs to it."""
    said = [f"{status.run_dir}"]
    for one in status.stages:
        parts = [f"  {one.stage:<9} {one.state:<8}"]
        if one.state == "running" and one.done is not None:
            total = "" if one.total is None else f"/{one.total}"
            parts.append(f"{one.done}{total}")
            if one.rate:
                parts.append(f"{one.rate:.3g}/s")
            if one.eta is not None:
                until = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.time + one.eta))
                parts.append(f"until {until} ({_span(one.eta)})")
        elif one.state in ("stopped", "failed") and one.done is not None and one.total:
            parts.append(f"{one.done}/{one.total}")
        if one.kept:
            parts.append(f"{one.kept} kept")
        said.append("  ".join(parts).rstrip())
        if one.error:
            said.append(f"    {one.error}")
        shown = [w for w in one.workers if w.state != "done"] if one.state != "done" else []
        for worker in shown:
            rate = f"  {worker.rate:.3g}/s" if worker.rate and worker.state == "running" else ""
            note = f"  {worker.note}" if worker.note else ""
            said.append(
                f"    process {worker.pid} on {worker.host}: {worker.state}{rate}{note}, last word "
                f"{_span(worker.silent)} ago"
            )
    return said


def _span(seconds: float) -> str:
    """A time in words of one or two parts."""
    seconds = round(seconds)
    for size, name, smaller, below in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
    ):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // smaller} {below}"
    return f"{seconds // 60} min" if seconds >= 120 else f"{seconds} s"
