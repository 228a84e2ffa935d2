"""Training on meshes and in several processes: what one device gives, whoever takes part; and what
happens when one of them is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.processes import (
    ROOT,
    cut,
    free_port,
    prepare,
    records,
    rollouts,
    started,
    wait_for_step,
)
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.config import KL_KINDS, MeshConfig, TrainConfig
from zip_rc_jax.data.batches import fill_rate, train_batches
from zip_rc_jax.data.rollouts import read_rollouts
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.distributed import Processes, cloud_tpu_hosts, plan
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training import trainer
from zip_rc_jax.training.step import TrainSpec, losses
from zip_rc_jax.training.trainer import train

# ---- who takes part


@pytest.mark.parametrize(
    ("environment", "hosts", "expected"),
    [
        ({}, 1, None),
        ({}, 4, Processes()),
        ({"ZIP_RC_COORDINATOR": "auto"}, 1, Processes()),
        (
            {"ZIP_RC_COORDINATOR": "h:1", "ZIP_RC_PROCESSES": "2", "ZIP_RC_PROCESS_ID": "1"},
            1,
            Processes("h:1", 2, 1),
        ),
        (
            {"ZIP_RC_COORDINATOR": "h:1", "ZIP_RC_PROCESSES": "2", "ZIP_RC_PROCESS_ID": "1"},
            4,
            Processes("h:1", 2, 1),
        ),
        ({"ZIP_RC_COORDINATOR": "h:1", "ZIP_RC_PROCESSES": "1", "ZIP_RC_PROCESS_ID": "0"}, 1, None),
        ({"ZIP_RC_HEARTBEAT_SECONDS": "7"}, 2, Processes(heartbeat_seconds=7)),
    ],
)
def test_the_environment_says_who_takes_part(environment, hosts, expected):
    assert plan(environment, hosts) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ZIP_RC_PROCESSES": "2"}, "ZIP_RC_COORDINATOR, ZIP_RC_PROCESS_ID is not set"),
        (
            {"ZIP_RC_COORDINATOR": "h:1", "ZIP_RC_PROCESSES": "2", "ZIP_RC_PROCESS_ID": "2"},
            "one of 0 .. ZIP_RC_PROCESSES - 1",
        ),
        (
            {"ZIP_RC_COORDINATOR": "h:1", "ZIP_RC_PROCESSES": "two", "ZIP_RC_PROCESS_ID": "0"},
            "ZIP_RC_PROCESSES=two",
        ),
        (
            {"ZIP_RC_COORDINATOR": "h", "ZIP_RC_PROCESSES": "2", "ZIP_RC_PROCESS_ID": "0"},
            "no HOST:PORT",
        ),
        ({"ZIP_RC_HEARTBEAT_SECONDS": "0"}, "ZIP_RC_HEARTBEAT_SECONDS='0': it counts seconds"),
    ],
)
def test_half_an_environment_is_refused(environment, message):
    with pytest.raises(UsageError, match=message):
        plan(environment)


@pytest.mark.parametrize(
    ("environment", "platforms", "expected"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, 1),  # a laptop, whatever its variables say
        # a TPU machine that is told to leave its chips alone
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "tpu,cpu", 4),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_PROCESS_BOUNDS": "1,1,1"}, "tpu,cpu", 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", 4),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", 1),
    ],
)
def test_hosts_of_a_tpu_are_counted_where_there_is_one(environment, platforms, expected):
    assert cloud_tpu_hosts(environment, platforms) == expected


@contextlib.contextmanager
def metadata_server(*answers):
    """The environment of a machine whose metadata server gives these answers in turn; a number is
    an error of HTTP."""
    left = iter(answers)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            good = (
                self.path.endswith("/attributes/worker-network-endpoints")
                and self.headers["Metadata-Flavor"] == "Google"
            )
            answer = next(left) if good else 400
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(b"" if isinstance(answer, int) else answer.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("localhost", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["w0,w1"], 2),
        (["a:0:10.0.0.1,b:1:10.0.0.2"], 2),
        (["w0"], 1),
        ([404], 1),
        ([503, 500, "w0,w1"], 2),
    ],
    ids=["new", "old", "one", "silent", "late"],
)
def test_the_metadata_server_knows_the_hosts_of_a_tpu(answers, expected, monkeypatch):
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    with metadata_server(*answers) as environment:
        assert cloud_tpu_hosts(environment, "tpu,cpu") == expected


def test_a_tpu_that_nobody_counts_the_hosts_of_is_not_taken_for_one_host(monkeypatch):
    pauses = []
    monkeypatch.setattr(distributed.time, "sleep", pauses.append)
    message = (
        r"metadata server localhost:\d+: it does not say how many hosts this TPU has "
        r"\(.*refused.*\).*Fix: .*TPU_WORKER_HOSTNAMES"
    )
    with pytest.raises(UsageError, match=message):
        cloud_tpu_hosts({"GCE_METADATA_IP": f"localhost:{free_port()}"}, "tpu,cpu")
    assert len(pauses) == 5


def test_a_command_of_one_process_refuses_others(monkeypatch, capsys):
    for name, value in {
        "ZIP_RC_COORDINATOR": "localhost:1",
        "ZIP_RC_PROCESSES": "2",
        "ZIP_RC_PROCESS_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", "configs/chain_sum_demo.yaml"]) == 2
    assert (
        "ZIP_RC_COORDINATOR=localhost:1: this command runs in one process"
        in capsys.readouterr().err
    )


def test_a_command_of_one_process_takes_one_host_of_a_tpu(request):
    """Alone in a slice of several hosts, it would wait for ever."""
    request.addfinalizer(
        functools.partial(jax.config.update, "jax_platforms", jax.config.values["jax_platforms"])
    )
    jax.config.update("jax_platforms", "tpu,cpu")  # as JAX does on a machine with TPU chips
    slice_of_two = {"TPU_WORKER_HOSTNAMES": "a,b"}
    with pytest.raises(
        UsageError,
        match=r"a TPU of 2 hosts: this command runs on one of them.* Fix: "
        r".*TPU_PROCESS_BOUNDS=1,1,1",
    ):
        distributed.start(slice_of_two, together=False)
    distributed.start(slice_of_two | {"TPU_PROCESS_BOUNDS": "1,1,1"}, together=False)
    assert not distributed.is_multiprocess()


def test_one_process_starts_alone_and_agrees_with_itself():
    environment = {}
    distributed.start(environment)
    assert not distributed.is_multiprocess()
    assert distributed.is_primary()
    assert environment == {}
    agree = distributed.DelayedAny()
    assert [agree(True, False), agree(False, False)] == [(True, False), (False, False)]
    assert distributed.share([1, 2, 3]) == [1, 2, 3]


# ---- meshes


def test_a_mesh_takes_the_devices_that_are_left_over():
    assert dict(make_mesh(fsdp=-1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(
        UsageError,
        match="mesh data=1 fsdp=-1 tensor=3: 8 devices are visible, which do not divide by 3",
    ):
        make_mesh(fsdp=-1, tensor=3)
    with pytest.raises(UsageError, match="mesh.tensor=0: it counts devices"):
        MeshConfig(tensor=0)
    with pytest.raises(UsageError, match="mesh data=-1 fsdp=-1 tensor=1: only one axis"):
        MeshConfig(data=-1)


# every width divides by 8
WIDE = dataclasses.replace(TINY_MODEL, n_heads=8, n_kv_heads=8, head_dim=6, n_layers=2)
STEP = TrainConfig(
    label="value",
    batch_rows=6,
    row_tokens=48,
    kl_weight=0.5,
    kl_top_k=5,
    lm_weight=0.25,
    joint_weight=1.5,
    loss_chunk=64,
    seed=3,
)
SHAPES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]
QUICK = {(1, 8, 1), (1, 1, 8)}


@pytest.fixture(scope="module")
def one_device():
    return loss_and_gradients(make_mesh())


def loss_and_gradients(mesh, model=WIDE, step=STEP):
    lm, layout = tiny_lm(model), Layout(mesh, TRAIN_RULES)
    batch = next(
        iter(train_batches(rollouts(), label="value", batch_rows=6, row_tokens=48, seed=3))
    )
    axes = {"body": param_axes(model), "zip_rows": ("cells", "embed")}
    params = layout.shard(jax.tree.map(jnp.array, lm.params), axes)
    teacher = jax.tree.map(lambda x: 1.2 * x, params["body"])
    settings = TrainSpec(model, lm.head, layout, step)
    objective = jax.jit(jax.value_and_grad(lambda p, t, b: losses(settings, p, t, b)[0]))
    value, gradients = objective(params, teacher, trainer._on_mesh(batch, layout))
    return float(value), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize(
    "shape", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES], ids=str
)
def test_loss_and_gradients_are_those_of_one_device_on_every_mesh_of_eight(one_device, shape):
    """Six rows: on most of these meshes empty rows are added."""
    assert len(SHAPES) == 10
    same_up_to_rounding(loss_and_gradients(make_mesh(*shape)), one_device)


def same_up_to_rounding(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
        found[1],
        expected[1],
    )


@pytest.mark.parametrize(
    "kind", [KL_KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KL_KINDS[1:])]
)
def test_so_they_are_for_every_type_of_layer_and_every_divergence(kind):
    """Short convolutions, whose channels lie over `tensor`, and sliding windows."""
    model = dataclasses.replace(
        WIDE,
        n_layers=4,
        layer_types=("conv", "attention", "conv", "sliding"),
        conv_kernel=3,
        sliding_window=8,
        sliding_rope_theta=50.0,
    )
    step = dataclasses.replace(STEP, kl_kind=kind)
    same_up_to_rounding(
        loss_and_gradients(make_mesh(2, 2, 2), model, step),
        loss_and_gradients(make_mesh(), model, step),
    )


def test_a_mesh_that_the_model_does_not_divide_over_is_refused_by_name(tmp_path, capsys):
    config = prepare(tmp_path, steps=2)
    assert main(["train", str(config), "--stage", "final", "mesh.fsdp=1", "mesh.tensor=4"]) == 2
    assert (
        "axis 'kv_heads' of size 2: it does not divide over mesh axes ['tensor'] of 4 devices"
        in capsys.readouterr().err
    )
    assert main(["train", str(config), "--stage", "final", "mesh.fsdp=16"]) == 2
    assert (
        "mesh data=1 fsdp=16 tensor=1: it needs 16 devices and 8 are visible"
        in capsys.readouterr().err
    )


# ---- several processes


STEPS = 40  # more than pass before a signal arrives, however fast a step is


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The records and the model of a run on one device."""
    directory = tmp_path_factory.mktemp("alone")
    assert (
        main(["train", str(prepare(directory, steps=STEPS)), "--stage", "final", "mesh.fsdp=1"])
        == 0
    )
    return records(directory / "run" / "final"), load(directory / "run" / "final")


def assert_same_run(stage, alone):
    """Losses to float32 tolerance; after steps of Adam, parameters whose gradient is next to
    nothing may differ by more."""
    found = records(stage)
    assert [r["step"] for r in found] == [r["step"] for r in alone[0]]
    for mine, theirs in zip(found, alone[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("joint", "kl", "nll", "loss", "labelled", "fill"):
            assert mine[f"train/{name}"] == pytest.approx(
                theirs[f"train/{name}"], rel=1e-4, abs=1e-5
            ), (mine["step"], name)
    for name in ("eval/within_prompt_auc", "eval/length_mae"):
        assert found[-1][name] == pytest.approx(alone[0][-1][name], rel=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3),
        load(stage).params,
        alone[1].params,
    )


def launcher(directory):
    """launch/tpu_worker.sh as every host of a TPU runs it."""
    script, environment = ROOT / "launch" / "tpu_worker.sh", ROOT / ".venv"
    options = ("--venv", environment, "--no-install", "--platform", "cpu")
    return lambda index: [
        "bash",
        str(script),
        "--dir",
        str(directory / f"worker_{index}"),
        *map(str, options),
    ]


def test_two_processes_of_the_launcher_stop_together_and_go_on_as_one(tmp_path, alone):
    """SIGTERM to the second: both save at the same step.

    Then one process alone, with one device, finishes the run.
    """
    config, stage = prepare(tmp_path, steps=STEPS), tmp_path / "run" / "final"
    with started(
        [config, "--stage", "final"], tmp_path, count=2, command=launcher(tmp_path)
    ) as here:
        wait_for_step(stage, 2, here)
        here.processes[1].send_signal(signal.SIGTERM)
        assert here.wait() == [130, 130], here.text()
        assert "2 processes with 2 devices" in here.text(0)
        assert "stopped by a signal to another process at step" in here.text(0)
        assert "stopped by signal 15 at step" in here.text(1)
        assert "passes over" in here.text(0)
        assert "passes over" not in here.text(1), "only one process speaks"
    steps = [int(path.name) for path in (stage / "checkpoints").iterdir()]
    assert 2 <= max(steps) < STEPS
    assert main(["train", str(config), "--stage", "final", "mesh.fsdp=1"]) == 0
    assert_same_run(stage, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 2, ()), (4, 1, ("mesh.data=2", "mesh.tensor=2", "mesh.fsdp=1"))],
    ids=["two with fsdp", "four with data and tensor"],
)
def test_several_processes_train_the_same_model_as_one(tmp_path, alone, count, devices, mesh):
    config, stage = prepare(tmp_path, steps=STEPS), tmp_path / "run" / "final"
    with started(
        ["train", config, "--stage", "final", *mesh], tmp_path, count=count, devices=devices
    ) as here:
        assert here.wait() == [0] * count, here.text()
    assert_same_run(stage, alone)


@pytest.mark.slow
def test_several_processes_cache_the_teacher_that_one_would_run(tmp_path, alone):
    config, stage = prepare(tmp_path, steps=STEPS), tmp_path / "run" / "final"
    with started(
        ["train", config, "--stage", "final", "final.cache_teacher=true"],
        tmp_path,
        count=2,
        devices=2,
    ) as here:
        assert here.wait() == [0, 0], here.text()
    assert_same_run(stage, alone)


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_left_by_all_of_them(tmp_path, alone):
    """Cut are the shards of the second process, which the first one never reads."""
    config, stage = prepare(tmp_path, steps=STEPS, save_seconds=0.01), tmp_path / "run" / "final"
    with started(["train", config, "--stage", "final"], tmp_path, count=2) as here:
        wait_for_step(stage, 4, here)
        here.processes[0].send_signal(signal.SIGTERM)
        assert here.wait() == [130, 130], here.text()
    before, newest = sorted(int(path.name) for path in (stage / "checkpoints").iterdir())
    cut(stage / "checkpoints" / str(newest) / "state" / "ocdbt.process_1" / "d")
    with started(["train", config, "--stage", "final"], tmp_path, count=2) as here:
        assert here.wait() == [0, 0], here.text()
        message = " ".join(here.text().split())
    assert (
        f"checkpoint {stage}/checkpoints/{newest} cannot be read (by another process). Going on "
        f"from step {before}" in message
    )
    assert len(list(stage.glob(f"damaged-{newest}-*"))) == 1
    assert_same_run(stage, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_both_resume(tmp_path, alone, victim):
    config, stage = prepare(tmp_path, steps=STEPS, save_seconds=0.01), tmp_path / "run" / "final"
    with started(["train", config, "--stage", "final"], tmp_path, count=2) as here:
        wait_for_step(stage, 3, here)
        here.processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        status = here.wait()[1 - victim]
        assert time.monotonic() - killed < 60
        # Python may hear of it first (the step fails), or JAX's own watch, which aborts.
        expected = {130: "lost the others, or one of them", -signal.SIGABRT: "another task died"}
        assert status in expected, here.text(1 - victim)
        assert expected[status] in here.text(1 - victim)
    with started(["train", config, "--stage", "final"], tmp_path, count=2) as here:
        assert here.wait() == [0, 0], here.text()
    assert_same_run(stage, alone)


@pytest.mark.slow
def test_when_one_of_four_processes_of_the_launcher_is_killed_the_other_three_end_in_time_and_say_why(  # noqa: E501
    tmp_path,
):
    config, stage = prepare(tmp_path, steps=200), tmp_path / "run" / "final"
    with started(
        [config, "--stage", "final"], tmp_path, count=4, command=launcher(tmp_path)
    ) as here:
        wait_for_step(stage, 2, here)
        os.killpg(here.processes[2].pid, signal.SIGKILL)  # its launcher too, as with its machine
        killed = time.monotonic()
        statuses = here.wait()
        assert time.monotonic() - killed < 60
    assert statuses[2] == -signal.SIGKILL
    # A shell gives 128 and the number of the signal: JAX's own watch aborts, where Python does not
    # hear of it first.
    expected = {130: "lost the others, or one of them", 128 + signal.SIGABRT: "another task died"}
    for index in (0, 1, 3):
        assert statuses[index] in expected, here.text(index)
        assert expected[statuses[index]] in here.text(index)
        assert (tmp_path / f"worker_{index}" / "status").read_text() == f"{statuses[index]}\n"
    assert not (stage / "model").exists()


# ---- rollouts of several processes

# six chunks of four prompts
ROLLOUT = [
    "configs/chain_sum_demo.yaml",
    "rollout.prompts=24",
    "rollout.rows=2",
    "rollout.max_tokens=12",
]


def rollouts_of_this_process(directory, *options):
    assert main(["rollout", *ROLLOUT, *options, f"run_dir={directory}"]) == 0
    return read_rollouts(directory / "rollouts")


def assert_same_rollouts(found, expected, count):
    assert len(found) == len(expected) == count
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_index, a.sample_index, a.response) == (
            b.prompt_index,
            b.sample_index,
            b.response,
        )
        np.testing.assert_array_equal(a.output_token_ids, b.output_token_ids)


def as_process(monkeypatch, index, count=2):
    """This process takes the part of one of several, alone."""
    monkeypatch.setattr(distributed, "share", lambda items: items[index::count])
    monkeypatch.setattr(distributed, "is_primary", lambda: index == 0)


def test_processes_share_the_chunks_and_the_first_merges_when_none_is_missing(
    tmp_path, monkeypatch, capsys
):
    alone = rollouts_of_this_process(tmp_path / "alone")
    arguments = ["rollout", *ROLLOUT, f"run_dir={tmp_path}"]
    chunks = tmp_path / ".rollouts.partial"
    as_process(monkeypatch, 0)
    assert main(arguments) == 2, "the other one is gone"
    assert "chunks [1, 3, 5] of 6 are not there" in capsys.readouterr().err
    assert not (tmp_path / "rollouts").exists()
    # so [1, 2, 3, 5] are left: after a restart, the first makes 1 and 3
    (chunks / "chunk-00000002.jsonl").unlink()
    as_process(monkeypatch, 1)
    assert main(arguments) == 0
    assert sorted(int(p.stem[-1]) for p in chunks.glob("chunk-*")) == [0, 2, 4, 5]
    assert not (tmp_path / "rollouts").exists(), "only the first merges"
    monkeypatch.undo()
    assert main(arguments) == 0
    assert_same_rollouts(read_rollouts(tmp_path / "rollouts"), alone, 48)


@pytest.mark.parametrize(("index", "expected"), [(0, ["export", "wait"]), (1, ["wait"])])
def test_the_others_wait_while_the_first_exports(tmp_path, monkeypatch, index, expected):
    """However long that takes: a process that had ended would end the first, a minute later."""
    done = []
    as_process(monkeypatch, index)
    monkeypatch.setattr("zip_rc_jax.pipeline.grade.make_grades", lambda _: tmp_path)
    monkeypatch.setattr(
        "zip_rc_jax.pipeline.parquet.export_parquet", lambda *_: done.append("export")
    )
    monkeypatch.setattr(distributed, "barrier", lambda: done.append("wait"))
    assert main(["grade", ROLLOUT[0], f"run_dir={tmp_path}", "--format", "parquet"]) == 0
    assert done == expected


@pytest.mark.slow
def test_rollouts_of_two_processes_survive_the_death_of_one(tmp_path):
    # 24 chunks for each process: the second has most of them left when its first one is seen
    many = "rollout.prompts=192"
    arguments, chunks = (
        ["rollout", *ROLLOUT, many, f"run_dir={tmp_path}/run"],
        tmp_path / "run" / ".rollouts.partial",
    )
    with started(arguments, tmp_path, count=2) as here:
        while not (chunks / "chunk-00000001.jsonl").exists():
            assert here.processes[1].poll() is None, here.text(1)
            time.sleep(0.02)
        here.processes[1].kill()
        assert here.wait()[0] in (130, -signal.SIGABRT), here.text()
    left = set(range(1, 48, 2)) - {int(path.stem[-8:]) for path in chunks.glob("chunk-*")}
    assert left, "it was killed before its end"
    assert not (tmp_path / "run" / "rollouts").exists()
    with started(arguments, tmp_path, count=2) as here:
        assert here.wait() == [0, 0], here.text()
    assert_same_rollouts(
        read_rollouts(tmp_path / "run" / "rollouts"),
        rollouts_of_this_process(tmp_path / "alone", many),
        384,
    )
    with started(["grade", ROLLOUT[0], f"run_dir={tmp_path}/run"], tmp_path, count=2) as here:
        assert here.wait() == [0, 0], here.text()
    assert len(read_rollouts(tmp_path / "run" / "graded")) == 384


# ---- data


@pytest.mark.parametrize(
    ("lengths", "rows", "width"),
    [
        # Chain sums of four levels; and long answers of a reasoning model, log-normal around 5,000
        # tokens.
        (
            lambda rng: (
                8 + 8 * (k := rng.integers(0, 4, 4000)) + rng.gamma(6, (k + 1) * 2.2).astype(int)
            ),
            26,
            160,
        ),
        (
            lambda rng: np.minimum(rng.lognormal(np.log(5000), 0.8, 1000).astype(int), 32000),
            16,
            32768,
        ),
    ],
    ids=["chain sums", "long answers"],
)
def test_rows_are_more_than_95_percent_full(lengths, rows, width):
    sizes = np.minimum(lengths(np.random.default_rng(0)), width)
    template = rollouts(1)[0]
    data = [dataclasses.replace(template, output_token_ids=np.ones(n - 3, np.int32)) for n in sizes]
    options = {
        "label": "value",
        "batch_rows": rows,
        "row_tokens": width,
        "seed": 0,
        "pack_batches": TrainConfig().pack_batches,
    }
    batches = iter(train_batches(data, **options))
    assert np.mean([fill_rate(next(batches)) for _ in range(12)]) > 0.95


def test_a_run_says_where_it_ran_and_how_full_its_rows_were(tmp_path, capsys):
    import json

    config = TrainConfig(label="value", steps=2, batch_rows=6, row_tokens=48, log_every=1)
    lm = dataclasses.replace(tiny_lm(), layout=Layout(make_mesh(data=2, fsdp=2), TRAIN_RULES))
    train(lm, rollouts(), config, tmp_path, source={})
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert found["processes"] == 1
    assert found["versions"]["jax"] == jax.__version__
    assert {"commit", "command", "devices", "platform", "python"} <= set(found)
    assert found["config"]["train"]["steps"] == 2
    fills = [record["train/fill"] for record in records(tmp_path)]
    assert f"rows {np.mean(fills):.1%} full" in capsys.readouterr().err
