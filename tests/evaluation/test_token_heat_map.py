"""Pictures of a text: everything is in them, in its place, and nothing breaks them."""

from __future__ import annotations

import html.parser
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from zip_rc_jax.evaluation.token_heat_map import (
    COLORS,
    HTML_END,
    HTML_HEAD,
    NUMBER_EVERY,
    cells_of,
    color_of,
    html_section,
    lines_of,
    numbers_under,
    printable,
    svg_picture,
)
from zip_rc_jax.grid import Grid
from zip_rc_jax.predictions import TokenPredictions

SVG = "{http://www.w3.org/2000/svg}"
CONTROLS = ["\x00\x1b[31m", "\ud800", "\u2028", "\t", " a\n"]
HOSTILE = ["<b>&\"'", "]]>", "数学", "🦊", "", "</svg>", "\u0301", *CONTROLS]


def made(pieces, prompt_tokens=0, **changes):
    """Predictions whose numbers are all different."""
    n, grid = len(pieces), Grid((0.0, 1.0), (0, 8, 16))
    values = {
        "token_ids": np.arange(n, dtype=np.int32),
        "p_correct": np.linspace(0, 1, n, dtype=np.float32),
        "remaining": np.arange(n, 0, -1, dtype=np.float32),
        "joint": np.zeros((n, 2, 2), np.float32),
        "logprob": np.full(n, -0.5, np.float32),
    }
    values = values | changes
    return TokenPredictions(pieces=tuple(pieces), prompt_tokens=prompt_tokens, grid=grid, **values)


def test_colors_run_from_red_over_yellow_to_green():
    assert [color_of(p) for p in (0.0, 0.5, 1.0)] == list(COLORS)
    assert color_of(-1e-7) == COLORS[0]
    assert color_of(1 + 1e-7) == COLORS[-1]
    red_share = [color_of(p)[0] / sum(color_of(p)) for p in np.linspace(0, 1, 50)]
    assert red_share == sorted(red_share, reverse=True)
    assert color_of(float("nan")) not in [color_of(p) for p in np.linspace(0, 1, 1001)]


def test_lines_hold_all_tokens_in_order_within_their_columns():
    rng = np.random.default_rng(0)
    pieces = ["x" * int(n) for n in rng.integers(0, 9, 200)] + ["wide" * 20, "\n", "数" * 5]
    cells = cells_of(made(pieces))
    lines = lines_of(cells, 30)
    assert [c.position for c in itertools.chain(*lines)] == list(range(len(pieces)))
    assert all(sum(c.width for c in line) <= 30 or len(line) == 1 for line in lines)
    assert lines[-1][0].text == "数" * 5, "a line break ends a line"
    for line in lines:
        places = list(numbers_under(line))
        columns = [column for column, _ in places]
        assert all(b - a >= NUMBER_EVERY for a, b in itertools.pairwise(columns))
        for column, cell in places:
            assert column == sum(c.width for c in line[: line.index(cell)])


def test_every_piece_can_be_printed_in_one_line():
    for piece in HOSTILE:
        assert "\n" not in printable(piece)
        assert "\x1b" not in printable(piece)
        printable(piece).encode()
    assert printable("a\n\tb") == "a⏎→b"


@pytest.mark.parametrize("prompt_tokens", [0, 3])
def test_a_picture_shows_every_token_with_its_color_and_bar(prompt_tokens):
    read = made([f" w{i}" for i in range(40)], prompt_tokens)
    root = ET.fromstring(svg_picture(read))
    shapes = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    boxes, bars = shapes[::2], shapes[1::2]
    shown = range(read.start, len(read))
    assert len(boxes) == len(bars) == len(shown)
    colors = [color_of(float(p)) for p in read.p_correct[read.start :]]
    assert [b.get("fill") for b in boxes] == ["#{:02x}{:02x}{:02x}".format(*c) for c in colors]
    heights = np.array([float(b.get("height")) for b in bars])
    expected = read.remaining[read.start :] / read.remaining[read.start :].max()
    np.testing.assert_allclose(heights / heights.max(), expected, atol=0.01)
    assert [b.get("x") for b in boxes] == [b.get("x") for b in bars], "a bar lies under its token"
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert [w for w in words if re.fullmatch(r"w[0-9]+", w)] == [f"w{i}" for i in range(40)]
    width, height = float(root.get("width")), float(root.get("height"))
    for shape in root.iter(f"{SVG}rect"):
        if shape.get("x"):
            assert 0 <= float(shape.get("x")) <= width - float(shape.get("width"))
            assert 0 <= float(shape.get("y")) <= height - float(shape.get("height"))


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that does not close the one opened last; collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_no_token_can_break_out_of_a_picture_or_a_page():
    unknown = np.full(len(HOSTILE), np.nan, np.float32)
    for read in (made(HOSTILE), made(HOSTILE, p_correct=unknown, remaining=unknown)):
        root = ET.fromstring(svg_picture(read).encode())
        assert "<b>&\"'" in [text.text for text in root.iter(f"{SVG}text")]
        page = Balanced()
        page.feed(HTML_HEAD + html_section(read, "<i>one</i>") + HTML_END)
        assert page.open == []
        assert "<i>one</i>" in page.text
        assert all(printable(piece) in page.text for piece in HOSTILE if piece)


def test_pictures_load_nothing():
    read = made(["a", " b"])
    for text in (svg_picture(read), HTML_HEAD + html_section(read, "x") + HTML_END):
        found = set(re.findall(r"(?:https?:|src=|href=|url\(|@import|<script)[^\s\"]*", text))
        assert found <= {"http://www.w3.org/2000/svg"}
