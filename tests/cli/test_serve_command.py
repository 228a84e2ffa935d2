"""`zip-rc serve`: what it refuses before a model is loaded, and what it says."""

from __future__ import annotations

import dataclasses
import socket

import httpx2
import pytest

from harness.servers import running
from harness.tiny import tiny_lm
from zip_rc_jax import DecodeConfig
from zip_rc_jax.cli.main import build_parser, main
from zip_rc_jax.cli.serve import _name_of, run
from zip_rc_jax.models.io.calibrations import write_calibration
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.serving import server
from zip_rc_jax.serving.server import ServeConfig, Server


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["nn=8"], "nothing reads it"),
        (["n=0"], "it counts at least one"),
        (["--port", "70000"], "it is no port"),
        (["--max-queue", "0"], "nothing could ever be answered"),
        (["--max-seconds", "nan"], "nothing could ever be answered"),
        (["--name", "a:b"], "names a strategy"),
        (["--api-key", "é"], "headers are ASCII"),
        (["--chat-template", "nowhere.jinja"], "it cannot be read"),
        (["--host", "256.0.0.1", "--port", "0"], "it cannot be listened on"),
        (["--port", "0"], "nowhere"),  # the model itself
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(options, reason, capsys):
    assert main(["serve", "nowhere", *options]) == 2
    assert reason in capsys.readouterr().err


def test_it_is_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
    given = build_parser().parse_args(["serve", "nowhere"])
    with pytest.raises(UsageError, match="several processes"):
        run(given, [])


def test_a_port_that_is_taken_is_an_error_with_a_fix(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "nowhere", "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}" in said
    assert "choose another port, or 0" in said


def test_a_model_without_a_head_is_not_served(tmp_path, capsys):
    tiny_lm().without_head().save(tmp_path / "plain")
    assert main(["serve", str(tmp_path / "plain"), "--port", "0"]) == 2
    assert "model without a ZIP head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "context", "reason"),
    [
        (DecodeConfig(max_tokens=24), 200, "the model has 96 positions"),
        (DecodeConfig(max_tokens=96), 0, "no prompt would fit"),
        (DecodeConfig(max_tokens=32), 32, "no prompt would fit"),
    ],
)
def test_a_context_that_holds_no_prompt_is_refused(lm, config, context, reason):
    with pytest.raises(UsageError, match=reason):
        Server(lm, config, ServeConfig("tiny", context=context))


def test_slots_that_do_not_fit_the_device_are_refused_at_the_start(lm, monkeypatch):
    from zip_rc_jax.inference import memory

    monkeypatch.setattr(memory, "device_limit", lambda *_: 2**20)
    with pytest.raises(UsageError, match="max_num_seqs"):
        Server(lm, DecodeConfig(max_tokens=24, max_num_seqs=512), ServeConfig("tiny"))


def test_it_listens_here_and_logs_no_prompts_unless_told_otherwise():
    given = build_parser().parse_args(["serve", "model"])
    assert (given.host, given.log_prompts, given.api_key) == ("127.0.0.1", False, "")
    default = {f.name: f.default for f in dataclasses.fields(ServeConfig)}
    same = ("host", "port", "context", "max_queue", "max_seconds", "max_body_bytes", "log_prompts")
    assert {name: getattr(given, name) for name in same} == {n: default[n] for n in same}
    assert given.grace_seconds == default["grace_seconds"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("embedded:chain_sum_zip", "chain_sum_zip"),
        ("runs/demo/final/", "final"),
        ("Qwen/Qwen3-1.7B", "Qwen3-1.7B"),
        ("m.gguf", "m.gguf"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_name(model, name):
    assert _name_of(model) == name


RECORD = {
    "options": {"n": 2, "beta": 0.05, "abstain_below": 0.5},
    "promise": {"risk": "errors", "delta": 0.05, "epsilon": 0.1},
    "measured": {"cost": 1.25},
    "data": {"name": "pool", "problems": 100, "path": "/secret"},
}


def test_the_promise_of_a_calibration_is_said_at_the_start(lm, tmp_path, monkeypatch, capsys):
    lm.save(tmp_path / "model")
    write_calibration(lm, tmp_path / "model" / "calibration.json", RECORD)
    made = []

    class Fake:
        def __init__(self, lm, config, serve):
            made.append(serve)

        def run(self, **_):
            pass

    monkeypatch.setattr(server, "Server", Fake)
    assert main(["serve", str(tmp_path / "model"), "--port", "0", "max_tokens=24", "n=2"]) == 0
    said = capsys.readouterr().out
    assert "errors among answered at most 5.0% with confidence 90%: n=2 beta=0.05" in said
    [serve] = made
    assert serve.calibration["says"] in said
    assert serve.calibration["options"] == RECORD["options"]
    assert "secret" not in str(serve.calibration)


def test_clients_find_the_promise_beside_the_model(lm):
    told = {"says": "calibrated", "problems": 100}
    with running(lm, calibration=told) as served:
        listed = httpx2.get(f"{served.url}/v1/models").json()["data"]
    assert [model["zip_rc"]["calibration"] for model in listed] == [told] * len(listed)
