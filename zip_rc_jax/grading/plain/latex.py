"""LaTeX of a tree, for the judge."""

from __future__ import annotations

import re
from fractions import Fraction

from .reading import Node
from .text import closing


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
    r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|pi"
    r"|theta|alpha|beta|gamma|lambda|sigma|omega|phi|infinity)(?![A-Za-z])"
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
        end = closing(text, start)
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
