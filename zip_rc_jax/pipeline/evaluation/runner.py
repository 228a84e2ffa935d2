"""Decodes and grades all problems of an evaluation under one setting, and keeps the results."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.data.problems import ProblemSet
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.grading.grader import Grader, correct
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.provenance import prompt_record
from zip_rc_jax.pipeline.rollouts import refuse_failure
from zip_rc_jax.pipeline.seeds import try_seed, with_own_samples
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import (
    code_version,
    read_json,
    with_digest,
    without_digest,
    write_json,
)
from zip_rc_jax.runtime.temporaries import remove_leftovers
from zip_rc_jax.runtime.working_copy import publish


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One strategy on all problems.

    Attributes:
      grades: `grades[p][k]` in {0, 1}, of every prefix.
      key: all that the results depend on; {} where nobody asks.
    """

    results: list[Result]
    grades: list[list[float]]
    seconds: float
    key: dict[str, Any] = dataclasses.field(default_factory=dict)


class EvaluationRunner:
    """Held-out problems, the grader, and the files that make finished decodes survive an
    interruption.

    They stay when the report has been written: with another beta, or more of them, only what is new
    is decoded.

    Attributes:
      number: of the try, from 0. Every try has random numbers of its own.
    """

    def __init__(
        self,
        config: PipelineConfig,
        found: ProblemSet,
        grader: Grader,
        partial: pathlib.Path,
        number: int = 0,
    ):
        self.config, self.grader, self.partial = config, grader, partial
        self.set, self.problems, self.number = found, found.problems, number
        partial.mkdir(parents=True, exist_ok=True)
        remove_leftovers(partial)

    def decode(
        self, lm: LanguageModel, decode: DecodeConfig, title: str, before: str = ""
    ) -> Decoded:
        """All problems under one setting.

        Reads the result of an earlier call with the same model, setting and code.

        Args:
          title: names the file, and the progress bar.
          before: what the progress bar says before the title.

        Raises:
          UsageError: the model failed on a problem.
        """
        seed = try_seed(self.config, self.number)
        key = {
            "model": lm.digest(),
            "decode": to_dict(decode),
            "problems": self.set.record,
            "evaluate": {"seed": seed},
            "code": code_version(),  # the report names one commit, which made all of it
            **prompt_record(self.config, lm.tokenizer),
            **self.config.grade.grader_record(),  # `unfinished` is applied to what is stored
        }
        path = stored_path(self.partial, title)
        stored = read_stored(path)
        if stored.get("key") != json.loads(json.dumps(key)):
            engine = Engine(lm, decode, seed)
            started = time.perf_counter()
            found = run_all(
                engine,
                with_own_samples(prompt_texts(self.problems, self.config, lm.tokenizer), seed),
                before + title,
            )
            seconds = time.perf_counter() - started
            for p, result in zip(self.problems, found, strict=True):
                refuse_failure(p, result)
            stored = {
                "key": key,
                "seconds": seconds,
                "grades": None,
                "results": [r.to_dict() for r in found],
            }
            # before the grades, so that an interruption or a failure among them loses no decode
            publish(write_json(path, with_digest(stored)))
        results = [Result.from_dict(r) for r in stored["results"]]
        if stored["grades"] is None:
            items = [
                (p, x.text) for p, r in zip(self.problems, results, strict=True) for x in r.prefixes
            ]
            scores = iter([correct(s) for s in self.grader.grade_many(items)])
            stored["grades"] = [[next(scores) for _ in r.prefixes] for r in results]
            publish(write_json(path, with_digest(stored)))
        never = self.config.grade.unfinished == "wrong"
        grades = [
            [
                0.0 if never and x.finish_reason != "stop" else grade
                for x, grade in zip(r.prefixes, of_prompt, strict=True)
            ]
            for r, of_prompt in zip(results, stored["grades"], strict=True)
        ]
        return Decoded(results, grades, stored["seconds"], key)


def stored_path(partial: pathlib.Path, title: str) -> pathlib.Path:
    """The file of a finished decode."""
    return partial / (title.replace(" ", "_").replace("=", "") + ".json")


def read_stored(path: pathlib.Path) -> dict[str, Any]:
    """What an earlier call left; {} where there is nothing.

    Raises UsageError for a damaged file.
    """
    if not os.path.lexists(path):
        return {}
    fix = "delete it, and this setting is decoded again"
    found = read_json(path, fix=fix)
    try:
        return without_digest(found)
    except ValueError as error:
        raise UsageError(f"file {path}", f"it is damaged ({error})", fix) from None
