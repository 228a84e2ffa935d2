"""Finding the answer in a response: what voting groups by and what graders score."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_RESPONSE_CHARS = 200_000  # the answer stands at the end, so a longer response is read from there

_MARKER = re.compile(r"Answer\**\s*:\**")
_EMPTY_BOX = re.compile(r"\\boxed\{\s*\}")
_BRACES = re.compile(r"\\boxed\{|\\[{}\\]|[{}]")  # escaped braces are text


def extract_answer(text: str) -> str | None:
    """The text after the last "Answer:" (emphasis stars allowed), else the contents of the last complete `\\boxed{...}`, else None.

    A box after the marker is unwrapped, and the result is stripped of white space and of emphasis stars around or behind it. Empty boxes
    are passed over, and an empty answer is none.
    """
    text = text[-MAX_RESPONSE_CHARS:]
    marker_ends = [match.end() for match in _MARKER.finditer(text)]
    tail = _EMPTY_BOX.sub("", text[marker_ends[-1] :] if marker_ends else text)
    boxed = _last_boxed(tail)
    if boxed is not None:
        return boxed.strip() or None
    return _without_emphasis(tail.strip()) or None if marker_ends else None


def _without_emphasis(text: str) -> str:
    """Stars at the end go, and as many at the beginning; those at the end alone were opened before the marker."""
    inner = text.rstrip("*")
    return inner.removeprefix("*" * (len(text) - len(inner))).strip()


def _last_boxed(text: str) -> str | None:
    """Contents of the complete box that begins last. One pass, so that no text of nothing but boxes is slow."""
    opened: list[int | None] = []  # where the contents of each open brace begin; None for braces that are no box
    best: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace.group() == "}":
            begin = opened.pop() if opened else None
            if begin is not None and (best is None or begin > best[0]):
                best = (begin, brace.start())
        elif brace.group() in ("{", "\\boxed{"):
            opened.append(brace.end() if brace.group() != "{" else None)
    return None if best is None else text[best[0] : best[1]]


_NUMBER = re.compile(r"([-+]?)(\d+(?:,\d{3})*|)(?:\.(\d*))?(?:/(\d+))?")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def canonical(answer: str) -> str:
    """A cheap normal form: equal forms mean equal answers. Numbers become exact fractions in lowest terms, so 0.5, 1/2 and `$\\frac12$` agree."""
    text = " ".join(answer.split()).rstrip(".!,;")
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            text = text[len(left) : len(text) - len(right)].strip()
            break
    plain = re.sub(r"^([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    found = _NUMBER.fullmatch(plain)
    if found is None or len(plain) > 400 or not (found[2] or found[3]):
        return text
    try:
        return str(Fraction(f"{found[1]}{found[2].replace(',', '') or 0}.{found[3] or 0}") / int(found[4] or 1))
    except ZeroDivisionError:
        return text
