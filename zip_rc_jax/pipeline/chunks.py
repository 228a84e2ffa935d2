"""A dataset of rollouts made in chunks: finished ones survive an interruption, and several
processes share the others.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from zip_rc_jax.data.rollouts import PartialRollouts, Rollout, write_rollouts
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.claims import Claims
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.signals import Interrupted, stop_signal
from zip_rc_jax.runtime.temporaries import remove_leftovers
from zip_rc_jax.runtime.working_copy import MARKER, WorkingCopy, copy_of, publish, refresh

CLAIMS = ".claims"
WAIT_SECONDS = 2.0  # between looks at what other machines have finished


def write_in_chunks(
    title: str,
    directory: pathlib.Path,
    settings: dict[str, Any],
    items: Sequence[Any],
    size: int,
    make: Callable[[Any], list[Rollout]],
    *,
    each: int = 1,
) -> pathlib.Path:
    """The dataset `directory`, made of `items` in chunks of `size`, which survive an interruption
    and which several processes share.

    Processes that know each other (`jax.distributed`) divide the chunks beforehand. In a bucket,
    commands on any machines at any time claim them one by one, see `_claimed`.

    Args:
      title: of the progress bar.
      settings: what decides the rollouts; the metadata of the dataset.
      make: the rollouts of a chunk, `each` of every item.

    Returns:
      `directory`.

    Raises:
      UsageError: the chunks there were made with other settings, one is damaged, they hold too many
        or too few rollouts, or other processes left none of theirs here.
      Interrupted: a signal to stop came: after the chunk in hand, or at once while the chunks are
        joined. All finished chunks are kept.
    """
    if isinstance(together, _Server):
        together.serve(Work(title, directory, settings, items, size, make, each))
    if distributed.is_primary():
        remove_leftovers(directory.parent, directory.name)
    partial = PartialRollouts(_partial(directory), fingerprint=settings | {"chunk_size": size})
    work = Work(title, directory, settings, items, size, make, each, partial)
    if isinstance(together, _Driver):
        return _make_by_fleet(work, together)
    copy = copy_of(directory)
    if copy is not None and not distributed.is_multiprocess():
        with Claims(copy.bucket, f"{CLAIMS}/{directory.name}") as claims:
            return _make_by_claims(work, claims, copy)
    missing = sorted(set(range(work.count)) - partial.done())
    # all have seen the same chunks, and no dataset, before one of them adds any
    distributed.barrier()
    mine, before = distributed.share(missing), (work.count - len(missing)) * size * each
    with stop_signal() as received:
        with progress(title, work.total, min(before, work.total)) as bar:
            for done, number in enumerate(mine, 1):
                work.make_chunk(number)
                # the others are about as far
                made = before + done * len(missing) // len(mine) * size * each
                bar(min(made, work.total), None)
                if received:
                    raise Interrupted(f"{title}: stopped after {done} of {len(mine)} chunks")
        distributed.barrier()
        if distributed.is_primary():
            absent = sorted(set(range(work.count)) - partial.done())
            if absent:
                raise UsageError(
                    f"partial {directory.name} {partial.directory}",
                    f"chunks {absent[:5]} of {work.count} are not there, though every process "
                    "made its own",
                    "give all processes the same run_dir, on a file system that all of them see",
                )
            work.join(received)
        distributed.barrier()
        if received:
            raise Interrupted(f"{title}: stopped. {directory} is finished")
    return directory


@runtime_checkable
class _Server(Protocol):
    """A worker of a fleet (see `fleet.Worker`)."""

    def serve(self, work: Work) -> None: ...


@runtime_checkable
class _Driver(Protocol):
    """The driver of a fleet (see `fleet.Fleet`)."""

    def hand_out(
        self, work: Work, received: Sequence[int], bar: Callable[[int, str | None], None]
    ) -> None: ...


# What makes the chunks of this process, if not the process itself.
together: _Server | _Driver | None = None


def is_worker() -> bool:
    """Whether this process makes chunks for the driver of a fleet."""
    return isinstance(together, _Server)


def _make_by_fleet(work: Work, driver: _Driver) -> pathlib.Path:
    """The dataset, whose chunks other machines make and this process stores."""
    from zip_rc_jax.pipeline.fleet import alone

    title = work.title
    with stop_signal() as received, alone(work):
        before = min(len(work.partial.done()) * work.size * work.each, work.total)
        with progress(title, work.total, before) as bar:
            driver.hand_out(work, received, bar)
            if received:
                there = len(work.partial.done())
                raise Interrupted(f"{title}: stopped with {there} of {work.count} chunks")
        work.join(received)
        if received:
            raise Interrupted(f"{title}: stopped. {work.directory} is finished")
    return work.directory


@dataclasses.dataclass(frozen=True)
class Work:
    """What `write_in_chunks` was asked for, and where its chunks lie."""

    title: str
    directory: pathlib.Path
    settings: dict[str, Any]
    items: Sequence[Any]
    size: int
    make: Callable[[Any], list[Rollout]]
    each: int
    stored: PartialRollouts | None = None

    @property
    def partial(self) -> PartialRollouts:
        assert self.stored is not None
        return self.stored

    @property
    def count(self) -> int:
        """Of the chunks."""
        return -(-len(self.items) // self.size)

    @property
    def total(self) -> int:
        """Of the rollouts."""
        return len(self.items) * self.each

    def made(self, number: int) -> list[Rollout]:
        """The rollouts of a chunk, which are stored nowhere."""
        return self.make(self.items[number * self.size : (number + 1) * self.size])

    def make_chunk(self, number: int) -> None:
        self.partial.add(number, self.made(number))

    def join(self, received: Sequence[int]) -> None:
        """Makes the dataset of all chunks, and removes them."""
        joined = f"{self.title}: stopped while its chunks were joined. All of them are kept"
        rollouts = _until_stopped(self.partial.all(range(self.count)), received, joined)
        counted = _counted(rollouts, self.total, self.partial.directory)
        write_rollouts(self.directory, counted, metadata=self.settings)
        publish(self.directory)  # before anything is removed
        self.partial.remove()


def _make_by_claims(work: Work, claims: Claims, copy: WorkingCopy) -> pathlib.Path:
    """The dataset, of whose chunks other machines may make any."""
    title, directory = work.title, work.directory

    def is_finished() -> bool:
        """Whether a machine has joined the chunks. It publishes the dataset, and only then removes
        chunks and claims: who misses one of these and asks this afterwards knows why."""
        return copy.exists(directory / MARKER)

    with stop_signal() as received:
        made, before = 0, len(work.partial.done())
        with progress(title, work.total, min(before * work.size * work.each, work.total)) as bar:
            for number in _claimed(work, claims, received, is_finished):
                work.make_chunk(number)
                made += 1
                there = len(work.partial.done())
                bar(min(there * work.size * work.each, work.total), f"{made} chunks here")
            if received:
                raise Interrupted(f"{title}: stopped after {made} chunks of its own")
        # One machine joins them; the others wait for what it publishes.
        while not claims.take("join") and not is_finished():
            if received:
                raise Interrupted(f"{title}: stopped while another machine joined the chunks")
            time.sleep(WAIT_SECONDS)
        if is_finished():
            refresh(directory)
            copy.remove(work.partial.directory)  # it may have been begun anew
        else:
            work.join(received)
            copy.bucket.delete(copy.bucket.names(claims.folder))
        if received:
            raise Interrupted(f"{title}: stopped. {directory} is finished")
    return directory


def _claimed(
    work: Work, claims: Claims, received: Sequence[int], is_finished: Callable[[], bool]
) -> Iterator[int]:
    """Numbers of the chunks that this process is to make, until all of them are there.

    A chunk that a living process has claimed is left to it. When nothing else is left, it waits
    for those, and takes over the chunks of processes that died.
    """
    first = int(claims.id, 16) % max(1, work.count)  # so that few processes want the same one
    while not received:
        done = work.partial.done()
        missing = [n for n in range(work.count) if n not in done]
        taken = False
        for number in sorted(missing, key=lambda n: (n - first) % work.count):
            if received:
                return
            if claims.take(f"{number:08d}") and not work.partial.has(number):
                if is_finished():
                    return
                taken = True
                yield number
        # A listing may lag, so each of those that others make is asked for.
        if not taken:
            if is_finished() or all(work.partial.has(number) for number in missing):
                return
            time.sleep(WAIT_SECONDS)


def remove_remains(directory: pathlib.Path) -> None:
    """Removes what a process that was killed at its very end left beside its finished dataset."""
    remove_leftovers(directory.parent, directory.name)
    shutil.rmtree(_partial(directory), ignore_errors=True)


def _partial(directory: pathlib.Path) -> pathlib.Path:
    return directory.with_name(f".{directory.name}.partial")


def _until_stopped(
    rollouts: Iterable[Rollout], received: Sequence[int], message: str
) -> Iterator[Rollout]:
    """Raises Interrupted as soon as a signal was received."""
    for rollout in rollouts:
        if received:
            raise Interrupted(message)
        yield rollout


def _counted(rollouts: Iterable[Rollout], count: int, where: pathlib.Path) -> Iterator[Rollout]:
    """Raises UsageError after the last one if there were not `count` of them."""
    found = 0
    for rollout in rollouts:
        found += 1
        yield rollout
    if found != count:
        raise UsageError(
            f"chunks in {where}",
            f"they hold {found} rollouts, and {count} were asked for",
            "delete them to start again",
        )
