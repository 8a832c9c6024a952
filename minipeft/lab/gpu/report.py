"""The report: every kernel checked, timed, and compared with what the device can do."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minipeft import __version__
from minipeft.cupy.executor import current, use
from minipeft.errors import InputError
from minipeft.lab.files import write_atomic
from minipeft.lab.gpu import peers
from minipeft.lab.gpu.device import METHOD, Device, measure
from minipeft.lab.gpu.launches import Launch, Recorder
from minipeft.lab.gpu.trials import Sizes, Trial, difference, trials

COPIED = 512 * 2**20
MATRIX = 8192
MATRIX_DTYPES = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do.

    Args:
        bandwidth: bytes a second of a copy, read and written.
        products: operations a second of a matrix product by dtype, or why there is no
            such number.
    """

    bandwidth: float
    products: Mapping[str, float | str]

    def bound(self, bytes_moved: float, operations: float) -> tuple[float, str]:
        """Return the seconds that no kernel can pass, and what sets them.

        The roofline: the time of the bytes or of the operations, whichever is longer.
        All kernels here sum in float32 outside of the tensor cores.
        """
        times = {"memory": bytes_moved / self.bandwidth}
        rate = self.products["float32"]
        if isinstance(rate, float):
            times["arithmetic"] = operations / rate
        limit = max(times, key=times.__getitem__)
        return times[limit], limit


@dataclass(frozen=True)
class Row:
    """What was found of one kernel.

    Args:
        kernel: its name.
        dtype: of its instance.
        wrong: how it differs from the reference; then it is not timed.
        seconds: of a launch.
        bytes_moved: every array once.
        operations: as the head of its file counts them.
        bound: the roofline's seconds.
        limit: `memory` or `arithmetic`.
        peer: seconds of bitsandbytes' kernel, or why there is no such number; None
            where bitsandbytes has no such kernel.
        agreement: share of its values that equal ours.
    """

    kernel: str
    dtype: str
    wrong: str | None = None
    seconds: float = 0.0
    bytes_moved: int = 0
    operations: float = 0.0
    bound: float = 0.0
    limit: str = ""
    peer: float | str | None = None
    agreement: float | None = None

    @property
    def rate(self) -> float:
        """Return the bytes moved in a second."""
        return self.bytes_moved / self.seconds

    @property
    def fraction(self) -> float:
        """Return how much of the roofline's speed is reached."""
        return self.bound / self.seconds


@dataclass(frozen=True)
class Report:
    """All that goes into the files."""

    facts: Mapping[str, str]
    ceilings: Ceilings
    rows: Sequence[Row]

    @property
    def wrong(self) -> list[Row]:
        """Return the kernels that differ from the reference."""
        return [row for row in self.rows if row.wrong]


def run(folder: Path, device: Device, sizes: Sizes | None = None) -> int:
    """Make the report on the current executor, write it and print it.

    Args:
        folder: of `gpu-report.md` and `gpu-report.json`.
        device: holds the executor's arrays, and the clock.
        sizes: of the tensors.

    Returns:
        The exit code: 0, or 1 if a kernel was wrong.

    Raises:
        InputError: if there is no GPU, no memory, or the files cannot be written.
    """
    try:
        ceilings = measure_ceilings(device)
        rows = list(examine_all(device, ceilings, sizes or Sizes()))
    except MemoryError as error:
        raise InputError(
            f"the device has too little free memory ({error}); end other programs that "
            "use it, or take a larger one."
        ) from error
    report = Report(device.facts(), ceilings, rows)
    text = markdown(report)
    write_atomic(folder / "gpu-report.json", as_json(report).encode())
    write_atomic(folder / "gpu-report.md", text.encode())
    print(text, end="")
    return 1 if report.wrong else 0


def measure_ceilings(device: Device) -> Ceilings:
    """Measure what nothing on this device goes beyond."""
    seconds = measure(device, device.copying(COPIED))
    rates = {dtype: _product_rate(device, dtype) for dtype in MATRIX_DTYPES}
    return Ceilings(2 * COPIED / seconds, rates)


def _product_rate(device: Device, dtype: str) -> float | str:
    try:
        call = device.multiplying(dtype, MATRIX)
    except InputError as reason:
        return str(reason)
    return 2 * MATRIX**3 / measure(device, call)


def examine_all(device: Device, ceilings: Ceilings, sizes: Sizes) -> Iterator[Row]:
    """Look at every kernel; say on stderr how far it is."""
    recorder = Recorder(current())
    with use(recorder):
        for trial in trials(sizes):
            row = examine(recorder, trial, device, ceilings)
            verdict = "WRONG" if row.wrong else f"{1e6 * row.seconds:.1f} µs"
            print(f"{row.kernel} {row.dtype}: {verdict}", file=sys.stderr)
            yield row


def examine(
    recorder: Recorder, trial: Trial, device: Device, ceilings: Ceilings
) -> Row:
    """Check a kernel; time it if it is right."""
    recorder.forget()
    try:
        trial.run()
        launch = recorder.take(trial.kernel)
        wrong = difference(trial, launch)
    except RuntimeError as error:  # what CUDA and its compiler raise
        wrong = f"does not run: {_first_line(error)}"
    if wrong:
        return Row(trial.name, trial.dtype, wrong)
    bound, limit = ceilings.bound(launch.bytes_moved, launch.operations)
    peer, agreement = beside(trial, launch, device)
    return Row(
        kernel=trial.name,
        dtype=trial.dtype,
        seconds=measure(device, launch.again),
        bytes_moved=launch.bytes_moved,
        operations=launch.operations,
        bound=bound,
        limit=limit,
        peer=peer,
        agreement=agreement,
    )


def beside(
    trial: Trial, launch: Launch, device: Device
) -> tuple[float | str | None, float | None]:
    """Time bitsandbytes on the same tensors, and say how often it gives our values."""
    build = peers.PEERS.get(peers.key(trial))
    if build is None:
        return None, None
    if reason := peers.missing(device.place):
        return reason, None
    try:
        peer = build(peers.Tensors(launch.arguments, device.place))
        agreement = peer.agreement(launch)
        return measure(device, peer.call), agreement
    except Exception as error:  # a stranger may fail in any way
        return f"failed: {_first_line(error)}", None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Writing


def as_json(report: Report) -> str:
    """Return everything as one JSON object; seconds, bytes and operations."""
    content = {
        "minipeft": __version__,
        "method": METHOD,
        "device": dict(report.facts),
        "bandwidth": report.ceilings.bandwidth,
        "products": dict(report.ceilings.products),
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


def _kernels(rows: Sequence[Row]) -> str:
    lines = [
        "| kernel | dtype | µs | MB | GB/s | bound, µs | reached | bound by "
        "| bitsandbytes, µs | ours / theirs | same values |",
        "|:--|:--|--:|--:|--:|--:|--:|:--|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    cells = [row.kernel, row.dtype]
    if row.wrong:
        return _cells([*cells, "**WRONG**", *[""] * 8])
    cells += [
        f"{1e6 * row.seconds:.1f}",
        f"{row.bytes_moved / 1e6:.2f}",
        f"{row.rate / 1e9:.0f}",
        f"{1e6 * row.bound:.1f}",
        f"{row.fraction:.0%}",
        row.limit,
    ]
    if isinstance(row.peer, float):
        cells += [f"{1e6 * row.peer:.1f}", f"{row.seconds / row.peer:.2f}"]
    else:
        cells += ["" if row.peer is None else "not measured", ""]
    return _cells([*cells, "" if row.agreement is None else f"{row.agreement:.4%}"])


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
            "reference's. MB counts every array once. The bound is the longer of the "
            "bytes at the speed of the copy and the operations at the rate of the "
            "float32 product.",
            *(f"bitsandbytes was not measured: {reason}." for reason in reasons),
        ]
    )
