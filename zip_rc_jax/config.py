"""Every setting of every stage: frozen dataclasses (`config_file` reads them from YAML).

One file describes one pipeline; each stage reads its own section. An unknown key, a wrong type or an impossible value is a
`UsageError` before anything is computed. All classes are hashable, so they can be static arguments of jitted functions.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

from zip_rc_jax.errors import UsageError
from zip_rc_jax.grid import Grid

CANDIDATES = ("published", "exhaustive", "branching")
STRATEGIES = ("zip_rc", "fixed", "reward_threshold", "length_budget", "half_finished")
ANSWERS = ("value", "vote")
LABELS = ("correct", "value")
KL_KINDS = ("forward_topk", "forward", "reverse")
TRAINABLE = ("all", "zip_rows")
LAYER_TYPES = ("attention", "sliding", "conv")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "plain", "chunked", "splash")
ROPE_SCALINGS = ("none", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _require(condition: bool, value: str, reason: str, fix: str) -> None:
    if not condition:
        raise UsageError(value, reason, fix)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name}={value!r}", f"it must be one of {', '.join(allowed)}", "choose one of them")


_KINDS: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "true or false"),
}


def check_types(config: type, values: Mapping[str, Any]) -> None:
    """Checks numbers and truth values that did not come through YAML, where types are checked as they are read.

    Raises:
      UsageError: one of `values` is not of the type that the dataclass `config` declares for its name.
    """
    for field in dataclasses.fields(config):
        if field.name in values and str(field.type) in _KINDS:
            value, (kind, words) = values[field.name], _KINDS[str(field.type)]
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            _require(fits, f"{field.name}={value!r}", f"it is not {words}", f"give {words}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pretraining.

    Attributes:
      kind: "none", "linear" (all frequencies divided by `factor`), or "llama3" (Llama 3.1: long wavelengths divided, short ones kept,
        those between interpolated).
      factor: how much longer the context became.
      low_freq_factor, high_freq_factor, original_positions: of "llama3": wavelengths above `original_positions / low_freq_factor`
        are long, below `original_positions / high_freq_factor` short.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        _one_of("rope_scaling.kind", self.kind, ROPE_SCALINGS)
        _require(self.factor > 0, f"rope_scaling.factor={self.factor}", "frequencies are divided by it", "use a positive number")
        _require(
            self.kind != "llama3" or 0 < self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}",
            "they bound the wavelengths that are interpolated",
            "make low_freq_factor the smaller one",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer for all families (Llama, Qwen3, LFM2, Gemma 3). Nothing has a hidden default inside the layers.

    Attributes:
      vocab_size: rows of the embedding, padding included.
      d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff: the usual widths; `n_heads` is a multiple of `n_kv_heads`.
      layer_types: per layer "attention" (full causal), "sliding" (causal within `sliding_window` tokens) or "conv" (LFM2's gated
        short convolution); empty means attention everywhere.
      sliding_window: tokens that a sliding layer sees, its own included.
      conv_kernel, conv_bias: taps of the short convolution; biases on it and on its projections.
      rope_theta, rope_scaling: base and scaling of the rotary position embedding.
      sliding_rope_theta: base for sliding layers, unscaled (Gemma 3); 0 means that they rotate as the others.
      rms_eps: epsilon of every RMSNorm.
      norm_plus_one: norms multiply by `1 + scale` (Gemma).
      qk_norm: RMSNorm on queries and keys per head (Qwen3, LFM2, Gemma 3).
      post_norms: RMSNorm also on the output of attention and MLP (Gemma 3).
      attention_bias, mlp_bias: biases on the projections.
      attention_scale: scores are multiplied by it; 0 means `head_dim ** -0.5`.
      logit_softcap: `c * tanh(x / c)` on the final logits; 0 switches it off.
      activation: of the gated MLP: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      scale_embedding: multiply embeddings by `sqrt(d_model)` (Gemma).
      tied: unembedding = embedding.
      max_positions: longest sequence in tokens, prompt included.
    """

    vocab_size: int = 384
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 384
    layer_types: tuple[str, ...] = ()
    sliding_window: int = 0
    conv_kernel: int = 0
    conv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    sliding_rope_theta: float = 0.0
    rms_eps: float = 1e-6
    norm_plus_one: bool = False
    qk_norm: bool = True
    post_norms: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 0.0
    logit_softcap: float = 0.0
    activation: str = "silu"
    scale_embedding: bool = False
    tied: bool = False
    max_positions: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions"):
            _require(getattr(self, field) > 0, f"model.{field}={getattr(self, field)}", "sizes are positive", "give a positive number")
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}",
            "every key/value head serves a whole group of query heads",
            "make n_heads a multiple of n_kv_heads",
        )
        for field in ("rope_theta", "rms_eps"):
            value = getattr(self, field)
            _require(
                math.isfinite(value) and value > 0, f"model.{field}={value}", "it must be positive and finite", "use a positive number"
            )
        for field in ("sliding_rope_theta", "attention_scale", "logit_softcap"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, f"model.{field}={value}", "0 switches it off", "use a number >= 0")
        _require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim}", "RoPE rotates pairs of channels", "make it even")
        _one_of("model.activation", self.activation, ACTIVATIONS)
        for kind in self.layer_types:
            _one_of("model.layer_types", kind, LAYER_TYPES)
        _require(
            len(self.layer_types) in (0, self.n_layers),
            f"model.layer_types of {len(self.layer_types)} entries",
            f"there are n_layers={self.n_layers} layers",
            "give one type per layer, or none",
        )
        _require(
            ("sliding" in self.layer_types) == (self.sliding_window > 0),
            f"model.sliding_window={self.sliding_window} with layer_types={self.layer_types}",
            "a window belongs to sliding layers, and every sliding layer needs it",
            "set both or neither",
        )
        _require(
            ("conv" in self.layer_types) == (self.conv_kernel > 0),
            f"model.conv_kernel={self.conv_kernel} with layer_types={self.layer_types}",
            "a kernel belongs to conv layers, and every conv layer needs it",
            "set both or neither",
        )
        _require(
            set(self.layer_types) != {"conv"},
            "model.layer_types all 'conv'",
            "the cache counts its slots in attention layers",
            "give the model at least one attention layer",
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""
        return cls(**{**data, "rope_scaling": RopeScaling(**data.get("rope_scaling", {}))})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The type of every layer."""
        return self.layer_types or ("attention",) * self.n_layers


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Filters apply in the order temperature, top_k, top_p, min_p (as in Hugging Face).

    Attributes:
      temperature: 0 is greedy; logits are divided by it.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens with at least this probability; 1 keeps all.
      min_p: keep tokens with at least this fraction of the likeliest token's probability; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_types(SamplingConfig, vars(self))
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature={self.temperature}",
            "logits are divided by it",
            "use 0 for greedy or a positive number",
        )
        _require(self.top_k >= 0, f"top_k={self.top_k}", "it counts tokens", "use 0 to keep all")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p}", "it is a probability", "use a number in (0, 1]")
        _require(0 <= self.min_p <= 1, f"min_p={self.min_p}", "it is a fraction of the largest probability", "use a number in [0, 1]")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The adaptive search and its limits (method: sampling utility, `U = E[max] - beta (alpha E[compute] + (1-alpha) E[latency]) / N`).

    Attributes:
      alpha: in [0, 1]; 1 prices compute (all tokens), 0 prices latency (serial steps).
      beta: price of one mean sample's worth of cost, in reward; small buys accuracy (0.1 cheap .. 0.01 dear).
      n: most prefixes (finished ones included) that one prompt may have.
      interval: decode steps between decisions, in tokens.
      window: the joint of a prefix is the mean over its last `window` tokens.
      candidates: "published" (the authors' keep-sets), "exhaustive" (all subsets, n <= 10), or "branching" (adds
        multiplicities and new samples from the root).
      no_harm: after the best keep-set is found, keep every dropped prefix whose return does not lower the utility.
      strategy: "zip_rc", or a baseline on the same engine: "fixed" (n full samples), "reward_threshold" (drop prefixes whose
        expected reward is below `reward_threshold`), "length_budget" (drop prefixes longer than `length_budget` tokens),
        "half_finished" (drop the rest once half have finished).
      answer: "value" (the finished prefix with the highest value) or "vote" (the answer with the largest sum of values).
      abstain: allow a prompt to end before any prefix has finished.
      abstain_below: answers whose expected reward is below it are withheld; 0 withholds none.
      skill: exponent `s` of the value term `E[avg]^(1-s) E[max]^s`; 1 trusts the head to select within a prompt.
      joint_temperature, joint_top_p: sharpening of the joint before the search; 1 leaves it.
      max_tokens: most tokens generated per prefix.
      temperature, top_k, top_p, min_p: see `SamplingConfig`.
      stop_token_ids: ids that end a prefix besides the tokenizer's end-of-sequence ids.
      token_budget: most tokens generated for one prompt by all its prefixes together (a shared prefix counts once); 0 sets no limit.
        It is never exceeded: where it runs short, the live prefixes share what is left.
      time_budget: seconds from a prompt's admission after which its next decision is the last; 0 sets no limit. A running interval is
        not interrupted, and what the first call of a shape spends on compiling counts too.
      rows: rows of the pool, shared by all prompts in flight.
    """

    alpha: float = 0.1
    beta: float = 0.01
    n: int = 8
    interval: int = 64
    window: int = 512
    candidates: str = "published"
    no_harm: bool = True
    strategy: str = "zip_rc"
    reward_threshold: float = 0.4
    length_budget: int = 0
    answer: str = "value"
    abstain: bool = False
    abstain_below: float = 0.0
    skill: float = 1.0
    joint_temperature: float = 1.0
    joint_top_p: float = 1.0
    max_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    token_budget: int = 0
    time_budget: float = 0.0
    rows: int = 64

    def __post_init__(self) -> None:
        check_types(DecodeConfig, vars(self))
        try:
            object.__setattr__(self, "stop_token_ids", tuple(operator.index(i) for i in self.stop_token_ids))
        except TypeError:
            raise UsageError(f"stop_token_ids={self.stop_token_ids!r}", "it is not a list of ids", "write it as [1, 2]") from None
        _require(0 <= self.alpha <= 1, f"alpha={self.alpha}", "it weighs compute against latency", "use a number in [0, 1]")
        _require(math.isfinite(self.beta) and self.beta >= 0, f"beta={self.beta}", "it is a price", "use a finite number >= 0")
        for field in ("n", "interval", "window", "max_tokens", "rows"):
            _require(getattr(self, field) >= 1, f"{field}={getattr(self, field)}", "it counts at least one", "use a positive number")
        _one_of("candidates", self.candidates, CANDIDATES)
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("answer", self.answer, ANSWERS)
        _require(
            self.candidates != "exhaustive" or self.n <= 10,
            f"n={self.n} with candidates='exhaustive'",
            f"all 2^{self.n} subsets would be scored at every decision",
            "use n <= 10 or candidates='published'",
        )
        _require(
            self.n <= self.rows,
            f"n={self.n} with rows={self.rows}",
            "the samples of one prompt must fit in the row pool",
            "raise rows or lower n",
        )
        _require(
            self.strategy != "length_budget" or self.length_budget >= 1,
            f"length_budget={self.length_budget}",
            "strategy='length_budget' needs a budget in tokens",
            "set length_budget to a positive number",
        )
        _require(
            0 <= self.reward_threshold <= 1, f"reward_threshold={self.reward_threshold}", "rewards lie in [0, 1]", "use a number in [0, 1]"
        )
        _require(0 <= self.abstain_below <= 1, f"abstain_below={self.abstain_below}", "rewards lie in [0, 1]", "use a number in [0, 1]")
        for field in ("token_budget", "time_budget"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, f"{field}={value}", "it limits what a prompt may spend", "use 0 for no limit")
        _require(
            math.isfinite(self.skill) and self.skill >= 0,
            f"skill={self.skill}",
            "it is an exponent between mean (0) and maximum (1)",
            "use a finite number >= 0",
        )
        _require(
            math.isfinite(self.joint_temperature) and self.joint_temperature > 0,
            f"joint_temperature={self.joint_temperature}",
            "log-probs are divided by it",
            "use 1 to leave it",
        )
        _require(0 < self.joint_top_p <= 1, f"joint_top_p={self.joint_top_p}", "it is a probability", "use a number in (0, 1]")
        self.sampling  # noqa: B018  (validates the sampling options)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """A grid per label kind. Empty centres or edges mean the authors'."""

    correct_centres: tuple[float, ...] = ()
    value_centres: tuple[float, ...] = ()
    length_edges: tuple[int, ...] = ()

    def grid(self, label: str) -> Grid:
        """The grid for `label` in {"correct", "value"}. Raises `UsageError` for an impossible grid."""
        _one_of("label", label, LABELS)
        authors = Grid.authors(label)
        centres = self.correct_centres if label == "correct" else self.value_centres
        return Grid(tuple(centres) or authors.reward_centres, tuple(self.length_edges) or authors.length_edges)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Problems of a reasoning-gym task, level by level.

    Attributes:
      name: reasoning-gym dataset name.
      levels: one dict of reasoning-gym options per level, easiest first, e.g. `{min_terms: 2, max_terms: 2}`. With `name` in it a level
        is another dataset, so that levels can be a mixture of tasks.
      train_seed, heldout_seed: first seed of each split. reasoning-gym seeds problem `i` with `seed + i`, so the two must lie
        further apart than the number of problems.
    """

    name: str = "chain_sum"
    levels: tuple[dict[str, Any], ...] = ()
    train_seed: int = 0
    heldout_seed: int = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How a problem becomes a prompt.

    Attributes:
      style: "raw" (the question alone) or "chat" (turns, rendered by the tokenizer's own chat template).
      system: text of the system turn; empty for none.
      instruction: user turn; `{question}` in it becomes the question. All other text stays, braces included.
      examples: worked examples that come before as earlier turns: problems of the task with seeds that no split uses.
      example_answer: assistant turn of an example; `{answer}` in it becomes the reference answer, and `{steps}` a chain
        sum worked out from left to right ("4 + 3 = 7, 7 - 2 = 5").
      chat_template_kwargs: variables of the chat template, such as `enable_thinking: false`.
    """

    style: str = "raw"
    system: str = ""
    instruction: str = "{question}"
    examples: int = 0
    example_answer: str = "{answer}"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("prompt.style", self.style, ("raw", "chat"))
        for field, part in (("instruction", "{question}"), ("example_answer", "{answer}")):
            value = getattr(self, field)
            _require(part in value, f"prompt.{field}={value!r}", f"it does not contain {part}", f"write {part} where it belongs")
        _require(self.examples >= 0, f"prompt.examples={self.examples}", "it counts worked examples", "use a number >= 0")
        given = {
            "system": self.system,
            "instruction": self.instruction != "{question}",
            "examples": self.examples,
            "example_answer": self.example_answer != "{answer}",
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        unread = ", ".join(name for name, value in given.items() if value)
        _require(
            self.style != "raw" or not unread,
            f"prompt.style='raw' with {unread}",
            "a raw prompt is the question alone, so nothing reads the rest",
            "set prompt.style=chat",
        )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """On-policy samples for training.

    Attributes:
      prompts: number of prompts, spread evenly over the levels.
      samples: rollouts per prompt.
      rows: rows decoded together.
      max_tokens: longest response in tokens; longer ones are stored as truncated (right-censored length).
      seed: seed of the sampling.
      temperature, top_k, top_p, min_p: see `SamplingConfig`. Defaults are the authors'.
    """

    prompts: int = 50_000
    samples: int = 2
    rows: int = 256
    max_tokens: int = 1024
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.1

    def __post_init__(self) -> None:
        for field in ("prompts", "samples", "rows", "max_tokens"):
            _require(
                getattr(self, field) >= 1, f"rollout.{field}={getattr(self, field)}", "it counts at least one", "use a positive number"
            )
        self.sampling  # noqa: B018

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run of the joint head. Defaults are the authors' recipe (method, section 3).

    Attributes:
      label: "correct" or "value": which field of the rollouts is the reward.
      trainable: "all", or "zip_rows" for ZIP-RC-Lite (every next-token logit stays bit-identical).
      steps: optimizer steps; the cosine schedule ends exactly there.
      batch_rows, row_tokens: a step sees `batch_rows` packed rows of `row_tokens` tokens.
      learning_rate: peak; linear warm-up over `warmup` of the steps, then cosine to 0.
      kl_weight: weight of the KL to the frozen starting policy; 0 switches the teacher off.
      kl_kind: "forward_topk" (authors: KL(teacher || student), teacher cut to its `kl_top_k` likeliest ids and renormalised),
        "forward" (full vocabulary), or "reverse" (paper: KL(student || teacher)).
      lm_weight: weight of the next-token cross-entropy on the responses (used to pretrain the demo policy).
      joint_weight: weight of the joint cross-entropy.
      cache_features: with trainable="zip_rows", run the frozen body once over all rollouts and keep its final hidden states in host
        memory (4 * d_model bytes per labelled position). Rows then hold labelled positions only, and a step costs next to nothing.
      cache_teacher: with kl_kind="forward_topk", run the frozen policy once over all rollouts and keep its likeliest ids in host memory
        (8 * kl_top_k bytes per labelled position). No teacher lies on the devices then, and a step has no forward pass of it.
      rows_from: stage ("critic" or "lite") whose trained reserved rows are the starting point; empty starts from zeros. On few data a
        trained head first keeps the body from chasing a random one.
      zip_lr_multiplier: the reserved rows learn this many times faster than the body.
      remat: the backward pass computes every layer's activations again instead of keeping them.
      loss_chunk: positions, over all rows of the batch, whose next-token logits exist at the same time (4 * vocab_size bytes each, a few
        times). Large chunks read the unembedding less often.
      compute_dtype: "float32" or "bfloat16" for products and activations. Parameters, their gradients, the optimizer, norms, softmax
        and losses are float32 in either case.
      attention: "plain" builds all scores, "chunked" blocks of them with XLA alone, "splash" blocks in a TPU kernel; "auto" chooses by
        platform and length (see `models.attention`).
      pack_batches: batches that are packed together: more let more rollouts find a row they fit into, and shuffle their rows.
      max_skipped: steps in a row with a non-finite loss or gradient (each changes nothing) after which training stops.
      save_seconds: a checkpoint at least this often, and on SIGINT / SIGTERM.
      keep_checkpoints: the newest that are kept.
      log_every: steps between metric records.
      eval_rollouts: held-back rollouts for the validation metrics (within-prompt AUC among them).
      evaluations: how often in the run they are computed, the last time at its end.
    """

    label: str = "correct"
    trainable: str = "all"
    steps: int = 1000
    batch_rows: int = 16
    row_tokens: int = 32768
    learning_rate: float = 3e-5
    warmup: float = 0.05
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    kl_weight: float = 0.0
    kl_kind: str = "forward_topk"
    kl_top_k: int = 32
    lm_weight: float = 0.0
    joint_weight: float = 1.0
    cache_features: bool = False
    cache_teacher: bool = False
    rows_from: str = ""
    zip_lr_multiplier: float = 1.0
    loss_chunk: int = 2048
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: bool = True
    seed: int = 0
    pack_batches: int = 4
    max_skipped: int = 10
    save_seconds: float = 60.0
    keep_checkpoints: int = 2
    log_every: int = 50
    eval_rollouts: int = 2048
    evaluations: int = 10

    def __post_init__(self) -> None:
        _one_of("label", self.label, LABELS)
        _one_of("trainable", self.trainable, TRAINABLE)
        _one_of("kl_kind", self.kl_kind, KL_KINDS)
        _one_of("rows_from", self.rows_from, ("", "critic", "lite"))
        _one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _one_of("attention", self.attention, ATTENTIONS)
        counts = ("steps", "batch_rows", "row_tokens", "kl_top_k", "loss_chunk", "log_every", "evaluations")
        for field in (*counts, "pack_batches", "max_skipped", "keep_checkpoints"):
            _require(getattr(self, field) >= 1, f"{field}={getattr(self, field)}", "it counts at least one", "use a positive number")
        for field in ("learning_rate", "clip", "zip_lr_multiplier", "save_seconds"):
            _require(getattr(self, field) > 0, f"{field}={getattr(self, field)}", "it must be positive", "use a positive number")
        for field in ("kl_weight", "lm_weight", "joint_weight", "weight_decay"):
            _require(getattr(self, field) >= 0, f"{field}={getattr(self, field)}", "it is a weight", "use a number >= 0")
        for field in ("adam_b1", "adam_b2"):
            value = getattr(self, field)
            _require(0 <= value < 1, f"{field}={value}", "it is the decay of a running mean", "use a number in [0, 1)")
        for field in ("seed", "eval_rollouts"):
            _require(getattr(self, field) >= 0, f"{field}={getattr(self, field)}", "it cannot be negative", "use a number >= 0")
        _require(
            self.kl_weight + self.lm_weight + self.joint_weight > 0,
            "kl_weight=0, lm_weight=0, joint_weight=0",
            "nothing would be trained",
            "give at least one a positive weight",
        )
        _require(0 <= self.warmup < 1, f"warmup={self.warmup}", "it is the fraction of steps spent warming up", "use a number in [0, 1)")
        _require(
            self.trainable == "zip_rows" or not self.cache_features,
            f"cache_features=true with trainable={self.trainable!r}",
            "the features change when the body is trained",
            "set trainable=zip_rows",
        )
        _require(
            not self.cache_teacher or (self.kl_weight > 0 and self.kl_kind == "forward_topk"),
            f"cache_teacher=true with kl_weight={self.kl_weight}, kl_kind={self.kl_kind!r}",
            "only the likeliest ids of a teacher are kept",
            "set kl_weight and kl_kind=forward_topk, or cache_teacher=false",
        )
        _require(
            not (self.trainable == "zip_rows" and (self.kl_weight or self.lm_weight)),
            f"trainable='zip_rows' with kl_weight={self.kl_weight}, lm_weight={self.lm_weight}",
            "the next-token logits do not depend on the reserved rows, so these losses have no gradient",
            "set both to 0",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How training is laid over the devices of all processes (see `sharding.py`). It changes where numbers lie, not what is trained.

    Attributes:
      data: groups of devices that each hold all parameters and take a share of the rows.
      fsdp: devices of a group that split rows, parameters and optimizer state among them. It divides `d_model`.
      tensor: devices that split heads, MLP and vocabulary, and see the same rows. It divides `n_heads`, `n_kv_heads`, `d_ff` and
        `vocab_size`.
      -1 on one axis is what the others leave over.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            _require(size >= 1 or size == -1, f"mesh.{axis}={size}", "it counts devices", "use a positive number, or -1 for the rest")
        _require(
            list(sizes.values()).count(-1) <= 1,
            "mesh " + " ".join(f"{axis}={size}" for axis, size in sizes.items()),
            "only one axis can be what the others leave over",
            "give the other axes a size",
        )


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How the embedded policy is made, and where it lies.

    Attributes:
      path: checkpoint of the starting policy (see `load`); empty for the one that `train --stage policy` left in run_dir.
      unsure: probability that a total is carried unsurely to the next step.
      slip_unsure, slip_sure: probability that an unsure carry is wrong, and that a sure one is.
      redo: probability that an unsure carry is redone, surely.
      check_unsure, check_sure: probability of another pass when an unsure carry stands in the last one, and when none does.
      examples: distinct training solutions.
      train: optimizer settings of the pretraining (next-token loss only).
    """

    path: str = ""
    unsure: float = 0.27
    slip_unsure: float = 0.7
    slip_sure: float = 0.005
    redo: float = 0.5
    check_unsure: float = 0.5
    check_sure: float = 0.2
    examples: int = 2_000_000
    train: TrainConfig = TrainConfig(lm_weight=1.0, joint_weight=0.0)


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Value labelling: `value` = mean expected reward of the critic over the last `last` labelled positions."""

    last: int = 512
    batch_rows: int = 64

    def __post_init__(self) -> None:
        _require(self.last >= 1, f"label.last={self.last}", "it counts positions", "use a positive number")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out comparison of the adaptive search with its baselines under one cost meter.

    Attributes:
      prompts: held-out problems, spread evenly over the levels.
      samples: samples per problem of the fixed run (the baselines' pool, and the mean length that normalises cost).
      alphas, betas: the sweep. For each pair every candidate set in `candidates` is decoded online.
      headline_beta: one beta per alpha, fixed beforehand, whose row is the headline.
      bootstrap: resamples of the paired bootstrap over prompts.
      drift_rollouts: samples of the starting policy on which the drift of the trained models is measured (three forwards of each).
      seed: seed of the decoding.
    """

    prompts: int = 400
    samples: int = 8
    alphas: tuple[float, ...] = (0.1, 1.0)
    betas: tuple[float, ...] = (0.1, 0.05, 0.02, 0.01)
    candidates: tuple[str, ...] = ("published",)
    headline_beta: tuple[float, ...] = (0.05, 0.05)
    bootstrap: int = 2000
    drift_rollouts: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("alphas", "betas", "candidates", "headline_beta"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for name in self.candidates:
            _one_of("evaluate.candidates", name, CANDIDATES)
        _require(self.prompts >= 1, f"evaluate.prompts={self.prompts}", "it counts problems", "use a positive number")
        _require(
            len(self.headline_beta) == len(self.alphas),
            f"headline_beta={self.headline_beta}, alphas={self.alphas}",
            "every alpha has its own headline beta",
            "give one per alpha",
        )


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The whole pipeline: one section per stage, one run directory.

    Attributes:
      run_dir: where every stage writes, and reads what the stages before it wrote.
      data: rollouts to use instead of those of run_dir: a directory written by `zip-rc`, a Parquet file, or a directory of Parquet
        files in the authors' schema. What grade, label and train read.
    """

    run_dir: str = ""
    data: str = ""
    task: TaskConfig = TaskConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig = ModelConfig()
    grid: GridConfig = GridConfig()
    mesh: MeshConfig = MeshConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    critic: TrainConfig = TrainConfig(learning_rate=1e-4)
    label: LabelConfig = LabelConfig()
    final: TrainConfig = TrainConfig(label="value", kl_weight=10.0)
    lite: TrainConfig = TrainConfig(label="value", trainable="zip_rows", learning_rate=1e-3)
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists (for JSON next to outputs and inside checkpoints)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))
