"""`zip-rc predict`: what the head says after every token of a text."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_model
from zip_rc_jax.config import LabelConfig

DESCRIPTION = """\
After every token, the head predicts P(correct) and how many tokens are still to come.

Texts come from --prompt (repeatable), each with its --response if there is one, or from a JSONL
file: `question`, `problem` or `prompt` (a text or a chat), and optionally `response`, `output` or
`completion` (a text or token ids). The results.jsonl of `zip-rc decode` is read too: each line is
then its answer, and lines without an answer are left out.

On a terminal the text is shown on colors from red (0) to green (1), with the tokens still to come
underneath. Elsewhere, and with NO_COLOR set, it is a table. With --output, --html or --svg nothing
is printed, and the files are complete or absent. With a response, the tokens of the prompt before
its last one have no color: the head was not trained there.

example: zip-rc predict embedded:chain_sum_zip --svg answer.svg
         --prompt 'State the final answer to the following arithmetic problem: 4 + 3 - 2 ='
         --response '4 + 3 = 7 ; 7 - 2 = 5 ; Answer: 5'
example: zip-rc decode MODEL --input questions.jsonl --output out n=4 &&
         zip-rc predict MODEL --input out/results.jsonl --html out/predict.html
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict",
        help="what the head says after every token of a text",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="a text; give the option again for more")
    add("--response", action="append", default=[], help="what follows the prompt of the same place")
    add("--input", type=pathlib.Path, help="JSONL file of prompts, or of `zip-rc decode`")
    add("--chat", action="store_true", help="each prompt is a user turn for the model's template")
    add(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the template, e.g. enable_thinking=false",
    )
    add("--output", type=pathlib.Path, metavar="FILE.jsonl", help="one line of numbers a text")
    add("--joints", action="store_true", help="write every token's whole joint to --output, too")
    add("--html", type=pathlib.Path, metavar="FILE.html", help="one page with all texts, in color")
    add("--svg", type=pathlib.Path, metavar="FILE.svg", help="a picture of one text")
    add(
        "--batch-tokens",
        type=int,
        default=LabelConfig().batch_tokens,
        help="most tokens that go through the model at once (default %(default)s)",
    )
    add("--mesh", default="", metavar="AXES", help="several devices, e.g. data=4 (default one)")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the parameters (default float32)",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Texts in, predictions out. Raises UsageError; see `predict_output.run_predict`."""
    from zip_rc_jax.cli.predict_output import run_predict

    run_predict(arguments)
