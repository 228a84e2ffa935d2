"""`zip-rc predict` as a user meets it: what is shown, what is written, what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import xml.dom.minidom

import numpy as np
import pytest
from rich.console import Console

from harness.small_tokenizers import chatml
from harness.tiny import tiny_chat_lm
from zip_rc_jax import TokenPredictions, decode, predict
from zip_rc_jax.cli import predict_output as command
from zip_rc_jax.cli.main import main
from zip_rc_jax.evaluation.token_heat_map import color_of
from zip_rc_jax.predictions import forward

PAIR = ("1 + 2 =", "3 wait 3")


@pytest.fixture
def saved(lm, tmp_path):
    lm.save(tmp_path / "model")
    return str(tmp_path / "model")


def write_lines(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is shown


def test_without_a_terminal_the_numbers_of_every_token_are_a_table(lm, saved, capsys):
    assert main(["predict", saved, "--prompt", PAIR[0], "--response", PAIR[1]]) == 0
    (read,) = predict(lm, [PAIR])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    rows = [line.split() for line in out.splitlines() if re.match(r" +[0-9]", line)]
    assert [int(row[0]) for row in rows] == list(range(read.start, len(read)))
    for t, row in zip(range(read.start, len(read)), rows, strict=True):
        numbers = [read.token_ids[t], read.p_correct[t], read.remaining[t], read.logprob[t]]
        assert [float(x) for x in row[1:5]] == pytest.approx(numbers, abs=0.06)
        assert row[5] == read.pieces[t].strip()


def shown(one, **options):
    console = Console(file=io.StringIO(), width=80, **options)
    command._print(console, one, "")
    return console.file.getvalue()


def test_on_a_terminal_each_token_lies_on_the_color_of_its_p_correct(lm, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    (read,) = predict(lm, [PAIR])
    out = shown(read, force_terminal=True, color_system="truecolor")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.splitlines()]
    assert lines[0] == f"{PAIR[0]} {PAIR[1]}"
    assert lines[1].split()[0] == f"{read.remaining[read.start]:.0f}"
    assert "P(correct)" in lines[-1]
    for t in range(read.start, len(read)):
        r, g, b = color_of(float(read.p_correct[t]))
        assert re.search(rf"48;2;{r};{g};{b}m{re.escape(read.pieces[t])}", out)
    before = re.escape("".join(read.pieces[: read.start]))
    colored = re.findall(r"48;2;[0-9;]*m([^\x1b]*)", out.splitlines()[0])
    assert not re.search(before, "".join(colored)), "the prompt has no color"


def test_no_color_is_respected_on_a_terminal_too(lm, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = shown(predict(lm, [PAIR])[0], force_terminal=True)
    assert "P(correct)" in out
    assert "48;2;" not in out
    assert "logprob" in out


# ---- what is written


def test_a_file_of_prompts_becomes_lines_and_a_page(lm, saved, tmp_path, capsys):
    rows = [
        {"question": "1 + 2 ="},
        {"problem": "wait so", "response": "check", "answer": "ignored"},
        {"prompt": "a b", "output": [5, 6], "question": None},
        {"prompt": "7 + 8", "completion": "= 11"},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows))
    out, page = tmp_path / "new" / "out.jsonl", tmp_path / "page.html"
    files = ["--output", str(out), "--html", str(page)]
    assert main(["predict", saved, "--input", str(source), *files]) == 0
    expected = predict(lm, ["1 + 2 =", ("wait so", "check"), ("a b", [5, 6]), ("7 + 8", "= 11")])
    found = read_lines(out)
    assert [row["index"] for row in found] == [0, 1, 2, 3]
    assert [row["line"] for row in found] == [1, 3, 5, 7]
    for row, one in zip(found, expected, strict=True):
        assert "joint" not in row
        assert row["token_ids"] == one.token_ids.tolist()
        assert row["prompt_tokens"] == one.prompt_tokens
        assert row["pieces"] == list(one.pieces)
        assert row["logprob"][0] is None
        for name in ("p_correct", "remaining"):
            np.testing.assert_allclose(row[name], getattr(one, name), rtol=1e-4)
    text = page.read_text()
    assert text.count("<section>") == 4
    assert text.rstrip().endswith("</html>")
    assert "http" not in text, "the page loads nothing"
    shown = capsys.readouterr().out
    assert shown.splitlines() == [f"wrote {out}", f"wrote {page}"]


def test_joints_are_written_on_request_and_read_back(lm, saved, tmp_path):
    out = tmp_path / "out.jsonl"
    assert main(["predict", saved, "--prompt", "1 + 2 =", "--output", str(out), "--joints"]) == 0
    again = TokenPredictions.from_dict(read_lines(out)[0])
    np.testing.assert_allclose(again.joint, predict(lm, ["1 + 2 ="])[0].joint, atol=1e-6)


def test_results_of_a_decode_are_read_with_the_tokens_that_were_sampled(saved, tmp_path, capsys):
    """What has no answer is left out, and the command says so."""
    options = ["n=2", "rows=8", "interval=4", "window=4", "max_tokens=8", "allow_no_answer=true"]
    prompts = ["--prompt", "1 + 2 =", "--prompt", "wait so"]
    assert main(["decode", saved, *prompts, "--output", str(tmp_path / "out"), *options]) == 0
    results = tmp_path / "out" / "results.jsonl"
    rows = read_lines(results)
    rows.insert(1, rows[0] | {"prefix_id": -1, "text": ""})
    write_lines(results, *rows)
    out = tmp_path / "predictions.jsonl"
    assert main(["predict", saved, "--input", str(results), "--output", str(out)]) == 0
    assert "left out 1 results without an answer (lines 2)" in capsys.readouterr().err
    found = read_lines(out)
    assert [row["line"] for row in found] == [1, 3]
    for row, result in zip(found, (rows[0], rows[2]), strict=True):
        answer = next(p for p in result["prefixes"] if p["id"] == result["prefix_id"])
        assert row["token_ids"][row["prompt_tokens"] :] == answer["token_ids"]
        assert row["prompt_tokens"] == result["usage"]["prompt_tokens"]


def test_chats_go_through_the_models_template_as_in_decode(tmp_path):
    lm = tiny_chat_lm(chatml())
    lm.save(tmp_path / "model")
    chat = [{"role": "user", "content": "What is 17 + 25?"}]
    (result,) = decode(lm, [chat], n=2, rows=4, interval=4, window=4, max_tokens=4)
    results = write_lines(tmp_path / "results.jsonl", result.to_dict())
    mixed = write_lines(tmp_path / "in.jsonl", {"prompt": chat}, {"prompt": chat, "response": "42"})
    outs = [tmp_path / f"{i}.jsonl" for i in range(3)]
    model = str(tmp_path / "model")
    text = ["--prompt", chat[0]["content"], "--chat"]
    for arguments, out in zip((text, ["--input", mixed], ["--input", results]), outs, strict=True):
        assert main(["predict", model, *arguments, "--output", str(out)]) == 0
    ids = chatml().encode_prompt(chatml().chat(chat), chat=True)
    first, second, third = (read_lines(out) for out in outs)
    assert first[0]["token_ids"] == second[0]["token_ids"] == ids
    assert second[1]["token_ids"] == ids + chatml().encode("42")
    assert third[0]["token_ids"][: third[0]["prompt_tokens"]] == ids


def test_the_picture_of_one_text_is_a_file_of_its_own(saved, tmp_path):
    path = tmp_path / "a.svg"
    text = ["--prompt", PAIR[0], "--response", PAIR[1]]
    assert main(["predict", saved, *text, "--svg", str(path)]) == 0
    texts = xml.dom.minidom.parse(str(path)).getElementsByTagName("text")
    words = [text.firstChild.data for text in texts]
    assert "wait" in words


def test_an_interruption_leaves_the_files_as_they_were(saved, tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "1"}, {"prompt": "2"})
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    out.write_text("before")

    def interrupted(one, heading):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "html_section", interrupted)
    arguments = ["predict", saved, "--input", source, "--output", str(out), "--html", str(page)]
    assert main(arguments) == 130
    assert "starts over" in capsys.readouterr().err
    assert out.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "model", "out.jsonl"]


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ("give either --prompt", "--input FILE")),
        (["--prompt", "a", "--input", "x"], ("give either --prompt", "leave one of them out")),
        (["--prompt", "a", *["--response", "b"] * 2], ("2 times --response with 1 times",)),
        (["--response", "b", "--input", "in.jsonl"], ("1 times --response with 0 times --prompt",)),
        (["--input", "missing.jsonl"], ("missing.jsonl", "no such file", "zip-rc decode")),
        (["--prompt", "a", "--output", "."], ("--output .", "directory")),
        (["--prompt", "a", "--output", "f", "--html", "f"], ("two of them are one file",)),
        (["--prompt", "a", "--prompt", "b", "--svg", "f"], ("--svg f", "there are 2", "--html")),
        (["--prompt", "a", "--joints"], ("--joints", "--output")),
        (["--prompt", "a", "--template-arg", "x=1"], ("--template-arg", "add --chat")),
        (["--prompt", "a", "--chat", "--template-arg", "messages=1"], ("'messages'",)),
        (["--prompt", "a", "--mesh", "fsdp=2"], ("mesh 'fsdp=2'", "data, tensor")),
        (["--prompt", "a"], ("nowhere", "no such directory")),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    tmp_path,
    monkeypatch,
    capsys,
    arguments,
    parts,
):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    assert main(["predict", "nowhere", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("zip-rc predict: ")
    assert "\n" not in error
    for part in parts:
        assert part in error
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a zebra"}, r"in\.jsonl, line 2, item 1: text with \['zebra'\]"),
        ({"prompt": "a", "response": [300]}, r"line 2, item 1, its response with ids 300"),
        ({"prompt": " ".join("a" * 97)}, r"in\.jsonl, line 2, item 1 of 97 tokens: .*96 positions"),
        ({"prompt": ""}, r"in\.jsonl, line 2: it has no text or chat under `question`"),
        ({"text": "a"}, r"line 2: it has no text or chat"),
        ({"prompt": "a", "response": ""}, r"line 2: its `response` is empty; leave it out"),
        ({"prompt": "a", "response": 5}, r"line 2: its `response` is no text and no list"),
        ({"prompt": "a", "response": "b", "output": "c"}, r"under `response`, `output`, and one"),
        ({"prompt": "a", "prefixes": [], "prefix_id": 0}, r"line 2: it is no complete result"),
        ([1], r"line 2: it begins a JSON array"),
    ],
)
def test_a_bad_line_is_named_before_the_model_runs(
    saved,
    tmp_path,
    monkeypatch,
    capsys,
    row,
    message,
):
    monkeypatch.setattr(forward, "_hidden", None)
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, row)
    assert main(["predict", saved, "--input", source, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_results_of_another_tokenizer_are_refused(saved, lm, tmp_path, capsys):
    (result,) = decode(lm, ["1 + 2 ="], n=1, rows=4, interval=4, window=4, max_tokens=4)
    row = result.to_dict()
    row["usage"]["prompt_tokens"] += 3
    source = write_lines(tmp_path / "in.jsonl", row)
    assert main(["predict", saved, "--input", source]) == 2
    error = capsys.readouterr().err
    assert "line 1, item 0 with a prompt of 7 tokens" in error
    assert "another model decoded it" in error
