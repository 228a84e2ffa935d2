"""What cannot be written is said before anything expensive, and the fix is one that helps."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import pathlib

import pytest

from harness.processes import prepare
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.models.io import huggingface, load
from zip_rc_jax.models.io.load import export
from zip_rc_jax.pipeline import grade, label, policy, rollouts, run_dir, train
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import (
    check_writable,
    text_file,
    write_json,
    write_jsonl,
    write_text,
    writing,
)

HELPS = {
    errno.ENOSPC: "make room on the disk",
    errno.EFBIG: "make room on the disk",
    errno.EDQUOT: "make room: your quota",
    errno.EROFS: "not on a read-only file system",
    errno.EACCES: "choose a path that you may write to",
    errno.EPERM: "choose a path that you may write to",
    errno.ENOTDIR: "rename the file that stands where a directory belongs",
    errno.EEXIST: "rename the file that stands where a directory belongs",
    errno.EISDIR: "rename the directory that has this name",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "mend the symbolic link",
    errno.EIO: "look at the disk",
    errno.ESTALE: "look at the network file system",
    errno.EMFILE: "allow more open files",
    errno.ECHILD: "see that the path can be written",
}


def os_error(number, path="/some/where"):
    return OSError(number, os.strerror(number), path)


def through_orbax(number):
    """How TensorStore says it, inside what Orbax says."""
    error = ValueError(
        'UNKNOWN: Failed writing: "/m/d/1a": Failed to write 6 bytes to file 17: ... '
        f"[os_error_code='{number}']"
    )
    wrapped = Exception("Encountered error while writing array index")
    wrapped.__cause__ = error
    return wrapped


def through_safetensors(number):
    return RuntimeError(
        f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    )


@pytest.mark.parametrize("number", HELPS, ids=errno.errorcode.get)
@pytest.mark.parametrize("said", [os_error, through_orbax, through_safetensors])
def test_the_fix_suits_the_reason_whoever_failed(number, said):
    with (
        pytest.raises(
            UsageError,
            match=r"model x: it could not be written \(.*\), and nothing of it was kept\. Fix: ",
        ) as found,
        writing("model x"),
    ):
        raise said(number)
    assert HELPS[number] in found.value.fix
    others = {text for text in HELPS.values() if text != HELPS[number]}
    assert not any(text in found.value.fix for text in others)


def test_a_bare_exception_and_a_long_one_are_short_errors():
    with pytest.raises(UsageError, match=r"could not be written \(Exception\)"), writing("x"):
        raise Exception
    with pytest.raises(UsageError) as found, writing("y" * 5000):
        raise RuntimeError("z" * 3_000_000)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("number", HELPS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_files_that_cannot_be_written_leave_the_old_one_and_nothing_else(
    tmp_path, monkeypatch, number, step
):
    (tmp_path / "f").write_text("old")
    failing = {"fsync": (os, "fsync"), "replace": (pathlib.Path, "replace")}[step]

    def fail(*_):
        raise os_error(number, str(tmp_path / "f"))

    monkeypatch.setattr(*failing, fail)
    for write in (
        lambda p: write_text(p, "new"),
        lambda p: write_json(p, {"new": 1}),
        lambda p: write_jsonl(p, ["new"]),
    ):
        with pytest.raises(
            UsageError, match=rf"file {tmp_path}/f: it could not be written .* unchanged\. Fix: "
        ) as found:
            write(tmp_path / "f")
        assert HELPS[number] in found.value.fix
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


# ---- tried out beforehand


def in_the_way(tmp_path):
    """Paths below which nothing can be written, as root either, and what helps."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "such")
    (tmp_path / "to_file").symlink_to("file")
    return {
        tmp_path / "file": "rename the file",
        tmp_path / "file" / "below" / "it": "rename the file",
        tmp_path / "to_file": "rename the file",
        tmp_path / "loop" / "x": "symbolic link",
        tmp_path / "dangling": "mend the link",
        tmp_path / "dangling" / "x": "mend the link",
        tmp_path / ("x" * 256): "shorter path",
        tmp_path.joinpath(*["x" * 200] * 25): "shorter path",
        pathlib.Path("/proc/1/task/here"): "choose a path",
        pathlib.Path("/dev/null"): "rename the file",
        pathlib.Path("/dev/null/x"): "rename the file",
    }


def tree(directory):
    return sorted(str(p) for p in directory.rglob("*"))


@pytest.mark.parametrize("number", range(11))
def test_what_is_in_the_way_is_found_and_nothing_is_left(tmp_path, number):
    path, fix = list(in_the_way(tmp_path).items())[number]
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"^run_dir .*: .*Fix: ") as found:
        check_writable(path, "run_dir")
    assert fix in found.value.fix
    assert len(str(found.value)) < 1000
    assert tree(tmp_path) == before
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("number", HELPS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["mkdir", "open", "write", "fsync", "replace"])
def test_a_failure_of_each_step_of_the_trial_is_said_with_its_fix(
    tmp_path, monkeypatch, number, step
):
    def fail(*_, **__):
        raise os_error(number)

    class Full(io.FileIO):
        write = flush = fail

    if step == "open":
        monkeypatch.setattr(pathlib.Path, "open", fail)
    elif step == "write":
        opened = pathlib.Path.open
        monkeypatch.setattr(
            pathlib.Path,
            "open",
            lambda self, mode="r", *_, **how: (
                Full(self, mode) if "w" in mode else opened(self, mode, **how)
            ),
        )
    else:
        monkeypatch.setattr(os if step == "fsync" else pathlib.Path, step, fail)
    with pytest.raises(UsageError, match=r"run_dir .*/a/b: ") as found:
        check_writable(tmp_path / "a" / "b", "run_dir")
    assert HELPS[number] in found.value.fix
    monkeypatch.undo()
    assert tree(tmp_path) == []


def test_a_trial_leaves_nothing_and_changes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c", "run_dir")
    assert tree(tmp_path) == []
    (tmp_path / "a" / "kept").mkdir(parents=True)
    check_writable(tmp_path / "a" / "b" / "c", "run_dir")
    check_writable(tmp_path / "a", "run_dir")
    check_writable(tmp_path / "a" / ("x" * 255), "run_dir")
    assert tree(tmp_path) == [str(tmp_path / "a"), str(tmp_path / "a" / "kept")]


def test_directories_that_vanish_between_two_processes_are_made_again(tmp_path, monkeypatch):
    """Several processes try the same directory out, and each removes what it made."""
    opened, times = pathlib.Path.open, []

    def vanishing(self, *args, **kwargs):
        times.append(self)
        if len(times) < 4:
            os.rmdir(self.parent)
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", vanishing)
    check_writable(tmp_path / "a", "run_dir")
    assert len(times) == 4


def test_a_directory_that_vanishes_while_mkdir_looks_at_it_is_no_file(tmp_path, monkeypatch):
    """`mkdir` meets what another process made, which removes it before `mkdir` looks what it is."""
    made, times = os.mkdir, []

    def vanishing(path, *args, **kwargs):
        times.append(path)
        if len(times) < 4:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        return made(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", vanishing)
    check_writable(tmp_path / "a", "run_dir")
    assert len(times) == 4
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="it, or a folder above it, is a file"):
        check_writable(tmp_path / "file", "run_dir")


# ---- before a model is loaded


@pytest.fixture
def no_models(monkeypatch):
    """Nothing is loaded or sampled."""

    def never(*_, **__):
        raise AssertionError("a model was loaded")

    for module in (policy, run_dir, label, train, load):
        monkeypatch.setattr(module, "load", never)
    for module in (policy, rollouts):
        monkeypatch.setattr(module, "training_problems", never)
    for module in (grade, label, train):
        monkeypatch.setattr(module, "random_access", never)


STAGES = {
    "rollout": (["rollout"], "rollouts"),
    "grade": (["grade"], "graded"),
    "label": (["label"], "labelled"),
    "evaluate": (["evaluate"], "report"),
    "train policy": (["train", "--stage", "policy"], "policy"),
    "train critic": (["train", "--stage", "critic"], "critic"),
    "train lite": (["train", "--stage", "lite"], "lite"),
    "train final": (["train", "--stage", "final"], "final"),
}
RUN_DIRS = {
    "a file": "file",
    "below a file": "file/run",
    "a link to itself": "loop/run",
    "too long": "x" * 256,
    "a pattern": "lr[1]",
    "a star": "a*",
    "a backslash": "a\\b",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", RUN_DIRS)
def test_a_run_dir_that_cannot_be_written_is_refused_by_every_stage_before_a_model_is_loaded(
    tmp_path, capsys, no_models, stage, kind
):
    in_the_way(tmp_path)
    before = tree(tmp_path)
    arguments, _ = STAGES[stage]
    run_dir = tmp_path / RUN_DIRS[kind]
    # As a config says it: an override is YAML, where [ is a list.
    config = prepare_config(tmp_path, run_dir)
    assert main([arguments[0], str(config), *arguments[1:]]) == 2
    said = capsys.readouterr().err
    assert "run_dir" in said
    assert "Fix: " in said
    assert "room" not in said
    assert [p for p in tree(tmp_path) if p != str(config)] == before


def prepare_config(directory, run_dir):
    path = directory / "config.yaml"
    path.write_text(
        f"run_dir: '{run_dir}'\npolicy: {{path: {directory}/policy}}\n"
        "problems: {train: gym:chain_sum}\nrollout: {prompts: 9}\nevaluate: {prompts: 9}\n"
    )
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_with_the_name_of_the_result_is_found_before_a_model_is_loaded(
    tmp_path, capsys, no_models, stage
):
    arguments, result = STAGES[stage]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / result).write_text("precious")
    assert (
        main([arguments[0], str(prepare_config(tmp_path, tmp_path / "run")), *arguments[1:]]) == 2
    )
    assert f"{result} in it is a file, not a directory" in capsys.readouterr().err
    assert (tmp_path / "run" / result).read_text() == "precious"


@pytest.mark.parametrize("name", ["file", "file/out", "loop/out", "x" * 256])
@pytest.mark.parametrize("command", ["decode", "export"])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path, capsys, no_models, command, name
):
    in_the_way(tmp_path)
    output = str(tmp_path / name)
    arguments = {
        "decode": ["decode", "m", "--prompt", "x", "--output", output],
        "export": ["export", "m", output],
    }[command]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert name in said or "file name too long" in said.lower() or name[:100] in said
    assert "Fix: choose a" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_an_export_that_fails_half_way_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    lm = tiny_lm(dataclasses.replace(TINY_MODEL, qk_norm=True))  # a Qwen3

    def fail(*_, **__):
        raise through_safetensors(errno.ENOSPC)

    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(UsageError, match=r"could not be written .*Fix: make room on the disk"):
        export(lm, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [n for n in HELPS if n != errno.ECHILD], ids=errno.errorcode.get)
def test_what_the_shell_is_told_about_any_other_failure_of_writing_has_its_fix(
    tmp_path, monkeypatch, capsys, number
):
    def fail(*_):
        raise os_error(number, str(tmp_path / "somewhere"))

    monkeypatch.setattr("zip_rc_jax.cli.export.run", fail)
    assert main(["export", "m", str(tmp_path / "e")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/somewhere" in said
    assert HELPS[number] in said


def test_the_run_dir_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = prepare(tmp_path, steps=1)
    assert (
        main(
            [
                "train",
                str(config),
                "--stage",
                "final",
                "mesh.fsdp=1",
                "run_dir=~/mine",
                "final.eval_rollouts=0",
            ]
        )
        == 0
    )
    assert (tmp_path / "mine" / "final" / "model").is_dir()
    assert main(["decode", "~/mine/final", "--prompt", "1 + 1", "max_tokens=2", "n=1"]) == 0


def test_a_finished_stage_is_not_refused_where_nothing_can_be_written_any_more(
    tmp_path, monkeypatch
):
    config = prepare(tmp_path, steps=1)
    arguments = ["train", str(config), "--stage", "final", "mesh.fsdp=1", "final.eval_rollouts=0"]
    assert main(arguments) == 0

    def fail(*_):
        raise os_error(errno.EROFS)

    for step in ("fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(UsageError, match="not on a read-only file system"):
        check_writable(tmp_path, "run_dir")
    assert main(arguments) == 0


def test_a_text_that_is_written_in_parts_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with text_file(path) as write:
        write("é\n")
        assert not path.exists()
        write("b\n")
    assert path.read_text() == "é\nb\n"

    def broken():
        with text_file(path) as write:
            write("c\n")
            raise KeyError("the text could not be made")

    with pytest.raises(KeyError):
        broken()
    assert path.read_text() == "é\nb\n"
    assert os.listdir(path.parent) == ["file.txt"], "nothing temporary is left"
    with pytest.raises(UsageError, match="could not be written"), text_file(path / "below"):
        pass
