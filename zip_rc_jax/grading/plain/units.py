"""Units and money: a value and its unit, in normal form."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from .numbers import FIGURES, SCALE_WORDS
from .text import FUNCTION_WORDS, TEXT_COMMAND, TEXT_GROUP, words_of

_F = Fraction
_UNIT_TABLE: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, entries: dict[str, Fraction | int]) -> None:
    for names, scale in entries.items():
        for name in names.split():
            _UNIT_TABLE[name.replace("_", " ")] = (dimension, Fraction(scale))


_define(
    "length",
    {
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
        "cm centimeter centimetre": _F(1, 100),
        "mm millimeter millimetre": _F(1, 1000),
        "nm nanometer": _F(1, 10**9),
        "µm μm micrometer micron": _F(1, 10**6),
        "in inch inches": _F(254, 10**4),
        "ft foot feet": _F(3048, 10**4),
        "yd yard": _F(9144, 10**4),
        "mi mile": _F(1609344, 1000),
    },
)
_define(
    "mass",
    {
        "g gram gramme gm": 1,
        "kg kilogram kilo": 1000,
        "mg milligram": _F(1, 1000),
        "lb lbs pound": _F(45359237, 10**5),
        "oz ounce": _F(45359237, 1600000),
        "tonne": 10**6,
    },
)
_define(
    "time",
    {
        "s sec second": 1,
        "ms millisecond": _F(1, 1000),
        "min minute": 60,
        "h hr hour": 3600,
        "day": 86400,
        "week": 604800,
    },
)
_define("calendar", {"month": 1, "year yr": 12})
_define("usd", {"$ usd dollar us$ buck": 1, "cent ¢ penny pennies": _F(1, 100)})
_define("eur", {"€ euro eur": 1})
_define("gbp", {"£ gbp": 1})
_define("yen", {"¥ yen jpy": 1})
_define("inr", {"₹ rs rs. rupee inr": 1})
_define("angle", {"° deg degree": 1})
_define("radian", {"rad radian": 1})
_define("celsius", {"°c degree_celsius degrees_celsius celsius": 1})
_define("fahrenheit", {"°f degree_fahrenheit degrees_fahrenheit fahrenheit": 1})
_define(
    "volume",
    {
        "l liter litre": 1,
        "ml milliliter millilitre": _F(1, 1000),
        "gal gallon": _F(3785411784, 10**9),
        "cc": _F(1, 1000),
    },
)
for _name, _scale in {"j joule": 1, "kj kilojoule": 1000}.items():
    _define("energy", {_name: _scale})
_define("power", {"w watt": 1, "kw kilowatt": 1000})
_define("force", {"n newton": 1, "kn kilonewton": 1000})
_define("voltage", {"v volt": 1})
_define("current", {"ampere amp": 1})
_define("frequency", {"hz hertz": 1, "khz kilohertz": 1000, "mhz megahertz": 10**6})
_define("pressure", {"pa pascal": 1, "kpa kilopascal": 1000})
_define("amount", {"mol mole": 1})
_define("resistance", {"ohm \\omega": 1})
_define("count", {"unit": 1})

_ONE_LETTER = frozenset("msghljwnv")
_NOT_UNITS = frozenset(
    words_of(
        "is are was were because since as and or not nor times plus minus over divided than if "
        "but when so then to mod choose "
        "squared cubed equals equal by with without where which that this have has had neither "
        "either maybe all none both the a "
        "an from into for at only half twice solution solutions answer approximately about times pi"
    )
) | (FUNCTION_WORDS - {"min"})
_TRAILING_ADJECTIVES = frozenset(
    [
        "long",
        "tall",
        "high",
        "wide",
        "deep",
        "away",
        "old",
        "total",
        "altogether",
        "each",
        "left",
        "remaining",
        "apart",
        "exactly",
        "only",
    ]
)


def _singular(word: str) -> str:
    for ending, replacement in (
        ("ies", "y"),
        ("sses", "ss"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("xes", "x"),
        ("ss", "ss"),
        ("us", "us"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + replacement
    return word


def _known(word: str) -> tuple[str, Fraction] | None:
    word = word.strip()
    if word in ("K", "A", "C", "F", "M", "G"):  # letters that units in lower case do not mean
        return None
    lower = word.lower()
    return _UNIT_TABLE.get(lower) or (
        _UNIT_TABLE.get(_singular(lower)) if len(lower) > 3 or lower in ("kms", "cms") else None
    )


def unit(text: str) -> tuple[Any, ...] | None:
    """A unit in normal form, or None.

    Known: ("known", ((dimension, power), ...), scale). Others: ("noun", head, phrase).
    """
    text = TEXT_GROUP.sub(r" \1 ", text)
    text = re.sub(r"\^\s?\{\s?(-?[0-9])\s?\}", r"^\1", text)
    text = " ".join(
        text.replace("\\$", "$")
        .replace("\\cdot", "*")
        .replace("\\ ", " ")
        .replace("{", " ")
        .replace("}", " ")
        .split()
    ).strip(" .,")
    text = re.sub(r"\s*\^\s*(?=-?[0-9])", "^", text)
    if not text or len(text) > 80:
        return None
    if text in (
        "%",
        "percent",
        "per cent",
        "percentage",
        "pct",
        "percentage points",
        "percentage point",
    ):
        return ("%",)
    known = _known_unit(text)
    if known is not None:
        return known
    words = list(text.split())
    if any(not re.fullmatch(r"[A-Za-z][A-Za-z'-]*\.?", w) for w in words) or len(words) > 6:
        return None
    lowered = [w.lower().strip(".") for w in words]
    while len(lowered) > 1 and (
        lowered[-1] in _TRAILING_ADJECTIVES or lowered[-2:] == ["in", "total"]
    ):
        lowered = lowered[:-1] if lowered[-1] in _TRAILING_ADJECTIVES else lowered[:-2]
        known = _known_unit(" ".join(lowered))
        if known is not None:
            return known
    if lowered[-1:] and lowered[-1] == "total" and len(lowered) > 1 and lowered[-2] == "in":
        lowered = lowered[:-2]
    if any(w in _NOT_UNITS for w in lowered[:1]) or any(
        w in _NOT_UNITS - {"the", "a", "an", "for", "with", "from", "at", "by", "to"}
        for w in lowered
    ):
        return None
    if len(lowered[0]) < 3 and len(lowered) == 1:
        return None
    head = lowered[: lowered.index("of")] if "of" in lowered[1:] else lowered
    return ("noun", _singular(head[-1]), tuple(_singular(w) for w in lowered))


def _known_unit(text: str) -> tuple[Any, ...] | None:
    lowered = text.lower()
    if lowered in ("mph", "miles per hour"):
        text = "mile/h"
    elif lowered in ("kmh", "kph", "kmph"):
        text = "km/h"
    text = re.sub(r"\bmiles per hour\b", "mile/h", text)
    if lowered in (
        "degrees celsius",
        "degree celsius",
        "degrees c",
        "degrees centigrade",
        "° c",
        "°c",
    ):
        return ("known", (("celsius", 1),), Fraction(1))
    if lowered in ("degrees fahrenheit", "degree fahrenheit", "degrees f", "° f", "°f"):
        return ("known", (("fahrenheit", 1),), Fraction(1))
    text = re.sub(r"\b(?:square|sq\.?)\s+([A-Za-z]+)", r"\1^2", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)", r"\1^3", text, flags=re.IGNORECASE)
    text = re.sub(r"([A-Za-z]+)\s+squared\b", r"\1^2", text, flags=re.IGNORECASE)
    text = re.sub(r"([A-Za-z]+)\s+cubed\b", r"\1^3", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+per\s+", "/", text)
    powers: dict[str, int] = {}
    scale = Fraction(1)
    sign = 1
    for part in re.split(r"(\s*/\s*)", text):
        if part.strip() == "/":
            sign = -1
            continue
        for factor in re.split(r"[*·]", part):
            m = re.fullmatch(r"\s*(.+?)(?:\^(-?[0-9]))?\s*", factor)
            if m is None:
                return None
            entry = _known(m[1]) or (_known(m[1].rstrip(".")) if m[1].endswith(".") else None)
            if entry is None:
                return None
            dimension, size = entry
            power = sign * int(m[2] or 1)
            if dimension == "volume":
                dimension, size, power = "length", size / 1000, 3 * power
                scale *= size ** (power // 3)
            else:
                scale *= size**power
            powers[dimension] = powers.get(dimension, 0) + power
    return ("known", tuple(sorted((k, v) for k, v in powers.items() if v)), scale)


def _one_letter_ok(text: str, spaced: bool) -> bool:
    """A single letter is a unit only apart from the number or as upright text; "5x" is a
    product."""
    bare = text.strip(" .")
    return not (len(bare) == 1 and bare.isalpha()) or (
        (spaced or "\\" in text) and bare in _ONE_LETTER | {"L", "W", "N", "V", "J"}
    )


_CURRENCY = re.compile(
    r"^([-+]?)\s*(?:(?:US)?\\?\$|\\text\{\\\$\}|€|£|¥|₹|\\pounds|\\euro(?:\{\})?|(?:USD|EUR|GBP"
    r"|Rs\.?)(?=[\s0-9]))\s*([-+]?)(?=\s*[0-9.(\\])"
)
_LITERAL = re.compile(
    r"[-+]?\s*(?:\\frac\s?\{\s*[0-9]+\s*\}\s?\{\s*[0-9]+\s*\}"
    r"|" + FIGURES + r"(?:[eE][-+]?[0-9]{1,5}(?![0-9A-Za-z]))?"
    r"(?:\s?\\frac\s?\{\s*[0-9]+\s*\}\s?\{\s*[0-9]+\s*\}|\s[0-9]+/[0-9]+|/[0-9]+)?"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*[-+]?[0-9]+\s*\}|[-+]?[0-9]+))?)"
)
_TAIL_TEXT = re.compile(
    r"(?:\s*/?\s*" + TEXT_COMMAND + r"\s?\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?)+$"
)


def split_unit(text: str) -> tuple[str, tuple[Any, ...] | None]:
    """(value, unit) of a cleaned text; the unit is None without one."""
    currency = _CURRENCY.match(text)
    if currency:
        sign = currency[1] or currency[2]
        mark = re.sub(r"[-+\s]|\\text|[{}]", "", currency.group()).replace("\\$", "$")
        mark = {"\\pounds": "£", "\\euro": "€", "US$": "$"}.get(mark, mark)
        value, other = split_unit(sign + text[currency.end() :].strip())
        money = unit(mark)
        return value, money if other is None or other == money else ("noun", "?", ("?",))
    if text.endswith("%") and len(text) > 1:
        return text[:-1].strip(), ("%",)
    if text.endswith("°") and len(text) > 1:
        return text[:-1].strip(), unit("°")
    literal = _LITERAL.match(text)
    if literal and literal.end() < len(text):
        rest = text[literal.end() :]
        in_brackets = re.fullmatch(r"\s*(?:\(([^()]{1,30})\)|\[([^\[\]]{1,30})\])", rest)
        if in_brackets and unit(in_brackets[1] or in_brackets[2]) is not None:
            return literal.group().strip(), unit(in_brackets[1] or in_brackets[2])
        spaced = (
            rest[:1].isspace()
            or rest.startswith("\\text")
            or rest.startswith("\\math")
            or rest.startswith("-")
        )
        rest = re.sub(r"^-(?=[A-Za-z]{3})", "", rest)
        word = re.match(r"\s*([A-Za-z]+)\b", rest)
        if word and word[1].lower() in SCALE_WORDS:
            value, other = (
                split_unit("0" + rest[word.end() :]) if rest[word.end() :].strip() else ("0", None)
            )
            if value == "0":
                return f"({literal.group()})*{SCALE_WORDS[word[1].lower()]}", other
        measure = unit(rest)
        if (
            measure is not None
            and _one_letter_ok(rest, spaced)
            and (spaced or measure[0] != "noun")
        ):
            return literal.group().strip(), measure
    tail = _TAIL_TEXT.search(text) if "\\" in text else None
    if tail and tail.start() > 0:
        measure = unit(tail.group())
        if measure is not None:
            return text[: tail.start()].strip(), measure
    words = text.split(" ")
    for count in (3, 2, 1):
        if len(words) > count:
            last = " ".join(words[-count:])
            ends_a_value = re.search(r"[0-9)}\]]$|\\pi$", " ".join(words[:-count]))
            if (
                ends_a_value
                and (measure := unit(last)) is not None
                and measure[0] == "known"
                and _one_letter_ok(last, True)
            ):
                return " ".join(words[:-count]), measure
    return text, None
