"""A pool of full samples on disk, with what the head says along each: decode once, replay the rest.

A pool is a directory of ArrayRecord files, one record per sample, with `metadata.json` and
`digests.json` beside them, and `readings.npz` with what forwards over finished samples said. It is
complete or absent. While it is made, its finished files lie in a hidden sibling and survive an
interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.storage import (
    START_AGAIN,
    in_short,
    plain,
    read_json,
    write_bytes,
    write_json,
)
from zip_rc_jax.runtime.temporaries import remove_leftovers, temporary_path
from zip_rc_jax.runtime.working_copy import publish

METADATA, DIGESTS, FINGERPRINT = "metadata.json", "digests.json", "fingerprint.json"
READINGS = "readings.npz"
FORMAT = 2
READ = (1, 2)  # the first had no readings, and one try
AGAIN = "delete the directory, and `zip-rc replay` makes it again"
_FILE = re.compile(r"samples-([0-9]{6,})\.array_record")
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}


def packed(joints: np.ndarray, kind: str) -> np.ndarray:
    """Joints `[..., C]` float32 as they are stored.

    "uint8" rounds the square root to 255 levels: small probabilities keep more of their digits than
    in a linear scale.
    """
    if kind == "uint8":
        return np.rint(255 * np.sqrt(np.clip(joints, 0, 1))).astype(np.uint8)
    return np.asarray(joints, STORED[kind])


def unpacked(stored: np.ndarray, kind: str) -> np.ndarray:
    """Joints `[..., C]` float32; those of "uint8" sum to 1 again."""
    if kind != "uint8":
        return np.asarray(stored, np.float32)
    found = np.square(stored.astype(np.float32))
    return found / np.maximum(found.sum(-1, keepdims=True), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class PoolSample:
    """One full sample of `T` tokens.

    Joint number `t` is what the head says after `t` tokens; there are `T`, since that after the
    last token is never read. `S` is the pool's stride, `C` the cells of the grid.

    Attributes:
      prompt_index, sample_index: which row, and which of its samples. A row is a problem, or one of
        its tries, which follow each other. The decoder draws sample `i` of any n the same way.
      prompt_hash: 32 bits of the prompt's tokens, as in the decoder's randomness.
      level, question, reference: of the problem; `reference` is its answer.
      text: decoded, cut before the stop string that ended it.
      answer_id: equal for equal answers of one problem; -1 without any.
      separable: no two answers of the problem with other ids are equal, so that any subset of its
        samples is grouped by `answer_id`.
      stopped: ended by itself, not by `max_tokens`.
      correct: grade in [0, 1], whatever ended it.
      value: expected reward at the end: of the mean joint over the last `window` tokens.
      computed: tokens that were computed for it. More than `T` where a stop string ended it in the
        middle of an interval.
      token_ids: int32 `[T]`.
      logprobs: float32 `[T]`, see `Prefix.logprobs`.
      rewards: float32 `[T]`, expected reward of joints 0 to T-1. The value of any window is their
        mean over it.
      root: `[C]`, joint number 0.
      joints: `[(T-1) // S, C]`, what the decoder decided on at S, 2S, ... tokens: the mean over
        the last `window` joints, as its own program computed it.
      end: `[C]`, the same at the end.
      blocks: `[(T-1) // S, C]`, means of joints 1..S, S+1..2S, ...
      tail: `[ceil(T / S), C]`, means of joints T-S..T-1, T-2S..T-S-1, ...; the last one is of
        those that are left.
    """

    prompt_index: int
    sample_index: int
    prompt_hash: int
    level: int
    question: str
    reference: str
    text: str
    answer_id: int
    separable: bool
    stopped: bool
    correct: float
    value: float
    computed: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    rewards: np.ndarray
    root: np.ndarray
    joints: np.ndarray
    end: np.ndarray
    blocks: np.ndarray
    tail: np.ndarray


JOINTS = ("root", "joints", "end", "blocks", "tail")
ARRAYS = ("token_ids", "logprobs", "rewards", *JOINTS)


def block_means(joints: np.ndarray, stride: int) -> np.ndarray:
    """`PoolSample.blocks` of joints 0 to T-1, `[T, C]`."""
    count = (len(joints) - 1) // stride
    whole = joints[1 : 1 + count * stride].reshape(count, stride, joints.shape[-1])
    return whole.mean(1, dtype=np.float64).astype(np.float32)


def tail_means(joints: np.ndarray, stride: int) -> np.ndarray:
    """`PoolSample.tail` of joints 0 to T-1, `[T, C]`."""
    ends = range(len(joints), 0, -stride)
    means = [joints[max(0, end - stride) : end].mean(0, dtype=np.float64) for end in ends]
    return np.stack(means).astype(np.float32)


# ---- records


def encode(sample: PoolSample) -> bytes:
    """A record: its header's length, a JSON header, and the arrays one after the other."""
    arrays = {name: np.ascontiguousarray(getattr(sample, name)) for name in ARRAYS}
    header: dict[str, Any] = {
        f.name: getattr(sample, f.name) for f in dataclasses.fields(sample) if f.name not in ARRAYS
    }
    header["arrays"] = {name: [a.dtype.name, list(a.shape)] for name, a in arrays.items()}
    text = json.dumps(header).encode()
    return b"".join(
        [len(text).to_bytes(4, "little"), text, *(a.tobytes() for a in arrays.values())]
    )


def decode(record: bytes, names: Sequence[str] = ARRAYS) -> dict[str, Any]:
    """The fields of a record, of the arrays those in `names`.

    They are views of the record.
    """
    start = 4 + int.from_bytes(record[:4], "little")
    fields = json.loads(record[4:start])
    for name, (dtype, shape) in fields.pop("arrays").items():
        kind = np.dtype(STORED.get(dtype, dtype))
        count = int(np.prod(shape, dtype=np.int64))
        if name in names:
            fields[name] = np.frombuffer(record, kind, count, start).reshape(shape)
        start += count * kind.itemsize
    if start != len(record):
        raise ValueError(f"a record has {len(record)} bytes, and its header tells of {start}")
    return fields


def _digest(path: pathlib.Path) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            hasher.update(data)
    return hasher.hexdigest()


# ---- writing


class PartialPool:
    """The finished files of a pool that is being made.

    Raises:
      UsageError: those there were made with other settings (the message names them), or nobody
        knows with which.
    """

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any]):
        """Args: `directory` of the pool; `settings` that decide its samples."""
        self.directory = directory
        self.partial = directory.with_name(f".{directory.name}.partial")
        self.settings = plain(settings)
        self.partial.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.partial)
        remove_leftovers(directory.parent, directory.name)
        path = self.partial / FINGERPRINT
        again = f"delete {self.partial.name} to start again"
        if os.path.lexists(path):
            stored = read_json(path, fix=again)
            check_same_settings(f"partial pool {self.partial}", stored, settings, fix=START_AGAIN)
        elif any(self.partial.iterdir()):
            reason = f"it has no {FINGERPRINT}, so nobody knows what its files are of"
            raise UsageError(f"partial pool {self.partial}", reason, again)
        else:
            write_json(path, self.settings)

    def done(self) -> set[int]:
        """Numbers of the finished files."""
        found = (_FILE.fullmatch(path.name) for path in self.partial.iterdir())
        numbers = {int(match[1]) for match in found if match}
        return {number for number in numbers if self._note(number).is_file()}

    def add(self, number: int, samples: Iterable[PoolSample]) -> None:
        """Writes a file, complete or not at all."""
        with optional_import():
            from array_record.python.array_record_module import ArrayRecordWriter
        path = self._path(number)
        temporary = temporary_path(path)
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            count = 0
            for sample in samples:
                writer.write(encode(sample))
                count += 1
            writer.close()
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut may leave an empty file
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        # A file without this note counts as absent.
        note = write_json(self._note(number), {"digest": _digest(path), "samples": count})
        publish(path)
        publish(note)  # last

    def records(self, count: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The fields of the samples of files 0 to `count - 1` in order, see `PoolFiles.records`."""
        for number in range(count):
            fix = (
                f"delete {self._note(number).name} beside it; the same command then makes it again"
            )
            yield from _records(self._path(number), names, fix)

    def finish(
        self,
        count: int,
        samples: int,
        metadata: dict[str, Any],
        readings: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Makes the pool of files 0 to `count - 1`, which hold `samples` samples together.

        Args:
          readings: arrays of `readings.npz`.

        Raises:
          UsageError: a file is damaged or missing.
        """
        digests, found = {}, 0
        for number in range(count):
            path, note = self._path(number), self._note(number)
            fix = f"delete {note.name} beside it; the same command then makes it again"
            kept = read_json(note, fix=fix)
            try:
                right = kept["digest"] == _digest(path)
                digests[path.name], found = kept["digest"], found + kept["samples"]
            except (OSError, KeyError, TypeError) as error:
                raise UsageError(
                    f"file {path}", f"it is damaged ({in_short(error)})", fix
                ) from None
            if not right:
                raise UsageError(f"file {path}", "it is not as it was written", fix)
        if found != samples:
            reason = f"its files hold {found} samples, and {samples} were asked for"
            raise UsageError(f"partial pool {self.partial}", reason, "delete it to start again")
        write_json(
            self.partial / METADATA, metadata | {"format": FORMAT, "settings": self.settings}
        )
        digests[METADATA] = _digest(self.partial / METADATA)
        if readings:
            held = io.BytesIO()
            np.savez(held, allow_pickle=False, **readings)
            write_bytes(self.partial / READINGS, held.getvalue())
            digests[READINGS] = _digest(self.partial / READINGS)
        write_json(self.partial / DIGESTS, digests)
        self.partial.rename(self.directory)
        # Now it is complete; what told of its making is of no use any more.
        for name in (FINGERPRINT, *(self._note(number).name for number in range(count))):
            self.directory.joinpath(name).unlink(missing_ok=True)

    def _path(self, number: int) -> pathlib.Path:
        return self.partial / f"samples-{number:06d}.array_record"

    def _note(self, number: int) -> pathlib.Path:
        return self.partial / f"samples-{number:06d}.json"


# ---- reading


class PoolFiles:
    """A finished pool.

    Attributes:
      metadata: what was written beside the samples; `settings` in it are those that decided them.

    Raises:
      UsageError: there is none, or it is damaged.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        what = f"pool {self.directory}"
        if not self.directory.is_dir():
            fix = "run `zip-rc replay`, which makes it, or correct the path"
            raise UsageError(what, "there is no such directory", fix)
        if not (self.directory / METADATA).is_file():
            raise UsageError(what, f"it has no {METADATA}, so it is no pool", AGAIN)
        digests = read_json(self.directory / DIGESTS, fix=AGAIN)
        if not isinstance(digests, dict) or METADATA not in digests:
            raise UsageError(f"file {self.directory / DIGESTS}", "it holds no digests", AGAIN)
        self._digests: dict[str, Any] = digests
        self._check(METADATA)
        self.metadata: dict[str, Any] = read_json(self.directory / METADATA, fix=AGAIN)
        if self.metadata.get("format") not in READ:
            reason = f"its format is {self.metadata.get('format')}, and this version reads {FORMAT}"
            raise UsageError(what, reason, AGAIN)
        self.files = sorted(name for name in digests if _FILE.fullmatch(name))

    def _check(self, name: str) -> None:
        path = self.directory / name
        try:
            differs = _digest(path) != self._digests[name]
        except OSError as error:
            raise UsageError(
                f"file {path}", f"it cannot be read ({in_short(error)})", AGAIN
            ) from None
        if differs:
            reason = f"it is not as it was written: its digest differs from that in {DIGESTS}"
            raise UsageError(f"file {path}", reason, AGAIN)

    def records(self, names: Sequence[str] = ARRAYS) -> Iterator[dict[str, Any]]:
        """The fields of all samples in order, of the arrays those in `names`, as they are stored.

        Raises UsageError for a damaged file.
        """
        for name in self.files:
            self._check(name)
            yield from _records(self.directory / name, names, AGAIN)

    def readings(self) -> dict[str, np.ndarray]:
        """The arrays of `readings.npz`; {} where there is none. Raises UsageError if damaged."""
        if READINGS not in self._digests:
            return {}
        self._check(READINGS)
        with np.load(self.directory / READINGS, allow_pickle=False) as found:
            return dict(found)

    def __iter__(self) -> Iterator[PoolSample]:
        """All samples in order, joints as float32."""
        kind = self.metadata["joints"]
        for fields in self.records():
            joints = {name: unpacked(fields[name], kind) for name in JOINTS}
            yield PoolSample(**fields | joints)


def _records(path: pathlib.Path, names: Sequence[str], fix: str) -> Iterator[dict[str, Any]]:
    """The fields of all samples of one file. Raises UsageError if it is damaged."""
    with optional_import():
        from array_record.python.array_record_module import ArrayRecordReader
    try:
        reader = ArrayRecordReader(str(path))
        for record in reader.read_all():
            yield decode(record, names)
        reader.close()
    except UsageError:
        raise
    except Exception as error:  # ArrayRecord raises what it likes
        reason = f"it is damaged ({in_short(error)})"
        raise UsageError(f"file {path}", reason, fix) from error


def remove_partial(directory: pathlib.Path) -> None:
    """Removes what an interruption left beside a finished pool."""
    remove_leftovers(directory.parent, directory.name)
    shutil.rmtree(directory.with_name(f".{directory.name}.partial"), ignore_errors=True)
