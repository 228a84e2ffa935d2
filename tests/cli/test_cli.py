"""The command line as a user meets it: help, one-paragraph errors, exit statuses, files."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

import zip_rc_jax
from zip_rc_jax.cli.live import decode_prompts, print_answers
from zip_rc_jax.cli.main import COMMANDS, build_parser, main
from zip_rc_jax.inference.api import decode_stream
from zip_rc_jax.inference.engine import ResultEvent
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.runtime.locks import only_process


@pytest.fixture
def saved(lm, tmp_path):
    lm.save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"example: zip-rc {command}" in text


LIGHT = """
import sys, types
package = types.ModuleType("zip_rc_jax")  # without what the package itself imports
package.__path__ = ["zip_rc_jax"]
sys.modules["zip_rc_jax"] = package
from zip_rc_jax.cli.main import build_parser
build_parser().format_help()
print(*sorted({name.split(".")[0] for name in sys.modules} & {"jax", "flax", "optax", "grain", "pyarrow", "transformers", "matplotlib"}))
"""  # noqa: E501


def test_help_imports_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert (run.stdout.strip(), run.stderr) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["grade", "missing.yaml"], ("missing.yaml", "no such file")),
        (
            ["rollout", "configs/chain_sum_demo.yaml", "rollout.promts=3"],
            ("promts", "did you mean 'prompts'"),
        ),
        (
            ["rollout", "configs/chain_sum_demo.yaml", "grid.length_edges=[0,8,4]"],
            ("[0, 8, 4]", "ascend strictly"),
        ),
        (
            ["train", "configs/chain_sum_demo.yaml", "--stage", "final", "final.steps=0"],
            ("steps=0", "positive"),
        ),
        (
            ["evaluate", "configs/chain_sum_demo.yaml", "run_dir=/nowhere"],
            ("/nowhere/final", "no such directory"),
        ),
        (
            ["rollout", "configs/chain_sum_demo.yaml", "run_dir=''"],
            ("run_dir", "run_dir=runs/NAME"),
        ),
        (
            ["rollout", "configs/chain_sum_demo.yaml", "policy.path=embedded:other"],
            ("embedded 'other'", "chain_sum_policy"),
        ),
        (["decode", "nowhere", "--prompt", "4 + 3 ="], ("nowhere", "no such directory")),
        (["decode", "nowhere"], ("--prompt", "--input")),
        (
            ["decode", "nowhere", "--prompt", "x", "temprature=1"],
            ("temprature", "did you mean 'temperature'"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "rows=8", "max_num_seqs=8"],
            ("rows and max_num_seqs", "two names of one setting"),
        ),
        (["decode", "nowhere", "--prompt", "x", "top_p=1.5"], ("top_p=1.5", "(0, 1]")),
        (
            ["decode", "nowhere", "--prompt", "x", "--mesh", "fsdp=2"],
            ("mesh 'fsdp=2'", "data, tensor"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "--mesh", "data=9999"],
            ("mesh data=9999", "devices"),
        ),
        (["decode", "nowhere", "--prompt", "x", "n=many"], ("n='many'", "whole number")),
        (
            ["decode", "nowhere", "--prompt", "x", "stop_token_ids=5"],
            ("stop_token_ids=5", "[1, 2]"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "stop_token_ids=abc"],
            ("stop_token_ids='abc'", "not a list of ids"),
        ),
        (["decode", "nowhere", "--prompt", "x", "n=["], ("option 'n=['", "cannot be read")),
        (["decode", "nowhere", "--prompt", "x", "n=&x [*x]"], ("n=&x [*x]", "cannot be read")),
        (
            ["decode", "nowhere", "--prompt", "x", "n=" + "[" * 5000],
            ("option 'n=[[[", "cannot be read"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "n=" + "9" * 5000],
            ("option 'n=999", "cannot be read"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "n=" + "9" * 400],
            ("n=a whole number of 1329 bits", "no floating-point number"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "n=" + "9" * 200_000],
            ("option 'n=999", "200,002 characters"),
        ),
        (["decode", "nowhere", "--prompt", "x", "n=1e3"], ("n=1000.0", "whole number")),
        (["decode", "nowhere", "--prompt", "x", "n="], ("n=None", "whole number")),
        (["decode", "nowhere", "--prompt", "x", "n.a=3"], ("n={'a': 3}", "whole number")),
        (["decode", "nowhere", "--prompt", "x", "=3"], ("option '=3'", "NAME=VALUE")),
        (
            ["decode", "nowhere", "--prompt", "x", "n=${oc.env:HOME}"],
            ("n=${oc.env:HOME}", "interpolation"),
        ),
        (["decode", "nowhere", "--prompt", "x", "n=${"], ("n=${", "interpolation")),
        (["decode", "nowhere", "--prompt", "x", "n=\udcff"], ("option 'n=", "not UTF-8")),
        (
            ["decode", "nowhere", "--prompt", "x \udcff"],
            ("prompt 0", "not text that can be encoded"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "messages=5"],
            ("decoding option 'messages'", "nothing reads it"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "temperature=-1"],
            ("temperature=-1", "a temperature is not negative"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "temperature=-1", "n=1"],
            ("temperature=-1", "a temperature is not negative"),
        ),
        (["decode", "nowhere", "--prompt", "x", "--seed", "-1"], ("seed=-1", "32 bits")),
        (
            ["decode", "nowhere", "--prompt", "x", "--chat", "--template-arg", "a=['"],
            ('--template-arg "a=[\'"', "cannot be read"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "--chat", "--template-arg", "a"],
            ("--template-arg 'a'", "NAME=VALUE"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "--chat", "--template-arg", "messages=5"],
            ("'messages'", "the rendering itself sets it"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "--chat", "--template-arg", "a=${oc.env:HOME}"],
            ("interpolation",),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "--template-arg", "a=1"],
            ("--template-arg ['a']", "add --chat"),
        ),
        (
            ["decode", "nowhere", "--prompt", "x", "--output", "pyproject.toml"],
            ("--output pyproject.toml", "it, or a folder above it, is a file"),
        ),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(arguments, parts, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "Fix: " in error
    for part in parts:
        assert part in error


def test_decode_writes_results_that_equal_the_api(saved, lm, tmp_path, capsys):
    options = {"n": 3, "interval": 4, "window": 2, "max_tokens": 10, "max_num_seqs": 8}
    prompts = ["1 + 2 =", "3 + 4 ="]
    arguments = [x for p in prompts for x in ("--prompt", p)] + [
        f"{k}={v}" for k, v in options.items()
    ]
    assert (
        main(["decode", saved, *arguments, "--seed", "3", "--output", str(tmp_path / "out")]) == 0
    )
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    ]
    expected = zip_rc_jax.decode(lm, prompts, seed=3, **options)
    assert [r["text"] for r in rows] == [r.text for r in expected]
    assert [[p["token_ids"] for p in r["prefixes"]] for r in rows] == [
        [list(p.token_ids) for p in r.prefixes] for r in expected
    ]
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["config"]["decode"]["n"] == 3


def test_compiled_programs_are_kept_between_calls(saved, tmp_path):
    command = [
        sys.executable,
        "-m",
        "zip_rc_jax",
        "decode",
        str(saved),
        "--prompt",
        "1 + 2 =",
        "n=2",
        "max_tokens=4",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    # however fast this machine compiles
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run(
        command,
        env=environment | {"HOME": str(tmp_path), **always},
        check=True,
        capture_output=True,
        timeout=120,
    )
    kept = [path.name for path in (tmp_path / ".cache" / "zip_rc_jax" / "xla").iterdir()]
    assert any("advance" in name for name in kept), kept


def test_an_interrupted_decode_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(
    saved, tmp_path, capsys, monkeypatch
):
    lines = [json.dumps({"question": f"{a} + 2 =", "answer": str(a + 2)}) + "\n" for a in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    options = [
        "n=2",
        "interval=4",
        "window=2",
        "max_tokens=10",
        "max_num_seqs=4",
        "--input",
        str(tmp_path / "in.jsonl"),
    ]
    assert main(["decode", saved, *options, "--output", str(tmp_path / "whole")]) == 0
    command = ["decode", saved, *options, "--output", str(tmp_path / "out")]
    decoded: list[int] = []

    def interrupted(lm, prompts, *args, **more):
        decoded.append(len(prompts))
        for count, event in enumerate(
            e for e in decode_stream(lm, prompts, *args, **more) if isinstance(e, ResultEvent)
        ):
            if count == 2:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr("zip_rc_jax.cli.live.decode_stream", interrupted)
    assert main(command) == 130
    assert "The same command resumes." in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.jsonl").exists()
    partial = tmp_path / "out" / "results.partial.jsonl"
    with partial.open("a") as file:
        file.write('{"index": 5, "resu')  # a kill while a result was being written
    assert main([*command, "beta=0.3"]) == 2
    assert "decode.beta was 0.01, now 0.3" in capsys.readouterr().err
    assert main(command) == 130
    monkeypatch.undo()
    assert main(command) == 0
    assert decoded == [6, 4], "the second call had two prompts less to do"
    assert "4 of 6 prompts were decoded by an earlier call" in capsys.readouterr().out
    assert not partial.exists()
    rows = [
        [json.loads(line) for line in (tmp_path / d / "results.jsonl").read_text().splitlines()]
        for d in ("whole", "out")
    ]
    for row in itertools.chain(*rows):
        del row["usage"]["seconds"]
    assert rows[0] == rows[1]


def test_a_decode_that_is_interrupted_after_its_last_prompt_only_writes_its_files(
    saved, tmp_path, capsys, monkeypatch
):
    options = [
        "n=2",
        "interval=4",
        "window=2",
        "max_tokens=10",
        "max_num_seqs=4",
        "--prompt",
        "1 + 2 =",
        "--prompt",
        "3 + 4 =",
    ]
    command = ["decode", saved, *options, "--output", str(tmp_path / "out")]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zip_rc_jax.runtime.storage.write_jsonl", interrupted)
    assert main(command) == 130
    journal = (tmp_path / "out" / "results.partial.jsonl").read_text().splitlines()
    monkeypatch.undo()
    assert main(command) == 0
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    kept = sorted((json.loads(line) for line in journal[1:]), key=lambda x: x["index"])
    assert [json.loads(row) for row in rows] == [x["result"] for x in kept]


def test_decode_on_a_mesh_gives_the_results_of_one_device(saved, tmp_path, capsys):
    arguments = [
        "decode",
        saved,
        "--prompt",
        "1 + 2 =",
        "n=3",
        "interval=4",
        "window=2",
        "max_tokens=10",
        "max_num_seqs=8",
    ]
    texts = []
    for name, mesh in (("one", []), ("four", ["--mesh", "data=2,tensor=2"])):
        assert main([*arguments, *mesh, "--output", str(tmp_path / name)]) == 0
        rows = [
            json.loads(line)
            for line in (tmp_path / name / "results.jsonl").read_text().splitlines()
        ]
        texts.append([[p["token_ids"] for p in row["prefixes"]] for row in rows])
        assert re.search(r"done in \d+ s, \d+ s of it compiling", capsys.readouterr().err)
    assert texts[0] == texts[1]


def test_decode_in_bfloat16(saved, tmp_path):
    arguments = ["--prompt", "1 + 2 =", "--dtype", "bfloat16", "--output", str(tmp_path / "out")]
    options = {"n": 3, "interval": 4, "window": 2, "max_tokens": 10, "max_num_seqs": 8}
    assert main(["decode", saved, *arguments, *(f"{k}={v}" for k, v in options.items())]) == 0
    (row,) = [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    ]
    (expected,) = zip_rc_jax.decode(
        zip_rc_jax.load(saved, dtype="bfloat16"), ["1 + 2 ="], **options
    )
    (other,) = zip_rc_jax.decode(zip_rc_jax.load(saved), ["1 + 2 ="], **options)
    assert row["expected_reward"] == expected.expected_reward != other.expected_reward


def test_decode_grades_an_input_file_with_answers(saved, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        '{"question": "1 + 2 =", "answer": "3"}\n{"problem": "3 + 4 =", "answer": "7"}\n'
    )
    assert (
        main(
            [
                "decode",
                saved,
                "--input",
                str(tmp_path / "in.jsonl"),
                "n=2",
                "max_tokens=8",
                "max_num_seqs=8",
                "window=2",
                "interval=4",
            ]
        )
        == 0
    )
    assert "over 2 problems" in capsys.readouterr().out


def test_answers_in_an_input_file_are_optional(saved, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        '{"question": "1 + 2 ="}\n{"problem": "3 + 4 =", "answer": "7"}\n'
    )
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    assert (
        main(
            [
                "decode",
                saved,
                *arguments,
                "n=2",
                "max_tokens=8",
                "max_num_seqs=8",
                "window=2",
                "interval=4",
            ]
        )
        == 0
    )
    assert "over 1 problems" in capsys.readouterr().out
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    ]
    assert [row.get("answer") for row in rows] == [None, "7"]
    assert ["correct" in row for row in rows] == [False, True]


@pytest.mark.parametrize("bad", ["how many unknown?", "1 + " * 60])
def test_a_prompt_of_a_file_that_cannot_be_decoded_is_named_by_its_line(
    saved, tmp_path, capsys, bad
):
    lines = [{"question": "1 + 2 ="}, {"question": bad, "answer": "7"}]
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert (
        main(
            [
                "decode",
                saved,
                "--input",
                str(tmp_path / "in.jsonl"),
                "n=2",
                "max_tokens=8",
                "max_num_seqs=8",
            ]
        )
        == 2
    )
    assert "in.jsonl, line 3, prompt 1" in capsys.readouterr().err


def test_live_view_shows_every_prefix_at_every_decision(lm, capsys):
    config = zip_rc_jax.DecodeConfig(
        n=3, interval=4, window=2, max_tokens=8, max_num_seqs=8, beta=0.0
    )
    (result,) = decode_prompts(lm, ["1 + 2 ="], config, 0, live=True)
    shown = capsys.readouterr().out
    assert shown.count("P(correct)") == len(result.trace) + 1
    assert f"{result.usage.tokens} tokens in {result.usage.serial_steps} serial steps" in shown


def test_text_of_a_model_is_shown_as_it_is(lm, capsys, monkeypatch):
    """Brackets are markup to the library that prints, and a whole answer may be white space."""
    written = ["[INST] a[i] + b[j] [/INST]", "so \\[x = 3\\]", " "]
    *_, step, last = decode_stream(
        lm, ["1 + 2 ="], n=2, window=2, interval=4, max_tokens=8, max_num_seqs=8
    )
    results = [dataclasses.replace(last.result, text=text) for text in written]
    events = [dataclasses.replace(step, new_text={step.decision.prefix_ids[0]: written[0]})]
    events += [ResultEvent(i, r) for i, r in enumerate(results)]
    monkeypatch.setattr("zip_rc_jax.cli.live.decode_stream", lambda *_, **__: iter(events))
    assert decode_prompts(lm, ["x", "y", "z"], zip_rc_jax.DecodeConfig(), 0, live=True) == results
    shown = capsys.readouterr().out
    assert shown.count(written[0]) == 2, "as new text and as the answer"
    assert f"answers {written[1]} with" in shown
    print_answers(results)
    assert capsys.readouterr().out.count("P(correct)") == 3
    print_answers([dataclasses.replace(last.result, text=written[0] * 20)])
    assert written[0] * 20 in capsys.readouterr().out, "long lines are not cut"


def test_the_public_names_are_those_of_all():
    for name in zip_rc_jax.__all__:
        assert getattr(zip_rc_jax, name).__doc__


def test_unknown_options_of_the_api_are_never_ignored(lm):
    with pytest.raises(zip_rc_jax.UsageError, match="did you mean 'interval'"):
        zip_rc_jax.decode(lm, ["1 + 2 ="], intervall=3)
    with pytest.raises(zip_rc_jax.UsageError, match="max_tokens=0"):
        zip_rc_jax.decode(lm, ["1 + 2 ="], max_new_tokens=0)
    with pytest.raises(
        zip_rc_jax.UsageError, match=r"max_tokens, max_new_tokens: two of them are the same one"
    ):
        zip_rc_jax.decode(lm, ["1 + 2 ="], max_tokens=3, max_new_tokens=4)
    with pytest.raises(zip_rc_jax.UsageError, match=r"seed=4294967296"):
        zip_rc_jax.decode(lm, ["1 + 2 ="], seed=2**32)


# ---- an output directory


QUICK = ["n=2", "interval=4", "window=2", "max_tokens=8", "max_num_seqs=8"]


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["beta=0.3"], "decode.beta was 0.01, now 0.3"),
        (["--seed", "5"], "seed was 0, now 5"),
        (["--prompt", "3 + 4 ="], "prompts was"),
        (["--dtype", "bfloat16"], "dtype was 'float32', now 'bfloat16'"),
    ],
)
def test_finished_results_are_never_replaced_by_those_of_other_settings(
    saved, tmp_path, capsys, change, named
):
    command = ["decode", saved, "--prompt", "1 + 2 =", *QUICK, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    before = files_of(tmp_path / "out")
    assert sorted(before) == ["metadata.json", "results.jsonl"]
    capsys.readouterr()
    assert main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "results.jsonl" in error
    assert files_of(tmp_path / "out") == before
    assert main(command) == 0
    assert "holds the results of these settings already" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("metadata", [None, b"{}", b"[1", b'{"fingerprint": 5}', b"\xff\xfe"])
def test_results_of_unknown_settings_are_never_replaced_either(saved, tmp_path, capsys, metadata):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text("{}\n")
    if metadata is not None:
        (out / "metadata.json").write_bytes(metadata)
    before = files_of(out)
    assert main(["decode", saved, "--prompt", "1 + 2 =", *QUICK, "--output", str(out)]) == 2
    assert "metadata.json does not say with what settings they were made" in capsys.readouterr().err
    assert files_of(out) == before


HOLDER = """
import pathlib, sys, time
from zip_rc_jax.runtime.locks import only_process
with only_process(pathlib.Path(sys.argv[1]), "--output"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_processes_never_work_in_one_output_directory_and_a_killed_one_is_not_in_the_way(
    saved, tmp_path, capsys
):
    out = tmp_path / "out"
    command = ["decode", saved, "--prompt", "1 + 2 =", *QUICK, "--output", str(out)]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert main(command) == 2
        error = capsys.readouterr().err.strip()
        assert f"--output {out}: process {holder.pid} on " in error
        assert "is at work there" in error
        assert "\n" not in error
    finally:
        holder.kill()
        holder.wait()
    assert (out / ".zip-rc.lock").exists(), "what the killed process left"
    assert main(command) == 0
    assert sorted(files_of(out)) == ["metadata.json", "results.jsonl"]


def test_a_process_that_ends_while_another_waits_leaves_no_lock_that_both_hold(tmp_path):
    """The file is deleted at the end; who had opened it before holds nothing with it."""
    with only_process(tmp_path, "x"):
        pass
    with only_process(tmp_path, "x"):
        with (
            pytest.raises(zip_rc_jax.UsageError, match=rf"process {os.getpid()} on"),
            only_process(tmp_path, "x"),
        ):
            pass
        assert (tmp_path / ".zip-rc.lock").exists(), "who was refused deletes nothing"
    assert list(tmp_path.iterdir()) == []


class Clock(datetime.datetime):
    today = datetime.datetime(2024, 7, 26, 12)

    @classmethod
    def now(cls, tz=None):
        return cls.today


@pytest.fixture
def dated(lm, tmp_path):
    """A model whose chat template writes the day of the month as a word of its vocabulary."""
    template = "{{ strftime_now('%d') | int % 12 }} + {{ messages[0].content }}"
    path = tmp_path / "dated"
    dataclasses.replace(lm, tokenizer=Tokenizer(lm.tokenizer.backend, ("<eos>",), template)).save(
        path
    )
    return str(path)


def test_a_decode_that_is_resumed_on_another_day_goes_on_with_the_prompts_of_the_first(
    dated, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(datetime, "datetime", Clock)
    command = ["decode", dated, "--chat", "--prompt", "1 =", "--prompt", "2 =", *QUICK]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0

    def interrupted(*args, **more):
        for event in decode_stream(*args, **more):
            yield event
            if isinstance(event, ResultEvent):
                raise KeyboardInterrupt

    monkeypatch.setattr("zip_rc_jax.cli.live.decode_stream", interrupted)
    assert main([*command, "--output", str(tmp_path / "out")]) == 130
    monkeypatch.setattr("zip_rc_jax.cli.live.decode_stream", decode_stream)
    monkeypatch.setattr(Clock, "today", datetime.datetime(2024, 7, 29, 12))
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    rows = [
        [json.loads(line) for line in (tmp_path / d / "results.jsonl").read_text().splitlines()]
        for d in ("whole", "out")
    ]
    assert [row["prompt"] for row in rows[1]] == ["2 + 1 =", "2 + 2 ="], "26 % 12"
    tokens = [[[p["token_ids"] for p in row["prefixes"]] for row in found] for found in rows]
    assert tokens[0] == tokens[1]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert "already" in capsys.readouterr().out
    assert main([*command, "--output", str(tmp_path / "later")]) == 0
    assert '"prompt": "5 + 1 ="' in (tmp_path / "later" / "results.jsonl").read_text(), (
        "a new directory has the day that it was begun"
    )


@pytest.mark.parametrize(
    ("message", "shown"), [("", "interrupted"), ("stopped at step 3", "stopped at step 3")]
)
def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, message, shown):
    def interrupted(*_):
        raise KeyboardInterrupt(message) if message else KeyboardInterrupt

    monkeypatch.setattr("zip_rc_jax.cli.evaluate.run", interrupted)
    assert main(["evaluate", "configs/chain_sum_demo.yaml"]) == 130
    assert capsys.readouterr().err == f"zip-rc evaluate: {shown}. The same command resumes.\n"


def test_what_cannot_be_resumed_does_not_claim_to_be(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zip_rc_jax.cli.decode.run", interrupted)
    assert main(["decode", "nowhere", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "zip-rc decode: interrupted. The same command starts over.\n"
    assert main(["decode", "nowhere", "--prompt", "x", "--output", "out"]) == 130
    assert capsys.readouterr().err == "zip-rc decode: interrupted. The same command resumes.\n"
