"""Memory that is freed stays in the process where a program asks for it, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zip_rc_jax import host_memory

# Prints whether freed memory is kept, and the page faults of an execution with temporaries of 64 MiB. The median, because something small
# may come to lie where they were, and they then once need another place.
PROGRAM = """
import resource, statistics, sys
import jax, jax.numpy as jnp
import zip_rc_jax
from zip_rc_jax.host_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
square = jax.jit(lambda a: (a @ a.T) @ a)
a = jnp.ones((4096, 8))
faults = []
for _ in range(21):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    square(a).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, statistics.median(faults))
"""
TEMPORARIES = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def run(how):
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES", "XLA_FLAGS"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], env=ours, capture_output=True, text=True, timeout=120, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="malloc is not glibc's")
def test_executions_take_no_new_pages_once_freed_memory_is_kept():
    kept, faults = run("keep")
    assert kept == "True"
    assert faults < TEMPORARIES // 50
    _, faults = run("import alone")
    assert faults > TEMPORARIES // 2, "the library leaves malloc as it is"


@pytest.mark.parametrize("variable", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_what_the_environment_says_of_malloc_stands(monkeypatch, variable):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: pytest.fail("malloc was changed"))
    monkeypatch.setenv(variable, "2")
    assert not host_memory.keep_freed_memory()


def test_nothing_happens_where_malloc_is_not_that_of_glibc(monkeypatch):
    for name in ("GLIBC_TUNABLES", *[name for name in os.environ if name.startswith("MALLOC_")]):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_memory()
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert not host_memory.keep_freed_memory()
