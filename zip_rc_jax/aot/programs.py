"""The programs of training and decoding, compiled for a TPU topology from shapes and shardings
alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from zip_rc_jax.aot.analytic import (
    body_weights,
    decode_flops,
    kernel_flops,
    page_bytes,
    step_attention_flops,
    train_flops,
)
from zip_rc_jax.aot.costs import CacheShape, Costs, measure
from zip_rc_jax.aot.hlo import parse_module
from zip_rc_jax.aot.report import Memory, Part, Program, Report
from zip_rc_jax.aot.topology import chip_of, tpu_mesh
from zip_rc_jax.config import (
    COMPUTE_DTYPES,
    TRAIN_STAGES,
    MeshConfig,
    ModelConfig,
    PipelineConfig,
    TrainConfig,
)
from zip_rc_jax.data.batches import TrainBatch
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead
from zip_rc_jax.inference import state as decode_state
from zip_rc_jax.inference.memory import PoolMemory, abstract_pool, shard_bytes
from zip_rc_jax.inference.network import TransformerNetwork, page_size
from zip_rc_jax.inference.sampler import Filters
from zip_rc_jax.inference.state import DecodeState
from zip_rc_jax.models.paged_cache import PagedCache, pages_of
from zip_rc_jax.models.transformer import param_axes, param_shapes
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, TRAIN_RULES, Layout
from zip_rc_jax.training import step as train_module
from zip_rc_jax.training.step import TrainState, cast_teacher, init_state, train_step

ANY_STEPS = 1000  # of a run whose length nobody knows yet; only the learning rate depends on it
MOST_FLOPS = 1.15  # of a training step, times those by hand


# Abstract arguments.


def _abstract(
    layout: Layout, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape))


def place(layout: Layout, shapes: Any, axes: Any) -> Any:
    """`shapes` with shardings; `axes` is the matching tree of logical names.

    Raises UsageError where a size does not divide.
    """
    return jax.tree.map(lambda s, a: _abstract(layout, s.shape, s.dtype, a), shapes, axes)


def head_for(model: ModelConfig, grid: Grid, label: str) -> ZipHead:
    """A head in the last rows of the vocabulary: where exactly it lies does not change what is
    compiled.

    Raises:
      UsageError: the vocabulary is smaller than the grid.
    """
    first = model.vocab_size - grid.n_cells
    head = ZipHead(grid, label, first, first)
    head.check(model.vocab_size)
    return head


def abstract_state(
    layout: Layout, model: ModelConfig, head: ZipHead, train: TrainConfig
) -> TrainState:
    """The train state as `training.trainer` lays it out: moments like their parameters, counters on
    every chip."""
    shapes = {
        "body": param_shapes(model),
        "zip_rows": jax.ShapeDtypeStruct((head.grid.n_cells, model.d_model), jnp.float32),
    }
    params = place(layout, shapes, {"body": param_axes(model), "zip_rows": ("cells", "embed")})
    state = jax.eval_shape(lambda p: init_state(p, train), params)
    placed = {
        _keys(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def like_params(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = placed.get(_keys(path)) or layout.sharding((None,) * leaf.ndim)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree_util.tree_map_with_path(like_params, state.opt_state)
    counter: Any = _abstract(layout, (), jnp.int32, ())
    return TrainState(params, opt_state, counter, counter)


def _keys(path: Any) -> tuple[str, ...]:
    """The dictionary keys of a path: those of a parameter, also inside an optimizer's own
    structures."""
    return tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))


def abstract_teacher(state: TrainState, train: TrainConfig) -> dict[str, Any] | None:
    """The frozen policy as `training.trainer` passes it: laid out like the student's body."""
    if not train.kl_weight or train.cache_teacher:
        return None
    body = state.params["body"]
    teacher = jax.eval_shape(lambda b: cast_teacher(b, train), body)
    return jax.tree.map(
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        teacher,
        body,
    )


def abstract_batch(layout: Layout, model: ModelConfig, train: TrainConfig) -> TrainBatch:
    """A packed batch, rows laid out as `training.trainer` does."""
    shape = (train.batch_rows, train.row_tokens)
    types = {
        "tokens": jnp.int32,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
        "labelled": jnp.bool_,
        "reward": jnp.float32,
        "remaining": jnp.int32,
        "censored": jnp.bool_,
        "targets": jnp.int32,
    }
    if train.mean_over == "rollouts":
        types["weight"] = jnp.float32
    fields: dict[str, Any] = {
        name: _abstract(layout, shape, dtype, ("batch", "sequence"))
        for name, dtype in types.items()
    }
    if train.cache_features:
        fields["hidden"] = _abstract(
            layout, (*shape, model.d_model), jnp.float32, ("batch", "sequence", "embed_act")
        )
    if train.cache_teacher:
        top, axes = (*shape, train.kl_top_k), ("batch", "sequence", None)
        fields["teacher"] = tuple(
            _abstract(layout, top, dtype, axes) for dtype in (jnp.int32, jnp.float32)
        )
    return TrainBatch(**fields)


def abstract_decode_params(layout: Layout, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """What `inference.engine` passes: the body, and the unembedding with the reserved rows folded
    in."""
    shapes = {
        "body": param_shapes(model),
        "table": jax.ShapeDtypeStruct((model.vocab_size, model.d_model), jnp.float32),
    }
    typed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), shapes)
    return place(layout, typed, {"body": param_axes(model), "table": ("vocab", "embed")})


# Compilation.


@dataclasses.dataclass(frozen=True)
class _Compiled:
    name: str
    memory: Memory | None
    error: str
    text: str
    xla_flops: float
    seconds: float

    def costs(self, *, per_step: bool, cache: CacheShape | None = None) -> Costs | None:
        return (
            measure(parse_module(self.text), per_step=per_step, cache=cache) if self.text else None
        )

    def program(self, *parts: Part, beside: int = 0) -> Program:
        return Program(
            self.name, self.memory, self.error, parts, self.xla_flops, self.seconds, beside
        )


def _compile(function: Any, *arguments: Any) -> _Compiled:
    """Lowers and compiles one jitted function.

    A program that is larger than the chip is an answer, not an error.
    """
    started = time.monotonic()
    name = function.__name__
    cached = jax.config.values["jax_enable_compilation_cache"]
    # A program for chips that are not there cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return _Compiled(name, None, reason, "", 0.0, time.monotonic() - started)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    m = compiled.memory_analysis()
    memory = Memory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        peak=m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes,
    )
    text, flops = compiled.as_text(), float(compiled.cost_analysis()["flops"])
    return _Compiled(name, memory, "", text, flops, time.monotonic() - started)


def compile_train(config: PipelineConfig, stage: str, topology: str, mesh: str = "") -> Report:
    """Compiles the training step of a stage.

    Args:
      config: its `model` section must hold the sizes of the model (`model_sizes.with_model` takes
        them from the policy).
      stage: "policy", "critic", "final" or "lite".
      topology: such as `v5e:4x4`.
      mesh: such as `fsdp=8,tensor=2`; empty: `config.mesh`, by default all chips on `fsdp`.

    Raises:
      UsageError: no libtpu, an unknown stage or topology, a mesh of another size, or sizes that do
        not divide over it.
    """
    if stage not in TRAIN_STAGES:
        raise UsageError(
            f"stage {stage!r}", f"the stages are {', '.join(TRAIN_STAGES)}", "choose one of them"
        )
    train: TrainConfig = config.policy.train if stage == "policy" else getattr(config, stage)
    if train.epochs:  # how many steps these are depends on the rollouts, and the program does not
        train = dataclasses.replace(train, steps=ANY_STEPS, epochs=0.0)
    model = config.model
    layout = Layout(tpu_mesh(topology, mesh, config.mesh), TRAIN_RULES)
    head = head_for(model, config.grid.grid(train.label), train.label)
    settings = train_module.TrainSpec(model, head, layout, train)
    state = abstract_state(layout, model, head, train)
    teacher = abstract_teacher(state, train)
    batch = abstract_batch(layout, model, train)
    compiled = _compile(train_step, settings, state, teacher, batch)
    chips = layout.mesh.size
    flops = train_flops(model, train, head.grid.n_cells, "tpu")
    costs = compiled.costs(per_step=False)
    part = Part(
        name=f"one step of {train.batch_rows} rows of {train.row_tokens} tokens",
        costs=costs,
        kernel_flops=kernel_flops(model, train, "tpu", costs.kernels) // chips if costs else 0,
        useful_flops=flops.useful // chips,
        expected_flops=flops.total // chips,
        repeated_flops=flops.repeated // chips,
        expected_bytes=2 * shard_bytes((state.params, state.opt_state)),
        expected="state read and written",
    )
    title = f"train {stage}: {_sizes(model)}, {_devices(topology, layout.mesh)}"
    return Report(title, chip_of(topology), chips, (compiled.program(part),), MOST_FLOPS)


def compile_decode(
    config: PipelineConfig,
    topology: str,
    mesh: str = "",
    *,
    rows: int,
    context: int,
    dtype: str = "bfloat16",
    prompt: int = 512,
    lengths: Sequence[int] = (),
) -> Report:
    """Compiles what the decoder runs: prefill, an interval of steps, and the copies that a branch
    makes. Its pool has as many pages as an engine would give it on this chip.

    Args:
      config: as for `compile_train`; window and sampling come from its `decode` section.
      topology: such as `v5e:2x4`.
      mesh: such as `data=4,tensor=2`; empty: all chips on `data`.
      rows: sequences of the pool, over all chips; all of them are stepped.
      context: tokens that a sequence may have, prompt and answer.
      dtype: of parameters and cache, one of `COMPUTE_DTYPES`.
      prompt: tokens of the prompts that one prefill takes; at most `context`.
      lengths: tokens that the sequences hold in the step whose operations and bytes are counted,
        repeated over all rows; empty: `context`. The program is the same.

    Raises:
      UsageError: as for `compile_train`, rows that do not divide over the mesh, or a context that
        the model does not have.
    """
    model, decode = config.model, config.decode
    _check_decode_sizes(model, rows=rows, context=context, dtype=dtype, prompt=prompt)
    lengths = _lengths_of_rows(lengths, rows, context)
    layout = Layout(tpu_mesh(topology, mesh, MeshConfig(data=-1, fsdp=1)), DECODE_RULES)
    layout.sharding(("batch",), (rows,))
    settings = decode_state.DecodeSpec(
        network=TransformerNetwork(model, layout, dtype, page=page_size("tpu")),
        head=head_for(model, config.grid.grid("value"), "value"),
        vocab_size=model.vocab_size,
        filters=Filters.of([decode.sampling]),
        window=decode.window,
    )
    chips, shards = layout.mesh.size, layout.mesh.shape["data"]
    width, prompt = rows // shards, min(prompt, context)

    # What the programs take: parameters and pool on the chips, small arrays from the host.
    params = abstract_decode_params(layout, model, dtype)
    decode = dataclasses.replace(decode, max_num_seqs=rows, n=min(decode.n, width))
    memory = PoolMemory(settings, params, decode, context, chip_of(topology).hbm)
    sizes, _ = memory.sizes(context, listed=True)
    pool = abstract_pool(settings, sizes)
    lanes = decode_state.bucket(1, width)
    page = settings.network.page
    prompts = decode_state.abstract_prompts(shards, lanes, prompt, pages_of(prompt, page))
    lanes_of_requests = decode_state.abstract_lanes(shards, width, pages_of(context, page))
    interval = jax.ShapeDtypeStruct((), jnp.int32)
    edits = decode_state.abstract_edits(shards)

    prefill = _compile(decode_state.prefill, settings, params, pool, prompts, prompt)
    advance = _compile(
        decode_state.advance, settings, params, pool, lanes_of_requests, interval, context
    )
    edit = _compile(decode_state.edit, settings, pool, edits, 0)

    # What each costs, beside what it must cost.
    programs = (
        prefill.program(_prefill_part(prefill, model, params, shards * lanes, prompt, chips)),
        advance.program(*_advance_parts(advance, model, params, pool, lengths, chips)),
        edit.program(*_edit_parts(edit, pool), beside=shard_bytes(params)),
    )
    title = (
        f"decode in {dtype}: {_sizes(model)}, {_devices(topology, layout.mesh)}, {rows} sequences "
        f"of {context:,} tokens, {sizes.pages:,} pages of {page} tokens for each of {shards} shards"
    )
    return Report(title, chip_of(topology), chips, programs)


def _check_decode_sizes(
    model: ModelConfig, *, rows: int, context: int, dtype: str, prompt: int
) -> None:
    """Raises UsageError for what no decode can have."""
    if dtype not in COMPUTE_DTYPES:
        raise UsageError(
            f"dtype {dtype!r}",
            f"parameters and cache are {' or '.join(COMPUTE_DTYPES)}",
            "choose one of them",
        )
    if not 1 <= context <= model.max_positions:
        raise UsageError(
            f"context {context}",
            f"the model has {model.max_positions} positions",
            "choose one within them",
        )
    if rows < 1 or prompt < 1:
        raise UsageError(
            f"rows {rows}, prompt {prompt}", "they count rows and tokens", "use positive numbers"
        )


def _lengths_of_rows(lengths: Sequence[int], rows: int, context: int) -> list[int]:
    """Tokens of every row. Raises UsageError for a length that no row can have."""
    for length in lengths:
        if not 1 <= length <= context:
            raise UsageError(
                f"lengths {','.join(map(str, lengths))}",
                f"a row holds 1 to {context} tokens, and {length} is none of these",
                "choose other lengths, or a larger context",
            )
    return list(itertools.islice(itertools.cycle(lengths or [context]), rows))


def _weight_bytes(params: dict[str, Any]) -> int:
    """What a step reads of the parameters on one chip: all but the table of embeddings."""
    body = {k: v for k, v in params["body"].items() if k not in ("embed", "unembed")}
    return shard_bytes([params["table"], body])


def _prefill_part(
    compiled: _Compiled,
    model: ModelConfig,
    params: dict[str, Any],
    prompts: int,
    tokens: int,
    chips: int,
) -> Part:
    # Prefill reads the unembedding for the last token of each prompt only.
    unread = 2 * prompts * (tokens - 1) * model.vocab_size * model.d_model
    flops = (decode_flops(model, prompts * tokens, tokens) - unread) // chips
    return Part(
        name=f"{prompts} prompts of {tokens} tokens",
        costs=compiled.costs(per_step=False),
        useful_flops=flops,
        expected_flops=flops,
        expected_bytes=_weight_bytes(params),
        expected="weights read once",
    )


def _advance_parts(
    compiled: _Compiled,
    model: ModelConfig,
    params: dict[str, Any],
    pool: DecodeState,
    lengths: Sequence[int],
    chips: int,
) -> tuple[Part, Part]:
    """Of one decode step of rows with `lengths` tokens, and of what an interval does once."""
    held, (page, itemsize) = shard_bytes(pool.cache), _page(pool)
    cache = _cache_shape(pool)
    costs = compiled.costs(per_step=True, cache=cache)
    # The kernel is called once a layer. What a call does depends on the lengths.
    layers = sum(kind != "conv" for kind in model.kinds)
    calls = costs.kernels.get("attend_pages", 0) if costs else 0
    attention = step_attention_flops(model, lengths) // chips
    pages = page_bytes(model, lengths, page, itemsize) // chips
    matrices = body_weights(model) + model.vocab_size * model.d_model
    flops = 2 * len(lengths) * matrices // chips + attention
    step = Part(
        name=f"one decode step of {len(lengths)} rows of {_range(lengths)} tokens",
        costs=costs,
        useful_flops=flops,
        expected_flops=flops,
        expected_bytes=_weight_bytes(params) + pages,
        expected="weights and pages read once",
        kernel_flops=attention * calls // layers,
        kernel_bytes=pages * calls // layers,
    )
    once = Part(
        name="once per interval of steps",
        costs=compiled.costs(per_step=False, cache=cache),
        useful_flops=0,
        expected_flops=0,
        expected_bytes=2 * (shard_bytes(pool) - held),
        expected="tokens, logits and joints of all rows read and written",
    )
    return step, once


def _range(lengths: Sequence[int]) -> str:
    least, most = min(lengths), max(lengths)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _edit_parts(compiled: _Compiled, pool: DecodeState) -> tuple[Part, Part]:
    """Of a page of one layer and the small state of a sequence copied, and of what comes on top."""
    small = dataclasses.replace(pool, cache=None)
    slot = shard_bytes(small) // pool.length.shape[1]
    copied = Part(
        name="a page of one layer and a slot copied in every shard",
        costs=compiled.costs(per_step=True, cache=_cache_shape(pool)),
        useful_flops=0,
        expected_flops=0,
        expected_bytes=2 * (_page_bytes(pool) + slot),
        expected="both read and written",
    )
    besides = Part(
        name="besides",
        costs=compiled.costs(per_step=False, cache=_cache_shape(pool)),
        useful_flops=0,
        expected_flops=0,
        expected_bytes=0,
        expected="needed",
    )
    return copied, besides


def _page(pool: DecodeState) -> tuple[int, int]:
    """Slots of a page, and bytes of a number in it."""
    stack = next(stack for stack in pool.cache.stacks.values() if isinstance(stack, PagedCache))
    return stack.page, stack.kv.dtype.itemsize


def _page_bytes(pool: DecodeState) -> int:
    """Of a page of one layer, on one chip."""
    stack = next(stack for stack in pool.cache.stacks.values() if isinstance(stack, PagedCache))
    return shard_bytes(stack.kv) // stack.kv.shape[1]


def _cache_shape(pool: DecodeState) -> CacheShape:
    """What tells the pages of one chip from other arrays, if they are those of at least one
    layer."""
    stacks = [stack for stack in pool.cache.stacks.values() if isinstance(stack, PagedCache)]
    # [1, L * P, K, page, 2 D]: stacks of mixed layer types differ in L
    shapes = [(stack.kv.sharding.shard_shape(stack.kv.shape), stack.layers) for stack in stacks]
    layer = max(math.prod(shape) // layers for shape, layers in shapes)
    _, _, _, slots, width = shapes[0][0]
    return CacheShape(slots, width, layer)


def _sizes(model: ModelConfig) -> str:
    return f"{model.n_layers} layers, d_model {model.d_model}, vocabulary {model.vocab_size}"


def _devices(topology: str, mesh: Mesh) -> str:
    return f"{topology} as " + " ".join(f"{name}={count}" for name, count in mesh.shape.items())
