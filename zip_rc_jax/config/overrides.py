"""`key=value` arguments of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.runtime.errors import UsageError

LONGEST = 100_000  # characters


def from_dotlist(items: Sequence[str], what: str, example: str) -> dict[str, Any]:
    """`NAME=VALUE` items as plain values, each value read as YAML.

    Of two with the same name the last one counts.

    Args:
      what: the items are called in messages, e.g. "option".
      example: of one that is right, e.g. "n=8".

    Raises:
      UsageError: an item without a name or a `=`, a value that is not YAML, text that is not UTF-8,
        or an interpolation (`${...}`): it would be replaced by something that the command line does
        not show.
    """
    for item in items:
        value = f"{what} {shown(item)}"
        fix = f"write for example {example}"
        name, equals, _ = item.partition("=")
        if not equals or not name.strip(". "):
            raise UsageError(value, "it does not have the form NAME=VALUE", fix)
        if "${" in item:
            raise UsageError(
                value,
                "it holds an interpolation, and none is resolved here",
                "write the value itself",
            )
        if len(item) > LONGEST:
            raise UsageError(value, f"it has {len(item):,} characters", fix)
        try:
            item.encode()
        except UnicodeEncodeError:
            raise UsageError(value, "it is not UTF-8", "write it in UTF-8") from None
        try:
            OmegaConf.from_dotlist([item])
        # OmegaConf and PyYAML raise many kinds, and Python its own for numbers of thousands of
        # digits
        except Exception as error:
            raise UsageError(
                value,
                f"its value cannot be read ({in_short(error)})",
                f"{fix}, with quotes around special characters",
            ) from None
    try:
        settings = OmegaConf.to_container(OmegaConf.from_dotlist(list(items)), resolve=False)
    except Exception as error:  # one contradicts another, such as a=1 a.b=2
        raise UsageError(
            f"{what} {shown(list(items))}",
            f"they do not go together ({in_short(error)})",
            f"write for example {example}",
        ) from None
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items()}
