"""A language model that grades, behind an OpenAI-compatible URL: `grade.grader: judge`.

Every reply is kept, with the prompt that it answers, before its score is used. So a run that is
killed asks nothing again, another reading of the replies costs nothing, and anybody can look up why
a response was graded as it was. One JSON object a line: `key`, `model`, `messages`, `replies` (in
the order in which they came), `usage`. Files end in `.jsonl`, one for each process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import http.client
import itertools
import json
import os
import pathlib
import re
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.grade import JudgeConfig
from zip_rc_jax.grading.grader import Gradable, Grader
from zip_rc_jax.runtime.distributed import is_multiprocess
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import json_line, writing
from zip_rc_jax.runtime.temporaries import this_process
from zip_rc_jax.runtime.working_copy import copy_of

LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
LONGEST_REPLY = 4_000_000  # bytes of an answer of the server
AGAIN = (408, 425, 429)  # and all of 500 and above
KEPT = "what was judged is kept; the same command goes on from there"


def fields(problem: Gradable) -> dict[str, str]:
    """What graders see of a problem."""
    return {
        "task": problem.task,
        "question": problem.question,
        "answer": problem.answer,
        "entry_json": problem.entry_json,
    }


class Judge(Grader):
    """Scores responses by asking a language model: 1.0 if it calls the response right, else 0.0.

    Usable from any thread.

    Attributes:
      config: see `JudgeConfig`.
      directory: of the journal.
      asked: requests that were sent.
      unreadable: responses without a readable verdict, which are graded 0.
    """

    def __init__(self, config: JudgeConfig, directory: str | os.PathLike[str]):
        """Raises:
        UsageError: nobody to ask, an environment variable without a key, or a damaged journal.
        """
        super().__init__()
        config.check_ready()
        self.config, self.directory = config, pathlib.Path(directory)
        self._key = _api_key(config.api_key_env)
        self._journal = _Journal(self.directory)
        self._pace = _Pace(config.requests_per_minute)
        self._counting = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self.asked = self.unreadable = 0

    def __reduce__(self) -> tuple[type[Judge], tuple[JudgeConfig, str]]:  # type: ignore[override]
        return Judge, (self.config, str(self.directory))

    def close(self) -> None:
        super().close()
        self._journal.close()

    def score(self, problem: Gradable, response: str) -> float:
        """1.0 if the judge calls the response right, 0.0 if wrong.

        Raises:
          UsageError: the server refuses the request or fails for too long; or no reply can be read
            and `unreadable` is "stop".
        """
        messages = self.config.messages(fields(problem), response)
        key = self._key_of(messages)
        # The same question from two threads is asked once.
        with self._counting:
            turn = self._asking.setdefault(key, threading.Lock())
        with turn:
            replies = list(self._journal.replies.get(key, ()))
            most = 1 + self.config.unreadable_retries
            while (verdict := self._verdict(replies)) is None and len(replies) < most:
                reply, usage = self._ask_server(messages)
                replies.append(reply)
                self._journal.append(key, self.config.model, messages, reply, usage)
        if verdict is not None:
            return verdict
        if self.config.unreadable == "stop":
            raise UsageError(
                f"reply {shown(replies[-1])} of the judge",
                f"it matches neither grade.judge.right nor wrong, nor do {len(replies) - 1} others "
                f"for the same response; all are in {self.directory}",
                "write right and wrong so that they match, or set grade.judge.unreadable=wrong",
            )
        with self._counting:
            self.unreadable += 1
            first = self.unreadable == 1
        if first:
            warnings.warn(
                f"the judge's reply {shown(replies[-1])} matches neither grade.judge.right nor "
                f"wrong; such responses are graded 0 (the replies are in {self.directory})",
                stacklevel=2,
            )
        return 0.0

    def grade_many(self, items: Iterable[tuple[Gradable, str]]) -> list[float]:
        """`score` of each (problem, response), in order; `concurrency` of them at a time."""
        pool = concurrent.futures.ThreadPoolExecutor(self.config.concurrency)
        try:
            futures = [pool.submit(self._guarded, *item) for item in items]
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        finally:  # after a failure, and after Ctrl-C, nothing else is asked
            self._pace.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            self._pace.go_on()
        failures = [f.exception() for f in futures if not f.cancelled()]
        # Threads that waited were stopped by the one that failed.
        for failure in failures:
            if failure is not None and not isinstance(failure, concurrent.futures.CancelledError):
                raise failure
        return [future.result() for future in futures]

    def _guarded(self, problem: Gradable, response: str) -> float:
        try:
            return self.score(problem, response)
        except BaseException:
            self._pace.stop()
            raise

    def _key_of(self, messages: list[dict[str, str]]) -> str:
        """What a reply depends on. The address is not part of it, so a server may move."""
        sampled = (self.config.temperature, self.config.max_tokens)
        asked = json.dumps([self.config.model, messages, sampled], sort_keys=True)
        return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()

    def _verdict(self, replies: list[str]) -> float | None:
        """1.0, 0.0, or None if no reply can be read. The last reply that can counts."""
        for reply in reversed(replies):
            right, wrong = (
                max((m.end() for m in re.finditer(pattern, reply, re.IGNORECASE)), default=-1)
                for pattern in (self.config.right, self.config.wrong)
            )
            if right != wrong:
                return float(right > wrong)
        return None

    # ---- one request

    def _ask_server(self, messages: list[dict[str, str]]) -> tuple[str, Any]:
        """The text of a reply and the server's `usage`, after as many attempts as it takes."""
        wait = self.config.backoff
        for attempt in range(self.config.retries + 1):
            self._pace.wait()
            with self._counting:
                self.asked += 1
            try:
                return self._attempt(messages)
            except _Transient as failure:
                if attempt == self.config.retries:
                    raise UsageError(
                        f"grade.judge.base_url={shown(self.config.base_url)}",
                        f"{failure}, in {attempt + 1} attempts",
                        f"see to the server, or raise grade.judge.retries; {KEPT}",
                    ) from None
                self._pace.sleep(max(min(wait, LONGEST_WAIT), failure.retry_after))
                wait *= 2
        raise AssertionError("unreachable")

    def _attempt(self, messages: list[dict[str, str]]) -> tuple[str, Any]:
        """One request.

        Raises:
          _Transient: another attempt may succeed.
          UsageError: it cannot.
        """
        body = {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        request = urllib.request.Request(
            self.config.base_url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode("utf-8"),
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
            method="POST",
        )
        try:
            with _OPENER.open(request, timeout=self.config.timeout) as answer:
                data = answer.read(LONGEST_REPLY)
        except urllib.error.HTTPError as error:
            said = self._said(error)
            if error.code in AGAIN or error.code >= 500:
                raise _Transient(
                    f"it answers with status {error.code}{said}", _retry_after(error)
                ) from None
            raise UsageError(
                f"grade.judge.base_url={shown(self.config.base_url)}",
                f"it refuses the request with status {error.code}{said}",
                "correct grade.judge (base_url, model, api_key_env); " + KEPT,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = self._hidden(str(getattr(error, "reason", error)))[:200]
            raise _Transient(f"it cannot be reached ({reason or type(error).__name__})") from None
        try:
            found = json.loads(data)
            text = found["choices"][0]["message"]["content"]
            text = "" if text is None else text  # all of its tokens were thoughts
            if not isinstance(text, str):
                raise TypeError
            return text, found.get("usage")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = shown(self._hidden(data.decode("utf-8", "replace")))
            raise _Transient(f"it answers with {said}, which is no chat completion") from None

    def _said(self, error: urllib.error.HTTPError) -> str:
        """What the server says about an error, for a message."""
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        text = " ".join(self._hidden(text).split())
        return f" ({text[:200]})" if text else ""

    def _hidden(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "***") if self._key else text


class _Transient(Exception):
    """Another attempt may succeed."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait; 0 if it does not say, or says a date."""
    try:
        return min(max(float(error.headers.get("Retry-After", "0")), 0.0), 3600.0)
    except ValueError:
        return 0.0


def _api_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isprintable():
        raise UsageError(
            f"grade.judge.api_key_env={shown(variable)}",
            "this environment variable is empty or not set" if not key else "it holds no key",
            f"run `export {variable}=...` first, or leave api_key_env out",
        )
    return key


class _Pace:
    """At most so many requests a minute, for all threads together."""

    def __init__(self, per_minute: float):
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Returns when the next request may be sent."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        self.sleep(at - now)

    def sleep(self, seconds: float) -> None:
        """Waits; raises concurrent.futures.CancelledError if the run ends meanwhile."""
        if self._stopped.wait(max(seconds, 0)):
            raise concurrent.futures.CancelledError

    def stop(self) -> None:
        """Nobody waits any longer, nor sends anything."""
        self._stopped.set()

    def go_on(self) -> None:
        self._stopped.clear()


class _Journal:
    """Prompts and replies on disk.

    Attributes:
      replies: those to each key, in the order in which they came.
    """

    def __init__(self, directory: pathlib.Path):
        self.replies: dict[str, list[str]] = {}
        self._directory, self._lock = directory, threading.Lock()
        self._file: Any = None
        for path in sorted(directory.glob("*.jsonl")) if directory.is_dir() else ():
            for key, replies in _read(path):
                self.replies.setdefault(key, []).extend(replies)

    def append(
        self, key: str, model: str, messages: list[dict[str, str]], reply: str, usage: Any
    ) -> None:
        """Writes one reply; it is on disk when this returns.

        Raises UsageError where nothing can be written.
        """
        row = {
            "key": key,
            "model": model,
            "messages": messages,
            "reply": reply,
            "usage": usage,
        }
        # Lone surrogates have no UTF-8; JSON's own escapes hold them.
        line = json_line(row) if _is_utf8(row) else json.dumps(row) + "\n"
        with self._lock, writing(f"journal {self._directory}"):
            if self._file is None:
                self._open()
            left = memoryview(line.encode("utf-8"))
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
            self.replies.setdefault(key, []).append(reply)

    def _open(self) -> None:
        """A file that no other process writes."""
        self._directory.mkdir(parents=True, exist_ok=True)
        index = str(jax.process_index() if is_multiprocess() else 0)
        if copy_of(self._directory):  # other machines publish their replies beside ours
            index = f"{this_process()}-{index}"
        for number in itertools.count(1):
            name = f"{index}.jsonl" if number == 1 else f"{index}-{number}.jsonl"
            self._file = open(self._directory / name, "a+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                continue
            # A process that was killed may have left the beginning of a line.
            self._file.seek(0)
            data = self._file.read()
            if not data.endswith(b"\n"):
                self._file.truncate(data.rfind(b"\n") + 1)
            return

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def _is_utf8(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Key and reply of every whole line; a last one without its end is what a kill left."""
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            if isinstance(row["key"], str) and isinstance(row["reply"], str):
                yield row["key"], [row["reply"]]
                continue
        raise UsageError(
            f"line {number} of {path}",
            "it is no line of a judge's journal",
            "delete this line, and its response is judged again",
        )
