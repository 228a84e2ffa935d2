"""The tree of an answer: choices, times, ratios, lists, equations, numbers, words."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from .numbers import decimal_places, number_in_words, rational
from .text import (
    FUNCTION_WORDS,
    MAX_CHARS,
    TEXT_COMMAND,
    TEXT_GROUP,
    balanced,
    clean,
    top_level,
)
from .units import split_unit

# A tree: a tuple that begins with its kind.
#   ("num", value, unit, places)  an exact Fraction, its unit or None, the decimals it shows or None
#   ("tex", text, unit)           a formula
#   ("word", text)                words, or the letter of a choice
#   ("choice", letter, node)      (B) 5
#   ("list", brackets, nodes)     brackets: "", "()", "[]", "{}", "(]", "[)" or "union"
#   ("assign", name, node)        x = 5
#   ("dict", ((name, node), ...)) x = 1, y = 2
#   ("matrix", rows)              rows of nodes
#   ("ratio", terms, value)       over the first term that is not 0; the value of two terms, or None
#   ("time", seconds, certain)    whether it says which half of the day
#   ("base", digits, base)        101_2
#   ("inf", sign), ("nan",)
#   ("wrong", text)               an equation between different numbers
#   ("long", text)                more than `MAX_CHARS` characters
Node = tuple[Any, ...]

_TIME = re.compile(
    r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?\s*(?:\\text\{\s*)?(?:([ap])\.?\s?m\.?)?(?:\s*\})?",
    re.IGNORECASE,
)
_HOUR = re.compile(r"([0-9]{1,2})\s*(?:\\text\{\s*)?([ap])\.?\s?m\.?(?:\s*\})?", re.IGNORECASE)
_RATIO = re.compile(r"[0-9./ ]+(?:\s*(?::|\\colon)\s*[0-9./ ]+)+")
_CHOICE = re.compile(r"\(([A-Za-z])\)\s+(.+)|([A-J])[.):]\s+(.+)|\(([A-J])\)\s*((?![-+*/^(=])\S.*)")
_LETTER = re.compile(
    r"(?:(?:option|choice|answer|alternative)\s+)?\(?\s*([A-Za-z])\s*\)?\s*[.):]?", re.IGNORECASE
)
_TEXT_CHOICE = re.compile(TEXT_COMMAND + r"\s?\{\s*(\([A-Za-z]\)|[A-J][.):])\s*\}")
_BASE = re.compile(r"([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)_\{?\s*([0-9]{1,2}|\\text\{[a-z]+\})\s*\}?")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]{1,12}|[A-Z]{1,4})(?:_(?:\{[^{}]{1,12}\}"
    r"|[A-Za-z0-9]))?'*(?:\s?\([A-Za-z0-9,\s\\]{1,20}\))?|\\angle\s?[A-Z]{1,3}"
    r"|\([A-Za-z](?:\s?,\s?[A-Za-z])+\)"
)
RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|subset|in|notin|equiv|sim)(?![A-Za-z])|[<>]")
_SEPARATOR = re.compile(
    r",|;|\s(?:and|or|And|Or)\s|\\text\s?\{\s*,?\s*(?:and|or)\s*\}|\\(?:lor|land|vee"
    r"|wedge)(?![A-Za-z])"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}")
_LEAD_IN = re.compile(
    r"^(?:it(?: is|'s)|exactly|just|only|simply|precisely|the (?:result|value|total|sum) is|we "
    r"(?:get|have))\s+(?=\S)",
    re.IGNORECASE,
)
_NAN = re.compile(r"[-+]?\s*(?:nan|\\?text\{nan\})[ij]?", re.IGNORECASE)
_NAN_PART = re.compile(r"(?<![A-Za-z])nan[ij]?(?![A-Za-z])", re.IGNORECASE)
_INFINITY = re.compile(r"([-+]?)\s*(?:\\infty|inf|infinity|oo)", re.IGNORECASE)
_NOTHING = re.compile(
    r"\\emptyset|\\\{\s*\\\}|\{\s*\}|(?:the )?empty set|no (?:real )?solutions?", re.IGNORECASE
)
_PARENTHESIS = re.compile(r"^(.*\S)\s+\((?!\s*mod\b)([^()]*(?<![\\A-Za-z])[A-Za-z]{3}[^()]*)\)$")
_SENTENCE = re.compile(r"[.;]\s+(?=[A-Z][a-z]*\b)")


def read(text: str, depth: int = 0) -> Node:
    """The tree of an answer. `comparing.same` compares two."""
    if len(text) > MAX_CHARS:
        return ("long", text.strip())
    first = text.strip()
    if "\n" in first and not depth:
        first = _first_line(first)
    raw = clean(first)
    if (
        raw.endswith("!")
        and "\\" not in first[-3:]
        and not first.rstrip(". ").endswith(("$", ")", "]", "}"))
    ):
        raw = raw.rstrip("!").rstrip()
    return _tree(_without_remark(raw), depth)


def _first_line(text: str) -> str:
    """Text up to the first line end outside of brackets, environments and display delimiters."""
    if text.startswith(("$$", "\\[", "\\begin", "[", "{", "(")) or "\\begin" in text:
        return " ".join(text.split("\n"))
    line = text.split("\n", 1)[0]
    return line if balanced(line) else " ".join(text.split("\n"))


def _without_remark(text: str) -> str:
    """Without words in parentheses behind the answer, and without further sentences."""
    m = _PARENTHESIS.match(text)
    if (
        m
        and not re.search(r"\\|[=+*/^]", m[1][-1:])
        and (re.search(r"[0-9]$|[0-9}]$", m[1]) or re.fullmatch(r"[A-Za-z ]+", m[1]))
    ):
        text = m[1]
    cut = _SENTENCE.search(text)
    if (
        cut
        and balanced(text[: cut.start()])
        and not re.fullmatch(r"\(?[A-J]\)?", text[: cut.start()].strip())
    ):
        text = text[: cut.start()]
    return text.strip()


def _tree(text: str, depth: int) -> Node:
    if depth > 12 or not text:
        return ("tex", text, None)
    text = _LEAD_IN.sub("", text)
    node = _constant(text) or _time_of_day(text) or _ratio(text)
    if node is not None:
        return node
    upright = _TEXT_CHOICE.match(text)
    if upright:
        text = f"{upright[1]} {text[upright.end() :].strip()}".strip()
    for form in (_choice, _base, _matrix, _separated, _bracketed, _plus_minus, _equation):
        node = form(text, depth)
        if node is not None:
            return node
    return _single(text)


def _constant(text: str) -> Node | None:
    """Not a number, the empty set, or infinity."""
    if _NAN.fullmatch(text) or _NAN_PART.search(text):
        return ("nan",)
    if _NOTHING.fullmatch(text):
        return ("list", "{}", ())
    infinity = _INFINITY.fullmatch(text)
    return ("inf", "-" if infinity[1] == "-" else "+") if infinity else None


def _time_of_day(text: str) -> Node | None:
    """3:15, 3:15:20 pm, 3 pm."""
    clock = _TIME.fullmatch(text)
    if clock and int(clock[1]) < 25 and int(clock[2]) < 60 and (len(clock[2]) == 2):
        return _clock(int(clock[1]), int(clock[2]), int(clock[3] or 0), clock[4])
    hour = _HOUR.fullmatch(text)
    if hour and 0 < int(hour[1]) < 13:
        return _clock(int(hour[1]), 0, 0, hour[2])
    return None


def _ratio(text: str) -> Node | None:
    """1:2, 1 : 2 : 3."""
    if not _RATIO.fullmatch(text):
        return None
    terms = [rational(p) for p in re.split(r":|\\colon", text)]
    parts = [p for p in terms if p is not None]
    if len(parts) != len(terms) or not any(parts):
        return None
    unit = next(p for p in parts if p)
    value = parts[0] / parts[1] if len(parts) == 2 and parts[1] else None
    return ("ratio", tuple(p / unit for p in parts), value)


def _choice(text: str, depth: int) -> Node | None:
    """A letter alone, or a letter and what it stands for: (B) 5."""
    letter = _LETTER.fullmatch(text)
    if letter:
        return ("word", letter[1].lower())
    choice = _CHOICE.fullmatch(text)
    if choice and not re.fullmatch(r"[A-Za-z][.):]\s*[A-Za-z]", text):
        mark, rest = next((choice[i], choice[i + 1]) for i in (1, 3, 5) if choice[i])
        return ("choice", mark.lower(), read(rest, depth + 1))
    return None


def _base(text: str, depth: int) -> Node | None:
    """101_2."""
    base = _BASE.fullmatch(text)
    if base and base[2] not in ("", None):
        return ("base", base[1].lower().lstrip("0") or "0", re.sub(r"\\text|[{}]", "", base[2]))
    return None


def _matrix(text: str, depth: int) -> Node | None:
    matrix = _MATRIX.fullmatch(text)
    if not matrix:
        return None
    rows = [r for r in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if r.strip()]
    return ("matrix", tuple(tuple(read(c, depth + 1) for c in r.split("&")) for r in rows))


def _separated(text: str, depth: int) -> Node | None:
    """Several answers between commas, "and" or "or", or the sets of a union."""
    top = top_level(text)
    several = _split(text, top, _SEPARATOR, keep_thousands=True)
    if len(several) > 1 and all(p.strip() for p in several):
        return _listed(several, depth)
    union = _split(text, top, re.compile(r"\\cup(?![A-Za-z])|\sU\s"), keep_thousands=False)
    if len(union) > 1 and all(p.strip() for p in union):
        return ("list", "union", tuple(read(p, depth + 1) for p in union))
    return None


def _plus_minus(text: str, depth: int) -> Node | None:
    """Both values of a \\pm."""
    if text.count("\\pm") != 1 or "=" in text:
        return None
    plus, minus = (text.replace("\\pm", s).strip().removeprefix("+").strip() for s in ("+", "-"))
    return ("list", "", (read(plus, depth + 1), read(minus, depth + 1)))


def _single(text: str) -> Node:
    """A number, words, or a formula that only the judge reads."""
    value, unit = split_unit(text)
    number = rational(value)
    if number is not None:
        return ("num", number, unit, decimal_places(value))
    plain_text = TEXT_GROUP.sub(r"\1", text)
    words = re.sub(
        r"^(?:the|an|a)\s+(?=\S)", "", " ".join(plain_text.lower().replace("'", "").split())
    )
    count = number_in_words(words)
    if count is not None:
        return ("num", Fraction(count), None, None)
    if _are_words(words):
        return ("word", words.strip(" .,!?"))
    return ("tex", value if unit else text, unit)


def _are_words(text: str) -> bool:
    """Words, unlike products such as xy z and differences such as p-q: hyphens join parts of two
    letters or more."""
    tokens = [t.strip(".,!?:;&") for t in text.split()]
    long = [bool(re.fullmatch(r"[^\W\d_]{2,}(?:[-.][^\W\d_]{2,})*", t)) for t in tokens]
    return (
        any(long)
        and all(
            ok or not t or (len(t) == 1 and t.isalpha()) for ok, t in zip(long, tokens, strict=True)
        )
        and text not in FUNCTION_WORDS
    )


def _clock(hours: int, minutes: int, seconds: int, half: str | None) -> Node:
    if half and hours <= 12:
        hours = hours % 12 + (12 if half.lower() == "p" else 0)
    return ("time", hours * 3600 + minutes * 60 + seconds, bool(half) or hours > 12 or hours == 0)


_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?!,[0-9])")


def _split(
    text: str, top: list[bool], separator: re.Pattern[str], keep_thousands: bool
) -> list[str]:
    inside = set()
    if keep_thousands:
        for m in _THOUSANDS.finditer(text):
            inside |= set(range(m.start(), m.end()))
    parts, begin = [], 0
    for m in separator.finditer(text):
        if top[m.start()] and m.start() not in inside:
            parts.append(text[begin : m.start()])
            begin = m.end()
    parts = [*parts, text[begin:]]
    return [p for p in parts if p.strip()] if len(parts) > 2 else parts  # ", and" is one separator


def _listed(parts: list[str], depth: int) -> Node:
    nodes = [read(p, depth + 1) for p in parts]
    flat: list[Node] = []
    for n in nodes:
        flat += n[2] if n[0] == "list" and n[1] == "" else [n]
    if flat and flat[0][0] == "assign":
        names = {n[1] for n in flat if n[0] == "assign"}
        if len(names) == 1:
            return ("list", "", tuple(n[2] if n[0] == "assign" else n for n in flat))
        if all(n[0] == "assign" for n in flat) and len(names) == len(flat):
            return ("dict", tuple((n[1], n[2]) for n in flat))
    return ("list", "", tuple(flat))


def _bracketed(text: str, depth: int) -> Node | None:
    """A tuple, interval, list or set; a single value in parentheses is that value."""
    if text.startswith("\\{") and text.endswith("\\}"):
        inner, kind = text[2:-2], "{}"
    elif text[:1] in "([{" and text[-1:] in ")]}" and len(text) > 2:
        inner, kind = text[1:-1], text[0] + text[-1]
        if (text[0] == "{") != (text[-1] == "}"):
            return None
    else:
        return None
    top = top_level(inner)
    # "(1)(2)" begins and ends with parentheses, too.
    level = 0
    for i, c in enumerate(inner):
        escaped = i > 0 and inner[i - 1] == "\\"
        if not escaped or kind == "{}":
            level += (c in "([{") - (c in ")]}")
        if level < 0:
            return None
    if kind == "{}" and re.search(r"\\mid|\||:", inner):
        return None
    parts = _split(inner, top, re.compile(r",|;"), keep_thousands=False)
    if len(parts) == 1:
        if kind in ("{}", "[]"):
            return ("list", kind, (read(inner, depth + 1),))
        return read(inner, depth + 1) if kind == "()" else None
    if not all(p.strip() for p in parts):
        return None
    nodes = tuple(read(p, depth + 1) for p in parts)
    return ("list", kind, nodes)


def _equation(text: str, depth: int) -> Node | None:
    """x = 5, f(2) = 5, total = 5, 40 + 2 = 42; None for relations such as 2x + y = 3."""
    membership = re.match(r"([A-Za-z])\s*\\in(?![A-Za-z])\s*(.+)$", text)
    if membership:
        return ("assign", membership[1].lower(), read(membership[2], depth + 1))
    text = re.sub(r"^([A-Za-z]) (?:is|equals) (?=\S)", r"\1 = ", text)
    if "=" not in text and "\\approx" not in text:
        return None
    top = top_level(text)
    if RELATION.search(text):
        return None
    parts = [
        p.strip()
        for p in _split(text, top, re.compile(r"=|\\approx(?![A-Za-z])"), keep_thousands=False)
    ]
    if len(parts) < 2 or not all(parts) or "==" in text:
        if text.startswith(("=", "\\approx")) and len(parts) == 2:
            return read(parts[1], depth + 1)
        return None
    plain_name = TEXT_GROUP.sub(r"\1", parts[0]).strip()
    named = bool(_NAME.fullmatch(plain_name)) and rational(plain_name) is None
    described = bool(
        re.fullmatch(r"[A-Za-z][A-Za-z' ]{2,60}", plain_name)
    ) or plain_name.startswith("(")
    values = parts[1:] if named or described else parts
    numbers = [rational(split_unit(v)[0]) for v in values]
    if len(values) > 1:
        if all(n is not None for n in numbers):
            agreed = [
                split_unit(v)[1] or numbers[0] == n for v, n in zip(values, numbers, strict=True)
            ]
            if "\\approx" not in text and not all(agreed):
                return ("wrong", text)  # 41 = 42
            last = values[0] if "\\approx" in text else values[-1]
        elif not (named or described):
            return None
        else:
            last = values[0] if "\\approx" in text else values[-1]
    else:
        last = values[0]
    node = read(last, depth + 1)
    if not (named or described):
        return node
    if described and not re.fullmatch(r"\\?[A-Za-z]{1,2}", plain_name):
        return node
    return ("assign", plain_name.lower().replace(" ", ""), node)


def alternatives(text: str) -> list[Node]:
    """Other readings of a text that has two: 5! as a factorial, 100,200 as two numbers, 0,5 as a
    decimal."""
    readings: list[Node] = []
    if len(text) > MAX_CHARS:
        return readings
    cleaned = clean(text)
    if cleaned.endswith("!") and len(cleaned) > 1:
        readings.append(("tex", cleaned, None))
    if re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", cleaned):
        readings.append(
            ("list", "", tuple(("num", Fraction(int(p)), None, None) for p in cleaned.split(",")))
        )
    if re.fullmatch(r"-?0,[0-9]+", cleaned):
        readings.append(("num", Fraction(cleaned.replace(",", ".")), None, None))
    return readings
