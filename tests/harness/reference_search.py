"""A slow reference of the search (method, section 4), written from the text with loops: what the
jitted code is checked against.

Nothing here is shared with `zip_rc_jax.decoding`. Two levels: `enumerated_utility` walks through
every outcome of every prefix (no cumulative distribution anywhere; tiny groups only), `utility`
uses cumulative products (any group), and tests tie the two. A group is `joints` (list of float64
[B_V, B_T]), `unfinished` (list of bool) and `multiplicity` (list of int, 0 = not in the set).
"""

from __future__ import annotations

import itertools

NONE = -1
TIE = 1e-12


def midpoints(edges):
    return [(edges[i] + edges[i + 1]) / 2 for i in range(len(edges) - 1)]


def marginals(joint, future_bin):
    """Reward and length probabilities of one prefix when it is to be paused at `future_bin` (NONE =
    never)."""
    n_reward, n_length = joint.shape
    reward, length = [0.0] * n_reward, [0.0] * n_length
    for b in range(n_reward):
        for i in range(n_length):
            cut = future_bin != NONE and i >= future_bin
            reward[0 if cut else b] += joint[b, i]
            length[future_bin if cut else i] += joint[b, i]
    return reward, length


def expected_value(joint, centres):
    return sum(
        joint[b, i] * centres[b] for b in range(joint.shape[0]) for i in range(joint.shape[1])
    )


def expected_length(joint, edges):
    return sum(
        joint[b, i] * midpoints(edges)[i]
        for b in range(joint.shape[0])
        for i in range(joint.shape[1])
    )


def normaliser(joints, tokens_so_far, edges):
    return sum(
        t + expected_length(p, edges) for p, t in zip(joints, tokens_so_far, strict=True)
    ) / len(joints)


def enumerated_max(distributions, support):
    """E[max] of independent variables on a common ascending support by walking through all
    outcomes; the lowest value if there are none."""
    if not distributions:
        return support[0]
    total = 0.0
    for outcome in itertools.product(range(len(support)), repeat=len(distributions)):
        probability = 1.0
        for d, o in zip(distributions, outcome, strict=True):
            probability *= d[o]
        total += probability * max(support[o] for o in outcome)
    return total


def cumulative_max(distributions, support):
    """The same expectation from the product of the cumulative distributions."""
    previous, total = 0.0, 0.0
    for b, v in enumerate(support):
        below = 1.0
        for d in distributions:
            below *= sum(d[: b + 1])
        total += v * (below - previous)
        previous = below
    return total


def utility(
    joints,
    unfinished,
    multiplicity,
    future_bin,
    *,
    alpha,
    beta,
    scale,
    centres,
    edges,
    skill=1.0,
    expected_max=cumulative_max,
):
    """U of one meta-action.

    A prefix with multiplicity k stands for k independent prefixes with the same joint.
    """
    rewards, lengths = [], []
    for joint, live, k in zip(joints, unfinished, multiplicity, strict=True):
        for _ in range(k):
            reward, length = marginals(joint, future_bin)
            rewards.append(reward)
            if live:
                lengths.append(length)
    mids = midpoints(edges)
    value = expected_max(rewards, centres)
    if skill != 1.0:
        each = [sum(p * v for p, v in zip(r, centres, strict=True)) for r in rewards]
        mean = sum(each) / len(each) if each else centres[0]
        value = mean ** (1 - skill) * value**skill if value > 0 else 0.0
    compute = sum(p * m for length in lengths for p, m in zip(length, mids, strict=True))
    latency = expected_max(lengths, mids) if lengths else 0.0
    return value - beta * (alpha * compute + (1 - alpha) * latency) / scale


def enumerated_utility(*args, **kwargs):
    return utility(*args, expected_max=enumerated_max, **kwargs)


def future_bins(edges):
    return [NONE, *range(1, len(edges) - 1)]


def published(joints, unfinished, *, centres, edges, **prices):
    """The authors' search before the no-harm pass: (keep, future bin, utility)."""
    n = len(joints)
    by_length = sorted(range(n), key=lambda i: expected_length(joints[i], edges))
    by_value = sorted(range(n), key=lambda i: -expected_value(joints[i], centres))
    best = None
    for bin_ in future_bins(edges):
        for k1 in range(n + 1):
            for k2 in range(n + 1):
                kept = (
                    set(by_length[:k1])
                    | set(by_value[:k2])
                    | {i for i in range(n) if not unfinished[i]}
                )
                keep = [i in kept for i in range(n)]
                u = utility(
                    joints,
                    unfinished,
                    [int(k) for k in keep],
                    bin_,
                    centres=centres,
                    edges=edges,
                    **prices,
                )
                if (
                    best is None
                    or u > best[2] + TIE
                    or (abs(u - best[2]) <= TIE and sum(keep) > sum(best[0]))
                ):
                    best = keep, bin_, u
    return best


def no_harm(joints, unfinished, keep, future_bin, **kwargs):
    """Returns dropped prefixes in index order wherever that does not lower the utility: (keep,
    utility)."""
    keep = list(keep)
    u = utility(joints, unfinished, [int(k) for k in keep], future_bin, **kwargs)
    for i in range(len(keep)):
        if not keep[i]:
            trial = [*keep[:i], True, *keep[i + 1 :]]
            with_it = utility(joints, unfinished, [int(k) for k in trial], future_bin, **kwargs)
            if with_it >= u - TIE:
                keep, u = trial, with_it
    return keep, u


def exhaustive(joints, unfinished, *, edges, **kwargs):
    """The highest utility over every subset that holds all finished prefixes, and every future
    bin."""
    choices = [(0, 1) if live else (1,) for live in unfinished]
    return max(
        utility(joints, unfinished, k, bin_, edges=edges, **kwargs)
        for k in itertools.product(*choices)
        for bin_ in future_bins(edges)
    )


def all_multiplicities(unfinished, extra):
    """Every multiplicity vector of a branching decision.

    The last slot is the root; `extra` = most new prefixes.
    """
    choices = [range(extra + 2) if live else (1,) for live in unfinished[:-1]]
    for k in itertools.product(*choices, range(extra + 1)):
        if (
            sum(max(m - 1, 0) for m, live in zip(k[:-1], unfinished[:-1], strict=True) if live)
            + k[-1]
            <= extra
        ):
            yield list(k)


def branching(joints, unfinished, extra, *, edges, **kwargs):
    """The highest utility over every multiplicity vector and every future bin."""
    return max(
        utility(joints, unfinished, k, bin_, edges=edges, **kwargs)
        for k in all_multiplicities(unfinished, extra)
        for bin_ in future_bins(edges)
    )
