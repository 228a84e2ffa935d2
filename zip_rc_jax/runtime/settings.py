"""Whether what lies on disk was made with the settings of today, and the names that a wrong one is
near to.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from zip_rc_jax.runtime.errors import UsageError

SHOWN = 5  # differences that a message names


def check_same_settings(
    what: str, stored: Any, given: Any, *, fix: str, free: Collection[str] = ()
) -> None:
    """Compares what something on disk was made with and what is wanted now.

    Args:
      what: lies there, for the message.
      stored: nested settings as JSON gave them.
      given: nested settings that JSON can hold.
      fix: what helps where they differ.
      free: dotted names that may differ.

    Raises:
      UsageError: they differ; the message names the first settings that do.
    """
    given = json.loads(json.dumps(given))
    if not isinstance(stored, dict):
        raise UsageError(
            what, f"its settings are a JSON {type(stored).__name__}, not an object", fix
        )
    there, now = dict(_flat(stored)), dict(_flat(given))
    names = [name for name in sorted({*there, *now} - {*free}) if there.get(name) != now.get(name)]
    if names:
        differ = [
            f"{name} was {there.get(name)!r}, now {now.get(name)!r}" for name in names[:SHOWN]
        ]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        raise UsageError(
            what, f"it was made with other settings: {'; '.join([*differ, *more])}", fix
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings. An empty section keeps its name."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nearest(name: str, known: Sequence[str], otherwise: str, most: int = 1) -> str:
    """A fix for a name that nothing reads.

    Args:
      known: the names that are read.
      otherwise: what comes before the list of them, where none is near.
      most: names that are suggested.
    """
    close = difflib.get_close_matches(name, known, n=most)
    return (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"{otherwise} {', '.join(known)}"
    )
