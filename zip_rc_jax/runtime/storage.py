"""Files that a run leaves behind: strict JSON, written as a whole or not at all, and what is needed
to repeat the run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.temporaries import remove_leftovers, whole_file

DISTRIBUTION = "zip-rc-jax"
PACKAGES = (
    DISTRIBUTION, "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy",
    "tokenizers", "math-verify", "reasoning-gym",
)  # fmt: skip
# in the environment: what was installed from an archive, which does not say it; launch/tpu_train.sh
# sets it
COMMIT = "ZIP_RC_COMMIT"


def plain(value: Any) -> Any:
    """`value` as dicts, lists and scalars that strict JSON can hold: arrays become lists, NaN and
    infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else str(value)


_AGAIN = "the same command then resumes"
_ROOM = f"make room on the disk; {_AGAIN}"
_PERMISSION = "choose a path that you may write to, or have its owner and permissions changed"
# What helps where a file could not be written.
FIXES = {
    errno.ENOSPC: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EDQUOT: f"make room: your quota on this disk is used up; {_AGAIN}",
    errno.EROFS: "choose a path that is not on a read-only file system",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOTDIR: "choose another path, or rename the file that stands where a directory belongs",
    errno.EEXIST: "choose another path, or rename the file that stands where a directory belongs",
    errno.EISDIR: "choose another path, or rename the directory that has this name",
    errno.ENOTEMPTY: "choose another path, or rename the directory that has this name",
    errno.ENAMETOOLONG: "choose a shorter path; file systems commonly allow 255 bytes for a name",
    errno.ELOOP: "choose another path, or mend the symbolic link that leads to itself",
    errno.ENOENT: "choose a path whose folders can be made; a symbolic link in it may lead to "
    "nothing",
    errno.EINVAL: "choose a path of plain letters and digits, on a file system that takes it",
    errno.EILSEQ: "choose a path of plain letters and digits, on a file system that takes it",
    errno.EBUSY: f"end the program that uses it; {_AGAIN}",
    errno.ETXTBSY: f"end the program that uses it; {_AGAIN}",
    errno.EIO: "look at the disk and at the kernel's log, or choose a path on another disk; "
    f"{_AGAIN}",
    errno.ESTALE: f"look at the network file system; {_AGAIN}",
    errno.ETIMEDOUT: f"look at the network file system; {_AGAIN}",
    errno.EMFILE: f"allow more open files (ulimit -n); {_AGAIN}",
    errno.ENFILE: f"allow more open files on this machine; {_AGAIN}",
    errno.EOPNOTSUPP: "choose a path on another file system; this one lacks an operation that is "
    "needed",
    errno.ENOSYS: "choose a path on another file system; this one lacks an operation that is "
    "needed",
    errno.ENODEV: "choose a path on another file system; this one lacks an operation that is "
    "needed",
}
PLAIN_PATH = "choose a path of plain letters, digits, - and _"
_UNKNOWN = f"see that the path can be written and that there is room; {_AGAIN}"


def os_error(error: BaseException) -> int | None:
    """Number (`errno`) of the failure of the operating system that led to an error; None if none
    did.

    TensorStore and safetensors, which write the arrays, say it in their messages alone.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        text = str(cause)
        if match := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", text):
            return int(match[1] or match[2])
        if named := [number for number in FIXES if os.strerror(number) in text]:
            return named[0]
        cause = cause.__cause__ or cause.__context__
    return None


def fix_for(error: BaseException) -> str:
    """What helps against an error of writing."""
    return FIXES.get(os_error(error) or 0, _UNKNOWN)


@contextlib.contextmanager
def writing(
    what: str, kept: Callable[[], str] = lambda: "nothing of it was kept"
) -> Iterator[None]:
    """Around anything that writes.

    Orbax raises all kinds of errors where it cannot, a bare Exception among them.

    Args:
      what: is written inside.
      kept: called after a failure: what lies there all the same.

    Raises:
      UsageError: it could not be written; the fix suits the reason.
    """
    import jax  # takes a second

    try:
        yield
    except (jax.errors.JaxRuntimeError, UsageError, MemoryError):
        raise  # another process is gone, the devices or the host are full, or it is said already
    except Exception as error:
        raise _not_written(what, error, kept()) from error


def _not_written(what: str, error: Exception, kept: str) -> UsageError:
    return UsageError(
        _shortened(what), f"it could not be written ({in_short(error)}), and {kept}", fix_for(error)
    )


def _shortened(text: str, length: int = 300) -> str:
    """Start and end of a long text: paths that are too long are errors too, and errors are
    short."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def in_short(error: BaseException) -> str:
    """Type and first line of an error, for a message of one paragraph."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {_shortened(lines[0])}" if lines else type(error).__name__


# Orbax merges what its processes wrote by a glob pattern that has the whole path in it, so that it
# finds nothing below `[x]`, and the files of other directories too below `*`. TensorStore takes a
# backslash for a slash, "gs:" for a bucket, and no bytes that are not UTF-8.
UNFIT = {
    "\0": "no file system allows it",
    "://": "only run_dir, data and models may be addresses; elsewhere a bucket is used through a "
    "mount, such as gcsfuse's",
    "[": "Orbax takes it for a pattern and would lose the weights",
    "*": "Orbax takes it for a pattern and may mix in the weights of other directories",
    "?": "Orbax takes it for a pattern and may mix in the weights of other directories",
    "\\": "TensorStore takes it for a slash and would lose the weights",
    "gs:/": "TensorStore takes what follows for the name of a bucket",
    ".orbax-checkpoint-tmp": "Orbax takes this for an unfinished checkpoint",
}


def fit_path(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """The path, with a leading `~` as the home directory, if Orbax can write and read there.

    Args:
      what: has this path, for messages, e.g. "run_dir".

    Raises:
      UsageError: the path, or that of a folder above it, has characters that make Orbax lose or mix
        up arrays.
    """
    given = os.fspath(path)
    shown, full = f"{what} {_shortened(given)!r}", given
    try:
        given.encode("utf-8")
        if "://" not in given and "\0" not in given:
            full = f"{pathlib.Path(os.path.expanduser(given)).absolute()}/"
            full.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            shown, "its path is not valid UTF-8, and TensorStore takes no other", PLAIN_PATH
        ) from None
    for part, reason in UNFIT.items():
        if part in full:
            where = (
                "its path"
                if part in f"{given}/"
                else f"the path of a folder above it, {_shortened(full)!r},"
            )
            raise UsageError(shown, f"{where} contains {part!r}: {reason}", PLAIN_PATH)
    return pathlib.Path(os.path.expanduser(given))


def check_writable(directory: str | os.PathLike[str], what: str) -> None:
    """Tries out that files can be written below `directory`: makes it, and writes, flushes, renames
    and removes a small file there.

    Before anything expensive. Directories that it made are removed again, so nothing is left of a
    command that fails later.

    Args:
      what: has this path, for messages, e.g. "run_dir".

    Raises:
      UsageError: it cannot be done; the fix suits the reason.
    """
    directory = pathlib.Path(directory)
    try:
        for attempt in range(10):
            try:
                return _try_out(directory)
            except (FileNotFoundError, FileExistsError):
                # Another process may have removed the directories that it had made: before a file
                # was written, or after `mkdir` met one and before it looked what that is.
                if not _nearest(directory).is_dir():
                    raise
                time.sleep(0.01 * attempt)
        _try_out(directory)
    except (OSError, ValueError) as error:
        shown = f"{what} {_shortened(str(directory))}"
        nearest = _nearest(directory)
        if nearest.is_symlink() and not nearest.exists() and os_error(error) != errno.ELOOP:
            reason = f"{_shortened(str(nearest))} is a symbolic link that leads to nothing"
            raise UsageError(shown, reason, "choose another path, or mend the link") from None
        known = {
            errno.EEXIST: "it, or a folder above it, is a file",
            errno.ENOTDIR: "a part of its path is a file",
        }
        reason = known.get(
            os_error(error) or 0, f"nothing can be written there ({in_short(error)})"
        )
        raise UsageError(shown, reason, fix_for(error)) from None


def _nearest(directory: pathlib.Path) -> pathlib.Path:
    """The directory itself or the first one above it that is there, a dangling symbolic link
    included."""
    return next((p for p in (directory, *directory.parents) if os.path.lexists(p)), directory)


def _try_out(directory: pathlib.Path) -> None:
    made = [p for p in (directory, *directory.parents) if not p.is_dir()]  # inner ones first
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".zip_rc_{uuid.uuid4().hex}.tmp"
        try:
            write_bytes(probe, b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    finally:
        for p in made:
            with contextlib.suppress(OSError):  # somebody else uses it now
                p.rmdir()


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file, complete or not at all (see `whole_file`). Raises OSError."""
    with whole_file(path) as file:
        file.write(data)


def write_text(path: str | pathlib.Path, text: str) -> pathlib.Path:
    """Writes UTF-8, complete or not at all (see `write_bytes`). Returns the path.

    Raises:
      UsageError: it could not be written; the fix suits the reason.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode("utf-8"))
    except OSError as error:
        raise _not_written(f"file {path}", error, "what was there before is unchanged") from error
    return path


@contextlib.contextmanager
def text_file(path: str | pathlib.Path) -> Iterator[Callable[[str], None]]:
    """Yields a function that appends UTF-8 to a file that is complete or absent.

    The text goes to a temporary file, which gets the name `path` when the block ends. If the block
    raises, what was there before is unchanged.

    Raises:
      UsageError: it could not be written; the fix suits the reason.
    """
    path, kept = pathlib.Path(path), "what was there before is unchanged"
    raised_by_caller: BaseException | None = None

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:

            def write(text: str) -> None:
                try:
                    file.write(text.encode("utf-8"))
                except OSError as error:
                    raise _not_written(f"file {path}", error, kept) from error

            try:
                yield write
            except BaseException as error:
                raised_by_caller = error
                raise
    except OSError as error:
        if error is raised_by_caller:
            raise
        raise _not_written(f"file {path}", error, kept) from error


def write_json(path: str | pathlib.Path, value: Any) -> pathlib.Path:
    """Writes indented strict JSON (see `plain`). Returns the path."""
    return write_text(
        path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def read_json(path: str | pathlib.Path, *, fix: str) -> Any:
    """What a file of strict JSON holds.

    Args:
      fix: what helps where it is damaged.

    Raises:
      UsageError: there is no such file, it cannot be read, or it is not (completely) strict JSON in
        UTF-8.
    """
    try:
        return parse_json(pathlib.Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"file {path}", f"it cannot be read ({in_short(error)})", fix) from error


def parse_json(data: bytes) -> Any:
    """The value of strict JSON in UTF-8.

    Raises ValueError, and RecursionError for lists in lists in lists.
    """

    def no_number(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    return json.loads(data.decode("utf-8"), parse_constant=no_number)


def write_jsonl(path: str | pathlib.Path, rows: Iterable[Any]) -> pathlib.Path:
    """Writes one strict JSON value per line (see `plain`). Returns the path."""
    return write_text(path, "".join(map(json_line, rows)))


def json_line(value: Any) -> str:
    """A line of strict JSON (see `plain`)."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


START_AGAIN = "restore these settings, or delete it to start again"
DIGEST = "digest"  # the key of a digest among those of the object that it is of


def with_digest(value: Mapping[str, Any], place: int = 0) -> dict[str, Any]:
    """`value` as plain JSON, and its digest under one more key.

    Args:
      place: where it stands among others; enters the digest.
    """
    stored = plain(value)
    return {**stored, DIGEST: _digest(stored, place)}


def without_digest(value: Any, place: int = 0) -> dict[str, Any]:
    """Inverse of `with_digest`.

    Raises ValueError if the value is another than the one whose digest it holds, or from another
    place.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} stands there")
    stored = {key: inner for key, inner in value.items() if key != DIGEST}
    if value.get(DIGEST) != _digest(stored, place):
        raise ValueError("its digest does not fit")
    return stored


def _digest(value: Any, place: int) -> str:
    """Of plain JSON, whatever the order of the keys.

    It notices damage; it keeps nobody from changing both.
    """
    return hashlib.blake2b(
        json.dumps([place, value], sort_keys=True).encode("utf-8", "surrogatepass"), digest_size=16
    ).hexdigest()


class Journal:
    """Values kept as they come, one strict JSON line each, so that an interruption loses none; the
    first line says what they are of.

    Every line holds a digest of its own, so that no other value than the one that was added comes
    back.

    Attributes:
      values: those of earlier calls, as JSON gives them.
    """

    def __init__(self, path: str | pathlib.Path, *, fingerprint: Mapping[str, Any]):
        """Goes on with the file at `path`, or begins it.

        Raises:
          UsageError: the file there was begun with another fingerprint (the message names what
            differs), or is damaged.
        """
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent)
            self._file = self.path.open("a+b")
            self._file.seek(0)
            lines = self._file.readlines()
        except OSError as error:
            raise UsageError(
                f"file {self.path}",
                f"it cannot be opened ({in_short(error)})",
                "choose another directory",
            ) from error
        # What was being written when the process was killed has no end of line.
        complete = [line for line in lines if line.endswith(b"\n")]
        # journals of earlier versions have no digests
        checked = len(complete) > 1 and b'"digest": "' in complete[0]
        records = (
            [self._value(number, line, checked) for number, line in enumerate(complete, 1)]
            if len(complete) > 1
            else []
        )
        if records:
            check_same_settings(
                f"file {self.path}", records[0], plain(fingerprint), fix=START_AGAIN
            )
        self.values = records[1:]
        self._file.truncate(sum(map(len, complete)) if self.values else 0)
        self._lines = len(records) if self.values else 0
        if not self.values:
            self.add(fingerprint)

    def _value(self, number: int, line: bytes, checked: bool) -> Any:
        try:
            return without_digest(parse_json(line), number) if checked else parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"file {self.path}, line {number}",
                f"it is damaged ({in_short(error)})",
                "delete the file to decode all prompts again",
            ) from error

    def add(self, value: Mapping[str, Any]) -> None:
        """Appends a value; it is in the file when this returns."""
        self._lines += 1
        self._file.write(json_line(with_digest(value, self._lines)).encode())
        self._file.flush()

    def finish(self) -> None:
        """Deletes the file: what it held has been written as a whole."""
        self._file.close()
        self.path.unlink()


def code_version() -> dict[str, str | None]:
    """`version` of this package, and the `commit` of its checkout (see `run_metadata`)."""
    return {
        "version": _version("zip-rc-jax"),
        "commit": package_commit(pathlib.Path(__file__).resolve().parents[1]),
    }


def _git_commit(package: pathlib.Path) -> str | None:
    """Commit of the checkout of this package, "+changes" if tracked files differ; None when the
    package is not in its checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # Installed below somebody else's repository (a virtual environment, say), git would name
        # their commit.
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != package.resolve().parent:
            return None
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _installed_commit(package: pathlib.Path) -> str | None:
    """Commit that pip installed this package from, as `pip install git+...` records it (PEP 610);
    None from elsewhere."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    if pathlib.Path(str(distribution.locate_file(package.name))).resolve() != package.resolve():
        return None
    return (
        json.loads(distribution.read_text("direct_url.json") or "{}")
        .get("vcs_info", {})
        .get("commit_id")
    )


def package_commit(
    package: pathlib.Path, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Commit of the code that runs: of its checkout, else of what pip installed, else the value
    of the variable `COMMIT`."""
    return _git_commit(package) or _installed_commit(package) or environment.get(COMMIT) or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_metadata(
    config: Mapping[str, Any], argv: Sequence[str] | None = None, started: float | None = None
) -> dict[str, Any]:
    """What is needed to repeat a run.

    Args:
      config: all settings as plain values (see `config.to_dict`).
      argv: the command line; `sys.argv` if None.
      started: `time.time()` at the start of the run; gives `seconds`, else null.

    Returns:
      `command`, `commit`, `versions`, `python`, `platform`, `devices`, `time` (UTC, ISO 8601),
      `seconds`, `config`.
    """
    import jax  # takes a second, and only this function needs it

    now = time.time()
    return {
        "command": shlex.join(sys.argv if argv is None else argv),
        "commit": code_version()["commit"],
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "seconds": None if started is None else round(now - started, 3),
        "config": plain(config),
    }
