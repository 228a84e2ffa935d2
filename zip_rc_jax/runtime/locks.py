"""One process at a time in a directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator

from zip_rc_jax.runtime.errors import UsageError

NAME = ".zip-rc.lock"


@contextlib.contextmanager
def only_process(directory: pathlib.Path, what: str) -> Iterator[None]:
    """Holds `directory` (made if it is not there) for the calling process; another one is refused
    meanwhile, and told who holds it.

    The operating system gives the lock back when the process ends, however it ends, so nothing
    stale is ever in the way. It is `flock`: processes of one machine always see each other, and
    those of several machines on NFS only where its server passes such locks on.

    Args:
      what: is called `directory` in messages.

    Raises:
      UsageError: another process holds it, or nothing can be written there.
    """
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path)
    except OSError as error:
        raise UsageError(
            f"{what} {directory}",
            f"nothing can be written there ({error.strerror or error})",
            "choose another directory, or mend this one",
        ) from None
    if descriptor is None:
        raise UsageError(
            f"{what} {directory}",
            f"{_holder(path)} is at work there",
            "wait for it, or choose another directory",
        )
    try:
        yield
    finally:
        # while it is held: who opened it before sees that it is not the file of that name any more
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _open(path: pathlib.Path) -> int | None:
    """The locked file, open; None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(path, descriptor):
                me = {
                    "process": os.getpid(),
                    "host": platform.node(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                }
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(me).encode(), 0)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder deleted it between the two calls


def _same_file(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: pathlib.Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
