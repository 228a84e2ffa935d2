"""A run directory in a bucket: a local copy that the stages work on, and what of it lies in the
bucket.

Stages append, rename, lock and memory-map files. No object store can, so a stage works in a local
folder. What it needs is fetched before, and what is finished is published at once: a chunk when it
is made, a dataset, model or checkpoint when it is whole, the logs now and then and at the end. The
bucket is the truth. The folder is temporary, and one process's alone.

Two kinds of entries:

- **Units** are directories that are complete or absent (`UNITS`): datasets, pools, models,
  checkpoints. Their files go to the bucket first, and last a commit marker, `.zip-rc-unit.json`,
  with size and digest of each. Without its marker a unit is absent. A reader takes the names from
  the marker, never from a listing, and checks every digest.
- **Loose files** are single objects, complete or absent each: chunks, logs, reports, settings.

Plain local run directories never come here: their path is used as it is.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from zip_rc_jax.runtime import buckets
from zip_rc_jax.runtime.buckets import Bucket, at_once, is_bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.storage import fit_path, in_short, parse_json, plain
from zip_rc_jax.runtime.temporaries import remove_leftovers, temporary_path

MARKER = ".zip-rc-unit.json"
# Patterns of paths below the run directory. `*` is one part of a path.
UNITS = (
    *("rollouts", "graded", "labelled", "pool", "pools/*"),
    *("*/model", "*/checkpoints/[0-9]*"),
)
PARENT = "ZIP_RC_WORK"  # in the environment: where working copies lie; default: temporary files
_NOT_KEPT = re.compile(r"\..*\.tmp|\.zip-rc\.lock|.*\.orbax-checkpoint-tmp.*")


def run_directory(run_dir: str, what: str = "run_dir") -> pathlib.Path:
    """The local folder of a run directory: itself, or the working copy of a bucket.

    Raises:
      UsageError: see `fit_path` and `Bucket`.
    """
    return working_copy(run_dir, what).root if is_bucket(run_dir) else fit_path(run_dir, what)


_copies: dict[str, WorkingCopy] = {}
_lock = threading.RLock()


def working_copy(url: str, what: str = "run_dir") -> WorkingCopy:
    """The one working copy that this process has of an address."""
    with _lock:
        url = url.rstrip("/")
        if url not in _copies:
            _copies[url] = WorkingCopy(Bucket(url, what))
        return _copies[url]


def copy_of(path: pathlib.Path) -> WorkingCopy | None:
    """The working copy that a path lies in; None for a path that is just local."""
    for copy in tuple(_copies.values()):
        if path == copy.root or copy.root in path.parents:
            return copy
    return None


def publish(*paths: pathlib.Path) -> None:
    """What is finished there lies in the bucket when this returns. Nothing for local paths."""
    for path in paths:
        if copy := copy_of(path):
            copy.publish(path)


def publish_first(path: pathlib.Path) -> None:
    """Publishes a small file unless another machine did before; then its content comes here."""
    if copy := copy_of(path):
        copy.publish_first(path)


def refresh(path: pathlib.Path) -> None:
    """Fetches what others have published below a path since. Nothing for local paths."""
    if copy := copy_of(path):
        copy.fetch([copy.name(path)])


def fetched(url: str, what: str) -> pathlib.Path:
    """A local copy of a file or directory in a bucket, for reading.

    Raises UsageError where there is none.
    """
    above, _, name = url.rstrip("/").rpartition("/")
    copy = working_copy(above, what)
    # Of a training directory its model, without the checkpoints.
    if not copy.fetch([f"{name}/model"]) and not copy.fetch([name]):
        raise UsageError(f"{what}={url!r}", "there is nothing in the bucket", "correct the address")
    return copy.root / name


class PublishedLater:
    """Publishes directories of a working copy from a thread, so that nobody waits.

    Nothing for local paths.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: UsageError | None = None

    def publish(self, folder: pathlib.Path, when: pathlib.Path) -> None:
        """`folder` is synchronized as soon as `when` exists, a path that appears when it is whole.

        Waits for the call before. Raises its UsageError.
        """
        copy = copy_of(folder)
        if copy is None:
            return
        self.wait()
        self._stop = threading.Event()

        def run() -> None:
            try:
                while not when.exists():
                    if self._stop.wait(0.1):
                        return
                copy.sync(folder)
            except UsageError as error:
                self._failure = error

        self._thread = threading.Thread(target=run, name="zip-rc-publish", daemon=True)
        self._thread.start()

    def wait(self, *, give_up: bool = False) -> None:
        """Until everything lies in the bucket.

        Args:
          give_up: if what it waits for is not there now, it never will be.

        Raises UsageError if it could not be written.
        """
        if self._thread is not None:
            if give_up:
                self._stop.set()
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def with_addresses(text: str) -> str:
    """The text with addresses in place of the paths of working copies, for people."""
    for copy in tuple(_copies.values()):
        text = text.replace(str(copy.root), copy.bucket.url)
    return text


class WorkingCopy:
    """A local folder, and the address that it is a copy of.

    Attributes:
      bucket: where everything finished lies.
      root: the folder.
      is_open: whether a stage is at work in it.
      guard: called before anything is published; raises UsageError where another process took over.
    """

    def __init__(self, bucket: Bucket):
        """Raises UsageError if no folder can be made."""
        self.bucket = bucket
        parent = pathlib.Path(os.environ.get(PARENT) or tempfile.gettempdir())
        folder = temporary_path(parent / "zip-rc-work")  # its name says whose it is
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(parent, "zip-rc-work")
            self.root = folder.resolve() / "run"
            self.root.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"working copy {folder}",
                f"it cannot be made ({in_short(error)})",
                f"set {PARENT} to a folder with room",
            ) from error
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._folder = folder
        # What the bucket has, as far as this process made it or saw it.
        self._loose: dict[str, str] = {}  # name -> digest
        self._stamps: dict[str, tuple[int, int]] = {}  # name -> bytes, time of the local file
        self._units: dict[str, dict[str, Any]] = {}  # name -> files of its marker
        self._lock = threading.RLock()
        self.is_open = False
        self.guard: Callable[[], None] = lambda: None

    def name(self, path: pathlib.Path) -> str:
        """The name of a path below the root."""
        return path.relative_to(self.root).as_posix()

    # ---- from the bucket

    def listed(self, path: pathlib.Path) -> list[str]:
        """Names of the files in a folder of the bucket, without what is in folders below it. Also
        of those that a listing does not show yet, as far as they are ours."""
        prefix = f"{self.name(path)}/"
        found = {*self.bucket.names(prefix[:-1]), *self._loose}
        names = {x.removeprefix(prefix) for x in found if x.startswith(prefix)}
        return sorted(name for name in names if "/" not in name)

    def exists(self, path: pathlib.Path) -> bool:
        """Whether the bucket has this file."""
        return self.bucket.exists(self.name(path))

    def fetch(self, names: Iterable[str]) -> list[str]:
        """Makes the folder hold what the bucket has under these names: units, files, folders.

        What the bucket does not have (any more) is not in the folder afterwards.

        Returns:
          those that are there.

        Raises:
          UsageError: an object is damaged or cannot be read.
        """
        with self._lock:
            wanted = list(names)
            there = at_once(self._fetch, wanted)
            return [name for name, ok in zip(wanted, there, strict=True) if ok]

    def _fetch(self, name: str) -> bool:
        if _is_unit(name):
            return self._fetch_unit(name)
        if _never_changes(name):
            return self._fetch_file(name)
        # A unit of another kind, such as a model that was copied here.
        if self.bucket.exists(f"{name}/{MARKER}"):
            return self._fetch_unit(name)
        if self._fetch_file(name):
            return True
        found = self.bucket.names(name)
        # A listing may lag: what we know to be there is asked for by its name.
        known = [x for x in self._loose if x.startswith(f"{name}/")]
        loose = sorted({*found, *known})
        inner = sorted({unit for x in found if (unit := _unit_of(x))})
        loose = [x for x in loose if not _unit_of(x) and not _is_temporary(x)]
        listed = set(found)

        def get(loose_name: str) -> bool:
            here_already = loose_name in self._loose and (self.root / loose_name).is_file()
            if here_already and loose_name in listed and _never_changes(loose_name):
                return True
            return self._fetch_file(loose_name)

        got = at_once(get, loose)
        units = [unit for unit in inner if self._fetch_unit(unit)]
        here = self.root / name
        for path in _files(here):
            rel = self.name(path)
            if rel not in loose and not _unit_of(rel) and not _is_temporary(rel):
                path.unlink()
        return any(got) or bool(units)

    def _fetch_file(self, name: str) -> bool:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            if not self.bucket.download(name, temporary):
                return self._forget(name)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._loose[name] = _digest(path)
        return True

    def _forget(self, name: str) -> bool:
        self._loose.pop(name, None)
        path = self.root / name
        if path.is_file():
            path.unlink()
        return False

    def _fetch_unit(self, name: str) -> bool:
        """Raises UsageError for one that is not as its marker says, after some tries: it may be
        replaced at this moment."""
        target = self.root / name
        for pause in (*buckets.PAUSES[:4], None):
            files = self._marker(name)
            if files is None:
                self._units.pop(name, None)
                shutil.rmtree(target, ignore_errors=True)
                return False
            if self._units.get(name) == files and target.is_dir():
                return True
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_path(target)
            try:
                wrong = self._download(name, files, temporary)
                if not wrong:
                    shutil.rmtree(target, ignore_errors=True)
                    temporary.rename(target)
                    self._units[name] = files
                    return True
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            if pause is not None:
                time.sleep(pause)
        raise UsageError(
            f"object {self.bucket.address(f'{name}/{wrong}')}",
            f"it is not as it was written: size or digest differ from those in {MARKER}",
            f"delete {self.bucket.address(name)} to make it again, or restore the object",
        )

    def _marker(self, name: str) -> dict[str, Any] | None:
        data = self.bucket.read(f"{name}/{MARKER}")
        if data is None:
            return None
        try:
            files = parse_json(data)["files"]
            if not all(_is_inside(file) for file in files):
                raise ValueError("it names files outside of its directory")
            return {str(file): dict(about) for file, about in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"object {self.bucket.address(f'{name}/{MARKER}')}",
                f"it is damaged ({in_short(error)})",
                f"delete {self.bucket.address(name)} to make it again",
            ) from None

    def _download(self, name: str, files: dict[str, Any], folder: pathlib.Path) -> str:
        """Downloads the files of a unit. Returns the first that is not right; "" if all are."""
        folder.mkdir()

        def get(file: str) -> bool:
            path, about = folder / file, files[file]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self.bucket.download(f"{name}/{file}", path):
                return False
            if path.stat().st_size != about["bytes"] or _digest(path) != about["digest"]:
                return False
            os.utime(path, ns=(about["time_ns"], about["time_ns"]))
            return True

        right = at_once(get, list(files))
        return next((file for file, ok in zip(files, right, strict=True) if not ok), "")

    # ---- to the bucket

    def publish(self, path: pathlib.Path) -> None:
        """A file, a unit, or everything in a folder lies in the bucket when this returns.

        Raises UsageError if it cannot be written, or if this process may not any more (`guard`).
        """
        with self._lock:
            self.guard()
            name = self.name(path)
            if path.is_dir():
                units, loose = self._here(path)
                if path != self.root and _is_unit(name):
                    units, loose = [name], []
                at_once(self._put, loose)
                for unit in units:
                    self._put_unit(unit)
            elif path.is_file():
                self._put(name)

    def publish_first(self, path: pathlib.Path) -> None:
        """See the function of this name."""
        with self._lock:
            name, data = self.name(path), path.read_bytes()
            if self.bucket.create(name, data):
                self._loose[name] = _digest(path)
            else:
                self._fetch_file(name)

    def sync(self, folder: pathlib.Path | None = None, *, additions_only: bool = False) -> None:
        """Publishes everything finished, then deletes in the bucket what is gone here.

        Args:
          folder: this one alone.
          additions_only: deletes nothing: other processes know better.

        Raises UsageError; then nothing was deleted.
        """
        with self._lock:
            folder = self.root if folder is None else folder
            self.publish(folder)
            if additions_only:
                return
            units, loose = self._here(folder)
            prefix = "" if folder == self.root else f"{self.name(folder)}/"
            mine = {x for x in self._units if x.startswith(prefix)}
            for unit in sorted(mine - set(units)):
                # The marker first: without it the unit is absent.
                self.bucket.delete([f"{unit}/{MARKER}"])
                self.bucket.delete([f"{unit}/{file}" for file in self._units.pop(unit)])
            gone = sorted({x for x in self._loose if x.startswith(prefix)} - set(loose))
            self.bucket.delete(gone)
            for name in gone:
                del self._loose[name]

    def remove(self, path: pathlib.Path) -> None:
        """Deletes a folder here and in the bucket, also what others have put there."""
        with self._lock:
            name = self.name(path)
            known = [x for x in self._loose if x.startswith(f"{name}/")]
            self.bucket.delete(sorted({*self.bucket.names(name), *known}))
            for x in known:
                del self._loose[x]
            shutil.rmtree(path, ignore_errors=True)

    def _here(self, folder: pathlib.Path) -> tuple[list[str], list[str]]:
        """Units and loose files in a folder of the copy."""
        names = [self.name(path) for path in _files(folder)]
        units = sorted({unit for name in names if (unit := _unit_of(name))})
        loose = [x for x in names if not _unit_of(x) and not _is_temporary(x)]
        return units, sorted(loose)

    def _put(self, name: str) -> None:
        path = self.root / name
        try:
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            if name in self._loose and self._stamps.get(name) == stamp:
                return
            digest = _digest(path)
            if self._loose.get(name) != digest:
                self.bucket.upload(path, name)
                self._loose[name] = digest
            self._stamps[name] = stamp
        except FileNotFoundError:
            return  # it was temporary

    def _put_unit(self, name: str) -> None:
        """Files first, then the marker; of an earlier unit there, the marker is deleted before."""
        folder, known = self.root / name, self._units.get(name, {})
        paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        paths = {rel: path for rel, path in paths.items() if not _is_temporary(rel)}
        try:
            stamps = {rel: path.stat() for rel, path in paths.items()}
            if all(
                rel in known and known[rel]["time_ns"] == x.st_mtime_ns for rel, x in stamps.items()
            ):
                return  # as it was; or it is being removed here, file by file
            files = {
                rel: {"bytes": x.st_size, "digest": _digest(paths[rel]), "time_ns": x.st_mtime_ns}
                for rel, x in stamps.items()
            }
            before = self._marker(name)
            if before is not None:
                self.bucket.delete([f"{name}/{MARKER}"])
            at_once(lambda rel: self.bucket.upload(paths[rel], f"{name}/{rel}"), list(files))
        except FileNotFoundError:
            return  # it is being removed here
        marker = {"format": 1, "files": files}
        self.bucket.write(f"{name}/{MARKER}", json.dumps(marker, indent=1).encode())
        self._units[name] = files
        if stale := sorted(set(before or ()) - set(files)):
            self.bucket.delete([f"{name}/{file}" for file in stale])


@contextlib.contextmanager
def opened(run_dir: str, reads: Sequence[str]) -> Iterator[pathlib.Path]:
    """The run directory as a local folder, for the duration of a stage.

    A local one is yielded as it is. Of a bucket, `reads` are fetched before. When the block ends,
    however it ends, what is finished is published.

    Raises:
      UsageError: no such bucket, no permission, or see `WorkingCopy`.
    """
    if not is_bucket(run_dir):
        yield run_directory(run_dir)
        return
    copy = working_copy(run_dir)
    if copy.is_open:  # a command of several stages
        copy.fetch(name for name in reads if not (copy.root / name).exists())
        yield copy.root
        return
    copy.is_open = True
    try:
        copy.bucket.check_writable()
        copy.fetch(reads)
        try:
            yield copy.root
        except BaseException as error:
            try:
                _end(copy)
            except UsageError as second:
                # The first one is what to say; this is what was lost by it.
                print(f"zip-rc: what is finished was not published: {second}", file=sys.stderr)
            raise error
        _end(copy)
    finally:
        copy.is_open = False


def _end(copy: WorkingCopy) -> None:
    from zip_rc_jax.runtime.distributed import is_primary

    copy.sync(additions_only=not is_primary())


def check_first_settings(path: pathlib.Path, settings: Any, what: str, fix: str) -> None:
    """Publishes the settings in a file of ours; of several machines the first decides.

    Raises UsageError if another had other settings. Nothing for local paths.
    """
    if copy := copy_of(path):
        copy.publish_first(path)
        check_same_settings(what, parse_json(path.read_bytes()), plain(settings), fix=fix)


def _is_unit(name: str) -> bool:
    return _unit_of(f"{name}/x") == name


def _unit_of(name: str) -> str:
    """The unit that a file belongs to; "" for loose files."""
    parts = name.split("/")
    for pattern in UNITS:
        count = pattern.count("/") + 1
        if len(parts) > count and all(
            fnmatch.fnmatchcase(part, wanted) and not part.startswith(".")
            for part, wanted in zip(parts[:count], pattern.split("/"), strict=True)
        ):
            return "/".join(parts[:count])
    return ""


def _never_changes(name: str) -> bool:
    return bool(re.fullmatch(r"(.*/)?(chunk-\d+\.jsonl|samples-\d+\.(json|array_record))", name))


def _is_temporary(name: str) -> bool:
    return any(_NOT_KEPT.fullmatch(part) for part in name.split("/")) or name.endswith(MARKER)


def _is_inside(name: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, in order; none where there is no folder."""
    return sorted(
        pathlib.Path(where, name) for where, _, names in os.walk(folder) for name in names
    )


def _digest(path: pathlib.Path) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            hasher.update(data)
    return hasher.hexdigest()
