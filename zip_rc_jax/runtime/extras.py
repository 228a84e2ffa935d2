"""Packages that only a part of the project needs, and the extra of `zip-rc-jax` that installs
each."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from zip_rc_jax.runtime.errors import UsageError

# Module -> extra. `pyproject.toml` lists the packages; a module of two extras stands here under the
# smaller one.
EXTRAS = {
    "matplotlib": "eval",
    "reasoning_gym": "eval",
    "array_record": "train",
    "grain": "train",
    "pyarrow": "train",
    "tensorflow_datasets": "train",
    "gguf": "gguf",
    "datasets": "data",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "fsspec": "buckets",
    "gcsfs": "buckets",
    "ray": "fleet",
}
# What an extra has beside its own modules.
_INCLUDES = {
    "eval": ("eval",),
    "train": ("train", "eval"),
    "gguf": ("gguf",),
    "data": ("data", "train", "eval"),
    "serve": ("serve",),
    "buckets": ("buckets",),
    "fleet": ("fleet",),
}


@contextlib.contextmanager
def optional_import() -> Iterator[None]:
    """Imports inside may be of packages that are not installed.

    Raises:
      UsageError: such a package is in `EXTRAS`; the error names its extra.
      ModuleNotFoundError: another one is missing, so the installation is broken.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS or _is_installed(module):
            raise
        raise missing([module], EXTRAS[module], "it is needed here") from None


def check_extra(extra: str, what: str) -> None:
    """Looks for all modules of an extra, and imports none of them.

    Args:
      extra: "train", "eval", "gguf", "data", "serve", "buckets" or "fleet".
      what: needs them, for the message, e.g. "zip-rc train".

    Raises:
      UsageError: some are not installed.
    """
    modules = [module for module, needed_by in EXTRAS.items() if needed_by in _INCLUDES[extra]]
    absent = [module for module in modules if not _is_installed(module)]
    if absent:
        raise missing(absent, extra, f"{what} needs {'it' if len(absent) == 1 else 'them'}")


def missing(modules: list[str], extra: str, reason: str) -> UsageError:
    """The error for modules that are not installed."""
    one = len(modules) == 1
    value = f"Python {'package' if one else 'packages'} {', '.join(modules)}"
    absent = f"{reason}, and {'it is' if one else 'they are'} not installed"
    return UsageError(value, absent, f"pip install 'zip-rc-jax[{extra}]'")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
