"""Which answers of one prompt are the same answer, so that their votes count together."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.plugins import ANSWER_EQUIVALENCES, ANSWER_EXTRACTORS
from zip_rc_jax.grading import plain
from zip_rc_jax.grading.answers import canonical
from zip_rc_jax.grading.grader import equivalent
from zip_rc_jax.runtime.errors import UsageError

Form = tuple[str, bool]
NO_ANSWER = -1
MOST_FORMS = 32  # different normal forms that are compared with each other: 496 pairs
SECONDS = 20.0  # for all comparisons of one prompt; one takes at most the grader's limit


class AnswerExtractor(Protocol):
    """Finds the answer that a text states; None where it states none.

    The setting `answer_extractor` takes one.
    """

    def __call__(self, text: str, /) -> str | None: ...


class AnswerEquivalence(Protocol):
    """Whether two answers are the same one.

    Symmetric. The setting `answer_equivalence` takes one.
    """

    def __call__(self, a: str, b: str, /) -> bool: ...


def same_text(a: str, b: str) -> bool:
    """Equal but for spaces: the equivalence "text"."""
    return a.split() == b.split()


def answer_groups(
    texts: Sequence[str], extractor: Any = "stated", equivalence: Any = "grader"
) -> list[int]:
    """Equal numbers for texts that state the same answer, counted from 0 in the order they appear;
    `NO_ANSWER` for those without one.

    Args:
      extractor, equivalence: an `AnswerExtractor` and an `AnswerEquivalence`, or how settings name
        them. With another equivalence than "grader", only equal texts are the same answer without
        asking it.

    Raises:
      UsageError: unknown names, an extractor that returns no text, or an equivalence that returns
        no truth value.
    """
    extract = ANSWER_EXTRACTORS.resolve(extractor)
    answers = [extract(text) for text in texts]
    for answer in answers:
        if not (answer is None or isinstance(answer, str)):
            raise UsageError(
                f"answer_extractor {shown(extractor)}",
                f"it returned {shown(answer)}, which is no text",
                "return a str or None",
            )
    same = ANSWER_EQUIVALENCES.resolve(equivalence)
    if same is equivalent:
        return group_answers(answers)

    return group_answers(answers, _Truth(same), readings=False)


@dataclasses.dataclass(frozen=True)
class _Truth:
    """An equivalence whose results are checked.

    Equal to another one of the same function, so that groups are kept.
    """

    same: AnswerEquivalence

    def __call__(self, a: str, b: str) -> bool:
        result = self.same(a, b)
        if isinstance(result, (bool, np.bool_)):
            return bool(result)
        value = f"answer_equivalence {shown(self.same)}"
        raise UsageError(
            value, f"it returned {shown(result)}, which is no truth value", "return True or False"
        )


def _form(answer: str) -> Form:
    """The normal form of an answer, and whether another form may be equal to it: see
    `plain.as_written` and `canonical`."""
    written = plain.as_written(answer)
    return (canonical(answer), True) if written is None else (written, False)


@functools.lru_cache(maxsize=4096)
def _same(first: str, second: str) -> bool:
    """The grader's word. Kept, as other samples of a prompt often give the same pair."""
    return equivalent(first, second)


def group_answers(
    answers: Sequence[str | None], same: Callable[[str, str], bool] = _same, readings: bool = True
) -> list[int]:
    """Equal numbers for answers that are the same one, counted from 0 in the order they appear;
    `NO_ANSWER` for None.

    Answers with equal forms (see `_form`) are one. Forms join a group if `same` calls them equal to
    all forms in it, the most frequent form first. So answers that the grader calls different never
    vote together: "5" equals "5 km" and "5 m", and joins only one of them. The groups do not depend
    on the order of the answers, and no reference answer is read. Numbers and words are compared
    without a process; formulas wait for the grader's worker.

    Args:
      same: whether two answers are the same one; symmetric. It gets one text per form, in sorted
        order. It is hashable, as groups are kept for the next call with the same answers.
      readings: whether forms are what mathematics makes of an answer; False: they are its text, and
        `same` decides all else.

    More than `MOST_FORMS` forms, or comparisons that take more than `SECONDS` together, are left
    apart, with one warning for these answers.
    """
    forms = [
        None if answer is None else _form(answer) if readings else (" ".join(answer.split()), True)
        for answer in answers
    ]
    # The text of a form must not depend on which sample came first.
    texts: dict[Form, str] = {}
    for answer, form in zip(answers, forms, strict=True):
        if answer is not None and form is not None:
            text = " ".join(answer.split())
            texts[form] = min(texts.get(form, text), text)
    count = collections.Counter(form for form in forms if form is not None)
    leader = _leaders(
        tuple((form, texts[form]) for form in sorted(texts, key=lambda form: (-count[form], form))),
        same,
    )
    numbers: dict[Form, int] = {}
    return [
        NO_ANSWER if form is None else numbers.setdefault(leader[form], len(numbers))
        for form in forms
    ]


@functools.lru_cache(maxsize=1024)
def _leaders(
    texts: tuple[tuple[Form, str], ...], same: Callable[[str, str], bool]
) -> dict[Form, Form]:
    """Of every form the first form of its group. `texts` are pairs of a form and a text of it."""
    if len(texts) > MOST_FORMS:
        warnings.warn(
            f"{len(texts)} different answers to one prompt were compared by their normal form only",
            stacklevel=3,
        )
        return {form: form for form, _ in texts}
    started, late = time.monotonic(), False
    groups: list[list[tuple[Form, str]]] = []

    def equal(first: str, second: str) -> bool:
        nonlocal late
        late = late or time.monotonic() - started > SECONDS
        return not late and same(*sorted((first, second)))

    for form, text in texts:
        open_to = [group for group in groups if form[1] and group[0][0][1]]
        group = next(
            (group for group in open_to if all(equal(text, other) for _, other in group)), None
        )
        if group is None:
            groups.append([(form, text)])
        else:
            group.append((form, text))
    if late:
        shown = " and ".join(repr(text[:80]) for _, text in texts[-2:])
        warnings.warn(
            f"answers such as {shown} were not compared in time and count apart", stacklevel=3
        )
    return {form: group[0][0] for group in groups for form, _ in group}
