"""What an interval of decode steps makes of the prefixes. Host code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zip_rc_jax.inference.state import Stepped
from zip_rc_jax.inference.stopping import find_stop
from zip_rc_jax.inference.tree import Branch, SearchTree
from zip_rc_jax.models.io.tokenizer import Tokenizer

JointObserver = Callable[[int, int, np.ndarray], None]
"""Is told of every interval of every prefix: the number of the prompt, the id of the prefix, and
`[T, C]` float32, what the head says after each of the `T` new tokens. The joint after the last
token of a prefix that ends is not read, so what stands there means nothing."""


def take_over(
    group: SearchTree,
    branch: Branch,
    read: Stepped,
    lane: int,
    *,
    tokenizer: Tokenizer,
    window: int,
    stop_ids: tuple[int, ...],
    observer: JointObserver | None,
) -> tuple[int, bool]:
    """What lane `lane` says becomes part of a prefix.

    Args:
      window: joints that are averaged.
      stop_ids: ids that end the prefix.

    Returns:
      tokens that were written, those behind a stop string included; and whether it has ended.
    """
    # New tokens.
    job, before = group.job, len(branch.tokens)
    new = slice(len(job.ids) + before, int(read.length[lane]))
    branch.tokens += tuple(read.tokens[lane, new].tolist())
    branch.logprobs += tuple(read.logprobs[lane, new].tolist())
    branch.joint = read.joint[lane].copy()
    written = len(branch.tokens) - before
    joints = None if read.history is None else np.asarray(read.history[lane, :written])
    if observer is not None:
        assert joints is not None
        observer(job.number, branch.id, joints)
    # A stop string: what was generated behind it is dropped.
    if job.config.stop:
        assert branch.history is not None
        assert joints is not None
        history = branch.history.extended(joints)
        branch.history = history.last(window)
        branch.stop = find_stop(tokenizer.decode, branch.tokens, before, job.config.stop)
        if branch.stop is not None:
            length = branch.stop.length
            group.dropped += len(branch.tokens) - length
            branch.tokens, branch.logprobs = branch.tokens[:length], branch.logprobs[:length]
            branch.joint = history.mean_of_finished(length, window)
            branch.finished = branch.stopped = True
            return written, True
    # The end of the sequence, or a model that failed.
    if not read.done[lane]:
        return written, False
    branch.failed = bool(read.fault[lane])
    branch.finished = not branch.failed
    branch.stopped = branch.finished and branch.tokens[-1] in stop_ids
    if branch.failed:
        after = f"after the {len(branch.tokens)} tokens of prefix {branch.id}"
        group.error = f"the model's logits {after} are not finite"
    return written, True
