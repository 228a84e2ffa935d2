"""The explorer at `/`, and what a request with `introspect` is told, over HTTP."""

from __future__ import annotations

import json

import httpx2
import pytest

from harness.servers import CONFIG, NAME, chatty, post, running
from zip_rc_jax import Decoder, Request
from zip_rc_jax.inference.introspection import explain_decisions, texts_of

PROMPT = "1 + 2 ="
ASKED = {"model": NAME, "prompt": PROMPT, "seed": 3}


@pytest.fixture(scope="module")
def chat_lm(lm):
    return chatty(lm)


@pytest.fixture(scope="module")
def server(chat_lm):
    with running(chat_lm) as server:
        yield server


@pytest.fixture(scope="module")
def expected(chat_lm):
    """The same search by `decode`, with its joints."""
    (result,) = Decoder(chat_lm, CONFIG)([Request(PROMPT, seed=3)], return_joints=True)
    return result


def chunks_of(reply):
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def live_data(text):
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])["live"]


def test_the_page_is_served_with_a_policy_and_without_a_key(server):
    reply = httpx2.get(server.url)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "connect-src 'self'" in reply.text
    live = live_data(reply.text)
    assert (live["model"], live["chat"], live["key"]) == (NAME, True, False)
    options = {"n": CONFIG.n, "alpha": CONFIG.alpha, "beta": CONFIG.beta}
    options |= {"max_tokens": CONFIG.max_tokens, "strategies": ["zip", "fixed", "half_finished"]}
    assert live["options"] == options
    assert "/" not in httpx2.get(f"{server.url}/openapi.json").json()["paths"]


def test_every_event_has_its_decision_and_all_that_was_weighed(server, expected, chat_lm):
    body = ASKED | {"stream": True, "zip_rc": {"introspect": True, "return_tree": True}}
    chunks = [c["zip_rc"] for c in chunks_of(post(server, body)) if "zip_rc" in c]
    *steps, last = chunks
    grid = chat_lm.head.grid
    explained = explain_decisions(expected.trace, texts_of(expected), CONFIG, grid)
    assert len(steps) == len(expected.trace)
    for step, decision, one in zip(steps, expected.trace, explained, strict=True):
        told = step["introspection"]
        assert told["decision"]["multiplicity"] == list(decision.multiplicity)
        assert told["actions"]["multiplicity"] == one.multiplicity.tolist()
        known = [(a, b) for a, b in zip(told["actions"]["utility"], one.utility, strict=True) if a]
        assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-5)
        shape = (len(decision.prefix_ids), grid.n_reward, grid.n_length)
        assert decision.joints.shape == shape
        flat = [x for table in told["decision"]["joints"] for row in table for x in row]
        assert flat == pytest.approx(decision.joints.ravel().tolist(), abs=1e-4)
    assert steps[0]["introspection"]["grid"] == grid.to_dict()
    assert steps[0]["introspection"]["settings"]["beta"] == CONFIG.beta
    texts = {}
    for step in steps:
        for number, text in step["introspection"]["new_text"].items():
            texts[int(number)] = texts.get(int(number), "") + text
    assert texts == {p.id: p.text for p in expected.prefixes if p.text}
    # The tree holds it too, as results.jsonl does, so a kept answer can be explored.
    record = last["tree"]["introspection"]
    assert [d["multiplicity"][0] for d in record["decisions"]] == [
        list(d.multiplicity) for d in expected.trace
    ]


def test_an_answer_that_is_not_streamed_has_it_in_its_tree(server, expected, tmp_path):
    from zip_rc_jax.explorer.searches import read_results, results_page

    reply = post(server, ASKED | {"zip_rc": {"introspect": True, "return_tree": True}})
    (choice,) = reply.json()["choices"]
    assert len(choice["zip_rc"]["tree"]["introspection"]["decisions"]) == len(expected.trace)
    path = tmp_path / "kept.json"
    path.write_text(reply.text)
    data = results_page("kept", [read_results(path, "kept")])
    assert data["searches"][0]["trace"][0]["actions"]["utility"][0] is not None


def test_introspection_changes_no_answer_and_is_told_only_where_it_is_asked_for(server, expected):
    plain = chunks_of(post(server, ASKED | {"stream": True}))
    assert not any("introspection" in c.get("zip_rc", {}) for c in plain)
    told = chunks_of(post(server, ASKED | {"stream": True, "zip_rc": {"introspect": True}}))
    for chunks in (plain, told):
        text = "".join(c["choices"][0]["text"] for c in chunks)
        assert text == expected.text


def test_fewer_prefixes_and_another_strategy_are_weighed_as_they_were_decided(server):
    for fields in ({"n": 2, "beta": 0.0}, {"strategy": "fixed"}, {"alpha": 1.0, "beta": 0.3}):
        body = ASKED | {"stream": True, "zip_rc": fields | {"introspect": True}}
        steps = [c["zip_rc"]["introspection"] for c in chunks_of(post(server, body))[:-1]]
        assert steps
        for step in steps:
            assert step["actions"]["multiplicity"][0] == step["decision"]["multiplicity"]
            utility = step["decision"]["utility"]
            if utility is not None:
                assert step["actions"]["utility"][0] == pytest.approx(utility, abs=1e-5)


def test_the_page_of_an_engine_that_branches_offers_what_can_be_mixed(chat_lm):
    import dataclasses

    with running(chat_lm, dataclasses.replace(CONFIG, candidates="branching")) as server:
        assert live_data(httpx2.get(server.url).text)["options"]["strategies"] == ["zip"]


def test_what_was_promised_of_the_model_stands_on_the_page(chat_lm):
    promised = {"says": "calibrated: errors at most 10%"}
    with running(chat_lm, calibration=promised) as server:
        assert live_data(httpx2.get(server.url).text)["calibration"] == promised["says"]
