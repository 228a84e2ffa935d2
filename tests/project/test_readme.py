"""What the README, the other documents and `--help` tell people to run is what runs."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import yaml

import zip_rc_jax
from zip_rc_jax.cli import main as cli
from zip_rc_jax.config.files import load_config

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Models that a reader has and these machines do not, and what stands in for them.
INSTEAD = {"runs/mine/final": "embedded:chain_sum_zip", "Qwen/Qwen3-1.7B": str(ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")}


def python_blocks():
    return re.findall(r"```python\n(.*?)```", DOCUMENTS[0].read_text(), re.DOTALL)


def run(blocks, monkeypatch, **names):
    """Executes the blocks one after the other, in one namespace."""
    load = zip_rc_jax.load
    monkeypatch.setattr(zip_rc_jax, "load", lambda source, **options: load(INSTEAD.get(source, source), **options))
    names |= {"zip_rc_jax": zip_rc_jax}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    blocks = [block for block in python_blocks() if "Qwen" not in block]
    grid, rng = zip_rc_jax.Grid.authors("value"), np.random.default_rng(0)
    joint = rng.dirichlet(np.ones(grid.n_reward * grid.n_length), (2, 8))
    cache = jax.config.jax_compilation_cache_dir
    try:
        names = run(
            [block.replace("/path/to/cache", str(tmp_path)) for block in blocks],
            monkeypatch,
            joint=joint.reshape(2, 8, grid.n_reward, grid.n_length).astype(np.float32),
            unfinished=np.ones((2, 8), bool),
            tokens_so_far=np.full((2, 8), 20),
            grid=grid,
        )
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert names["result"].text.endswith("Answer: 14")
    assert names["result"].finish_reason == "stop"
    assert names["action"].multiplicity.shape == (2, 8)
    assert dict(names["lm"].layout.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.slow
def test_the_python_of_the_readme_for_a_published_model_runs(monkeypatch, smollm2_gguf):
    thinking = ', chat_template_kwargs={"enable_thinking": False}'  # which the template of Qwen3 takes, and not that of the stand-in
    names = run(
        [block.replace(thinking, "").replace("max_tokens=2048", "max_tokens=32") for block in python_blocks() if "Qwen" in block],
        monkeypatch,
    )
    assert names["lm"].head.label == "value"
    assert names["result"].text


def commands():
    """Returns every complete `zip-rc` command of the documents and of the help of each command."""
    texts = {path.name: path.read_text() for path in DOCUMENTS}
    subparsers = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    texts |= {f"{name} --help": parser.description.replace("\n         ", " ") for name, parser in subparsers.choices.items()}
    found = [
        (where, x) for where, text in texts.items() for x in re.findall(r"(?:`|^(?:example: |\S*/)?)zip-rc ([^`#\n]+)", text, re.MULTILINE)
    ]
    assert len(found) > 25, "the pattern still finds them"
    return [pytest.param(command, id=f"{where}: {command.strip()[:60]}") for where, command in found if "|" not in command]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    words = shlex.split(command.removesuffix(" ..."))
    if words == [words[0]] or words[-1] == "--help":
        assert words[0] in cli.build_parser().format_help()
        return
    arguments = cli.parse(words)
    if getattr(arguments, "config", None):
        load_config(ROOT / arguments.config, arguments.overrides)
    elif arguments.command == "decode":
        zip_rc_jax.DecodeConfig(**yaml.safe_load("{" + ", ".join(arguments.overrides).replace("=", ": ") + "}"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_point_to_is_there(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"(?:benchmarks|configs|launch|tests|zip_rc_jax|docs)/[\w/.]*\w", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([\w.-]+)", text):
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
