"""Rational numbers from arithmetic expressions, exact and bounded."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from .text import words_of

MAX_BITS = 40_000  # of a numerator or denominator

FIGURES = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_TOKEN = re.compile(
    r"\s*(?:(?P<number>" + FIGURES + r")(?:[eE](?P<exponent>[-+]?[0-9]{1,5})(?![0-9.A-Za-z]))?"
    r"|(?P<frac>\\frac\s*(?=\{))|(?P<times>\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|\*\*?)"
    r"|(?P<op>[-+/^(){}]))"
)
_REPEATING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar)\s?\{([0-9]{1,40})\}")
_DOTS = re.compile(r"(-?)([0-9]*)\.([0-9]*?)([0-9])\4\4+(?:\.\.\.|\\ldots|\\dots|\\cdots)\s*")
_SPACED = re.compile(r"-?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")


class _Unreadable(Exception):
    """No rational number in a form that is read here."""


class _Rational:
    """Recursive descent over the tokens of an arithmetic expression, exact and bounded."""

    def __init__(self, text: str):
        # kind, value, whether white space stands before
        self.tokens: list[tuple[str, Any, bool]] = []
        i = 0
        while i < len(text):
            m = _TOKEN.match(text, i)
            if m is None or len(self.tokens) > 200:
                raise _Unreadable
            space = text[i : i + 1].isspace()
            if m["number"]:
                value = Fraction(m["number"].replace(",", "").rstrip(".") or "0")
                if m["exponent"]:
                    value = _power(Fraction(10), Fraction(int(m["exponent"]))) * value
                self.tokens.append(("number", value, space))
            elif m["frac"]:
                self.tokens.append(("frac", None, space))
            elif m["times"]:
                self.tokens.append(("^" if m["times"] == "**" else "*", None, space))
            else:
                self.tokens.append((m["op"], None, space))
            i = m.end()
        self.at = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, kind: str) -> None:
        if self.peek() != kind:
            raise _Unreadable
        self.at += 1

    def parse(self) -> Fraction:
        value = self.sum()
        if self.at != len(self.tokens):
            raise _Unreadable
        return value

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > 30:
            raise _Unreadable
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.peek()
            self.at += 1
            term = self.product()
            value = value + term if sign == "+" else value - term
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while (kind := self.peek()) in ("*", "/", "(", "frac"):
            if kind in ("*", "/"):
                self.at += 1
            if kind == "/":
                under = self.signed()
                if under == 0:
                    raise _Unreadable
                value = _bounded(value / under)
            else:
                value = _bounded(value * self.signed())
        return value

    def signed(self) -> Fraction:
        if self.peek() in ("+", "-"):
            sign = -1 if self.peek() == "-" else 1
            self.at += 1
            if self.peek() in ("+", "-"):
                raise _Unreadable
            return sign * self.power()
        return self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.at += 1
        return _power(base, self.signed() if self.peek() != "{" else self.atom())

    def atom(self) -> Fraction:
        kind = self.peek()
        if kind == "number":
            value = self.tokens[self.at][1]
            self.at += 1
            return self.mixed(value)
        if kind == "frac":
            self.at += 1
            over = self.group("{", "}")
            under = self.group("{", "}")
            if under == 0:
                raise _Unreadable
            return _bounded(over / under)
        if kind in ("(", "{"):
            return self.group(kind, ")" if kind == "(" else "}")
        raise _Unreadable

    def group(self, opening: str, closing: str) -> Fraction:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def mixed(self, value: Fraction) -> Fraction:
        """3 1/2 and 3\\frac{1}{2}: a whole number, then a proper fraction of whole numbers without
        a sign between them."""
        rest = self.tokens[self.at : self.at + 7]
        kinds = [t[0] for t in rest]
        if value.denominator != 1:
            return value
        if kinds[:3] == ["number", "/", "number"] and rest[0][2]:
            over, under, used = rest[0][1], rest[2][1], 3
        elif kinds == ["frac", "{", "number", "}", "{", "number", "}"]:
            over, under, used = rest[2][1], rest[5][1], 7
        else:
            return value
        if not (over.denominator == under.denominator == 1 and 0 < over < under):
            raise _Unreadable
        self.at += used
        return value + over / under


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _Unreadable
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        raise _Unreadable
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and bits * abs(exponent.numerator) > MAX_BITS:
        raise _Unreadable
    return base**exponent.numerator


def rational(text: str) -> Fraction | None:
    """The exact value of an arithmetic expression in numbers alone, or None."""
    text = text.strip()
    if not text or len(text) > 1000 or not any("0" <= c <= "9" for c in text):
        return None
    repeating = _REPEATING.fullmatch(text) or _DOTS.fullmatch(text)
    if repeating is not None:
        sign, whole, fixed, cycle = repeating.groups()
        value = Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(
            int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed)
        )
        return -value if sign else value
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    try:
        return _bounded(_Rational(text).parse())
    except _Unreadable:
        return None


def decimal_places(text: str) -> int | None:
    """How many decimal places a plain decimal number shows; None for every other form."""
    m = re.fullmatch(r"[-+]?[0-9,]*\.([0-9]+)", text.strip())
    return len(m[1]) if m else None


def has_finite_decimal(value: Fraction) -> bool:
    under = value.denominator
    for p in (2, 5):
        while under % p == 0:
            under //= p
    return under == 1


def significant(value: Fraction) -> int:
    """Digits of a finite decimal, without zeros at either end."""
    scaled = abs(value)
    places = 0
    while scaled.denominator != 1 and places < 2000:
        scaled, places = scaled * 10, places + 1
    return (
        len(str(scaled.numerator).strip("0")) if scaled.numerator.bit_length() < 10_000 else 10**9
    )


SCALE_WORDS = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_ONES = words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_in_words(text: str) -> int | None:
    """forty-two, one hundred and five, three thousand; None for anything else."""
    total = part = 0
    last = 10**9
    tokens = text.replace("-", " ").split()
    if not tokens or len(tokens) > 12:
        return None
    for token in tokens:
        if token == "and" and part >= 100:
            continue
        if token in _ONES and last > (10 if _ONES.index(token) < 10 else 20):
            part, last = part + _ONES.index(token), 1
        elif token in _TENS and last > 99:
            part, last = part + 10 * (_TENS.index(token) + 2), 20
        elif token == "hundred" and 0 < part < 10:
            part, last = part * 100, 100
        elif token in ("thousand", "million") and 0 < part < 1000:
            total, part, last = (total + part) * SCALE_WORDS[token], 0, 10**6
        else:
            return None
    return total + part
