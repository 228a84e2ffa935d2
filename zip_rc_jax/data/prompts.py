"""How a problem becomes a prompt: the question alone, or a chat rendered by the model's own
template."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import uuid
from collections.abc import Sequence

from zip_rc_jax.config import PipelineConfig, PromptConfig
from zip_rc_jax.config.checks import in_short
from zip_rc_jax.data.problems import Problem, worked_examples
from zip_rc_jax.data.worked_solutions import plain_steps
from zip_rc_jax.models.io.chat import reads_clock, template_time
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import write_json
from zip_rc_jax.runtime.working_copy import publish_first, run_directory


def prompt_texts(
    found: Sequence[Problem], config: PipelineConfig, tokenizer: Tokenizer
) -> list[str]:
    """The prompt of every problem in `found`, in order, as `config.prompt` describes it.

    Raises:
      UsageError: style "chat" with a tokenizer that has no chat template, or whose template refuses
        the turns or an argument; or the task cannot make the worked examples.
    """
    if config.prompt.style == "raw":
        return [p.question for p in found]
    with template_time(prompt_time(config, tokenizer)):
        return [
            tokenizer.chat(turns, **prompt_of(config.prompt, p.question).chat_template_kwargs)
            for p, turns in zip(found, conversations(found, config), strict=True)
        ]


def variant_of(prompt: PromptConfig, question: str) -> int:
    """The number of the variant that a question gets; 0 where there are none.

    It depends on the question and `prompt.seed` alone: the same in every stage and process, and for
    equal questions.
    """
    digest = hashlib.blake2b(
        f"{prompt.seed}\n{question}".encode("utf-8", "surrogatepass"), digest_size=8
    )
    draw, total = int.from_bytes(digest.digest(), "big") / 2**64, 0.0
    for number, share in enumerate(prompt.shares):
        total += share
        if draw < total:
            return number
    return max(0, len(prompt.variants) - 1)


def prompt_of(prompt: PromptConfig, question: str) -> PromptConfig:
    """How the prompt of a question is made: by its variant."""
    return prompt.variant(variant_of(prompt, question))


def prompt_time(config: PipelineConfig, tokenizer: Tokenizer) -> datetime.datetime | None:
    """What a template that writes the date sees in all stages of a run: when the first of them
    rendered a prompt.

    Prompts of one run are the same on every day, after an interruption too. The time lies in
    `run_dir/prompt_time.json`. None: the prompts are no chats, the template does not ask for the
    time, or there is no run directory.

    Raises:
      UsageError: the file is damaged, or cannot be written.
    """
    if (
        config.prompt.style == "raw"
        or not config.run_dir
        or not reads_clock(tokenizer.chat_template)
    ):
        return None
    path = run_directory(config.run_dir) / "prompt_time.json"
    try:
        if not path.exists():
            now = datetime.datetime.now().replace(microsecond=0).isoformat()
            mine = write_json(path.with_name(f".prompt_time.{uuid.uuid4().hex[:8]}"), {"time": now})
            try:
                os.link(mine, path)  # of several processes the first decides
            except FileExistsError:
                pass
            finally:
                mine.unlink()
            publish_first(path)
        return datetime.datetime.fromisoformat(json.loads(path.read_bytes())["time"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}",
            f"it holds no time ({in_short(error)})",
            "delete it if no stage has run, or use another run_dir",
        ) from None
    except OSError as error:
        raise UsageError(
            f"{path}", in_short(error), "use a run_dir that can be written to"
        ) from None


def conversations(found: Sequence[Problem], config: PipelineConfig) -> list[list[dict[str, str]]]:
    """The turns that `config.prompt`, of style "chat", makes of every problem: system, worked
    examples, question.

    Raises:
      UsageError: the task cannot make the worked examples.
    """
    prompt = config.prompt
    examples = worked_examples(config.problems, prompt.examples)

    def turns(p: Problem) -> list[dict[str, str]]:
        own = prompt_of(prompt, p.question)
        system = [{"role": "system", "content": own.system}] if own.system else []
        solved = [
            turn
            for x in examples(p)
            for turn in (_user(x, own), {"role": "assistant", "content": _answer(x, own)})
        ]
        return [*system, *solved, _user(p, own)]

    return [turns(p) for p in found]


def _answer(p: Problem, prompt: PromptConfig) -> str:
    text = prompt.example_answer.replace("{answer}", p.answer)
    if "{steps}" not in text:
        return text
    try:
        return text.replace("{steps}", plain_steps(p.question))
    except ValueError as error:
        raise UsageError(
            "prompt.example_answer with {steps}",
            f"only chain sums have steps ({error})",
            "leave {steps} out",
        ) from None


def _user(p: Problem, prompt: PromptConfig) -> dict[str, str]:
    return {"role": "user", "content": prompt.instruction.replace("{question}", p.question)}
