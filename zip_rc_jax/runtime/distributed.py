"""Several processes: how they find each other, and what they must agree on.

One process, the usual case, needs none of it.

Every process runs the same command and the same program. Process 0 alone writes files for people,
and speaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.processes import COORDINATOR, HEARTBEAT, PROCESS_ID, PROCESSES

RESUMABLE = 130
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
_barriers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process takes part. Fields are None where JAX asks the cluster itself."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    heartbeat_seconds: int = 60


def plan(environment: Mapping[str, str], tpu_hosts: int = 1) -> Processes | None:
    """What the environment asks for; None for one process.

    Args:
      tpu_hosts: see `cloud_tpu_hosts`.

    Raises:
      UsageError: variables that are missing, no numbers or contradict each other.
    """
    given = {
        name: environment[name]
        for name in (COORDINATOR, PROCESSES, PROCESS_ID)
        if environment.get(name)
    }
    heartbeat = environment.get(HEARTBEAT, "60")
    if not re.fullmatch(r"[1-9]\d*", heartbeat):
        raise UsageError(f"{HEARTBEAT}={heartbeat!r}", "it counts seconds", "use a positive number")
    if given == {COORDINATOR: "auto"} or (not given and tpu_hosts > 1):
        return Processes(heartbeat_seconds=int(heartbeat))
    if not given:
        return None
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    if len(given) < 3:
        missing = [name for name in (COORDINATOR, PROCESSES, PROCESS_ID) if name not in given]
        raise UsageError(
            shown,
            f"{', '.join(missing)} is not set",
            f"set all three, or {COORDINATOR}=auto alone under Slurm",
        )
    numbers = all(re.fullmatch(r"\d+", given[name]) for name in (PROCESSES, PROCESS_ID))
    if not numbers or not int(given[PROCESS_ID]) < int(given[PROCESSES]):
        raise UsageError(shown, f"{PROCESS_ID} is one of 0 .. {PROCESSES} - 1", "correct them")
    if not re.fullmatch(r".+:\d+", given[COORDINATOR]):
        raise UsageError(shown, f"{COORDINATOR} is no HOST:PORT", "write for example 10.0.0.1:8476")
    if int(given[PROCESSES]) == 1:
        return None
    return Processes(
        given[COORDINATOR], int(given[PROCESSES]), int(given[PROCESS_ID]), int(heartbeat)
    )


def cloud_tpu_hosts(environment: Mapping[str, str], platforms: str | None) -> int:
    """How many hosts the TPU of this machine has; 1 where there is no TPU (no machine but a TPU's
    asks).

    Args:
      platforms: `jax.config.jax_platforms`, which JAX sets to "tpu,cpu" on a machine with TPU chips
        and libtpu.

    Raises:
      UsageError: neither the environment nor, after some tries, the metadata server says it.
    """
    if (
        "tpu" not in (platforms or "").split(",")
        or environment.get("TPU_PROCESS_BOUNDS") == "1,1,1"
    ):
        return 1
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in environment:
        hosts = _ask_metadata(environment.get("GCE_METADATA_IP", "metadata.google.internal"))
    return slices * len((hosts or "").split(","))


def _ask_metadata(server: str) -> str | None:
    """The hosts of this machine's TPU, comma-separated; None if the server knows of none.

    Raises UsageError if it does not answer.
    """
    request = urllib.request.Request(
        _METADATA.format(server), headers={"Metadata-Flavor": "Google"}
    )
    # no proxy of the environment's knows this machine
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # right after a machine has started, and under load, the server may be silent for a while
    for pause in (1, 2, 4, 8, 0):
        try:
            with direct.open(request, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            failure: OSError = error
        except OSError as error:
            failure = error
        time.sleep(pause)
    raise UsageError(
        f"metadata server {server}",
        f"it does not say how many hosts this TPU has ({failure}), and one that trains alone "
        "would wait for the others",
        "try again; or set TPU_WORKER_HOSTNAMES to the names of all hosts, comma-separated "
        "(localhost for one)",
    )


def force_ordered_collectives(environment: MutableMapping[str, str]) -> None:
    """Makes XLA run the collectives of a program in the same order on all CPU devices.

    Only before JAX has touched one.

    Otherwise one device may wait in one collective and another one in the next, for ever if these
    are all threads there are.
    """
    flags = environment.get("XLA_FLAGS", "")
    if _SCHEDULER not in flags:
        environment["XLA_FLAGS"] = f"{flags} --{_SCHEDULER}=false".strip()


def start(environment: MutableMapping[str, str] = os.environ, *, together: bool = True) -> None:
    """Connects this process with the others, if there are any.

    Before anything else touches a device.

    Args:
      together: whether the command is one that several processes run together.

    Raises:
      UsageError: impossible settings, the others are not found within five minutes, or several
        processes or hosts for a command of one.
    """
    hosts = cloud_tpu_hosts(environment, jax.config.values["jax_platforms"])
    if hosts > 1 and not together:
        raise UsageError(
            f"a TPU of {hosts} hosts",
            "this command runs on one of them, and its chips would wait for those of the others",
            "give it the chips of its host alone: TPU_PROCESS_BOUNDS=1,1,1 "
            "TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 (for four chips)",
        )
    cluster = plan(environment, hosts)
    if cluster is not None and not together:
        raise UsageError(
            f"{COORDINATOR}={environment[COORDINATOR]}",
            "this command runs in one process",
            "unset it",
        )
    if cluster is not None or "xla_force_host_platform_device_count" in environment.get(
        "XLA_FLAGS", ""
    ):
        force_ordered_collectives(environment)
    if cluster is None or jax.distributed.is_initialized():
        return
    if (jax.config.values["jax_platforms"] or "").startswith("cpu"):
        # Of a program's collectives that do not depend on each other, XLA's threads run several at
        # a time, and CPUs of different processes match them by their order. This variable is the
        # number of threads.
        environment.setdefault("NPROC", "1")
        # programs from the cache were seen to run out of order all the same
        jax.config.update("jax_enable_compilation_cache", False)
    # SIGTERM is ours (signals.stop_signal); JAX's service would take it and let the process live
    # on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.count,
            cluster.index,
            heartbeat_timeout_seconds=cluster.heartbeat_seconds,
            shutdown_timeout_seconds=cluster.heartbeat_seconds,
            cluster_detection_method="deactivate" if cluster.coordinator else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{COORDINATOR}={cluster.coordinator or 'auto'}",
            str(error).splitlines()[0],
            "see zip-rc train --help",
        ) from None
    if is_primary():
        print(
            f"zip-rc: {jax.process_count()} processes with {jax.device_count()} devices",
            file=sys.stderr,
        )


def is_multiprocess() -> bool:
    """Whether there are other processes. Touches no device where there are none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process writes files for people, and speaks."""
    return not is_multiprocess() or jax.process_index() == 0


def barrier() -> None:
    """Returns once all processes are here, however long that takes; one that dies ends the
    others."""
    if is_multiprocess():
        _wait(f"zip_rc_{next(_barriers)}", 7 * 24 * 3600)


def _wait(name: str, seconds: int) -> None:
    """Raises RuntimeError if not all processes come in time.

    JAX's public barrier is a computation, which may not take hours. Orbax's asks JAX's service.
    """
    from orbax.checkpoint import multihost  # a third of the time that JAX takes to import

    multihost.get_barrier_sync_fn()(key=name, timeout_ms=seconds * 1000)


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This process's part of `items`, which all processes have in the same order."""
    return items[jax.process_index() :: jax.process_count()] if is_multiprocess() else items


def all_processes(condition: bool) -> bool:
    """Whether `condition` holds in all processes. All of them must call it."""
    return (
        bool(multihost_utils.process_allgather(np.array(condition)).all())
        if is_multiprocess()
        else condition
    )


def end(status: int) -> None:
    """Ends this process.

    The others are given a few seconds to end for the same reason; waiting longer would be in vain.
    """
    with contextlib.suppress(RuntimeError):
        _wait("zip_rc_end", 5)
        if is_primary():
            # its end is the end of JAX's service, and JAX aborts processes that are still there
            # then
            time.sleep(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def gather(tree: Any) -> Any:
    """Whole NumPy arrays on every process. All of them must call it."""

    def to_host(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(to_host, tree)


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return flags.any(0)


class DelayedAny:
    """Flags that any process has set, known to all of them at the same step.

    With several processes the answer lags one call, so the all-reduce overlaps with a step.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        self._sharding = NamedSharding(
            Mesh(np.asarray(jax.devices()), ("device",)), PartitionSpec("device")
        )

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags any process has set.

        All of them must call it the same number of times.
        """
        if not is_multiprocess():
            return flags
        before, shape = self._pending, (jax.device_count(), len(flags))
        self._pending = _any(
            jax.make_array_from_callback(shape, self._sharding, lambda _: np.array([flags]))
        )
        agreed = (False,) * len(flags) if before is None else tuple(map(bool, np.asarray(before)))
        if any(agreed):
            self._pending = None  # it holds the same flags once more
        return agreed
