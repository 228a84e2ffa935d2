"""What was found about compiled programs, and its table."""

from __future__ import annotations

import dataclasses
import math

from zip_rc_jax.aot.costs import Costs, Write
from zip_rc_jax.aot.topology import MARGIN, Chip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's HBM, padding included, as XLA's memory analysis gives them.

    Attributes:
      arguments, outputs: of the program.
      aliased: outputs that take the place of donated arguments.
      temporaries: everything in between.
      code: of the program.
      peak: largest total at any moment.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A program, or a part of one that runs another number of times, per chip.

    Attributes:
      name: such as "one decode step".
      costs: what the compiled module does; None if it does not fit.
      useful_flops, expected_flops: by hand (see `analytic`): without and with what
        rematerialisation repeats. 0 = nothing to count.
      expected_bytes: HBM bytes that cannot be avoided; `expected` says which.
      expected: what `expected_bytes` holds.
      kernel_flops: of the calls of hand-written kernels, which no compiler counts: the number of
        calls is the program's, the operations of a call are by hand.
      kernel_bytes: of the cache, that these calls read; by hand too.
      repeated_flops: what of `expected_flops` attention computes again in its backward pass, as
        blocks without stored scores do.
    """

    name: str
    costs: Costs | None
    useful_flops: int
    expected_flops: int
    expected_bytes: int
    expected: str
    kernel_flops: int = 0
    kernel_bytes: int = 0
    repeated_flops: int = 0

    @property
    def found_flops(self) -> int:
        """Operations of all products of the compiled program; 0 if it does not fit."""
        return self.costs.matmul_flops + self.kernel_flops if self.costs else 0

    @property
    def found_bytes(self) -> int:
        """HBM bytes of the compiled program; 0 if it does not fit."""
        return self.costs.bytes + self.kernel_bytes if self.costs else 0


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function, compiled.

    Attributes:
      name: of the function.
      memory: None if the compiler gave up because it does not fit.
      error: the compiler's words in that case.
      parts: see `Part`.
      xla_flops: XLA's own count, which takes every loop body once.
      seconds: what lowering and compiling took.
      beside: bytes that lie in the memory while it runs though it does not take them, such as the
        parameters while rows move.
    """

    name: str
    memory: Memory | None
    error: str
    parts: tuple[Part, ...]
    xla_flops: float
    seconds: float
    beside: int = 0

    def fits(self, chip: Chip) -> bool:
        """Whether it leaves a tenth of the memory free."""
        return self.memory is not None and self.memory.peak + self.beside <= (1 - MARGIN) * chip.hbm


@dataclasses.dataclass(frozen=True)
class Report:
    """What `compile_train` and `compile_decode` found.

    Attributes:
      title: what was compiled for what.
      chip: of the topology.
      devices: chips in it.
      programs: in the order in which they run.
      most_flops: times the operations by hand that a program may spend.
    """

    title: str
    chip: Chip
    devices: int
    programs: tuple[Program, ...]
    most_flops: float = math.inf

    @property
    def fits(self) -> bool:
        return all(p.fits(self.chip) for p in self.programs)

    def spends_too_much(self, part: Part) -> bool:
        """Whether the part has more operations than `most_flops` allows."""
        return (
            bool(part.expected_flops) and part.found_flops > self.most_flops * part.expected_flops
        )

    @property
    def good(self) -> bool:
        """Whether everything fits, and nothing spends too much."""
        return self.fits and not any(
            self.spends_too_much(part) for p in self.programs for part in p.parts
        )


def size(count: float) -> str:
    """Bytes for reading, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def number(count: float) -> str:
    """Operations for reading, in decimal units."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} T"


def report_table(report: Report, lines: int = 6) -> str:
    """The report as text, for a terminal of 120 columns.

    Args:
      lines: longest list of arrays or collectives shown.
    """
    out = [report.title, f"per chip of {report.devices}, {size(report.chip.hbm)} of memory"]
    for program in report.programs:
        out += ["", f"{program.name} ({program.seconds:.0f} s to compile)"]
        out += _memory(program, report.chip)
        for part in program.parts:
            if not _idle(part):
                out += _part(part, report, lines)
    return "\n".join(out)


def _idle(part: Part) -> bool:
    """Whether there is nothing to say about it."""
    return (
        part.costs is not None
        and not part.expected_flops
        and not part.costs.collectives
        and part.costs.bytes < 2**20
    )


def _memory(program: Program, chip: Chip) -> list[str]:
    if program.memory is None:
        return [f"  memory       DOES NOT FIT: {program.error}"]
    m = program.memory
    verdict = "fits with 10% to spare" if program.fits(chip) else "TOO LARGE for 10% to spare"
    return [
        f"  memory       peak {size(m.peak + program.beside)} of {size(chip.hbm)}: {verdict}",
        f"               arguments {size(m.arguments)}, outputs {size(m.outputs)} (of them in "
        f"place {size(m.aliased)}), "
        f"temporaries {size(m.temporaries)}, code "
        f"{size(m.code)}{f', beside it {size(program.beside)}' if program.beside else ''}",
    ]


def _part(part: Part, report: Report, lines: int) -> list[str]:
    c, chip = part.costs, report.chip
    if c is None:
        wanted = (
            f", {number(part.expected_flops)} with what is recomputed"
            if part.expected_flops > part.useful_flops
            else ""
        )
        return (
            [
                f"  {part.name}",
                f"    products   not compiled; by hand {number(part.useful_flops)}{wanted}",
            ]
            if part.useful_flops
            else []
        )
    out = [f"  {part.name}"]
    if part.expected_flops:
        share = part.found_flops / part.expected_flops
        hand = (
            f"by hand {number(part.expected_flops)} ({share:.2f} times), useful "
            f"{number(part.useful_flops)}"
        )
        out.append(f"    products   {number(part.found_flops)}; {hand}")
        if part.expected_flops > part.useful_flops:
            again, without = (
                part.expected_flops - part.useful_flops,
                part.found_flops / (part.expected_flops - part.repeated_flops),
            )
            scores = (
                f", of it {number(part.repeated_flops)} scores inside attention "
                f"({without:.2f} times without these)"
            )
            out.append(
                f"               by hand = useful + {number(again)} "
                f"recomputed{scores if part.repeated_flops else ''}"
            )
        if report.spends_too_much(part):
            out.append(
                f"               TOO MANY: at most {report.most_flops} times those by hand are "
                "allowed"
            )
    if c.kernels:
        calls = ", ".join(f"{count} x {name}" for name, count in c.kernels.items())
        read = f", which read {size(part.kernel_bytes)}" if part.kernel_bytes else ""
        out.append(f"    kernels    {calls}: {number(part.kernel_flops)} of these{read}")
    out.append(f"    other      {number(c.vector_flops)} elementwise")
    out.append(
        f"    HBM bytes  {size(part.found_bytes)}; {part.expected} {size(part.expected_bytes)} "
        f"({_ratio(part.found_bytes, part.expected_bytes)})"
    )
    out.append(
        f"    time       at least {_time(part.found_flops / chip.flops)} of products, "
        f"{_time(part.found_bytes / chip.bandwidth)} of HBM"
    )
    kinds = [
        f"{kind} {count:,} x, {size(total)}"
        for kind, (count, total) in sorted(c.by_kind().items(), key=lambda k: -k[1][1])
    ]
    out.append(f"    network    {'; '.join(kinds) or 'no collectives'}")
    for x in c.collectives[:lines]:
        if x.bytes >= 0.01 * max(1, c.collectives[0].bytes):
            out.append(
                f"      {x.kind} {x.count:,} x {_short(x.shape)}, {size(x.bytes)}: "
                f"{_origin(x.op_name)}"
            )
    if c.cache_moves:
        out.append("    CACHE MOVES")
        out += [f"      {_write(w)}" for w in c.cache_moves[:lines]]
    large = [w for w in c.writes if w.bytes >= 2**20][:lines]
    if large:
        out.append("    largest arrays written")
        out += [f"      {_write(w)}" for w in large]
    return out


def _ratio(measured: float, expected: float) -> str:
    return f"{measured / expected:.1f} times" if expected else "none needed"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _write(w: Write) -> str:
    return f"{w.opcode} {w.count:,} x {w.shape}, {size(w.bytes)} each: {_origin(w.op_name)}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _origin(op_name: str) -> str:
    """The end of a path in the Python program, without the parts that say nothing."""
    parts = [p for p in op_name.split("/") if p not in ("closed_call", "body", "while")]
    return "/".join(parts[-3:]) or "inserted by the compiler"
