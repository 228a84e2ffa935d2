"""The reward x length grid: the only place that knows units.

A prefix has two random variables: its final reward `V` in [0, 1] and its remaining length `L` in
tokens still to generate, end-of-sequence token included. A `Grid` discretises the pair; cell
`(b, l)` is reward bin `b` (centre `v_b`) and length bin `l` (half-open `[t_l, t_{l+1})`, midpoint
`m_l`). Cells are numbered reward-major: `b * n_length + l` (paper, section 3).
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.runtime.errors import UsageError

AUTHORS_LENGTH_EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
AUTHORS_CENTRES = {"correct": (0.0, 1.0), "value": tuple(i / 6 for i in range(7))}


LONGEST = 2**31 - 1  # tokens: positions are int32


def _numbers(name: str, values: Any) -> list[Any]:
    """The items of a sequence, all of them numbers.

    Raises UsageError for anything else; texts and truth values are no numbers.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()  # of NumPy or JAX
    fits = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set))
    numbers = (
        [value.item() if isinstance(value, np.generic) else value for value in values]
        if fits
        else []
    )
    if not fits or not all(map(_is_number, numbers)):
        shown = f"[{', '.join(map(_shown, numbers))}]" if fits else _shown(values)
        raise UsageError(
            f"{name}={shown}", "it must be a list of numbers", f"give for example {_EXAMPLES[name]}"
        )
    return numbers


_EXAMPLES = {"reward_centres": "[0, 1]", "length_edges": "[0, 64, 128]"}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _shown(value: Any) -> str:
    # Python refuses to print numbers of thousands of digits
    large = isinstance(value, int) and not -(2**63) <= value < 2**63
    return f"(a whole number of {value.bit_length()} bits)" if large else repr(value)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Reward centres and length edges.

    Hashable, so it can be a static argument of a jitted function.

    Attributes:
      reward_centres: `B_V` ascending rewards in [0, 1].
      length_edges: `B_T + 1` ascending token counts, the first 0. A length at or past the last edge
        falls into the last bin.

    Raises:
      UsageError: something else than numbers, fewer than two centres or edges, not strictly
        ascending, or out of range.
    """

    reward_centres: tuple[float, ...]
    length_edges: tuple[int, ...]

    def __post_init__(self) -> None:
        centres = tuple(float(v) for v in _numbers("reward_centres", self.reward_centres))
        given = _numbers("length_edges", self.length_edges)
        if not all(float(t).is_integer() for t in given):
            raise UsageError(
                f"length_edges={list(given)}",
                "edges count tokens, so they are whole numbers",
                "round them",
            )
        edges = tuple(int(t) for t in given)
        object.__setattr__(self, "reward_centres", centres)
        object.__setattr__(self, "length_edges", edges)
        if len(centres) < 2:
            raise UsageError(
                f"reward_centres={list(centres)}",
                "a grid needs at least two reward bins",
                "give for example [0, 1]",
            )
        if (
            not all(a < b for a, b in itertools.pairwise(centres))
            or centres[0] < 0
            or centres[-1] > 1
        ):
            raise UsageError(
                f"reward_centres={list(centres)}",
                "centres must ascend strictly within [0, 1]",
                "sort them and rescale rewards to [0, 1]",
            )
        if len(edges) < 2:
            raise UsageError(
                f"length_edges={list(edges)}",
                "a grid needs at least one length bin, so two edges",
                "give for example [0, 64]",
            )
        if not all(a < b for a, b in itertools.pairwise(edges)) or edges[0] != 0:
            raise UsageError(
                f"length_edges={list(edges)}",
                "edges must start at 0 and ascend strictly, so every length has one bin",
                "sort them and start at 0",
            )
        if edges[-1] > LONGEST:
            raise UsageError(
                f"length_edges={list(edges)}",
                f"no sequence has more than {LONGEST:,} tokens",
                "use smaller edges",
            )

    @classmethod
    def authors(cls, label: str) -> Grid:
        """The authors' published grid for `label` "correct" (2 x 8) or "value" (7 x 8)."""
        if not isinstance(label, str) or label not in AUTHORS_CENTRES:
            raise UsageError(
                f"label={label!r}",
                f"known label kinds are {sorted(AUTHORS_CENTRES)}",
                "use one of them",
            )
        return cls(AUTHORS_CENTRES[label], AUTHORS_LENGTH_EDGES)

    def counting_the_end_token(self) -> Grid:
        """The same bins where this grid's lengths do not count the end token, as the authors' do.

        Such a length is one less than ours at every prefix. So every edge but the first moves up
        by one token: the authors' first bin, 0 to 255 tokens before the end token, holds up to 256
        of ours.

        Raises:
          UsageError: the last edge leaves the range of positions.
        """
        return Grid(self.reward_centres, (0, *(edge + 1 for edge in self.length_edges[1:])))

    @property
    def n_reward(self) -> int:
        return len(self.reward_centres)

    @property
    def n_length(self) -> int:
        return len(self.length_edges) - 1

    @property
    def n_cells(self) -> int:
        return self.n_reward * self.n_length

    @property
    def reward_edges(self) -> tuple[float, ...]:
        """The `B_V - 1` inner reward edges: midpoints between centres (bins are half-open, the
        upper bin takes the edge)."""
        return tuple((a + b) / 2 for a, b in itertools.pairwise(self.reward_centres))

    @property
    def length_midpoints(self) -> tuple[float, ...]:
        """`m_l = (t_l + t_{l+1}) / 2` in tokens, one per length bin."""
        return tuple((a + b) / 2 for a, b in itertools.pairwise(self.length_edges))

    def reward_bin(self, reward: Any) -> np.ndarray:
        """Bin index of each reward in [0, 1] (any shape).

        Raises:
          ValueError: a reward outside [0, 1], NaN, or no number.
        """
        reward = _as_floats(reward, "rewards")
        if not np.all((reward >= 0) & (reward <= 1)):
            raise ValueError(
                f"rewards must lie in [0, 1]; got {reward[~((reward >= 0) & (reward <= 1))][:5]}"
            )
        return np.searchsorted(np.asarray(self.reward_edges), reward, side="right").astype(np.int32)

    def length_bin(self, remaining: Any) -> np.ndarray:
        """Bin index of each remaining length in tokens (any shape).

        Lengths past the last edge go to the last bin.

        Raises:
          ValueError: a negative length, NaN, or no number.
        """
        lengths = _as_floats(remaining, "remaining lengths")
        if not np.all(lengths >= 0):
            raise ValueError(
                f"remaining lengths must be >= 0; got {np.asarray(remaining)[~(lengths >= 0)][:5]}"
            )
        return np.searchsorted(np.asarray(self.length_edges[1:-1]), lengths, side="right").astype(
            np.int32
        )

    def cell(self, reward: Any, remaining: Any) -> np.ndarray:
        """Cell index `b * n_length + l` (reward-major) of each (reward, remaining tokens) pair."""
        return self.reward_bin(reward) * self.n_length + self.length_bin(remaining)

    def expected_reward(self, joint: Any) -> Any:
        """`E[V]` of joints `[..., B_V, B_T]` -> `[...]`, in the joint's dtype."""
        # A mean lies between its terms; rounding would put that of a sure head a little above 1,
        # where no reward may lie.
        mean = jnp.einsum(
            "...bl,b->...",
            joint,
            jnp.asarray(self.reward_centres, joint.dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.clip(mean, self.reward_centres[0], self.reward_centres[-1])

    def expected_length(self, joint: Any) -> Any:
        """`E[L]` in tokens of joints `[..., B_V, B_T]` -> `[...]`, in the joint's dtype."""
        return jnp.einsum(
            "...bl,l->...",
            joint,
            jnp.asarray(self.length_midpoints, joint.dtype),
            precision=jax.lax.Precision.HIGHEST,
        )

    def to_dict(self) -> dict[str, list]:
        return {
            "reward_centres": list(self.reward_centres),
            "length_edges": list(self.length_edges),
        }

    @classmethod
    def from_dict(cls, data: dict) -> Grid:
        """Inverse of `to_dict`. Raises UsageError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"reward_centres", "length_edges"}:
            raise UsageError(
                f"grid {data!r}",
                "it is no object of reward_centres and length_edges",
                "restore the file that it comes from",
            )
        return cls(data["reward_centres"], data["length_edges"])


def _as_floats(values: Any, what: str) -> np.ndarray:
    """float64 of numbers. Raises ValueError for anything else."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" and array.dtype != object:
        raise ValueError(f"{what} must be numbers; got {array.dtype}")
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} must be numbers") from None
