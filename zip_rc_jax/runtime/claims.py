"""Who works on what, for machines that share a bucket and nothing else.

A claim is an object that its owner created where there was none; of several that try, the store
lets one succeed (`buckets.ATOMIC_CREATE`). Nothing is renamed or locked. Every owner writes a beat,
one object, every few seconds. An owner whose beat is gone, or has not changed for `SILENT_SECONDS`
on the watcher's own clock, is dead; so clocks of machines may differ. Its claim is taken over by
creating the object of the next number beside it, which again one alone can.

What this guarantees: at any time at most one living owner believes that a claim is its own, as long
as its beat reaches the store. An owner that was cut off for longer than that may find that another
took over (`lost`). What it then still writes must do no harm: a chunk has the same bytes, whoever
makes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

from zip_rc_jax.runtime.buckets import ATOMIC_CREATE, Bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.temporaries import is_gone, this_process

BEAT_SECONDS = 15.0
SILENT_SECONDS = 90.0
BEATS = "beats"


class Claims:
    """The claims below one folder of a bucket. A context manager: claims end with it.

    Attributes:
      id: of this owner, new for each instance.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: str,
        *,
        beat_seconds: float | None = None,
        silent_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args: `folder` is relative to the bucket's address.

        Raises UsageError for a scheme whose store does not refuse a second writer.
        """
        if bucket.scheme not in ATOMIC_CREATE:
            raise UsageError(
                f"{bucket.what}={bucket.url!r}",
                f"stores of {bucket.scheme}:// cannot create an object only where there is none, "
                "so nothing keeps two commands apart",
                f"use one of {', '.join(x + '://' for x in ATOMIC_CREATE[:4])}, or a local run_dir",
            )
        self.bucket, self.folder, self.id = bucket, folder, uuid.uuid4().hex
        self._beat_seconds = BEAT_SECONDS if beat_seconds is None else beat_seconds
        self._silent = SILENT_SECONDS if silent_seconds is None else silent_seconds
        self._clock = clock
        self._about = {
            "owner": self.id,
            "host": platform.node(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "process": this_process(),
        }
        self._held: dict[str, int] = {}  # name -> number
        self._seen: dict[str, tuple[bytes, float]] = {}  # owner -> its beat, and when it was new
        self._count, self._stop = 0, threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._beats, name="zip-rc-claims", daemon=True)
        self._thread.start()

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def take(self, name: str) -> bool:
        """Claims `name`. Returns whether it is ours (also if it was before)."""
        number = self._held.get(name, 1)
        while True:
            key = f"{self.folder}/{name}/{number:04d}"
            about = _parsed(self.bucket.read(key))
            if about is None:
                if self.bucket.create(key, json.dumps(self._about).encode()):
                    self._held[name] = number
                    return True
            elif about.get("owner") == self.id:
                if self.lost(name):
                    return False
                self._held[name] = number
                return True
            elif self._is_dead(about):
                number += 1
            else:
                return False

    def holder(self, name: str) -> dict[str, Any] | None:
        """Who has `name`, as far as it lives: `host`, `pid`, `since`; None if nobody."""
        number, last = 1, None
        while (
            about := _parsed(self.bucket.read(f"{self.folder}/{name}/{number:04d}"))
        ) is not None:
            last, number = about, number + 1
        return None if last is None or self._is_dead(last) else last

    def lost(self, name: str) -> bool:
        """Whether another owner took `name` over because our beat did not come through."""
        number = self._held.get(name)
        return number is not None and self.bucket.exists(f"{self.folder}/{name}/{number + 1:04d}")

    def close(self) -> None:
        """Gives all claims back: others may take them at once."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            with contextlib.suppress(UsageError):  # then others wait until it is silent
                self.bucket.delete([self._beat_of(self.id)])

    def beat(self) -> None:
        """Shows that this owner lives. A thread calls it."""
        self._count += 1
        self.bucket.write(self._beat_of(self.id), f"{self._count}".encode())

    def _beats(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            try:
                self.beat()
            except UsageError:
                continue  # whoever writes results meets the same failure, and says so

    def _is_dead(self, about: dict[str, Any]) -> bool:
        owner = str(about.get("owner"))
        if owner == self.id:
            return False
        if is_gone(about.get("process")):
            return True  # of this machine: nobody need wait
        beat = self.bucket.read(self._beat_of(owner))
        if beat is None:
            return True
        before, now = self._seen.get(owner), self._clock()
        if before is None or before[0] != beat:
            self._seen[owner] = beat, now
            return False
        return now - before[1] > self._silent

    def _beat_of(self, owner: str) -> str:
        return f"{self.folder}/{BEATS}/{owner}"


def _parsed(data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
