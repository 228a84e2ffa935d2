"""The page: built assets with data inside, one file that loads nothing.

Text of a model is data here: JSON in a script element of a type that no browser runs, with every
`<`, `>` and `&` written as an escape. The script puts it into text nodes alone, and the page's
policy (CSP) lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import functools
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from zip_rc_jax.runtime.storage import plain

VERSION = 1
ASSET = pathlib.Path(__file__).parents[1] / "assets" / "explorer.html"
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page_data(title: str, **parts: Any) -> dict[str, Any]:
    """The data of a page, with nothing in the parts that are not given."""
    empty: dict[str, Any] = {
        "version": VERSION,
        "title": title,
        "unit": "tokens",
        "alphas": [],
        "headline": None,
        "runs": [],
        "problems": [],
        "searches": [],
        "reward_bins": [],
        "length_bins": [],
        "about": [],
        "settings": "",
        "tables": [],
        "images": [],
        "links": [],
        "notes": [],
        "live": None,
    }
    unknown = parts.keys() - empty.keys()
    assert not unknown, unknown
    return empty | parts


def page_text(data: Mapping[str, Any], *, live: bool = False) -> str:
    """The page as one text of HTML.

    Args:
      data: from `page_data`.
      live: whether it may ask the server that it comes from; else it may ask nobody.
    """
    # ASCII alone, so that half of a surrogate pair can be written.
    text = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
    for sign, escape in _ESCAPES.items():
        text = text.replace(sign, escape)
    before, after = _asset()
    head = before.replace("@CONNECT@", "'self'" if live else "'none'")
    # A title may hold what stands for something else, so it comes last.
    return head.replace("@TITLE@", html.escape(_printable(str(data["title"])))) + text + after


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _asset() -> tuple[str, str]:
    before, mark, after = ASSET.read_text(encoding="utf-8").partition("@DATA@")
    assert mark, f"{ASSET} has no place for data; make explorer builds it"
    return before, after


def table_data(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    text_columns: int = 1,
) -> dict[str, Any]:
    """A table of text cells, as the page shows it."""
    cells = [list(row) for row in rows]
    return {
        "title": title,
        "columns": list(columns),
        "rows": cells,
        "note": note,
        "text_columns": text_columns,
    }
