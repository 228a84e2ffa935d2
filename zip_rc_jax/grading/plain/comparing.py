"""Whether two answers, or two trees of answers, are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .latex import fraction, latex, prepared
from .numbers import has_finite_decimal, rational, significant
from .reading import RELATION, Node, alternatives, read
from .text import clean, words_of

Judge = Callable[[str, str], bool]

# Mathematics misreads these: 2020-01-02 would be 2017, and 0x1f a product with 0.
_AS_WRITTEN = re.compile(
    r"0[xbo][0-9a-f_]+|[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}|(?![0-9]{1,3}(?: "
    r"[0-9]{3})+$)[-+]?[0-9.]+(?: [-+]?[0-9.]+)+",
    re.IGNORECASE,
)
_BLOCK_OF_LATEX = re.compile(r"\\begin\{|\$|\\\[|\\\(")


def as_written(answer: str) -> str | None:
    """The text of an answer that equals another only if it is written alike; None where it is
    mathematics.

    So are lines of text (grids, moves), dates, digits in a row and literals such as 0x1f. White
    space and, but for lines, case do not count.
    """
    text = answer.strip()
    if "\n" in text and not _BLOCK_OF_LATEX.search(text):
        return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())
    text = " ".join(text.split())
    return text.lower() if _AS_WRITTEN.fullmatch(text) else None


def _number_and_more(a: str | None, b: str | None) -> bool:
    """Whether one of the two is a number with further lines below it, which may be a remark, and
    the other has one line."""
    several = [text for text in (a, b) if text is not None and "\n" in text]
    return len(several) == 1 and rational(clean(several[0].partition("\n")[0])) is not None


def equal(a: str, b: str, judge: Judge) -> bool:
    """Whether two answers are the same.

    `judge` compares what is left as LaTeX; it is called with the two in alphabetical order.
    """
    written = as_written(a), as_written(b)
    if written != (None, None) and not _number_and_more(*written):
        return written[0] == written[1]
    trees_a, trees_b = [read(a)], [read(b)]
    if same(trees_a[0], trees_b[0], judge):
        return True
    trees_a += alternatives(a)
    trees_b += alternatives(b)
    return any(
        same(x, y, judge)
        for x in trees_a
        for y in trees_b
        if not (x is trees_a[0] and y is trees_b[0])
    )


def same(a: Node, b: Node, judge: Judge) -> bool:
    """Whether two trees are equal. Symmetric."""
    if a[0] > b[0]:
        a, b = b, a
    kinds = (a[0], b[0])
    if "nan" in kinds or "wrong" in kinds or "long" in kinds:
        return a == b and a[0] == "long"
    if a[0] == b[0] and a[0] in _OF_ONE_KIND:
        return _OF_ONE_KIND[a[0]](a, b, judge)
    if kinds == ("num", "ratio"):
        return a[2] is None and b[2] is not None and a[1] == b[2]
    if kinds == ("base", "num"):
        return b[2] is None and b[1].denominator == 1 and str(b[1]) == a[1]
    for kind, equals in _TO_ANOTHER_KIND.items():
        if kind in kinds:
            node, other = (a, b) if a[0] == kind else (b, a)
            return equals(node, other, judge)
    if {*kinds} <= {"num", "tex", "inf", "matrix"}:
        return _same_formulas(a, b, judge)
    return False


# Two trees of one kind.


def _same_times(a: Node, b: Node, judge: Judge) -> bool:
    """3:15 may be 3:15 am or pm, as long as one of the two does not say."""
    return a[1] == b[1] or ((a[1] - b[1]) % 43200 == 0 and not (a[2] and b[2]))


def _same_assignments(a: Node, b: Node, judge: Judge) -> bool:
    return a[1] == b[1] and same(a[2], b[2], judge)


def _same_dicts(a: Node, b: Node, judge: Judge) -> bool:
    first, second = dict(a[1]), dict(b[1])
    return first.keys() == second.keys() and all(same(first[k], second[k], judge) for k in first)


def _same_matrices(a: Node, b: Node, judge: Judge) -> bool:
    return [len(r) for r in a[1]] == [len(r) for r in b[1]] and all(
        same(x, y, judge)
        for r, s in zip(a[1], b[1], strict=True)
        for x, y in zip(r, s, strict=True)
    )


# A tree and one of another kind.


def _choice_is(node: Node, other: Node, judge: Judge) -> bool:
    """(B) 5 is B, and it is 5."""
    return ("word", node[1]) == other or same(node[2], other, judge)


def _assignment_is(node: Node, other: Node, judge: Judge) -> bool:
    """x = 5 is 5, and may be an equation that the judge compares."""
    if other[0] == "tex" and _is_relation(other[1]):
        return node[2][0] in ("num", "tex") and judge(
            *sorted((f"{node[1]}={latex(node[2])}", prepared(other[1])))
        )
    return same(node[2], other, judge)


def _dict_is(node: Node, other: Node, judge: Judge) -> bool:
    """x = 1, y = 2 is (1, 2)."""
    values = tuple(v for _, v in node[1])
    return other[0] == "list" and other[1] in ("", "()") and _in_order(values, other[2], judge)


def _list_is(node: Node, other: Node, judge: Judge) -> bool:
    """{5} is 5; the judge may know a set by another formula."""
    if len(node[2]) == 1 and node[1] in ("{}", "[]"):
        return other[0] in ("num", "tex", "word", "assign") and same(node[2][0], other, judge)
    if other[0] == "tex" and node[1] not in ("",):
        return judge(*sorted((latex(node), prepared(other[1]))))
    return False


def _word_is(node: Node, other: Node, judge: Judge) -> bool:
    """A short word may be a product of letters."""
    if other[0] != "tex" or len(node[1]) > 3 or not node[1].isalpha():
        return False
    return other[2] is None and judge(*sorted((node[1], prepared(other[1]))))


# Formulas and numbers.


def _same_formulas(a: Node, b: Node, judge: Judge) -> bool:
    """Formulas with one text differ by their units alone; the judge compares all others."""
    if a[0] == "tex" and b[0] == "tex" and a[1] == b[1]:
        return (
            a[2] is None
            or b[2] is None
            or a[2] == b[2]
            or (a[2][0] == b[2][0] == "noun" and _same_nouns(a[2], b[2]))
        )
    return _same_tex(a, b, judge)


def _same_numbers(a: Node, b: Node, judge: Judge) -> bool:
    """Values and units. A percentage is also its value."""
    unit_a, unit_b = a[2], b[2]
    if unit_a is None or unit_b is None:
        if _same_values(a[1], a[3], b[1], b[3]):
            return True
        for one, other, mark in ((a, b, unit_a), (b, a, unit_b)):
            if (
                mark == ("%",)
                and other[2] is None
                and _same_values(
                    one[1] / 100, None if one[3] is None else one[3] + 2, other[1], other[3]
                )
            ):
                return True
        return False
    if unit_a[0] != unit_b[0]:
        return False
    if unit_a[0] == "known":
        if unit_a[1] != unit_b[1]:
            return False
        return a[1] * unit_a[2] == b[1] * unit_b[2] or (
            unit_a[2] == unit_b[2] and _same_values(a[1], a[3], b[1], b[3])
        )
    if unit_a[0] == "noun" and not _same_nouns(unit_a, unit_b):
        return False
    return _same_values(a[1], a[3], b[1], b[3])


def _same_nouns(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return (
        a[1] == b[1] != "?"
        or (a[1] in b[2] and len(b[2]) > 1 and a[1] != "?")
        or (b[1] in a[2] and len(a[2]) > 1 and b[1] != "?")
    )


def _same_values(x: Fraction, places_x: int | None, y: Fraction, places_y: int | None) -> bool:
    """Equal, or one is the rounding to six or more places of the other, which has no finite decimal
    form."""
    if x == y:
        return True
    for exact, rounded, places in ((x, y, places_y), (y, x, places_x)):
        if (
            places is not None
            and places >= 6
            and not has_finite_decimal(exact)
            and significant(rounded) >= 6
        ):
            return abs(exact - rounded) * 2 * 10**places <= 1
    return False


def _same_dimension(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if a == b:
        return True
    if a[0] != b[0]:
        return False
    return a[:2] == b[:2] if a[0] == "known" else _same_nouns(a, b)


def _same_tex(a: Node, b: Node, judge: Judge) -> bool:
    unit_a = a[2] if a[0] in ("num", "tex") else None
    unit_b = b[2] if b[0] in ("num", "tex") else None
    one, two = latex(a), latex(b)
    if unit_a is not None and unit_b is not None:
        if not _same_dimension(unit_a, unit_b):
            return False
        if unit_a[0] == "known" and unit_a[2] != unit_b[2]:
            one, two = (
                f"({one})\\cdot {fraction(unit_a[2])}",
                f"({two})\\cdot {fraction(unit_b[2])}",
            )
    return judge(*sorted((one, two)))


def _same_lists(a: Node, b: Node, judge: Judge) -> bool:
    """Order counts in tuples and intervals; a set drops repeated elements."""
    kinds = {a[1], b[1]}
    ordered = bool(kinds & {"()", "[]", "(]", "[)"})
    if ordered and len(kinds) > 1 and not (kinds == {"", "()"} or kinds == {"", "[]"}):
        return False
    if "union" in kinds and len(kinds) > 1:
        return False
    first, second = a[2], b[2]
    if kinds <= {"{}", ""} and "{}" in kinds:
        first, second = _distinct(first, judge), _distinct(second, judge)
    return _in_order(first, second, judge) if ordered else _in_any_order(first, second, judge)


def _distinct(nodes: tuple[Node, ...], judge: Judge) -> tuple[Node, ...]:
    kept: list[Node] = []
    for n in dict.fromkeys(nodes):
        if len(nodes) > 30 or not any(n[0] == k[0] == "num" and same(n, k, judge) for k in kept):
            kept.append(n)
    return tuple(kept)


def _in_order(first: tuple[Node, ...], second: tuple[Node, ...], judge: Judge) -> bool:
    return len(first) == len(second) and all(
        same(x, y, judge) for x, y in zip(first, second, strict=True)
    )


def _in_any_order(first: tuple[Node, ...], second: tuple[Node, ...], judge: Judge) -> bool:
    if len(first) != len(second):
        return False
    left = list(second)
    for x in first:
        # Those of the same form first: they are the cheap ones.
        at = next((i for i, y in enumerate(left) if x == y), None)
        if at is None:
            at = next((i for i, y in enumerate(left) if same(x, y, judge)), None)
        if at is None:
            return False
        left.pop(at)
    return True


_COMMON_WORDS = frozenset(
    words_of("no on am ma as at it is of or by be he if in me my us up we do go to so an")
)


def _product_letters(a: str, b: str) -> bool:
    """ab and ba are one product; listen and silent are two words."""
    return (
        sorted(a) == sorted(b)
        and len(a) <= 3
        and a.isalpha()
        and not {a, b} & _COMMON_WORDS
        and (len(a) == 2 or not set(a) & set("aeiou"))
    )


def _is_relation(text: str) -> bool:
    return "=" in text or bool(RELATION.search(text))


_OF_ONE_KIND: dict[str, Callable[[Node, Node, Judge], bool]] = {
    "num": _same_numbers,
    "inf": lambda a, b, judge: a == b,
    "time": _same_times,
    "ratio": lambda a, b, judge: a[1] == b[1],
    "base": lambda a, b, judge: a[1:] == b[1:],
    "choice": lambda a, b, judge: a[1] == b[1],
    "assign": _same_assignments,
    "dict": _same_dicts,
    "list": _same_lists,
    "matrix": _same_matrices,
    "word": lambda a, b, judge: a[1] == b[1] or _product_letters(a[1], b[1]),
}
# The first kind of the two that is here decides.
_TO_ANOTHER_KIND: dict[str, Callable[[Node, Node, Judge], bool]] = {
    "choice": _choice_is,
    "assign": _assignment_is,
    "dict": _dict_is,
    "list": _list_is,
    "word": _word_is,
}
