"""`zip-rc decode --introspect` and `zip-rc explore` as a user meets them."""

from __future__ import annotations

import json

import pytest

from harness.explored import made_evaluation, made_result, write_files
from zip_rc_jax.cli.main import _resumes, main, parse
from zip_rc_jax.runtime.storage import write_jsonl

OPTIONS = ["n=3", "interval=4", "window=3", "max_tokens=16", "beta=0.02"]


@pytest.fixture(scope="module")
def home(lm, tmp_path_factory):
    """A saved model and a file of questions."""
    directory = tmp_path_factory.mktemp("home")
    lm.save(directory / "model")
    rows = [{"question": "1 + 2 =", "answer": "3"}, {"question": "3 + 4 =", "answer": "7"}]
    write_jsonl(directory / "questions.jsonl", rows)
    return directory


def decode(home, output, *more):
    given = ["decode", str(home / "model"), "--input", str(home / "questions.jsonl")]
    return main([*given, "--output", str(output), *OPTIONS, *more])


def rows_of(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def decoded(home):
    assert decode(home, home / "told", "--introspect") == 0
    assert decode(home, home / "plain") == 0
    return home


def data_of(path):
    text = path.read_text()
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_introspection_is_beside_the_same_results_as_without(decoded):
    for told, plain in zip(rows_of(decoded / "told"), rows_of(decoded / "plain"), strict=True):
        record = told.pop("introspection")
        for row in (told, plain):
            row["usage"].pop("seconds")
        assert told == plain
        assert len(record["decisions"]) == len(told["trace"])
        assert len(record["prefixes"]) == len(told["prefixes"])
        assert record["settings"]["beta"] == 0.02


def test_an_interrupted_decode_resumes_with_its_introspection(home, decoded, monkeypatch, capsys):
    from zip_rc_jax.explorer import record

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record, "introspections", interrupted)
        assert decode(home, home / "again", "--introspect") == 130
    assert not (home / "again" / "results.jsonl").exists()
    assert decode(home, home / "again", "--introspect") == 0
    assert "2 of 2 prompts were decoded by an earlier call" in capsys.readouterr().out
    again, first = rows_of(home / "again"), rows_of(home / "told")
    for row in (*again, *first):
        row["usage"].pop("seconds")
    assert again == first


def test_results_without_introspection_are_not_taken_for_those_with_it(home, decoded, capsys):
    assert decode(home, home / "plain", "--introspect") == 2
    assert "introspect" in capsys.readouterr().err


def test_the_page_lies_beside_the_results(decoded, capsys):
    assert main(["explore", str(decoded / "told")]) == 0
    page = decoded / "told" / "explore.html"
    assert f"wrote {page}" in capsys.readouterr().out.replace("\n", "")
    data = data_of(page)
    assert [p["prompt"] for p in data["problems"]] == ["1 + 2 =", "3 + 4 ="]
    assert [p["answer"] for p in data["problems"]] == ["3", "7"]
    assert all(d["actions"] for s in data["searches"] for d in s["trace"])


def test_several_decodes_are_compared_and_have_names_of_their_own(decoded, tmp_path, capsys):
    paths = [str(decoded / "told"), str(decoded / "plain" / "results.jsonl")]
    output = tmp_path / "new" / "both.html"
    assert main(["explore", *paths, "--output", str(output), "--title", "Both <b>"]) == 0
    data = data_of(output)
    assert (data["title"], [r["name"] for r in data["runs"]]) == ("Both <b>", ["told", "plain"])
    assert len(data["problems"]) == 2
    assert "<title>Both &lt;b&gt;</title>" in output.read_text()


def test_without_introspection_it_says_what_is_missing(decoded, tmp_path, capsys):
    output = tmp_path / "plain.html"
    assert main(["explore", str(decoded / "plain"), "--output", str(output)]) == 0
    assert "--introspect" in capsys.readouterr().out


def test_a_small_page_leaves_out_what_it_says(decoded, tmp_path, capsys):
    output = tmp_path / "small.html"
    arguments = ["explore", str(decoded / "told"), "--output", str(output), "--most-bytes", "100"]
    assert main(arguments) == 0
    assert "left out of 2 of 2 searches" in capsys.readouterr().out
    assert all(p["tokens"] is None for s in data_of(output)["searches"] for p in s["prefixes"])


def test_a_report_becomes_a_page(tmp_path, capsys):
    write_files(tmp_path / "report", made_evaluation(), [f"p{i}" for i in range(40)])
    for path in ("report", "report/results.jsonl"):
        output = tmp_path / "page.html"
        assert main(["explore", str(tmp_path / path), "--output", str(output)]) == 0
        data = data_of(output)
        assert len(data["problems"]) == 40
        assert data["tables"][0]["title"].startswith("Headline")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ("nowhere", "there is nothing", "results.jsonl")),
        (["empty"], ("directory", "no results.jsonl", "zip-rc decode --output")),
        (["several"], ("several benchmarks", "name the directory of one: aime24, gsm8k")),
        (["unfinished"], ("not finished", "run the same zip-rc decode again")),
        (["note.txt"], ("note.txt, line 1", "no JSON")),
        (["answers.jsonl"], ("line 1", "no search tree", "--introspect")),
        (["report", "told"], ("2 paths", "report", "alone")),
        (["told", "--output", "page.txt"], ("page.txt", "HTML", ".html")),
        (["told", "--most-bytes", "0"], ("--most-bytes 0", "positive")),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "unfinished", "told"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "results.partial.jsonl").write_text("{}\n")
    for name in ("gsm8k", "aime24"):
        (tmp_path / "several" / name).mkdir(parents=True)
        (tmp_path / "several" / name / "pool.jsonl").write_text("")
    (tmp_path / "note.txt").write_text("a note\n")
    write_jsonl(tmp_path / "answers.jsonl", [{"prompt": "a", "answer": "b"}])
    write_jsonl(tmp_path / "told" / "results.jsonl", [made_result().to_dict()])
    write_files(tmp_path / "report", made_evaluation(prompts=4))
    assert main(["explore", *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("zip-rc explore: ")
    assert all(word in said for word in words), said
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "1 + 2 =", "--introspect"], ("--introspect without --output", "--output")),
    ],
)
def test_introspection_needs_a_place(home, capsys, more, words):
    assert main(["decode", str(home / "model"), *more]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)


def test_a_model_without_a_head_has_nothing_to_introspect(lm, tmp_path, capsys):
    lm.without_head().save(tmp_path / "model")
    given = ["decode", str(tmp_path / "model"), "--prompt", "1 + 2 =", "--introspect"]
    output = ["--output", str(tmp_path / "out"), "strategy=fixed", "max_tokens=4"]
    assert main([*given, *output]) == 2
    assert "without a head" in capsys.readouterr().err


def test_the_command_starts_anew_each_time():
    assert not _resumes(parse(["explore", "answers"]))


def test_what_was_promised_of_the_model_stands_on_the_page(lm, home, decoded, tmp_path):
    from zip_rc_jax.models.io.calibrations import calibration_line, write_calibration

    record = {
        "data": {"problems": 20, "name": "pool"},
        "options": {"n": 3, "beta": 0.02},
        "measured": {"cost": 1.25},
        "promise": {"risk": "errors", "delta": 0.1, "epsilon": 0.05},
    }
    lm.save(tmp_path / "model")
    write_calibration(lm, tmp_path / "model" / "calibration.json", record)
    given = ["decode", str(tmp_path / "model"), "--input", str(home / "questions.jsonl")]
    output = ["--output", str(tmp_path / "kept"), "--introspect", *OPTIONS]
    assert main([*given, *output]) == 0
    page = tmp_path / "page.html"
    paths = [str(tmp_path / "kept"), str(decoded / "told")]
    assert main(["explore", *paths, "--output", str(page)]) == 0
    assert data_of(page)["notes"] == [f"kept: {calibration_line(record)}"]
