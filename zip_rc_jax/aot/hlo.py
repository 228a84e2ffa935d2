"""Reading the text of a compiled XLA module: instructions, shapes in memory spaces, and how often
each instruction runs.

`Compiled.cost_analysis()` counts the body of every while loop once, whatever its trip count: a scan
over 28 layers counts as one layer (seen with libtpu 0.0.42). So the text is read instead.
`executions` walks from the entry computation into loop bodies and branches and multiplies by the
trip counts that the loop conditions state.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
# of a computation; SparseCores have a thread of their own
_END = re.compile(r"\}(, execution_thread=\S+)?$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a compiled program, as one chip holds it.

    Attributes:
      dtype: XLA's name, such as "bf16".
      dims: sizes.
      space: memory space; 0 is the chip's HBM, 1 its vector memory, others hold scalars and
        semaphores.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of the layout's tiles."""
        bits = 8 if self.dtype == "pred" else int(next(iter(re.findall(r"\d+", self.dtype)), 0))
        return self.elements * bits // 8

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.space == 0 else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: such as "fusion.3", "fusion".
      shapes: of the result; several for a tuple, in order.
      operands: names of other instructions of the same computation.
      literal: the text between the parentheses (the value of a constant, the number of a
        parameter).
      attributes: the text after them.
      root: whether the computation returns it.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, as far as XLA kept it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, key: str) -> str:
        """Name of the computation in attribute `key`; "" without one."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    def parameter(self, number: int) -> Instruction:
        return next(
            i for i in self.instructions if i.opcode == "parameter" and i.literal == str(number)
        )


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays in a type, such as `(f32[2,4]{1,0:T(8,128)S(1)}, s32[])`, in order."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shapes.append(
            Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0)
        )
    return tuple(shapes)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def parse_instruction(line: str) -> Instruction | None:
    """An instruction from its line; None for other lines."""
    start = _START.match(line)
    if not start:
        return None
    begin = start.end()
    end = _closing(line, begin) + 1 if line[begin] == "(" else line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        shapes=parse_shapes(line[begin:end]),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=line[close + 1 :],
        root=bool(start[1]),
    )


def _logical_lines(text: str) -> list[str]:
    """The lines of a module, each instruction on one: the metadata of Pallas kernels holds line
    breaks."""
    lines: list[str] = []
    for line in text.splitlines():
        if (
            lines
            and lines[-1].startswith("  ")
            and not line.startswith("  ")
            and not _END.match(line)
        ):
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def parse_module(text: str) -> Module:
    """A module from `Compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    instructions: list[Instruction] = []
    name = entry = ""
    for line in _logical_lines(text):
        if header := _HEADER.match(line):
            name, instructions = header[2], []
            entry = name if header[1] else entry
        elif _END.match(line):
            computations[name] = Computation(name, tuple(instructions))
            name = ""
        elif name and (instruction := parse_instruction(line)):
            instructions.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation in the module")
    return Module(computations, entry)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Iterations of the while instruction `loop` of `computation`; None if they depend on data.

    Taken from XLA's `known_trip_count` or, where the backend drops it (TPU), from a condition
    `counter < constant` with the counter's start and step: loops over sharded products count by 2.
    """
    known = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        module.computations[loop.called("condition")],
        module.computations[loop.called("body")],
    )
    test, scope, outer = condition.root, condition, {}
    if test.opcode == "fusion":
        scope = module.computations[test.called("calls")]
        outer = {
            scope.parameter(i).name: condition.by_name[name] for i, name in enumerate(test.operands)
        }
        test = scope.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (outer.get(name, _source(scope, name)) for name in test.operands)
    number = re.search(r"index=(\d+)", counter.attributes)
    if bound.opcode != "constant" or counter.opcode != "get-tuple-element" or not number:
        return None
    start = _carried(computation, computation.by_name[loop.operands[0]], int(number[1]))
    step = _carried(body, body.root, int(number[1]))
    if step is None or step.opcode != "add":
        return None
    by = next(
        (i for i in (_source(body, name) for name in step.operands) if i.opcode == "constant"), None
    )
    if by is None:
        return None
    first = int(start.literal) if start and start.opcode == "constant" else 0
    return max(0, -(-(int(bound.literal) - first) // int(by.literal)))


def _source(computation: Computation, name: str) -> Instruction:
    """The instruction whose value `name` has, copies skipped."""
    source = computation.by_name[name]
    return (
        _source(computation, source.operands[0]) if source.opcode in ("copy", "bitcast") else source
    )


def _carried(computation: Computation, values: Instruction, number: int) -> Instruction | None:
    """What stands in place `number` of a loop's tuple; None if the tuple is not built here."""
    return _source(computation, values.operands[number]) if values.opcode == "tuple" else None


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction outside fusions, with how often it runs.

    Attributes:
      computation: the one that holds it.
      instruction: what runs.
      times: product of the trip counts around it; a loop whose trips depend on data counts as one
        iteration.
      per_step: whether such a loop is around it, so that `times` is per iteration of that loop.
    """

    computation: Computation
    instruction: Instruction
    times: int
    per_step: bool


def executions(module: Module) -> Iterator[Execution]:
    """Every instruction that the chip runs, fusions as one; loops, calls and branches (all of them)
    are entered."""

    def walk(name: str, times: int, per_step: bool) -> Iterator[Execution]:
        computation = module.computations[name]
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                trips = trip_count(module, computation, instruction)
                yield from walk(
                    instruction.called("body"),
                    times * (1 if trips is None else trips),
                    per_step or trips is None,
                )
            elif instruction.opcode in ("call", "async-start", "call-start"):
                yield from walk(
                    instruction.called("to_apply") or instruction.called("calls"), times, per_step
                )
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from walk(branch, times, per_step)
            else:
                yield Execution(computation, instruction, times, per_step)

    return walk(module.entry, 1, False)


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return _NAME.findall(listed[1])
    return [
        name
        for key in ("true_computation", "false_computation")
        if (name := instruction.called(key))
    ]
