"""`zip-rc explore`: results or a report in, one page out."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.evaluation.explored import ExploredSearch

RESULTS, POOL = "results.jsonl", "pool.jsonl"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "explore",
        help="write the page that shows why a search decided as it did",
        description="Reads what `zip-rc evaluate`, or a decode with --output, wrote, and writes "
        "one page of HTML.\n"
        "It holds its data, loads nothing, and works from a file.\n\n"
        "A decode shows every search: the tree over steps, every decision, and the texts. Decode "
        "with --introspect to see\nthe utility of every action that was weighed, and what the head "
        "says after every token.\n"
        "A report shows accuracy against cost, calibration, and a table of problems. Several "
        "decodes of the same problems\nare compared side by side.\n\n"
        "example: zip-rc decode MODEL --input questions.jsonl --output answers --introspect n=8\n"
        "example: zip-rc explore answers\n"
        "example: zip-rc explore answers other_answers --output both.html\n"
        "example: zip-rc explore runs/demo/report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=pathlib.Path,
        metavar="RESULTS|REPORT",
        help="results.jsonl or its directory; or the directory of a report, with pool.jsonl",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FILE.html",
        help="where the page goes (default explore.html beside the first path)",
    )
    parser.add_argument("--title", default="", help="of the page")
    parser.add_argument(
        "--most-bytes",
        type=int,
        default=10_000_000,
        metavar="N",
        help="of the page: what the head says after every token is left out of the last searches "
        "until it fits (default 10,000,000)",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Writes the page.

    Raises:
      UsageError: a path that holds neither results nor a report, both kinds together, or a page
        that cannot be written.
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.evaluation.explored import report_page
    from zip_rc_jax.explorer.page import page_text
    from zip_rc_jax.explorer.searches import read_results, results_page
    from zip_rc_jax.runtime.storage import write_text

    if arguments.most_bytes < 1:
        reason = "a page has at least one byte"
        raise UsageError(f"--most-bytes {arguments.most_bytes}", reason, "use a positive number")
    paths = [_resolved(path) for path in arguments.paths]
    output = arguments.output or paths[0].parent / "explore.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {output}", "a page is HTML", "name a file FILE.html")
    reports = [path for path in paths if (path.parent / POOL).exists()]
    if reports and len(paths) > 1:
        raise UsageError(
            f"{len(paths)} paths with the report {reports[0].parent}",
            "a report has all its runs on one page",
            "give the report alone, or decodes alone",
        )
    if reports:
        directory = reports[0].parent
        data = report_page(directory, arguments.title, lambda names: _searches(directory, names))
    else:
        files = [read_results(path, name) for path, name in zip(paths, _names(paths), strict=True)]
        title = arguments.title or f"ZIP-RC: {', '.join(file.name for file in files)}"
        data = results_page(title, files, arguments.most_bytes)
        for note in data["notes"]:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        if not any(row.get("introspection") for file in files for row in file.rows):
            said = "no introspection in there, so decisions have no numbers of other actions: "
            console.print(f"{said}decode with --introspect", markup=False, highlight=False)
    write_text(output, page_text(data))
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def _resolved(path: pathlib.Path) -> pathlib.Path:
    """The results that a path means. Raises UsageError for none."""
    if path.is_dir():
        if (path / RESULTS).exists():
            return path / RESULTS
        partial = path / "results.partial.jsonl"
        reason = f"there is no {RESULTS}"
        fix = "name the directory of `zip-rc decode --output` or the report of `zip-rc evaluate`"
        parts = sorted(pool.parent.name for pool in path.glob(f"*/{POOL}"))
        if parts:
            reason = "it is the report of several benchmarks"
            fix = f"name the directory of one: {', '.join(parts)}"
        if partial.exists():
            reason, fix = "its decode is not finished", "run the same zip-rc decode again"
        raise UsageError(f"directory {path}", reason, fix)
    if not path.exists():
        raise UsageError(f"path {path}", "there is nothing", f"name a {RESULTS} or its directory")
    return path


def _searches(directory: pathlib.Path, names: Sequence[str]) -> list[ExploredSearch]:
    """The results of runs, from what an evaluation keeps to be resumed; none where that is gone."""
    from zip_rc_jax.evaluation.explored import ExploredSearch
    from zip_rc_jax.inference.outputs import Result
    from zip_rc_jax.pipeline.evaluation.runner import read_stored, stored_path

    found = list[ExploredSearch]()
    tries = 1 + sum(1 for _ in (directory / ".partial").glob("try_*"))
    for name in names:
        stored = read_stored(stored_path(directory / ".partial", name))
        results = [Result.from_dict(row) for row in stored.get("results", [])]
        found += [ExploredSearch(name, i * tries, one) for i, one in enumerate(results)]
    return found


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Of every file a name that no other one has."""
    short = [p.parent.name if p.name == RESULTS and p.parent.name else p.stem for p in paths]
    return [
        name if short.count(name) == 1 else str(path)
        for name, path in zip(short, paths, strict=True)
    ]
