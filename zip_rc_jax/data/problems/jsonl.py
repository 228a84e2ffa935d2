"""Lines of JSON: one object a line, with errors that name file and line."""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from zip_rc_jax.config.checks import in_short
from zip_rc_jax.runtime.errors import UsageError

T = TypeVar("T")


class Number(str):
    """A JSON number as the file spells it.

    As a float, 0.00001 would become "1e-05", and 1e16 another number.
    """


def parse_object(text: str) -> dict[str, Any]:
    """The object on a line, with numbers as `Number`.

    Raises ValueError for anything else.
    """
    data = json.loads(
        text,
        parse_float=Number,
        parse_int=Number,
        parse_constant=_no_number,
        object_pairs_hook=without_repeats,
    )
    if not isinstance(data, dict):
        raise ValueError(f"it holds {json_kind(data)}, not an object")
    return data


def read_jsonl(
    path: str | pathlib.Path,
    parse: Callable[[str, int], T],
    *,
    kind: str,
    wanted: str,
    example: str,
) -> list[T]:
    """What `parse(line, line number)` makes of every line of a file that is not blank.

    Args:
      parse: raises ValueError for what is wrong with a line.
      kind: what the file holds, for messages, e.g. "problems".
      wanted: the fix where the file is none of these.
      example: the fix where a line is wrong.

    A file whose name ends in .gz is unpacked.

    Raises:
      UsageError: no such file, no lines, or a line that is not UTF-8 or that `parse` refuses; the
        message has its line number.
    """
    path = pathlib.Path(path)
    result: list[T] = []
    try:
        if not path.is_file():
            reason = (
                "it is a directory"
                if path.is_dir()
                else "it is no regular file"
                if path.exists()
                else "there is no such file"
            )
            raise UsageError(f"{kind} {in_brief(path)}", reason, wanted)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = _text_of_line(path, number, line)
                if text.strip():
                    result.append(_parsed(path, number, text, parse, example))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = f"it is no complete gzip file ({in_short(error)})"
        raise UsageError(f"{kind} {in_brief(path)}", reason, "compress it again") from None
    except OSError as error:
        reason = f"it cannot be read ({error.strerror or type(error).__name__})"
        fix = "check the file, its name and its permissions"
        raise UsageError(f"{kind} {in_brief(path)}", reason, fix) from None
    if not result:
        raise UsageError(f"{kind} {in_brief(path)}", f"the file has no {kind}", wanted)
    return result


def in_brief(path: str | pathlib.Path) -> str:
    """A path for a message; a name of thousands of characters is cut."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


# How files begin that are no text, and what unpacks them.
_BINARY = (
    (b"\x1f\x8b", "gzip", "gunzip -c"),
    (b"BZh", "bzip2", "bunzip2 -c"),
    (b"\xfd7zXZ", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"PK\x03\x04", "zip", "unzip -p"),
)


def _text_of_line(path: pathlib.Path, number: int, line: bytes) -> str:
    """Raises `UsageError` with file and line number."""
    where, name = f"{in_brief(path)}, line {number}", in_brief(path.name)
    for begin, kind, command in _BINARY:
        if line.startswith(begin):
            raise UsageError(
                where,
                f"the file is compressed ({kind})",
                f"unpack it: {command} {name} > unpacked.jsonl",
            )
    if line.startswith(b"PAR1"):
        raise UsageError(
            where, "the file is a Parquet table", "write one JSON object a line from it"
        )
    encoding = json.detect_encoding(line).removesuffix("-sig")
    if encoding != "utf-8":
        shown = encoding.upper()
        fix = f"if it is text, convert it: iconv -f {shown} -t UTF-8 {name} > utf8.jsonl"
        raise UsageError(where, f"it is not UTF-8 text, but {shown} or no text at all", fix)
    try:
        # A mark in the middle comes from files that were joined.
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        raise UsageError(
            where,
            reason,
            f"if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {name} > utf8.jsonl",
        ) from None


def _parsed(
    path: pathlib.Path,
    number: int,
    text: str,
    parse: Callable[[str, int], T],
    example: str,
) -> T:
    """Raises `UsageError` with file and line number."""
    where, name = f"{in_brief(path)}, line {number}", in_brief(path.name)
    try:
        return parse(text, number)
    except RecursionError:
        raise UsageError(where, "its JSON is nested too deeply", example) from None
    except ValueError as error:
        if text.lstrip().startswith("["):
            fix = f"write one object a line: jq -c '.[]' {name} > lines.jsonl"
            raise UsageError(
                where, "it begins a JSON array, and the file should have one object a line", fix
            ) from None
        if isinstance(error, json.JSONDecodeError) and not text[error.pos :].strip():
            reason = "its JSON goes on in the next line, or is cut off"
            raise UsageError(where, reason, example) from None
        reason = (
            f"{error.msg} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise UsageError(where, reason[:300], example) from None


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no JSON value and no answer")


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(
            key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1
        )
        raise ValueError(f"it has the key {repeated[:100]!r} twice")
    return found


def json_kind(value: Any) -> str:
    names: dict[type, str] = {
        Number: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
        bool: "true or false",
        type(None): "null",
    }
    return names[type(value)]
