"""Interpret PTX in NumPy: run the compiler's output for a kernel without a GPU.

A wave of CUDA blocks runs at once; every thread is a lane of NumPy arrays. Of the
threads that do not wait, those furthest behind run next, so divergent paths meet again.
Every access is checked against its buffer and its alignment. All lanes run in step, so
races stay hidden here; the CPU build finds them.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from tests.cuda.ptx_parser import Entry, Instruction, PtxError
from tests.cuda.ptx_values import ARITHMETIC, BFLOAT16, compare, convert, numpy_type

GUARD_BYTES = 1 << 16
LANES = 1 << 15
COLLECTIVE = ("shfl", "vote", "mma")  # all lanes of a warp at once


# Memory -------------------------------------------------------------------------------


@dataclass
class Memory:
    """Buffers far apart from each other, so that a wild address lies in no buffer."""

    bases: list[int] = field(default_factory=list)
    buffers: list[np.ndarray] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, data: bytes) -> int:
        end = self.bases[-1] + self.buffers[-1].size if self.bases else 0
        base = -(-(end + GUARD_BYTES) // 256) * 256
        self.bases.append(base)
        self.buffers.append(np.frombuffer(data, np.uint8).copy())
        self.names.append(name)
        return base

    def locate(
        self, addresses: np.ndarray, size: int, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the buffer and the offsets of `addresses`; refuse a wild address."""
        which = np.searchsorted(self.bases, addresses, side="right") - 1
        first = int(which[0])
        if first < 0 or (which != first).any():
            raise PtxError(f"{what}: an address outside every buffer")
        buffer, name = self.buffers[first], self.names[first]
        offsets = (addresses - np.uint64(self.bases[first])).astype(np.int64)
        check_range(offsets, size, buffer.size, f"{what} of {name}")
        return buffer, offsets


def check_range(offsets: np.ndarray, size: int, limit: int, what: str) -> None:
    last = int(offsets.max()) + size
    if last > limit:
        raise PtxError(f"{what}: out of bounds, byte {last} of {limit}")
    if (offsets % size).any():
        raise PtxError(f"{what}: misaligned {size}-byte access")


# Execution ----------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What the waves of a launch share: memory, and the values of names in the code."""

    memory: Memory
    symbols: dict[str, int]


class Wave:
    """The state of some CUDA blocks of one launch."""

    def __init__(
        self, entry: Entry, blocks: np.ndarray, launched: tuple[int, int], world: World
    ) -> None:
        grid, threads = launched
        self.entry, self.memory, self.symbols = entry, world.memory, world.symbols
        self.threads, self.n = threads, blocks.size * threads
        lane = np.arange(self.n)
        self.block = lane // threads
        self.thread = lane % threads
        self.special = {
            "%tid.x": self.thread.astype(np.uint32),
            "%ctaid.x": np.repeat(blocks, threads).astype(np.uint32),
            "%ntid.x": np.full(self.n, threads, np.uint32),
            "%nctaid.x": np.full(self.n, grid, np.uint32),
            "%laneid": (self.thread % 32).astype(np.uint32),
        }
        self.registers: dict[str, np.ndarray] = {}
        # 0xCD, so that reading what nobody wrote gives a visible value.
        self.shared = np.full((blocks.size, entry.shared_bytes), 0xCD, np.uint8)
        self.counter = np.zeros(self.n, np.int64)
        self.alive = np.ones(self.n, bool)
        self.waiting = np.zeros(self.n, bool)  # waits at a barrier of the block
        self.parked = np.zeros(self.n, bool)  # waits at a shuffle or vote of the warp
        self.passing = np.zeros(self.n, bool)  # may pass it: all lanes have come

    def run(self) -> None:
        code = self.entry.instructions
        while self.alive.any():
            runnable = self.alive & ~self.waiting & ~self.parked
            if not runnable.any():
                self._open_warps() if self.parked.any() else self._open_barrier()
                continue
            here = int(self.counter[runnable].min())
            lanes = np.flatnonzero(runnable & (self.counter == here))
            self.counter[lanes] = here + 1
            instruction = code[here]
            if instruction.guard:
                taken = self.register(instruction.guard)[lanes] ^ instruction.negated
                lanes = lanes[taken]
            if not self.passing[lanes].all() and instruction.name in COLLECTIVE:
                self.parked[lanes] = True
                self.counter[lanes] = here
            elif lanes.size:
                self.passing[lanes] = False
                self.step(instruction, lanes)

    def _open_warps(self) -> None:
        """Let the warps pass whose lanes have all come to the same shuffle."""
        warp = self.block * -(-self.threads // 32) + self.thread // 32
        first = np.full(warp[-1] + 1, -1)
        first[warp[self.parked]] = self.counter[self.parked]
        elsewhere = self.alive & ~(self.parked & (self.counter == first[warp]))
        complete = ~np.isin(warp, warp[elsewhere]) & self.parked
        if not complete.any():
            raise PtxError("a shuffle or vote that some lanes of its warp do not reach")
        self.parked[complete] = False
        self.passing[complete] = True

    def _open_barrier(self) -> None:
        """Open a barrier when all threads of a block wait; refuse if some never do."""
        waits = (self.alive & self.waiting).reshape(-1, self.threads)
        if not (waits.all(axis=1) | ~waits.any(axis=1)).all():
            raise PtxError("bar.sync not reached by every thread of the block")
        self.waiting[:] = False

    def step(self, i: Instruction, lanes: np.ndarray) -> None:
        method = getattr(self, f"_{i.name}", None)
        if method:
            method(i, lanes)
        elif i.name in ARITHMETIC:
            sources = [self.read(o, i.type, lanes) for o in i.operands[1:]]
            self.write(i.operands[0], ARITHMETIC[i.name](i.modifiers, *sources), lanes)
        else:
            raise PtxError(f"no such instruction here: {i.line}")

    # Registers

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            kind = self.entry.registers[
                re.sub(r"(?<=%[a-z])\d+$|(?<=[a-z])\d+$", "", name)
            ]
            raw = bool if kind == "pred" else f"u{int(kind[1:]) // 8}"
            self.registers[name] = np.zeros(self.n, raw)
        return self.registers[name]

    def read(self, operand: str, kind: str, lanes: np.ndarray) -> np.ndarray:
        wanted = numpy_type(kind)
        if operand in self.special:
            raw = self.special[operand][lanes]
        elif operand.startswith(("0f", "0F", "0d", "0D")):
            bits = int(operand[2:], 16)
            raw = np.full(
                lanes.size, bits, np.uint32 if operand[1] in "fF" else np.uint64
            )
        elif re.fullmatch(r"-?\d.*", operand):
            number = int(operand.rstrip("U"), 0) % (1 << 64)
            raw = np.full(lanes.size, number, np.uint64)
        elif operand in self.symbols:
            raw = np.full(lanes.size, self.symbols[operand], np.uint64)
        else:
            raw = self.register(operand)[lanes]
        if bool in (raw.dtype, wanted):
            return raw
        return raw.astype(f"u{wanted.itemsize}").view(wanted)

    def write(self, name: str, values: np.ndarray, lanes: np.ndarray) -> None:
        if name == "_":
            return
        register = self.register(name)
        if values.dtype != bool and values.dtype.itemsize < register.dtype.itemsize:
            # A narrow value is extended to a wide register: signed values keep their
            # sign.
            sort = "i" if values.dtype.kind == "i" else "u"
            narrow = values.view(f"{sort}{values.dtype.itemsize}")
            values = narrow.astype(f"{sort}{register.dtype.itemsize}")
        register[lanes] = (
            values if register.dtype == bool else values.view(register.dtype)
        )

    # Control

    def _bra(self, i: Instruction, lanes: np.ndarray) -> None:
        self.counter[lanes] = self.entry.labels[i.operands[0]]

    def _ret(self, i: Instruction, lanes: np.ndarray) -> None:
        self.alive[lanes] = False

    _exit = _ret

    def _bar(self, i: Instruction, lanes: np.ndarray) -> None:
        if i.modifiers[0] == "sync":  # bar.warp.sync does nothing: lanes run in step
            self.waiting[lanes] = True

    _barrier = _bar

    # Data

    def _addresses(self, operand: str, lanes: np.ndarray) -> np.ndarray:
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand).groups()
        return self.read(base, "u64", lanes) + np.uint64(int(offset or 0) % (1 << 64))

    def _place(self, i: Instruction, operand: str, size: int, lanes: np.ndarray):
        """Return the bytes that lanes access, in rows of `size`, and row numbers."""
        addresses = self._addresses(operand, lanes)
        if "shared" in i.modifiers:
            offsets, limit = addresses.astype(np.int64), self.entry.shared_bytes
            check_range(offsets, size, limit, f"{i.line} in shared memory")
            offsets = offsets + self.block[lanes] * limit
            buffer = self.shared.reshape(-1)
        elif "global" in i.modifiers or "const" in i.modifiers:
            buffer, offsets = self.memory.locate(addresses, size, i.line)
        else:
            raise PtxError(f"an address of unknown space: {i.line}")
        return buffer, offsets[:, None] + np.arange(size)

    def _ld(self, i: Instruction, lanes: np.ndarray) -> None:
        if "param" in i.modifiers:
            value = np.full(lanes.size, self.symbols[i.operands[1][1:-1]], np.uint64)
            target = numpy_type(i.type)
            raw = value.astype(f"u{target.itemsize}").view(target)
            self.write(i.operands[0], raw, lanes)
            return
        targets = re.findall(r"[%\w]+", i.operands[0])
        element = numpy_type(i.type)
        size = element.itemsize * len(targets)
        buffer, where = self._place(i, i.operands[1], size, lanes)
        rows = buffer[where].view(element)
        for column, target in enumerate(targets):
            self.write(target, np.ascontiguousarray(rows[:, column]), lanes)

    def _st(self, i: Instruction, lanes: np.ndarray) -> None:
        sources = re.findall(r"[%\w]+", i.operands[1])
        values = np.stack([self.read(s, i.type, lanes) for s in sources], axis=1)
        rows = values.view(np.uint8).reshape(lanes.size, -1)
        buffer, where = self._place(i, i.operands[0], rows.shape[1], lanes)
        buffer[where] = rows

    def _atom(self, i: Instruction, lanes: np.ndarray) -> None:
        address, value = i.operands[-2:]
        values = self.read(value, i.type, lanes)
        buffer, where = self._place(i, address, values.itemsize, lanes)
        operation = next(m for m in i.modifiers if m in ("add", "min", "max"))
        update = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation]
        for row, new in zip(
            where, values, strict=True
        ):  # one after another, as atomics do
            buffer[row] = update(buffer[row].view(values.dtype), new).view(np.uint8)

    _red = _atom

    def _mov(self, i: Instruction, lanes: np.ndarray) -> None:
        target, source = i.operands
        if "{" not in target + source:
            self.write(target, self.read(source, i.type, lanes), lanes)
            return
        parts = re.findall(r"[%\w]+", source if "{" in source else target)
        part = f"b{int(i.type[1:]) // len(parts)}"
        if "{" in source:
            columns = [self.read(p, part, lanes) for p in parts]
            packed = np.stack(columns, axis=1).view(numpy_type(i.type))
            self.write(target, packed[:, 0].copy(), lanes)
        else:
            values = self.read(source, i.type, lanes)
            rows = values.view(numpy_type(part)).reshape(-1, len(parts))
            for column, name in enumerate(parts):
                self.write(name, np.ascontiguousarray(rows[:, column]), lanes)

    def _cvta(self, i: Instruction, lanes: np.ndarray) -> None:
        if i.modifiers[:2] != ("to", "global"):
            raise PtxError(f"an address of unknown space: {i.line}")
        self.write(i.operands[0], self.read(i.operands[1], i.type, lanes), lanes)

    def _cvt(self, i: Instruction, lanes: np.ndarray) -> None:
        target, *operands = i.operands
        sources = [self.read(o, i.type, lanes) for o in operands]
        self.write(target, convert(i.modifiers, *sources), lanes)

    def _setp(self, i: Instruction, lanes: np.ndarray) -> None:
        a, b = (self.read(o, i.type, lanes) for o in i.operands[1:3])
        result = compare(i.modifiers[0], a, b)
        if len(i.operands) == 4:
            other = self.read(i.operands[3], "pred", lanes)
            join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
            result = join[i.modifiers[1]](result, other)
        self.write(i.operands[0], result, lanes)

    def _selp(self, i: Instruction, lanes: np.ndarray) -> None:
        a, b = (self.read(o, i.type, lanes) for o in i.operands[1:3])
        choice = self.read(i.operands[3], "pred", lanes)
        self.write(i.operands[0], np.where(choice, a, b), lanes)

    def _shfl(self, i: Instruction, lanes: np.ndarray) -> None:
        mode = i.modifiers[1]
        target, *valid = i.operands[0].split("|")
        distance, clamp = (self.read(o, "s32", lanes) for o in i.operands[2:4])
        lane = self.thread[lanes] % 32
        segment, limit = clamp >> 8 & 31, clamp & 31
        last = (lane & segment) | (limit & ~segment)
        source = {
            "bfly": lane ^ distance,
            "down": lane + distance,
            "up": lane - distance,
            "idx": (lane & segment) | (distance & ~segment),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = lanes - lane + np.where(inside, source, lane)
        present = np.zeros(self.n, bool)
        present[lanes] = True
        if not present[source].all():
            raise PtxError(f"reads a lane that is elsewhere: {i.line}")
        everyone = np.arange(self.n)
        self.write(target, self.read(i.operands[1], "b32", everyone)[source], lanes)
        for name in valid:
            self.write(name, inside, lanes)

    def _mma(self, i: Instruction, lanes: np.ndarray) -> None:
        """Multiply on tensor cores, in the layout of the PTX ISA; sums in float64."""
        if i.modifiers[2:5] != ("m16n8k16", "row", "col"):
            raise PtxError(f"no such shape here: {i.line}")
        d, a, b, c = (re.findall(r"[%\w]+", operand) for operand in i.operands)
        half = np.dtype(np.float16) if i.modifiers[6] == "f16" else BFLOAT16
        warps = lanes.reshape(-1, 32)  # all lanes have come

        def fragment(names: list[str], kind: str) -> np.ndarray:
            columns = [self.read(name, kind, lanes) for name in names]
            return np.stack(columns, axis=1).reshape(len(warps), 8, 4, -1)  # g, t

        def pairs(names: list[str]) -> np.ndarray:
            raw = fragment(names, "b32")
            return raw.view(half).astype(np.float64).reshape(len(warps), 8, 4, -1, 2)

        A = pairs(a).reshape(
            len(warps), 8, 4, 2, 2, 2
        )  # g, t, half of k, of rows, pair
        A = A.transpose(0, 4, 1, 3, 2, 5).reshape(len(warps), 16, 16)
        B = pairs(b).transpose(0, 3, 2, 4, 1).reshape(len(warps), 16, 8)
        C = fragment(c, "f32").reshape(
            len(warps), 8, 4, 2, 2
        )  # g, t, half of rows, pair
        D = A @ B + C.transpose(0, 3, 1, 2, 4).reshape(len(warps), 16, 8)
        rows = (
            D.astype(np.float32)
            .reshape(len(warps), 2, 8, 4, 2)
            .transpose(0, 2, 3, 1, 4)
        )
        for name, values in zip(d, rows.reshape(-1, 4).T, strict=True):
            self.write(name, np.ascontiguousarray(values), lanes)

    def _vote(self, i: Instruction, lanes: np.ndarray) -> None:
        votes = np.zeros(self.n, bool)
        name = i.operands[1]
        votes[lanes] = self.register(name.lstrip("!"))[lanes] ^ name.startswith("!")
        warps = np.pad(
            votes.reshape(-1, self.threads), ((0, 0), (0, -self.threads % 32))
        )
        bits = np.packbits(warps.reshape(-1, 32), axis=1, bitorder="little").view("u4")
        per_block = -(-self.threads // 32)
        ballots = bits[self.block * per_block + self.thread // 32, 0][lanes]
        results = {"ballot": ballots, "any": ballots != 0}
        self.write(i.operands[0], results[i.modifiers[1]], lanes)


def position(array: np.ndarray, arrays: list[np.ndarray]) -> int | None:
    """Return the index of the array with the same memory (not the same values)."""
    for i, other in enumerate(arrays):
        if array.ctypes.data == other.ctypes.data and array.nbytes == other.nbytes:
            return i
    return None


def launch(
    entry: Entry, grid: int, threads: int, arguments: list[np.ndarray | np.generic]
) -> None:
    """Run a kernel; arrays are changed in place.

    Raises:
        PtxError: at an access out of bounds or misaligned, or if a thread misses a
            barrier.
    """
    memory = Memory()
    symbols = dict(entry.shared)
    symbols |= {name: memory.add(name, data) for name, data in entry.constants.items()}
    arrays: list[np.ndarray] = []
    first_buffer = len(memory.buffers)
    for name, value in zip(entry.parameters, arguments, strict=True):
        if isinstance(value, np.ndarray):
            known = position(value, arrays)
            if known is None:
                arrays.append(value)
                symbols[name] = memory.add(name, value.tobytes())
            else:  # an output that is also an input
                symbols[name] = memory.bases[first_buffer + known]
        else:
            symbols[name] = int.from_bytes(value.tobytes(), "little")
    wave = max(1, LANES // threads)
    with np.errstate(all="ignore"):
        for first in range(0, grid, wave):
            blocks = np.arange(first, min(first + wave, grid))
            Wave(entry, blocks, (grid, threads), World(memory, symbols)).run()
    for array, buffer in zip(arrays, memory.buffers[first_buffer:], strict=True):
        array.reshape(-1).view(np.uint8)[...] = buffer
