"""The real server, asked by the public client: its answers are those of `decode`."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest

from harness.servers import CONFIG, NAME, SECONDS, TEMPLATE, chatty, client, post, running
from zip_rc_jax import Decoder, Request
from zip_rc_jax.models.io.chat import render

PROMPT = "1 + 2 ="


@pytest.fixture(scope="module")
def chat_lm(lm):
    return chatty(lm)


@pytest.fixture(scope="module")
def server(chat_lm):
    with running(chat_lm) as server:
        yield server


@pytest.fixture(scope="module")
def ask(server):
    return client(server)


@pytest.fixture(scope="module")
def decoder(chat_lm):
    return Decoder(chat_lm, CONFIG)


def alone(decoder, **options):
    (result,) = decoder([Request(options.pop("prompt", PROMPT), **{"seed": 3} | options)])
    return result


def joined(chunks):
    """The text that a stream adds up to."""
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_chat_is_answered_as_decode_answers_it(ask, decoder, chat_lm):
    turns = [{"role": "user", "content": "1 + 2"}]
    found = ask.chat.completions.create(model=NAME, messages=turns, seed=3)
    expected = alone(decoder, prompt=turns)
    assert expected.prompt == render(TEMPLATE, {}, turns, {}) == PROMPT
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    usage = expected.usage
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (
        usage.prompt_tokens,
        usage.tokens,
    )


def test_the_account_says_what_the_search_did_and_what_it_cost(ask, decoder):
    expected = alone(decoder, n=3, alpha=0.4, beta=0.02)
    asked = {"n": 3, "alpha": 0.4, "beta": 0.02, "return_tree": True}
    found = ask.completions.create(model=NAME, prompt=PROMPT, seed=3, extra_body={"zip_rc": asked})
    account = found.choices[0].zip_rc
    assert account["p_correct"] == pytest.approx(expected.expected_reward)
    assert account["tokens"] == expected.usage.tokens
    assert account["steps"] == expected.usage.serial_steps
    assert account["decisions"] == len(expected.trace)
    begun = [p for p in expected.prefixes if p.token_ids]
    mean = sum(len(p.token_ids) + p.expected_remaining for p in begun) / len(begun)
    cost = (0.4 * expected.usage.tokens + 0.6 * expected.usage.serial_steps) / mean
    assert account["gen_cost"] == pytest.approx(cost)
    assert [p["token_ids"] for p in account["tree"]["prefixes"]] == [
        list(p.token_ids) for p in expected.prefixes
    ]
    assert (account["seed"], account["strategy"]) == (3, "zip_rc")


def test_without_a_seed_every_request_draws_its_own_and_says_it(ask, decoder):
    found = [ask.completions.create(model=NAME, prompt=PROMPT).choices[0] for _ in range(2)]
    seeds = [choice.zip_rc["seed"] for choice in found]
    assert seeds[0] != seeds[1]
    for choice, seed in zip(found, seeds, strict=True):
        assert choice.text == alone(decoder, seed=seed).text


def test_n_choices_are_searches_with_the_next_seeds(ask, decoder):
    found = ask.completions.create(model=NAME, prompt=[PROMPT, "a b"], seed=3, n=2)
    wanted = [alone(decoder, prompt=p, seed=s) for p in (PROMPT, "a b") for s in (3, 4)]
    assert [(c.index, c.text) for c in found.choices] == [
        (i, result.text) for i, result in enumerate(wanted)
    ]
    assert found.usage.prompt_tokens == sum(r.usage.prompt_tokens for r in wanted[::2])
    assert found.usage.completion_tokens == sum(r.usage.tokens for r in wanted)


def test_prompts_may_be_token_ids(ask, chat_lm, decoder):
    ids = chat_lm.tokenizer.encode(PROMPT)
    text = alone(decoder, prompt=ids).text
    for prompt in (ids, [ids]):
        found = ask.completions.create(model=NAME, prompt=prompt, seed=3)
        assert [choice.text for choice in found.choices] == [text]


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (":zip", {}),
        (":fixed3", {"strategy": "fixed", "n": 3}),
        (":half_finished", {"strategy": "half_finished"}),
    ],
)
def test_the_name_of_the_model_may_choose_the_strategy(ask, chat_lm, suffix, options):
    found = ask.completions.create(model=NAME + suffix, prompt=PROMPT, seed=3)
    expected = Decoder(chat_lm, CONFIG, **options)([Request(PROMPT, seed=3)])[0]
    assert found.choices[0].text == expected.text
    assert found.usage.completion_tokens == expected.usage.tokens
    assert found.model == NAME + suffix


def test_the_listed_models_are_there(ask):
    names = [model.id for model in ask.models.list()]
    assert {NAME, f"{NAME}:zip", f"{NAME}:fixed1", f"{NAME}:fixed4"} <= {*names}
    assert [ask.models.retrieve(name).id for name in names] == names


def test_log_probabilities_are_those_of_the_answers_tokens(ask, decoder):
    expected = alone(decoder)
    wanted = expected.prefixes[expected.prefix_id].logprobs
    plain = ask.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "1 + 2"}], seed=3, logprobs=True
    )
    entries = plain.choices[0].logprobs.content
    assert [x.logprob for x in entries] == pytest.approx(wanted)
    assert "".join(x.token for x in entries).startswith(expected.text)
    old = ask.completions.create(model=NAME, prompt=PROMPT, seed=3, logprobs=0)
    assert old.choices[0].logprobs.token_logprobs == pytest.approx(wanted)


@pytest.mark.parametrize("zip_rc", [{"n": 1}, {"strategy": "fixed"}, {"stream": "best"}])
def test_a_stream_has_the_same_log_probabilities_and_usage(ask, decoder, zip_rc):
    options = {name: value for name, value in zip_rc.items() if name != "stream"}
    expected = alone(decoder, **options)
    chunks = list(
        ask.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "1 + 2"}],
            seed=3,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"zip_rc": zip_rc},
        )
    )
    entries = [
        x.logprob
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for x in c.choices[0].logprobs.content
    ]
    assert entries == pytest.approx(expected.prefixes[expected.prefix_id].logprobs)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == expected.usage.tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_one_prefix_alone_streams_as_it_grows(ask, decoder):
    chunks = list(
        ask.chat.completions.create(
            model=f"{NAME}:fixed1",
            messages=[{"role": "user", "content": "1 + 2"}],
            seed=3,
            stream=True,
        )
    )
    expected = alone(decoder, strategy="fixed", n=1)
    assert joined(chunks) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    before_the_end = [c for c in chunks[:-1] if c.choices[0].delta.content]
    assert len(before_the_end) >= len(expected.prefixes[0].token_ids) // CONFIG.interval > 1
    for chunk in chunks[1:-1]:
        assert set(chunk.zip_rc) >= {"p_correct", "remaining_tokens", "live", "paused"}
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].zip_rc["tokens"] == expected.usage.tokens


def test_the_best_prefix_streams_with_corrections(ask, decoder):
    """Whoever follows the rule has the answer in the end."""
    revised = 0
    for seed in range(6):
        text = ""
        for chunk in ask.completions.create(
            model=f"{NAME}:fixed",
            prompt=PROMPT,
            seed=seed,
            stream=True,
            extra_body={"zip_rc": {"stream": "best"}},
        ):
            if revise := (chunk.zip_rc or {}).get("revise"):
                assert revise["keep"] < len(text)
                text, revised = text[: revise["keep"]], revised + 1
            text += chunk.choices[0].text
        assert text == alone(decoder, strategy="fixed", seed=seed).text
    assert revised, "no seed shows a correction: the test shows nothing"


def test_an_answer_below_the_threshold_is_refused_and_never_begun(ask):
    asked = {"model": NAME, "messages": [{"role": "user", "content": "1 + 2"}], "seed": 3}
    options = {"extra_body": {"zip_rc": {"abstain_below": 1.0, "n": 1}}}
    plain = ask.chat.completions.create(**asked, **options).choices[0]
    assert plain.message.content is None
    assert "below abstain_below=1" in plain.message.refusal
    assert plain.zip_rc["finish_reason"] == "abstain"
    chunks = list(ask.chat.completions.create(**asked, **options, stream=True))
    assert joined(chunks) == ""
    assert "below abstain_below=1" in chunks[-1].choices[0].delta.refusal


def test_budgets_end_a_search_and_say_so(ask, decoder):
    found = ask.completions.create(
        model=f"{NAME}:fixed", prompt=PROMPT, seed=3, extra_body={"zip_rc": {"token_budget": 12}}
    )
    expected = alone(decoder, strategy="fixed", token_budget=12)
    assert found.choices[0].text == expected.text
    assert found.usage.completion_tokens == expected.usage.tokens <= 12
    account = found.choices[0].zip_rc
    assert (found.choices[0].finish_reason, account["finish_reason"]) == ("length", "token_budget")


def test_tools_go_to_the_template_and_what_the_model_writes_comes_back(ask, decoder):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    asked = {"model": NAME, "messages": [{"role": "user", "content": "1 +"}], "seed": 3}
    found = ask.chat.completions.create(**asked, tools=tools, tool_choice="auto")
    assert found.choices[0].message.content == alone(decoder, prompt="1 + 1 =").text
    without = ask.chat.completions.create(**asked, tools=tools, tool_choice="none")
    assert without.choices[0].message.content == alone(decoder, prompt="1 + =").text


@pytest.mark.parametrize("mode", ["certain", "best"])
def test_sampling_options_and_stop_strings_are_those_of_decode(ask, decoder, mode):
    options = {"temperature": 0.8, "top_p": 0.95, "stop": ["wait", "check"]}
    more = {"top_k": 12, "min_p": 0.01, "repetition_penalty": 1.1, "stop_token_ids": [3]}
    asked = {"model": NAME, "prompt": PROMPT, "seed": 4, **options}
    found = ask.completions.create(**asked, extra_body=more).choices[0]
    expected = alone(decoder, seed=4, **options | more | {"stop": ("wait", "check")})
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    text = ""
    for chunk in ask.completions.create(
        **asked, extra_body=more | {"zip_rc": {"stream": mode}}, stream=True
    ):
        text = text[: (chunk.zip_rc.get("revise") or {"keep": None})["keep"]]
        text += chunk.choices[0].text
    assert text == expected.text


def test_greedy_decoding_takes_one_prefix(ask, decoder):
    found = ask.completions.create(model=NAME, prompt=PROMPT, temperature=0)
    assert found.choices[0].text == alone(decoder, temperature=0.0, n=1).text
    assert found.choices[0].zip_rc["n"] == 1


def mixed(number):
    """Request number `number` of many: a body, and the same options for `decode`."""
    draw = random.Random(number)
    options = {"seed": number % 7, "max_tokens": draw.choice([6, 12, 24])}
    # These compile no programs of their own, as others do.
    options |= draw.choice([{}, {"temperature": 0.7}, {"min_p": 0.1}])
    zip_rc = draw.choice(
        [{}, {"n": 2}, {"strategy": "fixed"}, {"beta": 0.2, "alpha": 1.0}, {"token_budget": 20}]
    )
    prompt = f"{number % 11} + {number % 5} ="
    request = Request(prompt, **options | zip_rc)
    extra = {"min_p": options.pop("min_p")} if "min_p" in options else {}
    body = {"model": NAME, "prompt": prompt, "extra_body": {"zip_rc": zip_rc} | extra}
    return body | options, request


def test_64_requests_at_once_with_mixed_options_are_answered_as_decode_answers_them(
    server, decoder
):
    async def one(ask, body, streamed):
        if not streamed:
            return (await ask.completions.create(**body)).choices[0].text
        chunks = await ask.completions.create(**body, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_at_once(bodies):
        given = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**given, timeout=5 * SECONDS) as ask:
            asked = [one(ask, body, i % 2) for i, body in enumerate(bodies)]
            return await asyncio.gather(*asked)

    bodies, requests = zip(*map(mixed, range(64)), strict=True)
    found = asyncio.run(all_at_once(bodies))
    assert found == [result.text for result in decoder(list(requests))]
    assert server.service.is_idle


def test_null_is_as_good_as_absent(server, decoder):
    fields = dict.fromkeys(("n", "stop", "temperature", "logprobs", "zip_rc", "stream", "user"))
    found = post(server, {"model": NAME, "prompt": PROMPT, "seed": 3} | fields)
    assert found.json()["choices"][0]["text"] == alone(decoder).text
