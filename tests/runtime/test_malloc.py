"""Memory that is freed stays in the process where a program asks for it, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zip_rc_jax.runtime import malloc

# Prints whether freed memory is kept, and the page faults of an execution with temporaries of a
# size. The least of seven, because something small may come to lie where they were, and they then
# need another place.
PROGRAM = """
import ctypes, resource, sys

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be a single fault
import jax, jax.numpy as jnp
import zip_rc_jax
from zip_rc_jax.runtime.malloc import keep_freed_memory

kept = {"one arena": lambda: keep_freed_memory(one_arena=True), "keep": keep_freed_memory}.get(sys.argv[1], lambda: None)()
square = jax.jit(lambda a: (a @ a.T) @ a)
a = jnp.ones((int(sys.argv[2]), 8))
faults = []
for _ in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    square(a).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""  # noqa: E501
# rows whose temporaries have 36 MiB, 100 MiB and 2.25 GiB
SMALL, LARGE, LARGEST = 3072, 5120, 24576

# Runs the command line and prints how many arenas `malloc` then has.
ARENAS = """
import contextlib, ctypes, io, re, sys, threading
from zip_rc_jax.__main__ import main

sys.argv = ["zip-rc", sys.argv[1], "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
thread = threading.Thread(target=lambda: bytearray(10_000))  # a thread's first block gives it an arena
thread.start()
thread.join()
libc, text, size = ctypes.CDLL(None), ctypes.c_char_p(), ctypes.c_size_t()
libc.open_memstream.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
libc.malloc_info(0, file)
libc.fclose(file)
print(len(re.findall(rb"<heap nr=", text.value)))
"""  # noqa: E501

# Prints the megabytes that the process has before, while and after it has 256 of them, and once it
# has given them back.
GIVEN_BACK = """
import os
from zip_rc_jax.runtime.malloc import give_back_freed_memory, keep_freed_memory

keep_freed_memory(one_arena=True)
import numpy as np

def resident():
    with open("/proc/self/statm") as file:
        print(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20)

resident()
blocks = [np.ones(2**20) for _ in range(32)]
above = np.ones(2**10)  # so that it is not the top of the heap alone that is free
resident()
del blocks
resident()
give_back_freed_memory()
resident()
"""

glibc = pytest.mark.skipif(
    not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names,
    reason="malloc is not glibc's",
)


def run(program, *arguments):
    ours = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "GLIBC_TUNABLES", "XLA_FLAGS"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=ours,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()


@glibc
@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("one arena", SMALL),
        ("one arena", LARGE),
        pytest.param("one arena", LARGEST, marks=pytest.mark.slow),
        ("keep", SMALL),
    ],
)
def test_executions_take_no_new_pages_once_freed_memory_is_kept(how, rows):
    pages = 4 * rows**2 // os.sysconf("SC_PAGE_SIZE")
    kept, faults = run(PROGRAM, how, str(rows))
    assert kept == "True"
    assert int(faults) < pages // 50
    _, faults = run(PROGRAM, "import alone", str(rows))
    assert int(faults) > pages // 2, "the library leaves malloc as it is"


@glibc
def test_only_training_has_all_threads_wait_for_one_arena():
    assert run(ARENAS, "train") == run(ARENAS, "demo") == ["1"]
    assert int(run(ARENAS, "decode")[0]) > 1


@glibc
def test_what_was_kept_can_be_given_back():
    before, used, freed, given_back = map(int, run(GIVEN_BACK))
    assert used - before > 240, "what was free before is used first"
    assert used - freed < 16
    assert given_back - before < 32


@pytest.mark.parametrize("variable", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_what_the_environment_says_of_malloc_stands(monkeypatch, variable):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: pytest.fail("malloc was changed"))
    monkeypatch.setenv(variable, "2")
    assert not malloc.keep_freed_memory()


def test_nothing_happens_where_malloc_is_not_that_of_glibc(monkeypatch):
    for name in ("GLIBC_TUNABLES", *[name for name in os.environ if name.startswith("MALLOC_")]):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert not malloc.keep_freed_memory()
    malloc.give_back_freed_memory()
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert not malloc.keep_freed_memory()
