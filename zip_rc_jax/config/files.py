"""Reading a `PipelineConfig` from strict YAML with `key=value` overrides."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from zip_rc_jax.config import TRAIN_STAGES, PipelineConfig
from zip_rc_jax.config.problems import in_full
from zip_rc_jax.config.renamed import new_names, problems_of_task
from zip_rc_jax.config.train import in_full_length
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest
from zip_rc_jax.runtime.storage import in_short

MOST_BYTES = 1 << 20  # of a config
# values that name others multiply: 80 in a row would make texts of gigabytes
MOST_INTERPOLATIONS = 20


def load_config(
    path: str | pathlib.Path, overrides: list[str] | tuple[str, ...] = ()
) -> PipelineConfig:
    """Reads a YAML file, applies `section.key=value` overrides and validates everything.

    Raises:
      UsageError: the file is missing or not YAML, a key is unknown (the message names the nearest
        known key) or stands there twice, or a value is impossible. The message names the file, with
        the line where YAML knows it, or the override.
    """
    text = _text(pathlib.Path(path))
    interpolations = sum(part.count("${") for part in (text, *overrides))
    if interpolations > MOST_INTERPOLATIONS:
        raise UsageError(
            f"config {path}",
            f"it has {interpolations} interpolations (${{...}}), and {MOST_INTERPOLATIONS} are "
            "allowed",
            "write the values",
        )
    merged, task = OmegaConf.structured(PipelineConfig), dict[Any, Any]()
    with _naming(f"config {path}"):
        loaded = OmegaConf.create("{}") if not text.strip() else OmegaConf.load(io.StringIO(text))
        merged = _merged(merged, loaded, task)
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise UsageError(
                f"override {item!r}",
                "overrides have the form section.key=value",
                "write for example decode.beta=0.02",
            )
        with _naming(f"override {item!r} of {path}"):
            item.encode()  # the command line's bytes may be no UTF-8
            merged = _merged(merged, OmegaConf.from_dotlist([item]), task)
    with _naming(f"config {path}{' with overrides' if overrides else ''}"):
        if task:
            merged = OmegaConf.merge(merged, {"problems": problems_of_task(task)})
        config = OmegaConf.to_object(merged)
        assert isinstance(config, PipelineConfig)
        config.grid.grid("correct"), config.grid.grid("value")
        for name, value in _values(config):
            _check(name, value)
    return config


def _text(path: pathlib.Path) -> str:
    """What the file holds. Raises UsageError."""
    fix = "pass one of the files in configs/"
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"config {path}", "there is no such file", fix) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"config {path}", f"it cannot be read ({in_short(error)})", fix) from None
    if len(data) > MOST_BYTES:
        raise UsageError(
            f"config {path}",
            f"it has more than {MOST_BYTES:,} bytes, and a config has a few thousand",
            fix,
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"config {path}",
            f"it is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}",
            "save it as UTF-8",
        ) from None


def _merged(known: Any, given: Any, task: dict[Any, Any]) -> Any:
    """`known` with what is `given`, in the forms and under the names of today.

    Args:
      task: gets what the old section `task` says.

    Raises ValueError for a value that is left open, UsageError for one under two names, and what
    OmegaConf raises.
    """
    plain = OmegaConf.to_container(given, resolve=False) if isinstance(given, DictConfig) else None
    if isinstance(plain, dict):
        written = _of_today(known, plain, task)
        if written != plain:
            given = OmegaConf.create(written)
    if isinstance(given, (DictConfig, ListConfig)) and (missing := OmegaConf.missing_keys(given)):
        raise ValueError(
            f"{sorted(missing)[0]} is ???, which OmegaConf takes for a value that is still to come"
        )
    return OmegaConf.merge(known, given)


def _of_today(known: Any, plain: dict[Any, Any], task: dict[Any, Any]) -> dict[Any, Any]:
    """A config as a plain dict, with new names for old ones and short forms written out."""
    found = new_names(PipelineConfig, plain)
    if isinstance(old := found.get("task"), dict):
        if "problems" in found or known.problems.train:
            raise UsageError(
                f"{', '.join(f'task.{key}' for key in old) or 'task'} with a section problems",
                "they are two names of one setting",
                "write it in problems, such as problems.heldout=[{source: gym:gcd, seed: 5}]",
            )
        found = {key: value for key, value in found.items() if key != "task"}
        task.update(old)
        task.setdefault("name", "chain_sum")
    if isinstance(found.get("problems"), dict):
        current: Any = OmegaConf.to_container(known.problems, resolve=True)
        found = found | {"problems": in_full(found["problems"], current)}
    for section in TRAIN_STAGES:
        if isinstance(settings := found.get(section), dict):
            found = found | {section: in_full_length(settings)}
    for section in ("rollout", "evaluate"):
        settings = found.get(section)
        if isinstance(settings, dict) and settings.get("prompts", 0) is None:
            found = found | {section: settings | {"prompts": 0}}
    return found


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors inside become UsageErrors that name `what`."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error.value} in {what}", error.reason, error.fix) from None
    except ConfigKeyError as error:
        raise UsageError(
            f"config key {str(error.full_key)!r} in {what}",
            "no stage reads this key",
            _nearest(error),
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        fix = (
            "correct it there: YAML indents with spaces, and wants quotes around texts with "
            "special characters"
        )
        raise UsageError(
            f"{what}{where}", f"it is not YAML: {error.problem or error.context}", fix
        ) from None
    # OmegaConf and PyYAML let KeyError, AttributeError, RecursionError, ... of odd values through
    except Exception as error:
        key = str(getattr(error, "full_key", None) or "")
        value = f"{key} in {what}" if key else what
        raise UsageError(
            value,
            in_short(error).replace("'$VALUE' of type '$VALUE_TYPE' ", ""),
            "correct the value",
        ) from None


def _values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of everything in a config that has no parts."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"key of {name}", key
            yield from _values(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _values(inner, f"{name}[{number}]")
    else:
        yield name, value


def _check(name: str, value: Any) -> None:
    """Raises UsageError for what no file that a run leaves could hold."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(
            name,
            f"a whole number of {value.bit_length()} bits stands there",
            "use one of 64 bits at most",
        )
    if isinstance(value, float) and math.isnan(value):
        raise UsageError(f"{name}=nan", "it is no number", "use a number")
    if isinstance(value, str) and not _is_plain(value):
        raise UsageError(
            f"{name}={value!r}",
            "it holds half a surrogate pair or a NUL",
            "write it in UTF-8, without them",
        )
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise UsageError(
            f"{name}={value!r}",
            f"a {type(value).__name__} stands there",
            "write a number, text, true or false",
        )


def _is_plain(text: str) -> bool:
    return "\0" not in text and text == text.encode("utf-8", "ignore").decode()


def _nearest(error: ConfigKeyError) -> str:
    known = (
        [f.name for f in dataclasses.fields(error.object_type)]
        if dataclasses.is_dataclass(error.object_type)
        else []
    )
    return nearest(str(error.key), known, "known keys here are")
