"""What every setting is checked with."""

from __future__ import annotations

import dataclasses
import numbers
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest


def require(condition: bool, value: str, reason: str, fix: str) -> None:
    if not condition:
        raise UsageError(value, reason, fix)


LARGEST_COUNT = 2**31 - 1  # steps and positions are int32


def counts(name: str, value: int) -> None:
    """Raises UsageError unless `value`, a whole number, is from 1 to `LARGEST_COUNT`."""
    require(value >= 1, f"{name}={value}", "it counts at least one", "use a positive number")
    require(
        value <= LARGEST_COUNT,
        name,
        f"it counts at most {LARGEST_COUNT:,}, and a larger number stands there",
        "use a smaller number",
    )


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    known = isinstance(value, str) and value in allowed
    require(
        known,
        f"{name}={shown(value)}",
        f"it must be one of {', '.join(allowed)}",
        "choose one of them",
    )


def shown(value: Any, most: int = 100) -> str:
    """`repr` of any value whatever, for a message: at most `most` characters, and never an
    error."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    short.maxlevel = 4
    try:
        text = repr(value) if isinstance(value, (float, bool)) else short.repr(value)
    except Exception:  # a __repr__ of the caller's, or a number in a list that is too long to print
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def in_short(error: BaseException) -> str:
    """Type and first line of an error, also of one that cannot be printed."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


_KINDS: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "true or false"),
}


def check_types(config: type, values: Mapping[str, Any]) -> None:
    """Checks numbers and truth values that did not come through YAML, where types are checked as
    they are read.

    Raises:
      UsageError: one of `values` is not of the type that the dataclass `config` declares for its
        name, or is past all floating numbers.
    """
    for field in dataclasses.fields(config):
        if field.name in values and str(field.type) in _KINDS:
            value, (kind, words) = values[field.name], _KINDS[str(field.type)]
            fits = (
                isinstance(value, (bool, np.bool_))
                if kind is bool
                else isinstance(value, kind) and not isinstance(value, bool)
            )
            require(fits, f"{field.name}={shown(value)}", f"it is not {words}", f"give {words}")
            if kind is not bool:
                require(
                    _is_float(value),
                    f"{field.name}={shown(value)}",
                    "no floating-point number is so large",
                    "give a smaller number",
                )


def check_names(given: Iterable[Any], kind: type, where: str, reason: str) -> None:
    """Raises UsageError with this reason unless all `given` are names of fields of a dataclass.

    Args:
      where: the section that they stand in, for the message.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            key = f"config key {shown(f'{where}.{name}')}"
            raise UsageError(key, reason, nearest(str(name), known, "known settings are"))


def _is_float(value: Any) -> bool:
    """Whether it can be compared with floating numbers; Python's whole numbers and fractions may be
    too large."""
    try:
        float(value)
    except (OverflowError, ValueError):
        return False
    return True


def to_plain_numbers(config: Any) -> None:
    """Makes the numbers of a frozen dataclass, whose types were checked, Python's own: JSON does
    not take those of NumPy."""
    made = {"int": int, "float": float, "bool": bool}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = made.get(str(field.type))
        if kind is not None and type(value) not in (bool, int, float):
            object.__setattr__(config, field.name, kind(value))
