"""What a server does not take: it says so with the right status, and names the field."""

from __future__ import annotations

import contextlib
import json
import logging
import socket

import httpx2
import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.servers import NAME, chatty, client, post, running
from zip_rc_jax.serving import limits
from zip_rc_jax.serving.schema import ChatBody, CompletionBody

CHAT = "/v1/chat/completions"
GOOD = {"model": NAME, "prompt": "1 + 2 =", "seed": 3, "max_tokens": 4}
TURNS = [{"role": "user", "content": "1 + 2"}]
GOOD_CHAT = {"model": NAME, "messages": TURNS, "seed": 3, "max_tokens": 4}


@pytest.fixture(scope="module")
def chat_lm(lm):
    return chatty(lm)


@pytest.fixture(scope="module")
def server(chat_lm):
    with running(chat_lm, max_body_bytes=20_000) as server:
        yield server


WRONG = {
    "unknown field": ({"beem": 3}, "beem", "nothing reads it"),
    "unknown field, near to another": ({"max_token": 3}, "max_token", "did you mean 'max_tokens'"),
    "unknown budget": ({"zip_rc": {"betta": 1}}, "zip_rc.betta", "did you mean 'beta'"),
    "token budget of 0": ({"zip_rc": {"token_budget": 0}}, "zip_rc.token_budget", "greater"),
    "time budget of 0": ({"zip_rc": {"time_budget": 0}}, "zip_rc.time_budget", "greater"),
    "longer than the server's": ({"zip_rc": {"time_budget": 1e6}}, "zip_rc.time_budget", "300"),
    "no samples": ({"zip_rc": {"n": 0}}, "zip_rc.n", "at least one"),
    "more samples": ({"zip_rc": {"n": 9}}, "zip_rc.n", "the engine has n=4"),
    "alpha": ({"zip_rc": {"alpha": 2}}, "zip_rc.alpha", "[0, 1]"),
    "a price as text": ({"zip_rc": {"beta": "0.1"}}, "zip_rc.beta", "number"),
    "strategy": ({"zip_rc": {"strategy": "best"}}, "zip_rc.strategy", "one of zip"),
    "strategy that lacks a budget": (
        {"zip_rc": {"strategy": "length_budget"}},
        "length_budget",
        "needs a budget",
    ),
    "strategy said twice": (
        {"model": f"{NAME}:fixed2", "zip_rc": {"n": 3}},
        "zip_rc.n",
        "say it in one place",
    ),
    "max_tokens": ({"max_tokens": 25}, "max_tokens", "the engine has max_tokens=24"),
    "max_tokens of 0": ({"max_tokens": 0}, "max_tokens", "at least one"),
    "temperature": ({"temperature": -1}, "temperature", "not negative"),
    "greedy samples": ({"temperature": 0, "zip_rc": {"n": 2}}, "temperature", "all the same"),
    "top_p": ({"top_p": 1.5}, "top_p", "(0, 1]"),
    "seed": ({"seed": -1}, "seed", "32 bits"),
    "choices": ({"n": 0}, "n", "greater"),
    "stop": ({"stop": ""}, "stop", "stops everything"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty", "nothing else than 0"),
    "alternatives": ({"logprobs": 3}, "logprobs", "nothing else than 0"),
    "best_of": ({"best_of": 4}, "best_of", "nothing else than 1"),
    "echo": ({"echo": True}, "echo", "nothing else than False"),
    "usage without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", ""),
    "no model": ({"model": None}, "model", "string"),
    "an empty prompt": ({"prompt": []}, "prompt", "empty"),
    "reserved ids": ({"prompt": [1, 127]}, "prompt", "reserved"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(server, case):
    change, param, reason = WRONG[case]
    answer = post(server, GOOD | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert reason in error["message"]
    assert len(error["message"]) < 900


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        ({"messages": "x"}, "messages", "list"),
        ({"functions": []}, "functions", "nothing reads it"),
        ({"tool_choice": "required"}, "tool_choice", "auto"),
        ({"top_logprobs": 5}, "top_logprobs", "nothing else than 0"),
        ({"response_format": {"type": "json_object"}}, "response_format", "nothing else"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "differ"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "messages", "no such argument"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(server, change, param, reason):
    answer = post(server, GOOD_CHAT | change, CHAT)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert reason in error["message"]


def test_the_client_raises_its_own_errors(server):
    ask = client(server)
    with pytest.raises(openai.NotFoundError) as wrong:
        ask.completions.create(model="other", prompt="x")
    assert wrong.value.code == "model_not_found"
    assert NAME in str(wrong.value)
    with pytest.raises(openai.BadRequestError) as wrong:
        ask.completions.create(model=NAME, prompt="1 " * 9, max_tokens=24)
    assert (wrong.value.code, wrong.value.param) == ("context_length_exceeded", "prompt")
    assert "9 tokens with max_tokens=24: the server holds 32 tokens" in str(wrong.value)
    with pytest.raises(openai.NotFoundError):
        ask.models.retrieve(f"{NAME}:nothing")
    for name in (f"{NAME}:fixed9", f"{NAME}:zip9"):
        with pytest.raises(openai.BadRequestError, match="the engine has n=4"):
            ask.completions.create(model=name, prompt="x")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'"x"', b"[" * 9000, b"NaN"])
def test_a_body_that_is_no_object_of_json_is_refused(server, body):
    answer = post(server, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_routes_that_are_not_there_are_errors_of_the_same_form(server):
    absent = post(server, GOOD, "/v2/nothing")
    not_read = httpx2.get(f"{server.url}/v1/completions")
    assert (absent.status_code, not_read.status_code) == (404, 405)
    assert "/v2/nothing" in absent.json()["error"]["message"]
    assert "GET /v1/completions" in not_read.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(server):
    large = json.dumps(GOOD | {"user": "x" * 30_000}).encode()
    assert post(server, large).status_code == 413
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n7530\r\n" + b"x" * 30_000
        )
        assert b" 413 " in raw.recv(2000)


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 0.05)
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in raw.recv(2000)


def test_no_other_site_may_ask_from_a_browser(server):
    """CORS is off: no answer allows another origin, and a form's content type is no JSON."""
    other = {"Origin": "https://elsewhere.example"}
    answer = post(server, GOOD, headers=other)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    form = post(server, json.dumps(GOOD).encode(), headers=other | {"Content-Type": "text/plain"})
    assert form.status_code == 400


def test_a_key_is_asked_for_under_v1_alone(chat_lm):
    with running(chat_lm, api_key="secret") as server:
        assert client(server, "secret").models.list().data
        for wrong in ("x", "Secret", "secret2", "é"):
            header = {"Authorization": f"Bearer {wrong}".encode()}
            answer = httpx2.get(f"{server.url}/v1/models", headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client(server, "other").completions.create(model=NAME, prompt="x")
        assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
        assert httpx2.get(f"{server.url}/metrics").status_code == 200


@contextlib.contextmanager
def everything_logged(caplog):
    """Also what the loggers of the server keep to themselves."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.access")]
    with caplog.at_level(logging.DEBUG):
        for logger in loggers:
            logger.addHandler(caplog.handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(caplog.handler)


def test_prompts_are_logged_only_if_asked(chat_lm, server, caplog):
    with everything_logged(caplog):
        post(server, GOOD | {"prompt": "11 + 10 ="})
        post(server, GOOD | {"prompt": "11 + 10 =", "nonsense": "11 + 10 ="})
    assert "POST /v1/completions" in caplog.text
    assert "11 + 10" not in caplog.text
    with running(chat_lm, log_prompts=True) as talkative, everything_logged(caplog):
        post(talkative, GOOD | {"prompt": "11 + 10 ="})
    assert "11 + 10" in caplog.text


# ---- anything at all

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1 + 2 =", "fixed", NAME, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def changed(good, kind):
    """A good body with some fields replaced by anything."""
    names = st.sampled_from([*sorted(kind.model_fields), "nonsense"])
    return st.dictionaries(names, JUNK, min_size=1, max_size=2).map(lambda change: good | change)


@settings(max_examples=100)
@example(("/v1/completions", GOOD | {"nonsense": "\ud800"}))
@example(("/v1/completions", GOOD | {"prompt": "\ud800"}))
@example(("/v1/completions", GOOD | {"max_tokens": 10**40}))
@example(("/v1/completions", GOOD | {"temperature": float("nan")}))
@example((CHAT, GOOD_CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}))
@given(
    st.tuples(st.just("/v1/completions"), changed(GOOD, CompletionBody))
    | st.tuples(st.just(CHAT), changed(GOOD_CHAT, ChatBody))
)
def test_no_body_whatever_is_an_error_of_the_server(server, case):
    path, body = case
    answer = post(server, json.dumps(body).encode(), path)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].endswith(".")
