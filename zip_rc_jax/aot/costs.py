"""What a compiled module does, per chip: floating-point operations, HBM bytes, collectives, and
moves of the decoding cache.

Counting follows XLA's own rules, except that loop bodies count once per iteration, and that only
arrays in HBM count as bytes: what the compiler keeps in vector memory costs no bandwidth.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from zip_rc_jax.aot.hlo import Computation, Instruction, Module, Shape, executions

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update",
    "domain", "add-dependency",
}  # fmt: skip
_ARITHMETIC = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "exponential",
    "exponential-minus-one", "log",
    "log-plus-one", "logistic", "tanh", "rsqrt", "sqrt", "negate", "cosine", "sine", "abs",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, shape and origin in a program, per chip.

    Attributes:
      kind: one of `COLLECTIVES`. An all-reduce is a reduce-scatter if each chip keeps only its
        part, whatever XLA calls it.
      shape: of the larger side (gathered result, or what is reduced), such as "bf16[512,1536]".
      count: how often it runs.
      bytes: `count` times the bytes of the larger side; over a ring, what a chip sends, except that
        an all-reduce sends it twice.
      op_name: where in the Python program it comes from.
    """

    kind: str
    shape: str
    count: int
    bytes: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Write:
    """An array that the program writes to HBM: a candidate for what fills the memory, or a copy
    that should not be there.

    Attributes:
      opcode, shape, op_name: what writes it, and from where in the Python program.
      count: how often.
      bytes: of one.
    """

    opcode: str
    shape: str
    count: int
    bytes: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """Per chip.

    Attributes:
      matmul_flops: 2 per multiply-add of dots and convolutions (XLA turns dots into convolutions on
        TPU).
      vector_flops: 1 per element of elementwise arithmetic, and per reduced element.
      bytes: read from and written to HBM.
      collectives: largest first.
      cache_moves: copies and collectives whose result has the slots and channels of the cache and
        at least one layer's share of it.
      writes: the largest arrays written to HBM, largest first.
      kernels: how often each hand-written (Pallas) kernel is called, by name; their operations are
        not in the counts above.
    """

    matmul_flops: int
    vector_flops: int
    bytes: int
    collectives: tuple[Collective, ...]
    cache_moves: tuple[Write, ...]
    writes: tuple[Write, ...]
    kernels: Mapping[str, int]

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """(count, bytes) of every kind of collective that occurs."""
        totals: dict[str, tuple[int, int]] = {}
        for c in self.collectives:
            count, total = totals.get(c.kind, (0, 0))
            totals[c.kind] = (count + c.count, total + c.bytes)
        return totals


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What tells an array that holds keys or values from others.

    Attributes:
      slots, head_dim: sizes that both occur in it.
      elements: of one layer's share on one chip; smaller arrays are not reported.
    """

    slots: int
    head_dim: int
    elements: int

    def matches(self, shape: Shape) -> bool:
        sizes = list(shape.dims)
        for size in (self.slots, self.head_dim):
            if size not in sizes:
                return False
            sizes.remove(size)
        return shape.elements >= self.elements


def measure(module: Module, *, per_step: bool, cache: CacheShape | None = None) -> Costs:
    """Costs of the part of a program outside loops of unknown length, or of one iteration of those
    loops.

    Args:
      per_step: one iteration of the loops whose trip count depends on data (the decode loop),
        rather than the rest of the program.
      cache: reports what moves arrays of this shape. A kernel that is given one reads a part of it,
        which no program tells: its bytes are left out.
    """
    matmul = vector = total = 0
    kernels: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
    writes: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
    moves: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
    for e in executions(module):
        if e.per_step != per_step:
            continue
        inside = _fused(module, e.computation, e.instruction)
        matmul += e.times * sum(matmul_flops(c, i) for c, i in inside)
        vector += e.times * sum(vector_flops(c, i) for c, i in inside)
        for _, i in inside:
            if _is_kernel(i):
                kernels[_kernel_name(i)] += e.times
        total += e.times * hbm_bytes(module, e.computation, e.instruction)
        if cache and _is_kernel(e.instruction):
            total -= e.times * _matching_operands(e.computation, e.instruction, cache)
        for c, i in inside:
            kind = _collective_kind(c, i)
            if not kind or not _begins(c, i):
                continue
            read, written = [c.by_name[name].shapes[0] for name in i.operands], _results(i)
            larger = max(read, written, key=lambda shapes: sum(s.bytes for s in shapes))
            calls[kind, " ".join(map(str, larger)), sum(s.bytes for s in larger), i.op_name] += (
                e.times
            )
            total += e.times * sum(s.hbm_bytes for s in (*read, *written))
            for shape in written:
                if cache and cache.matches(shape):
                    moves[kind, str(shape), shape.bytes, i.op_name] += e.times
        if _collective_kind(e.computation, e.instruction):
            continue
        for shape in written_arrays(module, e.instruction):
            writes[e.instruction.opcode, str(shape), shape.bytes, e.instruction.op_name] += e.times
            if cache and cache.matches(shape):
                moves[e.instruction.opcode, str(shape), shape.bytes, e.instruction.op_name] += (
                    e.times
                )
    return Costs(
        matmul_flops=matmul,
        vector_flops=vector,
        bytes=total,
        collectives=tuple(
            sorted(
                (Collective(k, s, n, n * b, o) for (k, s, b, o), n in calls.items()),
                key=lambda c: c.bytes,
                reverse=True,
            )
        ),
        cache_moves=tuple(
            sorted(
                (Write(k, s, n, b, o) for (k, s, b, o), n in moves.items()),
                key=lambda w: w.count * w.bytes,
            )[::-1]
        ),
        writes=tuple(
            sorted(
                (Write(k, s, n, b, o) for (k, s, b, o), n in writes.items()),
                key=lambda w: w.bytes,
                reverse=True,
            )
        ),
        kernels=dict(kernels),
    )


def _kernel_name(instruction: Instruction) -> str:
    """The name that a Pallas kernel was given, as far as XLA kept it."""
    return instruction.name.rstrip(".0123456789")


def _fused(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[Computation, Instruction]]:
    """The instruction, or what is fused into it, however deep."""
    if instruction.opcode != "fusion":
        return [(computation, instruction)]
    called = module.computations[instruction.called("calls")]
    return [fused for i in called.instructions for fused in _fused(module, called, i)]


# Operations.


def matmul_flops(computation: Computation, instruction: Instruction) -> int:
    """2 per multiply-add of a dot or convolution, 0 for anything else."""
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        lhs = computation.by_name[instruction.operands[0]].shapes[0]
        sizes = [lhs.dims[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2 * instruction.shapes[0].elements * math.prod(sizes)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Only positions inside the input count: XLA writes a batched dot as a convolution that is
    dilated until nothing overlaps."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.attributes[:200]
    left, right = (computation.by_name[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    fields = dict(
        re.findall(
            r"(\w+)=([\w\-]+)",
            next(iter(re.findall(r"window=\{([^}]*)\}", instruction.attributes)), ""),
        )
    )

    def field(name: str, number: int, default: str) -> str:
        return fields[name].split("x")[number] if name in fields else default

    flops = (
        2
        * out.dims[labels[3].index("b")]
        * out.dims[labels[3].index("f")]
        * right.dims[labels[2].index("i")]
    )
    for number in range(len(labels[3]) - 2):
        name = str(number)
        flops *= _valid_positions(
            size=left.dims[labels[1].index(name)],
            kernel=right.dims[labels[2].index(name)],
            out=out.dims[labels[3].index(name)],
            stride=int(field("stride", number, "1")),
            pad=int(field("pad", number, "0_0").split("_")[0]),
            dilation=int(field("lhs_dilate", number, "1")),
            kernel_dilation=int(field("rhs_dilate", number, "1")),
        )
    return flops


def _valid_positions(
    size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, kernel_dilation: int
) -> int:
    """Pairs (output position, kernel position) of one dimension that read an element rather than
    padding or a gap."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilation - pad
    return int(np.sum((at >= 0) & (at % dilation == 0) & (at // dilation < size)))


def vector_flops(computation: Computation, instruction: Instruction) -> int:
    """1 per element of elementwise arithmetic on floats, and per element that a reduction reads."""
    if not instruction.shapes or instruction.shapes[0].dtype[0] not in "bf":
        return 0
    if instruction.opcode in _ARITHMETIC:
        return instruction.shapes[0].elements
    if instruction.opcode == "reduce":
        return computation.by_name[instruction.operands[0]].shapes[0].elements
    return 0


# Bytes.


def _is_kernel(instruction: Instruction) -> bool:
    """Whether it calls a hand-written kernel."""
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _matching_operands(
    computation: Computation, instruction: Instruction, cache: CacheShape
) -> int:
    """Bytes of the operands in HBM that hold a cache."""
    shapes = [shape for x in instruction.operands for shape in computation.by_name[x].shapes[:1]]
    return sum(shape.bytes for shape in shapes if shape.space == 0 and cache.matches(shape))


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one run of an instruction outside fusions reads from and writes to HBM;
    collectives are left to `measure`.

    Slices, gathers, updates and scatters count what they touch, also inside fusions, and not the
    whole array.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _collective_kind(computation, instruction):
        return 0
    if opcode in ("copy-start", "slice-start"):  # (target, source, ...) and ((source), target, ...)
        source = computation.by_name[instruction.operands[0]].shapes[0]
        target = instruction.shapes[0 if opcode == "copy-start" else 1]
        return (target.bytes if source.space == 0 else 0) + target.hbm_bytes
    if opcode == "custom-call" and (
        "ConcatBitcast" in instruction.attributes or "AllocateBuffer" in instruction.attributes
    ):
        return 0
    read = sum(
        _read(module, computation, instruction, number)
        for number in range(len(instruction.operands))
    )
    return (
        read
        + sum(s.hbm_bytes for s in written_arrays(module, instruction))
        + _updated(module, computation, instruction)
    )


def _read(module: Module, computation: Computation, user: Instruction, number: int) -> int:
    """Bytes of its operand `number` that an instruction reads from HBM."""
    shape = (
        computation.by_name[user.operands[number]].shapes[0]
        if computation.by_name[user.operands[number]].shapes
        else None
    )
    if shape is None or shape.space != 0:
        return 0
    if user.opcode == "fusion":
        called = module.computations[user.called("calls")]
        return min(shape.bytes, _touched(module, called, called.parameter(number).name))
    if number == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
        return user.shapes[0].bytes
    return 0 if number == 0 and user.opcode in ("dynamic-update-slice", "scatter") else shape.bytes


def _touched(module: Module, called: Computation, name: str) -> int:
    """Bytes of a fused computation's parameter (or of a bitcast of it) that are read."""
    total = 0
    for user in called.users[name]:
        first = user.operands[0] == name
        if user.opcode == "bitcast":
            total += _touched(module, called, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            for parameter in (
                inner.parameter(n).name
                for n, operand in enumerate(user.operands)
                if operand == name
            ):
                total += _touched(module, inner, parameter)
                if _bitcast_of(inner, inner.root) == parameter:
                    total += _touched(module, called, user.name)
        elif first and user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.shapes[0].bytes
        elif (
            (first and user.opcode in ("dynamic-update-slice", "scatter"))
            or _collective_kind(called, user)
            or _is_link(user)
        ):
            continue
        else:
            total += called.by_name[name].shapes[0].bytes
    return total


def _bitcast_of(called: Computation, instruction: Instruction) -> str:
    """Name of what an instruction is a bitcast of; its own if it is none."""
    while instruction.opcode == "bitcast":
        instruction = called.by_name[instruction.operands[0]]
    return instruction.name


def _is_link(instruction: Instruction) -> bool:
    """Whether it only hands an asynchronous collective on."""
    return instruction.opcode == "tuple" or (
        instruction.opcode == "custom-call" and "AsyncCollective" in instruction.attributes
    )


def _roots(module: Module, instruction: Instruction) -> list[tuple[Computation, Instruction]]:
    """Per result of a fusion, the instruction that computes it (bitcasts and inner fusions
    skipped)."""
    called = module.computations[instruction.called("calls")]
    names = called.root.operands if called.root.opcode == "tuple" else (called.root.name,)

    def origins(name: str) -> list[tuple[Computation, Instruction]]:
        origin = called.by_name[_bitcast_of(called, called.by_name[name])]
        return _roots(module, origin) if origin.opcode == "fusion" else [(called, origin)]

    return [origin for name in names for origin in origins(name)]


def written_arrays(module: Module, instruction: Instruction) -> list[Shape]:
    """Arrays that one run of an instruction writes whole to HBM: not those updated in place or
    handed on."""
    opcode = instruction.opcode
    if (
        opcode in _FREE
        or opcode.endswith("-done")
        or opcode in ("dynamic-update-slice", "scatter")
        or _is_link(instruction)
    ):
        return []
    if opcode in ("copy-start", "slice-start"):
        target = instruction.shapes[0 if opcode == "copy-start" else 1]
        return [target] if target.space == 0 else []
    shapes = list(instruction.shapes)
    if opcode == "fusion":
        skipped = ("dynamic-update-slice", "scatter", "parameter", "get-tuple-element")
        origins = _roots(module, instruction)
        if len(origins) == len(shapes):
            shapes = [
                shape
                for shape, (called, origin) in zip(shapes, origins, strict=True)
                if origin.opcode not in skipped
                and not _is_link(origin)
                and not _collective_kind(called, origin)
            ]
        elif _is_link(origins[0][1]):  # else one operation with several results
            return []
    return [s for s in shapes if s.space == 0]


def _updated(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that updates in place write to HBM."""
    pairs = (
        _roots(module, instruction)
        if instruction.opcode == "fusion"
        else [(computation, instruction)]
    )
    total = 0
    for scope, origin in pairs:
        if origin.opcode in ("dynamic-update-slice", "scatter") and origin.shapes[0].space == 0:
            total += (
                scope.by_name[origin.operands[1 if origin.opcode == "dynamic-update-slice" else 2]]
                .shapes[0]
                .bytes
            )
    return total


# Collectives.


def _collective_kind(computation: Computation, instruction: Instruction) -> str:
    """Which collective an instruction starts; "" if none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return ""
    # On TPU a reduce-scatter is written as a fusion of an all-reduce and the slice that a chip
    # keeps.
    return (
        "reduce-scatter"
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter")
        else kind
    )


def _begins(computation: Computation, instruction: Instruction) -> bool:
    """False where a collective only goes on: one that overlaps other work stands in several
    fusions, with one chain number."""
    if "chain_id=" not in instruction.attributes:
        return True
    return any(
        'custom_call_target="AsyncCollectiveStart"' in i.attributes
        for i in computation.instructions
    )


def _results(instruction: Instruction) -> list[Shape]:
    """What a collective leaves, without the copies of its operands and the semaphores in the result
    of an asynchronous start."""
    shapes = list(instruction.shapes)
    if not instruction.opcode.endswith("-start") or len(shapes) <= len(instruction.operands):
        return shapes
    return shapes[len(instruction.operands) : 2 * len(instruction.operands)]
