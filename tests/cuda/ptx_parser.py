"""Read PTX text: the kernels in it, their parameters, variables and instructions."""

import re
from dataclasses import dataclass


class PtxError(Exception):
    """A launch that a GPU would stop, or whose result CUDA leaves undefined."""


@dataclass(frozen=True)
class Instruction:
    """One line: `@!%p1 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16];`."""

    line: str
    guard: str
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Entry:
    """A kernel: parameters with their bytes, shared variables, instructions."""

    parameters: dict[str, int]
    threads: int
    shared: dict[str, int]
    shared_bytes: int
    constants: dict[str, bytes]
    registers: dict[str, str]
    instructions: list[Instruction]
    labels: dict[str, int]


ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{(.*?)\n\}", re.S)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]\d+)\s+(?:\.\w+\s+(?:\d+\s+)?)*"
    r"([\w$]+)(?:\[(\d+)\])?"
)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\];")
CONSTANT = re.compile(
    r"\.(?:const|global)\s+\.align\s+\d+\s+\.(\w+)\s+([\w$]+)(?:\[\d+\])?\s*=\s*"
    r"\{?([^;}]*)\}?;"
)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^;]+);")
STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+")


def parse(text: str) -> dict[str, Entry]:
    """Read a PTX file; return its kernels by name."""
    text = re.sub(r"//[^\n]*", "", text)
    constants = {m[2]: _constant(m[1], m[3]) for m in CONSTANT.finditer(text)}
    return {m[1]: _entry(m, constants) for m in ENTRY.finditer(text)}


def _constant(kind: str, values: str) -> bytes:
    numbers = [int(v, 0) for v in values.split(",")]
    width = int(kind[1:]) // 8
    return b"".join((n % 256**width).to_bytes(width, "little") for n in numbers)


def _entry(match: re.Match[str], constants: dict[str, bytes]) -> Entry:
    parameters = {
        name: int(kind[1:]) // 8 * int(count or 1)
        for kind, name, count in PARAMETER.findall(match[2])
    }
    threads = re.search(r"\.maxntid\s+(\d+)", match[3])
    shared, top = {}, 0
    for align, name, size in SHARED.findall(match[4]):
        shared[name] = top = -(-top // int(align)) * int(align)
        top += int(size)
    registers = {}
    for kind, names in REGISTERS.findall(match[4]):
        for name in re.split(r"[\s,]+", names):
            registers[name.split("<")[0]] = kind
    code, labels = _statements(match[4])
    bound = int(threads[1]) if threads else 0
    return Entry(parameters, bound, shared, top, constants, registers, code, labels)


def _statements(body: str) -> tuple[list[Instruction], dict[str, int]]:
    body = re.sub(r"^\s*(\$\w+):", r"\1:;", body, flags=re.M)
    code: list[Instruction] = []
    labels = {}
    for part in body.split(";"):
        # A brace at the start of a statement opens or closes a scope.
        statement = " ".join(part.split()).lstrip("{} ")
        if statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif statement and not statement.startswith("."):
            found = STATEMENT.fullmatch(statement)
            if not found:
                raise PtxError(f"cannot read: {statement}")
            name, *modifiers = found[3].replace("::", ".").split(".")
            operands = tuple(OPERAND.findall(found[4]))
            guard, negated = found[2] or "", found[1] == "!"
            code.append(
                Instruction(statement, guard, negated, name, tuple(modifiers), operands)
            )
    return code, labels
