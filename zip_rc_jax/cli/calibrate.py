"""`zip-rc calibrate`: settings that keep a promise, or spend a budget, stored with the head."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zip_rc_jax.cli.common import add_model, zip_options
from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.evaluation.tables import Table
    from zip_rc_jax.models.language_model import LanguageModel
    from zip_rc_jax.pipeline.calibrate import Calibration, CalibrationPlan

DESCRIPTION = """\
Chooses `abstain_below` (and beta or a token budget) so that a promise holds of later problems:

--max-error-rate 0.05  at most 5% of the answered problems are answered wrongly
--max-loss 0.02        at most 2 points of accuracy are lost against n full samples
--average-cost 1.5     the beta that spends 1.5 samples a problem, on average

The first two hold with the given confidence, whatever the model, the head and the problems are
(Learn then Test), as long as later problems come from where the calibration problems come from.

HELDOUT is a pool of samples as `zip-rc replay` stores it (run_dir/pool), or problems: a .jsonl,
.parquet or .csv file, or a source such as hf:openai/gsm8k/main. Samples of problems are drawn
first, and stored in --pool. No problem may have been trained on.

The choice, its data and its bound are written beside the model (calibration.json in its
directory), where `zip-rc predict` and `zip-rc serve` show them; --output writes a copy. Status 1
says that no setting passed, and nothing is written.

example: zip-rc calibrate runs/demo/final --data runs/demo/pool --max-error-rate 0.05 answer=vote
example: zip-rc calibrate runs/mine/final --data heldout.jsonl --pool runs/mine/heldout
         --max-loss 0.02 --confidence 0.95 n=8
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="choose settings that keep a promise with a guarantee, or spend a budget",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="option=value",
        help="fields of DecodeConfig, e.g. n=8 beta=0.02 answer=vote",
    )
    add("--data", required=True, metavar="HELDOUT", help="a pool of samples, or problems")
    risk = parser.add_mutually_exclusive_group()
    risk.add_argument(
        "--max-error-rate", type=float, metavar="RATE", help="of wrong answers among answered ones"
    )
    risk.add_argument(
        "--max-loss", type=float, metavar="LOSS", help="of accuracy against n full samples"
    )
    add("--average-cost", type=float, metavar="COST", help="mean GenCost that beta is to spend")
    add("--confidence", type=float, default=0.9, help="that the promise holds (default 0.9)")
    add("--betas", type=_floats, default=(), metavar="BETA,...", help="prices to test")
    add(
        "--token-budgets",
        type=_integers,
        default=(),
        metavar="TOKENS,...",
        help="budgets of a problem to test instead; a pool needs replay.stride=1 for them",
    )
    add(
        "--thresholds",
        type=_floats,
        default=(),
        metavar="VALUE,...",
        help="values of abstain_below to test (default: 0 to 0.95 in steps of 0.05, 0.975, 0.99)",
    )
    add(
        "--starts",
        type=int,
        default=4,
        help="places at which testing a path of thresholds or prices may begin (default 4)",
    )
    add(
        "--prefer",
        choices=("answered", "cost"),
        default="answered",
        help="among settings that pass: the one that answers most, or the cheapest one",
    )
    add("--pool", default="", metavar="DIR", help="where drawn samples are stored")
    add("--problems", type=int, default=0, metavar="N", help="the first N of HELDOUT (default all)")
    add("--chat", action="store_true", help="problems are user turns for the chat template")
    add("--output", type=pathlib.Path, metavar="FILE.json", help="another copy of the record")


def _floats(text: str) -> tuple[float, ...]:
    """Numbers between commas. Raises ValueError, which argparse tells of."""
    return tuple(map(float, text.split(",")))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


_floats.__name__, _integers.__name__ = "list of numbers", "list of whole numbers"  # in messages


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Calibrates. Returns 1 where no setting passed.

    Raises:
      UsageError: what `calibrate` refuses, or a record that can be written nowhere.
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.evaluation.tables import print_table
    from zip_rc_jax.models.io.calibrations import calibration_line, write_calibration
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.pipeline.calibrate import calibrate

    plan, places = _plan(arguments), _places(arguments)
    loaded: list[LanguageModel] = []

    def model(dtype: str) -> LanguageModel:
        loaded.append(load(arguments.model, dtype=dtype, **zip_options(arguments)))
        return loaded[0]

    found = calibrate(plan, model)
    if found.settings:
        print_table(settings_table(plan, found), console)
    if found.tried:
        print_table(price_table(found), console)
    if found.record is None:
        console.print("No setting passed, so nothing is stored.", markup=False)
        return 1
    console.print(calibration_line(found.record), markup=False, highlight=False, soft_wrap=True)
    for place in places:
        write_calibration(loaded[0], place, found.record)
        console.print(f"wrote {place}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _plan(arguments: argparse.Namespace) -> CalibrationPlan:
    from zip_rc_jax.config.overrides import from_dotlist
    from zip_rc_jax.evaluation.calibration import Promise
    from zip_rc_jax.inference.api import resolve
    from zip_rc_jax.pipeline.calibrate import CalibrationPlan

    options = from_dotlist(arguments.overrides, "option", "n=8")
    resolve(None, options)
    promise = None
    shared = {"starts": arguments.starts, "prefer": arguments.prefer}
    risks = (("errors", arguments.max_error_rate), ("loss", arguments.max_loss))
    for risk, delta in risks:
        if delta is not None:
            promise = Promise(risk, delta, round(1 - arguments.confidence, 12), **shared)
    return CalibrationPlan(
        arguments.data,
        promise,
        arguments.average_cost,
        options,
        betas=arguments.betas,
        token_budgets=arguments.token_budgets,
        thresholds=arguments.thresholds,
        pool=arguments.pool,
        chat=arguments.chat,
        problems=arguments.problems,
    )


def _places(arguments: argparse.Namespace) -> list[pathlib.Path]:
    """Where the record goes. Raises UsageError where nothing can be written."""
    from zip_rc_jax.models.io.calibrations import place_of
    from zip_rc_jax.runtime.storage import check_writable

    beside = place_of(arguments.model, arguments.head)
    places = [place for place in (beside, arguments.output) if place is not None]
    if not places:
        reason = "there is no file or directory of yours that the record could lie beside"
        fix = "add --output FILE.json, or give the path of a model"
        raise UsageError(f"model {arguments.model}", reason, fix)
    for place in places:
        if place.is_dir():
            raise UsageError(f"--output {place}", "it is a directory", "name a file in it")
        check_writable(place.absolute().parent, "place of the calibration")
    return places


# ---- tables


def settings_table(plan: CalibrationPlan, found: Calibration) -> Table:
    """Every test, in the order of testing."""
    from zip_rc_jax.evaluation.tables import Table, number, percent

    assert plan.promise is not None
    risk = plan.promise.risk
    budget = bool(plan.token_budgets)
    rows = []
    for one in found.settings:
        mark = "chosen" if one is found.choice else "yes" if one.passed else "no"
        price: Any = one.decode.token_budget if budget else one.decode.beta
        interval = f"{one.cost:.2f} [{one.cost_low:.2f}, {one.cost_high:.2f}]"
        numbers = (percent(one.risk), percent(one.bound), f"{one.p_value:.2g}", f"{one.level:.2g}")
        shares = (percent(one.answered), percent(one.accuracy))
        threshold = number(one.decode.abstain_below, "g")
        rows.append((f"{price:g}", threshold, *numbers, mark, *shares, interval))
    sure = f"{1 - plan.promise.epsilon:.0%}"
    return Table(
        f"At most {plan.promise.delta:.1%} {risk}, with confidence {sure}: "
        f"{found.tested_on} problems",
        (
            "token budget" if budget else "beta",
            "abstain below",
            f"{risk} %",
            "bound %",
            "p",
            "level",
            "passes",
            "answered %",
            "accuracy %",
            "GenCost",
        ),
        tuple(rows),
        "A setting passes if its p is at most its level. The level of one that passes goes on to "
        "the next. Bound: upper confidence bound at that level, or at that of a start. A problem "
        "without an answer counts 0 in accuracy.",
        text_columns=0,
    )


def price_table(found: Calibration) -> Table:
    """What the betas spend that were tried."""
    from zip_rc_jax.evaluation.tables import Table

    assert found.choice is not None or found.settings
    return Table(
        f"Mean GenCost by beta: {found.priced_on} problems",
        ("beta", "GenCost"),
        tuple((f"{beta:.4g}", f"{cost:.3f}") for beta, cost in found.tried.items()),
        text_columns=0,
    )
