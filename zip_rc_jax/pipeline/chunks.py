"""A dataset of rollouts made in chunks: finished ones survive an interruption, and several
processes share the others.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from zip_rc_jax.data.rollouts import PartialRollouts, Rollout, write_rollouts
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.signals import Interrupted, stop_signal
from zip_rc_jax.runtime.temporaries import remove_leftovers


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
    if distributed.is_primary():
        remove_leftovers(directory.parent, directory.name)
    partial = PartialRollouts(_partial(directory), fingerprint=settings | {"chunk_size": size})
    count, total = -(-len(items) // size), len(items) * each
    missing = sorted(set(range(count)) - partial.done())
    # all have seen the same chunks, and no dataset, before one of them adds any
    distributed.barrier()
    mine, before = distributed.share(missing), (count - len(missing)) * size * each
    with stop_signal() as received:
        with progress(title, total, min(before, total)) as bar:
            for done, number in enumerate(mine, 1):
                partial.add(number, make(items[number * size : (number + 1) * size]))
                # the others are about as far
                bar(min(before + done * len(missing) // len(mine) * size * each, total), None)
                if received:
                    raise Interrupted(f"{title}: stopped after {done} of {len(mine)} chunks")
        distributed.barrier()
        if distributed.is_primary():
            absent = sorted(set(range(count)) - partial.done())
            if absent:
                raise UsageError(
                    f"partial {directory.name} {partial.directory}",
                    f"chunks {absent[:5]} of {count} are not there, though every process made "
                    "its own",
                    "give all processes the same run_dir, on a file system that all of them see",
                )
            joined = f"{title}: stopped while its chunks were joined. All of them are kept"
            rollouts = _until_stopped(partial.all(range(count)), received, joined)
            write_rollouts(
                directory, _counted(rollouts, total, partial.directory), metadata=settings
            )
            partial.remove()
        distributed.barrier()
        if received:
            raise Interrupted(f"{title}: stopped. {directory} is finished")
    return directory


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
