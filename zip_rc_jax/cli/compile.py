"""`zip-rc compile`: what a training or decode step would need on a TPU, found out on any
machine."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zip_rc_jax.config import COMPUTE_DTYPES, TRAIN_STAGES, PipelineConfig, PolicyConfig
from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.aot.report import Report

DESCRIPTION = """Compiles the real training step or decoder for a TPU topology, without a TPU
(libtpu does it on any CPU machine), and prints per chip: memory against what the chip has,
operations and HBM bytes against what they should be, and what crosses the network. Exit status 1
if a program leaves less than 10% of the memory free, or a training step spends more than 1.15 times
the operations that are counted by hand: the useful ones and those that are computed again to save
memory.
Needs libtpu, best in an environment of its own: pip install -e '.[tpu]' in a checkout.

"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compile",
        help="what training or decoding needs on a TPU, without one",
        description=DESCRIPTION
        + "example: zip-rc compile train configs/qwen3_1.7b.yaml --stage final --topology v5e:4x4 "
        "--mesh fsdp=16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="what")
    train = kinds.add_parser(
        "train",
        help="the training step",
        description=DESCRIPTION
        + "example: zip-rc compile train configs/qwen3_1.7b.yaml --stage final --topology v5e:4x4 "
        "--mesh fsdp=16 final.row_tokens=2048",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "config",
        help="YAML file; the model is policy.path (or start) if that is on this machine, else the "
        "model section",
    )
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings to override, e.g. final.row_tokens=2048",
    )
    train.add_argument(
        "--stage", default="final", choices=TRAIN_STAGES, help="which training step (default final)"
    )
    _add_target(
        train,
        "v5e:4x4",
        "fsdp=16; default the config's mesh, which is all chips on fsdp if it says nothing",
    )

    decode = kinds.add_parser(
        "decode",
        help="prefill, decode steps, and the copies when prefixes branch",
        description=DESCRIPTION
        + "example: zip-rc compile decode configs/qwen3_1.7b.yaml --topology v5e:2x4 --rows 64 "
        "--context 8192",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decode.add_argument(
        "config",
        metavar="config_or_model",
        help="YAML file as for train, or a model on this machine",
    )
    decode.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings to override, e.g. decode.window=256",
    )
    _add_target(decode, "v5e:2x4", "data=4,tensor=2; default all chips on data")
    decode.add_argument(
        "--rows", type=int, help="sequences of the pool (default decode.max_num_seqs)"
    )
    decode.add_argument(
        "--context", type=int, default=8192, help="tokens per row, prompt and answer (default 8192)"
    )
    decode.add_argument(
        "--prompt", type=int, default=512, help="tokens per prompt in prefill (default 512)"
    )
    decode.add_argument(
        "--lengths",
        default="",
        metavar="N,N,...",
        help="tokens that the rows hold in the step that is counted, such as 500,30000 for half of "
        "the rows each (default the whole context)",
    )
    decode.add_argument(
        "--dtype",
        choices=COMPUTE_DTYPES,
        default="bfloat16",
        help="of parameters and cache (default bfloat16)",
    )


def _add_target(parser: argparse.ArgumentParser, topology: str, mesh: str) -> None:
    parser.add_argument("--topology", required=True, help=f"chips, such as {topology}")
    parser.add_argument(
        "--mesh", default="", help=f"sizes of the mesh axes data, fsdp and tensor, such as {mesh}"
    )


def config_of(arguments: argparse.Namespace) -> PipelineConfig:
    """The config that the arguments name, with the sizes of its model. Raises UsageError if there
    is none.
    """
    from zip_rc_jax.aot.model_sizes import sizes_on_disk, with_model
    from zip_rc_jax.config.files import load_config

    name = arguments.config
    if pathlib.Path(name).suffix in (".yaml", ".yml"):
        return with_model(load_config(name, arguments.overrides), name)
    sizes = sizes_on_disk(name)
    if sizes is None:
        raise UsageError(
            f"config_or_model {name!r}",
            "there is no such file or directory",
            "pass a .yaml file or a model on this machine",
        )
    if arguments.overrides:
        raise UsageError(
            f"overrides {arguments.overrides}",
            "they belong to a config file, and this is a model",
            "leave them out",
        )
    return PipelineConfig(model=sizes, policy=PolicyConfig(path=name))


def compile_from(arguments: argparse.Namespace) -> Report:
    """The report that the parsed arguments ask for. Raises UsageError as `compile_train` and
    `compile_decode` do.
    """
    import jax

    from zip_rc_jax.aot.programs import compile_decode, compile_train

    # with libtpu installed, JAX would look for a TPU here and wait
    jax.config.update("jax_platforms", "cpu")
    config = config_of(arguments)
    if arguments.what == "train":
        return compile_train(config, arguments.stage, arguments.topology, arguments.mesh)
    return compile_decode(
        config,
        arguments.topology,
        arguments.mesh,
        rows=config.decode.max_num_seqs if arguments.rows is None else arguments.rows,
        context=arguments.context,
        dtype=arguments.dtype,
        prompt=arguments.prompt,
        lengths=_lengths(arguments.lengths),
    )


def _lengths(text: str) -> list[int]:
    """The numbers of `--lengths`. Raises UsageError for anything else."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(
            f"--lengths {text!r}", "they are whole numbers of tokens", "use such as 500,30000"
        ) from None


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the report. Returns 0, or 1 if something does not fit with 10% to spare or spends too
    many operations.

    Raises:
      UsageError: as `compile_from`.
    """
    from zip_rc_jax.aot.report import report_table

    report = compile_from(arguments)
    print(report_table(report))
    return 0 if report.good else 1
