"""Graders of the user's own: a function by name, in the grader's worker process."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import warnings

from zip_rc_jax.config import GradeConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.grade import JUDGE
from zip_rc_jax.config.plugins import GRADERS
from zip_rc_jax.grading.grader import Gradable, Grader
from zip_rc_jax.grading.judge import Judge, fields
from zip_rc_jax.runtime.errors import UsageError


def grader_of(config: GradeConfig, directory: str | os.PathLike[str]) -> Grader:
    """The grader that the settings name; a context manager.

    Args:
      directory: where a judge keeps its prompts and replies: the run directory.

    Raises:
      UsageError: a function that cannot be imported or called, or a judge that cannot be asked.
    """
    if config.grader == JUDGE:
        return Judge(config.judge, pathlib.Path(directory) / JUDGE)
    return CustomGrader(config.grader, config.timeout) if config.grader else Grader(config.timeout)


class CustomGrader(Grader):
    """Scores responses by a function `(problem, response) -> number in [0, 1]`.

    `problem` is a dict of `task`, `question`, `answer` and `entry_json`, all texts. The function
    runs in the worker process, one response at a time and within `timeout`: a response that takes
    longer is graded 0, with one warning. The worker imports the module from the path that this
    process has. It cannot write files.
    """

    def __init__(self, name: str, timeout: float = 5.0):
        """Args:
          name: "module:function".

        Raises:
          UsageError: it cannot be imported, or not be called with two values.
        """
        GRADERS.check(name)
        super().__init__(timeout)
        self.name = name
        self._told = False

    def __reduce__(self) -> tuple[type[CustomGrader], tuple[str, float]]:  # type: ignore[override]
        return CustomGrader, (self.name, self.timeout)

    def _arguments(self) -> list[str]:
        path = [entry or os.getcwd() for entry in sys.path]
        return ["custom", self.name, json.dumps(path)]

    def score(self, problem: Gradable, response: str) -> float:
        """The function's score of a response, in [0, 1]; 0.0 if it takes too long or its process
        dies.

        Raises:
          UsageError: the function fails, or returns something else.
        """
        request = {"custom": {"problem": fields(problem), "response": response}}
        with self._lock:
            reply = self._reply(request)
        if reply is None:
            if not self._told:
                warnings.warn(
                    f"grade.grader={self.name!r} took more than {self.timeout:g} seconds, or its "
                    "process died; such responses are graded 0",
                    stacklevel=2,
                )
            self._told = True
            return 0.0
        if "error" in reply:
            raise UsageError(
                f"grade.grader={shown(self.name)}",
                f"{reply['error']}, for the response {shown(response)}",
                "return a number in [0, 1] for any response",
            )
        return float(reply["score"])
