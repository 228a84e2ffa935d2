"""What this process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # of malloc.h
# of a trim threshold; the largest one that can be said would still give back what is above 2 GiB
NEVER = -1
# a padding that no arena of a thread, which grows by 64 MiB, ever has to give back
ARENA_KEEPS = 128 * 2**20


def keep_freed_memory(one_arena: bool = False) -> bool:
    """Makes `malloc` keep what is freed, for the rest of the process, instead of giving it back to
    the kernel.

    On CPU, XLA takes the temporaries of every execution from `malloc`. glibc gives such large
    blocks back as soon as they are freed, and the next execution pays a page fault for every 4 KiB.
    With this call the process stays as large as at its peak, until `give_back_freed_memory`.
    Fragmentation may raise the peak a little.

    Threads keep the arenas that they have, and share them with later threads. So this comes before
    any import that starts threads (of pyarrow, torch). It concerns the whole process: programs call
    it, and the library itself never does.

    Args:
      one_arena: all threads share one arena. Without it, blocks above 64 MiB that a thread takes
        are given back all the same; with it, threads wait for each other at every small block.
        Training wants it, with its large temporaries in every step; decoding, which is many small
        operations, does not.

    Returns:
      False, with nothing changed, where `malloc` is not glibc's or the environment sets it up
      (`GLIBC_TUNABLES` or a variable that begins with `MALLOC_`).
    """
    if sys.platform != "linux" or any(
        name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ
    ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    threads = (M_ARENA_MAX, 1) if one_arena else (M_TOP_PAD, ARENA_KEEPS)
    return all(
        libc.mallopt(option, value)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), threads)
    )


def give_back_freed_memory() -> None:
    """Gives the kernel what `malloc` has kept so far.

    Nothing happens where `malloc` is not glibc's.

    For moments when memory is wanted for something else, such as the copies of the train state that
    a checkpoint makes: what threads have kept in their arenas is of no use to others, and would
      come on top. It takes tenths of a second, page faults included.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
