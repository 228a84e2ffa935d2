"""Rollouts as Parquet tables in the schema of the authors' code, so that their tools can use our
rollouts and we theirs.

Columns, one row per rollout: prompt_idx, prompt, answer, prompt_token_ids, output_token_ids,
input_ids (prompt followed by output), label_positions, response, length (output tokens), finished,
reasoning_enabled, model_id, temperature, min_p, max_model_len; `correct` once graded; `value` once
labelled. After them we add the fields that only our `Rollout` has, and metadata under
`METADATA_KEY`.

`label_positions` counts like the authors: position `t` stands for the prefix *before* token `t`
(their loader subtracts one). The response tokens `p .. p+m-1` stand for the prefixes that end at
`p-1 .. p+m-2`, and `data.batches` trains these.

`finished` is taken from the table as it is. The authors' sampler knows one end-of-sequence id only.
Responses with another end are marked False there. The stages count them as finished (see
`data.ends` and `PipelineConfig.data_ends`).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.data.rollouts import NEWER, Rollout, RolloutSource
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.storage import in_short, parse_json
from zip_rc_jax.runtime.temporaries import whole_file

with optional_import():
    import pyarrow as pa
    import pyarrow.parquet as pq

METADATA_KEY = b"zip_rc_jax"
# wrote the file; it always leaves its schema among the keys of the footer
_ARROW = "parquet-cpp-arrow"
DIGESTS_KEY = b"zip_rc_jax_digests"  # see `_Digests`
# rollouts at a time; of 20k tokens each, they take a quarter of a gigabyte to write and half of one
# to read
ROW_GROUP = 128
LARGEST_ID = 2**31 - 1

_IDS = pa.list_(pa.int32())
_AUTHORS = {
    "prompt_idx": pa.int64(),
    "prompt": pa.string(),
    "answer": pa.string(),
    "prompt_token_ids": _IDS,
    "output_token_ids": _IDS,
    "input_ids": _IDS,
    "label_positions": _IDS,
    "response": pa.string(),
    "length": pa.int64(),
    "finished": pa.bool_(),
    "reasoning_enabled": pa.bool_(),
    "model_id": pa.string(),
    "temperature": pa.float64(),
    "min_p": pa.float64(),
    "max_model_len": pa.int64(),
}
_LABELS = {"correct": pa.float64(), "value": pa.float64()}
_OURS = {
    "sample_index": pa.int64(),
    "level": pa.int64(),
    "seed": pa.int64(),
    "task": pa.string(),
    "question": pa.string(),
    "entry_json": pa.string(),
}
_NEWER = {  # which tables of earlier versions lack
    "level_name": pa.string(),
    "problem_id": pa.string(),
    "source": pa.string(),
    "variant": pa.int64(),
}
_COLUMNS = _AUTHORS | _LABELS | _OURS | _NEWER


@dataclasses.dataclass(frozen=True)
class GenerationInfo:
    """How rollouts were sampled: the columns of the authors' table that `Rollout` does not have.

    Attributes:
      model_id: the policy.
      temperature, min_p: see `config.SamplingConfig`.
      max_model_len: most tokens of prompt and response together.
      reasoning_enabled: the chat template asked for reasoning.
    """

    model_id: str
    temperature: float
    min_p: float
    max_model_len: int
    reasoning_enabled: bool


# Writing.


def write_parquet(
    path: str | pathlib.Path,
    rollouts: Iterable[Rollout],
    *,
    settings: GenerationInfo | Sequence[GenerationInfo],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes a table, `ROW_GROUP` rollouts at a time; under a temporary name first, so `path` is
    complete or as it was.

    `prompt` is the text that was tokenised. Half surrogate pairs, which Parquet's UTF-8 cannot
    hold, are escaped. Pages have checksums, and the footer, which has none in Parquet, holds
    digests of all values (see `_Digests`).

    Args:
      rollouts: read once. Either all of them have a `correct` or none has (then the column is
        absent); the same for `value`.
      settings: of all rollouts, or one per rollout.
      metadata: JSON-able; `read_parquet_metadata` gives it back.

    Raises:
      UsageError: no rollouts, only some of them graded or labelled, or one without prompt or output
        tokens.
      ValueError: `settings` has not one entry per rollout.
    """
    path = pathlib.Path(path)
    iterator = iter(rollouts)
    first = next(iterator, None)
    if first is None:
        raise UsageError(f"rollouts for {path}", "there are none", "generate at least one rollout")
    labels = _labels(first)
    kinds = _AUTHORS | {name: _LABELS[name] for name in labels} | _OURS | _NEWER
    schema = pa.schema(
        list(kinds.items()),
        metadata={METADATA_KEY: json.dumps(metadata or {}, sort_keys=True).encode()},
    )
    infos: Iterable[GenerationInfo] = (
        itertools.repeat(settings) if isinstance(settings, GenerationInfo) else settings
    )
    pairs = zip(
        itertools.chain([first], iterator), infos, strict=not isinstance(settings, GenerationInfo)
    )
    digests = _Digests()

    def to_row(number: int, rollout: Rollout, info: GenerationInfo) -> dict[str, Any]:
        row = _to_row(rollout, info, labels, f"{path}, row {number}")
        digests.add(rollout)
        digests.add_info(info)
        return row

    rows = (to_row(number, rollout, info) for number, (rollout, info) in enumerate(pairs))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        while group := list(itertools.islice(rows, ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
        record = digests.record(file.tell(), schema.metadata[METADATA_KEY], schema.names)
        writer.add_key_value_metadata({DIGESTS_KEY: json.dumps(record, sort_keys=True).encode()})


class _Digests:
    """What a table that `write_parquet` wrote holds, in digests, so that no damage to its footer
    changes a value unnoticed.

    The position of the footer is recorded with them. Where another program wrote a table again from
    ours (some of its rows, say) and kept the record, the footer lies elsewhere. Then the record
    says nothing about the table.
    """

    def __init__(self) -> None:
        self._rows, self._infos = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._count = 0

    def add(self, rollout: Rollout) -> None:
        """One more row: its rollout."""
        self._count += 1
        for name, value in sorted(vars(rollout).items()):
            if name in NEWER and value == NEWER[name]:
                continue  # digests of earlier versions know nothing of it
            if isinstance(value, np.ndarray):
                data = value.astype("<i4").tobytes()
            elif isinstance(value, str):
                data = value.encode("utf-8", "surrogatepass")
            else:  # `correct` and `value` as float64, NaN where there is none
                data = repr(float(value) if name in _LABELS else int(value)).encode()
            self._rows.update(b"%s %d\n" % (name.encode(), len(data)) + data)

    def add_info(self, info: GenerationInfo) -> None:
        """One more row: how it was sampled."""
        kinds = (str, float, float, int, bool)
        self._infos.update(
            repr(
                [kind(value) for kind, value in zip(kinds, vars(info).values(), strict=True)]
            ).encode()
        )

    @property
    def rows(self) -> str:
        return self._rows.hexdigest()

    @property
    def infos(self) -> str:
        return self._infos.hexdigest()

    def record(self, footer: int, metadata: bytes, names: Sequence[str]) -> dict[str, Any]:
        """What is stored: with where the footer begins, what `METADATA_KEY` holds, and the
        columns."""
        return {
            "footer": footer,
            "rows": self.rows,
            "infos": self.infos,
            "count": self._count,
            "metadata": hashlib.blake2b(metadata, digest_size=16).hexdigest(),
            "columns": list(names),
        }


def _key_values(file: pq.ParquetFile) -> dict[bytes, bytes]:
    """Of the footer. (Arrow's own schema in it has a copy of some of them.)"""
    return file.metadata.metadata or {}


def _stored_digests(file: pq.ParquetFile, path: pathlib.Path) -> dict[str, Any] | None:
    """What `_Digests.record` left; None if there is nothing, or the file was written again by
    another program.

    Raises:
      UsageError: the footer is damaged.
    """
    try:
        metadata = _key_values(file)
        with path.open("rb") as opened:
            opened.seek(-8, os.SEEK_END)
            footer = opened.tell() - int.from_bytes(opened.read(4), "little")
        writer = file.metadata.created_by or _ARROW
        if not metadata and writer.startswith(_ARROW) and {*_OURS} <= {*file.schema_arrow.names}:
            raise ValueError("what Arrow and we write at the end of its footer is lost")
        if DIGESTS_KEY not in metadata:
            return None
        record = parse_json(metadata[DIGESTS_KEY])
        if record["footer"] != footer:
            return None
        seen = (
            hashlib.blake2b(metadata[METADATA_KEY], digest_size=16).hexdigest(),
            file.schema_arrow.names,
            file.metadata.num_rows,
        )
        if seen != (record["metadata"], record["columns"], record["count"]):
            raise ValueError("its footer does not fit the digests in it")
        return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _labels(rollout: Rollout) -> list[str]:
    return [name for name in _LABELS if not math.isnan(getattr(rollout, name))]


def _to_row(
    rollout: Rollout, info: GenerationInfo, labels: list[str], where: str
) -> dict[str, Any]:
    """Values of all columns, and more (Arrow takes what the schema names)."""
    prompt, output = rollout.prompt_token_ids, rollout.output_token_ids
    if not len(prompt) or not len(output):
        raise UsageError(
            where,
            "a rollout without prompt or output tokens has no prefix to train",
            "leave it out",
        )
    if _labels(rollout) != labels:
        raise UsageError(
            where,
            f"it has the labels {_labels(rollout)}, row 0 has {labels}, and a column is complete "
            "or absent",
            "label all, or none",
        )
    row = vars(rollout) | vars(info)
    row |= {
        "prompt_idx": rollout.prompt_index,
        "input_ids": np.concatenate([prompt, output]),
        "label_positions": np.arange(len(prompt), len(prompt) + len(output), dtype=np.int32),
        "length": len(output),
    }
    return {
        name: _escape(value) if isinstance(value, str) else value for name, value in row.items()
    }


# U+FFFF is no character, so text does not use it, and every other text stays as it is.
_UNWRITABLE = re.compile(r"[\uffff\ud800-\udfff]")
_ESCAPED = re.compile(r"\uffff([\uffff\ue000-\ue7ff])")
_SHIFT = 0xE000 - 0xD800


def _escape(text: str) -> str:
    """Valid Unicode: half a surrogate pair becomes U+FFFF and a private-use character, U+FFFF
    becomes two of itself."""
    return _UNWRITABLE.sub(
        lambda match: (
            "\uffff" + (match[0] if match[0] == "\uffff" else chr(ord(match[0]) + _SHIFT))
        ),
        text,
    )


def _unescape(text: str) -> str:
    return _ESCAPED.sub(
        lambda match: match[1] if match[1] == "\uffff" else chr(ord(match[1]) - _SHIFT), text
    )


# Reading.


def open_rollouts(path: str | pathlib.Path) -> tuple[Iterable[Rollout], dict[str, Any]]:
    """Rollouts wherever they come from: a dataset of `write_rollouts`, a Parquet file, or a
    directory of `*.parquet` shards.

    Returns:
      The rollouts, read as they are asked for, and what identifies them: the metadata of a dataset;
      of Parquet files `{"parquet": hash of their contents, "metadata":
      read_parquet_metadata(path)}`.

    Raises:
      UsageError: nothing there, or neither kind; for Parquet as `read_parquet`, at once for the
        files and later for their rows.
    """
    if not _shards(path):
        source = RolloutSource(path)
        return source, source.metadata
    shards = _check(path)
    return _read(shards), {"parquet": _digest(shards), "metadata": read_parquet_metadata(path)}


def read_parquet(path: str | pathlib.Path) -> list[Rollout]:
    """All rollouts of a Parquet file, or of the `*.parquet` shards of a directory in the order of
    their names.

    Tables of the authors lack our own columns. Then `sample_index` counts within the prompt,
    `level` and `seed` are 0, `task` and `entry_json` are "", and `question` is the prompt. A null
    `answer`, which their sampler writes for prompt sets without answers, is "". Columns that
    neither of us defines are ignored, and so are `label_positions`, once they are found to lie
    inside the sequence: we train every prefix of the response, whichever of them the table labels.

    Raises:
      UsageError: no such file, not (completely) a Parquet file, no rows, a missing column, shards
        with different columns; or, with its column and row: a null, a value of another type, token
        ids below 0 or from 2**31, no prompt or output tokens, `length` or `input_ids` that disagree
        with them, label positions outside the sequence, or a label outside [0, 1].
    """
    return list(_read(_check(path)))


def read_parquet_metadata(path: str | pathlib.Path) -> dict[str, Any]:
    """The metadata given to `write_parquet`, of the first shard of a directory; {} for a foreign
    table. Raises as `read_parquet`."""
    shard = _check(path)[0]
    with _open(shard) as file:
        _stored_digests(file, shard)
        text = _key_values(file).get(METADATA_KEY, b"{}")
    try:
        metadata = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(shard, error) from error
    if not isinstance(metadata, dict):
        raise _damaged(
            shard, ValueError(f"{METADATA_KEY.decode()} in its footer is no JSON object")
        )
    return metadata


def read_generation(path: str | pathlib.Path) -> list[GenerationInfo]:
    """How each rollout was sampled, in the order of `read_parquet`. Raises as `read_parquet`."""
    names = [field.name for field in dataclasses.fields(GenerationInfo)]
    result = []
    for shard in _check(path):
        digests = _Digests()
        for _, row in _rows(shard, names):
            info = GenerationInfo(**row)
            digests.add_info(info)
            result.append(info)
        _compare(shard, "infos", digests.infos)
    return result


def _compare(shard: pathlib.Path, kind: str, digest: str) -> None:
    with _open(shard) as file:
        stored = _stored_digests(file, shard)
    if stored is not None and stored.get(kind) != digest:
        raise _damaged(shard, ValueError("its rows do not fit the digest in its footer"))


def _shards(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The Parquet files at `path`; none if it is something else.

    A file that must be one, or should be there, is listed unseen.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return [path] if path.is_file() or path.suffix == ".parquet" else []


def _digest(shards: list[pathlib.Path]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for shard in shards:
        with shard.open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    return hasher.hexdigest()


def _open(path: pathlib.Path) -> pq.ParquetFile:
    if not path.is_file():
        raise UsageError(f"rollouts {path}", "there is no such file", "correct the path")
    try:
        # Without pre_buffer=False, Arrow keeps the whole file in memory while its batches are read.
        return pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
    except _FAULTS as error:
        raise _damaged(path, error) from error


# Of a damaged file, Arrow raises mostly the first three; names that are not UTF-8 and sizes of
# 2**60 bytes are found by Python.
_FAULTS = (
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
)


def _damaged(path: pathlib.Path, error: Exception) -> UsageError:
    return UsageError(
        f"rollouts {path}",
        f"it is not (completely) a Parquet file ({in_short(error)})",
        "write or copy it again",
    )


def _check(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The shards, after a look at their footers."""
    shards = _shards(path)
    if not shards:
        raise UsageError(
            f"rollouts {path}",
            "there is no Parquet file",
            "pass a Parquet file, or a directory of *.parquet files",
        )
    expected = _columns(shards[0])
    for shard in shards:
        differ = sorted(set(_columns(shard)) ^ set(expected))
        if differ:
            raise UsageError(
                f"rollouts {path}",
                f"{shards[0].name} and {shard.name} differ in the columns {', '.join(differ)}",
                "pass one of them alone",
            )
    return shards


def _columns(path: pathlib.Path) -> list[str]:
    """The columns of a file that we know.

    Raises `UsageError` if the authors' are not all there, or no rows.
    """
    with _open(path) as file:
        names, rows = file.schema_arrow.names, file.metadata.num_rows
    missing = [name for name in _AUTHORS if name not in names]
    if missing:
        raise UsageError(
            f"rollouts {path}",
            f"it lacks the columns {', '.join(missing)}",
            "pass a table of the authors' schema",
        )
    if not rows:
        raise UsageError(f"rollouts {path}", "it has no rows", "generate at least one rollout")
    return [name for name in _COLUMNS if name in names]


def _read(shards: list[pathlib.Path]) -> Iterator[Rollout]:
    # by prompt; one prompt may stand in several shards
    samples: collections.Counter[int] = collections.Counter()
    for shard in shards:
        digests = _Digests()
        for where, row in _rows(shard, _columns(shard)):
            fault = next(_faults(row), None)
            if fault:
                column, reason = fault
                raise UsageError(
                    f"{where}, column {column!r}", reason, "correct the table, or leave the row out"
                )
            rollout = _to_rollout(row, samples[row["prompt_idx"]])
            digests.add(rollout)
            yield rollout
            samples[row["prompt_idx"]] += 1
        _compare(shard, "rows", digests.rows)


def _to_rollout(row: dict[str, Any], sample_index: int) -> Rollout:
    defaults = {
        "sample_index": sample_index,
        "level": 0,
        "seed": 0,
        "task": "",
        "question": row["prompt"],
        "entry_json": "",
        **NEWER,
    }
    row = defaults | row | {"prompt_index": row["prompt_idx"]}
    return Rollout(
        **{
            field.name: row[field.name]
            for field in dataclasses.fields(Rollout)
            if field.name in row
        }
    )


def _faults(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(column, what is wrong with it)."""
    prompt, output, ids, labelled = (
        row[name]
        for name in ("prompt_token_ids", "output_token_ids", "input_ids", "label_positions")
    )
    for name in ("prompt_token_ids", "output_token_ids"):
        if not len(row[name]):
            yield name, "it has no tokens, so the rollout has no prefix to train"
    if row["length"] != len(output):
        yield "length", f"it is {row['length']}, and output_token_ids has {len(output)} tokens"
    if not np.array_equal(ids, np.concatenate([prompt, output])):
        yield "input_ids", "it is not prompt_token_ids followed by output_token_ids"
    elif not 0 <= ids.min() <= ids.max() <= LARGEST_ID:
        yield "input_ids", f"it has a token id outside 0 .. {LARGEST_ID}"
    if len(labelled) and not 0 <= labelled.min() <= labelled.max() < len(ids):
        yield "label_positions", f"it has a position outside the sequence, 0 .. {len(ids) - 1}"
    for name in _LABELS:
        if not 0 <= row.get(name, 0) <= 1:  # NaN too
            yield name, f"{row[name]} is outside [0, 1]"


def _rows(path: pathlib.Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row number, Python values of the named columns; lists as int64 arrays)."""
    with _open(path) as file:
        escaped = METADATA_KEY in _key_values(file)
        number = 0
        try:
            for batch in file.iter_batches(ROW_GROUP, columns=names):
                columns = [
                    _values(batch.column(name), name, number, path, escaped) for name in names
                ]
                for values in zip(*columns, strict=True):
                    yield f"rollouts {path}, row {number}", dict(zip(names, values, strict=True))
                    number += 1
        except UsageError:
            raise
        except _FAULTS as error:
            raise _damaged(path, error) from error


def _values(
    column: pa.Array, name: str, first: int, path: pathlib.Path, escaped: bool
) -> Sequence[Any]:
    """The values of a part of a column; its row 0 is row `first` of the file.

    Raises `UsageError` for nulls and other types.
    """
    if name == "answer":
        _check_answers(column, first, path)
    # so that ids out of range are found row by row
    kind = pa.list_(pa.int64()) if _COLUMNS[name] == _IDS else _COLUMNS[name]
    try:
        column = column.cast(kind)
        column.validate(full=True)  # a text that is not UTF-8
    except pa.ArrowException as error:
        raise UsageError(
            f"rollouts {path}, rows from {first}, column {name!r}",
            f"it is no {kind} ({in_short(error)})",
            f"store it as {kind}",
        ) from error
    if name == "answer":
        column = column.fill_null("")
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    if kind == _COLUMNS[name]:
        values = column.to_pylist()
    else:
        ids, ends = column.flatten(), np.cumsum(column.value_lengths().fill_null(0).to_numpy())
        holes = np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))
        is_null[np.searchsorted(ends, holes, side="right")] = True
        values = np.split(ids.fill_null(0).to_numpy(), ends[:-1])
    if is_null.any():
        where = f"rollouts {path}, row {first + int(np.argmax(is_null))}, column {name!r}"
        raise UsageError(
            where, "it is null", "fill it, or leave the row or (if it is a label) the column out"
        )
    return [_unescape(value) for value in values] if escaped and kind == pa.string() else values


def _check_answers(column: pa.Array, first: int, path: pathlib.Path) -> None:
    """Numbers are answers too.

    Raises `UsageError` for nan and infinities, which as text would be right answers, and for truth
    values.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_boolean(column.type):
        raise UsageError(
            f"rollouts {path}, column 'answer'",
            "it holds truth values",
            "store the answers as text",
        )
    if not pa.types.is_floating(column.type):
        return
    values = column.to_numpy(zero_copy_only=False)
    odd = ~np.isfinite(values) & column.is_valid().to_numpy(zero_copy_only=False)
    if odd.any():
        number = int(np.argmax(odd))
        where = f"rollouts {path}, row {first + number}, column 'answer'"
        raise UsageError(
            where,
            f"it is {values[number]}, which is no answer",
            "write null where there is none, or leave the row out",
        )
