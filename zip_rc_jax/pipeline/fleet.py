"""The chunks of a stage on the machines of a Ray cluster.

The driver, the process of the command, opens the run directory and hands out the numbers of the
chunks that are not there. On every machine of the cluster an actor runs the same stage with the
same config up to the point where chunks are made, and then makes those that it is asked for. Each
has an engine of its own on the accelerators of its machine; they do not communicate. The driver
stores what comes back as one process alone would, so the result is the same, byte for byte.

A machine that is lost loses the chunks in its hands; others make them again. One that joins late
gets chunks as soon as it is seen.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import platform
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.pipeline import chunks
from zip_rc_jax.runtime.buckets import is_bucket
from zip_rc_jax.runtime.claims import Claims
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.locks import only_process
from zip_rc_jax.runtime.storage import code_version, in_short, plain
from zip_rc_jax.runtime.working_copy import copy_of

if TYPE_CHECKING:
    from zip_rc_jax.pipeline.chunks import Work

IN_HAND = 2  # chunks that a worker has at a time: one is made while another travels
LOOK_SECONDS = 2.0  # between looks for new machines
RETRY_SECONDS = 1.0  # before a worker is started again where one was lost; twice as long each time
MOST_LOSSES = 5  # on one machine without a chunk in between: then it is left alone
WAIT_SECONDS = 120.0  # for the first worker
CONNECT_SECONDS = 60.0
ACCELERATORS = ("TPU", "GPU")  # Ray's own names
ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):(\d{1,5})")


def check_address(address: str) -> None:
    """Raises UsageError for what is no address, or where nobody listens."""
    if address == "auto":
        return
    match = ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(
            f"--fleet {address!r}",
            "it is neither auto nor HOST:PORT",
            "write for example --fleet 10.0.0.1:6379, as `ray start --head` prints it",
        )
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
    except OSError as error:
        raise UsageError(
            f"--fleet {address}",
            f"nobody listens there ({error.strerror or error})",
            "start a cluster with `ray start --head`, and pass the address that it prints",
        ) from None


def versions() -> dict[str, str]:
    """What must be the same on all machines, or results are not."""
    import jax

    code = code_version()
    return {
        "zip-rc-jax": f"{code['version']} {code['commit'] or ''}".strip(),
        "jax": jax.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


class Worker:
    """An actor: one stage, and the chunks that it is asked for."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[int, queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._about: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def hello(self) -> dict[str, Any]:
        """Where this is, and its versions."""
        return {"host": platform.node(), "pid": os.getpid(), "versions": versions()}

    def prepare(self, stage: str, config: PipelineConfig, directory: str) -> dict[str, Any]:
        """Runs the stage to its chunks. Returns its settings, for the driver to compare.

        Args:
          directory: that the driver was called in; paths are relative to it, if it is here too.

        Raises what the stage raises.
        """
        if os.path.isdir(directory):
            os.chdir(directory)
        threading.Thread(target=self._run, args=(stage, config), daemon=True).start()
        found = self._about.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def make(self, number: int) -> list[Rollout]:
        """The rollouts of a chunk. Raises what making them raises."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put((number, answer))
        found = answer.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self, stage: str, config: PipelineConfig) -> None:
        chunks.together = self
        try:
            _stages()[stage](config)
            raise UsageError(
                f"stage {stage}", "it found nothing to make on this machine", "look at run_dir"
            )
        except BaseException as error:
            self._about.put(error)

    # ---- what `write_in_chunks` calls

    def serve(self, work: Work) -> None:
        """Makes chunks until the process is ended."""
        self._about.put({"settings": plain(work.settings), "count": work.count})
        while True:
            number, answer = self._asked.get()
            try:
                answer.put(work.made(number))
            except BaseException as error:
                answer.put(error)


def _stages() -> dict[str, Callable[[PipelineConfig], Any]]:
    from zip_rc_jax.pipeline.grade import make_grades
    from zip_rc_jax.pipeline.label import make_labels
    from zip_rc_jax.pipeline.rollouts import make_rollouts

    return {"rollout": make_rollouts, "grade": make_grades, "label": make_labels}


@dataclasses.dataclass
class _Member:
    """A worker as the driver sees it.

    Attributes:
      waits: for what: "hello", "prepare", or "" when it can make chunks.
      made: rollouts so far.
      since: when it was asked for, or ready.
    """

    node: str
    actor: Any
    waits: str
    host: str = ""
    pid: int = 0
    made: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        return self.made / max(time.monotonic() - self.since, 1e-9) if self.made else 0.0


class Fleet:
    """The driver's side of a cluster."""

    def __init__(self, ray: Any, stage: str, config: PipelineConfig):
        self._ray, self._stage, self._config = ray, stage, config
        self._members: dict[str, _Member] = {}  # node -> its worker
        self._losses: collections.Counter[str] = collections.Counter()
        self._not_before: dict[str, float] = {}
        self._looked = 0.0
        self._refs: dict[Any, tuple[_Member, int]] = {}  # -1: its start
        self._todo: collections.deque[int] = collections.deque()

    def hand_out(
        self,
        work: Work,
        received: Sequence[int],
        bar: Callable[[int, str | None], None],
    ) -> None:
        """Has all missing chunks made, and stores them. Returns early after a signal.

        Raises UsageError for what is wrong on a machine as it would be on all, and if there is no
        machine to work on.
        """
        done = work.partial.done()
        self._todo.extend(n for n in range(work.count) if n not in done)
        began, ready_once = time.monotonic(), False
        try:
            while (self._todo or any(n >= 0 for _, n in self._refs.values())) and not received:
                self._look_for_machines()
                for member in self._members.values():
                    self._fill(member)
                if not self._refs:
                    time.sleep(0.2)
                for ref in self._ready():
                    member, number = self._refs.pop(ref)
                    found = self._get(ref, member, number)
                    if found is None:
                        continue
                    if number < 0:
                        self._go_on(member, found, work)
                        continue
                    work.partial.add(number, found)
                    done.add(number)
                    member.made += len(found)
                    self._losses[member.node] = 0
                    bar(min(len(done) * work.size * work.each, work.total), self.rates())
                for member in list(self._members.values()):
                    slow = time.monotonic() - member.since > WAIT_SECONDS
                    if member.waits == "hello" and slow:
                        late = TimeoutError(f"it did not start within {WAIT_SECONDS:.0f} s")
                        self._lose(member, -1, late)
                ready_once = ready_once or any(not m.waits for m in self._members.values())
                if not ready_once and time.monotonic() - began > WAIT_SECONDS and not self._refs:
                    raise UsageError(
                        f"--fleet with {len(self._ray.nodes())} machines",
                        "none of them has a free CPU, GPU or TPU, or workers were lost on all",
                        "see `ray status`; stop what else runs there, or add machines with "
                        "`ray start --address`",
                    )
        finally:
            for member in self._members.values():
                with contextlib.suppress(Exception):
                    self._ray.kill(member.actor)
            self._members.clear()
            self._refs.clear()

    def rates(self) -> str:
        """The rollouts per second of each worker, for people."""
        ready = [m for m in self._members.values() if not m.waits]
        return "  ".join(f"{m.host}:{m.pid} {m.rate:.3g}/s" for m in ready)

    # ----

    def _look_for_machines(self) -> None:
        """Starts a worker on each machine of the cluster that has none, on all its accelerators."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        for node, resources in alive.items():
            if node in self._members or now < self._not_before.get(node, 0):
                continue
            options = worker_options(resources)
            if options is None or self._losses[node] >= MOST_LOSSES:
                continue
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            actor = (
                self._ray.remote(Worker)
                .options(
                    scheduling_strategy=strategy,
                    max_concurrency=IN_HAND + 2,
                    max_restarts=0,
                    runtime_env={"env_vars": worker_environment(resources)},
                    **options,
                )
                .remote()
            )
            member = _Member(node, actor, "hello")
            self._members[node] = member
            self._refs[actor.hello.remote()] = member, -1

    def _fill(self, member: _Member) -> None:
        """Gives a worker chunks, until its hands are full."""
        if member.waits:
            return
        held = sum(m is member for m, _ in self._refs.values())
        while held < IN_HAND and self._todo:
            number = self._todo.popleft()
            self._refs[member.actor.make.remote(number)] = member, number
            held += 1

    def _ready(self) -> list[Any]:
        if not self._refs:
            return []
        ready, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=0.5)
        return ready

    def _get(self, ref: Any, member: _Member, number: int) -> Any:
        """What a worker returned; None if it was lost, and then its chunks are to be made again."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            raise self._told(error, member) from error
        except (errors.ObjectStoreFullError, errors.OutOfDiskError, errors.OutOfMemoryError) as e:
            raise UsageError(
                f"Ray on {member.host or member.node}",
                f"its object store or memory is full ({str(e).splitlines()[0]})",
                "give it more (`ray start --object-store-memory`), or stop what else uses it",
            ) from e
        except errors.RayError as error:
            self._lose(member, number, error)
            return None

    def _told(self, error: Any, member: _Member) -> UsageError:
        """The error of a worker, with its machine."""
        cause, where = getattr(error, "cause", None), member.host or member.node
        if isinstance(cause, UsageError):
            fix = cause.fix
            if not is_bucket(self._config.run_dir):
                fix += "; if it is only there: all machines must see run_dir and the model under "
                fix += "these paths (a bucket, or a shared file system)"
            return UsageError(f"on {where}: {cause.value}", cause.reason, fix)
        said = str(cause or error).strip().splitlines()
        return UsageError(
            f"worker on {where}",
            f"{type(cause or error).__name__}: {said[-1] if said else ''}",
            "see the log of that worker (`ray logs`)",
        )

    def _lose(self, member: _Member, number: int, error: Exception) -> None:
        """Puts back what a lost worker had, and forgets it."""
        lost = [n for m, n in self._refs.values() if m is member and n >= 0]
        lost += [number] if number >= 0 else []
        for ref in [ref for ref, (m, _) in self._refs.items() if m is member]:
            del self._refs[ref]
        self._todo.extendleft(sorted(lost, reverse=True))
        if self._members.get(member.node) is member:
            del self._members[member.node]
            self._losses[member.node] += 1
            pause = RETRY_SECONDS * 2 ** (self._losses[member.node] - 1)
            self._not_before[member.node] = time.monotonic() + pause
            with contextlib.suppress(Exception):
                self._ray.kill(member.actor)
            where = f"{member.host}:{member.pid}" if member.host else member.node[:8]
            again = f"; {len(lost)} chunks are made again" if lost else ""
            print(f"zip-rc: worker {where} was lost ({in_short(error)}){again}", file=sys.stderr)

    def _go_on(self, member: _Member, found: dict[str, Any], work: Work) -> None:
        """The next step of a worker's start. Raises UsageError if it cannot take part."""
        if member.waits == "hello":
            member.host, member.pid = found["host"], found["pid"]
            ours, theirs = versions(), found["versions"]
            for name in ours:
                if ours[name] != theirs.get(name):
                    raise UsageError(
                        f"worker on {member.host}",
                        f"it has {name} {theirs.get(name)}, and this machine has {ours[name]}: "
                        "results would differ",
                        "install the same on all machines",
                    )
            member.waits = "prepare"
            start = member.actor.prepare.remote(self._stage, self._config, os.getcwd())
            self._refs[start] = member, -1
            return
        ours = plain(work.settings)
        if found["settings"] != ours or found["count"] != work.count:
            names = [
                name
                for name in sorted({*ours, *found["settings"]})
                if ours.get(name) != found["settings"].get(name)
            ]
            raise UsageError(
                f"worker on {member.host}",
                f"it would make other rollouts: {', '.join(names) or 'their number'} differ there",
                "give all machines the same model, problems and run_dir (a bucket, or a shared "
                "file system)",
            )
        member.waits, member.since = "", time.monotonic()


def worker_options(resources: dict[str, float]) -> dict[str, Any] | None:
    """What a worker takes of a machine: all of its accelerators of one kind, else one CPU; None
    where it has neither.

    Args:
      resources: as Ray lists them.
    """
    if resources.get("TPU", 0) >= 1:
        return {"num_cpus": 0, "resources": {"TPU": resources["TPU"]}}
    if resources.get("GPU", 0) >= 1:
        return {"num_cpus": 0, "num_gpus": resources["GPU"]}
    return {"num_cpus": 1} if resources.get("CPU", 0) >= 1 else None


def worker_environment(resources: dict[str, float]) -> dict[str, str]:
    """A worker without accelerators does not look for any, and one of a TPU slice takes the chips
    of its host alone."""
    if resources.get("TPU", 0) >= 1:
        bounds = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}.get(int(resources["TPU"]))
        chips = {"TPU_CHIPS_PER_PROCESS_BOUNDS": bounds} if bounds else {}
        return {"TPU_PROCESS_BOUNDS": "1,1,1", **chips}
    return {} if resources.get("GPU", 0) >= 1 else {"JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def fleet(address: str, stage: str, config: PipelineConfig) -> Iterator[None]:
    """The chunks of the stage that runs inside are made by the cluster.

    Args:
      address: see `check_address`.
      stage: "rollout", "grade" or "label".

    Raises:
      UsageError: no cluster there, another version of Ray, or another fleet works in run_dir.
    """
    check_address(address)
    with optional_import():
        import ray
    try:
        _connect(ray, address)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        said = " ".join(str(error).split())
        mismatch = "mismatch" in said.lower()
        raise UsageError(
            f"--fleet {address}",
            said[:300] or "no cluster answers",
            "install the same Ray and Python on all machines"
            if mismatch
            else "start one with `ray start --head`, join it on every other machine with `ray "
            "start --address=HOST:PORT`, and call this on one of them",
        ) from None
    try:
        chunks.together = Fleet(ray, stage, config)
        yield
    finally:
        chunks.together = None
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Joins a cluster. Raises what Ray raises; TimeoutError where it would try for minutes."""
    answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            answer.put(None)
        except BaseException as error:
            answer.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        error = answer.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no Ray cluster answered there for {CONNECT_SECONDS:.0f} s") from None
    if error is not None:
        raise error


@contextlib.contextmanager
def alone(work: Work) -> Iterator[None]:
    """Holds the chunks of a dataset for this fleet.

    Raises UsageError if another one has them: it says which.
    """
    copy = copy_of(work.directory)
    if copy is None:
        with only_process(work.partial.directory, f"{work.title} in"):
            yield
        return
    with Claims(copy.bucket, f"{chunks.CLAIMS}/{work.directory.name}") as claims:
        if not claims.take("join"):  # who has this makes the dataset of the chunks
            holder = claims.holder("join") or {}
            raise UsageError(
                f"{work.title} in run_dir={copy.bucket.url!r}",
                f"process {holder.get('pid')} on {holder.get('host')}, since "
                f"{holder.get('since')}, is at work there",
                "wait for it, or use another run_dir",
            )
        yield
