"""A replay beside the online evaluation of the same run directory: what agrees, and what both say.

Decodes that start all samples from the root are compared token for token, decision for decision.
An online decode multiplies matrices of other sizes, so the last bits of its joints may differ.
Where two meta-actions are equally good, these bits decide. Such decodes are counted as ties.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.config.replay import ReplayedSetting
from zip_rc_jax.data.sample_pool import PoolFiles
from zip_rc_jax.evaluation.benchmark_table import Cell, read_cells
from zip_rc_jax.evaluation.replay import Replayed, ReplayPool, check_replayable, load_pool, replay
from zip_rc_jax.evaluation.replay_report import ReplayRow, replayed_point
from zip_rc_jax.evaluation.tables import Table, number, percent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.pipeline.evaluation.pool import joined_runs, online_run
from zip_rc_jax.pipeline.evaluation.runner import Decoded, read_stored, stored_path
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import plain

TIE = 1e-6  # of two utilities: a few float32 roundings of numbers about 1
EVALUATE = "run `zip-rc evaluate` with the same config and run_dir first"


@dataclasses.dataclass(frozen=True)
class Compared:
    """One setting, online and replayed.

    Attributes:
      name: of the setting.
      decodes: problems times tries; 0 for baselines, which decode nothing of their own.
      same: decodes with the same tokens of every sample, the same decisions, cost and answers.
      ties: decodes of the same samples that differ first where both decisions have the same
        utility, but for `TIE`.
      online, replayed: (accuracy, GenCost at each alpha); NaN where the online table has it not.
    """

    name: str
    decodes: int
    same: int
    ties: int
    online: tuple[float, ...]
    replayed: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class AgainstOnline:
    """See `against_online`.

    Attributes:
      rows: decodes, then baselines.
      alphas: of the costs.
      left_out: why online settings were not compared, by their names.
    """

    rows: tuple[Compared, ...]
    alphas: tuple[float, ...]
    left_out: Mapping[str, str]


def against_online(
    config: PipelineConfig,
    files: PoolFiles,
    rows: Sequence[ReplayRow],
    report: pathlib.Path,
    name: str,
) -> AgainstOnline:
    """Compares a replay with what `zip-rc evaluate` left in `report`.

    Args:
      config, name: of the benchmark.
      files: its pool.
      rows: of its replay: the baselines of the online table are looked for among them.
      report: its online report.

    Raises:
      UsageError: there is no online evaluation, or one of another model or of other problems.
    """
    table = (
        report / "table.json" if (report / "table.json").is_file() else report.parent / "table.json"
    )
    if not (report / ".partial").is_dir() or not table.is_file():
        raise UsageError(f"online evaluation in {report}", "there is none", EVALUATE)
    alphas = tuple(config.evaluate.alphas)
    pool = load_pool(files, window=config.decode.window, unfinished=config.grade.unfinished)
    samples = _Samples(files)
    found, left_out = list[Compared](), dict[str, str]()
    lengths = pool.length[:: pool.tries, : config.evaluate.samples]
    budget = int(np.quantile(lengths, 0.75))
    settings = [("fixed samples", config.fixed_decode), *config.sweep(length_budget=budget)]
    for title, decode in settings:
        try:
            check_replayable(decode, files.metadata)
        except UsageError as error:
            left_out[title] = error.reason
            continue
        tries = [
            _stored(report / ".partial", title, decode, number, files)
            for number in range(pool.tries)
        ]
        if None in tries:
            left_out[title] = f"the report has no such decode: {EVALUATE}"
            continue
        found.append(_compared(title, decode, [x for x in tries if x], pool, samples, alphas))
    if pool.n_samples == config.evaluate.samples:
        found += _baselines(read_cells(table), rows, alphas, name)
    else:
        left_out["baselines"] = (
            f"online they have {config.evaluate.samples} samples (evaluate.samples), and this pool "
            f"has {pool.n_samples}"
        )
    return AgainstOnline(tuple(found), alphas, left_out)


class _Samples:
    """Token ids and texts of the samples of a pool, `[R][N]`."""

    def __init__(self, files: PoolFiles):
        each = files.metadata["samples"]
        flat = [(tuple(x["token_ids"].tolist()), x["text"]) for x in files.records(("token_ids",))]
        self.rows = [flat[i : i + each] for i in range(0, len(flat), each)]


def _stored(
    partial: pathlib.Path, title: str, decode: DecodeConfig, number: int, files: PoolFiles
) -> Decoded | None:
    """An online decode of one try; None where it is not there, or of other settings.

    Raises UsageError for one of another model.
    """
    path = stored_path(partial / f"try_{number + 1}" if number else partial, title)
    stored = read_stored(path)
    if not stored or stored["key"]["decode"] != plain(to_dict(decode)) or not stored["grades"]:
        return None
    if stored["key"]["model"] != files.metadata["settings"]["model"]:
        reason = "it is of another model than the pool"
        raise UsageError(f"online evaluation in {path}", reason, EVALUATE)
    results = [Result.from_dict(x) for x in stored["results"]]
    return Decoded(results, stored["grades"], stored["seconds"])


def _compared(
    title: str,
    decode: DecodeConfig,
    tries: Sequence[Decoded],
    pool: ReplayPool,
    samples: _Samples,
    alphas: tuple[float, ...],
) -> Compared:
    """One setting, online in some tries and replayed on the first samples of the pool."""
    [found] = replay(pool, decode, np.arange(decode.n)[None], traces=True)
    # As in the pool, the tries of a problem follow each other.
    results = [result for of_problem in zip(*(x.results for x in tries), strict=True)
               for result in of_problem]  # fmt: skip
    if len(results) != pool.n_prompts:
        raise UsageError(
            f"online evaluation of {title}",
            f"it has {len(results)} decodes, and the pool is of {pool.n_prompts}",
            EVALUATE,
        )
    kinds = [agreement(x, found, p, samples.rows[p], decode.n) for p, x in enumerate(results)]
    run = joined_runs([online_run(title, decode, x) for x in tries])
    costs = [float(run.cost(pool.mean_length, a).gen_cost.mean()) for a in alphas]
    setting = ReplayedSetting(title, "", math.nan, decode)
    point = replayed_point(setting, found, pool, True, alphas)
    return Compared(
        title,
        len(results),
        kinds.count("same"),
        kinds.count("tie"),
        (float(run.correct(str(decode.answer)).mean()), *costs),
        (float(point.accuracy.mean()), *(float(cost.mean()) for cost in point.costs)),
    )


def agreement(
    result: Result, found: Replayed, p: int, sample: Sequence[tuple[tuple[int, ...], str]], n: int
) -> str:
    """How a replay agrees with an online decode: "same", "tie" or "different"."""
    assert found.traces is not None
    ids = [prefix.token_ids for prefix in result.prefixes]
    # The samples are the same as far as each goes.
    if len(ids) != n or any(x != sample[k][0][: len(x)] for k, x in enumerate(ids)):
        return "different"
    names = ("step", "tokens", "finished", "multiplicity", "planned_pause_bin")
    for mine, other in zip(found.traces[p][0], result.trace, strict=False):
        if differing := [x for x in names if getattr(mine, x) != getattr(other, x)]:
            chosen = set(differing) <= {"multiplicity", "planned_pause_bin"}
            return "tie" if chosen and abs(mine.utility - other.utility) <= TIE else "different"

    def text(number: int) -> str:
        return sample[number][1] if number >= 0 else ""

    same = (
        len(result.trace) == len(found.traces[p][0])
        and all(len(x) == found.lengths[p, 0, k] for k, x in enumerate(ids))
        and result.usage.tokens == found.tokens[p, 0]
        and result.usage.serial_steps == found.serial_steps[p, 0]
        and result.value_text == text(int(found.by_value[p, 0]))
        and result.vote_text == text(int(found.by_vote[p, 0]))
    )
    return "same" if same else "different"


def _baselines(
    cells: Sequence[Cell], rows: Sequence[ReplayRow], alphas: tuple[float, ...], name: str
) -> list[Compared]:
    """The baselines of the online table, each at the settings that stand there."""
    replayed = {row.name: row for row in rows}
    found: dict[str, dict[float, Cell]] = {}
    for cell in cells:
        if cell.benchmark == name and cell.setting in replayed:
            found.setdefault(cell.setting, {})[cell.alpha] = cell
    compared = []
    for setting, at in found.items():
        row, first = replayed[setting], next(iter(at.values()))
        costs = tuple(at[a].cost if a in at else math.nan for a in alphas)
        online = (first.accuracy, *costs)
        compared.append(
            Compared(setting, 0, 0, 0, online, (row.accuracy, *row.costs[: len(alphas)]))
        )
    return compared


def online_table(found: AgainstOnline, title: str) -> Table:
    """All comparisons, as the console shows them."""
    cells = []
    for row in found.rows:
        pairs = [
            (show(online), show(replayed))
            for show, online, replayed in zip(
                (percent, *(number for _ in found.alphas)), row.online, row.replayed, strict=True
            )
        ]
        ties = f", {row.ties} {'tie' if row.ties == 1 else 'ties'}" if row.ties else ""
        same = f"{row.same} of {row.decodes}{ties}" if row.decodes else "-"
        cells.append((row.name, same, *(x for pair in pairs for x in pair)))
    costs = [
        f"{kind}GenCost, alpha {alpha:g}" for alpha in found.alphas for kind in ("online ", "")
    ]
    return Table(
        title,
        ("setting", "same decodes", "online accuracy", "replayed", *costs),
        tuple(cells),
        "Same decodes: those with the same tokens of every sample, the same decisions, cost and "
        "answers. Ties differ first where two decisions are equally good (1e-6), so that the last "
        "bits of a joint decide. Baselines decode nothing of their own. They have the settings of "
        "the online table, and the GenCost at its alpha.",
    )
