"""How a problem becomes a prompt: the question alone, or a chat rendered by the model's own template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from zip_rc_jax.config import PipelineConfig, PromptConfig, TaskConfig
from zip_rc_jax.data.tasks import Problem, problems
from zip_rc_jax.data.worked_solutions import plain_steps
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.tokenizer import Tokenizer


def prompt_texts(found: Sequence[Problem], config: PipelineConfig, tokenizer: Tokenizer) -> list[str]:
    """The prompt of every problem in `found`, in order, as `config.prompt` describes it.

    Raises:
      UsageError: style "chat" with a tokenizer that has no chat template, or whose template refuses the turns or an argument; or the
        task cannot make the worked examples.
    """
    if config.prompt.style == "raw":
        return [p.question for p in found]
    return [tokenizer.chat(turns, **config.prompt.chat_template_kwargs) for turns in conversations(found, config)]


def conversations(found: Sequence[Problem], config: PipelineConfig) -> list[list[dict[str, str]]]:
    """The turns that `config.prompt`, of style "chat", makes of every problem: system, worked examples, question.

    Raises:
      UsageError: the task cannot make the worked examples.
    """
    prompt = config.prompt
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    examples = [
        [turn for p in level for turn in (_user(p, prompt), {"role": "assistant", "content": _answer(p, prompt)})]
        for level in worked_examples(config.task, prompt.examples)
    ]
    return [[*system, *examples[p.level], _user(p, prompt)] for p in found]


def worked_examples(task: TaskConfig, count: int) -> list[list[Problem]]:
    """`count` problems of every level of the task, always the same.

    Their seeds lie past those of both splits. (A level of few distinct questions can still repeat a question of a split.)
    """
    distance = abs(task.heldout_seed - task.train_seed)
    past = max(task.heldout_seed, task.train_seed) + distance  # the later split owns `distance` seeds too
    levels = len(task.levels) or 1
    pool = problems(dataclasses.replace(task, train_seed=past, heldout_seed=past + distance), "train", count * levels)
    return [pool[level::levels] for level in range(levels)]


def _answer(p: Problem, prompt: PromptConfig) -> str:
    text = prompt.example_answer.replace("{answer}", p.answer)
    if "{steps}" not in text:
        return text
    try:
        return text.replace("{steps}", plain_steps(p.question))
    except ValueError as error:
        raise UsageError("prompt.example_answer with {steps}", f"only chain sums have steps ({error})", "leave {steps} out") from None


def _user(p: Problem, prompt: PromptConfig) -> dict[str, str]:
    return {"role": "user", "content": prompt.instruction.replace("{question}", p.question)}
