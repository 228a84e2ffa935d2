"""The canonical form of an answer."""

from __future__ import annotations

import re

from .reading import Node, read


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
