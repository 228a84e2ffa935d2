"""The Makefile, run on a directory of its own."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

MAKEFILE = pathlib.Path(__file__).parents[2] / "Makefile"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_clean_deletes_the_environments_and_nothing_that_was_trained_or_downloaded(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    kept, environments = (
        ("runs/chain_sum/final", "models", "configs"),
        (".venv/bin", ".venv-tpu/bin", ".venv-newest/bin"),
    )
    for name in (*kept, *environments):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert all((tmp_path / name).is_dir() for name in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Makefile",
        "configs",
        "models",
        "runs",
    ]


def commands_of(*arguments):
    """What make would run in a checkout whose environment is there, called by no other make."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "COVERAGE")}
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.dev", "--assume-old=smollm2", *arguments],
        cwd=MAKEFILE.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_same_tests_run_with_coverage_and_without_and_ci_prints_it():
    plain, measured = commands_of("test"), commands_of("test", "COVERAGE=1")
    assert plain == ['.venv/bin/python -m pytest -m "not slow"']
    assert measured == [
        '.venv/bin/python -m coverage run -m pytest -m "not slow"',
        ".venv/bin/python -m coverage report",
    ]
    ci = (MAKEFILE.parent / ".ci/run").read_text()
    assert "\nmake test COVERAGE=1" in ci


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_demo_says_that_it_installs_before_it_does(tmp_path):
    for path in (MAKEFILE, MAKEFILE.with_name("pyproject.toml")):
        shutil.copy(path, tmp_path)
    command = ["make", "--dry-run", "PYTHON=python3", "demo"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    steps = done.stdout.splitlines()
    (said,) = [i for i, line in enumerate(steps) if "make: installing into .venv" in line]
    assert said < min(i for i, line in enumerate(steps) if "pip install" in line)
    assert steps[-1] == ".venv/bin/zip-rc demo"
