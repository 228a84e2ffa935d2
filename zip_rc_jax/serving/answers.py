"""From results to what clients read: choices, usage, and the account of the search."""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from zip_rc_jax.config import to_dict
from zip_rc_jax.evaluation.cost import gen_cost
from zip_rc_jax.explorer.record import explanation_record, introspection
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.introspection import explain_decisions, texts_of
from zip_rc_jax.inference.outputs import Decision, Prefix, Result
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.serving.errors import ApiError
from zip_rc_jax.serving.translation import Plan

FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "token_budget": "length",
    "time_budget": "length",
    "abstain": "stop",
}


def plain_numbers(value: Any) -> Any:
    """A copy with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_length(prefixes: Sequence[Prefix]) -> float | None:
    """Mean length of the prompt's samples: tokens so far and those still expected. It is the `N` of
    the utility, at the end. None if nothing was generated.
    """
    begun = [p for p in prefixes if p.token_ids]
    lengths = [len(p.token_ids) + p.expected_remaining for p in begun]
    return math.fsum(lengths) / len(lengths) if lengths else None


def gen_cost_of(result: Result, alpha: float) -> float | None:
    """The cost of an answer, where one expected sample of the prompt costs 1."""
    mean = mean_length(result.prefixes)
    if mean is None or not math.isfinite(mean):
        return None
    usage = result.usage
    return float(gen_cost(usage.tokens / mean, usage.serial_steps / mean, alpha))


def progress(decision: Decision) -> dict[str, Any]:
    """What the head says at a decision: of the most promising prefix, and of how many go on."""
    rows = list(
        zip(
            decision.prefix_ids,
            decision.multiplicity,
            decision.finished,
            decision.expected_reward,
            decision.expected_remaining,
            strict=True,
        )
    )
    best = max(rows, key=lambda row: row[3])
    return {
        "p_correct": best[3],
        "remaining_tokens": best[4],
        "live": sum(copies for _, copies, finished, *_ in rows if not finished),
        "paused": sum(
            number >= 0 and not copies and not finished for number, copies, finished, *_ in rows
        ),
    }


def account(result: Result, plan: Plan, index: int, grid: Grid) -> dict[str, Any]:
    """The whole account of one choice; `grid` is the head's."""
    job = plan.jobs[index]
    kept = {
        "p_correct": result.expected_reward,
        "remaining_tokens": result.expected_remaining,
        "live": 0,
        "paused": sum(p.state == "paused" for p in result.prefixes),
        "finished": sum(p.state == "finished" for p in result.prefixes),
        "finish_reason": result.finish_reason,
        "gen_cost": gen_cost_of(result, job.config.alpha),
        "tokens": result.usage.tokens,
        "steps": result.usage.serial_steps,
        "decisions": len(result.trace),
        "seconds": result.usage.seconds,
        "seed": plan.seeds[index],
        "n": job.config.n,
        "alpha": job.config.alpha,
        "beta": job.config.beta,
        "strategy": job.config.strategy if isinstance(job.config.strategy, str) else "custom",
    }
    if plan.return_tree:
        tree = kept["tree"] = result.to_dict()
        if plan.introspect:
            explained = explain_decisions(
                result.trace, texts_of(result), job.config, grid, plan.slots
            )
            nothing = [None] * len(result.prefixes)
            told = introspection(result, nothing, explained, job.config, grid.to_dict())
            tree["introspection"] = told
    return plain_numbers(kept)


def weighed(
    decision: Decision,
    texts: Mapping[int, str],
    new_text: Mapping[int, str],
    plan: Plan,
    index: int,
    grid: Grid,
) -> dict[str, Any]:
    """A decision of one choice, with the utility of every action that was weighed.

    Args:
      texts: of every prefix so far.
      new_text: what each has gained since the decision before.
    """
    config = plan.jobs[index].config
    ended = {
        number: texts.get(number, "")
        for number, done in zip(decision.prefix_ids, decision.finished, strict=True)
        if done
    }
    (explained,) = explain_decisions([decision], ended, config, grid, plan.slots)
    told = {
        field.name: getattr(decision, field.name)
        for field in dataclasses.fields(decision)
        if field.name != "joints"
    }
    assert decision.joints is not None
    told["joints"] = decision.joints.round(5).astype(float).round(5).tolist()
    said = {
        "decision": told,
        "actions": explanation_record(explained),
        "new_text": {str(number): text for number, text in new_text.items()},
    }
    if not decision.step:
        said |= {"grid": grid.to_dict(), "settings": to_dict(config)}
    return plain_numbers(said)


def refusal(result: Result, config_below: float) -> str | None:
    """Why there is no answer; None if there is one."""
    if result.finish_reason != "abstain":
        return None
    if config_below and result.expected_reward < config_below:
        said = f"{result.expected_reward:.3f} is below abstain_below={config_below:g}"
        return f"No answer: P(correct) {said}."
    return "No answer: no prefix finished."


def check_result(result: Result) -> None:
    """Raises ApiError where the model failed on the prompt."""
    if result.finish_reason == "error":
        raise ApiError(500, f"the model failed: {result.error}", code="model_failed")


def usage(plan: Plan, results: Sequence[Result]) -> dict[str, int]:
    """A prompt counts once, however many choices it has. All generated tokens count, those of
    prefixes that were not chosen too."""
    each = len(results) // plan.prompts
    prompt = sum(result.usage.prompt_tokens for result in results[::each])
    made = sum(result.usage.tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
    }


def header(plan: Plan, streamed: bool) -> dict[str, Any]:
    """What every chunk of one answer begins with."""
    if plan.chat:
        kind, prefix = "chat.completion", "chatcmpl"
        kind += ".chunk" * streamed
    else:
        kind, prefix = "text_completion", "cmpl"
    made = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    return made | {"model": plan.model}


def tokens_of(result: Result) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and log-probabilities of the answer."""
    if result.prefix_id < 0:
        return (), ()
    prefix = result.prefixes[result.prefix_id]
    return prefix.token_ids, prefix.logprobs


def logprobs_of(
    plan: Plan, tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], first: int = 0
) -> dict[str, Any]:
    """The log-probabilities of an answer's tokens from number `first` on, as OpenAI's API has
    them."""
    pieces = tokenizer.pieces(list(ids))
    part = list(zip(pieces, logprobs, strict=True))[first:]
    if plan.chat:
        content = [
            {
                "token": piece,
                "logprob": value,
                "bytes": list(piece.encode("utf-8", "replace")),
                "top_logprobs": [],
            }
            for piece, value in part
        ]
        return {"content": content, "refusal": None}
    place = sum(map(len, pieces[:first]))
    offsets = []
    for piece, _ in part:
        offsets.append(place)
        place += len(piece)
    return {
        "tokens": [piece for piece, _ in part],
        "token_logprobs": [value for _, value in part],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def completion(
    plan: Plan, results: Sequence[Result], tokenizer: Tokenizer, grid: Grid
) -> dict[str, Any]:
    """The whole answer to a request that is not streamed."""
    choices = []
    for index, result in enumerate(results):
        said = refusal(result, plan.jobs[index].config.abstain_below)
        choice: dict[str, Any] = {"index": index}
        if plan.chat:
            content = None if said else result.text
            choice["message"] = {"role": "assistant", "content": content, "refusal": said}
        else:
            choice["text"] = result.text
        choice["logprobs"] = (
            logprobs_of(plan, tokenizer, *tokens_of(result)) if plan.logprobs else None
        )
        choice["finish_reason"] = FINISH_REASONS[result.finish_reason]
        choice["zip_rc"] = account(result, plan, index, grid)
        choices.append(choice)
    return header(plan, False) | {"choices": choices, "usage": usage(plan, results)}
