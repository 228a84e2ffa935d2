"""Problems of data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

from typing import Any

from zip_rc_jax.config import SourceConfig
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.data.problems.columns import Row, plain_value
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import


def tfds_rows(source: SourceConfig) -> tuple[list[Row], dict[str, Any]]:
    """All rows of a split, and where they come from (`version`, `split`).

    The data set must be prepared in a format with random access (array_record). Nothing is
    downloaded.

    Raises:
      UsageError: no such data set or version; one that is not prepared, or in a format that only
        TensorFlow reads; an unknown or unnamed split, or an empty one.
    """
    with optional_import():
        import tensorflow_datasets as tfds
    data_dir = source.data_dir or str(tfds.core.constants.DATA_DIR)
    where = f"problems of {shown(source.source)} in {data_dir}"
    prepare = (
        'prepare it where there is a network: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{source.name[:80]}', data_dir='{data_dir[:200]}', "
        "file_format='array_record').download_and_prepare()\""
    )
    try:
        builder = tfds.builder(source.name, data_dir=data_dir, try_gcs=False)
        splits = list(builder.info.splits)
    except tfds.core.registered.DatasetNotFoundError:
        raise UsageError(
            where, "it is not there, and TFDS knows no such data set", prepare
        ) from None
    except Exception as error:  # TFDS raises what it likes about names and files
        reason = f"TFDS cannot read it ({in_short(error)})"
        raise UsageError(
            where, reason, "write tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:1.0.0"
        ) from None
    if not splits:
        raise UsageError(where, "it is not prepared", prepare)
    split = _split(source, splits)
    try:
        if not builder.info.splits[split].num_examples:
            raise _empty(source, split)
        data = builder.as_data_source(split)
        rows = [_plain(row) for row in data.__getitems__(list(range(len(data))))]
    except UsageError:
        raise
    except NotImplementedError:
        stored = builder.info.file_format.value
        raise UsageError(
            where, f"it is prepared in the format {stored}, which only TensorFlow reads", prepare
        ) from None
    except ModuleNotFoundError as error:
        raise UsageError(
            where, f"a feature of it needs {error.name}", "pip install tensorflow, or use a file"
        ) from None
    except Exception as error:
        raise UsageError(where, f"TFDS cannot read it ({in_short(error)})", prepare) from None
    found = [Row(row, f"{source.name} {split}, row {i}", i) for i, row in enumerate(rows)]
    return found, {"split": split, "version": str(builder.version)}


def _empty(source: SourceConfig, split: str) -> UsageError:
    return UsageError(
        f"split {split!r} of {shown(source.source)}", "it has no rows", "name another split"
    )


def _split(source: SourceConfig, known: list[str]) -> str:
    base, listed = source.split.partition("[")[0], ", ".join(known)
    if not base and len(known) == 1:
        return known[0]
    if not base or base not in known:
        reason = f"it has no such split; there are {listed}" if base else f"it has {listed}"
        raise UsageError(
            f"split={shown(source.split)} of {shown(source.source)}",
            reason,
            f"name one of these beside `source`, such as split: {known[0]}",
        )
    return source.split


def _plain(value: Any) -> Any:
    """Nested features with text for bytes and Python's numbers."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return plain_value(value)
