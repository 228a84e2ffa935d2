"""Names under which files and directories are written before they are renamed, and the removal of
what dead processes left of them.

A temporary of `graded` is `.graded.MACHINE-PID-START-RANDOM.tmp`: the name says which process made
it. A process that is killed leaves its temporaries behind. The next one that writes there removes
them, and leaves those of living processes alone:

- Made on this machine: its process is looked up by number and by the time of its start, for numbers
  are used again.
- Made on another machine (or in another container, whose processes cannot be seen), or by an
  earlier version, whose names do not say by whom: nothing in it was written for `SILENT_SECONDS`. A
  living writer writes all the time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import BinaryIO

SILENT_SECONDS = 24 * 3600  # much longer than any pause of a writer
LONGEST_NAME = 120  # bytes of the name that are kept; file systems allow 255 in all
_NAME = re.compile(
    r"\.(?P<of>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]+)-(?P<start>[0-9]+)-[0-9a-f]{8}\.tmp",
    re.DOTALL,
)
_EARLIER = re.compile(r"\.(?P<of>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)


def temporary_path(path: pathlib.Path) -> pathlib.Path:
    """A path in the same folder that nothing has, whose name says which process made it.

    Nothing is written.
    """
    pid = os.getpid()
    return path.with_name(
        f".{_cut(path.name)}.{_machine()}-{pid}-{_start(pid) or 0}-{uuid.uuid4().hex[:8]}.tmp"
    )


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends; after an error `path` is as it
    was.

    What dead processes left of earlier writes is removed. Raises OSError.
    """
    remove_leftovers(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # otherwise a power cut may leave an empty file under the final name
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is the reason to name
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An unused path beside `path` for a directory that will be renamed to it, or holds what will
    be.

    Whatever still lies there when the block ends is removed. So is what dead processes left of
    earlier writes. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(directory: pathlib.Path, name: str = "") -> list[pathlib.Path]:
    """Removes the temporaries in `directory` whose processes are dead.

    What cannot be removed stays.

    Args:
      name: only those of the file or directory of this name; "" for all.

    Returns:
      What was removed.
    """
    leftovers = []
    try:
        leftovers = [
            path
            for path in directory.iterdir()
            if path.name.startswith(".") and path.name.endswith(".tmp")
        ]
    except OSError:
        return []  # it is not there, or is no directory: whoever writes there says so
    removed = []
    for path in leftovers:
        match = _NAME.fullmatch(path.name) or _EARLIER.fullmatch(path.name)
        if (
            match
            and match["of"] == (_cut(name) or match["of"])
            and _is_dead(path, match.groupdict())
        ):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
            removed.append(path)
    return removed


def this_process() -> str:
    """MACHINE-PID-START of this process: tells it from all others of all machines."""
    return f"{_machine()}-{os.getpid()}-{_start(os.getpid()) or 0}"


def is_gone(process: object) -> bool:
    """Whether a process (see `this_process`) of this machine has ended; false of other machines',
    which cannot be seen."""
    match = re.fullmatch(r"([0-9a-f]{8})-([0-9]+)-([0-9]+)", str(process))
    if match is None or match[1] != _machine():
        return False
    pid, start = int(match[2]), int(match[3])
    return not _exists(pid) or (start != 0 and _start(pid) not in (start, None))


def _cut(name: str) -> str:
    return os.fsencode(name)[:LONGEST_NAME].decode("utf-8", "ignore")


def _is_dead(path: pathlib.Path, owner: dict[str, str]) -> bool:
    if owner.get("machine") == _machine():
        pid, start = int(owner["pid"]), int(owner["start"])
        return not _exists(pid) or (start != 0 and _start(pid) not in (start, None))
    try:
        newest = max((entry.lstat().st_mtime for entry in (path, *path.rglob("*"))), default=0.0)
        return _now(path) - newest > SILENT_SECONDS
    except OSError:
        return False  # somebody is at it


def _now(path: pathlib.Path) -> float:
    """The time by the clock of the file system, which may be another machine's. Raises OSError."""
    probe = temporary_path(path.with_name("clock"))
    try:
        probe.touch(exist_ok=False)
        return probe.lstat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether the process has ended and only its parent has not asked yet."""
    fields = _stat(pid)
    return bool(fields) and fields[0] == "Z"


def _start(pid: int) -> int | None:
    """When a process began, in clock ticks after the start of the system; None where the system
    does not say it."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 and fields[19].isdigit() else None


def _stat(pid: int) -> list[str]:
    """The fields of Linux's /proc/PID/stat from the third on, the state; none on other systems."""
    try:
        # The second is a name in brackets, in which anything may stand.
        return (
            pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return []


@functools.cache
def _machine() -> str:
    """Eight hexadecimal digits: of this host, since its start, and of the processes that can be
    seen here."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=4).hexdigest()
