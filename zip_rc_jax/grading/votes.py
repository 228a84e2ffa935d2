"""Which answers of one prompt are the same answer, so that their votes count together."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Sequence

from zip_rc_jax.grading.answers import canonical
from zip_rc_jax.grading.grader import equivalent

Same = Callable[[str, str], bool]
NO_ANSWER = -1
MOST_FORMS = 32  # different normal forms that are compared with each other: 496 pairs
SECONDS = 20.0  # for all comparisons of one prompt; one takes at most the grader's limit


@functools.lru_cache(maxsize=4096)
def _same(first: str, second: str) -> bool:
    """The grader's word. Kept, as the samples of a prompt are grouped several times: by the decoder and by every baseline."""
    return equivalent(first, second)


def group_answers(answers: Sequence[str | None], same: Same = _same) -> list[int]:
    """Equal numbers for answers that are the same one, counted from 0 in the order they appear; `NO_ANSWER` for None.

    Answers with equal canonical forms are the same, and so are those that `same` calls equal; both hold
    transitively. The groups do not depend on the order of the answers. Numbers and words are compared without a
    process; formulas wait for the grader's worker.

    Args:
      same: whether two answers are the same one; symmetric. Called with representatives in sorted order.

    More than `MOST_FORMS` forms, or comparisons that take more than `SECONDS` together, are left apart with a warning.
    """
    forms = [None if answer is None else canonical(answer) for answer in answers]
    # The representative of a form must not depend on which sample came first.
    texts: dict[str, str] = {}
    for answer, form in zip(answers, forms, strict=True):
        if answer is not None and form is not None:
            texts[form] = min(texts.get(form, answer), answer)
    leader = _united(texts, same)
    numbers: dict[str, int] = {}
    return [NO_ANSWER if form is None else numbers.setdefault(leader[form], len(numbers)) for form in forms]


def _united(texts: dict[str, str], same: Same) -> dict[str, str]:
    """Of every form the smallest form of its group."""
    leader = {form: form for form in texts}
    if len(texts) > MOST_FORMS:
        warnings.warn(f"{len(texts)} different answers to one prompt were compared by their normal form only", stacklevel=3)
        return leader
    started = time.monotonic()
    for a, b in itertools.combinations(sorted(texts), 2):
        if leader[a] == leader[b]:
            continue
        if time.monotonic() - started > SECONDS:
            warnings.warn(
                f"answers such as {texts[a][:80]!r} and {texts[b][:80]!r} were not compared in time and count apart", stacklevel=3
            )
            break
        if same(*sorted((texts[a], texts[b]))):
            low, high = sorted((leader[a], leader[b]))
            leader = {form: low if first == high else first for form, first in leader.items()}
    return leader
