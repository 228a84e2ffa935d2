"""How many responses are right, state no answer, or were cut off: what grading tells about the
rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

from zip_rc_jax.data.problems import level_title
from zip_rc_jax.grading.answers import extract_answer

MANY_WITHOUT_ANSWER = 0.1  # from this share on there is a warning


class Graded(Protocol):
    """What the summary reads of a `Rollout`."""

    @property
    def task(self) -> str: ...
    @property
    def level(self) -> int: ...
    @property
    def level_name(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def finished(self) -> bool: ...
    @property
    def correct(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class GradeSummary:
    """Counts of graded responses, in all or of one task and level.

    Attributes:
      responses: how many there are.
      right: graded 1.
      without_answer: no answer was found in the text, so they are graded 0.
      cut_off: ended at `max_tokens`, not with an end token.
      cut_off_without_answer: both.
    """

    responses: int = 0
    right: int = 0
    without_answer: int = 0
    cut_off: int = 0
    cut_off_without_answer: int = 0

    def __add__(self, other: GradeSummary) -> GradeSummary:
        return GradeSummary(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )

    def line(self) -> str:
        """One line for people, with shares in percent."""
        shares = (
            ("right", self.right),
            ("without an answer", self.without_answer),
            ("cut off", self.cut_off),
        )
        return ", ".join(
            f"{100 * count / max(self.responses, 1):.1f}% {name}" for name, count in shares
        )

    def warning(self) -> str | None:
        """What to say where at least `MANY_WITHOUT_ANSWER` of the responses state no answer; None
        where fewer do."""
        if self.without_answer < MANY_WITHOUT_ANSWER * self.responses:
            return None
        long = (
            "most of them were cut off: raise rollout.max_tokens"
            if 2 * self.cut_off_without_answer > self.without_answer
            else ""
        )
        fix = (
            long
            or 'tell the model in the prompt how to state it, such as "Answer: 42" or \\boxed{42}'
        )
        return (
            f"{self.without_answer} of {self.responses} responses state no answer and count as "
            f"wrong; {fix}"
        )


def summarize(rollouts: Iterable[Graded]) -> dict[str, GradeSummary]:
    """Counts by task and name of the level ("chain_sum level 2", "math Algebra").

    In the order they appear; "" holds all of them.
    """
    summaries = {"": GradeSummary()}
    for r in rollouts:
        silent, cut = extract_answer(r.response) is None, not r.finished
        one = GradeSummary(1, int(r.correct >= 1), int(silent), int(cut), int(silent and cut))
        for name in ("", f"{r.task} {level_title(r.level_name, r.level)}"):
            summaries[name] = summaries.get(name, GradeSummary()) + one
    return summaries


def to_json(summaries: dict[str, GradeSummary]) -> dict[str, Any]:
    """For `run_dir/grades.json`: the counts, those of all under "all"."""
    return {name or "all": dataclasses.asdict(counts) for name, counts in summaries.items()}
