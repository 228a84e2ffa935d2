"""A text coloured by P(correct), with the tokens still to come underneath, as SVG and as HTML.

Both are text, made of `TokenPredictions` alone, and load nothing from anywhere.
"""

from __future__ import annotations

import dataclasses
import html
import math
import unicodedata
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

from zip_rc_jax.predictions import TokenPredictions

# From red through yellow to green, all light enough for black text.
COLORS = ((224, 102, 102), (255, 229, 153), (106, 190, 105))
UNKNOWN = (204, 204, 204)
BAR = "#8fa8d0"
COLUMNS = 76
NUMBER_EVERY = 9  # columns, at least, from one number of tokens to the next
TITLE = "P(correct) after each token, and how many tokens are still to come"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One token as it is shown.

    Attributes:
      position: in the item.
      text: printable; "" for a token that only begins a character.
      width: in columns of a fixed-width font.
      p_correct, remaining: what is predicted after the token; None where nothing is shown.
      note: all numbers of the token, in words.
      ends_line: the token holds a line break.
    """

    position: int
    text: str
    width: int
    p_correct: float | None
    remaining: float | None
    note: str
    ends_line: bool


def cells_of(predictions: TokenPredictions) -> list[Cell]:
    """The tokens of an item. Those of a prompt before `predictions.start` show no prediction."""
    found = []
    for t, piece in enumerate(predictions.pieces):
        text = printable(piece)
        p, remaining = float(predictions.p_correct[t]), float(predictions.remaining[t])
        shown = t >= predictions.start
        note = f"token {t}, id {predictions.token_ids[t]}"
        if shown:
            note += f": P(correct) {p:.3f}, {remaining:.1f} tokens to come"
        if not math.isnan(predictions.logprob[t]):
            note += f", log-probability {predictions.logprob[t]:.3f}"
        found.append(
            Cell(
                position=t,
                text=text,
                width=cell_len(text),
                p_correct=p if shown else None,
                remaining=remaining if shown else None,
                note=note,
                ends_line="\n" in piece,
            )
        )
    return found


def printable(piece: str) -> str:
    """A piece of text in one line: signs stand for line breaks and for what has no shape."""
    return "".join(map(_sign, piece))


def _sign(character: str) -> str:
    if character in "\n\u2028\u2029":
        return "⏎"
    if unicodedata.category(character) not in ("Cc", "Cs", "Co", "Cn"):
        return character
    return {"\r": "", "\t": "→"}.get(character, "\ufffd")


def lines_of(cells: Sequence[Cell], columns: int = COLUMNS) -> list[list[Cell]]:
    """The cells in lines of at most `columns` columns, or of one cell that is wider."""
    lines: list[list[Cell]] = [[]]
    used = 0
    for cell in cells:
        if lines[-1] and used + cell.width > columns:
            lines.append([])
            used = 0
        lines[-1].append(cell)
        used += cell.width
        if cell.ends_line:
            lines.append([])
            used = 0
    return [line for line in lines if line]


def numbers_under(line: Sequence[Cell]) -> Iterator[tuple[int, Cell]]:
    """Where numbers of tokens to come stand under a line: the column, and the cell it is of."""
    column, free = 0, 0
    for cell in line:
        if cell.remaining is not None and cell.width and column >= free:
            yield column, cell
            free = column + NUMBER_EVERY
        column += cell.width


def color_of(p: float) -> tuple[int, int, int]:
    """Red, green and blue for a P(correct) from 0 to 1; grey for NaN."""
    if math.isnan(p):
        return UNKNOWN
    place = min(max(p, 0.0), 1.0) * (len(COLORS) - 1)
    i = min(int(place), len(COLORS) - 2)
    low, high, share = COLORS[i], COLORS[i + 1], place - i
    r, g, b = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return r, g, b


def number_of(remaining: float) -> str:
    """Tokens still to come, as they are shown."""
    return "?" if math.isnan(remaining) else f"{remaining:.0f}"


def svg_picture(predictions: TokenPredictions, title: str = TITLE) -> str:
    """An SVG file with one item: its tokens over P(correct), and bars of the tokens to come."""
    lines = lines_of(cells_of(predictions))
    most = _most([predictions])
    unit, size, margin, bars = 8.4, 14, 16, 26  # pixels of a column, of the font, around, of bars
    width = 2 * margin + unit * max(COLUMNS, *(sum(c.width for c in line) for line in lines))
    y, parts = margin + 20.0, list[str]()
    for line in lines:
        x, column = float(margin), 0
        told = any(cell.remaining is not None for cell in line)
        for cell in line:
            length = cell.width * unit
            if cell.p_correct is not None and cell.width:
                note = f"<title>{html.escape(cell.note)}</title>"
                shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{length:.1f}"'
                parts.append(f'{shape} height="22" fill="{_hex(cell.p_correct)}">{note}</rect>')
                height = _height(cell.remaining, most) * bars
                top = y + 24 + bars - height
                shape = f'<rect x="{x:.1f}" y="{top:.1f}" width="{length - 0.6:.1f}"'
                parts.append(f'{shape} height="{height:.1f}" fill="{BAR}">{note}</rect>')
            body = cell.text.strip(" ")
            if body:
                lead = len(cell.text) - len(cell.text.lstrip(" "))
                kept = cell_len(body) * unit
                ink = "#111" if cell.p_correct is not None else "#777"
                # With a length, the text fits its box in whatever font the reader has.
                fit = f'textLength="{kept:.1f}" lengthAdjust="spacingAndGlyphs"' if kept else ""
                at = f'x="{x + lead * unit:.1f}" y="{y + 16:.1f}"'
                parts.append(f'<text {at} {fit} fill="{ink}">{_xml(body)}</text>')
            x, column = x + length, column + cell.width
        for place, cell in numbers_under(line):
            at = f'x="{margin + place * unit:.1f}" y="{y + 34 + bars:.1f}"'
            number = number_of(cell.remaining or 0.0)
            parts.append(f'<text {at} font-size="10" fill="#46597c">{number}</text>')
        y += 24 + (bars + 16 if told else 4)
    parts += _legend(margin, y + 8, most)
    height = y + 8 + 26 + margin
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-size="{size}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">\n'
        f'<rect width="100%" height="100%" rx="6" fill="#fff"/>\n'
        f'<text x="{margin}" y="{margin + 6}" font-size="12" fill="#444" '
        f'font-family="sans-serif">{_xml(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _legend(x: float, y: float, most: float) -> list[str]:
    """A scale of colors, and what the bars are."""
    steps = 20
    size = f'y="{y:.1f}" width="6.4" height="12"'
    colors = [_hex(i / (steps - 1)) for i in range(steps)]
    boxes = [f'<rect x="{x + 86 + 6 * i:.1f}" {size} fill="{c}"/>' for i, c in enumerate(colors)]
    font = 'font-size="11" fill="#444" font-family="sans-serif"'
    bar = x + 86 + 6 * steps + 36
    told = f"expected tokens still to come (highest bar: {number_of(most)})"
    return [
        f'<text x="{x}" y="{y + 10:.1f}" {font}>P(correct) 0</text>',
        *boxes,
        f'<text x="{x + 90 + 6 * steps:.1f}" y="{y + 10:.1f}" {font}>1</text>',
        f'<rect x="{bar:.1f}" y="{y:.1f}" width="12" height="12" fill="{BAR}"/>',
        f'<text x="{bar + 18:.1f}" y="{y + 10:.1f}" {font}>{told}</text>',
    ]


def _most(items: Sequence[TokenPredictions]) -> float:
    """The largest number of tokens to come that is shown; at least 1."""
    shown = [float(r) for p in items for r in p.remaining[p.start :] if not math.isnan(r)]
    return max([1.0, *shown])


def _height(remaining: float | None, most: float) -> float:
    return 0.0 if remaining is None or math.isnan(remaining) else remaining / most


def _hex(p: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color_of(p))


def _xml(text: str) -> str:
    """Escaped, with spaces that no reader of XML joins."""
    return html.escape(text).replace(" ", "\u00a0")


HTML_HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em;
  color: #222; background: #fff; }}
.text {{ font: 15px/1.3 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
.t {{ display: inline-block; white-space: pre; vertical-align: top; margin-bottom: 8px; }}
.t span {{ display: block; padding: 2px 0; }}
.t i {{ display: block; height: 26px; margin-top: 2px; border-right: 1px solid #fff; }}
.prompt {{ color: #777; }}
.scale {{ display: inline-block; width: 10em; height: 0.8em;
  background: linear-gradient(to right, {", ".join(_hex(p) for p in (0.0, 0.5, 1.0))}); }}
.bar {{ display: inline-block; width: 0.8em; height: 0.8em; background: {BAR}; }}
</style></head><body>
<h1>{TITLE}</h1>
<p>P(correct) 0 <span class="scale"></span> 1 &emsp; <span class="bar"></span> expected tokens
still to come, as far as the highest bar of a text. Point at a token for its numbers.</p>
"""
HTML_END = "</body></html>\n"


def html_section(predictions: TokenPredictions, heading: str) -> str:
    """One item of the page. `HTML_HEAD` comes before the first, `HTML_END` behind the last."""
    most = _most([predictions])
    parts = []
    for cell in cells_of(predictions):
        if not cell.text:
            continue
        text, note = html.escape(cell.text), html.escape(cell.note)
        if cell.p_correct is None:
            parts.append(f'<span class="t prompt" title="{note}"><span>{text}</span></span>')
        else:
            share = 100 * _height(cell.remaining, most)
            bar = f"linear-gradient(to top, {BAR} {share:.0f}%, #fff {share:.0f}%)"
            parts.append(
                f'<span class="t" title="{note}">'
                f'<span style="background:{_hex(cell.p_correct)}">{text}</span>'
                f'<i style="background:{bar}"></i></span>'
            )
        if cell.ends_line:
            parts.append("<br>")
    first, last = predictions.start, len(predictions) - 1
    told = (
        f"P(correct) {predictions.p_correct[first]:.2f} at token {first}, "
        f"{predictions.p_correct[last]:.2f} at token {last}; tokens to come "
        f"{number_of(float(predictions.remaining[first]))} and "
        f"{number_of(float(predictions.remaining[last]))}; "
        f"the highest bar is {number_of(most)}"
    )
    body = f'<div class="text">{"".join(parts)}</div>'
    return f"<section><h2>{html.escape(heading)}</h2>\n<p>{told}.</p>\n{body}</section>\n"
