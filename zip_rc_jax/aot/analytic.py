"""How many floating-point operations a step must take, counted by hand: what the compiled programs
are held against.

Everything counts 2 per multiply-add, matrix products only. Attention counts what its implementation
computes: "plain" the whole `[T, T]` square, "chunked" and "splash" the blocks in which the causal
  mask or the window leaves anything to see.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.models.attention.full import block_size, choose_attention, visible_blocks

# Products of the size of the scores in one layer: 2 in a forward pass (scores, weighted values) and
# 4 more in a backward pass. Blocks keep no scores, so they compute them again for the gradients,
# and the TPU kernel does so twice, with the gradient of the weights.
BACKWARD_PRODUCTS = {"plain": 4, "chunked": 5, "splash": 7}
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_KERNEL = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """Of one optimizer step over all chips.

    With `N` matrix weights per token outside the unembedding, `D` tokens, and `A` operations
    of one product of the size of all attention scores (see `score_flops`):

    Attributes:
      forward: `2 N D` + attention `2 A` + unembedding `2 D V d` (with KL or next-token loss) +
        joint `2 D cells d`. All positions count as labelled: at others the loss skips the
        unembedding.
      backward: twice the forward pass; for trainable="zip_rows" only the reserved rows' own
        gradient.
      teacher: the frozen policy's forward pass with its unembedding (with KL).
      recomputed: what rematerialisation repeats: with `remat` the layers of the student (but for
        the last product of every layer, which no gradient needs), and `repeated`.
      repeated: what blocked attention computes again in its backward pass, with or without `remat`
        (`BACKWARD_PRODUCTS`).
      attention: the share of attention in all of the above.
      kernels: the share of attention that TPU kernels compute, which is in no compiled program's
        own count.
    """

    forward: int
    backward: int
    teacher: int
    recomputed: int
    repeated: int
    attention: int
    kernels: int

    @property
    def useful(self) -> int:
        """`6 N D` and attention, and the teacher's `2 N D`: what no implementation can leave
        out."""
        return self.forward + self.backward + self.teacher

    @property
    def total(self) -> int:
        return self.useful + self.recomputed


def layer_weights(config: ModelConfig, kind: str) -> int:
    """Weights of one layer that each token is multiplied with."""
    d, width = config.d_model, config.head_dim
    mixer = 4 * d * d if kind == "conv" else 2 * d * width * (config.n_heads + config.n_kv_heads)
    return mixer + 3 * d * config.d_ff


def body_weights(config: ModelConfig) -> int:
    """`N`: matrix weights of all layers, without embedding and unembedding."""
    return sum(layer_weights(config, kind) for kind in config.kinds)


def attention_flops(config: ModelConfig, queries: int, keys: int) -> int:
    """Scores and weighted values of `queries` tokens that each look at `keys` slots, in all
    attention layers."""
    return (
        4
        * queries
        * keys
        * config.n_heads
        * config.head_dim
        * sum(kind != "conv" for kind in config.kinds)
    )


def score_flops(config: ModelConfig, train: TrainConfig, platform: str) -> dict[str, int]:
    """Per attention type `A`: operations of one product of the size of the scores, in all its
    layers and rows of a batch."""
    steps = train.row_tokens
    chosen = choose_attention(train.attention, platform, steps)
    flops = {}
    for kind, window in (("attention", 0), ("sliding", config.sliding_window)):
        block = steps if chosen == "plain" else block_size(chosen, platform, steps)
        pairs = 1 if chosen == "plain" else len(visible_blocks(steps, block, window))
        flops[kind] = (
            2
            * train.batch_rows
            * pairs
            * block**2
            * config.n_heads
            * config.head_dim
            * config.kinds.count(kind)
        )
    return flops


def kernel_flops(
    config: ModelConfig, train: TrainConfig, platform: str, calls: Mapping[str, int]
) -> int:
    """Operations of the attention kernels that a compiled program calls, over all chips.

    A call is one layer of all rows.

    Args:
      calls: how often each kernel runs, by its name in the program (`costs.Costs.kernels`); only
        attention counts.
    """
    scores = sum(score_flops(config, train, platform).values())
    layers = sum(kind != "conv" for kind in config.kinds)
    products = sum(
        count * KERNEL_PRODUCTS[match[1]]
        for name, count in calls.items()
        if (match := _KERNEL.match(name))
    )
    return products * scores // layers


def train_flops(config: ModelConfig, train: TrainConfig, cells: int, platform: str) -> TrainFlops:
    """See `TrainFlops`.

    Args:
      cells: reserved ids.
      platform: "cpu", "gpu" or "tpu", which decides what attention="auto" means.
    """
    rows, steps, d = train.batch_rows, train.row_tokens, config.d_model
    tokens = rows * steps
    chosen, scores = (
        choose_attention(train.attention, platform, steps),
        sum(score_flops(config, train, platform).values()),
    )
    body = 2 * body_weights(config) * tokens + 2 * scores
    table = 2 * tokens * config.vocab_size * d
    student = table if train.kl_weight or train.lm_weight else 0
    head = 2 * tokens * cells * d if train.joint_weight else 0
    kernel = int(chosen == "splash")
    if train.trainable == "zip_rows":
        run = 0 if train.cache_features else 1
        return TrainFlops(
            run * body + head, head, 0, 0, 0, run * 2 * scores, kernel * run * 2 * scores
        )
    last = 2 * tokens * d * config.d_ff * config.n_layers
    teacher = body + table if train.kl_weight and not train.cache_teacher else 0
    again = BACKWARD_PRODUCTS[chosen] - 4
    layers = body - last if train.remat else 0
    attention = scores * ((2 if teacher else 0) + 2 + (2 if train.remat else 0) + 4 + again)
    return TrainFlops(
        forward=body + student + head,
        backward=2 * (body + student + head),
        teacher=teacher,
        recomputed=layers + again * scores,
        repeated=again * scores,
        attention=attention,
        kernels=kernel * attention,
    )


def _seen(config: ModelConfig, kind: str, length: int) -> int:
    """Positions that a token sees in a layer, of `length` with its own."""
    return min(length, config.sliding_window) if kind == "sliding" else length


def step_attention_flops(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Scores and weighted values of one decode step of sequences with `lengths` tokens, each of
    which looks at its own only."""
    seen = sum(_seen(config, kind, n) for kind in config.kinds if kind != "conv" for n in lengths)
    return 4 * seen * config.n_heads * config.head_dim


def page_bytes(config: ModelConfig, lengths: Sequence[int], page: int, itemsize: int) -> int:
    """Bytes of the pages that such a step reads; a page is read whole.

    Args:
      page: slots of a page.
      itemsize: bytes of a number.
    """

    def pages(kind: str, length: int) -> int:
        return -(-length // page) - (length - _seen(config, kind, length)) // page

    total = sum(pages(kind, n) for kind in config.kinds if kind != "conv" for n in lengths)
    return 2 * total * page * config.n_kv_heads * config.head_dim * itemsize


def decode_flops(config: ModelConfig, rows: int, slots: int) -> int:
    """Of one decode step of `rows` rows, each looking at all `slots` slots: `rows * (2 N + 2 V d)`
    and attention."""
    return rows * 2 * (body_weights(config) + config.vocab_size * config.d_model) + attention_flops(
        config, rows, slots
    )
