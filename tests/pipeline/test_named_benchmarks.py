"""Benchmarks through the command line: what is decoded, how often, and what the table says.

The data sets are tiny copies in the hub's cache, under their real names; nothing is downloaded.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from harness.datasets_on_disk import hub_cache, hub_directory, offline
from harness.reward_models import saved_reward_model
from zip_rc_jax.cli.main import main
from zip_rc_jax.config import EvaluateConfig, PipelineConfig, ProblemsConfig
from zip_rc_jax.data.sample_pool import PoolFiles
from zip_rc_jax.evaluation.benchmark_table import (
    accuracy_text,
    cost_text,
    latex_text,
    read_cells,
)
from zip_rc_jax.evaluation.method_table import METHOD_TABLE
from zip_rc_jax.pipeline import replay
from zip_rc_jax.pipeline.against_online import agreement
from zip_rc_jax.pipeline.evaluation import runner
from zip_rc_jax.pipeline.problems import training_problems

GSM8K = [
    {"question": "1 + 2 =", "answer": "1 + 2 = 3\n#### 3"},
    {"question": "3 + 4 =", "answer": "#### 7"},
    {"question": "wait so", "answer": "#### 5"},
]
MATH = [
    {"problem": f"{i} + 5 =", "solution": "", "answer": f"{i + 5}", "subject": "Algebra",
     "level": 1 + i, "unique_id": f"test/algebra/{i}.json"}
    for i in range(2)
]  # fmt: skip
TABLE = """
both: {union: [gsm8k, math500], title: Both_50%}
"""
CONFIG = """
policy: {{path: {final}}}
grade: {{grader: "harness.user_graders:even"}}
decode:
  {{n: 2, max_num_seqs: 8, interval: 4, window: 2, max_tokens: 48,
    answer_extractor: "harness.user_plugins:last_word", answer_equivalence: text}}
evaluate:
  benchmarks: [{{name: gsm8k, samples: 2, tries: 2}}, {{name: math500, samples: 2, tries: 1}}, both]
  benchmark_table: {table}
  alphas: [0.1]
  betas: [0.05]
  headline_beta: [0.05]
  bootstrap: 40
  joint_prompts: [test/algebra/1.json]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny copies of GSM8K and MATH-500 as `hf download` leaves them."""
    home = tmp_path_factory.mktemp("home")
    hub_directory(home / "gsm8k", {"main": {"train": GSM8K[:1], "test": GSM8K}}, shards=2)
    hub_cache(home, "openai/gsm8k", home / "gsm8k")
    hub_directory(home / "math", {"default": {"test": MATH}})
    hub_cache(home, "HuggingFaceH4/MATH-500", home / "math")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, home)
        yield home


@pytest.fixture(scope="module")
def evaluated(home, lm):
    """The run directory after `zip-rc evaluate`, with a full and a Lite model."""
    run_dir = home / "run"
    lm.save(run_dir / "final")
    lite = dataclasses.replace(lm, params=lm.params | {"zip_rows": lm.params["zip_rows"] * 0.5})
    lite.save(run_dir / "lite" / "model")
    (home / "table.yaml").write_text(TABLE)
    config = home / "config.yaml"
    config.write_text(CONFIG.format(final=run_dir / "final", table=home / "table.yaml"))
    assert main(["evaluate", str(config), f"run_dir={run_dir}"]) == 0
    return run_dir


def cells_of(evaluated):
    return read_cells(evaluated / "report" / "table.json")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_has_every_method_on_every_benchmark_and_on_their_union(evaluated):
    cells = cells_of(evaluated)
    assert {c.benchmark for c in cells} == {"gsm8k", "math500", "both"}
    methods = {c.method for c in cells}
    assert {"zip_rc published", "majority", "weighted_best_of_n", "pass", "shortest"} <= methods
    assert {"online reward_threshold", "online half_finished", "online length_budget"} <= methods
    assert {"adaptive_consistency", "deepconf_offline", "cges", "reward_pruning"} <= methods
    assert len(cells) == 3 * len(methods)
    for c in cells:
        assert c.accuracy_low <= c.accuracy <= c.accuracy_high
        assert c.cost_low <= c.cost <= c.cost_high
    sizes = {c.benchmark: (c.problems, c.tries) for c in cells}
    assert sizes == {"gsm8k": (3, "2"), "math500": (2, "1"), "both": (5, "1 to 2")}


def test_a_cell_is_the_mean_over_problems_of_the_mean_over_tries(evaluated):
    """From `results.jsonl` and `pool.jsonl` alone, with a problem's samples of all tries as the
    unit of cost."""
    directory = evaluated / "report" / "gsm8k"
    cell = next(
        c for c in cells_of(evaluated) if (c.benchmark, c.method) == ("gsm8k", "zip_rc published")
    )
    rows = [r for r in lines(directory / "results.jsonl") if r["run"] == cell.setting]
    tokens = {p: [] for p in range(3)}
    for sample in lines(directory / "pool.jsonl"):
        tokens[sample["prompt_idx"]].append(sample["tokens"])
    assert {len(x) for x in tokens.values()} == {4}
    costs = {p: [] for p in range(3)}
    for r in rows:
        unit = np.mean(tokens[r["prompt_idx"]])
        costs[r["prompt_idx"]].append(
            (0.1 * r["cost/tokens"] + 0.9 * r["cost/serial_steps"]) / unit
        )
    assert {(r["prompt_idx"], r["try_idx"]) for r in rows} == {
        (p, t) for p in range(3) for t in range(2)
    }
    assert cell.cost == pytest.approx(np.mean([np.mean(x) for x in costs.values()]))
    assert cell.accuracy == pytest.approx(np.mean([r["correct/value"] for r in rows]))


def test_votes_and_grades_are_those_of_the_configured_extractor_and_grader(evaluated):
    directory = evaluated / "report" / "math500"
    stored = json.loads((directory / ".partial" / "fixed_samples.json").read_text())
    texts = [[x["text"] for x in r["prefixes"]] for r in stored["results"]]
    pool = {(s["prompt_idx"], s["sample_idx"]): s for s in lines(directory / "pool.jsonl")}
    for p, row in enumerate(texts):
        words = [text.split()[-1] for text in row]
        ids = [pool[p, k]["answer_id"] for k in range(2)]
        assert (ids[0] == ids[1]) == (words[0] == words[1])
        assert min(ids) == 0, "every sample has an answer"
        right = [pool[p, k]["correct"] for k in range(2)]
        assert right == [float(len(text.split()) % 2 == 0) for text in row]
    both = lines(directory.parent / "gsm8k" / "pool.jsonl") + list(pool.values())
    assert {s["correct"] for s in both} == {0, 1}


def test_in_a_union_every_problem_counts_alike(evaluated):
    cells = {(c.method, c.benchmark): c for c in cells_of(evaluated)}
    method = "zip_rc published"
    parts = [cells[method, name] for name in ("gsm8k", "math500")]
    mean = sum(c.cost * c.problems for c in parts) / 5
    assert cells[method, "both"].cost == pytest.approx(mean)


def test_every_try_has_samples_of_its_own(evaluated):
    partial = evaluated / "report" / "gsm8k" / ".partial"

    def drawn(path):
        results = json.loads((path / "fixed_samples.json").read_text())["results"]
        return [tuple(x["token_ids"]) for r in results for x in r["prefixes"]]

    first, second = drawn(partial), drawn(partial / "try_2")
    assert len(first) == len(second) == 6
    assert first != second
    keys = [
        json.loads((path / "fixed_samples.json").read_text())["key"]["evaluate"]["seed"]
        for path in (partial, partial / "try_2")
    ]
    assert keys[0] != keys[1]


def test_csv_markdown_and_latex_hold_the_numbers_of_the_json(evaluated):
    report, cells = evaluated / "report", cells_of(evaluated)
    with (report / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, cell in zip(rows, cells, strict=True):
        for name, value in dataclasses.asdict(cell).items():
            assert row[name] == str(value)

    titles = ["GSM8K (3, 2 tries)", "MATH-500 (2)", "Both_50% (5, 1 to 2 tries)"]
    names = ["gsm8k", "math500", "both"]
    expected = {}
    for cell in cells:
        row = expected.setdefault(cell.method, ["-"] * 6)
        at = 2 * names.index(cell.benchmark)
        row[at : at + 2] = accuracy_text(cell), cost_text(cell)
    header = ["method", *(x for title in titles for x in (title, "GenCost"))]

    markdown = (report / "table.md").read_text().split("\n## ")[0]
    parsed = [
        [part.strip() for part in line.strip("| ").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert parsed == [header, *([method, *row] for method, row in expected.items())]

    latex = (report / "table.tex").read_text()
    body = re.search(r"\\toprule\n(.*?)\\bottomrule", latex, re.DOTALL)[1]
    found = [
        [part.strip() for part in line.removesuffix(r"\\").split(" & ")]
        for line in body.splitlines()
        if line.endswith(r"\\")
    ]
    assert found == [[latex_text(x) for x in row] for row in parsed]
    assert r"Both\_50\% (5" in latex


def test_full_and_lite_stand_side_by_side(evaluated):
    found = json.loads((evaluated / "report" / "table.json").read_text())["predictions"]
    assert set(found) == {"gsm8k", "math500"}
    for heads in found.values():
        assert set(heads) == {"full", "Lite"}
        assert list(heads["full"]) == [
            "TV at the root", "TV, noise floor", "problems of TV", "F1", "accuracy",
            "recall of errors", "ECE", "within-prompt AUC",
        ]  # fmt: skip
        assert heads["full"] != heads["Lite"]
    whole = found["gsm8k"]["full"]
    assert 0 < whole["TV, noise floor"] < 1
    assert 0 < whole["TV at the root"] <= 1
    page = data_of(evaluated / "report" / "gsm8k" / "report.html")
    assert any(table["columns"] == ["metric", "full", "Lite"] for table in page["tables"])


def data_of(page):
    """What the page of a report holds."""
    return json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])


def test_every_benchmark_has_a_page_and_a_page_leads_to_them(evaluated):
    report = evaluated / "report"
    index = data_of(report / "report.html")
    links = [link["href"] for link in index["links"]]
    assert links == ["gsm8k/report.html", "math500/report.html"]
    for name in ("gsm8k", "math500"):
        assert (report / name / "pareto.png").is_file()
        assert (report / name / "metadata.json").is_file()
    for name in ("gsm8k", "math500"):
        searches = data_of(report / name / "report.html")["searches"]
        assert searches
        assert any(d["actions"] for one in searches for d in one["trace"])
        assert (report / name / "introspection.jsonl").is_file()
    assert (report / "math500" / "joint_prompts.png").is_file(), "asked for by id"
    assert not (report / "gsm8k" / "joint_prompts.png").exists(), "none of its ids was asked for"
    assert "Both_50%" in json.dumps(index)


def test_the_same_command_decodes_nothing_again(evaluated, home, monkeypatch):
    before = cells_of(evaluated)
    monkeypatch.setattr(runner, "run_all", lambda *_: pytest.fail("decoded again"))
    config = str(home / "config.yaml")
    assert main(["evaluate", config, f"run_dir={evaluated}"]) == 0
    assert cells_of(evaluated) == before


@pytest.fixture(scope="module")
def replayed(evaluated, home):
    """What `zip-rc replay` writes beside the evaluation: benchmark -> results."""
    config = str(home / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_all", lambda *_: pytest.fail("evaluated again"))
        assert main(["replay", config, f"run_dir={evaluated}", "--beside-online"]) == 0
    places = {p.parent.name: p for p in (evaluated / "replay").rglob("results.json")}
    return {name: json.loads(path.read_text()) for name, path in places.items()}


def test_a_replay_has_a_pool_and_a_table_per_benchmark_with_its_tries(evaluated, replayed):
    assert set(replayed) == {"gsm8k", "math500", "both"}
    assert sorted(p.name for p in (evaluated / "pools").iterdir()) == ["gsm8k", "math500"]
    for name, rows, tries in (("gsm8k", 6, 2), ("math500", 2, 1)):
        about = replayed[name]["pool"]
        assert (about["prompts"], about["tries"], about["samples"]) == (rows, tries, 2)
        # Tries follow each other, as in the pool of the evaluation.
        online = {
            (s["prompt_idx"], s.get("try_idx", 0), s["sample_idx"]): s
            for s in lines(evaluated / "report" / name / "pool.jsonl")
        }
        for x in PoolFiles(evaluated / "pools" / name):
            same = online[(*divmod(x.prompt_index, tries), x.sample_index)]
            assert (len(x.token_ids), x.correct) == (same["tokens"], same["correct"])
            assert x.value == pytest.approx(same["value"])


def test_every_baseline_of_the_online_table_is_in_the_replay_with_the_same_figures(
    evaluated, replayed
):
    """But those that no pool gives, which are named with the reason."""
    for name, found in replayed.items():
        rows = {row["name"]: row for row in found["rows"]}
        cells = [c for c in cells_of(evaluated) if c.benchmark == name]
        baselines = [c for c in cells if not c.method.startswith(("zip_rc", "online "))]
        assert len(baselines) == len(METHOD_TABLE) - 3
        for c in baselines:
            if c.setting not in rows:  # a knob that depends on the benchmark's lengths
                assert (name, c.method) == ("both", "length_pruning")
                continue
            row = rows[c.setting]
            assert row["accuracy"] == pytest.approx(c.accuracy, abs=1e-9), c.setting
            assert row["costs"][0] == pytest.approx(c.cost, abs=1e-9), c.setting
            assert row["low"] <= row["accuracy"] <= row["high"]
        left_out = {title.partition("@")[0] for title in found["left_out"]}
        here = {row["method"] for row in found["rows"]} | left_out
        assert {m.name for m in METHOD_TABLE} <= here
        assert found["left_out"]["self_evaluation"].startswith("evaluate.self_evaluation.question")
        assert found["left_out"]["reward_model_weighted"].startswith("evaluate.reward_model.path")


def test_online_and_replayed_decodes_are_the_same_token_for_token(replayed):
    for name, decodes in (("gsm8k", 6), ("math500", 2)):
        beside = replayed[name]["beside_online"]
        compared = {row["name"]: row for row in beside["rows"] if row["decodes"]}
        assert {"fixed samples", "published alpha=0.1 beta=0.05", "half finished"} < set(compared)
        assert len(compared) == 5
        for row in compared.values():
            assert row["same"] == row["decodes"] == decodes, row["name"]
            assert row["online"] == pytest.approx(row["replayed"])
        assert beside["left_out"] == {}
    assert "beside_online" not in replayed["both"]


@pytest.mark.parametrize(
    ("utility", "change", "kind"),
    [
        (0.5, {}, "same"),
        (0.5000004, {"planned_pause_bin": 3}, "tie"),
        (0.5000004, {"multiplicity": (0, 1)}, "tie"),
        (0.51, {"planned_pause_bin": 3}, "different"),
        (0.5, {"tokens": (4, 2)}, "different"),
        (0.5, {"ids": ((1, 2, 3, 4), (5, 6, 9))}, "different"),
        (0.5, {"value_text": "other"}, "different"),
    ],
)
def test_what_differs_by_more_than_a_tie_is_not_the_same(utility, change, kind):
    sample = [((1, 2, 3, 4, 5), "a"), ((5, 6, 7), "b")]
    one = {"step": 4, "multiplicity": (1, 0), "planned_pause_bin": -1, "tokens": (4, 3)}
    ids = change.get("ids", ((1, 2, 3, 4, 5), (5, 6, 7)))
    decided = one | {k: v for k, v in change.items() if k in one}
    online = SimpleNamespace(
        prefixes=[SimpleNamespace(token_ids=x) for x in ids],
        trace=[SimpleNamespace(**decided, finished=(False, True), utility=utility)],
        usage=SimpleNamespace(tokens=8, serial_steps=5),
        value_text=change.get("value_text", "a"),
        vote_text="b",
    )
    mine = SimpleNamespace(
        traces=[[[SimpleNamespace(**one, finished=(False, True), utility=0.5)]]],
        lengths=np.array([[[5, 3]]]),
        tokens=np.array([[8]]),
        serial_steps=np.array([[5]]),
        by_value=np.array([[0]]),
        by_vote=np.array([[1]]),
    )
    assert agreement(online, mine, 0, sample, 2) == kind


def test_a_union_joins_the_problems_of_its_parts(replayed):
    """Each counts alike: three of one benchmark, two of the other."""
    rows = {n: {r["name"]: r for r in found["rows"]} for n, found in replayed.items()}
    for name in ("majority@2", "published n=2 alpha=0.1 beta=0.05"):
        parts = [rows[part][name]["accuracy"] for part in ("gsm8k", "math500")]
        expected = (3 * parts[0] + 2 * parts[1]) / 5
        assert rows["both"][name]["accuracy"] == pytest.approx(expected)
    budgets = {name for name in rows["gsm8k"] if name.startswith("length budget")}
    for name in budgets - set(rows["math500"]):
        assert replayed["both"]["left_out"][name] == "a part of the union has it not"


def test_a_second_replay_reads_no_problems_and_loads_no_model(
    evaluated, replayed, home, monkeypatch
):
    monkeypatch.setattr(replay, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(replay, "held_out", lambda *_: pytest.fail("problems were read"))
    arguments = ["replay", str(home / "config.yaml"), f"run_dir={evaluated}"]
    assert main([*arguments, "evaluate.baselines=plain"]) == 0
    found = json.loads((evaluated / "replay" / "gsm8k" / "results.json").read_text())
    assert found["left_out"]["cges"] == "evaluate.baselines=plain leaves it out"
    assert "majority@2" in {row["name"] for row in found["rows"]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["evaluate.benchmarks=[{name: gsm8k, samples: 2, tries: 3}]"], "tries was 2, now 3"),
        (["replay.ns=[4]"], "benchmark gsm8k: replay.ns=[4] with replay.samples=2"),
        (["--benchmarks=gsm8"], "benchmark 'gsm8': no table names it"),
        (["evaluate.seed=1"], "pools/gsm8k"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(
    evaluated, replayed, home, capsys, options, said
):
    arguments = ["replay", str(home / "config.yaml"), f"run_dir={evaluated}"]
    assert main([*arguments, *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("benchmarks", "said"),
    [
        ("--benchmarks=gsm8", "benchmark 'gsm8': no table names it. Fix: did you mean 'gsm8k'"),
        ("--benchmarks=,", "--benchmarks ',': it names none"),
        (
            "evaluate.benchmarks=[{name: gsm8k, problems: {answer: reply}}]",
            "answer of 'hf:openai/gsm8k/main': there is no column `reply`",
        ),
        (
            "evaluate.benchmarks=[{name: gsm8k, problems: {split: validation}}]",
            "split='validation' of 'hf:openai/gsm8k/main': it has no such split",
        ),
        (
            "evaluate.benchmarks=[{name: none, problems: {source: 'hf:EMPTY', split: test}}]",
            "benchmark none: split 'test' of",
        ),
        ("evaluate.benchmarks=[{name: gsm8k, trys: 2}]", "'trys' of benchmark 'gsm8k'"),
        ("evaluate.benchmarks=[gsm8k, gsm8k]", "gsm8k twice"),
        ("evaluate.benchmarks=[{name: '../x', problems: {source: 'gym:gcd'}}]", "'../x'"),
        ("evaluate.joint_prompts=[nobody]", "evaluate.joint_prompts with 'nobody'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    home, capsys, monkeypatch, benchmarks, said
):
    import zip_rc_jax.models.io.load as loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    empty = home / "empty"
    if not empty.exists():
        hub_directory(empty, {"default": {"test": []}})
    config = home / "refused.yaml"
    config.write_text(CONFIG.format(final=home / "none", table=home / "refused_table.yaml"))
    (home / "refused_table.yaml").write_text(TABLE)
    arguments = ["evaluate", str(config), f"run_dir={home / 'other'}"]
    assert main([*arguments, benchmarks.replace("EMPTY", str(empty))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Fix: " in error


def test_training_leaves_out_the_problems_of_the_benchmarks(home, capsys):
    """Those of every benchmark that the config names, all of them."""
    path = home / "train.jsonl"
    mine = [{"question": "8 + 9 =", "answer": "17"}, {"question": "2 + 9 =", "answer": "11"}]
    repeated = [{"question": q["question"], "answer": "3"} for q in GSM8K[1:]]
    rows = [*mine, *repeated, {"question": MATH[1]["problem"], "answer": "6"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PipelineConfig(
        problems=ProblemsConfig(train=(f"jsonl:{path}",)),
        evaluate=EvaluateConfig(benchmarks=("gsm8k", "math500"), prompts=1),
    )
    found = training_problems(config, 0)
    assert [p.question for p in found.problems] == ["8 + 9 =", "2 + 9 ="]
    assert "3 training problems are held-out ones" in capsys.readouterr().err


@pytest.mark.slow
def test_an_own_policy_an_own_utility_and_a_reward_model_are_evaluated(home, lm):
    """In the table, beside the paper's search."""
    saved_reward_model(home / "judge")
    run_dir = home / "own"
    lm.save(run_dir / "final")
    (home / "own_table.yaml").write_text(TABLE)
    config = home / "own.yaml"
    config.write_text(CONFIG.format(final=run_dir / "final", table=home / "own_table.yaml"))
    own = "harness.user_plugins"
    assert (
        main(
            [
                "evaluate",
                str(config),
                f"run_dir={run_dir}",
                "evaluate.benchmarks=[{name: math500, samples: 2, tries: 2}]",
                f"decode.strategy={own}:first_alone",
                f"decode.utility={own}:spendthrift",
                f"evaluate.reward_model.path={home / 'judge'}",
                "evaluate.baselines=plain",
            ]
        )
        == 0
    )
    cells = {c.method: c for c in read_cells(run_dir / "report" / "table.json")}
    assert "shortest" not in cells, "plain baselines alone"
    paper, free = cells["zip_rc published"], cells[f"zip_rc published, {own}:spendthrift"]
    assert paper.setting == "published alpha=0.1 beta=0.05"
    assert free.setting == f"{own}:spendthrift published alpha=0.1 beta=0.05"
    alone = cells[f"online {own}:first_alone"]
    assert alone.setting == f"{own}:first_alone alpha=0.1 beta=0.05"
    rows = lines(run_dir / "report" / "math500" / "results.jsonl")
    mine = [r for r in rows if r["run"] == alone.setting]
    assert len(mine) == 4
    assert all(r["prefixes/finished"] == 1 for r in mine), "it decided: only the first ended"

    # What the reward model reads is charged: more than the same samples cost without it.
    judged = cells["reward_model_weighted"]
    assert judged.setting == "reward_model_weighted@2"
    plain = json.loads((run_dir / "report" / "math500" / "metadata.json").read_text())
    assert "reward_model/within_prompt_auc" in plain["quality"]
    assert judged.cost > cells["majority"].cost
