"""Settings of grading: what decides whether a response is right."""

from __future__ import annotations

import dataclasses
import math
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from zip_rc_jax.config.checks import (
    check_names,
    check_types,
    counts,
    in_short,
    one_of,
    require,
    shown,
)
from zip_rc_jax.config.plugins import GRADERS
from zip_rc_jax.runtime.errors import UsageError

UNFINISHED = ("graded", "wrong")
UNREADABLE = ("wrong", "stop")
JUDGE = "judge"

_PROMPT = """Decide whether the response answers the problem correctly.

Problem:
{question}

Reference answer:
{answer}

Response:
{response}

Compare the final answer of the response with the reference answer. Equal answers may be written \
differently. Reason briefly. Then end with one line, either "VERDICT: CORRECT" or \
"VERDICT: INCORRECT"."""
FIELDS = ("question", "answer", "response", "task")
_FIELD = re.compile(r"\{(question|answer|response|task)\}")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A language model that grades, behind an OpenAI-compatible URL (`grade.grader: judge`).

    Attributes:
      base_url: without `/chat/completions`, such as `http://localhost:8000/v1`.
      model: its name there.
      api_key_env: environment variable that holds the API key; empty for none. The key is never
        written anywhere.
      system: text of the system turn; empty for none.
      prompt: user turn. `{question}`, `{answer}`, `{response}` and `{task}` in it become those of
        the rollout. All other text stays, braces included.
      right, wrong: regular expressions, in which case does not count. Whichever matches last in the
        reply decides.
      temperature, max_tokens: of the reply.
      unreadable: what a response is worth whose replies match neither: "wrong" (and a warning), or
        "stop".
      unreadable_retries: further replies to ask for where one matches neither.
      requests_per_minute: of all threads together; 0 for no limit.
      concurrency: requests that wait for a reply at the same time.
      timeout: seconds that one request may take.
      retries: further attempts after status 408, 425, 429 or 5xx, a lost connection, or an answer
        that is no chat completion.
      backoff: seconds before the second attempt. They double with every further one, up to a
        minute. A `Retry-After` of the server counts, if it is longer.
    """

    base_url: str = ""
    model: str = ""
    api_key_env: str = ""
    system: str = ""
    prompt: str = _PROMPT
    right: str = r"VERDICT:\W*CORRECT\b"
    wrong: str = r"VERDICT:\W*INCORRECT\b"
    temperature: float = 0.0
    max_tokens: int = 1024
    unreadable: str = "wrong"
    unreadable_retries: int = 1
    requests_per_minute: float = 0.0
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0

    def __post_init__(self) -> None:
        check_types(JudgeConfig, vars(self))
        one_of("grade.judge.unreadable", self.unreadable, UNREADABLE)
        for field in ("max_tokens", "concurrency"):
            counts(f"grade.judge.{field}", getattr(self, field))
        for field in (
            "temperature",
            "requests_per_minute",
            "retries",
            "unreadable_retries",
            "backoff",
        ):
            value = getattr(self, field)
            require(
                0 <= value < math.inf,
                f"grade.judge.{field}={shown(value)}",
                "it is below 0 or infinite",
                "use a number from 0 on",
            )
        require(
            0 < self.timeout < math.inf,
            f"grade.judge.timeout={shown(self.timeout)}",
            "it is a time in seconds",
            "use a number above 0",
        )
        require(
            "{response}" in self.prompt,
            f"grade.judge.prompt={shown(self.prompt)}",
            "it does not contain {response}, so the judge would not see what it grades",
            "write {response} where it belongs",
        )
        for field in ("right", "wrong"):
            value = getattr(self, field)
            try:
                matches_nothing = re.compile(value).search("") is not None
            except re.error as error:
                raise UsageError(
                    f"grade.judge.{field}={shown(value)}",
                    f"it is no regular expression ({in_short(error)})",
                    "repair it",
                ) from None
            require(
                not matches_nothing,
                f"grade.judge.{field}={shown(value)}",
                "it matches an empty reply",
                "write what the reply must hold",
            )

    def check_ready(self) -> None:
        """Raises UsageError unless there is somebody to ask."""
        parts = urllib.parse.urlsplit(self.base_url)
        require(
            parts.scheme in ("http", "https") and bool(parts.netloc),
            f"grade.judge.base_url={shown(self.base_url)}",
            "it is no http:// or https:// address",
            "write one such as http://localhost:8000/v1",
        )
        require(
            not parts.username and not parts.password,
            "grade.judge.base_url with a user or password",
            "the address is written into records",
            "put the key into an environment variable, and its name into grade.judge.api_key_env",
        )
        require(
            bool(self.model),
            "grade.judge.model=''",
            "the server has to know who judges",
            "name the model as the server does",
        )

    def messages(self, problem: dict[str, str], response: str) -> list[dict[str, str]]:
        """The turns that ask about one response."""
        given = problem | {"response": response}
        # One pass, so that a field that holds "{answer}" stays as it is.
        text = _FIELD.sub(lambda match: given[match.group(1)], self.prompt)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        return [*turns, {"role": "user", "content": text}]


@dataclasses.dataclass(frozen=True)
class GradeConfig:
    """Grading of rollouts, and of the samples of an evaluation.

    Attributes:
      unfinished: what a response that was cut off at `max_tokens` is worth. "graded" (the default):
        what its answer is worth if it states one, as for whoever reads that text. "wrong": never
        correct, whatever its text, as in the authors' published code.
      grader: what decides: "" for the task's own scorer (free-form mathematics without a task);
        "module:function" for an own function, which is imported from the path of this process and
        from nowhere else; or "judge" for a language model, see `judge`. A function gets a dict with
        `task`, `question`, `answer` and `entry_json`, and the response. It returns a number in
        [0, 1]; a response is right if that is 1, as with the tasks' own scorers. It runs in the
        grader's worker process, which cannot write files.
      timeout: seconds that one answer may take in the worker process. After that it is wrong.
      judge: see `JudgeConfig`.
    """

    unfinished: str = "graded"
    grader: str = ""
    timeout: float = 5.0
    judge: JudgeConfig = JudgeConfig()

    def __post_init__(self) -> None:
        check_types(GradeConfig, vars(self))
        one_of("grade.unfinished", self.unfinished, UNFINISHED)
        require(
            0 < self.timeout < 1e6,
            f"grade.timeout={shown(self.timeout)}",
            "it is a time in seconds",
            "use a number above 0 and below a million",
        )
        require(
            isinstance(self.grader, str),
            f"grade.grader={shown(self.grader)}",
            "the grader runs in another process, which imports it by name",
            'write "module:function"',
        )
        if self.grader == JUDGE:
            self.judge.check_ready()
        elif self.grader:
            GRADERS.check(self.grader)
        require(
            self.grader == JUDGE or self.judge == JudgeConfig(),
            f"grade.judge with grade.grader={self.grader!r}",
            "nothing would read it",
            "set grade.grader=judge, or leave grade.judge out",
        )

    def record(self) -> dict[str, object]:
        """What grades depend on, for the record beside them.

        Older records have `unfinished` alone. So the rest stands there only where it was set. How
        fast a judge may be asked changes no grade.
        """
        return {"unfinished": self.unfinished, **self.grader_record()}

    def grader_record(self) -> dict[str, object]:
        """What scores depend on; {} for the tasks' own scorers within their usual time."""
        found: dict[str, object] = {}
        if self.timeout != GradeConfig.timeout:
            found["timeout"] = self.timeout
        if self.grader:
            found["grader"] = self.grader
        if self.grader == JUDGE:
            names = ("model", "system", "prompt", "right", "wrong", "temperature", "max_tokens")
            found["judge"] = {name: getattr(self.judge, name) for name in names}
        return found


def made_grade(given: Any) -> GradeConfig:
    """The section `grade` from plain values, as options of a command give it.

    Raises:
      UsageError: an unknown setting, or an impossible value.
    """
    values = _known(given, "grade", GradeConfig)
    if "judge" in values:
        values["judge"] = JudgeConfig(**_known(values["judge"], "grade.judge", JudgeConfig))
    return GradeConfig(**values)


def _known(given: Any, name: str, kind: type) -> dict[str, Any]:
    require(
        isinstance(given, Mapping),
        f"{name}={shown(given)}",
        "it has settings of its own",
        f"write for example {name}.{'model=NAME' if kind is JudgeConfig else 'grader=judge'}",
    )
    check_names(given, kind, name, "there is no such setting")
    return dict(given)
