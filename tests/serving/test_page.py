"""The page of the documentation: its programs, with a server as the page starts it."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from harness.documents import DOCS, assert_prints, blocks
from harness.servers import running
from zip_rc_jax import load
from zip_rc_jax.cli.main import parse
from zip_rc_jax.cli.serve import with_template
from zip_rc_jax.inference.api import resolve

PAGE = DOCS / "serving.md"


@pytest.mark.slow  # programs as users have them
def test_the_programs_of_the_page_print_what_stands_there():
    shell = next(block.code for block in blocks(PAGE) if block.language == "bash")
    template = re.search(r'echo "(.*)" >', shell)[1]
    lm = with_template(load("embedded:chain_sum_zip"), template)
    config = resolve(None, {"n": 8, "beta": 0.05}, lm.head)
    assert "n=8 beta=0.05" in shell
    names: dict[str, object] = {}
    programs = [block for block in blocks(PAGE) if block.language == "python"]
    assert len(programs) == 3
    with running(lm, config, name="chain_sum_zip", context=0) as server:
        for block in programs:
            code = block.code.replace("http://127.0.0.1:8000", server.url)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, str(PAGE), "exec"), names)
            assert_prints(printed.getvalue(), block.prints, f"line {block.line}")


def test_the_page_names_every_field_and_every_limit():
    from zip_rc_jax.serving.errors import TYPES
    from zip_rc_jax.serving.schema import ChatBody, CompletionBody, ZipFields

    text = PAGE.read_text()
    named = {*re.findall(r"`(?:zip_rc\.)?([a-z_]+)", text)} | {*re.findall(r"[a-z_]+", text)}
    for kind in (ChatBody, CompletionBody, ZipFields):
        given = {*kind.model_fields} - NEUTRAL
        assert given <= named, given - named
    assert all(str(status) in text for status in TYPES if status != 405)


# Accepted with the one value that asks for nothing: other names for what the page says.
NEUTRAL = {"frequency_penalty", "presence_penalty", "parallel_tool_calls", "response_format"}
NEUTRAL |= {"store", "service_tier", "suffix"}


def test_the_command_of_the_page_is_one():
    shell = next(block.code for block in blocks(PAGE) if block.language == "bash")
    line = next(line for line in shell.splitlines() if line.startswith("zip-rc "))
    arguments = parse(line.split()[1:])
    assert (arguments.command, arguments.overrides) == ("serve", ["n=8", "beta=0.05"])
