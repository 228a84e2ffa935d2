"""What a command is doing, as a small JSON file in the run directory, for `zip-rc status` and for
dashboards.

Each process that works on a stage has one file, `.progress/STAGE.PROCESS.json`, complete or absent,
written every few seconds while it works and once when it ends. A file that cannot be written is no
reason to stop. Fields:

  format     1
  stage      rollout, grade, policy, critic, label, lite, final, evaluate, replay
  state      running, done, stopped (by a signal) or failed
  title, done, total, unit-less counts as on the progress bar; total is null where it is not known
  rate       per second, over the last minutes; null until it is known
  eta        seconds until `total` at that rate; null if unknown
  note       what stands beside the bar
  error      of a failed one, as it was printed
  host, pid, process, processes, version
  started, updated  seconds since 1970, by the clock of `host`
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import code_version, plain, write_bytes
from zip_rc_jax.runtime.temporaries import is_gone, this_process

FOLDER = ".progress"
LOCAL_SECONDS = 5.0  # between two writes
BUCKET_SECONDS = 15.0
WINDOW_SECONDS = 300.0  # of the rate
FORMAT = 1

_active: ProgressFile | None = None


class ProgressFile:
    """The file of one process and stage.

    Attributes:
      name: below the run directory.
      seconds: between two writes.
    """

    def __init__(
        self,
        stage: str,
        write: Callable[[str, bytes], None],
        seconds: float,
        *,
        processes: int = 1,
        background: bool = False,
    ):
        """Args:
        write: stores a file of this name; may raise OSError and UsageError.
        background: from a thread, so that a slow store holds nobody up.
        """
        self.name = f"{FOLDER}/{stage}.{this_process()}.json"
        self.seconds, self._write, self._background = seconds, write, background
        now = time.time()
        self._state: dict[str, Any] = {
            "format": FORMAT,
            "stage": stage,
            "state": "running",
            "title": stage,
            "done": 0,
            "total": None,
            "rate": None,
            "eta": None,
            "note": "",
            "error": None,
            "host": platform.node(),
            "pid": os.getpid(),
            "process": this_process(),
            "processes": processes,
            "version": code_version()["version"],
            "started": now,
            "updated": now,
        }
        self._points: collections.deque[tuple[float, int]] = collections.deque()
        self._written: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, title: str, total: int | None, done: int) -> None:
        """A new bar."""
        self._points.clear()
        self._state |= {"title": title, "total": total, "done": done, "rate": None, "eta": None}
        self._store(force=True)
        if self._background and self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="zip-rc-progress", daemon=True)
            self._thread.start()

    def update(self, done: int, note: str | None) -> None:
        """What the bar shows now."""
        clock = time.monotonic()
        self._points.append((clock, done))
        while len(self._points) > 2 and clock - self._points[0][0] > WINDOW_SECONDS:
            self._points.popleft()
        first, total = self._points[0], self._state["total"]
        # What comes first also waits for compilation, so the first point is the start of counting.
        rate = (done - first[1]) / (clock - first[0]) if clock > first[0] else None
        eta = (total - done) / rate if rate and total is not None else None
        self._state |= {"done": done, "rate": rate, "eta": eta}
        if note is not None:
            self._state["note"] = note
        if not self._background:
            self._store()

    def end(self, state: str, error: str | None = None) -> None:
        """The last word; nothing if the work never began."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._written is not None:
            self._state |= {"state": state, "error": error, "eta": None}
            self._store(force=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.seconds):
            self._store(force=True)

    def _store(self, force: bool = False) -> None:
        clock = time.monotonic()
        if not force and self._written is not None and clock - self._written < self.seconds:
            return
        self._written = clock
        self._state["updated"] = time.time()
        with contextlib.suppress(OSError, UsageError):
            self._write(self.name, (json.dumps(plain(self._state), indent=1) + "\n").encode())


@contextlib.contextmanager
def recorded(file: ProgressFile) -> Iterator[None]:
    """Progress bars inside are recorded in this file; inside of another one, in that."""
    from zip_rc_jax.runtime.working_copy import with_addresses

    global _active
    if _active is not None:
        yield
        return
    _active = file
    try:
        yield
    except KeyboardInterrupt as stop:
        file.end("stopped", with_addresses(str(stop)) or None)
        raise
    except BaseException as error:
        said = with_addresses(str(error)) or type(error).__name__
        file.end("failed", said[:1000])
        raise
    else:
        file.end("done")
    finally:
        _active = None


def active() -> ProgressFile | None:
    """The file that bars are recorded in now."""
    return _active


def local_file(directory: pathlib.Path, stage: str, processes: int) -> ProgressFile:
    """A file in a local run directory. It makes no run directory: the stage does."""

    def write(name: str, data: bytes) -> None:
        if not directory.is_dir():
            return
        path = directory / name
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
        for old in path.parent.glob(f"{stage}.*.json"):
            if is_gone(old.name.split(".")[-2]):
                old.unlink(missing_ok=True)
        write_bytes(path, data)

    return ProgressFile(stage, write, LOCAL_SECONDS, processes=processes)
