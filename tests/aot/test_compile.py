"""Ahead-of-time compilation: reading compiled modules, counting by hand, abstract arguments,
errors, and one real compilation for TPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from zip_rc_jax.aot import programs
from zip_rc_jax.aot.analytic import (
    attention_flops,
    body_weights,
    decode_flops,
    kernel_flops,
    page_bytes,
    score_flops,
    step_attention_flops,
    train_flops,
)
from zip_rc_jax.aot.costs import CacheShape, Collective, Costs, Write, _valid_positions, measure
from zip_rc_jax.aot.hlo import Shape, executions, parse_instruction, parse_module, parse_shapes
from zip_rc_jax.aot.model_sizes import with_model
from zip_rc_jax.aot.report import Memory, Part, Program, Report, number, report_table, size
from zip_rc_jax.aot.topology import CHIPS, GIB, chip_of, parse_mesh, tpu_mesh
from zip_rc_jax.cli.compile import add_parser, config_of, run
from zip_rc_jax.cli.main import main
from zip_rc_jax.config import (
    MeshConfig,
    ModelConfig,
    PipelineConfig,
    PolicyConfig,
    SamplingConfig,
    TrainConfig,
)
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.batches import TrainBatch
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.network import TransformerNetwork
from zip_rc_jax.inference.sampler import Filters
from zip_rc_jax.inference.state import DecodeSpec, PoolSizes, empty_pool
from zip_rc_jax.models.attention.tpu import attend_pages
from zip_rc_jax.models.paged_cache import PagedCache, live_pages
from zip_rc_jax.models.transformer import init_params, param_axes, param_shapes
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training import step as train_module

pytestmark = pytest.mark.optimized  # operations of real programs are counted

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=512, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96,
    tied=True, max_positions=64, rope_theta=99.0
)  # fmt: skip
GRID = Grid((0.0, 0.5, 1.0), (0, 4, 8))  # 6 cells
TRAIN = TrainConfig(label="value", kl_weight=10.0, batch_rows=8, row_tokens=32, loss_chunk=64)


# Modules.


def module(entry: str, *others: str):
    """A module of a few lines; computations are given as `name: lines`."""

    def computation(text: str, prefix: str = "") -> str:
        name, _, lines = text.partition(":\n")
        return f"{prefix}%{name} (p: f32[]) -> f32[] {{\n{lines.rstrip()}\n}}\n"

    return parse_module(
        "HloModule m\n\n"
        + "\n".join(map(computation, others))
        + "\n"
        + computation("main:\n" + entry, "ENTRY ")
    )


def loop(
    bound: str = "constant(6)", step: int = 1, body: str = "", first: int = 0, test: str = ""
) -> tuple[str, ...]:
    """A module's computations with one while loop whose body also holds `body`."""
    entry = f"""  %first = s32[] constant({first})
  %init = (s32[], f32[4]) tuple(%first, %first)
  %loop = (s32[], f32[4]{{0}}) while(%init), condition=%cond, body=%body
"""
    cond = f"""cond:
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %bound = s32[]{{:T(128)}} {bound}
{test or "  ROOT %lt = pred[] compare(%i, %bound), direction=LT"}
"""
    inside = f"""body:
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %same = s32[]{{:T(128)S(6)}} copy(%i)
  %next = s32[] add(%same, %step)
{body}  ROOT %out = (s32[], f32[4]) tuple(%next, %i)
"""
    return entry, cond, inside


def test_shapes_hold_sizes_dtypes_and_memory_spaces():
    text = (
        "(bf16[8,1,512]{2,0,1:T(8,128)(2,1)S(1)}, /*index=1*/f32[4]{0:T(128)}, pred[3]{0}, "
        "s32[], u4[6])"
    )
    shapes = parse_shapes(text)
    assert shapes == (
        Shape("bf16", (8, 1, 512), 1),
        Shape("f32", (4,)),
        Shape("pred", (3,)),
        Shape("s32", ()),
        Shape("u4", (6,)),
    )
    assert [s.bytes for s in shapes] == [8192, 16, 3, 4, 3]
    assert [s.hbm_bytes for s in shapes] == [0, 16, 3, 4, 3]


def test_an_instruction_is_read_past_nested_parentheses():
    line = (
        "  ROOT %f.1 = (f32[2]{0:T(8,128)}, (s32[])) fusion(%a.1, /*index=1*/%b), kind=kLoop, "
        'calls=%c.2, metadata={op_name="jit(f)/dot"}'
    )
    found = parse_instruction(line)
    assert found is not None
    assert (found.name, found.opcode, found.operands, found.root) == (
        "f.1",
        "fusion",
        ("a.1", "b"),
        True,
    )
    assert (found.called("calls"), found.called("body"), found.op_name) == ("c.2", "", "jit(f)/dot")
    assert found.shapes == (Shape("f32", (2,)), Shape("s32", ()))
    assert parse_instruction("}") is None


def test_line_breaks_in_metadata_do_not_end_a_computation():
    text = (
        "ENTRY %main (p: f32[]) -> f32[] {\n  %k = f32[4] custom-call(), "
        'custom_call_target="tpu_custom_call", frontend_attributes={m={\n'
    )
    text += '"block": 1\n}}, metadata={op_name="attention"}\n  ROOT %c = f32[4] copy(%k)\n}\n'
    found = parse_module(text)
    assert [i.opcode for i in found.computations["main"].instructions] == ["custom-call", "copy"]
    assert found.computations["main"].instructions[0].op_name == "attention"
    assert measure(found, per_step=False).kernels == {"k": 1}
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("HloModule m\n")


def trips(*parts: str) -> tuple[int, bool]:
    """(times, per_step) of the addition in the body of the loop."""
    return next(
        (e.times, e.per_step) for e in executions(module(*parts)) if e.instruction.name == "next"
    )


def test_trip_counts_come_from_the_condition_start_and_step():
    assert trips(*loop()) == (6, False)
    assert trips(*loop(bound="constant(16)", step=2)) == (8, False)
    assert trips(*loop(bound="constant(7)", step=2, first=2)) == (3, False)
    assert trips(*loop(bound="constant(2)", first=5)) == (0, False)


def test_a_fused_condition_and_the_count_that_xla_states_are_read_too():
    test = "  ROOT %f = pred[] fusion(%i, %bound), kind=kLoop, calls=%less"
    less = (
        "less:\n  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n  ROOT %lt = pred[] "
        "compare(%a, %b), direction=LT\n"
    )
    assert trips(*loop(test=test), less) == (6, False)
    entry, cond, body = loop(bound="copy(%n)")
    stated = entry.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"28"}}'
    )
    assert trips(stated, cond, body) == (28, False)


def test_a_loop_that_depends_on_data_counts_once_and_separately():
    assert trips(*loop(bound="copy(%n)")) == (1, True)
    assert trips(*loop(test="  ROOT %both = pred[] and(%i, %bound)")) == (1, True)
    assert trips(*loop(test="  ROOT %gt = pred[] compare(%i, %bound), direction=GT")) == (1, True)
    body = (
        "  %d = f32[4,4] dot(%x, %y), lhs_contracting_dims={1}\n  %x = f32[4,2] copy(%x)\n  %y "
        "= f32[2,4] copy(%y)\n"
    )
    found = module(*loop(bound="copy(%n)", body=body))
    assert measure(found, per_step=True).matmul_flops == 2 * 4 * 4 * 2
    assert measure(found, per_step=False).matmul_flops == 0


def test_calls_branches_and_nested_loops_are_entered():
    inner = "\n".join(("call:", "  %p = f32[4] parameter(0)", "  ROOT %leaf = f32[4] negate(%p)"))
    body = (
        "  %x = f32[4] call(%i), to_apply=%call\n  %y = f32[4] conditional(%i, %i, %i), "
        "branch_computations={%call, %call}\n"
    )
    runs = [
        e.times for e in executions(module(*loop(body=body), inner)) if e.instruction.name == "leaf"
    ]
    assert runs == [6, 6, 6]


def test_what_a_sparse_core_runs_is_read_too():
    """A computation with a thread of its own ends in another line, and is called asynchronously."""
    text = (
        "%sparse (p: f32[]) -> f32[] {\n  %p = f32[4] parameter(0)\n  ROOT %leaf = f32[4] "
        "negate(%p)\n"
        '}, execution_thread="sparsecore"\n\nENTRY %main (p: f32[]) -> f32[] {\n  %p = f32[4] '
        "parameter(0)\n"
        '  %s = ((f32[4]), f32[4], u32[]) call-start(%p), async_execution_thread="sparsecore", '
        "to_apply=%sparse\n"
        "  ROOT %d = f32[4] call-done(%s)\n}\n"
    )
    found = parse_module(text)
    assert list(found.computations) == ["sparse", "main"]
    assert [e.times for e in executions(found) if e.instruction.name == "leaf"] == [1]
    assert measure(found, per_step=False).bytes == 32


# Operations.


def flops(entry: str, *others: str) -> int:
    return measure(module(entry, *others), per_step=False).matmul_flops


def test_dots_count_two_per_multiply_add():
    assert flops(
        "  %a = f32[3,5,7] copy(%a)\n  %b = f32[7,5,2] copy(%b)\n  %d = f32[3,2] dot(%a, %b), "
        "lhs_contracting_dims={1,2}\n"
    ) == (2 * 3 * 2 * 5 * 7)


def test_convolutions_count_like_the_dots_they_stand_for():
    plain = (
        "  %a = bf16[8,64] copy(%a)\n  %b = bf16[512,64] copy(%b)\n  %c = f32[8,512] "
        "convolution(%a, %b), dim_labels=bf_oi->bf\n"
    )
    assert flops(plain) == 2 * 8 * 512 * 64
    # A batched dot of 4 matrices [8, 16] x [16, 32], as XLA writes it for TPU: nothing may overlap.
    batched = """  %a = bf16[4,8,16] copy(%a)
  %b = bf16[4,16,32] copy(%b)
  %c = f32[4,8,32] convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
"""  # noqa: E501
    assert flops(batched) == 2 * 4 * 8 * 16 * 32


def test_positions_in_the_padding_do_not_count():
    # A causal convolution of 3 taps over 5 positions: 3 + 3 + 3 + 2 + 1 pairs read the input.
    assert (
        _valid_positions(size=5, kernel=3, out=5, stride=1, pad=2, dilation=1, kernel_dilation=1)
        == 12
    )
    assert (
        _valid_positions(size=4, kernel=2, out=3, stride=1, pad=0, dilation=1, kernel_dilation=1)
        == 6
    )


def test_what_is_fused_counts_however_deep():
    inner = "inner:\n  %a = f32[4,2] parameter(0)\n  %b = f32[2,4] parameter(1)\n"
    inner += "  ROOT %d = f32[4,4] dot(%a, %b), lhs_contracting_dims={1}\n"
    outer = "outer:\n  %a = f32[4,2] parameter(0)\n  %b = f32[2,4] parameter(1)\n"
    outer += "  %f = f32[4,4] fusion(%a, %b), calls=%inner\n  ROOT %r = f32[4,4] add(%f, %f)\n"
    entry = (
        "  %a = f32[4,2] copy(%a)\n  %b = f32[2,4] copy(%b)\n  ROOT %f = f32[4,4] fusion(%a, "
        "%b), calls=%outer\n"
    )
    found = measure(module(entry, inner, outer), per_step=False)
    assert (found.matmul_flops, found.vector_flops) == (64, 16)


# Bytes.


def moved(entry: str, *others: str) -> int:
    return measure(module(entry, *others), per_step=False).bytes


HELD = """  %cache = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[]{:S(2)} parameter(2)
"""


def test_bytes_are_those_of_hbm():
    assert moved(HELD + "  ROOT %r = bf16[8,128] negate(%cache)\n") == 2 * 2048
    assert moved(HELD + "  ROOT %r = bf16[8,128]{1,0:S(1)} negate(%near)\n") == 0
    assert (
        moved(HELD + "  ROOT %r = (bf16[8,128]{1,0:S(1)}, bf16[8,128], u32[]) copy-start(%cache)\n")
        == 2048
    )
    assert (
        moved(HELD + "  ROOT %r = (bf16[8,128], bf16[8,128]{1,0:S(1)}, u32[]) copy-start(%near)\n")
        == 2048
    )
    assert moved(HELD + "  ROOT %r = bf16[1,128]{1,0:S(1)} dynamic-slice(%cache, %i, %i)\n") == 256


def test_a_fused_slice_reads_the_slice_and_a_fused_update_writes_the_update():
    read = """read:
  %whole = bf16[8,128] parameter(0)
  %b = bf16[8,128] bitcast(%whole)
  %i = s32[] parameter(1)
  ROOT %s = bf16[1,128] dynamic-slice(%b, %i, %i)
"""
    assert (
        moved(HELD + "  ROOT %f = bf16[1,128]{1,0:S(1)} fusion(%cache, %i), calls=%read\n", read)
        == 256
    )
    nested = "nested:\n  %whole = bf16[8,128] parameter(0)\n  %i = s32[] parameter(1)\n"
    nested += "  ROOT %f = bf16[1,128] fusion(%whole, %i), calls=%read\n"
    assert (
        moved(
            HELD + "  ROOT %f = bf16[1,128]{1,0:S(1)} fusion(%cache, %i), calls=%nested\n",
            read,
            nested,
        )
        == 256
    )
    write = """write:
  %whole = bf16[8,128] parameter(0)
  %new = bf16[1,128]{1,0:S(1)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = bf16[8,128] dynamic-update-slice(%whole, %new, %i, %i)
"""
    entry = (
        HELD
        + "  %row = bf16[1,128]{1,0:S(1)} parameter(3)\n  ROOT %f = bf16[8,128] fusion(%cache, "
        "%row, %i), calls=%write\n"
    )
    found = measure(module(entry, write), per_step=False, cache=CacheShape(8, 128, 1024))
    assert found.bytes == 256
    assert not found.cache_moves, "an update in place moves nothing"


def test_a_bitcast_inside_a_fusion_is_followed():
    only = "only:\n  %w = bf16[8,128] parameter(0)\n  ROOT %b = bf16[8,128] bitcast(%w)\n"
    outer = """outer:
  %w = bf16[8,128] parameter(0)
  %f = bf16[8,128] fusion(%w), calls=%only
  ROOT %n = bf16[8,128]{1,0:S(1)} negate(%f)
"""
    assert (
        moved(
            HELD + "  ROOT %f = bf16[8,128]{1,0:S(1)} fusion(%cache), calls=%outer\n", only, outer
        )
        == 2048
    )


def test_every_result_of_a_fusion_is_written():
    """A reduction to value and index, whose root is one instruction with two results."""
    both = (
        "both:\n  %w = bf16[8,128] parameter(0)\n  ROOT %r = (bf16[8], s32[8]) reduce(%w, %w), "
        "dimensions={1}, to_apply=%max\n"
    )
    assert (
        moved(HELD + "  ROOT %f = (bf16[8], s32[8]) fusion(%cache), calls=%both\n", both)
        == 2048 + 16 + 32
    )
    two = """two:
  %w = bf16[8,128]{1,0:S(1)} parameter(0)
  %n = bf16[8,128] negate(%w)
  ROOT %t = (bf16[8,128], bf16[8,128]) tuple(%n, %w)
"""
    assert (
        moved(HELD + "  ROOT %f = (bf16[8,128], bf16[8,128]) fusion(%near), calls=%two\n", two)
        == 2048
    ), "one is handed on"


# Collectives.


def collectives(entry: str, *others: str) -> dict[str, tuple[int, int]]:
    return measure(module(entry, *others), per_step=False).by_kind()


def test_collectives_count_by_kind_with_the_larger_side():
    entry = """  %part = bf16[4,128] parameter(0)
  %gathered = bf16[16,128] all-gather(%part), replica_groups={{0,1,2,3}}, dimensions={0}
  %summed = (f32[8], f32[2]) all-reduce(%x, %y), to_apply=%add
  %x = f32[8] copy(%x)
  %y = f32[2] copy(%y)
  %scattered = f32[2] reduce-scatter(%x), dimensions={0}
  %swapped = bf16[4,128] all-to-all(%part), dimensions={0}
"""
    assert collectives(entry) == {
        "all-gather": (1, 4096),
        "all-reduce": (1, 40),
        "reduce-scatter": (1, 32),
        "all-to-all": (1, 1024),
    }


def test_an_asynchronous_collective_counts_once():
    entry = """  %part = bf16[4,128] parameter(0)
  %start = (bf16[4,128], bf16[16,128]) all-gather-start(%part), dimensions={0}
  %done = bf16[16,128] all-gather-done(%start)
  %s = (bf16[4,128], bf16[4,128], u32[], u32[]) collective-permute-start(%part), source_target_pairs={{0,1}}
  %d = bf16[4,128] collective-permute-done(%s)
"""  # noqa: E501
    assert collectives(entry) == {"all-gather": (1, 4096), "collective-permute": (1, 1024)}


def test_a_collective_in_a_loop_counts_every_trip():
    found = collectives(
        *loop(body="  %r = f32[4] all-reduce(%x), to_apply=%add\n  %x = f32[4] copy(%x)\n")
    )
    assert found == {"all-reduce": (6, 96)}


def test_a_reduction_of_which_a_chip_keeps_its_part_is_a_reduce_scatter():
    fused = (
        "all-reduce-scatter.3:\n  %x = f32[8] parameter(0)\n  %r = f32[8] all-reduce(%x), "
        "to_apply=%add\n"
    )
    fused += "  ROOT %s = f32[2] dynamic-slice(%r, %x), dynamic_slice_sizes={2}\n"
    entry = (
        "  %x = f32[8] parameter(0)\n  ROOT %f = f32[2] fusion(%x), kind=kCustom, "
        "calls=%all-reduce-scatter.3\n"
    )
    assert collectives(entry, fused) == {"reduce-scatter": (1, 32)}


def test_a_collective_that_overlaps_a_loop_counts_where_it_begins():
    gather = (
        '  %g = bf16[16,128] all-gather(%p), dimensions={0}, frontend_attributes={chain_id="7"}\n'
    )
    start = "start:\n  %p = bf16[4,128] parameter(0)\n" + gather
    start += '  ROOT %c = (bf16[16,128], u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"\n'  # noqa: E501
    goes_on = (
        "goes_on:\n  %p = bf16[4,128] parameter(0)\n"
        + gather
        + "  ROOT %n = bf16[4,128] negate(%p)\n"
    )
    body = "  %part = bf16[4,128] copy(%part)\n  %f = bf16[4,128] fusion(%part), calls=%goes_on\n"
    entry, cond, inside = loop(body=body)
    entry = (
        "  %part = bf16[4,128] parameter(0)\n  %s = (bf16[16,128], u32[]) fusion(%part), "
        "kind=kCustom, calls=%start\n" + entry
    )
    assert collectives(entry, cond, inside, start, goes_on) == {"all-gather": (1, 4096)}


def test_moves_of_the_cache_are_found_and_reads_of_it_are_not():
    entry = """  %k = bf16[2,8,4,64,128] parameter(0)
  %copied = bf16[2,8,4,64,128]{4,3,2,0,1} copy(%k)
  %everywhere = bf16[2,16,4,64,128] all-gather(%k), dimensions={1}
  %scores = f32[8,4,64] negate(%scores)
  %row = bf16[2,1,4,64,128] dynamic-slice(%k, %i), dynamic_slice_sizes={2,1,4,64,128}
  %i = s32[] constant(0)
"""
    found = measure(
        module(entry), per_step=False, cache=CacheShape(64, 128, 8 * 4 * 64 * 128)
    ).cache_moves
    assert [(w.opcode, w.count) for w in found] == [("all-gather", 1), ("copy", 1)]
    assert not measure(module(entry), per_step=False, cache=CacheShape(32, 128, 1)).cache_moves
    assert not CacheShape(128, 128, 1).matches(Shape("bf16", (4, 128))), (
        "one size does not stand for both"
    )


# By hand.


def test_weights_are_those_of_the_parameters():
    per_layer = 2 * 64 * 16 * (4 + 2) + 3 * 64 * 96
    assert body_weights(MODEL) == 3 * per_layer
    mixed = dataclasses.replace(MODEL, layer_types=("conv", "attention", "conv"), conv_kernel=3)
    assert body_weights(mixed) == 2 * (4 * 64 * 64 + 3 * 64 * 96) + per_layer
    for config in (MODEL, mixed):
        matrices = [
            x
            for x in jax.tree.leaves(param_shapes(config)["blocks"])
            if len(x.shape) > 2 and x.shape[1] != 3
        ]
        assert body_weights(config) == sum(x.size for x in matrices)
    assert attention_flops(mixed, queries=7, keys=5) == 7 * 5 * 4 * 4 * 16, (
        "one attention layer: scores and values, 4 heads of 16"
    )


def test_train_flops_by_hand():
    tokens, body = 8 * 32, body_weights(MODEL)
    scores, table, head = 4 * tokens * 32 * 64 * 3, 2 * tokens * 512 * 64, 2 * tokens * 6 * 64
    found = train_flops(MODEL, TRAIN, 6, "cpu")
    assert found.forward == 2 * body * tokens + scores + table + head
    assert found.backward == 2 * found.forward
    assert found.teacher == 2 * body * tokens + scores + table
    assert found.recomputed == 2 * body * tokens + scores - 2 * tokens * 3 * 64 * 96
    assert (found.attention, found.kernels) == (5 * scores, 0)
    assert found.useful == 8 * body * tokens + 4 * scores + 4 * table + 3 * head, (
        "6 N D, and 2 N D of the teacher"
    )
    for kind in ("forward", "reverse"):
        assert train_flops(MODEL, dataclasses.replace(TRAIN, kl_kind=kind), 6, "cpu") == found, (
            "no logits are computed twice"
        )
    critic = train_flops(MODEL, dataclasses.replace(TRAIN, kl_weight=0.0), 6, "cpu")
    assert (critic.teacher, critic.forward) == (0, 2 * body * tokens + scores + head)
    lite = TrainConfig(trainable="zip_rows", batch_rows=8, row_tokens=32)
    assert train_flops(MODEL, lite, 6, "cpu").total == 2 * body * tokens + scores + 2 * head
    cached = dataclasses.replace(lite, cache_features=True)
    assert (
        train_flops(MODEL, cached, 6, "cpu").total,
        train_flops(MODEL, cached, 6, "cpu").attention,
    ) == (2 * head, 0)


def test_long_rows_count_the_blocks_that_their_attention_runs():
    """2,048 tokens: 4 blocks of 512 with XLA, 2 of 1,024 in the kernel; a window of 512 leaves a
    block and the one before it."""
    model = dataclasses.replace(
        MODEL, layer_types=("attention", "sliding", "sliding"), sliding_window=512
    )
    train = dataclasses.replace(TRAIN, row_tokens=2048)
    one_block = 2 * 8 * 512 * 512 * 4 * 16
    assert score_flops(model, train, "gpu") == {
        "attention": 10 * one_block,
        "sliding": 2 * 7 * one_block,
    }
    assert score_flops(model, train, "cpu") == {
        "attention": 9 * one_block,
        "sliding": 2 * 21 * one_block // 4,
    }, "8 blocks of 256"
    assert score_flops(model, train, "tpu") == {
        "attention": 3 * 4 * one_block,
        "sliding": 2 * 3 * 4 * one_block,
    }
    gpu, tpu = (train_flops(model, train, 6, platform) for platform in ("gpu", "tpu"))
    assert gpu.attention == (2 + 2 + 2 + 5) * 24 * one_block, (
        "teacher, forward, again for the backward pass, backward with scores again"
    )
    assert tpu.attention == tpu.kernels == (2 + 2 + 2 + 7) * 36 * one_block
    plain = train_flops(model, dataclasses.replace(train, attention="plain"), 6, "tpu")
    assert plain.repeated == 0
    assert plain.attention == 10 * 3 * 16 * one_block
    assert tpu.useful - gpu.useful == 8 * 12 * one_block
    assert (gpu.repeated, tpu.repeated) == (1 * 24 * one_block, 3 * 36 * one_block), (
        "scores, and twice with their gradient"
    )
    calls = {
        "splash_mha_fwd_segmented": 9,
        "splash_mha_dq_segmented": 3,
        "splash_mha_dkv_segmented": 3,
        "other": 5,
    }
    assert kernel_flops(model, train, "tpu", calls) == (9 * 2 + 3 * 3 + 3 * 4) * 12 * one_block


@pytest.mark.parametrize(
    ("length", "sliding", "full"), [(1, 1, 1), (16, 1, 1), (17, 2, 2), (50, 2, 4)]
)
def test_a_step_reads_the_pages_that_its_sequences_see(length, sliding, full):
    """Two layers of each type and a convolution; a window of ten positions, pages of 16."""
    model = dataclasses.replace(
        MODEL,
        n_layers=5,
        layer_types=("attention", "sliding", "conv", "attention", "sliding"),
        sliding_window=10,
        conv_kernel=3,
    )
    page = 2 * 16 * 2 * 16 * 2  # keys and values, slots, heads, channels, bytes
    assert page_bytes(model, [length], 16, 2) == 2 * (sliding + full) * page
    seen = 2 * (length + min(length, 10))
    assert step_attention_flops(model, [length]) == 4 * seen * 4 * 16
    assert page_bytes(model, [length, 1], 16, 2) == (2 * (sliding + full) + 4) * page
    assert step_attention_flops(model, [length, 1]) == 4 * (seen + 4) * 4 * 16


def test_decode_flops_by_hand():
    assert decode_flops(MODEL, rows=5, slots=40) == 5 * (
        2 * body_weights(MODEL) + 2 * 512 * 64 + 4 * 40 * 64 * 3
    )


MIXED = dataclasses.replace(
    MODEL, n_layers=5, layer_types=("conv", "attention", "conv", "attention", "conv"), conv_kernel=3
)
LITE = {"kl_weight": 0.0, "trainable": "zip_rows"}
# Four blocks a row, several chunks of the loss.
LONG = {"row_tokens": 1000, "attention": "chunked", "loss_chunk": 1200, "batch_rows": 2}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {}),
        (MODEL, {"kl_weight": 0.0}),
        (MODEL, LITE),
        (MIXED, {}),
        (MODEL, {"kl_kind": "forward"}),
        (MIXED, LONG),
        (MODEL, {"cache_teacher": True}),
    ],
    ids=["final", "critic", "lite", "mixed", "full", "long", "cached"],
)
def test_the_train_step_takes_the_operations_counted_by_hand(model, options):
    """On one CPU device, where XLA keeps the products as they were written.

    Of packed rows, all blocks count.
    """
    layout = Layout(make_mesh(), TRAIN_RULES)
    train = dataclasses.replace(TRAIN, **options)
    head = programs.head_for(model, GRID, "value")
    state = programs.abstract_state(layout, model, head, train)
    settings = train_module.TrainSpec(model, head, layout, train)
    teacher = programs.abstract_teacher(state, train)
    lowered = train_module.train_step.lower(
        settings, state, teacher, programs.abstract_batch(layout, model, train)
    )
    found = measure(parse_module(lowered.compile().as_text()), per_step=False)
    assert found.matmul_flops == pytest.approx(
        train_flops(model, train, GRID.n_cells, "cpu").total, rel=0.002
    )


# Abstract arguments.


def describe(tree):
    """Shape, dtype and layout of every leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)


def test_the_abstract_state_is_the_one_that_training_makes():
    layout = Layout(make_mesh(fsdp=4, tensor=2), TRAIN_RULES)
    head = programs.head_for(MODEL, GRID, "value")
    params = {"body": init_params(MODEL, 0), "zip_rows": jnp.zeros((GRID.n_cells, MODEL.d_model))}
    placed = layout.shard(params, {"body": param_axes(MODEL), "zip_rows": ("cells", "embed")})
    for train in (TRAIN, TrainConfig(trainable="zip_rows")):
        real = train_module.init_state(placed, train)
        real = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, layout.sharding(())), real)
        assert describe(programs.abstract_state(layout, MODEL, head, train)) == describe(real)


def test_the_abstract_batch_has_every_field():
    layout = Layout(make_mesh(data=2, fsdp=4), TRAIN_RULES)
    batch = programs.abstract_batch(layout, MODEL, TRAIN)
    optional = ("hidden", "teacher", "weight")
    assert all(x is not None for name, x in vars(batch).items() if name not in optional)
    by_rollout = dataclasses.replace(TRAIN, mean_over="rollouts")
    assert programs.abstract_batch(layout, MODEL, by_rollout).weight.shape == (8, 32)
    assert {f.name for f in dataclasses.fields(TrainBatch)} == set(vars(batch))
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape) == (1, 32)
    cached = TrainConfig(trainable="zip_rows", cache_features=True, batch_rows=8, row_tokens=32)
    assert programs.abstract_batch(layout, MODEL, cached).hidden.shape == (8, 32, 64)
    teacher = programs.abstract_batch(
        layout, MODEL, dataclasses.replace(TRAIN, cache_teacher=True)
    ).teacher
    assert [x.shape for x in teacher] == [(8, 32, 32)] * 2


@pytest.mark.parametrize("page", [0, 8])
def test_the_abstract_pool_is_the_one_that_the_engine_makes(page):
    layout = Layout(make_mesh(data=4, tensor=2), DECODE_RULES)
    head = programs.head_for(MODEL, GRID, "value")
    settings = DecodeSpec(
        TransformerNetwork(MODEL, layout, "bfloat16", page=page),
        head,
        MODEL.vocab_size,
        Filters.of([SamplingConfig()]),
        4,
    )
    sizes = PoolSizes(slots=3, tokens=32, pages=9 if page else 4)
    pool = programs.abstract_pool(settings, sizes)
    assert describe(pool) == describe(empty_pool(settings, sizes))
    # keys and values, layers, pages, heads of one of two chips, slots, channels, bytes
    assert programs.shard_bytes(pool.cache) == 2 * 3 * sizes.pages * 1 * (page or 32) * 16 * 2


def test_a_move_of_the_cache_has_at_least_a_layers_share_however_the_layers_are_stacked(
    monkeypatch,
):
    """A stack of three attention layers and one of a single one, among convolutions: what one chip
    holds of a layer is the same in both."""
    kinds = ("conv", "attention") * 3 + ("attention",)
    model = dataclasses.replace(MODEL, n_layers=7, layer_types=kinds, conv_kernel=3)
    # of 16 sequences on one of four shards, with a page each; one of two heads for keys
    width = 4
    pages = {
        "half of a layer": width // 2,
        "a layer": width,
        "two layers": 2 * width,
        "a page of three layers": 3,
        "a stack": 3 * width,
    }
    shapes = {name: f"bf16[1,{count},1,128,32]" for name, count in pages.items()}
    copies = "".join(f"  %k{i} = {shape} copy(%k{i})\n" for i, shape in enumerate(shapes.values()))
    entry, *others = loop(bound="copy(%n)", body=copies)
    monkeypatch.setattr(programs, "tpu_mesh", lambda *_: make_mesh(data=4, tensor=2))
    monkeypatch.setattr(
        programs,
        "_compile",
        lambda function, *_: programs._Compiled(function.__name__, None, "", "HLO", 0.0, 0.0),
    )
    monkeypatch.setattr(programs, "parse_module", lambda _: module(copies + entry, *others))
    _, advance, edit = programs.compile_decode(
        PipelineConfig(model=model), "v5e:2x4", rows=4 * width, context=32
    ).programs

    def moved(part: Part) -> set[str]:
        assert part.costs is not None
        return {
            name
            for name, shape in shapes.items()
            if shape in [write.shape for write in part.costs.cache_moves]
        }

    for part in advance.parts + edit.parts:  # a page of three layers is less than a layer
        assert moved(part) == {"a layer", "two layers", "a stack"}


def test_sizes_that_do_not_divide_are_named():
    layout = Layout(make_mesh(fsdp=8), TRAIN_RULES)
    with pytest.raises(UsageError, match=r"axis 'batch' of size 6: .* 8 devices"):
        programs.abstract_batch(layout, MODEL, dataclasses.replace(TRAIN, batch_rows=6))
    with pytest.raises(
        UsageError,
        match=r"axis 'kv_heads' of size 2: it does not divide over mesh axes \['tensor'\] of 8 "
        r"devices",
    ):
        programs.abstract_decode_params(
            Layout(make_mesh(tensor=8), DECODE_RULES), MODEL, "bfloat16"
        )
    with pytest.raises(UsageError, match=r"the vocabulary ends at 3"):
        programs.head_for(dataclasses.replace(MODEL, vocab_size=4), GRID, "value")


# Topologies and the command.


def test_meshes_are_parsed_and_refused():
    assert parse_mesh("fsdp=8,tensor=2", 16, MeshConfig()) == {"data": 1, "fsdp": 8, "tensor": 2}
    assert parse_mesh("", 16, MeshConfig()) == {"data": 1, "fsdp": 16, "tensor": 1}
    assert parse_mesh("", 16, MeshConfig(data=-1, fsdp=2, tensor=2)) == {
        "data": 4,
        "fsdp": 2,
        "tensor": 2,
    }
    with pytest.raises(UsageError, match="do not divide by 3"):
        parse_mesh("", 16, MeshConfig(tensor=3))
    with pytest.raises(UsageError, match="make the product 16"):
        parse_mesh("", 16, MeshConfig(fsdp=8))
    for text, message in [
        (
            "fsdp=8",
            r"mesh 'fsdp=8': it has 8 devices and the topology 16\. Fix: make the product 16",
        ),
        ("model=16", r"'model=16' is no axis with a size\. Fix: give axes of data, fsdp, tensor"),
        ("fsdp=x", r"'fsdp=x' is no axis"),
        ("fsdp=0", r"'fsdp=0' is no axis"),
        ("16", r"'16' is no axis"),
    ]:
        with pytest.raises(UsageError, match=message):
            parse_mesh(text, 16, MeshConfig())


def test_unknown_chips_and_a_missing_compiler_are_named(monkeypatch):
    with pytest.raises(
        UsageError,
        match=r"topology 'v9:2x2': the chips known here are v5e, v5p, v6e\. Fix: use for example "
        r"v5e:2x2",
    ):
        tpu_mesh("v9:2x2", "", MeshConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError,
        match=r"libtpu, the TPU compiler, is not installed\. Fix: run pip install -e '\.\[tpu\]'",
    ):
        tpu_mesh("v5e:2x2", "", MeshConfig())
    assert chip_of("v5p:2x2x2").hbm == 95 * GIB


def test_stage_dtype_and_context_are_checked_before_anything_is_compiled():
    config = PipelineConfig(model=MODEL)
    with pytest.raises(
        UsageError, match=r"stage 'all': the stages are policy, critic, final, lite"
    ):
        programs.compile_train(config, "all", "v5e:2x2")
    with pytest.raises(UsageError, match=r"dtype 'int8'"):
        programs.compile_decode(config, "v5e:2x2", rows=8, context=32, dtype="int8")
    with pytest.raises(UsageError, match=r"context 65: the model has 64 positions"):
        programs.compile_decode(config, "v5e:2x2", rows=8, context=65)
    for length in (0, 65):
        with pytest.raises(UsageError, match=rf"lengths 5,{length}: a row holds 1 to 64 tokens"):
            programs.compile_decode(config, "v5e:2x2", rows=8, context=64, lengths=[5, length])
    with pytest.raises(UsageError, match=r"rows 0, prompt 512"):
        programs.compile_decode(config, "v5e:2x2", rows=0, context=64)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(["compile", *argv])


def test_the_command_reads_sizes_from_the_config_or_the_model(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {d_model: 96}\nfinal: {row_tokens: 64}\n")
    arguments = parse(
        "train",
        str(path),
        "final.row_tokens=128",
        "--stage",
        "final",
        "--topology",
        "v5e:2x2",
        "--mesh",
        "fsdp=4",
    )
    assert (config_of(arguments).model.d_model, config_of(arguments).final.row_tokens) == (96, 128)
    assert (arguments.what, arguments.stage, arguments.mesh) == ("train", "final", "fsdp=4")
    decode = parse("decode", "embedded:chain_sum_policy", "--topology", "v5e:2x4")
    assert (config_of(decode).model.d_model, decode.context, decode.dtype, decode.rows) == (
        96,
        8192,
        "bfloat16",
        None,
    )
    with pytest.raises(
        UsageError, match=r"config_or_model 'nowhere': there is no such file or directory"
    ):
        config_of(parse("decode", "nowhere", "--topology", "v5e:2x4"))
    with pytest.raises(
        UsageError, match=r"overrides \['decode\.n=2'\]: they belong to a config file"
    ):
        config_of(
            parse("decode", "embedded:chain_sum_policy", "decode.n=2", "--topology", "v5e:2x4")
        )


def test_a_policy_that_is_not_here_needs_its_sizes():
    given = PipelineConfig(policy=PolicyConfig(path="Qwen/Qwen3-1.7B"), model=MODEL)
    assert with_model(given, "c.yaml").model == MODEL
    with pytest.raises(
        UsageError,
        match=r"policy\.path='Qwen/Qwen3-1\.7B' of c\.yaml: it is not on this machine, and there "
        r"is no model",
    ):
        with_model(dataclasses.replace(given, model=ModelConfig()), "c.yaml")
    here = with_model(
        dataclasses.replace(given, policy=PolicyConfig(path="embedded:chain_sum_policy")), "c.yaml"
    )
    assert here.model != MODEL, "a policy that is here says its sizes itself"


# The table.


def report(peak: int = 2 * GIB) -> Report:
    costs = Costs(
        matmul_flops=3_000_000_000,
        vector_flops=10,
        bytes=4 * 2**20,
        collectives=(
            Collective(
                "all-gather",
                "bf16[16,128]",
                28,
                28 * 4096,
                "jit(f)/while/body/closed_call/dot_general",
            ),
        ),
        cache_moves=(Write("copy", "bf16[28,8,8,1024,128]", 2, 448 * 2**20, "jit(f)/gather"),),
        writes=(
            Write("fusion", "f32[2048,151936]", 16, 1244659712, "jit(f)/loss"),
            Write("copy", "s32[4]", 1, 16, ""),
        ),
        kernels={"splash_mha_fwd": 2},
    )
    memory = Memory(
        arguments=GIB, outputs=GIB, aliased=GIB, temporaries=GIB, code=5 * 2**20, peak=peak
    )
    repeated = {"kernel_flops": 500_000_000, "repeated_flops": 500_000_000}
    part = Part(
        "one step", costs, 2_000_000_000, 4_000_000_000, 2**20, "weights read once", **repeated
    )
    idle = Part("besides", dataclasses.replace(costs, bytes=10, collectives=()), 0, 0, 0, "needed")
    lost = Program(
        "advance", None, "Ran out of memory", (Part("a step", None, 10, 20, 0, ""),), 0.0, 1.0
    )
    return Report(
        "train final",
        CHIPS["v5e"],
        16,
        (Program("train_step", memory, "", (part, idle), 1.0, 60.0), lost),
    )


def test_the_table_says_what_fits_and_what_moves():
    text = report_table(report())
    for line in (
        "peak 2.00 GiB of 16.00 GiB: fits with 10% to spare",
        "arguments 1.00 GiB, outputs 1.00 GiB (of them in place 1.00 GiB), temporaries 1.00 GiB, "
        "code 5.0 MiB",
        "products   3.5 G; by hand 4.0 G (0.88 times), useful 2.0 G",
        "by hand = useful + 2.0 G recomputed, of it 500.0 M scores inside attention (1.00 times "
        "without these)",
        "kernels    2 x splash_mha_fwd: 500.0 M of these",
        "HBM bytes  4.0 MiB; weights read once 1.0 MiB (4.0 times)",
        "network    all-gather 28 x, 112.0 KiB",
        "all-gather 28 x bf16[16,128], 112.0 KiB: jit(f)/dot_general",
        "CACHE MOVES\n      copy 2 x bf16[28,8,8,1024,128], 448.0 MiB each: jit(f)/gather",
        "largest arrays written\n      fusion 16 x f32[2048,151936], 1.16 GiB each: jit(f)/loss",
        "DOES NOT FIT: Ran out of memory",
        "not compiled; by hand 10, 20 with what is recomputed",
    ):
        assert line in text, text
    assert "besides" not in text, "a part that does nothing is left out"
    assert max(map(len, text.splitlines())) <= 140
    assert [p.fits(CHIPS["v5e"]) for p in report().programs] == [True, False]
    assert not report().fits
    assert "TOO LARGE for 10% to spare" in report_table(report(peak=int(14.5 * GIB)))
    (step, _) = report().programs
    crowded = dataclasses.replace(report(), programs=(dataclasses.replace(step, beside=12 * GIB),))
    assert "peak 14.00 GiB of 16.00 GiB: fits" in report_table(crowded)
    assert "code 5.0 MiB, beside it 12.00 GiB" in report_table(crowded)
    assert not dataclasses.replace(step, beside=13 * GIB).fits(CHIPS["v5e"]), (
        "what the program does not take is in the memory too"
    )


@pytest.mark.parametrize(("most", "good"), [(math.inf, True), (0.876, True), (0.874, False)])
def test_a_program_that_spends_too_many_operations_is_not_good(monkeypatch, capsys, most, good):
    """They are 0.875 times those by hand. Parts without an expectation do not count."""
    found = dataclasses.replace(report(), programs=report().programs[:1], most_flops=most)
    monkeypatch.setattr("zip_rc_jax.cli.compile.compile_from", lambda arguments: found)
    assert found.good == good
    assert run(argparse.Namespace(), []) == (0 if good else 1)
    assert (
        f"TOO MANY: at most {most} times those by hand are allowed" in capsys.readouterr().out
    ) != good


def test_sizes_and_numbers_for_reading():
    assert [size(x) for x in (0, 1023, 1536, 3 * 2**20, 2.5 * GIB)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "2.50 GiB",
    ]
    assert [number(x) for x in (7, 1500, 2.5e6, 3e9, 4.25e12)] == [
        "7",
        "1.5 k",
        "2.5 M",
        "3.0 G",
        "4.25 T",
    ]


def test_the_command_exits_with_1_if_something_does_not_fit(monkeypatch, capsys):
    for found, status in (
        (report(), 1),
        (dataclasses.replace(report(), programs=report().programs[:1]), 0),
    ):
        monkeypatch.setattr(
            "zip_rc_jax.cli.compile.compile_from", lambda arguments, found=found: found
        )
        assert run(argparse.Namespace(), []) == status
        assert capsys.readouterr().out == report_table(found) + "\n"


# The real thing, in an environment with libtpu (`make compile-check`).


def test_two_processes_compile_at_the_same_time():
    pytest.importorskip("libtpu")
    imports = (
        "from zip_rc_jax.aot.topology import tpu_mesh; from zip_rc_jax.config import MeshConfig; "
    )
    program = imports + "print(tpu_mesh('v5e:2x2', '', MeshConfig()).size, flush=True); input()"
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # the first still holds libtpu when the second loads it
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"4\n"


def test_a_small_model_compiles_for_tpu():
    pytest.importorskip("libtpu")
    model = dataclasses.replace(
        MODEL, d_model=256, n_heads=8, n_kv_heads=4, head_dim=128, d_ff=512, max_positions=16384
    )
    final = dataclasses.replace(TRAIN, row_tokens=1024, loss_chunk=2048, compute_dtype="bfloat16")
    config = PipelineConfig(model=model, final=final)
    trained = programs.compile_train(config, "final", "v5e:2x2", "fsdp=4")
    (step,) = trained.programs
    (part,) = step.parts
    assert trained.fits
    assert step.memory is not None
    assert part.costs is not None
    assert part.found_flops == pytest.approx(part.expected_flops, rel=0.05)
    assert part.kernel_flops == train_flops(model, final, GRID.n_cells, "tpu").kernels // 4, (
        "the long rows go through the kernel"
    )
    assert part.costs.matmul_flops > step.xla_flops, "XLA counts every loop body once"
    assert "all-gather" in part.costs.by_kind(), "parameters are sharded"
    summed = [c.shape for c in part.costs.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    assert any("f32[512,256]" in shape for shape in summed)
    assert not any("bf16" in shape for shape in summed), (
        "gradients are summed over the chips in float32"
    )
    assert step.memory.aliased > 0.9 * step.memory.outputs, "the state is updated in place"

    own = dataclasses.replace(config, mesh=MeshConfig(fsdp=2, tensor=2))
    assert "fsdp=2 tensor=2" in programs.compile_train(own, "final", "v5e:2x2").title

    decoded = programs.compile_decode(config, "v5e:2x2", "data=2,tensor=2", rows=16, context=16384)
    prefill, advance, edit = decoded.programs
    assert [p.name for p in decoded.programs] == ["prefill", "advance", "edit"]
    one_step, interval = (p.costs for p in advance.parts)
    assert one_step is not None
    assert interval is not None
    assert one_step.kernels == {"attend_pages": model.n_layers}
    assert advance.parts[0].found_flops == pytest.approx(advance.parts[0].expected_flops, rel=0.05)
    assert advance.parts[0].found_bytes < 1.3 * advance.parts[0].expected_bytes, (
        "a step reads weights and pages once"
    )
    assert not one_step.cache_moves + interval.cache_moves
    assert not any(c.cache_moves for c in (part.costs for part in edit.parts) if c)
    assert not edit.parts[0].costs.collectives, "no cache crosses chips"
    with pytest.raises(UsageError, match=r"topology 'v5e:3x3': libtpu knows none of this name"):
        tpu_mesh("v5e:3x3", "", MeshConfig())
    assert [tpu_mesh(t, "", MeshConfig()).size for t in ("v5e:1x1", "v5p:2x2x2", "v6e:2x4")] == [
        1,
        8,
        8,
    ]
    assert report_table(decoded).count("fits with 10% to spare") == 3
    assert prefill.parts[0].costs is not None
    assert prefill.parts[0].costs.matmul_flops == pytest.approx(
        prefill.parts[0].expected_flops, rel=0.05
    )


@pytest.mark.slow
def test_a_shipped_config_fits_and_spends_what_it_must_as_the_command_prints_it(
    capsys, monkeypatch
):
    """Without --stage: the final one."""
    pytest.importorskip("libtpu")
    monkeypatch.chdir(ROOT)
    assert main(["compile", "train", "configs/lfm2_350m.yaml", "--topology", "v5e:4x4"]) == 0
    text = capsys.readouterr().out
    assert "train final" in text
    assert "per chip of 16, 16.00 GiB of memory" in text
    peak, most = (
        float(x)
        for x in re.search(
            r"peak ([\d.]+) GiB of ([\d.]+) GiB: fits with 10% to spare", text
        ).groups()
    )
    assert peak <= 0.9 * most
    found, by_hand, times = (
        float(x)
        for x in re.search(
            r"products +([\d.]+) T; by hand ([\d.]+) T \(([\d.]+) times\)", text
        ).groups()
    )
    assert times == pytest.approx(found / by_hand, abs=0.01)
    assert 0.98 < times <= 1.15
    assert float(re.search(r"\(([\d.]+) times without these\)", text).group(1)) > times
    assert "all-gather" in text
    assert "TOO MANY" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "rows"),
    [
        ("v5e:2x4", "data=8", 64),
        ("v5e:2x4", "data=2,tensor=4", 64),
        ("v5p:2x2x2", "data=8", 256),
    ],
)
def test_decoding_qwen3_reads_what_it_must_and_moves_no_cache(topology, mesh, rows):
    """Sequences of up to 32,768 tokens in bfloat16 on a pool that fills the chips: each is read
    only as far as it is long."""
    pytest.importorskip("libtpu")
    config = with_model(
        load_config(str(ROOT / "configs" / "qwen3_1.7b.yaml"), []),
        str(ROOT / "configs" / "qwen3_1.7b.yaml"),
    )
    lengths, context = [500, 30_000, 3000, 8000], 32_768
    report = programs.compile_decode(
        config, topology, mesh, rows=rows, context=context, lengths=lengths
    )
    assert report.fits, report_table(report)
    _, advance, edit = report.programs
    step, interval = advance.parts
    moved, besides = edit.parts
    assert step.costs
    assert interval.costs
    assert moved.costs
    assert besides.costs
    assert step.found_bytes <= 1.15 * step.expected_bytes, "weights and pages once"
    pages = rows // 4 * sum(-(-n // 128) for n in lengths)
    held = 2 * 28 * 8 * 128 * 2 * 128 * pages // 8  # bytes of a page's keys and values, per chip
    assert step.kernel_bytes == held
    assert step.found_flops == pytest.approx(step.expected_flops, rel=0.05)
    for costs in (step.costs, interval.costs, moved.costs, besides.costs):
        assert not costs.cache_moves
        assert not costs.collectives or "tensor" in mesh
    assert moved.costs.bytes + besides.costs.bytes <= 1.25 * moved.expected_bytes, (
        "what is copied is read and written once"
    )
    pool = advance.memory.outputs
    for program in report.programs:
        assert program.memory
        assert program.memory.aliased > 0.9 * program.memory.outputs, "in place"
        assert program.memory.temporaries < pool / 4, "there is no second pool"
    assert pool + edit.beside > 0.8 * report.chip.hbm, "the pages take what is left"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(16, 8, 128), (32, 8, 64), (9, 3, 64), (4, 1, 256)],
    ids=["Qwen3", "LFM2", "SmolLM2", "Gemma 3"],
)
def test_the_kernel_of_pages_compiles_for_every_family(heads, kv_heads, dim):
    """64 sequences of up to 32,768 tokens; it needs no second pool."""
    pytest.importorskip("libtpu")
    layout = Layout(tpu_mesh("v5e:1x1", "", MeshConfig(data=1, fsdp=1)), DECODE_RULES)
    rows, page, pages, layers, window = 64, 128, 640, 2, 1000 if dim == 256 else 0

    def abstract(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(()))

    def attend(q, kv, table, length):
        listed = live_pages(length, table, 1, page, window)
        cache = PagedCache(kv, layers)
        options = {"scale": 0.1, "window": window}
        return attend_pages(layout, q, cache, jnp.int32(1), listed, length, **options)

    for dtype in ("bfloat16", "float32"):
        pool = abstract((1, layers * pages, kv_heads, page, 2 * dim), dtype)
        arguments = (
            abstract((rows, 1, heads, dim), dtype),
            pool,
            abstract((rows, 32768 // page), "int32"),
            abstract((rows,), "int32"),
        )
        memory = jax.jit(attend).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < programs.shard_bytes(pool) / 20
