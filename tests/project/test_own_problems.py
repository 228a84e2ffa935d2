"""The example that writes problems into files, and the config that reads them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from harness.documents import ROOT
from zip_rc_jax.config.files import load_config
from zip_rc_jax.pipeline.problems import evaluation_problems, training_problems


def worked_out(question):
    """Of a sum, and of its story."""
    if "=" in question:
        return eval(question.partition(": ")[2].removesuffix("="))
    gains = {"has": 1, "gets": 1, "away": -1}
    return sum(gains[act] * int(n) for act, n in re.findall(r"(has|gets|away) (\d+)", question))


@pytest.mark.parametrize("kind", ["sums", "apples"])
def test_the_files_hold_different_solved_problems_that_the_config_reads(kind, tmp_path):
    command = [sys.executable, "examples/own_problems.py", str(tmp_path), "--kind", kind]
    subprocess.run([*command, "--train", "30", "--heldout", "9"], check=True, cwd=ROOT)
    files = {name: f"jsonl:{tmp_path}/{name}.jsonl" for name in ("train", "heldout")}
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 30
    assert [int(row["answer"]) for row in rows] == [worked_out(row["question"]) for row in rows]
    read = load_config(
        str(ROOT / "configs/own_problems.yaml"),
        [f"run_dir={tmp_path / 'run'}", *(f"problems.{k}={v}" for k, v in files.items())],
    )
    heldout = evaluation_problems(read).found
    assert len(heldout) == 9
    train = training_problems(read, 0)
    assert len(train) >= 25, "a few stories of two numbers are held-out ones"
    assert not {p.question for p in train.problems} & {p.question for p in heldout.problems}
    assert len(train.level_names) == 3
