"""The four benchmarks of the paper under their real names and in their real columns, from a policy
to the table.

Twelve problems each stand in the cache of the hub (`harness.tiny_benchmarks`); nothing is
downloaded.
"""

from __future__ import annotations

import json

import pytest

from harness.datasets_on_disk import offline
from harness.small_tokenizers import chatml
from harness.tiny import tiny_chat_lm
from harness.tiny_benchmarks import PROBLEMS, write_hub
from zip_rc_jax.cli.main import main
from zip_rc_jax.config.files import load_config
from zip_rc_jax.evaluation.benchmark_table import read_cells
from zip_rc_jax.grading import grade
from zip_rc_jax.pipeline.evaluation.benchmarks import evaluation_benchmarks

NAMES = ["gsm8k", "math500", "amc23", "aime24"]
CONFIG = """
policy: {{path: {policy}}}
prompt: {{style: chat}}
problems: {{train: [{{source: "hf:openai/gsm8k/main", split: train}}]}}
grid: {{value_centres: [0, 0.5, 1], correct_centres: [0, 1], length_edges: [0, 3, 7, 20]}}
rollout: {{prompts: 6, samples: 2, rows: 8, max_tokens: 8}}
critic: {{label: correct, epochs: 2, batch_rows: 2, row_tokens: 256, eval_rollouts: 4, evaluations: 1}}
label: {{last: 2, batch_tokens: 512}}
final: {{label: value, epochs: 2, batch_rows: 2, row_tokens: 256, kl_weight: 10, kl_top_k: 5, eval_rollouts: 4, evaluations: 1}}
lite: {{label: value, trainable: zip_rows, epochs: 2, batch_rows: 2, row_tokens: 256, eval_rollouts: 4, evaluations: 1}}
decode: {{n: 2, max_num_seqs: 8, interval: 4, window: 2, max_tokens: 8}}
evaluate:
  benchmarks: [{{name: gsm8k, samples: 2, tries: 2}}, {{name: math500, samples: 2, tries: 1}},
    {{name: amc23, samples: 2, tries: 1}}, {{name: aime24, samples: 2, tries: 2}}, mixed]
  baselines: plain
  alphas: [0.1]
  betas: [0.05]
  headline_beta: [0.05]
  bootstrap: 40
  drift_rollouts: 4
"""  # noqa: E501


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_hub(home)
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, home)
        yield home


@pytest.fixture(scope="module")
def config(home):
    path = home / "tiny.yaml"
    path.write_text(CONFIG.format(policy=home / "policy"))
    return str(path)


def test_the_table_reads_the_columns_and_answers_of_the_real_data_sets(config, home):
    read = load_config(config, [f"run_dir={home / 'unused'}"])
    benchmarks = {one.name: one for one in evaluation_benchmarks(read) if one.heldout}
    problems = {name: one.heldout.found.problems for name, one in benchmarks.items()}
    answers = {name: [p.answer for p in found] for name, found in problems.items()}
    assert answers["gsm8k"] == [str(2 * n + 1) for n in range(1, PROBLEMS + 1)]
    assert answers["amc23"] == [str(n * n) for n in range(1, PROBLEMS + 1)]
    assert answers["math500"][::4] == ["7", "3", "\\frac{1}{2}"]
    assert answers["aime24"][:2] == ["001", "002"]
    assert {p.level_name for p in problems["math500"]} == {"1", "2", "3", "5"}
    for asked in benchmarks.values():
        assert "\\boxed{}" in asked.config.prompt.instruction
    for found in problems.values():
        assert len(found) == PROBLEMS
        p = found[-1]
        assert grade(p.task, p.answer, f"So it is \\boxed{{{p.answer.lstrip('0')}}}.") == 1
        assert grade(p.task, p.answer, "So it is \\boxed{12345}.") == 0


@pytest.mark.slow
def test_a_policy_goes_through_all_stages_to_the_table_of_the_paper(config, home, capsys):
    tiny_chat_lm(chatml(), 512).save(home / "policy")
    run_dir = f"run_dir={home / 'run'}"
    for command in (
        ["rollout"],
        ["grade"],
        ["train", "--stage", "critic"],
        ["label"],
        ["train", "--stage", "final"],
        ["train", "--stage", "lite"],
        ["evaluate"],
    ):
        assert main([command[0], config, run_dir, *command[1:]]) == 0, command
    printed = capsys.readouterr()
    for title in ("GSM8K", "MATH-500", "AMC23", "AIME24", "Mixed"):
        assert title in printed.out
    report = home / "run" / "report"
    cells = [c for c in read_cells(report / "table.json") if c.method == "majority"]
    sizes = {c.benchmark: (c.problems, c.tries) for c in cells}
    assert sizes == {
        "gsm8k": (PROBLEMS, "2"),
        "math500": (PROBLEMS, "1"),
        "amc23": (PROBLEMS, "1"),
        "aime24": (PROBLEMS, "2"),
        "mixed": (4 * PROBLEMS, "1 to 2"),
    }
    for name in NAMES:
        pool = [
            json.loads(line) for line in (report / name / "pool.jsonl").read_text().splitlines()
        ]
        assert {row["prompt_idx"] for row in pool} == set(range(PROBLEMS))
        assert (report / name / "report.html").exists()
    trained = json.loads((report / "gsm8k" / "metadata.json").read_text())
    assert "hf:openai/gsm8k/main" in json.dumps(trained)
