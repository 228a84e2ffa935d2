"""Packages of extras: what is missing is an error that names the extra, before any work."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import EXTRAS, check_extra, optional_import

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = tuple(EXTRAS)


def names(requirements):
    """The modules of requirements, as PyPI's names spell them."""
    return {
        re.match(r"[A-Za-z0-9_.-]+", item)[0].lower().replace("-", "_") for item in requirements
    }


def run_without(modules, *arguments, directory):
    """`zip-rc ARGUMENTS` in a process where these modules cannot be imported."""
    absent = f"import sys; sys.modules.update(dict.fromkeys({list(modules)!r}))\n"
    code = absent + "from zip_rc_jax.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, check=False)


def test_every_optional_module_is_in_the_extra_that_its_error_names():
    listed = {
        extra: names(PROJECT["optional-dependencies"][extra])
        for extra in ("eval", "train", "gguf", "data", "serve", "buckets", "fleet")
    }
    assert {
        module: extra for extra in listed for module in listed[extra] - {"zip_rc_jax"}
    } == EXTRAS
    assert not names(PROJECT["dependencies"]) & set(EXTRAS), "the base has it already"


def test_training_includes_what_evaluation_needs_and_all_includes_everything():
    extras = PROJECT["optional-dependencies"]
    assert "zip-rc-jax[eval]" in extras["train"]
    assert extras["all"] == ["zip-rc-jax[train,eval,gguf,data,serve,buckets,fleet]"]
    assert "zip-rc-jax[train]" in extras["data"]


@pytest.mark.parametrize("module", MODULES)
def test_an_import_of_a_missing_module_is_an_error_that_names_its_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(
            UsageError,
            match=rf"{module}.*not installed\. Fix: pip install 'zip-rc-jax\[{EXTRAS[module]}\]'",
        ),
        optional_import(),
    ):
        __import__(module)


def test_a_broken_package_is_no_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "no_such_dependency", None)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"), optional_import():
        __import__("no_such_dependency")


def test_a_check_names_all_that_is_missing_at_once_and_passes_where_nothing_is(monkeypatch):
    check_extra("train", "zip-rc train")
    for module in ("grain", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UsageError, match=r"packages matplotlib, grain: zip-rc train needs them.*\[train\]"
    ):
        check_extra("train", "zip-rc train")
    with pytest.raises(UsageError, match=r"package matplotlib: zip-rc evaluate needs it.*\[eval\]"):
        check_extra("eval", "zip-rc evaluate")
    check_extra("gguf", "nothing of these")


@pytest.mark.parametrize(
    "module", [module for module in MODULES if EXTRAS[module] in ("eval", "train")]
)
def test_a_command_names_the_extra_before_it_reads_its_config(module, tmp_path):
    commands = (
        (["evaluate", "nowhere.yaml"],)
        if EXTRAS[module] == "eval"
        else (["train", "nowhere.yaml", "--stage", "critic"], ["grade", "x"])
    )
    for command in commands:
        done = run_without([module], *command, directory=tmp_path)
        assert done.returncode == 2
        assert f"zip-rc {command[0]}: Python package {module}" in done.stderr
        assert f"pip install 'zip-rc-jax[{EXTRAS[module]}]'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "rollout", "label"])
def test_the_other_stages_name_the_extra_of_training(command, tmp_path):
    done = run_without(
        ["grain"], command, *(["x.yaml"] if command != "demo" else []), directory=tmp_path
    )
    assert (done.returncode, "zip-rc-jax[train]" in done.stderr) == (2, True)


def test_a_gguf_file_names_its_extra(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    done = run_without(["gguf"], "decode", "m.gguf", "--prompt", "x", directory=tmp_path)
    assert done.returncode == 2
    assert "pip install 'zip-rc-jax[gguf]'" in done.stderr


@pytest.mark.slow  # a process of its own compiles the decoder
def test_the_embedded_model_decodes_and_votes_over_formulas_with_the_base_alone(tmp_path):
    question = "State the final answer to the following arithmetic problem: 4 + 3 - 2 ="
    options = ("n=2", "interval=8", "window=4", "max_tokens=96")
    done = run_without(
        MODULES,
        "decode",
        "embedded:chain_sum_zip",
        "--prompt",
        question,
        *options,
        directory=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "P(correct)" in done.stdout
    code = f"import sys; sys.modules.update(dict.fromkeys({list(MODULES)!r}))\n"
    code += "from zip_rc_jax.grading.votes import group_answers; print(group_answers(['(x-1)(x+1)', 'x^2-1', 'x^2']))"  # noqa: E501
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[0, 0, 1]\n"
