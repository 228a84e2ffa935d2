"""Rollouts on disk: a TFDS dataset in ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from zip_rc_jax.data.summary import RolloutSummary, SummaryRows, read_summary, write_summary
from zip_rc_jax.errors import UsageError
from zip_rc_jax.run_files import same_fingerprint, temporary_sibling, write_json, write_text

FORMAT_VERSION = "1.0.0"
METADATA = "metadata.json"
SUMMARY = "summary.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response.

    Attributes:
      prompt_index: number of the problem within its split; rollouts of one prompt share it.
      sample_index: number of the sample within the prompt.
      level, seed, task, question, answer, entry_json: see `tasks.Problem`.
      prompt: chat-templated text, exactly what was tokenised.
      prompt_token_ids: int32 `[p]`.
      output_token_ids: int32 `[m]`, generated tokens; the end-of-sequence token is the last one when `finished`.
      response: decoded output without special tokens.
      finished: False when the token limit cut it off (its length is then right-censored).
      correct: grade in [0, 1]; NaN = not graded.
      value: critic's label in [0, 1]; NaN = not labelled. Both are stored as float32.
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

    def __post_init__(self) -> None:
        for field in ("prompt_token_ids", "output_token_ids"):
            object.__setattr__(self, field, np.asarray(getattr(self, field), np.int32))


_INTEGERS = ("prompt_index", "sample_index", "level", "seed")
_TEXTS = ("task", "prompt", "question", "answer", "entry_json", "response")
_TOKENS = ("prompt_token_ids", "output_token_ids")
_FLOATS = ("correct", "value")


class _SameBytes(tfds.core.ExampleWriter):
    """Equal rollouts become equal bytes. Protocol buffers write a map in another order in every process, unless told otherwise."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        parse = tf_example_pb2.Example.FromString
        return super().write(path, ((key, parse(record).SerializeToString(deterministic=True)) for key, record in examples))


class ZipRollouts(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of rollout records; `write_rollouts` drives it. One split, "train", in the order given."""

    VERSION = tfds.core.Version(FORMAT_VERSION)
    # Where TFDS looks for checksum files. Its own property needs importlib_resources, which it no longer installs.
    code_path = epath.Path(__file__)

    def __init__(self, *, rollouts: Iterable[Rollout] = (), **kwargs: Any):
        self._rollouts = rollouts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="On-policy rollouts with labels for ZIP-RC training.",
            features=tfds.features.FeaturesDict(
                dict.fromkeys(_INTEGERS, np.int64)
                | {name: tfds.features.Text() for name in _TEXTS}
                | {name: tfds.features.Tensor(shape=(None,), dtype=np.int32) for name in _TOKENS}
                | dict.fromkeys(_FLOATS, np.float32)
                | {"finished": np.bool_}
            ),
            disable_shuffling=True,
        )

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _SameBytes(file_format=self.info.file_format)

    def _log_download_bytes(self) -> None:
        """Silences TFDS's banner: nothing is downloaded."""

    _log_download_done = _log_download_bytes

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, rollout in enumerate(self._rollouts):
            # "surrogatepass": JSON input may hold half a surrogate pair, which plain UTF-8 refuses.
            texts = {name: getattr(rollout, name).encode("utf-8", "surrogatepass") for name in _TEXTS}
            yield key, vars(rollout) | texts


def write_rollouts(directory: str | pathlib.Path, rollouts: Iterable[Rollout], *, metadata: dict[str, Any]) -> None:
    """Writes a dataset, with `metadata.json` and `summary.npz` beside its shards, in the order given.

    Everything goes to a temporary sibling first, which is then renamed, so `directory` is complete or absent. An earlier rollout
    dataset in its place is replaced only then (so `rollouts` may be read lazily from it).

    Raises:
      UsageError: no rollouts, or `directory` holds something else.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not (directory / METADATA).is_file() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            f"directory {directory}", "it exists and is not a rollout dataset, so it is not overwritten", "choose another path"
        )
    iterator = iter(rollouts)
    first = next(iterator, None)
    if first is None:
        raise UsageError(f"rollouts for {directory}", "there are none", "generate at least one rollout")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(directory)
    try:
        rows = SummaryRows()
        builder = ZipRollouts(rollouts=map(rows.add, itertools.chain([first], iterator)), data_dir=temporary, file_format="array_record")
        tfds.disable_progress_bar()
        builder.download_and_prepare(
            download_dir=temporary / "downloads", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
        written = pathlib.Path(builder.data_dir)
        (written / METADATA).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_summary(written / SUMMARY, rows.summary())
        if directory.exists():
            directory.rename(temporary / "replaced")
        written.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_metadata(directory: str | pathlib.Path) -> dict[str, Any]:
    """The metadata given to `write_rollouts`. Raises `UsageError` for a directory that is not a complete rollout dataset."""
    _check(directory)
    return json.loads((pathlib.Path(directory) / METADATA).read_text(encoding="utf-8"))


class RolloutSource(Sequence[Rollout]):
    """Random access to the rollouts of a directory, as Grain wants it: `len` and `[index]`; reads records lazily.

    Attributes:
      metadata: see `write_rollouts`.
      summary: see `RolloutSummary`.

    Raises:
      UsageError: a missing, half-written or foreign directory.
    """

    def __init__(self, directory: str | pathlib.Path):
        builder = _check(directory)
        # Raw records: TFDS's own decoder gives the same values (tested), several times slower.
        self._records = builder.as_data_source("train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        lengths = builder.info.splits["train"].shard_lengths
        try:  # opening a shard checks its end, so a cut one is found now and not after an hour
            self._records.__getitems__([sum(lengths[:shard]) for shard in range(len(lengths))])
        except (RuntimeError, IndexError) as error:
            raise UsageError(f"rollouts {directory}", f"a shard is damaged ({error})", "write the rollouts again") from error
        self.metadata = read_metadata(directory)
        self._directory = pathlib.Path(directory)

    @functools.cached_property
    def summary(self) -> RolloutSummary:
        """From the file that `write_rollouts` left; where there is none or an older one, all records are read once."""
        path = self._directory / SUMMARY
        stored = read_summary(path, len(self)) if path.is_file() else None
        return RolloutSummary.of(self) if stored is None else stored

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"rollout {index} of {len(self)}")
        return _decode(self._records[int(index) % len(self)])

    def __iter__(self) -> Iterator[Rollout]:
        block = 256  # records come much faster in batches; of 30,000 tokens each, these take some 50 MB
        for start in range(0, len(self), block):
            yield from self.__getitems__(range(start, min(start + block, len(self))))

    def __getitems__(self, indices: Sequence[int]) -> list[Rollout]:
        """Many at once, faster than one by one; the name is Grain's."""
        return [_decode(record) for record in self._records.__getitems__(list(indices))]


class Selection(Sequence[Rollout]):
    """Some of the rollouts of a source, which are read as they are asked for.

    Attributes:
      summary: see `RolloutSummary`.

    Args:
      numbers: int64, which ones.
    """

    def __init__(self, source: Sequence[Rollout], numbers: np.ndarray):
        self._source, self._numbers, self.summary = source, numbers, summary_of(source).select(numbers)

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
    return rollouts.__getitems__(indices) if isinstance(rollouts, RolloutSource | Selection) else [rollouts[i] for i in indices]


def summary_of(rollouts: Sequence[Rollout]) -> RolloutSummary:
    """The summary of rollouts, in memory or on disk."""
    return rollouts.summary if isinstance(rollouts, RolloutSource | Selection) else RolloutSummary.of(rollouts)


def read_rollouts(directory: str | pathlib.Path) -> list[Rollout]:
    """All rollouts of a directory in order. Raises `UsageError` as `RolloutSource`."""
    return list(RolloutSource(directory))


def _decode(record: bytes) -> Rollout:
    features = tf_example_pb2.Example.FromString(record).features.feature
    fields: dict[str, Any] = {name: features[name].int64_list.value[0] for name in _INTEGERS}
    fields |= {name: features[name].bytes_list.value[0].decode("utf-8", "surrogatepass") for name in _TEXTS}
    fields |= {name: np.array(features[name].int64_list.value, np.int32) for name in _TOKENS}
    fields |= {name: features[name].float_list.value[0] for name in _FLOATS}
    return Rollout(**fields, finished=bool(features["finished"].int64_list.value[0]))


def _check(directory: str | pathlib.Path) -> Any:
    """A read-only builder of a complete rollout dataset."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UsageError(f"rollouts {directory}", "there is no such directory", "run `zip-rc rollout` first, or correct the path")
    missing = [name for name in ("dataset_info.json", "features.json", METADATA) if not (directory / name).is_file()]
    if missing:
        raise UsageError(
            f"rollouts {directory}", f"it has no {', '.join(missing)}, so it is no (complete) rollout dataset", "write the rollouts again"
        )
    try:
        builder = tfds.builder_from_directory(str(directory))
        shards = builder.info.splits["train"].filepaths
        names = set(builder.info.features)
    except Exception as error:  # TFDS raises what it likes about files it did not write
        raise UsageError(f"rollouts {directory}", f"TFDS cannot read it ({error})", "write the rollouts again") from error
    expected = {field.name for field in dataclasses.fields(Rollout)}
    if names != expected:
        raise UsageError(
            f"rollouts {directory}", f"its records differ from rollouts in {sorted(names ^ expected)}", "pass a directory of rollouts"
        )
    absent = [path.name for path in shards if not path.exists()]
    if absent:
        raise UsageError(f"rollouts {directory}", f"shards are missing: {', '.join(absent)}", "write the rollouts again")
    return builder


class PartialRollouts:
    """Finished chunks of a generation that may be interrupted. Each chunk is one JSONL file, complete or absent.

    Attributes:
      directory: where the chunks lie.

    Raises:
      UsageError: the directory holds chunks made with other settings; the message names those that differ.
    """

    def __init__(self, directory: str | pathlib.Path, *, fingerprint: dict[str, Any]):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        settings = self.directory / "fingerprint.json"
        if settings.is_file():
            same_fingerprint(f"partial rollouts {self.directory}", json.loads(settings.read_text(encoding="utf-8")), fingerprint)
        else:
            write_json(settings, fingerprint)

    def done(self) -> set[int]:
        """Ids of the complete chunks."""
        return {int(path.stem.removeprefix("chunk-")) for path in self.directory.glob("chunk-*.jsonl")}

    def add(self, chunk_id: int, rollouts: Iterable[Rollout]) -> None:
        """Stores a chunk; an existing one is replaced."""
        lines = [json.dumps(vars(rollout), default=lambda array: array.tolist()) + "\n" for rollout in rollouts]
        write_text(self._path(chunk_id), "".join(lines))

    def all(self) -> Iterator[Rollout]:
        """The rollouts of all chunks, in the order of the chunk ids."""
        for chunk_id in sorted(self.done()):
            with self._path(chunk_id).open(encoding="utf-8") as lines:
                yield from (Rollout(**json.loads(line)) for line in lines)

    def remove(self) -> None:
        """Deletes all of it: what it held has been written as a dataset."""
        shutil.rmtree(self.directory)

    def _path(self, chunk_id: int) -> pathlib.Path:
        return self.directory / f"chunk-{chunk_id:08d}.jsonl"
