"""Old names of settings, accepted for one release with a warning.

That holds in Python, in YAML and on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.problems import GYM_SEEDS
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest

# Class -> old name -> new name. An entry goes away with the release after the one that renamed it.
OLD_NAMES: dict[str, dict[str, str]] = {
    # 0.2
    "DecodeConfig": {
        "rows": "max_num_seqs",
        "no_harm": "add_back",
        "skill": "selection_exponent",
        "abstain": "allow_no_answer",
    },
    "ReplayConfig": {"skills": "selection_exponents"},
    "Request": {"abstain": "allow_no_answer"},
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
        is_old = isinstance(name, str) and name in old_names
        new = old_names[name] if is_old else name
        if is_old:
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


def problems_of_task(task: Mapping[Any, Any]) -> dict[str, Any]:
    """The section `problems` with exactly the problems of an old section `task` (until 0.2).

    Raises:
      UsageError: an unknown key, or seeds that are no whole numbers.
    """
    warn("task", "problems", stacklevel=4)
    known: dict[str, Any] = {
        "name": "chain_sum",
        "levels": [],
        "train_seed": 0,
        "heldout_seed": GYM_SEEDS,
    }
    for key in task:
        if key not in known:
            fix = nearest(str(key), list(known), "known keys here are")
            raise UsageError(f"config key {shown(f'task.{key}')}", "no stage reads this key", fix)
    known |= task
    train, heldout = known["train_seed"], known["heldout_seed"]
    for name in ("train_seed", "heldout_seed"):
        value = known[name]
        if type(value) is not int or value < 0:
            raise UsageError(f"task.{name}={shown(value)}", "it is no whole number >= 0", "use one")
    # The two splits shared the distance between their first seeds among their levels.
    source = {"source": f"gym:{known['name']}", "levels": known["levels"]}
    source |= {"span": abs(heldout - train)}
    found = {"train": [source | {"seed": train}], "overlap": "keep"}
    return found | {"heldout": [source | {"seed": heldout}]}
