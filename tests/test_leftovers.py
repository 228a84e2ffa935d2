"""What killed writers leave is deleted by the next one; equal rollouts are equal bytes; a signal while chunks are joined is told."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from processes import rollouts

from zip_rc_jax import chunks
from zip_rc_jax.data.records import PartialRollouts, read_rollouts, write_rollouts
from zip_rc_jax.run_files import temporary_sibling, write_text
from zip_rc_jax.training.loop import Interrupted

ROOT = pathlib.Path(__file__).parent.parent


def python(code: str, **environment: str) -> subprocess.Popen:
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | path | environment, stdout=subprocess.PIPE, text=True)


WRITER = """
import pathlib, sys, time
from zip_rc_jax.run_files import temporary_sibling
path = temporary_sibling(pathlib.Path({path!r}))
path.mkdir() if {folder} else path.write_text("half")
print(path.name, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("folder", [False, True])
def test_the_next_writer_deletes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path, folder):
    path = tmp_path / "graded[1].json"
    first, second = (python(WRITER.format(path=str(path), folder=folder)) for _ in range(2))
    try:
        names = [process.stdout.readline().strip() for process in (first, second)]
        other = tmp_path / names[0].replace("-", "x-", 1)  # of another machine, which shares the folder
        other.write_text("")
        mine = temporary_sibling(path)
        mine.write_text("")
        write_text(path, "whole")
        assert all((tmp_path / name).exists() for name in names), "both live"
        first.kill()
        first.wait()
        write_text(path, "whole again")
        assert not (tmp_path / names[0]).exists()
        assert (tmp_path / names[1]).exists()
        assert other.exists()
        assert mine.exists()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_a_number_that_an_earlier_process_had_is_no_life(tmp_path):
    path = tmp_path / "a.json"
    name = temporary_sibling(path).name
    machine, number, life, rest = name.split("-")
    left = tmp_path / "-".join([machine, number, "0" * len(life), rest])
    left.write_text("half")
    write_text(path, "whole")
    assert not left.exists()


DATASET = """
import sys
from processes import rollouts
from zip_rc_jax.data.records import write_rollouts
write_rollouts(sys.argv[1] if len(sys.argv) > 1 else {directory!r}, rollouts(50), metadata={{"b": 1, "a": 2}})
"""


def test_equal_rollouts_are_equal_bytes_in_every_process(tmp_path):
    for name, seed in (("one", "1"), ("two", "2"), ("three", "3")):
        process = python(DATASET.format(directory=str(tmp_path / name)), PYTHONHASHSEED=seed)
        assert process.wait(600) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert any("array_record" in name for name in files)
    for name in files:
        assert len({(tmp_path / directory / name).read_bytes() for directory in ("one", "two", "three")}) == 1, name
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files


def test_a_signal_while_chunks_are_joined_is_told_and_costs_nothing(tmp_path, monkeypatch):
    made, items = rollouts(40), list(range(40))
    everything = PartialRollouts.all

    def interrupted(self):
        for number, rollout in enumerate(everything(self)):
            if number == 25:
                os.kill(os.getpid(), signal.SIGTERM)
            yield rollout

    def run(make):
        return chunks.write_in_chunks("grade", tmp_path / "graded", {"a": 1}, items, 8, make)

    with monkeypatch.context() as patch:
        patch.setattr(PartialRollouts, "all", interrupted)
        with pytest.raises(Interrupted, match="while the 5 chunks, which are kept, were joined"):
            run(lambda part: [made[i] for i in part])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".graded.partial"], "nothing half written stays"
    run(lambda part: pytest.fail("made again"))
    write_rollouts(tmp_path / "whole", made, metadata={"a": 1})
    assert [vars(r).keys() for r in read_rollouts(tmp_path / "graded")] == [vars(r).keys() for r in read_rollouts(tmp_path / "whole")]
    shard = next((tmp_path / "graded").glob("*array_record*")).name
    assert (tmp_path / "graded" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()
