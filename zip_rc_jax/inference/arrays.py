"""Host records as the arrays that jitted programs take, padded to few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from zip_rc_jax.grading.votes import NO_ANSWER
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.requests import TokenizedRequest, prompt_hash
from zip_rc_jax.inference.running_batch import table_row
from zip_rc_jax.inference.sampler import Sampling
from zip_rc_jax.inference.state import StepInputs
from zip_rc_jax.inference.tree import SearchTree
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.search.inputs import SearchInputs


@dataclasses.dataclass(frozen=True)
class Lane:
    """A sequence to step.

    Attributes:
      number: of the lane, over all shards.
      sequence: it; `tree` has it.
    """

    number: int
    sequence: PagedSequence
    tree: SearchTree

    @property
    def job(self) -> TokenizedRequest:
        return self.tree.job

    @property
    def quota(self) -> int:
        """Generated tokens that it may have at the end of the interval."""
        return self.sequence.table.length + self.sequence.due - len(self.job.ids)


def lanes_of(
    rows: list[Lane],
    stop_ids: Callable[[TokenizedRequest], tuple[int, ...]],
    most_ids: int,
    shape: tuple[int, int],
    pages: int,
    no_slot: int,
) -> StepInputs:
    """The requests of the sequences to step.

    Args:
      rows: not empty.
      stop_ids: of a job, at most `most_ids`.
      shape: shards and lanes of each.
      pages: of a table; 0 where lanes are in the order of their pages.
      no_slot: for lanes that are not stepped.
    """
    jobs = list({lane.job.number: lane.job for lane in rows}.values())
    place = {job.number: i for i, job in enumerate(jobs)}
    lanes = shape[0] * shape[1]
    active, quota, which = (
        np.zeros(lanes, bool),
        np.zeros(lanes, np.int32),
        np.zeros(lanes, np.int32),
    )
    slot, branch = np.full(lanes, no_slot, np.int32), np.zeros(lanes, np.int32)
    table = np.zeros((lanes, pages), np.int32)
    for lane in rows:  # lanes that are not stepped get the first request
        at = lane.number
        active[at], quota[at], which[at] = True, lane.quota, place[lane.job.number]
        slot[at], branch[at] = lane.sequence.slot, lane.sequence.branch
        table[at] = table_row(lane.sequence, pages)

    def per_lane(values: Any, dtype: Any = None) -> np.ndarray:
        chosen = np.asarray(values, dtype)[which]
        return chosen.reshape(*shape, *chosen.shape[1:])

    return StepInputs(
        slot.reshape(shape),
        table.reshape(*shape, pages) if pages else None,
        active.reshape(shape),
        per_lane([job.key for job in jobs], np.uint32),
        per_lane([prompt_hash(job.ids) for job in jobs], np.uint32),
        branch.reshape(shape),
        quota.reshape(shape),
        per_lane([job.config.max_tokens for job in jobs], np.int32),
        per_lane(
            [(*(ids := stop_ids(job)), *[-1] * (most_ids - len(ids))) for job in jobs], np.int32
        ),
        jax.tree.map(per_lane, Sampling.stack([job.config.sampling for job in jobs])),
    )


def search_inputs_of(
    groups: list[SearchTree],
    grid: Grid,
    n: int,
    branching: bool,
    size: int,
    tokenizer: Tokenizer | None = None,
) -> SearchInputs:
    """The prefixes of all groups in `n` slots each, and when branching the root in one more, padded
    to `size` prompts.

    Args:
      tokenizer: reads the answers of finished prefixes; None leaves them out.
    """
    shape = (size, n + branching)
    joint = np.full((*shape, grid.n_cells), 1 / grid.n_cells, np.float32)
    unfinished, exists = np.zeros(shape, bool), np.zeros(shape, bool)
    tokens = np.zeros(shape, np.int32)
    new_prefixes, must_extend = np.zeros(size, np.int32), np.zeros(size, bool)
    alpha, beta = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for p, group in enumerate(groups):
        for slot, branch in enumerate(group.branches):
            joint[p, slot], tokens[p, slot] = branch.joint, len(branch.tokens)
            unfinished[p, slot], exists[p, slot] = not branch.finished, True
        if branching:
            joint[p, n] = group.root_joint
            unfinished[p, n] = exists[p, n] = True
        # else all samples are there from the start
        new_prefixes[p] = group.unborn if branching else 0
        must_extend[p] = not group.job.config.allow_no_answer and not any(
            b.finished for b in group.branches
        )
        alpha[p], beta[p] = group.job.config.alpha, group.job.config.beta
    answer = None
    if tokenizer is not None:
        answer = np.full(shape, NO_ANSWER, np.int32)
        for p, group in enumerate(groups):
            answer[p, : len(group.branches)] = group.answers(tokenizer)
    tables = joint.reshape(*shape, grid.n_reward, grid.n_length)
    return SearchInputs(
        tables,
        unfinished,
        tokens,
        exists,
        new_prefixes,
        alpha,
        beta,
        must_extend,
        answer=answer,
        has_root=branching,
    )
