"""`zip-rc calibrate` as a user meets it: what it prints and stores, what shows it, what it
refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import pytest

from harness.stored_pools import make_pool
from zip_rc_jax.cli.main import _resumes, main, parse
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.models.io.calibrations import (
    model_identity,
    place_of,
    read_calibration,
    stored_calibration,
    write_calibration,
)
from zip_rc_jax.models.io.head_files import save_head
from zip_rc_jax.models.io.load import load
from zip_rc_jax.runtime.errors import UsageError

PROMPTS = [f"{a} + {b} =" for a in range(4) for b in range(5)]
DECODE = DecodeConfig(n=2, interval=4, window=2, max_tokens=12, max_num_seqs=16)


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory):
    """A saved model and a pool of its samples."""
    directory = tmp_path_factory.mktemp("calibrated")
    lm.save(directory / "model")
    make_pool(directory / "pool", lm, PROMPTS, DECODE, samples=2, stride=4, seed=3)
    return directory


@pytest.fixture
def calibrate(made, capsys):
    """Runs the command; returns its status, and what it printed on both streams."""

    def run(*arguments, model=None, data=None):
        given = [str(model or made / "model"), "--data", str(data or made / "pool"), *arguments]
        status = main(["calibrate", *given])
        streams = capsys.readouterr()
        return status, streams.out + streams.err

    yield run
    (made / "model" / "calibration.json").unlink(missing_ok=True)


def test_what_passed_is_printed_stored_beside_the_model_and_shown_by_predict(
    calibrate, made, lm, tmp_path, capsys
):
    copy = tmp_path / "copy.json"
    status, said = calibrate(
        "--max-error-rate", "0.9", "--confidence", "0.8", "--output", str(copy), "beta=0.05"
    )
    assert status == 0, said
    line = next(row for row in said.splitlines() if row.startswith("calibrated: "))
    assert (
        "errors among answered at most 90.0% with confidence 80%: n=2 alpha=0.1 beta=0.05" in line
    )
    assert "20 problems of pool" in line
    assert said.count("chosen") == 1
    stored = json.loads((made / "model" / "calibration.json").read_text())
    assert stored == json.loads(copy.read_text())
    assert stored["model"] == model_identity(lm)
    assert stored["data"] | {"problems": 20, "tested_on": 20, "priced_on": 0} == stored["data"]
    assert stored["data"]["model"] == lm.digest()
    measured = stored["measured"]
    assert measured["risk"] <= measured["bound"] <= 0.9
    assert measured["passed"]
    assert measured["p_value"] <= measured["level"]
    assert main(["predict", str(made / "model"), "--prompt", "1 + 2 ="]) == 0
    assert line in capsys.readouterr().out
    half = load(made / "model", dtype="bfloat16")
    assert read_calibration(half, copy)["options"] == stored["options"], "the type does not count"


def test_where_nothing_passes_it_says_so_and_stores_nothing(calibrate, made):
    status, said = calibrate("--max-error-rate", "0.15", "--starts", "1", "--thresholds", "0")
    assert status == 1
    assert "No setting passed, so nothing is stored." in said
    assert "chosen" not in said
    assert not (made / "model" / "calibration.json").exists()


def test_a_price_that_spends_the_average_cost_can_be_promised_with_on_other_problems(
    calibrate, made
):
    status, said = calibrate("--average-cost", "1.2")
    assert status == 0, said
    stored = json.loads((made / "model" / "calibration.json").read_text())
    assert 0.9 < stored["measured"]["cost"] <= 1.2
    assert stored["measured"]["cost_low"] < stored["measured"]["cost"]
    assert (stored["promise"], stored["data"]["priced_on"]) == (None, 20)
    assert f"beta={stored['options']['beta']}" in said
    promise = ("--max-loss", "0.9", "--confidence", "0.6", "--starts", "1")
    status, said = calibrate("--average-cost", "1.2", *promise)
    assert status == 0, said
    data = json.loads((made / "model" / "calibration.json").read_text())["data"]
    assert (data["priced_on"], data["tested_on"]) == (10, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"calibrate: it is not said for what.*--max-error-rate 0.05"),
        (("--average-cost", "0"), r"average-cost=0: it is what a prompt may cost"),
        (("--max-loss", "0.5", "--token-budgets", "0"), r"token-budgets=0: nothing could be"),
        (("--max-loss", "0.5", "--token-budgets", "9"), r"token_budget=9 with a pool of stride 4"),
        (("--max-loss", "0.5", "betta=1"), r"decoding option 'betta'.*did you mean 'beta'"),
        (("--max-error-rate", "0.05"), r"20 calibration problems: .*needs 72 of them"),
        (("--max-error-rate", "0.5", "--problems", "2"), r"2 calibration problems: .*needs 6 "),
        (("--max-error-rate", "0.5", "--problems", "99"), r"problems=99: pool .* has 20"),
        (("--max-error-rate", "0.5", "abstain_below=0.1"), r"abstain_below=0.1: .*chooses"),
        (("--average-cost", "1", "beta=0.1"), r"beta=0.1: that is what the calibration chooses"),
        (("--max-error-rate", "2"), r"max-error-rate=2.0: it bounds a mean"),
        (("--max-error-rate", "0.5", "--confidence", "1"), r"confidence=1: it is a probability"),
        (("--max-error-rate", "0.5", "--thresholds", "2"), r"abstain_below=2.0: rewards lie"),
        (("--max-error-rate", "0.5", "temperature=0.5"), r"temperature=0.5: the pool's samples"),
        (("--max-error-rate", "0.5", "n=3"), r"n=3 in a replay: the pool has 2 samples"),
        (("--max-error-rate", "0.5", "--chat"), r"--chat with the pool .* drawn already"),
        (("--average-cost", "1", "--betas", "1"), r"betas with average-cost: each of them says"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(calibrate, monkeypatch, arguments, message):
    from zip_rc_jax.models.io import load as loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    status, said = calibrate(*arguments)
    assert status == 2
    assert _matches(message, said), said


def _matches(message, said):
    return re.search(message, " ".join(said.split()))


def test_problems_need_a_place_for_their_samples_and_a_model_a_place_for_the_record(
    calibrate, made, tmp_path
):
    file = tmp_path / "heldout.jsonl"
    file.write_text('{"question": "1 + 2 =", "answer": "3"}\n')
    for data, arguments, message in (
        (file, (), "without --pool: it is no pool"),
        (file, ("--pool", str(made / "pool")), "there is something already"),
        (tmp_path / "none", ("--pool", str(tmp_path / "p")), r"it is no pool, and no .jsonl"),
        (file, ("--pool", str(tmp_path / "p")), "1 calibration problems: .*needs 6 of them"),
    ):
        status, said = calibrate("--max-error-rate", "0.5", *arguments, data=data)
        assert status == 2
        assert _matches(message, said), said
    status, said = calibrate("--max-error-rate", "0.5", model="embedded:chain_sum_zip")
    assert (status, "add --output FILE.json" in said) == (2, True)


def test_a_pool_of_another_model_and_a_model_without_a_head_are_refused(calibrate, lm, tmp_path):
    lm.without_head().save(tmp_path / "plain")
    status, said = calibrate("--max-error-rate", "0.9", model=tmp_path / "plain")
    assert (status, "without a ZIP head" in said) == (2, True)
    assert not (tmp_path / "plain" / "calibration.json").exists()
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 1.5, lm.params))
    other.save(tmp_path / "other")
    status, said = calibrate("--max-error-rate", "0.9", model=tmp_path / "other")
    assert status == 2
    assert _matches(r"pool .*its samples were drawn from another model \(digest", said)


def test_after_an_interruption_only_samples_that_are_drawn_go_on():
    given = ["calibrate", "m", "--data", "d", "--average-cost", "1"]
    assert not _resumes(parse(given))
    assert _resumes(parse([*given, "--pool", "p"]))


@pytest.mark.slow
def test_a_file_of_problems_is_decoded_first(calibrate, made, tmp_path):
    file, pool = tmp_path / "heldout.jsonl", tmp_path / "drawn"
    rows = [{"question": prompt, "answer": "3"} for prompt in PROMPTS[:8]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("n=2", "interval=4", "window=2", "max_tokens=12", "max_num_seqs=16")
    promise = ("--max-loss", "0.9", "--confidence", "0.6", "--starts", "1")
    status, said = calibrate(*promise, "--pool", str(pool), *options, data=file)
    assert status == 0, said
    stored = json.loads((made / "model" / "calibration.json").read_text())
    assert (stored["data"]["problems"], stored["data"]["path"]) == (8, str(pool))
    again = calibrate(*promise, "n=2", data=pool)
    assert again[0] == 0, "the samples that were drawn are a pool"


# ---- the record


RECORD = {
    "options": {"n": 2, "beta": 0.05, "abstain_below": 0.5},
    "promise": {"risk": "errors", "delta": 0.05, "epsilon": 0.1},
    "measured": {"cost": 1.25},
    "data": {"name": "pool", "problems": 100},
}


def test_a_record_is_refused_for_other_weights_another_head_and_after_damage(lm, tmp_path):
    path = write_calibration(lm, tmp_path / "calibration.json", RECORD)
    assert read_calibration(lm, path)["options"] == RECORD["options"]
    body = dataclasses.replace(
        lm, params={**lm.params, "body": jax.tree.map(lambda x: x * 1.5, lm.params["body"])}
    )
    rows = dataclasses.replace(lm, params={**lm.params, "zip_rows": lm.params["zip_rows"] * 2})
    label = dataclasses.replace(lm, head=dataclasses.replace(lm.head, label="correct"))
    for other, message in (
        (body, "it was made with other weights .digest"),
        (rows, "it was made with another head"),
        (label, "it was made with another grid or label"),
    ):
        with pytest.raises(UsageError, match=message):
            read_calibration(other, path)
    with pytest.raises(UsageError, match="model without a ZIP head"):
        write_calibration(lm.without_head(), tmp_path / "none.json", RECORD)
    path.write_text(path.read_text().replace('"delta": 0.05', '"delta": 0.01'))
    with pytest.raises(UsageError, match="it is damaged .its digest does not fit"):
        read_calibration(lm, path)


def test_a_head_file_has_its_record_beside_it(lm, tmp_path):
    head = tmp_path / "head.safetensors"
    save_head(lm, head)
    place = place_of("some/model", str(head))
    assert place == tmp_path / "head.safetensors.calibration.json"
    assert stored_calibration(lm, "some/model", str(head)) is None
    write_calibration(lm, place, RECORD)
    assert stored_calibration(lm, "some/model", str(head))["data"]["problems"] == 100
    for model, given in (("embedded:chain_sum_zip", None), ("org/model", None), ("m", "builtin:h")):
        assert place_of(model, given) is None


def test_a_model_that_is_saved_again_loses_the_record_of_the_old_one(lm, made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    write_calibration(lm, tmp_path / "model" / "calibration.json", RECORD)
    assert stored_calibration(lm, str(tmp_path / "model")) is not None
    lm.save(tmp_path / "model")
    assert stored_calibration(lm, str(tmp_path / "model")) is None
