"""Reading answers as people write them: numbers, units, choices, lists.

Pure Python, no imports beyond the standard library.

`read` makes a tree of an answer, `same` compares two trees. What is no plain form is left as LaTeX
to a judge (math-verify in the worker). The worker loads this file by its path, so it imports
nothing of the package.

Decisions
  Numbers Compared exactly. A decimal with six or more places equals a number that has no finite
              decimal form if it is that number rounded: 0.333333 is 1/3, but 0.333334, 0.33333 and
              (against 1/8) 0.1250001 are wrong. nan equals nothing.
  Units Left out on one side, they do not matter: 10 km/h answers 10. Given on both sides they must
              agree; known units are converted: 5 km is 5000 m, but not 5 m. Money: $5 is 5 dollars
              is 500 cents. Degrees are a unit. Base subscripts too.
  Percent     50% equals 50 (a question for a percentage) and 0.5 (its value); 50 and 0.5 differ.
  Commas 1,000 is a thousand; 1, 000 and (1,000) are two numbers. 100,200 may be either, and is read
  as the other side is. Order Counts in ( ) and [ ]; not in { }, nor in a bare list such as "3 and
  4". "3 or 4" is both, never one of them. Names x = 5 answers 5, but not y = 5. Words before the
  equals sign are a description. Mixed 3 1/2 and 3\\frac{1}{2} are 7/2. 2^10 is 1024, as people mean
  it. Colons      3:15 is a time and equal to no ratio; 1:2 is a ratio, equal to 2:4 and to 1/2.
  42!         Is 42 with an exclamation mark, or the factorial, as the other side needs.
  Words Compared without case, articles and punctuation; letters in another order are another word.

"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MAX_CHARS = 4_000  # longer texts are compared as they stand
MAX_BITS = 40_000  # of a numerator or denominator
Node = tuple[Any, ...]
Judge = Callable[[str, str], bool]


def _words(text: str) -> list[str]:
    return text.split()


FUNCTION_WORDS = frozenset(
    _words(
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp pi sqrt cbrt "
        "abs max min gcd lcm mod det "
        "theta alpha beta gamma delta lambda mu sigma phi omega rho tau epsilon inf infinity lim "
        "int sum prod floor ceil and or "
        "dx dy dt"
    )
)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
_SYMBOLS = {
    "−": "-", "‐": "-", "‑": "-", "﹣": "-", "–": "-", "—": "-", "×": "\\times ", "✕": "\\times ",
    "⋅": "\\cdot ", "·": "\\cdot ",
    "∙": "\\cdot ", "•": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ", "∞": "\\infty ",
    "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ",
    "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≃": "\\approx ", "±": "\\pm ", "∓": "\\mp ",
    "∪": "\\cup ", "∩": "\\cap ",
    "∅": "\\emptyset ", "∈": "\\in ", "º": "°", "˚": "°", "′": "'", "’": "'", "‘": "'", "“": '"',
    "”": '"', "θ": "\\theta ",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "λ": "\\lambda ",
    "σ": "\\sigma ", "φ": "\\phi ",
    "ω": "\\omega ", "ρ": "\\rho ", "τ": "\\tau ", "Δ": "\\Delta ", "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}",
    "\u00a0": " ", "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "", "…": "...",
    "。": ".", "，": ",", "、": ", ", "；": ";", "：": ":",
    "✓": "", "✔": "", "✅": "", "☑": "", "\ufe0f": "", "∛": "\\sqrt[3]",
}  # fmt: skip
_SPACES = re.compile(
    r"(?<!\\)\\[,;:!>](?![A-Za-z])|~|(?<!\\)\\ |\{\}"
    r"|\\(?:quad|qquad|thinspace|enspace|displaystyle|textstyle|limits|mleft|mright|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])"
)
_COMMANDS = [
    (re.compile(r"\\(?:left|right)(?![A-Za-z])\s*\.?"), ""),
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (
        re.compile(
            r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?"
            r"|\\(?:degree|textdegree)(?![A-Za-z])"
        ),
        "°",
    ),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*([0-9]+|[A-Za-z])"), r"\\sqrt{\1}"),
]  # fmt: skip
_TEXT = (
    r"\\(?:text|textbf|textit|textrm|textsf|textnormal|texttt|mathrm|mathbf|mathit|mathsf|mbox|hbox|rm|bf|operatorname|emph|underline"
    r"|boldsymbol|bm)"
)
_TEXT_GROUP = re.compile(_TEXT + r"\s?\{([^{}]*)\}")
_WRAPPER = re.compile(r"(?:" + _TEXT + r"|\\(?:boxed|fbox|displaystyle))\s?\{")
_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ('"', '"'),
    ("*", "*"),
)


# --- cleaning -------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """One line of LaTeX or plain text without wrappers, emphasis, spacing commands and trailing
    punctuation."""
    text = _characters(text).strip()
    for _ in range(12):
        before = text
        text = re.sub(r"(?<=[^\s.])\.$|(?<=\S)[;:?,]$|\s[.,]$", "", text).strip()
        text = text.removesuffix("\\\\").strip()
        for left, right in _DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and left not in inner
                and right not in inner
            ):
                text = inner.strip()
                break
        wrapper = _WRAPPER.match(text)
        if wrapper and _closing(text, wrapper.end() - 1) == len(text) - 1:
            text = text[wrapper.end() : -1].strip()
        elif (
            wrapper is None
            and text.startswith("{")
            and _closing(text, 0) == len(text) - 1
            and "," not in text
        ):
            text = text[1:-1].strip()  # a LaTeX group; "{1, 2}" is a set
        if text == before:
            break
    text = _SPACES.sub(" ", re.sub(r"(?<!\\)\\!\s*", "", text))
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    # Delimiters inside: "$x$ = $5$". A dollar before a figure alone is money.
    text = re.sub(r"\\[()]", " ", text)
    if text.count("$") - text.count("\\$") >= 2 and (text.count("$") - text.count("\\$")) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    return " ".join(text.split())


def _characters(text: str) -> str:
    if text.isascii():
        return text
    out: list[str] = []
    for i, c in enumerate(text):
        previous = text[i - 1] if i else ""
        if c in _SUPERSCRIPTS:
            opened = previous in _SUPERSCRIPTS
            closes = i + 1 == len(text) or text[i + 1] not in _SUPERSCRIPTS
            out.append(("" if opened else "^{") + _SUPERSCRIPTS[c] + ("}" if closes else ""))
        elif c in _SUBSCRIPTS:
            opened = previous in _SUBSCRIPTS
            closes = i + 1 == len(text) or text[i + 1] not in _SUBSCRIPTS
            out.append(("" if opened else "_{") + _SUBSCRIPTS[c] + ("}" if closes else ""))
        elif c == "√":
            out.append("\\sqrt ")
        elif c in _SYMBOLS:
            out.append(_SYMBOLS[c])
        elif unicodedata.category(c) == "No" and "⁄" in unicodedata.normalize("NFKC", c):
            over, under = unicodedata.normalize("NFKC", c).split("⁄")
            out.append(
                f" {over}/{under}" if previous.isdigit() else f"{over}/{under or 1}" if over else c
            )
        elif unicodedata.category(c) == "Nd":
            out.append(str(unicodedata.decimal(c)))
        elif "\uff01" <= c <= "\uff5e":
            out.append(chr(ord(c) - 0xFEE0))
        else:
            out.append(c)
    text = "".join(out)
    return re.sub(r"\\sqrt (?=\s*(?:[0-9.]+|\())", "\\\\sqrt", _roots(text))


def _roots(text: str) -> str:
    """`\\sqrt 51` and `\\sqrt(x+1)` as `\\sqrt{51}` and `\\sqrt{x+1}`."""
    out, i = [], 0
    for m in re.finditer(r"\\sqrt(\[3\])?\s{0,2}(?=[0-9(A-Za-z\\])", text):
        if m.start() < i:
            continue
        out.append(text[i : m.start()] + "\\sqrt" + (m[1] or ""))
        i = m.end()
        figure = re.compile(r"[0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+").match(text, i)
        if figure:
            out.append("{" + figure.group() + "}")
            i = figure.end()
        elif text[i] == "(" and (end := _closing(text, i)) > 0:
            out.append("{" + text[i + 1 : end] + "}")
            i = end + 1
    return "".join(out) + text[i:]


_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes, -1 if nowhere."""
    return _pairs(text, text[start]).get(start, -1)


@functools.lru_cache(maxsize=8)
def _pairs(text: str, opening: str) -> dict[int, int]:
    """Where each bracket of one kind closes.

    Escaped braces are brackets of their own. One pass, however deep they are.
    """
    opened: list[int] = []
    found: dict[int, int] = {}
    skip = False
    for i, c in enumerate(text):
        if skip or c == "\\":
            skip = not skip
        elif c == opening:
            opened.append(i)
        elif c == _PAIRS[opening] and opened:
            found[opened.pop()] = i
    return found


def balanced(text: str) -> bool:
    """Whether every bracket is closed, with intervals such as [1, 2) allowed."""
    return text.count("(") + text.count("[") == text.count(")") + text.count("]") and text.count(
        "{"
    ) == text.count("}")


def _top_level(text: str) -> list[bool]:
    """For each character, whether it stands outside all brackets, environments and bars."""
    flags, depth, environment, i = [], 0, 0, 0
    while i < len(text):
        if text[i] == "\\":
            step = 2
            if text.startswith("\\begin", i):
                environment += 1
            elif text.startswith("\\end", i):
                environment = max(0, environment - 1)
            elif text[i + 1 : i + 2] == "{":
                depth += 1
            elif text[i + 1 : i + 2] == "}":
                depth = max(0, depth - 1)
            flags += [depth == 0 and environment == 0] * min(step, len(text) - i)
            i += step
            continue
        if text[i] in "([{":
            depth += 1
        flags.append(depth == 0 and environment == 0)
        if text[i] in ")]}":
            depth = max(0, depth - 1)
        i += 1
    return flags


# --- numbers --------------------------------------------------------------------------------------

_FIGURES = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_TOKEN = re.compile(
    r"\s*(?:(?P<number>" + _FIGURES + r")(?:[eE](?P<exponent>[-+]?[0-9]{1,5})(?![0-9.A-Za-z]))?"
    r"|(?P<frac>\\frac\s*(?=\{))|(?P<times>\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|\*\*?)|(?P<op>[-+/^(){}]))"
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

    def whole(self) -> Fraction:
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
        return _bounded(_Rational(text).whole())
    except _Unreadable:
        return None


def _decimals(text: str) -> int | None:
    """How many decimal places a plain decimal number shows; None for every other form."""
    m = re.fullmatch(r"[-+]?[0-9,]*\.([0-9]+)", text.strip())
    return len(m[1]) if m else None


def _terminates(value: Fraction) -> bool:
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


# --- units ----------------------------------------------------------------------------------------

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
    _words(
        "is are was were because since as and or not nor times plus minus over divided than if "
        "but when so then to mod choose "
        "squared cubed equals equal by with without where which that this have has had neither "
        "either maybe all none both the a "
        "an from into for at only half twice solution solutions answer approximately about times pi"
    )
) | (FUNCTION_WORDS - {"min"})
_SCALE_WORDS = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
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
    text = _TEXT_GROUP.sub(r" \1 ", text)
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
            found = _known(m[1]) or (_known(m[1].rstrip(".")) if m[1].endswith(".") else None)
            if found is None:
                return None
            dimension, size = found
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
    r"^([-+]?)\s*(?:(?:US)?\\?\$|\\text\{\\\$\}|€|£|¥|₹|\\pounds|\\euro(?:\{\})?|(?:USD|EUR|GBP|Rs\.?)(?=[\s0-9]))\s*([-+]?)(?=\s*[0-9.(\\])"
)
_LITERAL = re.compile(
    r"[-+]?\s*(?:\\frac\s?\{\s*[0-9]+\s*\}\s?\{\s*[0-9]+\s*\}"
    r"|" + _FIGURES + r"(?:[eE][-+]?[0-9]{1,5}(?![0-9A-Za-z]))?"
    r"(?:\s?\\frac\s?\{\s*[0-9]+\s*\}\s?\{\s*[0-9]+\s*\}|\s[0-9]+/[0-9]+|/[0-9]+)?"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*[-+]?[0-9]+\s*\}|[-+]?[0-9]+))?)"
)
_TAIL_TEXT = re.compile(
    r"(?:\s*/?\s*" + _TEXT + r"\s?\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?)+$"
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
        if word and word[1].lower() in _SCALE_WORDS:
            value, other = (
                split_unit("0" + rest[word.end() :]) if rest[word.end() :].strip() else ("0", None)
            )
            if value == "0":
                return f"({literal.group()})*{_SCALE_WORDS[word[1].lower()]}", other
        found = unit(rest)
        if found is not None and _one_letter_ok(rest, spaced) and (spaced or found[0] != "noun"):
            return literal.group().strip(), found
    tail = _TAIL_TEXT.search(text) if "\\" in text else None
    if tail and tail.start() > 0:
        found = unit(tail.group())
        if found is not None:
            return text[: tail.start()].strip(), found
    words = text.split(" ")
    for count in (3, 2, 1):
        if len(words) > count:
            last = " ".join(words[-count:])
            ends_a_value = re.search(r"[0-9)}\]]$|\\pi$", " ".join(words[:-count]))
            if (
                ends_a_value
                and (found := unit(last)) is not None
                and found[0] == "known"
                and _one_letter_ok(last, True)
            ):
                return " ".join(words[:-count]), found
    return text, None


# --- reading --------------------------------------------------------------------------------------

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
_TEXT_CHOICE = re.compile(_TEXT + r"\s?\{\s*(\([A-Za-z]\)|[A-J][.):])\s*\}")
_BASE = re.compile(r"([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)_\{?\s*([0-9]{1,2}|\\text\{[a-z]+\})\s*\}?")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]{1,12}|[A-Z]{1,4})(?:_(?:\{[^{}]{1,12}\}|[A-Za-z0-9]))?'*(?:\s?\([A-Za-z0-9,\s\\]{1,20}\))?|\\angle\s?[A-Z]{1,3}|\([A-Za-z](?:\s?,\s?[A-Za-z])+\)"
)
_RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|subset|in|notin|equiv|sim)(?![A-Za-z])|[<>]")
_SEPARATOR = re.compile(
    r",|;|\s(?:and|or|And|Or)\s|\\text\s?\{\s*,?\s*(?:and|or)\s*\}|\\(?:lor|land|vee|wedge)(?![A-Za-z])"
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
    """The tree of an answer. See the top of this module; `same` compares two."""
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
    if _NAN.fullmatch(text) or _NAN_PART.search(text):
        return ("nan",)
    if _NOTHING.fullmatch(text):
        return ("list", "{}", ())
    infinity = _INFINITY.fullmatch(text)
    if infinity:
        return ("inf", "-" if infinity[1] == "-" else "+")
    clock = _TIME.fullmatch(text)
    if clock and int(clock[1]) < 25 and int(clock[2]) < 60 and (len(clock[2]) == 2):
        return _clock(int(clock[1]), int(clock[2]), int(clock[3] or 0), clock[4])
    hour = _HOUR.fullmatch(text)
    if hour and 0 < int(hour[1]) < 13:
        return _clock(int(hour[1]), 0, 0, hour[2])
    if _RATIO.fullmatch(text):
        terms = [rational(p) for p in re.split(r":|\\colon", text)]
        parts = [p for p in terms if p is not None]
        if len(parts) == len(terms) and any(parts):
            whole = next(p for p in parts if p)
            return (
                "ratio",
                tuple(p / whole for p in parts),
                parts[0] / parts[1] if len(parts) == 2 and parts[1] else None,
            )
    upright = _TEXT_CHOICE.match(text)
    if upright:
        text = f"{upright[1]} {text[upright.end() :].strip()}".strip()
    letter = _LETTER.fullmatch(text)
    if letter:
        return ("word", letter[1].lower())
    choice = _CHOICE.fullmatch(text)
    if choice and not re.fullmatch(r"[A-Za-z][.):]\s*[A-Za-z]", text):
        mark, rest = next((choice[i], choice[i + 1]) for i in (1, 3, 5) if choice[i])
        return ("choice", mark.lower(), read(rest, depth + 1))
    base = _BASE.fullmatch(text)
    if base and base[2] not in ("", None):
        return ("base", base[1].lower().lstrip("0") or "0", re.sub(r"\\text|[{}]", "", base[2]))
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [r for r in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if r.strip()]
        return ("matrix", tuple(tuple(read(c, depth + 1) for c in r.split("&")) for r in rows))
    top = _top_level(text)
    several = _split(text, top, _SEPARATOR, keep_thousands=True)
    if len(several) > 1 and all(p.strip() for p in several):
        return _listed(several, depth)
    union = _split(text, top, re.compile(r"\\cup(?![A-Za-z])|\sU\s"), keep_thousands=False)
    if len(union) > 1 and all(p.strip() for p in union):
        return ("list", "union", tuple(read(p, depth + 1) for p in union))
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    if text.count("\\pm") == 1 and "=" not in text:
        plus, minus = (
            text.replace("\\pm", s).strip().removeprefix("+").strip() for s in ("+", "-")
        )
        return ("list", "", (read(plus, depth + 1), read(minus, depth + 1)))
    equation = _equation(text, depth)
    if equation is not None:
        return equation
    value, found = split_unit(text)
    number = rational(value)
    if number is not None:
        return ("num", number, found, _decimals(value))
    plain_text = _TEXT_GROUP.sub(r"\1", text)
    words = re.sub(
        r"^(?:the|an|a)\s+(?=\S)", "", " ".join(plain_text.lower().replace("'", "").split())
    )
    count = _number_in_words(words)
    if count is not None:
        return ("num", Fraction(count), None, None)
    if _are_words(words):
        return ("word", words.strip(" .,!?"))
    return ("tex", value if found else text, found)


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


_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def _number_in_words(text: str) -> int | None:
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
            total, part, last = (total + part) * _SCALE_WORDS[token], 0, 10**6
        else:
            return None
    return total + part


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
    top = _top_level(inner)
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
    top = _top_level(text)
    if _RELATION.search(text):
        return None
    parts = [
        p.strip()
        for p in _split(text, top, re.compile(r"=|\\approx(?![A-Za-z])"), keep_thousands=False)
    ]
    if len(parts) < 2 or not all(parts) or "==" in text:
        if text.startswith(("=", "\\approx")) and len(parts) == 2:
            return read(parts[1], depth + 1)
        return None
    plain_name = _TEXT_GROUP.sub(r"\1", parts[0]).strip()
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
    found: list[Node] = []
    if len(text) > MAX_CHARS:
        return found
    cleaned = clean(text)
    if cleaned.endswith("!") and len(cleaned) > 1:
        found.append(("tex", cleaned, None))
    if re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", cleaned):
        found.append(
            ("list", "", tuple(("num", Fraction(int(p)), None, None) for p in cleaned.split(",")))
        )
    if re.fullmatch(r"-?0,[0-9]+", cleaned):
        found.append(("num", Fraction(cleaned.replace(",", ".")), None, None))
    return found


# --- comparing ------------------------------------------------------------------------------------


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
    if kinds == ("num", "num"):
        return _same_numbers(a, b)
    if kinds == ("inf", "inf"):
        return a == b
    if kinds == ("time", "time"):
        return a[1] == b[1] or ((a[1] - b[1]) % 43200 == 0 and not (a[2] and b[2]))
    if kinds == ("ratio", "ratio"):
        return a[1] == b[1]
    if kinds == ("num", "ratio"):
        return a[2] is None and b[2] is not None and a[1] == b[2]
    if kinds == ("base", "base"):
        return a[1:] == b[1:]
    if kinds == ("base", "num"):
        return b[2] is None and b[1].denominator == 1 and str(b[1]) == a[1]
    if "choice" in kinds:
        if kinds == ("choice", "choice"):
            return a[1] == b[1]
        node, other = (a, b) if a[0] == "choice" else (b, a)
        return ("word", node[1]) == other or same(node[2], other, judge)
    if "assign" in kinds:
        if kinds == ("assign", "assign"):
            return a[1] == b[1] and same(a[2], b[2], judge)
        node, other = (a, b) if a[0] == "assign" else (b, a)
        if other[0] == "tex" and _is_relation(other[1]):
            return node[2][0] in ("num", "tex") and judge(
                *sorted((f"{node[1]}={latex(node[2])}", prepared(other[1])))
            )
        return same(node[2], other, judge)
    if "dict" in kinds:
        if kinds == ("dict", "dict"):
            first, second = dict(a[1]), dict(b[1])
            return first.keys() == second.keys() and all(
                same(first[k], second[k], judge) for k in first
            )
        node, other = (a, b) if a[0] == "dict" else (b, a)
        values = tuple(v for _, v in node[1])
        return other[0] == "list" and other[1] in ("", "()") and _in_order(values, other[2], judge)
    if "list" in kinds:
        if kinds == ("list", "list"):
            return _same_lists(a, b, judge)
        node, other = (a, b) if a[0] == "list" else (b, a)
        if len(node[2]) == 1 and node[1] in ("{}", "[]"):
            return other[0] in ("num", "tex", "word", "assign") and same(node[2][0], other, judge)
        if other[0] == "tex" and node[1] not in ("",):
            return judge(*sorted((latex(node), prepared(other[1]))))
        return False
    if kinds == ("matrix", "matrix"):
        return [len(r) for r in a[1]] == [len(r) for r in b[1]] and all(
            same(x, y, judge)
            for r, s in zip(a[1], b[1], strict=True)
            for x, y in zip(r, s, strict=True)
        )
    if kinds == ("word", "word"):
        return a[1] == b[1] or _product_letters(a[1], b[1])
    if "word" in kinds:
        node, other = (a, b) if a[0] == "word" else (b, a)
        if other[0] != "tex" or len(node[1]) > 3 or not node[1].isalpha():
            return False
        return other[2] is None and judge(*sorted((node[1], prepared(other[1]))))
    if {*kinds} <= {"num", "tex", "inf", "matrix"}:
        if a[0] == "tex" and b[0] == "tex" and a[1] == b[1]:
            return (
                a[2] is None
                or b[2] is None
                or a[2] == b[2]
                or (a[2][0] == b[2][0] == "noun" and _same_nouns(a[2], b[2]))
            )
        return _same_tex(a, b, judge)
    return False


def _same_numbers(a: Node, b: Node) -> bool:
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
            and not _terminates(exact)
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
    _words("no on am ma as at it is of or by be he if in me my us up we do go to so an")
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
    return "=" in text or bool(_RELATION.search(text))


# --- LaTeX for the judge --------------------------------------------------------------------------


def fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def latex(node: Node) -> str:
    """LaTeX of a tree, with its numbers exact.

    A decimal stays one, so that the judge knows how many places it has.
    """
    if node[0] == "num":
        if node[3] is not None:
            sign = "-" if node[1] < 0 else ""
            digits = str(abs(int(node[1] * 10 ** node[3]))).rjust(node[3] + 1, "0")
            return f"{sign}{digits[: -node[3]]}.{digits[-node[3] :]}"
        return fraction(node[1])
    if node[0] == "inf":
        return "-\\infty" if node[1] == "-" else "\\infty"
    if node[0] == "list":
        inner = ",".join(latex(n) for n in node[2])
        if node[1] == "union":
            return "\\cup ".join(latex(n) for n in node[2])
        left, right = {"": ("\\{", "\\}"), "{}": ("\\{", "\\}")}.get(
            node[1], (node[1][:1], node[1][1:])
        )
        return f"{left}{inner}{right}"
    if node[0] == "assign":
        return f"{node[1]}={latex(node[2])}"
    if node[0] == "matrix":
        rows = " \\\\ ".join(" & ".join(latex(c) for c in r) for r in node[1])
        return f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"
    return prepared(str(node[1]))


_NAMES = re.compile(
    r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|pi|theta|alpha|beta|gamma|lambda|sigma|omega|phi|infinity)(?![A-Za-z])"
)


def prepared(text: str) -> str:
    """Plain mathematics as LaTeX: pi/2, 2*x**3, sqrt(2), 2^10, 1e-5."""
    text = text.replace("**", "^").replace("*", " \\cdot ")
    text = re.sub(
        r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,5})(?![0-9A-Za-z])",
        r"(\1\\cdot 10^{\2})",
        text,
    )
    text = re.sub(
        r"(?<![\\A-Za-z])(asin|acos|atan)(?![A-Za-z])", lambda m: "\\arc" + m[1][1:], text
    )
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s?", r"\\sqrt", text)
    text = re.sub(r"(?<![\\A-Za-z])cbrt\s?", r"\\sqrt[3]", text)
    text = _arguments(text, "\\sqrt", "{", "}")
    text = _arguments(text, "\\sqrt[3]", "{", "}")
    text = _arguments(text, "abs", "|", "|")
    text = _arguments(text, "exp", "e^{", "}", keep=False)
    text = _NAMES.sub(lambda m: "\\infty " if m[1] == "infinity" else "\\" + m[1] + " ", text)
    text = _arguments(text, "^", "{", "}")
    text = re.sub(r"\^\s?([-+]?[0-9]+(?:\.[0-9]+)?|-[A-Za-z])", r"^{\1}", text)
    text = text.replace("%", "\\%").replace("°", "^{\\circ}")
    return text.strip()


def _arguments(text: str, name: str, left: str, right: str, keep: bool = True) -> str:
    """name(x) as name{x}, for every name with a parenthesis that closes."""
    out, i = [], 0
    while (at := text.find(name + "(", i)) >= 0:
        start = at + len(name)
        end = _closing(text, start)
        if end < 0 or (
            name.isalpha() and at > 0 and (text[at - 1].isalpha() or text[at - 1] == "\\")
        ):
            out.append(text[i : start + 1])
            i = start + 1
            continue
        inner = (
            _arguments(text[start + 1 : end], name, left, right, keep)
            if len(text) < 500
            else text[start + 1 : end]
        )
        out.append(
            text[i:at] + (name if keep and not name.isalpha() else "") + left + inner + right
        )
        i = end + 1
    return "".join(out) + text[i:]


# --- the canonical form ---------------------------------------------------------------------------


def canonical(text: str) -> str:
    """A form that equal answers often share, and that different ones never do."""
    return _form(read(text))


def _without_spaces(text: str) -> str:
    """Spaces stay between figures only: 4 2 is not 42."""
    return re.sub(r"\s+(?![0-9])|(?<![0-9\s])\s+", "", text.strip())


def _form(node: Node) -> str:
    if node[0] == "num":
        if node[2] is not None and node[2][0] == "known":
            dimensions = ".".join(f"{d}{p}" for d, p in node[2][1])
            return f"{node[1] * node[2][2]} {dimensions}"
        mark = "" if node[2] is None else "%" if node[2] == ("%",) else " " + " ".join(node[2][2])
        return f"{node[1]}{mark}"
    if node[0] == "list":
        parts = [_form(n) for n in node[2]]
        if node[1] in ("", "{}", "union"):
            parts = sorted(set(parts) if node[1] == "{}" else parts)
        left, right = {"": ("", ""), "union": ("U", "")}.get(node[1], (node[1][:1], node[1][1:]))
        return left + ", ".join(parts) + right
    if node[0] == "assign":
        return f"{node[1]} = {_form(node[2])}"
    if node[0] == "choice":
        return f"({node[1]}) {_form(node[2])}"
    if node[0] == "dict":
        return ", ".join(sorted(f"{k} = {_form(v)}" for k, v in node[1]))
    if node[0] == "matrix":
        return "[" + "; ".join(", ".join(_form(c) for c in r) for r in node[1]) + "]"
    if node[0] == "ratio":
        return ":".join(map(str, node[1]))
    if node[0] == "tex":
        tail = "" if node[2] is None else " " + str(node[2][1:])
        return _without_spaces(node[1]) + tail
    if node[0] == "time":
        return f"t{node[1]}{'' if node[2] else '?'}"
    if node[0] == "base":
        return f"{node[1]}_{node[2]}"
    if node[0] == "inf":
        return node[1] + "inf"
    return " ".join(map(str, node[1:])) or node[0]
