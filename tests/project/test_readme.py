"""What the README, the other documents and `--help` tell people to run is what runs."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest
import yaml

import zip_rc_jax
from harness.documents import (
    DOCUMENTS,
    README,
    ROOT,
    assert_prints,
    blocks,
    commands,
    name_of,
    python_blocks,
    run_blocks,
)
from zip_rc_jax.cli import main as cli
from zip_rc_jax.cli.evaluate import benchmark_overrides
from zip_rc_jax.config.files import load_config

pytestmark = pytest.mark.optimized  # what stands there is what users see

MOST_LINES = 120


def test_the_readme_has_at_most_120_lines_and_fewer_than_900_words():
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) < 900


def test_the_python_of_the_readme_is_eight_lines_and_prints_what_stands_there():
    (block,) = python_blocks(README)
    assert len([line for line in block.code.splitlines() if line.strip()]) == 8
    assert block.prints
    names = run_blocks(README, [block], {})
    assert names["result"].text.endswith("Answer: 14")
    assert names["result"].finish_reason == "stop"


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path):
    (command,) = [c for c in commands(README.read_text()) if "--svg" in c]
    words = shlex.split(command)
    at = words.index("--svg") + 1
    shown, drawn = ROOT / words[at], tmp_path / "drawn.svg"
    assert f"]({words[at]})" in README.read_text()
    assert cli.main([*words[:at], str(drawn), *words[at + 1 :]]) == 0

    def without_colors(path):  # a color says P(correct) once more, without a decimal point
        return re.sub(r"#[0-9a-f]{3,6}", "#", path.read_text())

    assert_prints(without_colors(drawn), without_colors(shown), words[at])


# Where a page writes CONFIG for any of the configs that it names.
ANY_CONFIG = "configs/qwen3_1.7b.yaml"


def told_commands():
    """Every complete `zip-rc` command of the documents and of the help of each command."""
    texts = {name_of(path): path.read_text() for path in DOCUMENTS}
    subparsers = next(
        a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)
    )
    texts |= {
        f"{name} --help": parser.description.replace("\n         ", " ")
        for name, parser in subparsers.choices.items()
    }
    told = [(where, command) for where, text in texts.items() for command in commands(text)]
    assert len(told) > 25, "the pattern still finds them"
    return [pytest.param(command, id=f"{where}: {command[:60]}") for where, command in told]


@pytest.mark.parametrize("command", told_commands())
def test_commands_are_understood(command):
    words = shlex.split(command.removesuffix(" ...").replace("CONFIG", ANY_CONFIG))
    if words == [words[0]] or words[-1] == "--help":
        assert words[0] in cli.build_parser().format_help()
        return
    arguments = cli.parse(words)
    if getattr(arguments, "config", None):
        named = benchmark_overrides(getattr(arguments, "benchmarks", None))
        load_config(ROOT / arguments.config, [*arguments.overrides, *named])
    elif arguments.command == "decode":
        zip_rc_jax.DecodeConfig(
            **yaml.safe_load("{" + ", ".join(arguments.overrides).replace("=", ": ") + "}")
        )


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_what_documents_point_to_is_there(path):
    text = path.read_text()
    for name in re.findall(
        r"(?<![\w/.])(?:benchmarks|configs|launch|tests|zip_rc_jax|docs|examples)/[\w/.]*\w", text
    ):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([\w./-]+)", text) + re.findall(
        r"^make ([\w./-]+)", text, re.MULTILINE
    ):
        assert re.search(
            rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE
        ), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_block_that_does_not_run_says_why(path):
    """Documents name a language for every block, so that no Python is overlooked."""
    for block in blocks(path):
        assert block.language, f"line {block.line}: name a language, such as text or bash"
        assert not block.not_run or block.language == "python", (
            f"line {block.line}: only Python runs"
        )
