"""What decisions were made on, and what they were weighed against, from their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grading.votes import NO_ANSWER, answer_groups
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.outputs import Decision, Result
from zip_rc_jax.inference.tree import ROOT
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.explain import Explanation, explain
from zip_rc_jax.search.inputs import MetaAction, SearchInputs
from zip_rc_jax.search.policies import starts_from_root


def decision_inputs(
    trace: Sequence[Decision],
    texts: Mapping[int, str],
    config: DecodeConfig,
    grid: Grid,
    slots: int | None = None,
) -> SearchInputs:
    """What the search saw at decisions of a prompt, one row for each.

    Args:
      trace: decisions with their joints.
      texts: of finished prefixes, by id. Read with `evidence="answers"` alone.
      config: of the request.
      slots: the engine's `n`, where that of the request is smaller.

    Raises:
      UsageError: a decision has no joints.
    """
    if any(decision.joints is None for decision in trace):
        raise UsageError(
            "decisions without joints",
            "nothing says what they were made on",
            "decode with return_joints=True",
        )
    branching, size = starts_from_root(config), slots or config.n
    shape = (len(trace), size + branching)
    joint = np.full((*shape, grid.n_reward, grid.n_length), 1 / grid.n_cells, np.float32)
    unfinished, exists = np.zeros(shape, bool), np.zeros(shape, bool)
    tokens, new = np.zeros(shape, np.int32), np.zeros(len(trace), np.int32)
    answer = np.full(shape, NO_ANSWER, np.int32)
    must_extend = np.zeros(len(trace), bool)
    for row, decision in enumerate(trace):
        place = slots_of(decision, size)
        joint[row, place], tokens[row, place] = decision.joints, decision.tokens
        unfinished[row, place], exists[row, place] = ~np.array(decision.finished, bool), True
        prefixes = sum(number != ROOT for number in decision.prefix_ids)
        new[row] = config.n - prefixes if branching else 0
        must_extend[row] = not config.allow_no_answer and not any(decision.finished)
        if config.evidence == "answers":
            rows = zip(decision.prefix_ids, decision.finished, strict=True)
            ended = [number for number, done in rows if done]
            answer[row, ended] = answer_groups(
                [texts[number] for number in ended],
                config.answer_extractor,
                config.answer_equivalence,
            )
    return SearchInputs(
        joint,
        unfinished,
        tokens,
        exists,
        new,
        np.full(len(trace), config.alpha, np.float32),
        np.full(len(trace), config.beta, np.float32),
        must_extend,
        answer=answer if config.evidence == "answers" else None,
        has_root=branching,
    )


def slots_of(decision: Decision, n: int) -> list[int]:
    """The slot of every prefix of a decision, the root's behind all others."""
    return [n if number == ROOT else number for number in decision.prefix_ids]


def explain_decisions(
    trace: Sequence[Decision],
    texts: Mapping[int, str],
    config: DecodeConfig,
    grid: Grid,
    slots: int | None = None,
) -> list[Explanation]:
    """What each action of a prompt was weighed against; columns are the prefixes of the decision.

    Arguments and errors as in `decision_inputs`.
    """
    inputs, size = decision_inputs(trace, texts, config, grid, slots), slots or config.n
    taken = np.zeros(inputs.exists.shape, np.int32)
    for row, decision in enumerate(trace):
        taken[row, slots_of(decision, size)] = decision.multiplicity
    action = MetaAction(
        taken,
        np.array([d.planned_pause_bin for d in trace], np.int32),
        np.array([d.utility for d in trace], np.float32),
    )
    engine = dataclasses.replace(config, n=size)
    explained = explain(inputs, action, grid=grid, config=engine)
    return [
        dataclasses.replace(one, multiplicity=one.multiplicity[:, slots_of(decision, size)])
        for one, decision in zip(explained, trace, strict=True)
    ]


def texts_of(result: Result) -> dict[int, str]:
    """The text of every prefix, by id."""
    return {prefix.id: prefix.text for prefix in result.prefixes}
