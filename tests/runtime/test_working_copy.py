"""Working copies of buckets: units are complete or absent at every moment, and what is gone is
gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from harness.stores import HttpFailure, at_operation, machine, memory_store
from zip_rc_jax.runtime import working_copy
from zip_rc_jax.runtime.buckets import Bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.working_copy import MARKER, PublishedLater

URL = "memory://b/run"
DENIED = PermissionError(13, "denied")


@pytest.fixture
def memory():
    with memory_store() as store:
        yield store


def make_unit(copy, files, name="rollouts"):
    folder = copy.root / name
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


FIRST = {"a": "1", "deep/b": "2", "c": "3"}
SECOND = {"a": "other", "d": "4"}


def test_a_local_run_directory_is_used_as_it_is(tmp_path):
    with working_copy.opened(str(tmp_path), ["rollouts"]) as directory:
        assert directory == tmp_path
        (directory / "file").write_text("1")
        assert working_copy.copy_of(directory / "file") is None
        working_copy.publish(directory / "file")
    assert contents(tmp_path) == {"file": "1"}


def test_what_one_machine_publishes_another_fetches(memory):
    one, other = machine(URL), machine(URL)
    make_unit(one, FIRST)
    (one.root / "judge").mkdir()
    (one.root / "judge" / "0.jsonl").write_text("said")
    (one.root / "grades.json").write_text("{}")
    one.sync()
    assert other.fetch(["rollouts", "judge", "grades.json", "nothing"]) == [
        "rollouts",
        "judge",
        "grades.json",
    ]
    assert contents(other.root) == contents(one.root)
    assert [(other.root / "rollouts" / x).stat().st_mtime_ns for x in FIRST] == [
        (one.root / "rollouts" / x).stat().st_mtime_ns for x in FIRST
    ], "a model with other times would count as another one"


def test_a_unit_is_absent_or_complete_after_a_failure_at_any_moment(memory):
    """Every operation fails once, and all after it: as if the machine were gone."""
    found = []
    for number in range(100):
        memory.store.clear()
        one = machine(URL)
        make_unit(one, FIRST)
        memory.before = staticmethod(at_operation(number, lambda: DENIED))
        failed = False
        try:
            one.sync()
        except UsageError:
            failed = True
        memory.before = staticmethod(lambda operation, path: None)
        reader = machine(URL)
        there = reader.fetch(["rollouts"])
        assert contents(reader.root / "rollouts") == (FIRST if there else {})
        found.append(bool(there))
        if not failed:
            break
        one.sync()
        assert reader.fetch(["rollouts"])
        assert contents(reader.root / "rollouts") == FIRST
    assert len(found) > 4
    assert found.count(True) == 1, "only the marker makes it complete"


def test_a_replaced_unit_is_the_old_one_absent_or_the_new_one(memory):
    seen = set()
    for number in range(100):
        memory.store.clear()
        one = machine(URL)
        make_unit(one, FIRST)
        one.sync()
        make_unit(one, SECOND)
        memory.before = staticmethod(at_operation(number, lambda: DENIED))
        failed = False
        try:
            one.sync()
        except UsageError:
            failed = True
        memory.before = staticmethod(lambda operation, path: None)
        reader = machine(URL)
        reader.fetch(["rollouts"])
        mine = contents(reader.root / "rollouts")
        assert mine in (FIRST, {}, SECOND)
        seen.add(len(mine))
        if not failed:
            break
    assert seen == {3, 0, 2}
    names = Bucket(URL).names()
    assert names == ["rollouts/" + x for x in sorted([MARKER, *SECOND])]


def test_a_unit_is_read_whole_although_no_listing_shows_it_yet(memory):
    memory.lag = 1_000
    one, other = machine(URL), machine(URL)
    make_unit(one, FIRST)
    one.sync()
    assert Bucket(URL).names() == []
    assert other.fetch(["rollouts"])
    assert contents(other.root / "rollouts") == FIRST


@pytest.mark.parametrize("change", ["cut", "other", "gone"])
def test_an_object_that_is_not_as_it_was_written_is_named(memory, change):
    one, reader = machine(URL), machine(URL)
    make_unit(one, FIRST)
    one.sync()
    bucket = Bucket(URL)
    if change == "gone":
        bucket.delete(["rollouts/deep/b"])
    else:
        bucket.write("rollouts/deep/b", b"" if change == "cut" else b"x")
    with pytest.raises(
        UsageError, match=r"object memory://b/run/rollouts/deep/b: it is not as it was written"
    ):
        reader.fetch(["rollouts"])
    assert not (reader.root / "rollouts").exists(), "nothing half read is left"


@pytest.mark.parametrize(
    "marker", ["{", "[]", '{"files": {"../x": {}}}', '{"files": {"/x": {}}}', '{"files": 3}']
)
def test_a_marker_that_is_damaged_or_leads_outside_is_refused(memory, marker):
    Bucket(URL).write(f"rollouts/{MARKER}", marker.encode())
    with pytest.raises(UsageError, match="it is damaged"):
        machine(URL).fetch(["rollouts"])


def test_what_was_deleted_in_the_bucket_is_gone_here_too(memory):
    one, other = machine(URL), machine(URL)
    make_unit(one, FIRST)
    (one.root / "report").mkdir()
    (one.root / "report" / "a").write_text("1")
    (one.root / "report" / "b").write_text("2")
    one.sync()
    other.fetch(["rollouts", "report"])
    Bucket(URL).delete([f"rollouts/{MARKER}", "report/a"])
    assert other.fetch(["rollouts", "report"]) == ["report"]
    assert contents(other.root) == {"report/b": "2"}


def test_what_was_deleted_here_is_deleted_there_but_not_what_others_made(memory):
    one, other = machine(URL), machine(URL)
    make_unit(one, FIRST)
    (one.root / "a.json").write_text("1")
    one.sync()
    (other.root / "b.json").write_text("2")
    make_unit(other, SECOND, "graded")
    other.sync()
    shutil.rmtree(one.root / "rollouts")
    (one.root / "a.json").unlink()
    one.sync()
    assert [x for x in Bucket(URL).names() if not x.startswith("graded/")] == ["b.json"]


def test_nothing_is_deleted_if_something_could_not_be_published(memory):
    one = machine(URL)
    (one.root / "chunk").write_text("1")
    one.sync()
    (one.root / "chunk").unlink()
    make_unit(one, FIRST)

    def refuse(operation, path):
        if operation == "pipe_file" and path.endswith("deep/b"):
            raise DENIED

    memory.before = staticmethod(refuse)
    with pytest.raises(UsageError, match="access is denied"):
        one.sync()
    assert Bucket(URL).exists("chunk")


def test_a_checkpoint_that_is_being_removed_is_not_published_in_parts(memory):
    one = machine(URL)
    folder = make_unit(one, {"state/a": "1", "state/b": "2"}, "final/checkpoints/3")
    one.sync()
    (folder / "state" / "a").unlink()
    one.sync()
    reader = machine(URL)
    assert reader.fetch(["final"])
    assert contents(reader.root / "final" / "checkpoints" / "3") == {"state/a": "1", "state/b": "2"}
    shutil.rmtree(folder)
    one.sync()
    assert not reader.fetch(["final"])


def test_temporaries_and_locks_are_not_published(memory):
    one = machine(URL)
    for name in (".a.1234abcd-1-1-12345678.tmp", ".zip-rc.lock"):
        (one.root / name).write_text("")
    (one.root / "3.orbax-checkpoint-tmp-1").mkdir()
    (one.root / "3.orbax-checkpoint-tmp-1" / "x").write_text("")
    one.sync()
    assert Bucket(URL).names() == []


def test_an_unchanged_file_is_not_sent_again(memory):
    one = machine(URL)
    make_unit(one, FIRST)
    (one.root / "log").write_text("1")
    one.sync()
    memory.done.clear()
    one.sync()
    assert not [x for x in memory.done if x[0] == "pipe_file"]
    (one.root / "log").write_text("12")
    one.sync()
    assert [x for x in memory.done if x[0] == "pipe_file"] == [("pipe_file", "/b/run/log")]


def test_the_settings_of_the_first_machine_decide(memory):
    one, other = machine(URL), machine(URL)
    for copy, value in ((one, 1), (other, 2)):
        (copy.root / "f.json").write_text(json.dumps({"n": value}))
    working_copy.check_first_settings(one.root / "f.json", {"n": 1}, "chunks", "start again")
    with pytest.raises(UsageError, match="chunks.*n=1.*n=2|n.*1.*2"):
        working_copy.check_first_settings(other.root / "f.json", {"n": 2}, "chunks", "start again")


def fail_in_a_stage(memory, refused=False):
    with working_copy.opened(URL, []) as directory:
        (directory / "chunk").write_text("1")
        if refused:
            memory.before = staticmethod(at_operation(0, lambda: DENIED))
        raise ZeroDivisionError


def test_a_stage_that_fails_leaves_what_it_finished_and_its_own_error(memory):
    with pytest.raises(ZeroDivisionError):
        fail_in_a_stage(memory)
    assert Bucket(URL).read("chunk") == b"1"


def test_a_stage_that_fails_says_what_could_not_be_published(memory, capsys):
    with pytest.raises(ZeroDivisionError):
        fail_in_a_stage(memory, refused=True)
    assert "what is finished was not published" in capsys.readouterr().err


def test_checkpoints_are_published_when_they_are_whole(memory, tmp_path):
    one, later = machine(URL), PublishedLater()
    stage = one.root / "final"
    stage.mkdir()
    later.publish(stage, stage / "checkpoints" / "1")
    assert Bucket(URL).names() == []
    make_unit(one, FIRST, "elsewhere")
    (stage / "checkpoints").mkdir()
    (one.root / "elsewhere").rename(stage / "checkpoints" / "1")
    later.wait()
    assert f"final/checkpoints/1/{MARKER}" in Bucket(URL).names()
    memory.before = staticmethod(at_operation(0, lambda: DENIED))
    (stage / "log").write_text("")
    later.publish(stage, stage / "checkpoints" / "1")
    with pytest.raises(UsageError, match="access is denied"):
        later.wait()
    later.publish(tmp_path, tmp_path / "never")  # local: nothing to do
    later.wait()


def test_messages_name_the_bucket_and_not_the_working_copy(memory):
    one = machine(URL)
    assert working_copy.with_addresses(f"file {one.root}/a: no") == f"file {URL}/a: no"


def test_a_file_or_model_of_a_bucket_is_fetched_for_reading(memory):
    one = machine("memory://b/models")
    make_unit(one, FIRST, "mine/model")
    make_unit(one, {"x": "checkpoint"}, "mine/checkpoints/1")
    (one.root / "table.parquet").write_text("rows")
    one.sync()
    assert contents(working_copy.fetched("memory://b/models/mine", "model")) == {
        f"model/{name}": text for name, text in FIRST.items()
    }
    assert working_copy.fetched("memory://b/models/table.parquet", "data").read_text() == "rows"
    with pytest.raises(UsageError, match="data='memory://b/models/no': there is nothing"):
        working_copy.fetched("memory://b/models/no", "data")


def test_a_status_that_passes_is_waited_for_and_one_that_does_not_is_said(memory):
    left = [4]

    def fail(operation, path):
        if left[0]:
            left[0] -= 1
            raise HttpFailure(429)

    memory.before = staticmethod(fail)
    with working_copy.opened(URL, ["rollouts"]) as directory:
        (directory / "a").write_text("1")
    assert Bucket(URL).read("a") == b"1"


def test_a_working_copy_is_removed_with_its_process_and_those_of_dead_ones_too(tmp_path):
    code = (
        "import os, sys; from zip_rc_jax.runtime.working_copy import working_copy\n"
        "copy = working_copy('memory://b/run'); (copy.root / 'x').write_text('1')\n"
        "os._exit(0) if sys.argv[1] == 'killed' else None"
    )
    environment = {**os.environ, "ZIP_RC_WORK": str(tmp_path), "PYTHONPATH": "."}
    for how, left in (("killed", 1), ("normal", 0)):
        subprocess.run([sys.executable, "-c", code, how], env=environment, check=True)
        assert len(list(tmp_path.iterdir())) == left
