"""Cleaning: one line without wrappers, and which brackets belong together."""

from __future__ import annotations

import functools
import re
import unicodedata

MAX_CHARS = 4_000  # longer texts are compared as they stand


def words_of(text: str) -> list[str]:
    return text.split()


FUNCTION_WORDS = frozenset(
    words_of(
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
    r"|\\(?:quad|qquad|thinspace|enspace|displaystyle|textstyle|limits|mleft|mright|bigl?|bigr"
    r"|Bigl?|Bigr)(?![A-Za-z])"
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
TEXT_COMMAND = (
    r"\\(?:text|textbf|textit|textrm|textsf|textnormal|texttt|mathrm|mathbf|mathit|mathsf|mbox"
    r"|hbox|rm|bf|operatorname|emph|underline"
    r"|boldsymbol|bm)"
)
TEXT_GROUP = re.compile(TEXT_COMMAND + r"\s?\{([^{}]*)\}")
_WRAPPER = re.compile(r"(?:" + TEXT_COMMAND + r"|\\(?:boxed|fbox|displaystyle))\s?\{")
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
        if wrapper and closing(text, wrapper.end() - 1) == len(text) - 1:
            text = text[wrapper.end() : -1].strip()
        elif (
            wrapper is None
            and text.startswith("{")
            and closing(text, 0) == len(text) - 1
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
        elif text[i] == "(" and (end := closing(text, i)) > 0:
            out.append("{" + text[i + 1 : end] + "}")
            i = end + 1
    return "".join(out) + text[i:]


_PAIRS = {"(": ")", "[": "]", "{": "}"}


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes, -1 if nowhere."""
    return _pairs(text, text[start]).get(start, -1)


@functools.lru_cache(maxsize=8)
def _pairs(text: str, opening: str) -> dict[int, int]:
    """Where each bracket of one kind closes.

    Escaped braces are brackets of their own. One pass, however deep they are.
    """
    opened: list[int] = []
    closes: dict[int, int] = {}
    skip = False
    for i, c in enumerate(text):
        if skip or c == "\\":
            skip = not skip
        elif c == opening:
            opened.append(i)
        elif c == _PAIRS[opening] and opened:
            closes[opened.pop()] = i
    return closes


def balanced(text: str) -> bool:
    """Whether every bracket is closed, with intervals such as [1, 2) allowed."""
    return text.count("(") + text.count("[") == text.count(")") + text.count("]") and text.count(
        "{"
    ) == text.count("}")


def top_level(text: str) -> list[bool]:
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
