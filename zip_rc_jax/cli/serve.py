"""`zip-rc serve`: a model behind HTTP, for any client of OpenAI's API."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zip_rc_jax.cli.common import add_model, zip_options
from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.models.language_model import LanguageModel

KEY = "ZIP_RC_API_KEY"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer requests over HTTP, as OpenAI's API does",
        description="Serves /v1/chat/completions, /v1/completions and /v1/models, and /health and "
        "/metrics for operators.\n"
        "One engine answers all requests in one batch. Every answer, and every chunk of a stream, "
        "says how likely it is right\nand how long it still takes. A request says what it may "
        "spend: zip_rc: {n, alpha, beta, strategy, token_budget, ...}.\n"
        "Options are those of `zip-rc decode`: n and max_tokens are the most that a request may "
        "ask for.\n"
        "SIGTERM or Ctrl-C answers what runs, refuses what is new, and then ends; a second one "
        "ends at once.\n\n"
        "example: zip-rc serve runs/demo/final --port 8000 n=8 beta=0.02 max_num_seqs=64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="option=value",
        help="fields of DecodeConfig, e.g. n=8 beta=0.02: what requests start from",
    )
    parser.add_argument(
        "--name", default="", help="of the model, for clients (default: the last part of MODEL)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default here)")
    parser.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one and prints it (default 8000)"
    )
    parser.add_argument(
        "--api-key",
        default="",
        metavar="KEY",
        help=f"that clients must send (better: the variable {KEY}, which no list of processes "
        "shows)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        metavar="TOKENS",
        help="of a prompt and its longest answer together (default max_tokens + 1024, at most "
        "the positions of the model)",
    )
    parser.add_argument(
        "--max-queue", type=int, default=256, help="requests that may wait for slots (default 256)"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=300.0,
        help="that a request may wait for slots, and then search (default 300)",
    )
    parser.add_argument(
        "--max-body-bytes", type=int, default=4 * 2**20, help="of a request (default 4 MiB)"
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=60.0,
        help="in which what runs may end after SIGTERM (default 60)",
    )
    parser.add_argument(
        "--chat-template",
        type=pathlib.Path,
        metavar="FILE",
        help="a Jinja template instead of the model's own, e.g. for a model that has none",
    )
    parser.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    parser.add_argument(
        "--mesh", default="", metavar="AXES", help="several devices, e.g. data=4,tensor=2"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of parameters and cache (default float32)",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Serves until a signal ends it.

    Raises:
      UsageError: a model without a head, a bad option, slots that do not fit the device, or an
        address that cannot be listened on.
    """
    import socket

    from zip_rc_jax.cli.console import console
    from zip_rc_jax.config.overrides import from_dotlist
    from zip_rc_jax.inference.api import resolve
    from zip_rc_jax.inference.prepared import check_head
    from zip_rc_jax.models.io.calibrations import (
        calibration_line,
        calibration_summary,
        stored_calibration,
    )
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.runtime import distributed
    from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, mesh_sizes
    from zip_rc_jax.serving.server import ServeConfig, Server

    # What can be checked without a model is checked before one is loaded.
    if distributed.is_multiprocess():
        reason = "one process serves, with all devices that it sees"
        raise UsageError("zip-rc serve in several processes", reason, "start it in one process")
    options = from_dotlist(arguments.overrides, "option", "n=8")
    resolve(None, options)
    names = ("host", "port", "context", "max_queue", "max_seconds", "max_body_bytes")
    serve = ServeConfig(
        name=arguments.name or _name_of(arguments.model),
        api_key=arguments.api_key or os.environ.get(KEY, ""),
        grace_seconds=arguments.grace_seconds,
        log_prompts=arguments.log_prompts,
        **{name: getattr(arguments, name) for name in names},
    )
    template = _read_template(arguments.chat_template)
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    layout = Layout(make_mesh(**mesh_sizes(arguments.mesh, ("data", "tensor"))), DECODE_RULES)
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((serve.host, serve.port))
        except OSError as error:
            value = f"--host {serve.host} --port {serve.port}"
            reason = f"it cannot be listened on ({error.strerror or error})"
            raise UsageError(value, reason, "choose another port, or 0 for a free one") from None
        lm = load(arguments.model, dtype=arguments.dtype, layout=layout, **zip_options(arguments))
        check_head(lm)
        record = stored_calibration(lm, arguments.model, arguments.head)
        if record is not None:
            serve = dataclasses.replace(serve, calibration=calibration_summary(record))
        lm = with_template(lm, template)
        server = Server(lm, resolve(None, options, lm.head, lm.generation_config), serve)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        console.print(f"serving {serve.name} on http://{shown}:{port}/v1", markup=False)
        if record is not None:
            console.print(calibration_line(record), markup=False, highlight=False, soft_wrap=True)
        if not serve.api_key and not host.startswith("127.") and host != "::1":
            console.print("no API key is set: whoever reaches this address may ask", markup=False)
        server.run(sockets=[listener])


def _name_of(model: str) -> str:
    """The last part of a path, a model id or builtin:NAME."""
    return model.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def _read_template(path: pathlib.Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"it cannot be read ({error})"
        raise UsageError(f"--chat-template {path}", reason, "name a Jinja file") from None


def with_template(lm: LanguageModel, template: str | None) -> LanguageModel:
    """The model with another chat template; None leaves its own."""
    from zip_rc_jax.models.io.tokenizer import Tokenizer

    if template is None:
        return lm
    old = lm.tokenizer
    given = old.backend, old.eos_tokens, template, old.special_tokens
    new = Tokenizer(*given, settings=old.settings, rows=old.rows)
    return dataclasses.replace(lm, tokenizer=new)
