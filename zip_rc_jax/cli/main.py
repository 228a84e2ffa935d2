"""The command line: builds the parser, runs the command, and says how it ended."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import cast

from zip_rc_jax.cli.common import Command
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import check_extra
from zip_rc_jax.runtime.signals import stops_with_a_word
from zip_rc_jax.runtime.storage import FIXES, fix_for, in_short

# In the order of `--help`; `zip-rc NAME` is the module NAME of this folder, see `common.Command`.
COMMANDS = (
    "demo",
    "problems",
    "rollout",
    "grade",
    "train",
    "label",
    "decode",
    "serve",
    "predict",
    "export",
    "evaluate",
    "replay",
    "calibrate",
    "explore",
    "status",
    "compile",
)
# What must be installed before a command does any work; `decode`, `export` and `compile` need the
# base alone.
EXTRAS_OF_COMMANDS = {
    **dict.fromkeys(("demo", "rollout", "grade", "train", "label", "replay", "calibrate"), "train"),
    "evaluate": "eval",
    "serve": "serve",
}
# The others resume, if they write anything.
STARTS_ANEW = ("problems", "serve", "predict", "explore", "export", "status", "compile")


def _command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"zip_rc_jax.cli.{name}"))


def build_parser() -> argparse.ArgumentParser:
    """The `zip-rc` parser."""
    parser = argparse.ArgumentParser(
        prog="zip-rc",
        description="ZIP-RC in JAX: train a head in reserved logits, and decode with the adaptive "
        "search that reads it.",
        epilog="Stages of a run: rollout -> grade -> train --stage critic -> label -> train "
        "--stage lite -> train --stage final "
        "-> evaluate. Each reads and writes run_dir, and the same command resumes it after an "
        "interruption.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    for name in COMMANDS:
        _command(name).add_parser(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. Overrides may stand anywhere, also after options (argparse alone would
    refuse that).
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    wrong = [item for item in rest if item.startswith("-") or "=" not in item]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = getattr(arguments, "overrides", []) + rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """What `zip-rc` does (see `__main__`). Returns the exit status: 0, 2 for bad input, 130 after
    an interruption.

    `zip-rc compile` returns 1 if a program does not fit or computes too much.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    with stops_with_a_word():
        return _run(arguments, argv)


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs a command. Returns the exit status."""
    if extra := EXTRAS_OF_COMMANDS.get(arguments.command):
        try:
            check_extra(extra, f"zip-rc {arguments.command}")
        except UsageError as error:
            print(f"zip-rc {arguments.command}: {error}", file=sys.stderr)
            return 2
    import jax  # only now: `--help`, wrong arguments and missing extras are answered at once

    from zip_rc_jax.runtime import distributed

    _quiet()
    started, compiling = time.monotonic(), _count_compiling()
    try:
        # compile is for topologies which are not here, and status for work of others
        if getattr(arguments, "fleet", None):  # the accelerators are for the worker of this machine
            jax.config.update("jax_platforms", "cpu")
        elif arguments.command not in ("compile", "status"):
            distributed.start(together=getattr(arguments, "together", False))
        status = _command(arguments.command).run(arguments, argv)
        if status is not None:
            return status
    except UsageError as error:
        return _end(2, f"zip-rc {arguments.command}: {error}")
    except KeyboardInterrupt as stop:
        again = "resumes" if _resumes(arguments) else "starts over"
        return _end(
            130,
            f"zip-rc {arguments.command}: {str(stop) or 'interrupted'}. The same command {again}.",
        )
    except OSError as error:
        if error.errno not in FIXES:
            raise
        return _end(2, f"zip-rc {arguments.command}: {in_short(error)}. Fix: {fix_for(error)}.")
    except jax.errors.JaxRuntimeError as error:
        if not distributed.is_multiprocess():
            raise
        gone = (
            f"process {jax.process_index()} of {jax.process_count()} lost the others, or one "
            f"of them: {str(error).splitlines()[0]}"
        )
        return _end(
            130, f"zip-rc {arguments.command}: {gone}. The same command, in all of them, resumes."
        )
    if distributed.is_primary() and arguments.command != "status":
        seconds = time.monotonic() - started
        print(
            f"zip-rc {arguments.command}: done in {seconds:.0f} s, {sum(compiling):.0f} s of it "
            "compiling",
            file=sys.stderr,
        )
    return 0


def _resumes(arguments: argparse.Namespace) -> bool:
    """Whether the same command goes on where it was interrupted: what has an `--output` does if it
    is given.
    """
    if arguments.command == "calibrate":
        return bool(arguments.pool)  # finished files of samples are kept
    return arguments.command not in STARTS_ANEW and bool(getattr(arguments, "output", True))


def _end(status: int, message: str) -> int:
    from zip_rc_jax.runtime import distributed
    from zip_rc_jax.runtime.working_copy import with_addresses

    print(with_addresses(message), file=sys.stderr)
    if distributed.is_multiprocess():
        distributed.end(status)
    return status


def _count_compiling() -> list[float]:
    """A list that JAX's compilations (or reading one that was kept) will add their seconds to, for
    the rest of the process.
    """
    from jax import monitoring

    seconds: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    monitoring.register_event_duration_secs_listener(note)
    return seconds


def _quiet() -> None:
    """Compiled programs are kept between calls, and libraries only speak when something is wrong.

    Orbax, TensorStore's user, reports a loss as a warning (through absl), so warnings are let
    through.
    """
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "zip_rc_jax" / "xla")
        )
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Old names of settings, which Python would not speak of.
    warnings.filterwarnings("default", message=".* was renamed to ", category=DeprecationWarning)
    for name, level in (
        ("absl", logging.WARNING),
        ("orbax", logging.WARNING),
        ("grain", logging.WARNING),
        ("jax", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)
