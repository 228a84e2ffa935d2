"""Rollouts on disk: a TFDS dataset in ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.data.summary import (
    RolloutSummary,
    SummaryRows,
    prompt_hash,
    read_summary,
    write_summary,
)
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.storage import (
    START_AGAIN,
    in_short,
    parse_json,
    plain,
    read_json,
    write_json,
    write_text,
)
from zip_rc_jax.runtime.temporaries import remove_leftovers, temporary_directory
from zip_rc_jax.runtime.working_copy import check_first_settings, copy_of, publish, refresh

METADATA = "metadata.json"
SUMMARY = "summary.npz"
# of the files beside the shards; the shards have hashes of their own, which ArrayRecord checks as
# it reads
DIGESTS = "digests.json"
AGAIN = "delete the directory, and the command that wrote it makes it again"


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response.

    Attributes:
      prompt_index: number of the problem within its split; rollouts of one prompt share it.
      sample_index: number of the sample within the prompt.
      level, seed, task, question, answer, entry_json: see `problems.Problem`.
      prompt: chat-templated text, exactly what was tokenised.
      prompt_token_ids: int32 `[p]`.
      output_token_ids: int32 `[m]`, generated tokens; the end-of-sequence token is the last one
        when `finished`.
      response: decoded output without special tokens.
      finished: False when the token limit cut it off (its length is then right-censored).
      correct: grade in [0, 1]; NaN = not graded.
      value: critic's label in [0, 1]; NaN = not labelled. Both are stored as float32.
      level_name, problem_id, source: see `problems.Problem`; "" in datasets of earlier versions.
      variant: number of the prompt variant, see `PromptConfig.variants`.
    """

    prompt_index: int
    sample_index: int
    level: int
    seed: int
    task: str
    prompt: str
    question: str
    answer: str
    entry_json: str
    prompt_token_ids: np.ndarray
    output_token_ids: np.ndarray
    response: str
    finished: bool
    correct: float = float("nan")
    value: float = float("nan")
    level_name: str = ""
    problem_id: str = ""
    source: str = ""
    variant: int = 0

    def __post_init__(self) -> None:
        for field in ("prompt_token_ids", "output_token_ids"):
            object.__setattr__(self, field, np.asarray(getattr(self, field), np.int32))


INTEGERS = ("prompt_index", "sample_index", "level", "seed", "variant")
TEXTS = (
    *("task", "prompt", "question", "answer", "entry_json", "response"),
    *("level_name", "problem_id", "source"),
)
# What datasets of earlier versions lack.
NEWER: dict[str, Any] = {"level_name": "", "problem_id": "", "source": "", "variant": 0}
TOKENS = ("prompt_token_ids", "output_token_ids")
FLOATS = ("correct", "value")


def write_rollouts(
    directory: str | pathlib.Path, rollouts: Iterable[Rollout], *, metadata: dict[str, Any]
) -> None:
    """Writes a dataset, with `metadata.json`, `summary.npz` and `digests.json` beside its shards,
    in the order given.

    Everything goes to a temporary sibling first, which is then renamed, so `directory` is complete
    or absent. An earlier rollout dataset in its place is replaced only then (so `rollouts` may be
    read lazily from it). Temporary siblings that killed processes left are removed. Equal rollouts
    and metadata become equal bytes.

    Raises:
      UsageError: no rollouts, or `directory` holds something else.
    """
    with optional_import():
        import tensorflow_datasets as tfds

        from zip_rc_jax.data.tfds_builder import ZipRollouts
    directory = pathlib.Path(directory)
    if (
        directory.exists()
        and not (directory / METADATA).is_file()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise UsageError(
            f"directory {directory}",
            "it exists and is not a rollout dataset, so it is not overwritten",
            "choose another path",
        )
    iterator = iter(rollouts)
    first = next(iterator, None)
    if first is None:
        raise UsageError(
            f"rollouts for {directory}", "there are none", "generate at least one rollout"
        )
    with temporary_directory(directory) as temporary:
        rows = SummaryRows()
        builder = ZipRollouts(
            rollouts=map(rows.add, itertools.chain([first], iterator)),
            data_dir=temporary,
            file_format="array_record",
        )
        tfds.disable_progress_bar()
        builder.download_and_prepare(
            download_dir=temporary / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
        written = pathlib.Path(builder.data_dir)
        (written / METADATA).write_text(
            json.dumps(metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        write_summary(written / SUMMARY, rows.summary())
        small = [path for path in written.iterdir() if ".array_record" not in path.name]
        write_json(
            written / DIGESTS, {path.name: _digest(path.read_bytes()) for path in sorted(small)}
        )
        for path in written.iterdir():
            with path.open("rb") as file:
                # otherwise a power cut may leave empty files in a directory that looks complete
                os.fsync(file.fileno())
        if directory.exists():
            directory.rename(temporary / "replaced")
        written.rename(directory)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_metadata(directory: str | pathlib.Path) -> dict[str, Any]:
    """The metadata given to `write_rollouts`.

    Raises `UsageError` for a directory that is not a complete, undamaged rollout dataset.
    """
    _check(directory)
    return _read_metadata(pathlib.Path(directory))


def _read_metadata(directory: pathlib.Path) -> dict[str, Any]:
    metadata = read_json(directory / METADATA, fix=AGAIN)
    if not isinstance(metadata, dict):
        raise UsageError(
            f"file {directory / METADATA}",
            f"it holds a JSON {type(metadata).__name__}, not an object",
            AGAIN,
        )
    return metadata


class RolloutSource(Sequence[Rollout]):
    """Random access to the rollouts of a directory, as Grain wants it: `len` and `[index]`; reads
    records lazily.

    Attributes:
      metadata: see `write_rollouts`.
      summary: see `RolloutSummary`.

    Raises:
      UsageError: a missing, half-written, damaged or foreign directory; for a damaged record, when
        it is read.
    """

    def __init__(self, directory: str | pathlib.Path):
        self._directory = pathlib.Path(directory)
        with optional_import():
            import tensorflow_datasets as tfds
        builder = _check(directory)
        try:
            # Raw records: TFDS's own decoder gives the same values (tested), several times slower.
            self._records = builder.as_data_source(
                "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
            lengths = builder.info.splits["train"].shard_lengths
            # Opening a shard checks its end, so a cut one is found now and not after an hour.
            self._records.__getitems__([sum(lengths[:shard]) for shard in range(len(lengths))])
        except Exception as error:  # ArrayRecord and TFDS raise what they like
            raise self._damaged(error) from error
        self.metadata = _read_metadata(self._directory)
        path = self._directory / SUMMARY
        self._stored = read_summary(path, len(self)) if os.path.lexists(path) else None

    @functools.cached_property
    def summary(self) -> RolloutSummary:
        """From the file that `write_rollouts` left; where there is none or an older one, all
        records are read once."""
        return RolloutSummary.of(self) if self._stored is None else self._stored

    def _damaged(self, error: Exception) -> UsageError:
        return UsageError(
            f"rollouts {self._directory}", f"a shard is damaged ({in_short(error)})", AGAIN
        )

    def _read(self, indices: Sequence[int]) -> list[Rollout]:
        """The rollouts of these numbers, all within the source, checked against the summary."""
        try:
            rollouts = [_decode(record) for record in self._records.__getitems__(list(indices))]
        except Exception as error:  # ArrayRecord and protocol buffers raise what they like
            raise self._damaged(error) from error
        for number, rollout in zip(indices, rollouts, strict=True) if self._stored else ():
            s = self._stored
            assert s is not None
            seen = (
                len(rollout.prompt_token_ids),
                len(rollout.output_token_ids),
                prompt_hash(rollout),
            )
            if seen != (s.prompt[number], s.output[number], s.prompt_hash[number]):
                raise UsageError(
                    f"rollouts {self._directory}",
                    f"rollout {number} is another than the one that {SUMMARY} was made from",
                    AGAIN,
                )
        return rollouts

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"rollout {index} of {len(self)}")
        return self._read([int(index) % len(self)])[0]

    def __iter__(self) -> Iterator[Rollout]:
        # records come much faster in batches; of 30,000 tokens each, these take some 50 MB
        block = 256
        for start in range(0, len(self), block):
            yield from self.__getitems__(range(start, min(start + block, len(self))))

    def __getitems__(self, indices: Sequence[int]) -> list[Rollout]:
        """Many at once, faster than one by one; the name is Grain's."""
        return self._read(indices)


class Selection(Sequence[Rollout]):
    """Some of the rollouts of a source, which are read as they are asked for.

    Attributes:
      summary: see `RolloutSummary`.

    Args:
      numbers: int64, which ones.
    """

    def __init__(self, source: Sequence[Rollout], numbers: np.ndarray):
        self._source, self._numbers, self.summary = (
            source,
            numbers,
            summary_of(source).select(numbers),
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        return self._source[int(self._numbers[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Rollout]:
        """Many at once, faster than one by one."""
        return read_items(self._source, [int(self._numbers[i]) for i in indices])


def read_items(rollouts: Sequence[Rollout], indices: Sequence[int]) -> list[Rollout]:
    """Some of the rollouts, at once where they can be."""
    return (
        rollouts.__getitems__(indices)
        if isinstance(rollouts, RolloutSource | Selection)
        else [rollouts[i] for i in indices]
    )


def summary_of(rollouts: Sequence[Rollout]) -> RolloutSummary:
    """The summary of rollouts, in memory or on disk."""
    return (
        rollouts.summary
        if isinstance(rollouts, RolloutSource | Selection)
        else RolloutSummary.of(rollouts)
    )


def read_rollouts(directory: str | pathlib.Path) -> list[Rollout]:
    """All rollouts of a directory in order. Raises `UsageError` as `RolloutSource`."""
    return list(RolloutSource(directory))


@functools.cache
def _example_type() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _decode(record: bytes) -> Rollout:
    features = _example_type().FromString(record).features.feature
    absent = {name: value for name, value in NEWER.items() if name not in features}
    fields: dict[str, Any] = {
        name: features[name].int64_list.value[0] for name in INTEGERS if name not in absent
    }
    fields |= absent | {
        name: features[name].bytes_list.value[0].decode("utf-8", "surrogatepass")
        for name in TEXTS
        if name not in absent
    }
    fields |= {name: np.array(features[name].int64_list.value, np.int32) for name in TOKENS}
    fields |= {name: features[name].float_list.value[0] for name in FLOATS}
    return Rollout(**fields, finished=bool(features["finished"].int64_list.value[0]))


def _check(directory: str | pathlib.Path) -> Any:
    """A read-only builder of a complete rollout dataset."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UsageError(
            f"rollouts {directory}",
            "there is no such directory",
            "run `zip-rc rollout` first, or correct the path",
        )
    missing = [
        name
        for name in ("dataset_info.json", "features.json", METADATA)
        if not (directory / name).is_file()
    ]
    if missing:
        raise UsageError(
            f"rollouts {directory}",
            f"it has no {', '.join(missing)}, so it is no (complete) rollout dataset",
            "write the rollouts again",
        )
    with optional_import():
        import tensorflow_datasets as tfds
    _check_digests(directory)
    try:
        builder = tfds.builder_from_directory(str(directory))
        shards = builder.info.splits["train"].filepaths
        names = set(builder.info.features)
    except Exception as error:  # TFDS raises what it likes about files it did not write
        raise UsageError(
            f"rollouts {directory}", f"TFDS cannot read it ({in_short(error)})", AGAIN
        ) from error
    expected = {field.name for field in dataclasses.fields(Rollout)}
    if not expected - {*NEWER} <= names <= expected:
        raise UsageError(
            f"rollouts {directory}",
            f"its records differ from rollouts in {sorted(names ^ expected)}",
            "pass a directory of rollouts",
        )
    absent = [path.name for path in shards if not path.exists()]
    if absent:
        raise UsageError(
            f"rollouts {directory}",
            f"shards are missing: {', '.join(absent)}",
            "write the rollouts again",
        )
    return builder


def _check_digests(directory: pathlib.Path) -> None:
    """Raises UsageError if a file beside the shards is not as it was written.

    Datasets of earlier versions have no digests.
    """
    path = directory / DIGESTS
    if not os.path.lexists(path):
        return
    digests = read_json(path, fix=AGAIN)
    if not isinstance(digests, dict):
        raise UsageError(
            f"file {path}", f"it holds a JSON {type(digests).__name__}, not an object", AGAIN
        )
    for name, digest in digests.items():
        file = directory / pathlib.Path(name).name
        if name == SUMMARY and not os.path.lexists(file):
            continue  # it is made again from the shards
        try:
            differs = _digest(file.read_bytes()) != digest
        except (OSError, ValueError) as error:
            raise UsageError(
                f"file {file}", f"it cannot be read ({in_short(error)})", AGAIN
            ) from error
        if differs:
            fix = f"restore it; or, if you changed it on purpose, delete {DIGESTS}; or {AGAIN}"
            raise UsageError(
                f"file {file}",
                f"it is not as it was written: its digest differs from that in {DIGESTS}",
                fix,
            )


_CHUNK = re.compile(r"chunk-([0-9]{8,})\.jsonl")


class PartialRollouts:
    """Finished chunks of a generation that may be interrupted.

    Each chunk is one JSONL file, complete or absent.

    The last line of a chunk has a digest of its rollouts, its number and the settings. A chunk
    without a last line counts as absent.

    Attributes:
      directory: where the chunks lie.

    Raises:
      UsageError: the directory holds chunks made with other settings (the message names those that
        differ), or is damaged.
    """

    def __init__(self, directory: str | pathlib.Path, *, fingerprint: dict[str, Any]):
        self.directory = pathlib.Path(directory)
        self._again = f"delete {self.directory.name} to start again"
        settings = self.directory / "fingerprint.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"partial rollouts {self.directory}",
                f"it cannot be made ({in_short(error)})",
                self._again,
            ) from error
        remove_leftovers(self.directory)
        refresh(settings)
        if os.path.lexists(settings):
            check_same_settings(
                f"partial rollouts {self.directory}",
                read_json(settings, fix=self._again),
                plain(fingerprint),
                fix=START_AGAIN,
            )
        elif any(self.directory.glob("chunk-*.jsonl")):
            raise UsageError(
                f"partial rollouts {self.directory}",
                "it has no fingerprint.json, so nobody knows what its chunks are of",
                self._again,
            )
        else:
            write_json(settings, fingerprint)
            # In a bucket the settings of the first machine decide.
            what = f"partial rollouts {self.directory}"
            check_first_settings(settings, fingerprint, what, START_AGAIN)
        self._fingerprint = json.dumps(fingerprint, sort_keys=True, default=str).encode()

    def done(self) -> set[int]:
        """Ids of the complete chunks; in a bucket, those of all machines.

        Raises UsageError where something else has the name of a chunk.
        """
        if copy := copy_of(self.directory):
            # Objects are complete or absent. Whoever joins them reads them, and nobody else.
            found = map(_CHUNK.fullmatch, copy.listed(self.directory))
            return {int(match[1]) for match in found if match}
        begun = {
            int(match[1])
            for path in self.directory.iterdir()
            if (match := _CHUNK.fullmatch(path.name))
        }
        return {chunk_id for chunk_id in begun if self._last_line(chunk_id) is not None}

    def has(self, chunk_id: int) -> bool:
        """Whether a chunk is complete. In a bucket its name is asked for, and nothing is listed."""
        if copy := copy_of(self.directory):
            return copy.exists(self._path(chunk_id))
        return self._path(chunk_id).exists() and self._last_line(chunk_id) is not None

    def add(self, chunk_id: int, rollouts: Iterable[Rollout]) -> None:
        """Stores a chunk; an existing one is replaced."""
        lines = [
            json.dumps(vars(rollout), default=lambda array: array.tolist()) + "\n"
            for rollout in rollouts
        ]
        hasher = self._hasher(chunk_id)
        for line in lines:
            hasher.update(line.encode())
        last = json.dumps({"rollouts": len(lines), "digest": hasher.hexdigest()})
        publish(write_text(self._path(chunk_id), "".join([*lines, last, "\n"])))

    def all(self, chunk_ids: Iterable[int] | None = None) -> Iterator[Rollout]:
        """The rollouts of all chunks, or of these, in the order of the chunk ids.

        Raises:
          UsageError: a chunk is damaged. Its rollouts may have been given before that is known.
        """
        wanted = sorted(self.done() if chunk_ids is None else chunk_ids)
        for number, chunk_id in enumerate(wanted):
            if number % 64 == 0 and (copy := copy_of(self.directory)):  # several at once
                copy.fetch(copy.name(self._path(x)) for x in wanted[number : number + 64])
            yield from self._read(chunk_id)

    def remove(self) -> None:
        """Deletes all of it: what it held has been written as a dataset."""
        if copy := copy_of(self.directory):
            copy.remove(self.directory)
        else:
            shutil.rmtree(self.directory)

    def _read(self, chunk_id: int) -> Iterator[Rollout]:
        path, hasher, count = self._path(chunk_id), self._hasher(chunk_id), 0
        fix = "delete this file; the same command then makes the chunk again"
        last = self._last_line(chunk_id)
        if last is None:
            raise UsageError(f"file {path}", "it is not complete", fix)
        try:
            with path.open("rb") as lines:
                for line in itertools.islice(lines, last["rollouts"]):
                    hasher.update(line)
                    yield Rollout(**json.loads(line))
                    count += 1
                rest = lines.read()
        except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
            raise UsageError(
                f"file {path}, line {count + 1}", f"it is damaged ({in_short(error)})", fix
            ) from error
        if hasher.hexdigest() != last["digest"] or rest.count(b"\n") != 1:
            raise UsageError(
                f"file {path}",
                "it is damaged: its rollouts do not fit the digest in its last line",
                fix,
            )

    def _last_line(self, chunk_id: int) -> dict[str, Any] | None:
        """`rollouts`, how many there are, and their `digest`; None if the chunk is not complete."""
        path = self._path(chunk_id)
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 256))
                end = file.read()
            if not end.endswith(b"\n"):
                return None
            line = parse_json(end[:-1].rpartition(b"\n")[2])
        except OSError as error:
            raise UsageError(
                f"file {path}",
                f"it cannot be read ({in_short(error)})",
                "delete it; the chunk is then made again",
            ) from error
        except (ValueError, RecursionError):
            return None
        right = (
            isinstance(line, dict)
            and isinstance(line.get("rollouts"), int)
            and isinstance(line.get("digest"), str)
        )
        return line if right else None

    def _hasher(self, chunk_id: int) -> Any:
        return hashlib.blake2b(b"%s %d\n" % (self._fingerprint, chunk_id), digest_size=16)

    def _path(self, chunk_id: int) -> pathlib.Path:
        return self.directory / f"chunk-{chunk_id:08d}.jsonl"
