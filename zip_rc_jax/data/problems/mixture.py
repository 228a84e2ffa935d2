"""The order of a mixture: which source the next problem comes from."""

from __future__ import annotations

from collections.abc import Sequence

from zip_rc_jax.runtime.errors import UsageError


def interleaved(
    names: Sequence[str], weights: Sequence[float], sizes: Sequence[int | None], count: int
) -> list[int]:
    """`[count]` numbers of sources. The first `k` of them do not depend on `count`.

    The next problem comes from the source that is furthest behind its share. Sources of equal
    weights take turns until one is used up, and the others go on. Other weights are kept exactly,
    so a source that is too small for its share is an error.

    Args:
      names: of the sources, for messages.
      weights: shares, each > 0.
      sizes: how many problems each has; None for a generator without end.
      count: how many are wanted; 0 for all.

    Raises:
      UsageError: more than there are; or 0 where a source has no end, or where shares are asked
        for.
    """
    endless = [name for name, size in zip(names, sizes, strict=True) if size is None]
    total = None if endless else sum(size or 0 for size in sizes)
    shared = len(set(weights)) > 1
    if not count and endless:
        raise UsageError(
            f"all problems of {', '.join(endless)[:200]}",
            "a generator has no end",
            "say how many: rollout.prompts or evaluate.prompts, or count of the source",
        )
    if not count and shared:
        raise UsageError(
            f"all problems of a mixture with weights {list(weights)}",
            "all problems and shares of them contradict each other",
            f"ask for a number of problems (at most {_most(weights, sizes)} keep the shares), or "
            "leave the weights out",
        )
    if total is not None and count > total:
        has = f"{', '.join(names)[:200]} {'has' if len(names) == 1 else 'have'} {total}"
        raise UsageError(f"{count} problems", has, f"ask for {total} or fewer, or 0 for all")
    wanted = count or total or 0
    left = [wanted if size is None or shared else size for size in sizes]
    taken, order, debts = [0] * len(names), list[int](), [0.0] * len(names)
    unit = sum(weights)
    for _ in range(wanted):
        open_ = [i for i, room in enumerate(left) if taken[i] < room]
        # What each has earned; a source that is used up earns nothing any more.
        if len(open_) < len(names):
            unit = sum(weights[i] for i in open_)
        for i in open_:
            debts[i] += weights[i] / unit
        chosen = max(open_, key=lambda i: (round(debts[i], 9), -i))
        debts[chosen] -= 1
        taken[chosen] += 1
        order.append(chosen)
    for name, size, n in zip(names, sizes, taken, strict=True):
        if size is not None and n > size:
            raise UsageError(
                f"{count} problems with weights {list(weights)}",
                f"the share of {name[:200]} is {n}, and it has {size}",
                f"ask for {_most(weights, sizes)} or fewer, or give it a smaller weight",
            )
    return order


def _most(weights: Sequence[float], sizes: Sequence[int | None]) -> int:
    """How many problems keep the shares, about."""
    total = sum(weights)
    return int(min(s * total / w for s, w in zip(sizes, weights, strict=True) if s is not None))
