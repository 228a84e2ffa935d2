"""Every benchmark but `NOT_HERE` runs from beginning to end, at its smallest size, and prints its
table. What it measures is not judged."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from harness.browser import chromium
from zip_rc_jax.config import KL_KINDS

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
NUMBER = r"[+-]?\d[\d.,]*(?:%|e[+-]?\d+)?"
# Arguments, and what every line of the table must look like; how many lines there are.
SMALLEST = {
    "adaptive.py": (
        "--prompts 6 --betas 0.05 --runs 1",
        rf"\| (best of|adaptive, alpha)[^|]+(\| {NUMBER} ){{6}}\|",
        3,
    ),
    "calibration.py": (
        "--runs 5 --problems 300 --error-rates 0.1 --losses 0.05",
        rf"\| (errors|loss) <= {NUMBER} (\| {NUMBER} ){{12}}\|",
        2,
    ),
    "decode.py": ("--prompts 1 --tokens 4 --runs 1", rf"(\| {NUMBER} ){{8}}\|", 2),
    "decode_limit.py": (
        "--config configs/chain_sum_demo.yaml --rows 2 4 --context 64 --dtype float32 --steps 2 "
        "--runs 1",
        rf"(\| {NUMBER} ){{7}}\|",
        2,
    ),
    "explorer.py": (
        "--tokens 64 --prefixes 2 --problems 4 --runs 1",
        rf"\| [\w() ]+ \| {NUMBER} \| {NUMBER} \|",
        10,
    ),
    "loss.py": (
        "--vocab 512 --positions 64 --width 16 --chunk 16 --compare",
        rf"\w+ +chunked +{NUMBER} .* differ by {NUMBER}",
        len(KL_KINDS),
    ),
    "overhead.py": (
        "--rows 8 --interval 2 --runs 1",
        rf"\| (plain|head|decisions) (\| {NUMBER} ){{3}}\|",
        3,
    ),
    "paged.py": (
        "--prompts 12 --mean-length 512 --chip v5e h200 --forks 0.3",
        rf"\| (v5e|h200) (\| {NUMBER} ){{17}}\|",
        2,
    ),
    "serve.py": (
        "--requests 4 --concurrency 2 --n 2 --rows 4 --runs 1",
        rf"\| (engine alone|server) (\| ({NUMBER}|-) ){{4}}\|",
        2,
    ),
    "train.py": ("--rows 1 --tokens 64 --runs 1", rf"(\| {NUMBER} ){{6}}\|", 1),
    "paper_hours.py": (
        "--configs configs/lfm2_350m.yaml",
        r"\| lfm2_350m \| [\w ]+ (\| [^|]+ ){5}\|",
        9,
    ),
    "replay.py": (
        "--prompts 3 --samples 4 --tokens 64 --stride 16 --n 2",
        rf"(search|reward|length|half|fixed|other) ?[^ ].*( +{NUMBER}){{4}}",
        7,
    ),
    "search.py": (
        "--prompts 2 --prefixes 3 --runs 1",
        rf"(correct|value) +\w+( +({NUMBER}|-)){{5}}",
        6,
    ),
}
# Needs a package that cannot live in this environment.
NOT_HERE = {"against_tunix.py"}
NEEDS_A_POOL = {"evidence.py"}  # run in tests/evaluation/test_replay.py


def test_no_benchmark_is_left_out():
    assert {path.name for path in BENCHMARKS.glob("*.py")} == SMALLEST.keys() | NOT_HERE | {
        "machine.py",
        *NEEDS_A_POOL,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_and_prints_its_table(name, smollm2_gguf):
    arguments, line, count = SMALLEST[name]
    if name == "explorer.py":
        chromium()  # without one there is nothing to measure
    # on one device, as its users run it
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(BENCHMARKS / name), *arguments.split()]
    done = subprocess.run(
        command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for row in done.stdout.splitlines() if re.fullmatch(line, row)]
    assert len(rows) == count, done.stdout
    assert "nan" not in done.stdout.lower()


@pytest.mark.slow
def test_the_hours_on_the_page_of_the_paper_are_what_the_script_prints():
    command = [sys.executable, str(BENCHMARKS / "paper_hours.py")]
    done = subprocess.run(
        command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True
    )
    page = (BENCHMARKS.parent / "docs/paper.md").read_text()
    assert done.stdout.strip() in page
