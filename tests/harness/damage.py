"""Ways in which a file on a disk goes bad: a list of named functions, for tests of whatever reads
files.

A damage takes the path of a file made by the real code and changes it in place. Its `__name__` is
fit for the id of a test:

    @pytest.mark.parametrize("damage", BYTES + JSON_FILE, ids=name_of)
    def test_a_damaged_file_is_refused_or_read_as_it_was(damage, tmp_path):
        path = write_the_real_file(tmp_path)
        damage(path)
        assert refused_or_equal(lambda: read(path), intact, path.name)

The lists: `BYTES` fit every file. `TEXT` are what editors and other systems do to text files.
  `JSON_FILE` put another JSON value
in the place of the whole file, and `json_fields` changes every value inside. `ABSENT` leave no
readable file.
"""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from zip_rc_jax.runtime.errors import UsageError

Damage = Callable[[pathlib.Path], None]

LONGEST_MESSAGE = 1000  # characters of an error: a paragraph


def name_of(damage: Damage) -> str:
    """The id of a test."""
    return damage.__name__


def _named(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """A damage that rewrites the contents."""

    def damage(path: pathlib.Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    damage.__name__ = name
    return damage


def replaced_by(content: bytes, name: str) -> Damage:
    """The whole file is `content`."""
    return _named(name, lambda _: content)


def truncated(share: float) -> Damage:
    """Only the first `share` of the bytes is left, and at least one byte is lost."""
    return _named(
        f"truncated_to_{share:g}", lambda data: data[: min(int(len(data) * share), len(data) - 1)]
    )


def truncated_by(count: int) -> Damage:
    """The last `count` bytes are lost."""
    return _named(f"truncated_by_{count}", lambda data: data[:-count])


def flipped(share: float, bit: int = 0) -> Damage:
    """One bit of the byte at `share` of the file is the other way round."""

    def change(data: bytes) -> bytes:
        at = min(int(len(data) * share), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return _named(f"bit_{bit}_flipped_at_{share:g}", change)


def zeroed(share: float, count: int = 512) -> Damage:
    """A block of `count` bytes from `share` on is zeros, as after a power cut."""

    def change(data: bytes) -> bytes:
        at = int(len(data) * share)
        return data[:at] + bytes(min(count, len(data) - at)) + data[at + count :]

    return _named(f"zeros_from_{share:g}", change)


def appended(tail: bytes) -> Damage:
    """`tail` follows the end of the file."""
    return _named(f"{len(tail)}_bytes_appended", lambda data: data + tail)


def of_another_type(value: Any) -> Damage:
    """The file is valid JSON of `value`."""
    return replaced_by(
        json.dumps(value).encode(),
        f"json_{type(value).__name__}_{str(value)[:12]}".replace(" ", ""),
    )


def deeply_nested(depth: int = 100_000) -> Damage:
    """The file is JSON (and YAML) of lists in lists."""
    return replaced_by(b"[" * depth + b"]" * depth, f"lists_{depth}_deep")


def directory_in_its_place(path: pathlib.Path) -> None:
    """There is a directory of this name."""
    path.unlink()
    path.mkdir()


def absent(path: pathlib.Path) -> None:
    """There is nothing of this name."""
    path.unlink()


def dangling_link(path: pathlib.Path) -> None:
    """A link to a file that is gone."""
    path.unlink()
    path.symlink_to(path.with_name("what_is_gone"))


def looping_link(path: pathlib.Path) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def unreadable(path: pathlib.Path) -> None:
    """Nobody may read it (root may: for root this damages nothing)."""
    path.chmod(0)


emptied = replaced_by(b"", "emptied")
noise = replaced_by(bytes((i * 37 + i // 251) % 256 for i in range(3001)), "noise")
huge = replaced_by(b'{"a": "' + b"x" * 3_000_000 + b'"}', "json_of_3_MB")
huge_text = replaced_by(b"x" * 3_000_000, "text_of_3_MB")
with_bom = _named("byte_order_mark", lambda data: b"\xef\xbb\xbf" + data)
as_utf16 = _named("utf16", lambda data: data.decode("utf-8", "replace").encode("utf-16"))
with_nul = _named("nul_bytes_at_the_end", lambda data: data + bytes(100))
with_latin1 = _named(
    "latin1_byte", lambda data: data[: len(data) // 2] + b"\xe9" + data[len(data) // 2 :]
)
with_crlf = _named("crlf", lambda data: data.replace(b"\n", b"\r\n"))
doubled = _named("doubled", lambda data: data + data)

BYTES: tuple[Damage, ...] = (
    emptied,
    *(truncated(share) for share in (0.02, 0.25, 0.5, 0.75, 0.97)),
    truncated_by(1),
    *(
        flipped(share, bit)
        for share, bit in (
            (0, 0),
            (0, 7),
            (0.1, 1),
            (0.3, 0),
            (0.5, 6),
            (0.7, 3),
            (0.9, 0),
            (0.99, 2),
            (1, 0),
        )
    ),
    *(zeroed(share) for share in (0, 0.4, 0.9)),
    appended(b"\0"),
    appended(b"x"),
    appended(b"\n"),
    noise,
    huge_text,
    doubled,
)
TEXT: tuple[Damage, ...] = (with_bom, as_utf16, with_nul, with_latin1, with_crlf)
JSON_FILE: tuple[Damage, ...] = (
    *(
        of_another_type(value)
        for value in ([], [1, [2]], "text", None, 3, 1e400, True, {}, {"a": 1})
    ),
    replaced_by(b"NaN", "json_nan"),
    replaced_by(b"9" * 5000, "json_of_5000_digits"),
    deeply_nested(),
    replaced_by(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "objects_100000_deep"),
    huge,
)
ABSENT: tuple[Damage, ...] = (directory_in_its_place, absent, dangling_link, looping_link)

_OTHER_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**200,
    0.5,
    float("nan"),
    float("inf"),
    "x",
    "\ud800",
    "x" * 3_000_000,
    [],
    [[1]],
    {},
    {"a": 1},
)


def json_fields(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, a damaged copy): every value inside `value` of another type, left out, or
    joined by one of an unknown name."""
    for where in _places(value):
        name = ".".join(map(str, where))
        for other in _OTHER_VALUES:
            yield f"{name} is {str(other)[:20]!r}", _with(value, where, other)
        yield f"{name} is left out", _without(value, where)
    if isinstance(value, dict):
        yield "an unknown key", value | {"no_such_key": 1}


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*above, key)
        yield from _places(inner, (*above, key))


def _with(value: Any, where: tuple[Any, ...], other: Any) -> Any:
    result = copy.deepcopy(value)
    inner = result
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = other
    return result


def _without(value: Any, where: tuple[Any, ...]) -> Any:
    result = copy.deepcopy(value)
    inner = result
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    return result


def check_message(error: UsageError, *names: str) -> None:
    """An error is one short paragraph, without a traceback inside, and says each of `names` (of the
    file, say)."""
    message = str(error)
    assert len(message) < LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]}"
    assert "\n" not in message, message
    for name in names:
        assert name in message, f"{name} is not named in: {message}"
    assert error.fix, message


def refused_or_equal(read: Callable[[], Any], equal: Callable[[Any], bool], *names: str) -> bool:
    """Reads what was damaged.

    True if it was refused with a message as `check_message` wants it, False if it reads as before.

    Every other exception, and every other result, fails the test.
    """
    try:
        found = read()
    except UsageError as error:
        check_message(error, *names)
        return True
    assert equal(found), "the damage went unnoticed, and what was read is not what was written"
    return False
