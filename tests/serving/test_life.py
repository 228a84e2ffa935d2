"""What happens around an answer: readers that are slow or leave, failures, and the end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from harness.servers import (
    CONFIG,
    NAME,
    SECONDS,
    chatty,
    client,
    gated,
    metric,
    post,
    running,
    wait_for,
)
from zip_rc_jax.inference.engine import Engine

BODY = {"model": f"{NAME}:fixed", "prompt": "1 + 2 =", "seed": 3}
SMALL = dataclasses.replace(CONFIG, max_num_seqs=4)  # slots for one request


@pytest.fixture(scope="module")
def chat_lm(lm):
    return chatty(lm)


@pytest.fixture(scope="module")
def server(chat_lm):
    """Has slots for one request at a time."""
    with running(chat_lm, SMALL) as server:
        yield server


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_an_interval(server, monkeypatch, streamed):
    with gated(monkeypatch) as gate:
        connection = httpx2.Client(timeout=SECONDS)
        body = BODY | {"stream": streamed}
        sent = threading.Event()

        def ask():
            try:
                with connection.stream("POST", f"{server.url}/v1/completions", json=body) as found:
                    sent.set()
                    list(found.iter_lines())
            except httpx2.HTTPError:
                pass

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: server.service.running() == 1)
        gate.let(1)
        wait_for(lambda: gate.passed == 1 and metric(server, "zip_rc_slots_in_use") == 4)
        # The socket is shut as a process that ends does it.
        for part in connection._transport._pool.connections:
            part._connection._network_stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        thread.join()
        wait_for(lambda: server.service.is_idle)
        gate.let(1)
        wait_for(lambda: metric(server, "zip_rc_slots_in_use") == 0)
        assert gate.passed == 2, "it ran on though nobody reads it"
    assert post(server, BODY).status_code == 200


def test_a_slow_reader_stalls_nobody(server):
    body = BODY | {"stream": True, "n": 48, "zip_rc": {"return_tree": True}}
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        wait_for(lambda: server.service.running())
        # It has read nothing, and others are answered, and so are all of its own.
        assert client(server).completions.create(**BODY).choices[0].text
        wait_for(lambda: server.service.is_idle)
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    assert len(received) > 100_000
    assert b"data: [DONE]" in received


def test_a_failure_of_the_engine_is_told_to_what_ran_and_the_next_is_answered(
    server, pool, monkeypatch
):
    expected = post(server, BODY).json()["choices"][0]["text"]
    with gated(monkeypatch) as gate:
        advance = Engine._step
        with monkeypatch.context() as patch:
            patch.setattr(
                Engine,
                "_step",
                lambda *a: (advance(*a), (_ for _ in ()).throw(RuntimeError("device")))[0],
            )
            first = pool.submit(post, server, BODY)
            wait_for(lambda: server.service.running() == 1)
            second = pool.submit(post, server, BODY)
            wait_for(lambda: server.service.waiting() == 1)
            gate.let(1)
            wait_for(lambda: gate.passed == 1)
            failed = first.result()
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
    assert "device" not in failed.text, "clients are not told of the inside"
    assert second.result().json()["choices"][0]["text"] == expected


def test_a_failure_in_the_middle_of_a_stream_is_an_error_in_it(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", lambda *_: (_ for _ in ()).throw(RuntimeError("device")))
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client(server).completions.create(**BODY, stream=True))
    assert post(server, BODY).status_code == 200


def test_a_full_queue_says_when_to_come_again(chat_lm, pool, monkeypatch):
    with running(chat_lm, SMALL, max_queue=1) as server, gated(monkeypatch):
        first = pool.submit(post, server, BODY)
        wait_for(lambda: server.service.running() == 1)
        second = pool.submit(post, server, BODY)
        wait_for(lambda: server.service.waiting() == 1)
        refused = post(server, BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert [found.result().status_code for found in (first, second)] == [200, 200]


def test_more_choices_than_the_queue_holds_are_refused(chat_lm):
    """Nor would they be taken later."""
    with running(chat_lm, SMALL, max_queue=1) as server:
        with pytest.raises(openai.BadRequestError, match="2 choices: at most 1") as wrong:
            client(server).completions.create(model=NAME, prompt="1", n=2)
        assert wrong.value.param == "n"


def test_who_waits_too_long_for_slots_is_told_when_to_come_again(chat_lm, pool, monkeypatch):
    with running(chat_lm, SMALL, max_seconds=0.3) as server, gated(monkeypatch):
        first = pool.submit(post, server, BODY)
        wait_for(lambda: server.service.running() == 1)
        second = post(server, BODY)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(second.headers["Retry-After"]) >= 1
    assert first.result().status_code == 200


def test_a_request_has_the_servers_time_limit(chat_lm):
    """It gets what was ready by then."""
    with running(chat_lm, SMALL, max_seconds=300.0) as server:
        hours = itertools.count(step=3600)
        server.service.engine.clock = lambda: float(next(hours))
        account = post(server, BODY).json()["choices"][0]["zip_rc"]
    assert account["finish_reason"] == "time_budget"
    assert account["tokens"] == 0


def test_asked_to_stop_it_answers_what_runs_and_refuses_what_is_new(chat_lm, pool, monkeypatch):
    with running(chat_lm, SMALL) as server:
        with gated(monkeypatch) as gate:
            streamed = pool.submit(post, server, BODY | {"stream": True})
            wait_for(lambda: server.service.running() == 1)
            waiting = pool.submit(post, server, BODY)
            wait_for(lambda: server.service.waiting() == 1)
            server.handle_exit(signal.SIGTERM, None)
            refused = post(server, BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx2.get(f"{server.url}/health").status_code == 503
            gate.let(1)
        assert "data: [DONE]" in streamed.result().text
        assert waiting.result().status_code == 200
        wait_for(lambda: server.should_exit)


def test_what_is_not_ready_within_the_grace_is_handed_back(chat_lm, pool, monkeypatch):
    with running(chat_lm, SMALL, grace_seconds=0.0) as server, gated(monkeypatch):
        found = pool.submit(post, server, BODY)
        wait_for(lambda: server.service.running() == 1)
        server.handle_exit(signal.SIGTERM, None)
        answer = found.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


def test_the_metrics_count_what_happened(chat_lm):
    with running(chat_lm, SMALL) as server:
        assert metric(server, "zip_rc_slots") == SMALL.max_num_seqs
        found = [post(server, BODY | {"seed": i}).json() for i in range(3)]
        post(server, {"model": NAME})
        tokens = sum(answer["usage"]["completion_tokens"] for answer in found)
        assert metric(server, "zip_rc_generated_tokens_total") == tokens
        assert metric(server, "zip_rc_tokens_per_second") > 0
        path = 'zip_rc_requests_total{path="/v1/completions",status='
        assert [metric(server, f'{path}"{status}"}}') for status in (200, 400)] == [3, 1]
        accounts = [answer["choices"][0]["zip_rc"] for answer in found]
        for name, key in (("p_correct", "p_correct"), ("gen_cost", "gen_cost")):
            assert metric(server, f"zip_rc_{name}_count") == 3
            total = sum(account[key] for account in accounts)
            assert metric(server, f"zip_rc_{name}_sum") == pytest.approx(total)
        assert metric(server, "zip_rc_slots_in_use") == 0
        waiting = [metric(server, f"zip_rc_requests_{name}") for name in ("waiting", "running")]
        assert waiting == [0, 0]
