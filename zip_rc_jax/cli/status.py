"""`zip-rc status`: what is done in a run directory, what runs, and what failed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status",
        help="say what is done in a run directory, what runs, and what failed",
        description="A line for each stage of a run:\n"
        "  done     its result is there\n"
        "  running  with the count, the rate, and until when at that rate; and each process\n"
        "  failed   with the error\n"
        "  stopped  something is kept, and nobody is at work; the same command resumes it\n"
        "  absent   nothing of it is there\n"
        "RUN_DIR may lie in a bucket. It is only read. Every command writes what it is doing to\n"
        "RUN_DIR/.progress, one JSON file for each process, which a dashboard can read too.",
        epilog="example: zip-rc status runs/mine\n"
        "example: zip-rc status gs://BUCKET/run --watch 30\n"
        "example: zip-rc status runs/mine --json | jq '.stages[] | select(.state == \"running\")'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a directory, or gs://BUCKET/run")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object; with --watch one a line"
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="again and again, every 10 seconds or as many as you say, until Ctrl-C",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    import json

    from zip_rc_jax.pipeline.status import lines, run_status
    from zip_rc_jax.runtime.errors import UsageError
    from zip_rc_jax.runtime.storage import plain

    every = arguments.watch
    if every is not None and not every >= 1:
        raise UsageError(f"--watch {every}", "it counts seconds", "use 1 or more")
    while True:
        found = run_status(arguments.run_dir)
        if arguments.json:
            print(json.dumps(plain(found), indent=None if every else 2), flush=True)
        else:
            clear = "\x1b[H\x1b[J" if every and sys.stdout.isatty() else ""
            print(clear + "\n".join(lines(found)), flush=True)
        if not every:
            return
        time.sleep(every)
