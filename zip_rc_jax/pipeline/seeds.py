"""Seeds of the samples: equal prompts get samples of their own, and an evaluation never those of
the rollouts.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.inference.requests import Request


def evaluation_seed(config: PipelineConfig) -> int:
    """Seed of an evaluation's samples: a stream of its own, so that a problem that the rollouts had
    too gets other samples there.
    """
    return _derived_seed("evaluate", config.evaluate.seed)


def try_seed(config: PipelineConfig, number: int) -> int:
    """Seed of one try of an evaluation, counted from 0. The first has that of an evaluation in one
    try, so nothing that is there is decoded again when more are asked for.
    """
    seed = evaluation_seed(config)
    return _derived_seed("try", seed, number) if number else seed


def _derived_seed(*parts: str | int) -> int:
    """32-bit seed that follows from `parts`; in practice, other parts give another one."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def with_own_samples(texts: Sequence[str], seed: int) -> list[Request]:
    """A request per text. The first of equal texts has `seed`, every other one a seed that follows
    from it and from how many came before.

    With one seed for all, equal texts would get equal samples. What a text gets does not depend on
    the texts after it.
    """
    before: collections.Counter[str] = collections.Counter()
    requests = []
    for text in texts:
        copy = before[text]
        requests.append(Request(text, seed=_derived_seed("copy", seed, copy) if copy else seed))
        before[text] += 1
    return requests
