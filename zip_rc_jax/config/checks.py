"""What every setting is checked with."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from zip_rc_jax.errors import UsageError


def require(condition: bool, value: str, reason: str, fix: str) -> None:
    if not condition:
        raise UsageError(value, reason, fix)


LARGEST_COUNT = 2**31 - 1  # steps and positions are int32


def counts(name: str, value: int) -> None:
    """Raises UsageError unless `value`, a whole number, is from 1 to `LARGEST_COUNT`."""
    require(value >= 1, f"{name}={value}", "it counts at least one", "use a positive number")
    require(value <= LARGEST_COUNT, name, f"it counts at most {LARGEST_COUNT:,}, and a larger number stands there", "use a smaller number")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name}={value!r}", f"it must be one of {', '.join(allowed)}", "choose one of them")


_KINDS: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "true or false"),
}


def check_types(config: type, values: Mapping[str, Any]) -> None:
    """Checks numbers and truth values that did not come through YAML, where types are checked as they are read.

    Raises:
      UsageError: one of `values` is not of the type that the dataclass `config` declares for its name.
    """
    for field in dataclasses.fields(config):
        if field.name in values and str(field.type) in _KINDS:
            value, (kind, words) = values[field.name], _KINDS[str(field.type)]
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            require(fits, f"{field.name}={value!r}", f"it is not {words}", f"give {words}")
