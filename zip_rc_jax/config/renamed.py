"""Old names of settings, accepted for one release with a warning.

That holds in Python, in YAML and on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from zip_rc_jax.runtime.errors import UsageError

# Class -> old name -> new name. An entry goes away with the release after the one that renamed it.
OLD_NAMES: dict[str, dict[str, str]] = {
    "DecodeConfig": {"rows": "max_num_seqs"},  # 0.2
}
C = TypeVar("C", bound=type)


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Tells of an old name."""
    message = f"{old} was renamed to {new}; the old name goes away in the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def takes_old_names(cls: C) -> C:
    """Lets a dataclass be made, and read, by the old names of its fields.

    Where both names are given the old one counts, because `dataclasses.replace(config, rows=8)`
    gives the new one too, with its old value.
    """
    old_names = OLD_NAMES[cls.__name__]
    made: Any = cls
    init = made.__init__

    @functools.wraps(init)
    def with_old_names(self: Any, *args: Any, **values: Any) -> None:
        for old, new in old_names.items():
            if old in values:
                warn(old, new)
                values[new] = values.pop(old)
        init(self, *args, **values)

    made.__init__ = with_old_names
    for old, new in old_names.items():
        setattr(cls, old, property(_reader(old, new)))
    return cls


def _reader(old: str, new: str) -> Callable[[Any], Any]:
    def read(config: Any) -> Any:
        warn(old, new)
        return getattr(config, new)

    return read


def new_names(cls: type, values: Mapping[Any, Any], where: str = "") -> dict[Any, Any]:
    """`values` of a dataclass, and of the dataclasses in it, with new names for old ones.

    Args:
      where: the section, for messages: "decode." or "".

    Raises:
      UsageError: a setting is given under both its names.
    """
    old_names = OLD_NAMES.get(cls.__name__, {})
    types = get_type_hints(cls)
    renamed: dict[Any, Any] = {}
    for name, value in values.items():
        # Keys of YAML may be NaN, which no comparison finds equal to itself.
        renamed = isinstance(name, str) and name in old_names
        new = old_names[name] if renamed else name
        if renamed:
            warn(f"{where}{name}", f"{where}{new}", stacklevel=4)
            if new in values:
                both = f"{where}{name} and {where}{new}"
                raise UsageError(both, "they are two names of one setting", f"leave out {name}")
        inner = types.get(new) if isinstance(new, str) else None
        if (
            isinstance(value, Mapping)
            and isinstance(inner, type)
            and dataclasses.is_dataclass(inner)
        ):
            value = new_names(inner, value, f"{where}{new}.")
        renamed[new] = value
    return renamed
