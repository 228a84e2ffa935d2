"""Chats: the form of their content, and templates that fail, never end or write without end."""

from __future__ import annotations

import concurrent.futures
import datetime

import numpy as np
import pytest

from harness.small_tokenizers import (
    CHATML_TEMPLATE,
    GEMMA_TEMPLATE,
    LLAMA_TEMPLATE,
    chatml,
    gemma,
    llama,
)
from zip_rc_jax.models.io import chat
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.runtime.errors import UsageError

PARTS_TEMPLATE = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}[{{ p.text | trim }}]{% endfor %}{% endif %}{% endfor %}<assistant>"""  # noqa: E501
ONLY_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor "
    "%}{% endfor %}"
)
ONE = [{"role": "user", "content": "x"}]


def of(template: str) -> Tokenizer:
    return Tokenizer(chatml().backend, ("<|im_end|>",), template)


def part(text):
    return {"type": "text", "text": text}


# ---- the same text as transformers


CONVERSATIONS = [
    [{"role": "user", "content": " hello "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "extra": None},
        {"role": "user", "content": "c"},
    ],
    [{"role": "user", "content": "<|im_end|> {{ 1 }} {% raw %}"}],
]
FEATURES = """{% set ns = namespace(n=0, last='') %}
{% macro turn(m) %}{% generation %}{{ m['role'] ~ ':' ~ m['content'] }}{% endgeneration %}{% endmacro %}
{%- for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ turn(m) | trim }}{{ '%03d|' % ns.n }}
{{- m | tojson(indent=2) }}{{ 'ab' * 3 }}{{ '{:>5}'.format(ns.n) }}{{ m.content.replace('l', 'L').split('o')[-1].strip() }}
{%- endfor %}{{ [3, 1] | sort | join(', ') }}{{ messages | map(attribute='role') | list }}{{ 2 ** 5 }}{{ tools is none }}
{{- dict(a=1) }}{% if add_generation_prompt %}{{ eos_token }}{% endif %}{{ bos_token is defined }}{{ 'x' | indent(2) | center(9) }}"""  # noqa: E501


@pytest.mark.parametrize(
    "template", [CHATML_TEMPLATE, GEMMA_TEMPLATE, LLAMA_TEMPLATE, PARTS_TEMPLATE, FEATURES]
)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_template_writes_what_it_writes_in_transformers(template, messages):
    special = {"bos_token": "<|endoftext|>"}
    tokenizer = Tokenizer(chatml().backend, ("<|im_end|>",), template, special)
    theirs = tokenizer._hugging_face.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **special
    )
    assert tokenizer.chat(messages) == theirs


def test_reasoning_has_all_its_names_and_tools_may_be_functions():
    turn = {"role": "assistant", "content": "a", "reasoning": "r"}
    template = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ tools | tojson }}"

    def add(a: int) -> int:
        """Adds one.

        Args:
          a: a number.
        """
        return a + 1

    tokenizer = of(template)
    assert tokenizer.chat([turn], tools=[add]) == tokenizer._hugging_face.apply_chat_template(
        [turn], tokenize=False, tools=[add]
    )


# ---- content


@pytest.mark.parametrize("make", [chatml, gemma, llama])
def test_a_list_of_text_parts_is_their_text_where_the_template_reads_texts(make):
    """Gemma's trims: of a list it would write what Python prints."""
    written = make().chat([{"role": "user", "content": [part("one "), part("two")]}])
    assert written == make().chat([{"role": "user", "content": "one two"}])
    assert "type" not in written


def test_a_template_that_reads_parts_gets_them_as_they_are():
    assert (
        of(PARTS_TEMPLATE).chat([{"role": "user", "content": [part(" a "), part("b")]}])
        == "<user>[a][b]<assistant>"
    )
    assert of(PARTS_TEMPLATE).chat(ONE) == "<user>x<assistant>"
    assert of(ONLY_PARTS).chat([{"role": "user", "content": "whole"}]) == "<user>whole", (
        "a text is one part where only parts are read"
    )


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user"}, r"turn 0 of role 'user': it has no content"),
        ({"role": "user", "content": None}, r"turn 0 of role 'user': it has no content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"it has no content"),
        ({"role": "user", "content": []}, r"turn 0 with content \[\]"),
        (
            {"role": "user", "content": 5},
            r"turn 0 with content 5: content is a text, or a list of parts",
        ),
        ({"role": "user", "content": b"x"}, r"turn 0 of a chat: it holds a bytes"),
        ({"role": "user", "content": {"text": "x"}}, r"content is a text, or a list of parts"),
        (
            {"role": "user", "content": [part("x"), {"type": "image_url", "image_url": "y"}]},
            r"a part of type 'image_url'",
        ),
        ({"role": "user", "content": [part(5)]}, r"it holds no text"),
        ({"role": "user", "content": [{"type": "text"}]}, r"it holds no text"),
        ({"role": "user", "content": [None]}, r"a part of type 'NoneType'"),
        ({"role": 3, "content": "x"}, r"turn 0 with role 3: a chat is a list of dicts with a role"),
        ({"role": "", "content": "x"}, r"turn 0 with role ''"),
        ({"role": ["user"], "content": "x"}, r"turn 0 with role \['user'\]"),
        ({"role": "user", "content": "x", "more": object()}, r"it holds a object"),
        ({"role": "user", "content": "x", "more": 10**5000}, r"a whole number of 16610 bits"),
    ],
)
def test_turns_that_say_nothing_are_refused_by_name(turn, message):
    for template in (CHATML_TEMPLATE, GEMMA_TEMPLATE, PARTS_TEMPLATE):
        with pytest.raises(UsageError, match=message):
            of(template).chat([turn])


def test_a_turn_that_calls_a_tool_needs_no_content_and_an_empty_text_is_one():
    template = (
        "{% for m in messages %}{{ m.role }}{{ m.content is defined }}{{ m.tool_calls }}{% "
        "endfor %}"
    )
    assert (
        of(template).chat(
            [{"role": "assistant", "content": None, "tool_calls": [{"n": np.int64(3)}]}]
        )
        == "assistantFalse[{'n': 3}]"
    )
    assert of("{{ messages[0].content }}.").chat([{"role": "user", "content": ""}]) == "."


def test_a_chat_that_contains_itself_is_refused():
    chat_ = [{"role": "user", "content": "x"}]
    chat_[0]["more"] = chat_
    with pytest.raises(UsageError, match="nested more than 64 levels deep, or contains itself"):
        chatml().chat(chat_)
    content = []
    content.append(content)
    with pytest.raises(UsageError, match="contains itself"):
        chatml().chat([{"role": "user", "content": content}])


def test_the_callers_messages_stay_as_they_are():
    messages = [{"role": "user", "content": [part("a")], "none": None}]
    gemma().chat(messages)
    assert messages == [{"role": "user", "content": [part("a")], "none": None}]


# ---- templates that fail


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ 1 % 0 }}",
        "{{ messages[9].content }}",
        "{{ [].pop() }}",
        "{{ 'a'.index('b') }}",
        "{{ '%d' % 'x' }}",
        "{{ '{}'.format() }}",
        "{{ 'a' | nothing }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now(5) }}",
        "{{ raise_exception(5) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "{{ cycler() }}",
    ],
)
def test_whatever_a_template_raises_is_a_refusal(template):
    with pytest.raises(
        UsageError,
        match="chat messages: the model's template|the model's chat template: it is not valid",
    ):
        of(template).chat(ONE)


# ---- templates that never end


LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}BODY{% "
    "endfor %}{% endfor %}{% endfor %}"
)
ENDLESS = {
    "silent loops": LOOP.replace("BODY", "{% set x = 1 %}"),
    "empty loops": LOOP.replace("BODY", ""),
    "loops that write": LOOP.replace("BODY", "x"),
    "loops in a macro": "{% macro f() %}" + LOOP.replace("BODY", "x") + "{% endmacro %}{{ f() }}",
    "loops in a block": "{% set x %}" + LOOP.replace("BODY", "x") + "{% endset %}",
    "loops in a marked part": "{% generation %}"
    + LOOP.replace("BODY", "x")
    + "{% endgeneration %}",
    "loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor "
    "%}{% endfor %}",
}
HUGE = [
    "{{ 'x' * 10**12 }}",
    "{{ [0] * 10**12 }}",
    "{{ 10**12 * 'x' }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'x' | center(10**12) }}",
    "{{ 'x'.center(10**12) }}",
    "{{ 'x'.zfill(10**12) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999).join('y' * 99999) }}",
    "{{ ('y' * 99999) | join('x' * 99999) }}",
    "{{ ('\\n' * 99999) | indent(99999) }}",
    "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[0]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
]


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_loops_without_end_are_ended_in_any_thread(template, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for call in (of(template).chat, lambda m: pool.submit(of(template).chat, m).result()):
            with pytest.raises(UsageError, match="refuses them .*(takes longer|writes more)"):
                call(ONE)


@pytest.mark.parametrize("template", HUGE)
def test_what_would_take_all_memory_is_refused_before_it_is_made(template):
    with pytest.raises(UsageError, match="the model's template refuses them") as refusal:
        of(template).chat(ONE)
    assert "Limit" in str(refusal.value)


def test_the_limits_leave_large_chats_alone():
    """Ten million characters, and hundreds of turns."""
    long = "word " * 2_000_000  # only rendered here
    assert long in chatml().chat([{"role": "user", "content": long}])
    assert (
        chatml()
        .chat([{"role": "user", "content": str(i)} for i in range(2000)])
        .count("<|im_start|>user")
        == 2000
    )


# ---- the date


def test_a_template_that_writes_the_date_can_be_told_which():
    dated = of("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    assert chat.reads_clock(dated.chat_template)
    assert not chat.reads_clock(CHATML_TEMPLATE)
    with chat.template_time(datetime.datetime(2024, 7, 26)):
        assert dated.chat(ONE) == "26 Jul 2024x"
    assert dated.chat(ONE) == f"{datetime.datetime.now():%d %b %Y}x"
