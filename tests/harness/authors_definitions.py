"""The authors' definitions of labels and losses in as many words (method, section 3): Python loops,
torch in float64, all probabilities of the vocabulary at once."""

from __future__ import annotations

import itertools

import torch

LENGTH_EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
VALUE_CENTRES = (0.0, 0.1666667, 0.3333333, 0.5, 0.6666667, 0.8333333, 1.0)


def bin_of(number, edges):
    """The half-open bin `[edges[i], edges[i + 1])` of a number; the last one has no end."""
    return max(i for i, edge in enumerate(edges[:-1]) if number >= edge)


def cell_labels(prompt_tokens, output_tokens, reward, centres, length_edges=LENGTH_EDGES):
    """The cell of every labelled prefix of a rollout, the root first.

    The last token is never an input. Of the `p + m - 1` inputs, `p + m - 2 - t` follow input `t`:
    that is the authors' remaining length, whether the rollout ended or was cut off.
    """
    inputs = prompt_tokens + output_tokens - 1
    between = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    at_reward = bin_of(reward, (0.0, *between, 1.0))
    bins = len(length_edges) - 1
    return [
        at_reward * bins + bin_of(inputs - 1 - t, length_edges)
        for t in range(prompt_tokens - 1, inputs)
    ]


def losses(student, teacher, rows, first_id, cells, top_k, kl_ids=None):
    """(joint cross-entropy, KL), means over the means of the rollouts, with gradients to `student`.

    Args:
      student, teacher: Hugging Face models in float64.
      rows: (token ids, position of the first label, cells of the labelled positions) of each
        rollout.
      kl_ids: `[V]` bool, ids of the divergence; None: all but the cells, as theirs.
    """
    joint_means, kl_means = [], []
    reserved = slice(first_id, first_id + cells)
    for ids, first, labels in rows:
        tokens = torch.tensor([ids[:-1]])
        found = student(tokens).logits[0, first:]
        with torch.no_grad():
            reference = teacher(tokens).logits[0, first:].clone()
        log_cells = torch.log_softmax(found[:, reserved], dim=-1)
        joint = [-log_cells[i, cell] for i, cell in enumerate(labels)]
        joint_means.append(torch.stack(joint).mean())
        kept = torch.ones(found.shape[-1], dtype=torch.bool) if kl_ids is None else kl_ids.clone()
        kept[reserved] = False
        log_q = torch.log_softmax(found[:, kept], dim=-1)
        reference = reference[:, kept]
        kl = []
        for q, z in zip(log_q, reference, strict=True):
            likely = torch.argsort(z, descending=True)[:top_k]
            p = torch.softmax(z[likely], dim=-1)
            kl.append((p * (p.log() - q[likely])).sum())
        kl_means.append(torch.stack(kl).mean())
    return torch.stack(joint_means).mean(), torch.stack(kl_means).mean()


def value(model, ids, first, first_id, centres, bins, last):
    """A critic's value of a rollout: mean expected reward of its last labelled positions."""
    with torch.no_grad():
        found = model(torch.tensor([ids[:-1]])).logits[0, first:]
    p = torch.softmax(found[:, first_id : first_id + len(centres) * bins], dim=-1)
    rewards = p.reshape(-1, len(centres), bins).sum(-1) @ torch.tensor(centres, dtype=p.dtype)
    return float(rewards[-last:].mean())
