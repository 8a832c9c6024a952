"""The report: every kernel checked, timed, and compared with the device's limits."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minipeft import __version__
from minipeft.errors import InputError
from minipeft.lab import machine_code
from minipeft.lab.files import write_atomic
from minipeft.lab.gpu import examination
from minipeft.lab.gpu.device import METHOD, Device
from minipeft.lab.gpu.examination import (
    LAYERS,
    Ceilings,
    Checked,
    measure_ceilings,
    tasks,
)
from minipeft.lab.gpu.trials import Sizes


@dataclass(frozen=True)
class Report:
    """The contents of the files."""

    facts: Mapping[str, str]
    ceilings: Ceilings
    rows: Sequence[Checked]

    @property
    def wrong(self) -> list[Checked]:
        """Return the kernels that differ from the reference."""
        return [row for row in self.rows if row.wrong]


def run(
    folder: Path, device: Device, sizes: Sizes | None = None, resume: bool = False
) -> int:
    """Make the report, written after each kernel; print it.

    Args:
        folder: of `gpu-report.md` and `gpu-report.json`.
        device: measured for its ceilings; each kernel runs in a process of its own,
            one at a time.
        sizes: of the tensors.
        resume: go on with the report in the folder, if it is of this device and sizes.

    Returns:
        The exit code: 0, or 1 if a kernel was wrong.

    Raises:
        InputError: if there is no memory, or the files cannot be written.
    """
    try:
        ceilings = measure_ceilings(device)
    except MemoryError as error:
        raise InputError(
            f"the device has too little free memory ({error}); end other programs that "
            "use it, or take a larger one."
        ) from error
    about = dict(device.facts()) | _described(sizes or Sizes())
    rows = _written(folder, about) if resume else []
    left = tasks(sizes or Sizes(), ceilings)[len(rows) :]
    for row in examination.in_turn(left):
        verdict = "WRONG" if row.wrong else f"{1e6 * row.seconds:.1f} µs"
        print(f"{row.kernel} {row.dtype}: {verdict}", file=sys.stderr)
        rows.append(row)
        # After each kernel, because the next one may crash the machine.
        write(folder, Report(about, ceilings, rows))
    report = Report(about, ceilings, rows)
    print(markdown(report), end="")
    return 1 if report.wrong else 0


def _described(sizes: Sizes) -> dict[str, str]:
    shape = " × ".join(map(str, sizes.weights))
    return {"weights": f"{shape}, rank {sizes.r}, {sizes.adapters} adapters"}


def _written(folder: Path, about: Mapping[str, str]) -> list[Checked]:
    """Read the rows of an earlier report, which are the first of a longer one."""
    try:
        found = json.loads((folder / "gpu-report.json").read_text("utf-8"))
        same = (found["minipeft"], found["device"]) == (__version__, about)
        return [Checked(**row) for row in found["kernels"]] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []  # there is no earlier report, or it is unreadable


def write(folder: Path, report: Report) -> None:
    """Write both files, each whole or not at all."""
    write_atomic(folder / "gpu-report.json", as_json(report).encode())
    write_atomic(folder / "gpu-report.md", markdown(report).encode())


# Writing


def as_json(report: Report) -> str:
    """Return everything as one JSON object; seconds, bytes and operations."""
    content = {
        "minipeft": __version__,
        "method": METHOD,
        "device": dict(report.facts),
        "bandwidth": report.ceilings.bandwidth,
        "products": dict(report.ceilings.products),
        "architecture": report.ceilings.architecture,
        "slots": report.ceilings.slots,
        "kernels": [asdict(row) for row in report.rows],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def markdown(report: Report) -> str:
    """Return the report as an issue shows it."""
    parts = [
        f"## minipeft {__version__} on {report.facts['name']}",
        _facts(report.facts),
        _ceilings(report.ceilings),
        _kernels(report.rows),
        _wrong(report),
        _explanation(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(facts: Mapping[str, str]) -> str:
    rest = {name: fact for name, fact in facts.items() if name != "name"}
    return "\n".join(f"- {name}: {fact}" for name, fact in rest.items())


def _ceilings(ceilings: Ceilings) -> str:
    lines = [
        "| ceiling | measured |",
        "|:--|--:|",
        f"| copy, read and written | {ceilings.bandwidth / 1e9:.0f} GB/s |",
    ]
    for dtype, rate in ceilings.products.items():
        number = rate if isinstance(rate, str) else f"{rate / 1e12:.1f} Tflop/s"
        lines.append(f"| matrix product, {dtype} | {number} |")
    return "\n".join(lines)


def _kernels(rows: Sequence[Checked]) -> str:
    lines = [
        "| kernel | dtype | µs | in a row, µs | MB | GB/s | instructions, µs "
        "| bound, µs | reached | bound by | bitsandbytes, µs | ours / theirs "
        "| same values |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|:--|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Checked) -> str:
    cells = [row.kernel, row.dtype]
    if row.wrong:
        return _cells([*cells, "**WRONG**", *[""] * 10])
    cells += [
        f"{1e6 * row.seconds:.1f}",
        f"{1e6 * row.in_a_row:.1f}" if row.in_a_row else "",
        f"{row.bytes_moved / 1e6:.2f}",
        f"{row.rate / 1e9:.0f}",
        "" if row.instructions is None else f"{1e6 * row.instructions:.1f}",
        f"{1e6 * row.bound:.1f}",
        f"{row.fraction:.0%}",
        row.limit,
    ]
    if isinstance(row.peer, float):
        cells += [f"{1e6 * row.peer:.1f}", f"{row.seconds / row.peer:.2f}"]
    else:
        cells += ["" if row.peer is None else "not measured", ""]
    return _cells([*cells, "" if row.agreement is None else f"{row.agreement:.4%}"])


def _unread(report: Report) -> list[str]:
    timed = [row for row in report.rows if not row.wrong]
    if not timed or any(row.instructions is not None for row in timed):
        return []
    reason = machine_code.missing() or "the clock of the device is not known"
    return [f"The instructions were not counted: {reason}."]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _wrong(report: Report) -> str:
    lines = [f"- {row.kernel} {row.dtype}: {row.wrong}" for row in report.wrong]
    return "\n".join(["Wrong, and therefore not timed:", "", *lines]) if lines else ""


def _explanation(report: Report) -> str:
    reasons = dict.fromkeys(r.peer for r in report.rows if isinstance(r.peer, str))
    return "\n".join(
        [
            f"{METHOD} Checked first: every byte that a kernel wrote is the "
            "reference's. In a row: one of "
            f"{LAYERS} launches on arrays of their own, back to back. MB counts every "
            "array once. The bound is the longest of three: the bytes at the speed of "
            "the copy, the operations at the rate of the float32 product (of 16 bits: "
            "where tensor cores multiply, at the rate of that product), and the "
            "instructions at one a cycle of each scheduler, counted in the machine "
            "code with the pipes that they keep busy.",
            *_unread(report),
            *(f"bitsandbytes was not measured: {reason}." for reason in reasons),
        ]
    )
