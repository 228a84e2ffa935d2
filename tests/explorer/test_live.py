"""A question is asked on the page, in a real Chromium and with a real server."""

from __future__ import annotations

import dataclasses

import pytest

from harness.browser import browser, page_of
from harness.servers import CONFIG, chatty, running
from zip_rc_jax import Decoder, Request

QUESTION = "1 + 2"


@pytest.fixture(scope="module")
def chrome():
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def chat_lm(lm):
    return chatty(lm)


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(CONFIG, candidates="branching", beta=0.02)


@pytest.fixture(scope="module")
def server(chat_lm, config):
    with running(chat_lm, config) as server:
        yield server


@pytest.fixture(scope="module")
def decoder(chat_lm, config):
    return Decoder(chat_lm, config)


def ask(page, question=QUESTION):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("ends by stop").wait_for()


def texts_on(page):
    """The texts of all prefixes, as they stand there."""
    places = page.locator(".texts li")
    for i in range(places.count()):
        places.nth(i).scroll_into_view_if_needed()
        places.nth(i).locator(".t").first.wait_for()
    return [places.nth(i).locator(".tokens").text_content() for i in range(places.count())]


def test_the_page_shows_the_search_that_decode_makes(chrome, server, decoder):
    (expected,) = decoder([Request([{"role": "user", "content": QUESTION}], seed=0)])
    with page_of(chrome, f"{server.url}/", offline=False) as page:
        ask(page)
        answer = page.locator(".answer").text_content()
        assert answer == expected.text
        count = len(expected.trace)
        assert page.locator(".scrubber output").inner_text().startswith(f"{count} / {count}")
        begun = [p for p in expected.prefixes if p.token_ids]
        shown = [text.replace("\u200b", "") for text in texts_on(page)]
        assert shown == [p.text for p in begun]
        # The parents are told by the tree in the end, and by the decisions before.
        forked = [p for p in begun if p.parent >= 0]
        for prefix in forked:
            said = f"forked from {prefix.parent} after {prefix.fork_position}"
            assert said in page.locator(".texts").inner_text()


def test_another_price_gives_another_search(chrome, server, decoder):
    turns = [{"role": "user", "content": QUESTION}]
    with page_of(chrome, f"{server.url}/", offline=False) as page:
        facts = []
        for beta, alpha in ((0.0, 0.1), (0.5, 1.0)):
            page.get_by_label("beta, exactly").fill(str(beta))
            page.get_by_label("alpha, exactly").fill(str(alpha))
            page.keyboard.press("Tab")
            ask(page)
            (expected,) = decoder([Request(turns, seed=0, beta=beta, alpha=alpha)])
            said = " ".join(page.locator(".facts").inner_text().split())
            assert f"{expected.usage.tokens} tokens" in said
            assert "U = E[max] − β (α · compute + (1 − α) · latency) / N" in page.inner_text(".sum")
            facts.append(said)
        assert facts[0] != facts[1]


def test_a_search_with_forks_is_drawn_while_it_runs(chrome, server, decoder):
    """The page infers where a new prefix was forked from the decision before it."""
    turns, prices = [{"role": "user", "content": QUESTION}], {"alpha": 1.0, "beta": 0.4}
    (expected,) = decoder([Request(turns, seed=0, **prices)])
    assert any(p.parent > 0 for p in expected.prefixes), "a fork of a fork"
    with page_of(chrome, f"{server.url}/", offline=False) as page:
        for name, value in prices.items():
            page.get_by_label(f"{name}, exactly").fill(str(value))
            page.keyboard.press("Tab")
        ask(page)
        begun = [p for p in expected.prefixes if p.token_ids]
        assert [text.replace("\u200b", "") for text in texts_on(page)] == [p.text for p in begun]
        page.click("summary")
        events = page.locator(".events").inner_text()
        for prefix in begun:
            if prefix.parent >= 0:
                assert f"{prefix.id} forks from {prefix.parent}" in events


def test_a_refusal_is_shown_as_it_reads(chrome, server):
    with page_of(chrome, f"{server.url}/", offline=False, may_fail=" 400 ") as page:
        page.get_by_label("seed").fill("-1")
        page.get_by_label("Question", exact=True).fill(QUESTION)
        with page.expect_response("**/v1/**") as answered:
            page.get_by_role("button", name="Ask").click()
        assert answered.value.status == 400
        page.get_by_role("alert").wait_for()
        assert "seed" in page.get_by_role("alert").inner_text()


def test_the_page_asks_for_the_key_of_a_server_that_has_one(chrome, chat_lm, config):
    with (
        running(chat_lm, config, api_key="secret") as server,
        page_of(chrome, f"{server.url}/", offline=False) as page,
    ):
        page.get_by_label("API key").fill("secret")
        ask(page)
        assert "secret" not in page.content()
