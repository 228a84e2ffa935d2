"""What this machine is and what it can do at most: benchmarks print these beside what they measure.

Not a benchmark itself.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call and of what it leaves running on the device."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def description() -> str:
    """The device that JAX runs on; of CPUs the maker, family and model, by which their matmuls
    differ, and the cores that may be used."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, JAX {jax.__version__}"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    fields = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    name = fields.get("model name", "CPU")
    numbers = ", ".join(
        f"{key.removeprefix('cpu ')} {fields[key]}"
        for key in ("cpu family", "model")
        if key in fields
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}{f' ({numbers})' if numbers else ''}, {cores} cores, JAX {jax.__version__}"


def matmul_rate(rows: int) -> float:
    """Multiply-adds times two per second of float32 `[rows, 2048] @ [2048, 2048]`, best of
    several."""
    a, b = jnp.ones((rows, 2048)), jnp.ones((2048, 2048))
    f = jax.jit(lambda a, b: a @ b)
    f(a, b).block_until_ready()
    return 2 * rows * 2048 * 2048 / min(timed(lambda: f(a, b)) for _ in range(20))


def bandwidth() -> float:
    """Bytes per second of reading an array many times as large as any cache, best of several."""
    x = jnp.ones((2**31 if jax.default_backend() != "cpu" else 2**29) // 4)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    return x.nbytes / min(timed(lambda: total(x)) for _ in range(10))
