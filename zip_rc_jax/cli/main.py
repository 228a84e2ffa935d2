"""The command line: one subcommand per stage, and `demo` for all of them."""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import jax
from jax import monitoring

from zip_rc_jax.aot.command import add_compile_parser, run_compile
from zip_rc_jax.cli.commands import run_decode, run_demo, run_evaluation, run_export
from zip_rc_jax.config import LABELS
from zip_rc_jax.config.files import load_config
from zip_rc_jax.models.io.load import embedded
from zip_rc_jax.pipeline import stages as pipeline
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.signals import stops_with_a_word
from zip_rc_jax.runtime.storage import FIXES, fix_for, in_short

CONFIG_HELP = "YAML file with one section per stage, e.g. configs/chain_sum_demo.yaml"
DATA_HELP = (
    "data=PATH takes the rollouts from there instead: a Parquet file in the schema of the ZIP-RC authors' code, a directory of\n"
    "such *.parquet files, or a directory of rollouts that zip-rc wrote."
)
OVERRIDE_HELP = "settings to override, e.g. run_dir=runs/mine decode.beta=0.02 critic.steps=2000; unknown keys are errors"
TOGETHER = ("rollout", "grade", "train", "label")  # the stages that several processes run together


def _pipeline_command(commands: argparse._SubParsersAction, name: str, summary: str, details: str) -> argparse.ArgumentParser:
    epilog = distributed.HELP if name in TOGETHER else None
    parser = commands.add_parser(
        name, help=summary, description=details, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDE_HELP)
    return parser


def _add_format(parser: argparse.ArgumentParser, stage: str) -> None:
    parser.add_argument(
        "--format",
        choices=("tfds", "parquet"),
        default="tfds",
        help=f"parquet: write run_dir/{stage}.parquet too, from run_dir/{stage}, in the schema of the ZIP-RC authors' code",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="checkpoint or training directory of ours, Hugging Face directory or model id, GGUF file, or embedded:NAME",
    )
    parser.add_argument("--zip-label", choices=LABELS, help="for checkpoints of the paper's authors: what the joint was trained on")
    parser.add_argument("--zip-first-id", type=int, metavar="ID", help="and its first reserved id (151669 with Qwen3)")


def build_parser() -> argparse.ArgumentParser:
    """The `zip-rc` parser."""
    parser = argparse.ArgumentParser(
        prog="zip-rc",
        description="ZIP-RC in JAX: train a head in reserved logits, and decode with the adaptive search that reads it.",
        epilog="Stages of a run: rollout -> grade -> train --stage critic -> label -> train --stage lite -> train --stage final "
        "-> evaluate. Each reads and writes run_dir, and the same command resumes it after an interruption.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="the whole path on the embedded policy, in minutes on 2 CPU cores",
        description="Samples rollouts from the embedded chain_sum policy, grades them, trains critic, final model and ZIP-RC-Lite,\n"
        "decodes held-out problems with the adaptive search and all baselines, shows one problem being solved, and writes\n"
        "pareto.png, report.html, results.jsonl, pool.jsonl and metadata.json to run_dir/report.\n\n"
        "example: zip-rc demo run_dir=runs/mine final.steps=1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDE_HELP)
    demo.add_argument("--config", default=None, help=f"default: the embedded demo config. {CONFIG_HELP}")

    rollout = _pipeline_command(
        commands,
        "rollout",
        "sample the policy on the training problems",
        "Samples `rollout.samples` responses to each of `rollout.prompts` training problems from the starting policy.\n"
        "Output: run_dir/rollouts, a TensorFlow Datasets directory in ArrayRecord files. Finished chunks survive Ctrl-C.\n"
        "With --format parquet also run_dir/rollouts.parquet; after the sampling too, which is not repeated for it.\n\n"
        "example: zip-rc rollout configs/chain_sum_demo.yaml rollout.prompts=1000 run_dir=runs/small --format parquet",
    )
    _add_format(rollout, "rollouts")
    grade = _pipeline_command(
        commands,
        "grade",
        "grade the rollouts with the task's own scorer",
        "Reads run_dir/rollouts, writes run_dir/graded with `correct` in {0, 1}. reasoning-gym problems are graded by their own\n"
        "score_answer, free-form mathematics by math-verify in a process that is killed if it hangs. Finished chunks survive Ctrl-C.\n"
        f"{DATA_HELP}\nRollouts without a task are graded against their `answer`, as free-form mathematics.\n\n"
        "example: zip-rc grade configs/chain_sum_demo.yaml\n"
        "example: zip-rc grade configs/chain_sum_demo.yaml run_dir=runs/theirs data=theirs.parquet --format parquet",
    )
    _add_format(grade, "graded")
    train = _pipeline_command(
        commands,
        "train",
        "train the policy, the critic, the final model or ZIP-RC-Lite",
        "Stages:\n"
        "  policy  next-token training of a demo policy on worked chain sums, from scratch or from policy.start\n"
        "  critic  the joint on `correct`, no KL (reads run_dir/graded)\n"
        "  final   the joint on `value`, with KL to the starting policy (reads run_dir/labelled)\n"
        "  lite    only the reserved rows, so every next-token logit stays bit-identical (reads run_dir/labelled)\n"
        "Output: run_dir/STAGE with model/, checkpoints/, metrics.jsonl, tensorboard/, heatmaps/, settings.json, environment.json.\n"
        "It runs on all devices there are: `mesh.data`, `mesh.fsdp`, `mesh.tensor` say how, and any of them gives the same model.\n"
        "Watch eval/within_prompt_auc: at 0.5 the head cannot select.\n"
        f"{DATA_HELP}\n\n"
        "example: zip-rc train configs/chain_sum_demo.yaml --stage critic critic.steps=1000\n"
        "example: zip-rc train configs/chain_sum_demo.yaml --stage critic run_dir=runs/theirs data=theirs_graded.parquet",
    )
    train.add_argument("--stage", required=True, choices=("policy", "critic", "final", "lite"), help="what to train")
    label = _pipeline_command(
        commands,
        "label",
        "label the rollouts with the critic's value",
        "value = mean expected reward of the critic over the last `label.last` labelled positions.\n"
        "Reads run_dir/graded and run_dir/critic, writes run_dir/labelled. Finished chunks survive Ctrl-C.\n"
        f"{DATA_HELP}\n\n"
        "example: zip-rc label configs/chain_sum_demo.yaml\n"
        "example: zip-rc label configs/chain_sum_demo.yaml run_dir=runs/theirs data=theirs_graded.parquet --format parquet",
    )
    _add_format(label, "labelled")

    decode = commands.add_parser(
        "decode",
        help="answer prompts with the adaptive search",
        description="Prompts come from --prompt (repeatable) or from a JSONL file with `question` or `problem` (and `answer`, to grade).\n"
        "Without --output the answers are printed; with it, results.jsonl and metadata.json are written there, and after an\n"
        "interruption the same command decodes only what is missing.\n\n"
        "example: zip-rc decode runs/demo/final --prompt 'State the final answer to the following arithmetic problem: 4 + 3 - 2 ='\n"
        "         --stream n=8 interval=8 window=4 max_tokens=128 beta=0.05",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(decode)
    decode.add_argument("overrides", nargs="*", metavar="option=value", help="fields of DecodeConfig, e.g. n=8 alpha=0.1 beta=0.02")
    decode.add_argument("--prompt", action="append", default=[], help="a prompt; give the option again for more")
    decode.add_argument("--input", type=pathlib.Path, help="JSONL file with `question` or `problem`, and optionally `answer`")
    decode.add_argument("--chat", action="store_true", help="each prompt is a user turn for the model's own chat template")
    decode.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the template, e.g. enable_thinking=false",
    )
    decode.add_argument("--output", type=pathlib.Path, help="directory for results.jsonl and metadata.json")
    decode.add_argument(
        "--mesh", default="", metavar="AXES", help="several devices: rows over data, heads over tensor, e.g. data=4,tensor=2 (default one)"
    )
    decode.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of parameters and cache (default float32)")
    decode.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    decode.add_argument("--stream", action="store_true", help="show every decision as it is made")

    export = commands.add_parser(
        "export",
        help="write a Hugging Face directory that other engines load",
        description="Folds the reserved rows into the unembedding (a tied model becomes untied, and the command says so), and writes\n"
        "config.json with a zip_rc block, safetensors shards and the tokenizer. `zip-rc decode OUTPUT` and transformers load it.\n\n"
        "example: zip-rc export runs/smollm2/final exported/smollm2-zip --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(export)
    export.add_argument("output", type=pathlib.Path, help="directory to write; it must not exist")
    export.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"), help="of the tensors (default bfloat16)")

    _pipeline_command(
        commands,
        "evaluate",
        "compare the search with its baselines on held-out problems",
        "Decodes `evaluate.prompts` held-out problems online with every setting of the sweep and with the baselines,\n"
        "under one cost meter, on all accelerators of the host.\n"
        "Output: run_dir/report with report.html, pareto.png, results.jsonl, pool.jsonl, metadata.json.\n"
        "Finished settings survive Ctrl-C.\n\n"
        "example: zip-rc evaluate configs/chain_sum.yaml evaluate.prompts=800",
    )
    add_compile_parser(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. Overrides may stand anywhere, also after options (argparse alone would refuse that)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    wrong = [item for item in rest if item.startswith("-") or "=" not in item]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = getattr(arguments, "overrides", []) + rest
    return arguments


def _run_pipeline(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    name = arguments.command
    path = arguments.config if arguments.config is not None else embedded("chain_sum_demo.yaml")
    config = load_config(path, arguments.overrides)
    stages: dict[str, Callable[[], object]] = {
        "demo": lambda: run_demo(config, argv),
        "rollout": lambda: pipeline.make_rollouts(config),
        "grade": lambda: pipeline.make_grades(config),
        "train": lambda: pipeline.train_head(config, arguments.stage),
        "label": lambda: pipeline.make_labels(config),
        "evaluate": lambda: run_evaluation(config, argv),
    }
    made = stages[name]()
    if getattr(arguments, "format", "tfds") == "parquet":
        if distributed.is_chief():
            assert isinstance(made, pathlib.Path)  # the stages with a --format return their dataset
            pipeline.export_parquet(config, made)
        distributed.barrier()  # a process that ends waits for the others for a minute, and then ends them


def main(argv: Sequence[str] | None = None) -> int:
    """What `zip-rc` does (see `__main__`). Returns the exit status: 0, 2 for bad input, 130 after an interruption.

    `zip-rc compile` returns 1 if a program does not fit or computes too much.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    with stops_with_a_word():
        return _run(arguments, argv)


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs a command. Returns the exit status."""
    _quiet()
    started, compiling = time.monotonic(), _count_compiling()
    try:
        if arguments.command == "compile":  # for topologies that are not here
            return run_compile(arguments)
        distributed.start(together=arguments.command in TOGETHER)
        if arguments.command == "decode":
            run_decode(arguments, argv)
        elif arguments.command == "export":
            run_export(arguments)
        else:
            _run_pipeline(arguments, argv)
    except UsageError as error:
        return _end(2, f"zip-rc {arguments.command}: {error}")
    except KeyboardInterrupt as stop:
        kept = arguments.output if arguments.command == "decode" else arguments.command not in ("export", "compile")
        again = "resumes" if kept else "starts anew"
        return _end(130, f"zip-rc {arguments.command}: {str(stop) or 'interrupted'}. The same command {again}.")
    except OSError as error:
        if error.errno not in FIXES:
            raise
        return _end(2, f"zip-rc {arguments.command}: {in_short(error)}. Fix: {fix_for(error)}.")
    except jax.errors.JaxRuntimeError as error:
        if not distributed.several():
            raise
        gone = f"process {jax.process_index()} of {jax.process_count()} lost the others, or one of them: {str(error).splitlines()[0]}"
        return _end(130, f"zip-rc {arguments.command}: {gone}. The same command, in all of them, resumes.")
    if distributed.is_chief():
        seconds = time.monotonic() - started
        print(f"zip-rc {arguments.command}: done in {seconds:.0f} s, {sum(compiling):.0f} s of it compiling", file=sys.stderr)
    return 0


def _end(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    if distributed.several():
        distributed.end(status)
    return status


def _count_compiling() -> list[float]:
    """A list that JAX's compilations (or reading one that was kept) will add their seconds to, for the rest of the process."""
    found: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    monitoring.register_event_duration_secs_listener(note)
    return found


def _quiet() -> None:
    """Compiled programs are kept between calls, and libraries only speak when something is wrong.

    Orbax, TensorStore's user, reports a loss as a warning (through absl), so warnings are let through.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "zip_rc_jax" / "xla"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Old names of settings, which Python would not speak of.
    warnings.filterwarnings("default", message=".* was renamed to ", category=DeprecationWarning)
    for name, level in (("absl", logging.WARNING), ("orbax", logging.WARNING), ("grain", logging.WARNING), ("jax", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
