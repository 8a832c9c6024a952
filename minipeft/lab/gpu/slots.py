"""The cost of a kernel's instructions, from machine code: a second bound of its time.

A multiprocessor has four schedulers, and each issues one instruction of one warp a
cycle. By bytes alone, memory limits nearly every kernel; but decoding a weight takes
seven to nine instructions, and these take time too.

Of all ways through a kernel's machine code that do the work of a thread, the cheapest
is looked for. What counts as the work is a sequence of instructions that no way can do
without: `WORK`. So the count is a bound, like that of the bytes; slow paths of a
division, other dtypes and the ends of tensors are not in it.
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from minipeft.kernels import PRODUCT_4BIT, SIZES, Kernel
from minipeft.lab import machine_code
from minipeft.lab.gpu import banks
from minipeft.lab.gpu.launches import Launch

WIDTH = 4096
RANK = 16
SHARED = 64  # rows of x that share a decoding in 16 bits
TILE = 8  # rows of x of one product of tensor cores
ARCHITECTURES = ("80", "90", "100")
SCHEDULERS = 4
BYTES_OF_AN_INSTRUCTION = 16


class Work(NamedTuple):
    """The work of one thread: instructions in their order, and the number of values."""

    phases: tuple[tuple[str, int], ...]
    values: int


class Size(NamedTuple):
    """The sizes on which a count may depend.

    Attributes:
        columns: of the weight.
        rank: of an adapter.
        tokens: rows of x.
    """

    columns: int = WIDTH
    rank: int = RANK
    tokens: int = 1


USUAL = Size()


class Gpu(NamedTuple):
    """Peak rates as published.

    Attributes:
        architecture: as in "90".
        multiprocessors: how many.
        clock: cycles a second.
        bandwidth: bytes a second.
    """

    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def slots(self) -> float:
        """Count the instructions of warps that all schedulers issue in a second."""
        return self.multiprocessors * SCHEDULERS * self.clock


A100 = Gpu("80", 108, 1.41e9, 1555e9)
H100 = Gpu("90", 132, 1.98e9, 3350e9)

# Cycles for which an instruction of a warp keeps a pipe of its scheduler busy: 32 lanes
# over the lanes of the pipe. 9.0 and 10.0 have twice the float32 lanes of 8.0, and half
# of them multiply integers; on 8.0 all do. F2FP, which makes values of 16 bits, takes
# the pipe of the integers.
# Sources: CUDA C++ Best Practices Guide 13, 12.1.1, throughput of native arithmetic
# instructions: results a cycle and multiprocessor, which here are shared by four
# schedulers; Nsight Compute's guide, Pipelines: which pipe an instruction takes.
PIPES: tuple[tuple[str, str, Mapping[str, int]], ...] = (
    ("float32", r"FFMA|FMUL|FADD", {"80": 2, "90": 1, "100": 1}),
    ("float32", r"IMAD", {"80": 2, "90": 0, "100": 0}),
    ("multiply", r"IMAD", {"80": 0, "90": 2, "100": 2}),
    ("tensor", r"HMMA", {"80": 8, "90": 4, "100": 4}),
    ("special", r"MUFU|F2F\b|F2I|I2F\b|FRND", dict.fromkeys(ARCHITECTURES, 8)),
    ("memory", r"LDG|STG|LDS|STS|SHFL|ATOM|RED", dict.fromkeys(ARCHITECTURES, 4)),
    ("integer", r"FMNMX", {"80": 2, "90": 2, "100": 1}),
    (
        "integer",
        r"IADD3|LOP3|SHF\b|ISETP|FSETP|I?F?SEL|V?IMNMX|PRMT|LEA|VIADD|F2FP|I2FP|MOV",
        dict.fromkeys(ARCHITECTURES, 2),
    ),
)
# A warp's 4 or 16 bytes a lane pass in portions of 128 bytes.
PORTIONS = {"64": 2, "128": 4}


@dataclass(frozen=True)
class Cost:
    """Cycles of one scheduler for one value of each of a warp's 32 lanes.

    Args:
        issue: as many as there are instructions.
        pipes: of the busiest pipes, by name.
    """

    issue: float
    pipes: Mapping[str, float]

    @property
    def cycles(self) -> float:
        """Return the least cycles of a warp."""
        return max(self.issue, *self.pipes.values())

    @property
    def limit(self) -> str:
        """Name the slowest part: `issue`, or a pipe."""
        return max({**self.pipes, "issue": self.issue}.items(), key=lambda p: p[1])[0]

    def seconds(self, values: float, gpu: Gpu) -> float:
        """Return the time of so many values on all schedulers of a device."""
        return values / machine_code.WARP * self.cycles / gpu.slots


def seconds(launch: Launch, architecture: str, slots: float) -> float | None:
    """Return how long a launch keeps all schedulers busy; None where it is not known.

    Args:
        launch: a kernel, its dtype, and its arguments by name.
        architecture: of the device.
        slots: instructions of warps that the device issues in a second.

    Raises:
        InputError: the sentence of `machine_code.missing`.
    """
    a = launch.arguments
    size = Size(a.get("in_features", WIDTH), a.get("r", RANK), a.get("tokens", 1))
    found = cost(launch.kernel, launch.dtype, alike(architecture), size)
    if found is None:
        return None
    if "n" in a:
        values = a["n"]
    else:  # rows of x share what is decoded
        shared = 4 if SIZES[launch.dtype] == 4 else SHARED
        times = -(-size.tokens // shared)
        values = a["in_features"] * a["out_features"] * times
    return values / machine_code.WARP * found.cycles / slots


def alike(architecture: str) -> str:
    """Return the one of `ARCHITECTURES` that has as many lanes in each pipe."""
    return {"75": "80", "80": "80", "87": "80", "100": "100", "103": "100"}.get(
        architecture, "90"
    )


def cost(
    kernel: Kernel,
    dtype: str,
    architecture: str,
    size: Size = USUAL,
) -> Cost | None:
    """Return a kernel's cost; None where nothing is known of its work.

    Args:
        kernel: from the table.
        dtype: of its instance.
        architecture: as in "90".
        size: of the operands.

    Raises:
        InputError: with the message of `machine_code.missing`.
    """
    work = work_of(kernel, dtype, size)
    if work is None:
        return None
    code = disassembled(kernel.row, architecture)[kernel.expression(dtype)]
    way = cheapest(code.instructions, work.phases)
    busy = pipes(way, architecture, work.values)
    # All schedulers share one shared memory.
    busy["memory"] += SCHEDULERS * banks.waits(kernel.template)
    return Cost(len(way) / work.values, busy)


def product_cycles(tokens: int, architecture: str) -> float:
    """Return a warp's cycles a weight of the 4-bit product, all passes together.

    Args:
        tokens: rows of x, in 16 bits.
        architecture: as in "90".
    """
    full, rest = divmod(tokens, SHARED)
    return sum(
        passes * _pass_cycles(-(-rows // TILE), architecture)
        for passes, rows in ((full, SHARED), (1, rest))
        if passes and rows
    )


@cache
def _pass_cycles(tiles: int, architecture: str) -> float:
    found = cost(PRODUCT_4BIT, "float16", architecture, Size(tokens=TILE * tiles))
    return found.cycles if found else 0.0


@cache
def disassembled(row: str, architecture: str) -> Mapping[str, machine_code.MachineCode]:
    """Return `machine_code.disassemble`, each row compiled once."""
    return machine_code.disassemble(row, architecture)


def work_of(kernel: Kernel, dtype: str, size: Size = USUAL) -> Work | None:
    """Say what a thread does, from the geometry at the head of the kernel's file."""
    vector, (columns, r, _) = 16 // SIZES[dtype], size
    product = _product_work(vector, size)
    # A turn of `row_norm`, 32 values of a thread: four warps share the columns. In 16
    # bits tensor cores make 8 products of 16 ranks, with float32 A and B six times as
    # many.
    turn: tuple[tuple[str, int], ...] = (("HMMA", 8 * -(-r // 16)), ("FFMA", 64))
    if vector == 4:
        turn = (("FFMA", 32 * r), ("LDG.E.128", 8), ("FFMA", 8))
    turns = max(1, columns // (4 * machine_code.WARP * (4 if vector == 4 else 2)))
    mixed = (("HMMA", 48 * -(-r // 16)), ("FFMA", 64))
    groups = vector // 4
    return {
        "quantize": Work((("LDG.E.128", 8 // vector), ("LDS", 4 * 8), ("STG", 1)), 8),
        "nest": Work((("BAR", 1), ("LDS", 8), ("STG", 1)), 1),
        "first_bad": Work((("LDG.E.128", 8 // vector), ("FSETP", 8)), 8),
        "dequantize": Work((("STG.E.128", 32 // vector),), 32),
        "dequantize_nested": Work((("STG.E.128", 32 // vector),), 32),
        "adamw": Work((("STG.E.128", groups * (3 if groups == 1 else 2)),), 4 * groups),
        "adamw_8bit": Work((("MUFU.RSQ", 32),), 32),
        "product": product,
        "product_nested": product,
        "row_norm": Work(turn * turns, 32 * turns),
        "row_norm_mixed": Work(mixed * turns, 32 * turns),
    }.get(kernel.template)


def _product_work(vector: int, size: Size) -> Work:
    # A stretch of the product, 64 weights of a thread in 16 bits: 8 products of tensor
    # cores for each 8 rows of x. In float32 16 weights of two rows: look up, multiply
    # by one row of x.
    if vector == 4:
        stretches = max(1, size.columns // (8 * machine_code.WARP))
        return Work((("LDS", 16), ("FFMA", 8)) * stretches, 16 * stretches)
    stretches = max(1, size.columns // (8 * 4 * machine_code.WARP))
    tiles = -(-min(size.tokens, SHARED) // TILE)
    if tiles <= 1:
        return Work((("LDS", 64), ("HMMA", 2)) * stretches, 64 * stretches)
    # After each quarter of the weights come products with all rows.
    quarter = (("LDS", 16), ("HMMA", 2 * tiles))
    return Work(quarter * 4 * stretches, 64 * stretches)


def pipes(way: Sequence[str], architecture: str, values: int) -> dict[str, float]:
    """Return the cycles per value that the instructions use each pipe."""
    busy: Counter[str] = Counter()
    for name in map(_name, way):
        for pipe, form, cycles in PIPES:
            if re.match(form, name):
                busy[pipe] += cycles[architecture] * _portions(pipe, name)
    return {pipe: busy[pipe] / values for pipe, _, _ in PIPES}


def _portions(pipe: str, name: str) -> int:
    if pipe != "memory":
        return 1
    return next((PORTIONS[part] for part in name.split(".") if part in PORTIONS), 1)


def _name(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


# The cheapest way


@dataclass(frozen=True)
class Block:
    """Instructions without a jump between them, and the blocks that may follow."""

    instructions: tuple[str, ...]
    following: tuple[int, ...]
    ends: bool


def cheapest(
    instructions: Sequence[str], phases: Sequence[tuple[str, int]]
) -> list[str]:
    """Return the instructions of the shortest run that does all phases in their order.

    Args:
        instructions: of a kernel, from its entry on.
        phases: forms of instructions, and how often each must have been executed
            before the next one counts.
    """
    wanted = [form for form, times in phases for _ in range(times)]
    blocks = _blocks(instructions)
    marks = [_marked(block, {form for form, _ in phases}) for block in blocks]
    start = (0, 0)  # a block, and the number of finished phases before it
    best, came = {start: 0}, {start: start}
    queue = [(0, start)]
    while queue:
        length, state = heapq.heappop(queue)
        block, done = state
        if length > best[state]:
            continue
        after = _advanced(done, marks[block], wanted)
        if blocks[block].ends and after == len(wanted):
            return _way(blocks, came, state)
        for following in blocks[block].following:
            there = (following, after)
            total = length + len(blocks[block].instructions)
            if total < best.get(there, total + 1):
                best[there], came[there] = total, state
                heapq.heappush(queue, (total, there))
    raise ValueError(f"no way through the kernel does {phases}")


def _marked(block: Block, forms: set[str]) -> list[str]:
    names = [_name(instruction) for instruction in block.instructions]
    return [form for name in names for form in forms if name.startswith(form)]


def _advanced(done: int, marks: Sequence[str], wanted: Sequence[str]) -> int:
    for mark in marks:
        if done < len(wanted) and mark == wanted[done]:
            done += 1
    return done


def _way(
    blocks: Sequence[Block],
    came: Mapping[tuple[int, int], tuple[int, int]],
    state: tuple[int, int],
) -> list[str]:
    visited = [state]
    while came[visited[-1]] != visited[-1]:
        visited.append(came[visited[-1]])
    return [i for block, _ in reversed(visited) for i in blocks[block].instructions]


def _blocks(instructions: Sequence[str]) -> list[Block]:
    targets = {at: _target(i) for at, i in enumerate(instructions)}
    jumps = {at for at, i in enumerate(instructions) if _leaves(i)}
    starts = {0, *(at + 1 for at in jumps)}
    starts |= {target for target in targets.values() if target is not None}
    ordered = sorted(start for start in starts if start < len(instructions))
    number = {start: i for i, start in enumerate(ordered)}
    ends = [*ordered[1:], len(instructions)]
    made = []
    for start, end in zip(ordered, ends, strict=True):
        last = instructions[end - 1]
        after = _after(end - 1, last, targets[end - 1])
        following = [number[at] for at in after if at in number]
        inside = tuple(instructions[start:end])
        made.append(Block(inside, tuple(following), "EXIT" in last))
    return made


def _after(at: int, instruction: str, target: int | None) -> Iterator[int]:
    name = _name(instruction)
    if name.startswith(("CALL", "RET")) and not instruction.startswith("@"):
        return  # the slow path of a division or of a root
    sometimes = instruction.startswith("@") or "UP" in instruction or ".DIV" in name
    if target is not None:
        yield target
    if sometimes or not _leaves(instruction):
        yield at + 1


def _leaves(instruction: str) -> bool:
    return _name(instruction).startswith(("BRA", "EXIT", "CALL", "RET"))


def _target(instruction: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)$", instruction)
    # On 8.0 a loop may be left by a call that depends on a predicate.
    jumps = ("BRA", "CALL") if instruction.startswith("@") else ("BRA",)
    if not found or not _name(instruction).startswith(jumps):
        return None
    return int(found[1], 16) // BYTES_OF_AN_INSTRUCTION
