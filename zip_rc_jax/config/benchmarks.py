"""The benchmarks of an evaluation: names, the table that explains them, and a user's own table."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from zip_rc_jax.config.checks import counts, in_short, require, shown
from zip_rc_jax.config.problems import SourceConfig, made_source
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest

SHIPPED = "the table of benchmarks"
HELDOUT = "heldout"
LARGEST_TABLE = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEYS = ("title", "problems", "instruction", "samples", "tries", "union")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """One benchmark, as its entry in the table says.

    Attributes:
      name: such as "gsm8k"; also the directory of its report.
      title: for tables.
      problems: where its problems come from; () for a union.
      instruction: user turn of a chat, with `{question}` in it; "" keeps `prompt.instruction`.
      samples: samples of a problem in one try; 0 takes `evaluate.samples`.
      tries: how often everything is decoded, with other random numbers.
      union: names of the benchmarks that it joins. Every problem of them counts alike.
    """

    name: str
    title: str = ""
    problems: tuple[SourceConfig, ...] = ()
    instruction: str = ""
    samples: int = 0
    tries: int = 1
    union: tuple[str, ...] = ()


def asked_benchmarks(given: Sequence[Any], table: str = "") -> tuple[BenchmarkConfig, ...]:
    """The benchmarks of `evaluate.benchmarks`, in order. The parts of a union stand before it.

    Args:
      given: names, or objects with `name` and settings that replace those of the table.
      table: a file of the user's; "" for the shipped table alone.

    Raises:
      UsageError: an unknown name or setting, an impossible value, a name that occurs twice, or a
        table that cannot be read.
    """
    entries, found = _tables(table), dict[str, BenchmarkConfig]()
    asked = [_named(item, entries) for item in given]
    names = [name for name, _ in asked]
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(
        not repeated,
        f"evaluate.benchmarks with {', '.join(repeated)} twice",
        "it would be decoded once",
        "name every benchmark once",
    )
    changed = dict(asked)

    def add(name: str, of: str = "") -> None:
        if name in found:
            return
        if name not in entries and name not in changed:
            raise _unknown(name, entries, f"union of {of}: benchmark" if of else "benchmark")
        one = _benchmark(name, {**entries.get(name, {}), **changed.get(name, {})})
        for part in one.union:
            union = (changed.get(part) or entries.get(part) or {}).get("union")
            require(
                not union,
                f"union of benchmark {name!r} with {part!r}",
                "that is a union itself",
                "list the benchmarks that it joins",
            )
            add(part, name)
        found[name] = one

    for name in names:
        add(name)
    return tuple(found.values())


def _named(item: Any, entries: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Name and changed settings of an item of `evaluate.benchmarks`."""
    values = {"name": item} if isinstance(item, str) else item
    require(
        isinstance(values, Mapping) and isinstance(values.get("name"), str),
        f"evaluate.benchmarks with {shown(item)}",
        "it is neither a name nor an object with a name",
        "write for example [gsm8k, {name: math500, tries: 2}]",
    )
    name = values["name"]
    changes = {key: value for key, value in values.items() if key != "name"}
    if name not in entries and "problems" not in changes and "union" not in changes:
        raise _unknown(name, entries, "benchmark")
    problems, known = changes.get("problems"), entries.get(name, {}).get("problems")
    if isinstance(problems, Mapping) and isinstance(known, Mapping):
        changes["problems"] = {**known, **problems}
    return name, changes


def _unknown(name: Any, entries: Mapping[str, Any], what: str) -> UsageError:
    fix = nearest(str(name), list(entries), "known benchmarks are")
    return UsageError(
        f"{what} {shown(name)}",
        "no table names it",
        f"{fix}; add your own with evaluate.benchmark_table",
    )


def _benchmark(name: str, values: Mapping[str, Any]) -> BenchmarkConfig:
    """An entry of the table as settings. Raises UsageError."""
    where = f"benchmark {shown(name)}"
    require(
        bool(_NAME.fullmatch(name)) and name != HELDOUT,
        where,
        "its report is a directory of that name"
        if name != HELDOUT
        else "that is what an evaluation without benchmarks is called",
        "use letters, digits, - and _" if name != HELDOUT else "choose another name",
    )
    for key in values:
        if key not in _KEYS:
            raise UsageError(
                f"{shown(key)} of {where}",
                "no benchmark has this setting",
                nearest(str(key), list(_KEYS), "known settings are"),
            )
    problems, union = values.get("problems", ()), values.get("union", ())
    require(
        bool(problems) != bool(union),
        f"{where} with {'both' if problems else 'neither'} problems and union"
        if problems
        else f"{where} without problems and without union",
        "nothing says what is evaluated" if not problems else "only one of them can be read",
        'give it problems, such as {source: "hf:openai/gsm8k/main", split: test}',
    )
    listed = problems if isinstance(problems, (list, tuple)) else (problems,)
    sources = [made_source(item, f"problems of {where}") for item in listed if item]
    require(
        isinstance(union, (list, tuple)) and all(isinstance(part, str) for part in union),
        f"union of {where}: {shown(union)}",
        "it is no list of names",
        "write for example union: [gsm8k, math500]",
    )
    for key in ("title", "instruction"):
        value = values.get(key, "")
        require(isinstance(value, str), f"{key} of {where}", "it is no text", "write it in quotes")
    instruction = values.get("instruction", "")
    require(
        not instruction or "{question}" in instruction,
        f"instruction of {where}: {shown(instruction)}",
        "it does not contain {question}",
        "write {question} where it belongs",
    )
    for key, least in (("samples", 0), ("tries", 1)):
        value = values.get(key, least)
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole, f"{key} of {where}: {shown(value)}", "it is no whole number", "use one")
        if value or least:
            counts(f"{key} of {where}", value)
    if union:
        for key in ("instruction", "samples", "tries"):
            require(
                key not in values,
                f"{key} of {where}",
                "a union takes what its parts decoded",
                "set it for the parts",
            )
    return BenchmarkConfig(
        name,
        values.get("title") or name,
        tuple(sources),
        instruction,
        values.get("samples", 0),
        values.get("tries", 1),
        tuple(union),
    )


def _tables(path: str) -> dict[str, Mapping[str, Any]]:
    """Name -> settings: the shipped table, then the user's."""
    return {**_shipped(), **(_read_file(path) if path else {})}


@functools.cache
def _shipped() -> dict[str, Mapping[str, Any]]:
    text = importlib.resources.files("zip_rc_jax").joinpath("assets/benchmarks.yaml").read_text()
    return _entries(text, SHIPPED)


def _read_file(path: str) -> dict[str, Mapping[str, Any]]:
    file, where = pathlib.Path(path).expanduser(), f"evaluate.benchmark_table={shown(path)}"
    fix = "give a YAML file in the form of the shipped table, see docs/benchmarks.md"
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST_TABLE + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        raise UsageError(where, f"it cannot be read ({in_short(error)})", fix) from None
    require(len(data) <= LARGEST_TABLE, where, "it has more than a mebibyte", fix)
    return _entries(text, where)


def _entries(text: str, where: str) -> dict[str, Mapping[str, Any]]:
    fix = "write `name: {problems: {source: ...}}`, see docs/benchmarks.md"
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = f"it is not YAML ({in_short(error)})"
        raise UsageError(where, reason, fix) from None
    require(isinstance(found, Mapping), where, "it is no table of benchmarks", fix)
    for name, values in found.items():
        good = isinstance(name, str) and isinstance(values, Mapping)
        require(good, f"{shown(name)} in {where}", "it is no benchmark with settings", fix)
    return dict(found)
