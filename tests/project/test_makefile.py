"""The Makefile, run on a directory of its own."""

from __future__ import annotations

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
