"""`zip-rc export`: any model that `load` takes, as a Hugging Face directory; or its head alone."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_model, zip_options
from zip_rc_jax.runtime.errors import UsageError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write a Hugging Face directory that other engines load",
        description="Folds the reserved rows into the unembedding (a tied model becomes untied, "
        "and the command says so), and writes\n"
        "config.json with a zip_rc block, safetensors shards and the tokenizer. `zip-rc decode "
        "OUTPUT` and transformers load it.\n\n"
        "example: zip-rc export runs/smollm2/final exported/smollm2-zip --dtype bfloat16\n\n"
        "With --head-only, it writes the reserved rows to a file of some hundred kilobytes. They "
        "belong to exactly the weights\nbeside them: with ZIP-RC-Lite, the policy's own.\n\n"
        "example: zip-rc export runs/qwen2.5_0.5b/lite qwen.safetensors --head-only\n"
        "example: zip-rc decode models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --head "
        "qwen.safetensors --prompt 'What is 17 + 25?'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("output", type=pathlib.Path, help="what to write; it must not exist")
    parser.add_argument(
        "--head-only",
        action="store_true",
        help="write a file with the trained head alone, for `--head` and `load(..., head=...)`",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32", "float16"),
        help="of the tensors (default bfloat16)",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Raises UsageError if the directory exists or cannot be written, or the model cannot be
    read."""
    import jax.numpy as jnp

    from zip_rc_jax.cli.console import console
    from zip_rc_jax.models.io.head_files import save_head
    from zip_rc_jax.models.io.load import export, load
    from zip_rc_jax.runtime.storage import check_writable

    if arguments.output.exists():
        raise UsageError(
            f"{'file' if arguments.head_only else 'directory'} {arguments.output}",
            "it exists and is not overwritten",
            "choose another path",
        )
    if arguments.head_only:
        check_writable(arguments.output.absolute().parent, "directory")
        save_head(load(arguments.model, **zip_options(arguments)), arguments.output)
        console.print(f"wrote the head alone to {arguments.output}.", highlight=False)
        return
    check_writable(arguments.output, "directory")
    lm = load(arguments.model, **zip_options(arguments))
    note = export(lm, arguments.output, dtype=jnp.dtype(arguments.dtype))
    console.print(f"wrote {arguments.output}. {note}", highlight=False)
