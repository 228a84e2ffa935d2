"""Results of decodes, as the page reads them: searches, problems, and runs to compare."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.explorer.page import page_data
from zip_rc_jax.runtime.errors import UsageError

TREE_KEYS = ("prompt", "prefixes", "trace", "usage", "prefix_id")
RECORD = "decode with `zip-rc decode MODEL --input FILE --output DIRECTORY --introspect`"
MOST_BYTES = 10_000_000
_PREFIX = (
    "id",
    "parent",
    "fork_position",
    "text",
    "state",
    "finish_reason",
    "expected_reward",
    "expected_remaining",
)
_DECISION = (
    "step",
    "prefix_ids",
    "multiplicity",
    "planned_pause_bin",
    "utility",
    "expected_reward",
    "expected_remaining",
    "tokens",
    "finished",
)


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """The results of one decode.

    Attributes:
      name: for people.
      rows: `Result.to_dict()` with `answer`, `correct` and `introspection` where they are known.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...]


def read_results(path: pathlib.Path, name: str) -> ResultFile:
    """What `zip-rc decode --output` wrote, or answers of `zip-rc serve` with their trees.

    Args:
      path: of the JSON lines.
      name: of the run.

    Raises:
      UsageError: it cannot be read, or holds something else.
    """
    rows = []
    for number, value in _lines(path):
        rows += [_checked(path, number, row) for row in _trees(value)]
    if not rows:
        raise UsageError(f"file {path}", "it is empty", f"{RECORD} writes one")
    return ResultFile(name, tuple(rows))


def _lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file, and the number of each one's line."""
    fix = "name a results.jsonl of `zip-rc decode --output`, or the report of an evaluation"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"file {path}", f"it cannot be read ({in_short(error)})", fix) from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f"file {path}, line {number}"
            raise UsageError(where, f"it is no JSON ({in_short(error)})", fix) from None
        yield number, value


def _trees(value: Any) -> list[Any]:
    """The results of a line: itself, or those of an answer of the server."""
    if not isinstance(value, dict) or not isinstance(value.get("choices"), list):
        return [value]
    said = [c.get("zip_rc") for c in value["choices"] if isinstance(c, dict)]
    return [x.get("tree", {}) if isinstance(x, dict) else {} for x in said]


def _checked(path: pathlib.Path, number: int, row: Any) -> Mapping[str, Any]:
    where = f"file {path}, line {number}"
    if not isinstance(row, dict):
        raise UsageError(where, f"{shown(row)} is no result", RECORD)
    missing = [key for key in TREE_KEYS if key not in row]
    if missing:
        reason = f"it holds no search tree (no {', '.join(missing)})"
        fix = f"{RECORD}; a request to `zip-rc serve` asks for it by zip_rc.return_tree"
        raise UsageError(where, reason, fix)
    try:
        search_data(row, 0, 0)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = f"its tree cannot be read ({in_short(error)})"
        raise UsageError(where, reason, RECORD) from None
    return row


def search_data(
    row: Mapping[str, Any], run: int, problem: int, *, tokens: bool = True
) -> dict[str, Any]:
    """One search for the page.

    Args:
      run, problem: places in the lists of the page.
      tokens: whether what the head says after every token is kept.
    """
    told = row.get("introspection") or {}
    along = told.get("prefixes") or [None] * len(row["prefixes"])
    actions = told.get("decisions") or [None] * len(row["trace"])
    prefixes = []
    for prefix, read in zip(row["prefixes"], along, strict=True):
        kept = {name: prefix[name] for name in _PREFIX}
        prefixes.append(
            kept | {"length": len(prefix["token_ids"]), "tokens": read if tokens else None}
        )
    trace = []
    for decision, weighed in zip(row["trace"], actions, strict=True):
        old = {"planned_pause_bin": decision.get("future_bin", -1)}  # its name until 0.2
        kept = {name: (old | dict(decision))[name] for name in _DECISION}
        trace.append(kept | {"actions": weighed})
    usage = {
        name: row["usage"][name] for name in ("prompt_tokens", "tokens", "serial_steps", "seconds")
    }
    return {
        "run": run,
        "problem": problem,
        "prompt": row["prompt"],
        "text": row["text"],
        "prefix_id": row["prefix_id"],
        "finish_reason": row["finish_reason"],
        "expected_reward": row["expected_reward"],
        "error": row.get("error", ""),
        "usage": usage,
        "settings": told.get("settings"),
        "grid": told.get("grid"),
        "root": told.get("root"),
        "prefixes": prefixes,
        "trace": trace,
    }


def results_page(
    title: str, files: Sequence[ResultFile], most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """The data of a page about some decodes of the same problems, or of different ones.

    Problems are the same where their prompts are. What the head says after every token is kept from
    the first search on, as long as the page stays below `most_bytes`; the page says what is left
    out.
    """
    problems: list[dict[str, Any]] = []
    place_of: dict[tuple[str, int], int] = {}
    places: list[list[int]] = []
    for file in files:
        mine, seen = list[int](), dict[str, int]()
        for row in file.rows:
            prompt, answer = row["prompt"], row.get("answer")
            # A prompt that a file has twice is two problems.
            key = prompt, seen.get(prompt, 0)
            seen[prompt] = key[1] + 1
            if key not in place_of:
                place_of[key] = len(problems)
                known = None if answer is None else str(answer)
                problems.append({"prompt": prompt, "answer": known, "level": None})
            mine.append(place_of[key])
        places.append(mine)
    runs = [_run(file, mine, len(problems)) for file, mine in zip(files, places, strict=True)]
    searches, size, left_out = [], 0, 0
    for i, (file, mine) in enumerate(zip(files, places, strict=True)):
        for row, place in zip(file.rows, mine, strict=True):
            one = search_data(row, i, place)
            length = len(json.dumps(one))
            if size + length > most_bytes and any(p["tokens"] for p in one["prefixes"]):
                one = search_data(row, i, place, tokens=False)
                length = len(json.dumps(one))
                left_out += 1
            size += length
            searches.append(one)
    notes = _promises(files)
    if left_out:
        notes.append(
            f"What the head says after every token is left out of {left_out} of {len(searches)} "
            f"searches, so that the page stays small. A larger --most-bytes keeps it."
        )
    alphas = sorted({float(run["alpha"]) for run in runs if run["alpha"] is not None})
    return page_data(
        title,
        alphas=alphas or [0.5],
        runs=runs,
        problems=problems,
        searches=searches,
        notes=notes,
    )


def _promises(files: Sequence[ResultFile]) -> list[str]:
    """What `zip-rc calibrate` promised of the models that decoded."""
    found = dict[str, list[str]]()
    for file in files:
        said = {(row.get("introspection") or {}).get("calibration") for row in file.rows}
        for one in sorted(x for x in said if isinstance(x, str) and x):
            found.setdefault(one, []).append(file.name)
    return [
        one if len(names) == len(files) else f"{', '.join(names)}: {one}"
        for one, names in found.items()
    ]


def _run(file: ResultFile, places: Sequence[int], count: int) -> dict[str, Any]:
    """A run for the page; problems that it does not have are null."""
    settings: Mapping[str, Any] = next(
        (r["introspection"]["settings"] for r in file.rows if r.get("introspection")), {}
    )
    columns: dict[str, list[Any]] = {
        name: [None] * count for name in ("correct", "compute", "latency", "p")
    }
    for row, place in zip(file.rows, places, strict=True):
        columns["correct"][place] = row.get("correct")
        columns["compute"][place] = row["usage"]["tokens"]
        columns["latency"][place] = row["usage"]["serial_steps"]
        columns["p"][place] = row["expected_reward"]
    return {
        "name": file.name,
        "series": file.name,
        "kind": "other",
        "alpha": _price(settings.get("alpha")),
        "beta": _price(settings.get("beta")),
        **columns,
    }


def _price(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
