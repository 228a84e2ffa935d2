"""The rows of a replay, and what is written of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.replay import ReplayConfig, ReplayedSetting, replayed_settings
from zip_rc_jax.evaluation.cost import gen_cost
from zip_rc_jax.evaluation.replay import Replayed, ReplayPool
from zip_rc_jax.evaluation.replay_report import (
    replay_row,
    replay_table,
    replayed_point,
    write_replay,
)
from zip_rc_jax.grid import Grid

ALPHAS = (0.1, 1.0)


def pool_of(length):
    length = np.asarray(length)
    zero = np.zeros(length.shape)
    return ReplayPool(
        grid=Grid((0.0, 1.0), (0, 8)), stride=1, window=1, max_tokens=64, stops=False,
        extractor="stated", equivalence="grader", length=length, computed=length,
        stopped=zero == 0, correct=zero, value=zero, answer_id=zero.astype(int),
        level=np.zeros(len(length), int), texts={}, root=np.zeros((len(length), 2), np.float32),
        end=np.zeros((*length.shape, 2), np.float32), joints=np.zeros((0, 2), np.float32),
        first=zero.astype(int), kind="float32",
    )  # fmt: skip


FOUND = Replayed(
    by_value=np.zeros((2, 3), int), by_vote=np.zeros((2, 3), int),
    correct_by_value=np.array([[1.0, 0, 0], [1, 1, 1]]), correct_by_vote=np.ones((2, 3)),
    correct_by_majority=np.full((2, 3), 0.5), tokens=np.array([[10, 20, 30], [40, 40, 40]]),
    serial_steps=np.array([[5, 10, 15], [20, 20, 20]]), n_started=np.full((2, 3), 2),
    n_finished=np.ones((2, 3), int), reason=np.full((2, 3), ""),
    lengths=np.zeros((2, 3, 2), np.int32),
)  # fmt: skip


def row(answer, exact=False):
    decode = DecodeConfig(n=2, alpha=0.1, beta=0.05, answer=answer)
    setting = ReplayedSetting("search", "search", math.nan, decode)
    point = replayed_point(setting, FOUND, pool_of([[10, 10], [30, 10]]), exact, ALPHAS)
    return replay_row([point], 100, 0)


def test_a_row_has_the_answer_of_the_setting_and_costs_in_mean_samples_of_the_prompt():
    found = row("value")
    assert found.accuracy == pytest.approx((1 / 3 + 1) / 2)
    assert (found.by_value, found.by_vote, found.by_majority) == (found.accuracy, 1.0, 0.5)
    compute, latency = (2.0 + 2.0) / 2, (1.0 + 1.0) / 2
    assert (found.compute, found.latency) == (compute, latency)
    costs = [float(gen_cost(compute, latency, alpha)) for alpha in ALPHAS]
    assert found.costs == pytest.approx(costs)
    # Only the first prompt differs between its subsets: variance 1/3, 3 subsets, 2 prompts.
    assert found.subset_error == pytest.approx(math.sqrt(1 / 3 / 3) / 2)
    assert row("vote").accuracy == 1.0
    assert row("value", exact=True).subset_error == 0


def test_the_table_says_where_an_average_over_subsets_is_exact_and_where_it_is_unknown():
    one = dataclasses.replace(row("value"), subset_error=math.nan)
    table = replay_table([row("value"), row("value", exact=True), one], ALPHAS, "Replay")
    assert [cells[4] for cells in table.rows] == ["16.7", "exact", "-"]
    assert table.columns[-2:] == ("GenCost, alpha 0.1", "GenCost, alpha 1")


def test_files_hold_every_row_and_the_picture_is_drawn(tmp_path):
    threshold = dataclasses.replace(
        row("value"), name="reward threshold", kind="reward_threshold", value=0.4, beta=math.nan
    )
    write_replay(tmp_path, [row("value"), threshold], ALPHAS, {"about": 1})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["about"] == 1
    assert [r["value"] for r in written["rows"]] == [None, 0.4]
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["value"] for line in lines] == ["", "0.4"]
    assert [line["beta"] for line in lines] == ["0.05", ""]
    assert float(lines[0]["gen_cost_alpha_1"]) == row("value").costs[1]
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_are_every_price_every_n_the_curves_and_one_option_at_a_time():
    replay = ReplayConfig(
        ns=(2, 4), candidates=("published", "exhaustive"), betas=(0.1, 0.02),
        reward_thresholds=(0.3, 0.6), selection_exponents=(0.0, 0.5), joint_top_ps=(0.9,),
    )  # fmt: skip
    decode = DecodeConfig(n=8, strategy="length_budget", length_budget=5)
    found = replayed_settings(replay, decode, ALPHAS, (0.5,), (0.05, 0.01), (7, 9))
    kinds = [setting.kind for setting in found]
    assert kinds.count("search") == 2 * 2 * 2 * 2
    assert kinds.count("reward_threshold") == kinds.count("length_budget") == 4
    assert kinds.count("half_finished") == 2
    assert (kinds.count("selection_exponent"), kinds.count("joint_top_p")) == (4, 2)
    by_name = {setting.name: setting.decode for setting in found}
    assert len(by_name) == len(found)
    assert by_name["exhaustive n=4 alpha=1 beta=0.02"] == DecodeConfig(
        n=4, alpha=1.0, beta=0.02, candidates="exhaustive"
    )
    assert by_name["selection_exponent=0.5 n=2 alpha=1 beta=0.01"] == DecodeConfig(
        n=2, alpha=1.0, beta=0.01, selection_exponent=0.5
    )
    assert by_name["length budget 9 n=4"] == DecodeConfig(
        n=4, strategy="length_budget", length_budget=9
    )
