"""Objects in a bucket, through fsspec: `gs://BUCKET/run`, `s3://...`, and any other scheme of it.

What is guaranteed, and by whom:

- An object is complete or absent: the store shows it when its last byte has arrived.
- `create` writes an object only where there is none. GCS does that by a generation precondition,
  S3 and Azure by `If-None-Match`, so of several machines one succeeds. `memory:` does it within
  one process, `file:` on one file system. See `ATOMIC_CREATE`.
- Nothing is ever renamed: an object store would copy and delete.
- A listing may lag behind the writes. Whoever knows a name asks for it, and lists only to find
  names.

Failures that pass (timeouts, 408, 429, 5xx, lost connections) are tried again for two minutes.
All others are a `UsageError` that names the object, the reason and the fix.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import os
import pathlib
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

# Seconds before the second try, the third, ...: two minutes in all, each up to twice as long.
PAUSES: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16, 30, 30, 30)
AT_ONCE = 8  # transfers
SMALL = 64 << 20  # bytes; a larger file is not held in memory
# Schemes whose store itself refuses the second writer of a new object.
ATOMIC_CREATE = ("gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "memory", "file", "local")
# Schemes with a package of their own, which fsspec imports.
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "az": "adlfs",
            "abfs": "adlfs", "abfss": "adlfs"}  # fmt: skip
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_PASSING_ERRNO = {errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.EAGAIN}
_DENIED = {401, 403}
_memory = threading.Lock()  # the memory scheme looks, and then writes
T = TypeVar("T")


def is_bucket(path: object) -> bool:
    """Whether a path is an address, with a scheme."""
    return "://" in str(path)


def scheme_of(url: str) -> str:
    """The scheme of an address, in lower case."""
    return url.partition("://")[0].lower()


class Bucket:
    """The objects below one address.

    Names are relative to it, with `/` between their parts.

    Attributes:
      url: the address, without a slash at its end.
      scheme: of it.
    """

    def __init__(self, url: str, what: str = "run_dir"):
        """Connects to nothing yet.

        Args:
          what: has this address, for messages.

        Raises:
          UsageError: an address that names no bucket, a scheme that fsspec does not know, or one
            whose package is not installed.
        """
        self.url, self.scheme, self.what = url.rstrip("/"), scheme_of(url), what
        _check_address(url, what)
        # Else gcsfs asks another API what kind of bucket it is, with credentials of its own.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        with optional_import():
            import fsspec
        try:
            # What another machine wrote is not in a cache of ours.
            self.fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise _no_package(self.url, self.scheme, what, error) from None
        except ValueError as error:
            raise UsageError(
                f"{what}={url!r}",
                f"fsspec knows no such scheme ({error})",
                "use gs://BUCKET/run, s3://BUCKET/run or a local path",
            ) from None
        except Exception as error:
            raise self._failed("", error) from error
        self.root = str(root).rstrip("/")

    def __repr__(self) -> str:
        return f"Bucket({self.url!r})"

    def address(self, name: str) -> str:
        """The full address of an object."""
        return f"{self.url}/{name}" if name else self.url

    # ---- reading

    def read(self, name: str) -> bytes | None:
        """All bytes of an object; None where there is none."""

        def get() -> bytes | None:
            try:
                return self.fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self._try(name, get)

    def download(self, name: str, path: pathlib.Path) -> bool:
        """Writes an object to a local file. Returns whether there is one.

        The file may hold a part of it when this raises: give it a temporary name.
        """

        def get() -> bool:
            try:
                self.fs.get_file(self._path(name), str(path))
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                return False
            if path.is_dir():  # fsspec makes one where the name is that of a folder
                path.rmdir()
            return path.is_file()

        return self._try(name, get)

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name. Asks for it, and does not list."""

        def look() -> bool:
            try:
                return self.fs.info(self._path(name))["type"] == "file"
            except FileNotFoundError:
                return False

        return self._try(name, look)

    def names(self, prefix: str = "") -> list[str]:
        """The objects below `prefix`, a folder, in order; [] where there is no such folder."""

        def look() -> list[str]:
            try:
                found = self.fs.find(self._path(prefix))
            except FileNotFoundError:
                return []
            cut = len(self.root) + 1
            return sorted(str(name)[cut:] for name in found if not str(name).endswith("/"))

        # Some stores give the object itself for its own name.
        return [name for name in self._try(prefix, look) if name != prefix]

    # ---- writing

    def write(self, name: str, data: bytes) -> None:
        """Writes an object; one of that name is replaced."""
        self._try(name, lambda: self.fs.pipe_file(self._path(name), data))

    def upload(self, path: pathlib.Path, name: str) -> None:
        """Writes an object from a local file; one of that name is replaced."""
        if path.stat().st_size <= SMALL:
            self.write(name, path.read_bytes())
        else:
            self._try(name, lambda: self.fs.put_file(str(path), self._path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object if there is none of that name. Returns whether it did.

        Of several callers at most one succeeds, see `ATOMIC_CREATE`. A try whose answer was lost
        may have succeeded: then the object holds our bytes, which must therefore be ours alone.
        """
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            lock = _memory if self.scheme == "memory" else contextlib.nullcontext()
            try:
                with lock:
                    self.fs.pipe_file(self._path(name), data, mode="create")
                return True
            except FileExistsError:
                return self.read(name) == data

        return self._try(name, put)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are not there are no error."""

        def remove(name: str) -> None:
            def rm() -> None:
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(self._path(name))

            self._try(name, rm)

        at_once(remove, list(names))

    # ---- checks

    def check_writable(self) -> None:
        """Tries out that objects can be written, read, listed and deleted here.

        Raises UsageError if not: no such bucket, no permission, no network.
        """
        name = f".zip_rc_{uuid.uuid4().hex}.tmp"
        data = name.encode()
        if not self.create(name, data) or self.read(name) != data:
            raise UsageError(
                f"{self.what}={self.url!r}",
                "an object that was written cannot be read back",
                "see that nothing else writes or expires objects there",
            )
        self.names(".zip_rc_")
        self.delete([name])

    # ----

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _try(self, name: str, call: Callable[[], T]) -> T:
        """The result of `call`, which is made again after failures that pass.

        Raises UsageError.
        """
        for pause in (*PAUSES, None):
            try:
                return call()
            except UsageError:
                raise
            except Exception as error:
                if pause is None or not is_passing(error):
                    raise self._failed(name, error) from error
            time.sleep(pause * (1 + random.random()))
        raise AssertionError

    def _failed(self, name: str, error: Exception) -> UsageError:
        where, said = f"{self.what}: {self.address(name)}", _in_short(error)
        bucket = f"{self.scheme}://{self.root.strip('/').partition('/')[0]}"
        if isinstance(error, FileNotFoundError) or _status(error) == 404:
            return UsageError(
                where,
                f"there is no bucket {bucket} ({said})",
                f"make it (for Google Cloud: gcloud storage buckets create {bucket}), or correct "
                "the address",
            )
        if is_denied(error):
            return UsageError(
                where,
                f"access is denied ({said})",
                "see who you are (gcloud auth application-default login) and that this account "
                "may get, list, create and delete objects in the bucket (role "
                "storage.objectAdmin); the same command then resumes",
            )
        if is_passing(error):
            return UsageError(
                where,
                f"the store did not answer for {sum(PAUSES):.0f} s ({said})",
                "see the network and the quotas of the bucket; the same command then resumes",
            )
        return UsageError(
            where,
            f"the store refused it ({said})",
            "see the address and the account; the same command then resumes",
        )


def at_once(call: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """The results of `call` for each item, several at once. Raises the first error."""
    if len(items) < 2:
        return [call(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(call, items))


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    return any(
        isinstance(e, (TimeoutError, asyncio.TimeoutError, ConnectionError))
        or _status(e) in _PASSING
        or (isinstance(e, OSError) and e.errno in _PASSING_ERRNO)
        or type(e).__module__.partition(".")[0] == "aiohttp"
        or (type(e).__module__.startswith("requests.") and "Error" in type(e).__name__)
        or type(e).__name__ in ("EndpointConnectionError", "ConnectTimeoutError", "TransportError")
        for e in _chain(error)
    ) and not is_denied(error)


def is_denied(error: BaseException) -> bool:
    """Whether the store said that this account may not."""
    return any(
        isinstance(e, PermissionError)
        or _status(e) in _DENIED
        or (isinstance(e, OSError) and str(e).startswith("Forbidden"))
        or type(e).__name__ in ("DefaultCredentialsError", "NoCredentialsError", "RefreshError")
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of a store's library tells."""
    for name in ("code", "status", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, (int, str)) and re.fullmatch(r"[1-5]\d\d", str(value)):
            return int(value)
    answer = getattr(error, "response", None)  # botocore's
    if isinstance(answer, dict):
        value = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    return None


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _check_address(url: str, what: str) -> None:
    rest = url.partition("://")[2]
    if not rest.strip("/"):
        raise UsageError(
            f"{what}={url!r}", "it names no bucket", "write for example gs://BUCKET/run"
        )
    if scheme_of(url) in PACKAGES and not rest.strip("/").partition("/")[2]:
        raise UsageError(
            f"{what}={url!r}",
            "a run wants a folder of its own in the bucket",
            f"write for example {url.rstrip('/')}/run",
        )
    if found := [x for x in ("?", "*", "[", "#", "\\", "//", "::") if x in rest]:
        raise UsageError(
            f"{what}={url!r}",
            f"it contains {found[0]!r}, which stores and their libraries read differently",
            "use plain letters, digits, - and _",
        )


def _no_package(url: str, scheme: str, what: str, error: ImportError) -> UsageError:
    package = PACKAGES.get(scheme)
    if package is None:
        return UsageError(
            f"{what}={url!r}", f"a package is not installed ({error})", "install it with pip"
        )
    fix = "pip install 'zip-rc-jax[buckets]'" if package == "gcsfs" else f"pip install {package}"
    return UsageError(
        f"{what}={url!r}",
        f"Python package {package} reads {scheme}://, and it is not installed",
        fix,
    )
