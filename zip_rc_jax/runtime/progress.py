"""Progress bars with elapsed time and ETA on a terminal; now and then one line elsewhere (logs,
CI)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from zip_rc_jax.runtime.distributed import is_primary
from zip_rc_jax.runtime.progress_file import active

console = Console(stderr=True)
_LINE_SECONDS = 15.0


@contextlib.contextmanager
def progress(
    title: str,
    total: int | None,
    done: int = 0,
) -> Iterator[Callable[[int, str | None], None]]:
    """Yields `update(done, status)`; a status of None keeps the last one.

    Of several processes only the first shows anything. What it shows is recorded in the progress
    file of the stage, too (see `progress_file.recorded`).

    Args:
      total: None where it is not known; then there is no ETA.
    """
    if not is_primary():
        yield lambda now, status: None
        return
    file = active()
    if file is None:
        with _shown(title, total, done) as show:
            yield show
        return
    file.begin(title, total, done)

    def both(now: int, status: str | None) -> None:
        show(now, status)
        file.update(now, status)

    with _shown(title, total, done) as show:
        yield both


@contextlib.contextmanager
def _shown(title: str, total: int | None, done: int) -> Iterator[Callable[[int, str | None], None]]:
    """`progress` for the reader of the terminal or of the log."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=done, status="")

            def update(now: int, status: str | None) -> None:
                bar.update(task, completed=now)
                if status is not None:
                    bar.update(task, status=status)

            yield update
        return

    since, counted = time.monotonic(), done
    printed, first, last = since, True, ""

    def line(now: int, status: str | None) -> None:
        nonlocal since, counted, printed, first, last
        last = status if status is not None else last
        clock = time.monotonic()
        if clock - printed > _LINE_SECONDS or now == total:
            place = f"{now}"
            if total is not None:
                eta = (clock - since) / max(now - counted, 1) * (total - now)
                place = f"{now}/{total}  ETA {eta:.0f}s"
            console.print(f"{title} {place}  {last}", highlight=False, soft_wrap=True)
            printed = clock
        if first:  # what comes first also waits for compilation, and tells little about the rest
            since, counted, first = clock, now, False

    yield line
