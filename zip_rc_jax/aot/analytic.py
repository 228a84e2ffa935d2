"""How many floating-point operations a step must take, counted by hand: what the compiled programs are held against.

Everything counts 2 per multiply-add, matrix products only. Attention counts the whole `[T, S]` square, as `models.attention.attend`
computes it; a kernel that skips what the causal mask hides does half of it.
"""

from __future__ import annotations

import dataclasses

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.models.stacks import segments


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """Of one optimizer step over all chips. With `N` matrix weights per token outside the unembedding, `D` tokens, `L_a` attention layers:

    Attributes:
      forward: `2 N D` + attention `4 D S H head_dim L_a` + unembedding `2 D V d` (with KL or next-token loss) + joint
        `2 D cells d`.
      backward: twice the forward pass; for trainable="zip_rows" only the reserved rows' own gradient.
      teacher: the frozen policy's forward pass with its unembedding (with KL).
      recomputed: what rematerialisation repeats: with `remat` the layers of the student (but for the last product of every scan step,
        which no gradient needs), and both unembeddings of the chunked loss.
      attention: the share of attention scores and their product with the values in all of the above.
    """

    forward: int
    backward: int
    teacher: int
    recomputed: int
    attention: int

    @property
    def useful(self) -> int:
        """`6 N D` and attention, and the teacher's `2 N D`: what no implementation can leave out."""
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
    """Scores and weighted values of `queries` tokens that each look at `keys` slots, in all attention layers."""
    return 4 * queries * keys * config.n_heads * config.head_dim * sum(kind != "conv" for kind in config.kinds)


def train_flops(config: ModelConfig, train: TrainConfig, cells: int) -> TrainFlops:
    """See `TrainFlops`.

    Args:
      cells: reserved ids.
    """
    tokens, d = train.batch_rows * train.row_tokens, config.d_model
    attention = attention_flops(config, tokens, train.row_tokens)
    body = 2 * body_weights(config) * tokens + attention
    table = 2 * tokens * config.vocab_size * d
    student = table if train.kl_weight or train.lm_weight else 0
    head = 2 * tokens * cells * d if train.joint_weight else 0
    if train.trainable == "zip_rows":
        run = 0 if train.cache_features else body
        return TrainFlops(run + head, head, 0, 0, attention if run else 0)
    last = 2 * tokens * d * config.d_ff * sum(segment.repeats for segment in segments(config.kinds))
    teacher = body + table if train.kl_weight else 0
    return TrainFlops(
        forward=body + student + head,
        backward=2 * (body + student + head),
        teacher=teacher,
        recomputed=(body - last if train.remat else 0) + student + (table if teacher else 0),
        attention=attention * (3 + train.remat + (teacher > 0)),
    )


def decode_flops(config: ModelConfig, rows: int, slots: int) -> int:
    """Of one decode step of `rows` rows, each looking at all `slots` slots: `rows * (2 N + 2 V d)` and attention."""
    return rows * 2 * (body_weights(config) + config.vocab_size * config.d_model) + attention_flops(config, rows, slots)
