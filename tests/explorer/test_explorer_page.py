"""The page as a file: its data, its policy, its size, and what becomes of text that looks like
markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from harness.explored import large_row, made_evaluation, made_result, write_files
from zip_rc_jax.evaluation import explored
from zip_rc_jax.evaluation.explored import report_page
from zip_rc_jax.explorer.page import ASSET, page_data, page_text
from zip_rc_jax.explorer.searches import ResultFile, read_results, results_page, search_data
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import write_jsonl

SOURCES = pathlib.Path(__file__).parents[2] / "zip_rc_jax" / "explorer" / "web"
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=hacked=1><!-- \u2028 @DATA@ &lt;"
)


class Elements(html.parser.HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.found, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self._inside = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False if tag == "script" else self._inside

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def data_of(text):
    return json.loads(Elements(text).scripts[0])


def policy_of(text):
    metas = [attrs for tag, attrs in Elements(text).found if tag == "meta"]
    (policy,) = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    return dict(part.strip().split(" ", 1) for part in policy.split(";"))


def hostile_page():
    result = made_result(HOSTILE, HOSTILE, HOSTILE).to_dict()
    result["prompt"] += "\ud800"  # half of a surrogate pair
    return page_text(results_page(HOSTILE, [ResultFile(HOSTILE, (result,))]))


def test_the_data_of_a_page_are_read_back_as_they_were_whatever_a_text_holds():
    text = hostile_page()
    data = data_of(text)
    assert data["title"] == HOSTILE
    assert data["searches"][0]["prompt"] == HOSTILE + "\ud800"
    assert data["searches"][0]["text"] == HOSTILE
    assert data["runs"][0]["name"] == HOSTILE


def test_text_of_a_model_adds_no_element_to_a_page():
    plain = page_text(page_data("a title"))
    tags = [tag for tag, _ in Elements(plain).found]
    assert [tag for tag, _ in Elements(hostile_page()).found] == tags
    assert "img" not in tags
    assert hostile_page().encode("utf-8")


def test_one_script_may_run_and_it_is_the_one_that_was_built():
    text = hostile_page()
    policy = policy_of(text)
    data, script = Elements(text).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert json.loads(data)


def test_a_file_may_ask_nobody_and_the_server_s_page_the_server_alone():
    assert policy_of(page_text(page_data("x")))["connect-src"] == "'none'"
    assert policy_of(page_text(page_data("x"), live=True))["connect-src"] == "'self'"


def test_the_page_names_nothing_that_is_loaded_from_elsewhere():
    for tag, attrs in Elements(page_text(page_data("x"))).found:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href", "action"} & attrs.keys(), (tag, attrs)
    assert not re.search(r"@import|url\((?!#)", ASSET.read_text().split("</style>")[0])


def test_the_built_assets_are_smaller_than_a_megabyte():
    assert ASSET.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, which builds the page")
def test_the_page_that_ships_is_what_its_sources_build(tmp_path):
    """Versions are those of the lock file, so anyone builds the same bytes."""
    copy = tmp_path / "page"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("node_modules"))
    options = {"cwd": copy, "check": True, "capture_output": True}
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], **options)
    subprocess.run(["npx", "tsc", "--noEmit"], **options)
    subprocess.run(["node", "build.mjs", str(tmp_path / "built.html")], **options)
    assert (tmp_path / "built.html").read_bytes() == ASSET.read_bytes(), "run make explorer"


def test_every_version_of_the_page_s_packages_is_pinned():
    package = json.loads((SOURCES / "package.json").read_text())
    lock = json.loads((SOURCES / "package-lock.json").read_text())
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
    assert all("integrity" in one for path, one in lock["packages"].items() if path)


def test_eight_long_prefixes_and_five_hundred_problems_take_less_than_ten_megabytes():
    rows = [
        large_row(4096, 8, 64, 0, True),
        *(large_row(64, 4, 32, i, False) for i in range(1, 500)),
    ]
    data = results_page("large", [ResultFile("large", tuple(rows))])
    assert data["notes"] == []
    assert len(data["searches"][0]["prefixes"][7]["tokens"]["pieces"]) == 4096
    assert len(page_text(data)) < 10_000_000


def test_what_does_not_fit_is_left_out_from_the_end_and_the_page_says_so():
    rows = tuple(large_row(256, 2, 64, i, True) for i in range(4))
    size = len(json.dumps(search_data(rows[0], 0, 0)))
    data = results_page("large", [ResultFile("large", rows)], most_bytes=int(2.5 * size))
    kept = [one["prefixes"][0]["tokens"] is not None for one in data["searches"]]
    assert kept == [True, True, False, False]
    assert "left out of 2 of 4 searches" in data["notes"][0]


# ---- what is read


def test_problems_of_several_files_are_the_same_where_their_prompts_are(tmp_path):
    rows = [made_result(prompt).to_dict() for prompt in ("a", "b", "a")]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    second = write_jsonl(tmp_path / "second.jsonl", [rows[1] | {"answer": 4, "correct": 1.0}])
    files = [read_results(path, path.stem) for path in (first, second)]
    data = results_page("both", files)
    assert [p["prompt"] for p in data["problems"]] == ["a", "b", "a"]
    assert [(s["run"], s["problem"]) for s in data["searches"]] == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert data["runs"][1]["correct"] == [None, 1.0, None]
    assert data["runs"][0]["compute"] == [144, 144, 144]


def test_an_answer_of_the_server_that_was_kept_is_read_too(tmp_path):
    kept = {"choices": [{"zip_rc": {"tree": made_result().to_dict()}}]}
    path = write_jsonl(tmp_path / "answers.jsonl", [kept])
    assert len(read_results(path, "served").rows) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", ("line 1", "no JSON", "results.jsonl")),
        ("[1, 2]", ("line 1", "no result", "--introspect")),
        ('{"prompt": "a", "text": "b"}', ("no search tree", "prefixes, trace", "return_tree")),
        ("", ("empty", "zip-rc decode")),
        ("\n\n", ("empty",)),
        ('{"choices": [{"message": {}}]}', ("no search tree", "return_tree")),
    ],
)
def test_what_holds_no_trees_is_refused_and_told_what_records_them(tmp_path, text, words):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_results(path, "x")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda row: row["prefixes"][0].pop("text"), "'text'"),
        (lambda row: row["trace"][0].pop("tokens"), "'tokens'"),
        (lambda row: row.update(prefixes=7), "cannot be read"),
        (lambda row: row.update(introspection={"prefixes": [None]}), "cannot be read"),
    ],
)
def test_a_damaged_tree_is_refused_by_its_line(tmp_path, damage, words):
    rows = [made_result().to_dict(), made_result().to_dict()]
    damage(rows[1])
    path = write_jsonl(tmp_path / "results.jsonl", rows)
    with pytest.raises(UsageError) as error:
        read_results(path, "x")
    assert "line 2" in str(error.value)
    assert words in str(error.value)


# ---- reports


def test_the_files_of_a_report_give_the_page_that_evaluate_wrote(tmp_path):
    prompts = [f"problem {i}" for i in range(40)]
    evaluation = made_evaluation()
    write_files(tmp_path, evaluation, prompts)
    written = data_of((tmp_path / "report.html").read_text())
    read = json.loads(json.dumps(report_page(tmp_path)))
    for name in ("runs", "problems", "alphas", "headline", "reward_bins", "unit", "about"):
        assert read[name] == written[name], name
    # Wall-clock seconds are in no file, so one table lacks them.
    assert [t["title"] for t in read["tables"]] == [t["title"] for t in written["tables"]]
    assert read["tables"][0] == written["tables"][0]


def test_a_report_compares_the_headline_with_best_of_n_that_spends_at_least_as_much():
    evaluation = made_evaluation()
    parts = explored.comparison_parts(
        evaluation.pool, evaluation.curves, evaluation.runs, evaluation.alphas,
        evaluation.headline, [], "value",
    )  # fmt: skip
    row = evaluation.headline[0]
    runs = parts["runs"]
    assert runs[parts["headline"]["run"]]["name"] == row.run.name
    baseline = runs[parts["headline"]["baseline"]]
    assert baseline["name"] == f"weighted_best_of_n@{row.weighted.n:g}"
    cost = [
        row.run.alpha * c + (1 - row.run.alpha) * x
        for c, x in zip(baseline["compute"], baseline["latency"], strict=True)
    ]
    assert sum(cost) / len(cost) == pytest.approx(row.weighted.baseline_cost, rel=1e-4)
    assert not any(run["series"] == "pass" for run in runs), "nobody can give that answer"


@pytest.mark.parametrize("name", ["pool.jsonl", "results.jsonl", "metadata.json"])
def test_a_damaged_report_is_refused(tmp_path, name):
    write_files(tmp_path, made_evaluation())
    (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="again"):
        report_page(tmp_path)


def test_the_trees_of_a_report_are_those_that_went_wrong_first(monkeypatch):
    evaluation = made_evaluation()
    name = evaluation.runs[0].name
    searches = [explored.ExploredSearch(name, i, made_result(f"p{i}")) for i in range(40)]
    right = evaluation.runs[0].correct_by_value
    one = len(json.dumps(search_data(searches[0].result.to_dict(), 0, 0)))
    monkeypatch.setattr(explored, "MOST_TREES", 10 * one)
    runs = [{"name": name, "correct": right.tolist()}]
    parts = explored.search_parts(searches, runs)
    kept = [search["problem"] for search in parts["searches"]]
    wrong = [i for i in range(40) if not right[i]]
    assert 5 < len(kept) < 40
    assert set(kept) >= set(wrong[: len(kept)])
    assert f"{len(kept)} of 40" in parts["notes"][0]


def test_a_long_curve_is_thinned_and_keeps_what_the_headline_is_compared_with():
    evaluation = made_evaluation(prompts=6, samples=40)
    curve = evaluation.curves["weighted_best_of_n"]
    kept = explored.thinned(curve, {"weighted_best_of_n@29"})
    numbers = [point.n for point in kept]
    assert len(numbers) <= explored.MOST_POINTS + 1
    assert {1, 2, 3, 29, 40} <= set(numbers)
    assert numbers == sorted(numbers)
    assert explored.thinned(curve[:12]) == list(curve[:12])
    parts = explored.comparison_parts(
        evaluation.pool, evaluation.curves, evaluation.runs, evaluation.alphas,
        evaluation.headline, [], "value",
    )  # fmt: skip
    assert parts["headline"] is not None


def test_the_tries_of_a_problem_are_rows_of_their_own():
    evaluation = made_evaluation(prompts=6)
    pool = dataclasses.replace(evaluation.pool, tries=2)
    parts = explored.comparison_parts(
        pool, evaluation.curves, evaluation.runs, evaluation.alphas, (), ["a", "b", "c"], "vote"
    )
    texts = [problem["prompt"] for problem in parts["problems"]]
    assert texts == [f"{text} (try {k})" for text in "abc" for k in (1, 2)]
    assert parts["headline"] is None


def test_a_tree_that_is_too_large_loses_its_tokens_before_it_is_left_out(monkeypatch):
    row = large_row(256, 2, 64, 0, True)
    small = len(json.dumps(search_data(row, 0, 0, tokens=False)))
    monkeypatch.setattr(explored, "MOST_TREES", 2 * small)
    told = row["introspection"]
    result = dataclasses.replace(made_result(), trace=(), prefixes=())
    monkeypatch.setattr(type(result), "to_dict", lambda _: {k: row[k] for k in row})
    one = explored.ExploredSearch("run", 0, result, told)
    parts = explored.search_parts([one], [{"name": "run", "correct": [1.0]}])
    assert [p["tokens"] for p in parts["searches"][0]["prefixes"]] == [None, None]
    assert parts["searches"][0]["trace"][0]["actions"] is not None
