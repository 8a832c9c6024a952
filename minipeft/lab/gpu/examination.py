"""One kernel on the device: checked, timed, beside its peer, in a process of its own.

python -m minipeft.lab.gpu.examination     a task on stdin, then a line: its row

After an access outside of memory, CUDA runs nothing more in that process. So each trial
has a process of its own, and the report continues after a crash. What the host does
takes longest: it imports, reads machine code, computes the reference. So several
processes prepare at the same time, but one alone uses the device.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from minipeft.cupy.executor import current, use
from minipeft.errors import InputError
from minipeft.kernels import Kernel
from minipeft.lab import machine_code
from minipeft.lab.gpu import device as devices
from minipeft.lab.gpu import peers, slots
from minipeft.lab.gpu.device import Device, measure
from minipeft.lab.gpu.launches import Launch, Recorder
from minipeft.lab.gpu.trials import TABLE, Sizes, Trial, difference

COPIED = 512 * 2**20
MATRIX = 8192
MATRIX_DTYPES = ("float32", "tf32", "float16", "bfloat16")
GO = "go"
WORKER = (sys.executable, "-m", "minipeft.lab.gpu.examination")
TENSOR_CORES = ("dora", "qlora")  # rows whose kernels of 16 bits multiply there
LAYERS = 4  # in a row, as in a model
LIMIT = 300  # seconds of a trial on the device, compiling included
CORES = os.cpu_count() or 1
AT_ONCE = min(4, max(1, CORES // 4))  # processes: NumPy uses threads
# Half of the cores for all of them: the one that has the device must launch in time.
THREADS = str(max(1, CORES // (2 * AT_ONCE)))


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of the device.

    Args:
        bandwidth: bytes a second of a copy, read and written.
        products: operations a second of a matrix product by dtype, or why there is no
            such number.
        architecture: as in "90"; empty where it is not known.
        slots: instructions of warps that all schedulers issue in a second.
    """

    bandwidth: float
    products: Mapping[str, float | str]
    architecture: str = ""
    slots: float = 0.0

    def bound(
        self,
        bytes_moved: float,
        operations: float,
        instructions: float | None = None,
        dtype: str = "float32",
    ) -> tuple[float, str]:
        """Return the seconds that no kernel can pass, and what sets them.

        The roofline: the time of the bytes, of the operations, or of the instructions,
        whichever is longest.

        Args:
            bytes_moved: every array once.
            operations: what any kernel for this must calculate.
            instructions: seconds for which this one's keep the schedulers busy.
            dtype: of the matrix product whose rate bounds the operations: of 16 bits
                where the kernel multiplies on tensor cores, otherwise float32.
        """
        times = {"memory": bytes_moved / self.bandwidth}
        rate = self.products[dtype]
        if isinstance(rate, float):
            times["arithmetic"] = operations / rate
        if instructions is not None:
            times["instructions"] = instructions
        limit = max(times, key=times.__getitem__)
        return times[limit], limit

    def instructions(self, launch: Launch) -> float | None:
        """Return the seconds of a launch's instructions; None: they cannot be read."""
        if not self.slots or machine_code.missing():
            return None
        return slots.seconds(launch, self.architecture, self.slots)


@dataclass(frozen=True)
class Checked:
    """The results for one kernel.

    Args:
        kernel: its name.
        dtype: of its instance.
        wrong: how it differs from the reference; then it is not timed.
        seconds: of a launch.
        in_a_row: of one of `LAYERS` launches on arrays of their own, back to back; 0.0
            where memory is too little for them.
        bytes_moved: every array once.
        operations: as the head of its file counts them.
        bound: the roofline's seconds.
        limit: `memory`, `arithmetic` or `instructions`.
        peer: seconds of bitsandbytes' kernel, or why there is no such number; None
            where bitsandbytes has no such kernel.
        agreement: share of its values that equal ours.
        instructions: seconds for which they keep the schedulers busy; None where the
            machine code cannot be read, or the work of the kernel is not known.
    """

    kernel: str
    dtype: str
    wrong: str | None = None
    seconds: float = 0.0
    in_a_row: float = 0.0
    bytes_moved: int = 0
    operations: float = 0.0
    bound: float = 0.0
    limit: str = ""
    peer: float | str | None = None
    agreement: float | None = None
    instructions: float | None = None

    @property
    def rate(self) -> float:
        """Return the bytes moved in a second."""
        return self.bytes_moved / self.seconds

    @property
    def fraction(self) -> float:
        """Return how much of the roofline's speed is reached."""
        return self.bound / self.seconds


@dataclass(frozen=True)
class Task:
    """One trial: its index in the table, and the inputs of its process.

    Args:
        index: in `trials.TABLE`.
        dtype: of the kernel's instance.
        sizes: of the tensors.
        ceilings: of the device.
    """

    index: int
    dtype: str
    sizes: Sizes
    ceilings: Ceilings

    @property
    def name(self) -> str:
        """Name the kernel and the trial."""
        kernel, note, _ = TABLE[self.index]
        return f"{kernel.row}.{kernel.template} {note}".strip()


def tasks(sizes: Sizes, ceilings: Ceilings) -> list[Task]:
    """List all trials."""
    return [
        Task(index, dtype, sizes, ceilings)
        for index, (kernel, _, _) in enumerate(TABLE)
        for dtype in kernel.dtypes or ("float32",)
    ]


def in_turn(tasks: Sequence[Task]) -> Iterator[Checked]:
    """Examine each in a process of its own; a crash becomes the result of the row."""
    begun: deque[Examination] = deque()
    left = deque(tasks)
    try:
        while left or begun:
            while left and len(begun) < AT_ONCE:
                begun.append(Examination(left.popleft()))
            row = begun[0].row()
            begun.popleft()
            yield row
    finally:
        for examination in begun:
            examination.stop()


class Examination:
    """A process that prepares a trial, and waits until it may use the device."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"OMP_NUM_THREADS": THREADS} | os.environ,
        )
        assert self._process.stdin is not None
        message = json.dumps(asdict(task)) + "\n"
        with suppress(BrokenPipeError):  # its row says how it ended
            # Past the buffer: what a dead process left there, `communicate` would raise
            os.write(self._process.stdin.fileno(), message.encode())

    def row(self) -> Checked:
        """Give the device to the process, and wait for its row."""
        name, dtype = self._task.name, self._task.dtype
        try:
            said, failed = self._process.communicate(f"{GO}\n", timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.stop()
            return Checked(name, dtype, f"does not end within {LIMIT} seconds")
        try:
            return Checked(**json.loads(said.splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            said = (failed.strip().splitlines() or ["without a word"])[-1]
            code = self._process.returncode
            wrong = f"does not run: its process ended with {code}: {said}"
            return Checked(name, dtype, wrong)

    def stop(self) -> None:
        """End the process; nothing of it is read any more."""
        with self._process:  # closes the pipes, which a child of its own may hold open
            self._process.kill()


def examined(
    task: Task, device: Device, may_begin: Callable[[], object] = lambda: None
) -> Checked:
    """Examine in this process.

    Args:
        task: one trial.
        device: that times it.
        may_begin: returns when this process may use the device.
    """
    kernel, note, build = TABLE[task.index]
    recorder = Recorder(current())
    try:
        with use(recorder):
            trial = Trial(kernel, task.dtype, note, *build(task.sizes, task.dtype))
            _prepare(kernel, task.ceilings, device)
            may_begin()
            return examine(recorder, trial, device, task.ceilings)
    except MemoryError as error:
        wrong = f"does not run: too little free memory ({_first_line(error)})"
        return Checked(task.name, task.dtype, wrong)


def _prepare(kernel: Kernel, ceilings: Ceilings, device: Device) -> None:
    """Import the peer and read the machine code, which needs no turn."""
    peers.missing(device.place)
    if ceilings.slots and not machine_code.missing():
        slots.disassembled(kernel.row, slots.alike(ceilings.architecture))


def measure_ceilings(device: Device) -> Ceilings:
    """Measure the limits of this device."""
    seconds = measure(device, device.copying(COPIED))
    rates = {dtype: _product_rate(device, dtype) for dtype in MATRIX_DTYPES}
    return Ceilings(2 * COPIED / seconds, rates, *device.pace())


def _product_rate(device: Device, dtype: str) -> float | str:
    try:
        call = device.multiplying(dtype, MATRIX)
    except InputError as reason:
        return str(reason)
    return 2 * MATRIX**3 / measure(device, call)


def examine(
    recorder: Recorder, trial: Trial, device: Device, ceilings: Ceilings
) -> Checked:
    """Check a kernel; if it is correct, time it."""
    try:
        trial.run()
        launch = recorder.take(trial.kernel)
        wrong = difference(trial, launch)
    except RuntimeError as error:  # what CUDA and its compiler raise
        wrong = f"does not run: {_first_line(error)}"
    if wrong:
        return Checked(trial.name, trial.dtype, wrong)
    busy = ceilings.instructions(launch)
    moved, operations = launch.bytes_moved, launch.operations
    bound, limit = ceilings.bound(moved, operations, busy, _cores(trial))
    # Before the peer: what the peer breaks must not be taken for a fault of ours.
    seconds, in_a_row = measure(device, launch.again), _in_a_row(launch, device)
    peer, agreement = beside(trial, launch, device)
    return Checked(
        kernel=trial.name,
        dtype=trial.dtype,
        seconds=seconds,
        in_a_row=in_a_row,
        bytes_moved=moved,
        operations=operations,
        bound=bound,
        limit=limit,
        peer=peer,
        agreement=agreement,
        instructions=busy,
    )


def _cores(trial: Trial) -> str:
    """Return the dtype whose rate of products bounds a kernel."""
    return trial.dtype if trial.kernel.row in TENSOR_CORES else "float32"


def _in_a_row(launch: Launch, device: Device) -> float:
    try:
        return measure(device, launch.in_a_row(LAYERS)) / LAYERS
    except MemoryError:
        return 0.0


def beside(
    trial: Trial, launch: Launch, device: Device
) -> tuple[float | str | None, float | None]:
    """Time bitsandbytes on the same tensors, and count equal values."""
    build = peers.PEERS.get(peers.key(trial))
    if build is None:
        return None, None
    if reason := peers.missing(device.place):
        return reason, None
    try:
        peer = build(peers.Tensors(launch.arguments, device.place))
        agreement = peer.agreement(launch)
        return measure(device, peer.call), agreement
    except Exception as error:  # another library may raise any exception
        return f"failed: {_first_line(error)}", None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wait_for_turn() -> None:
    if not sys.stdin.readline():  # the report has ended, perhaps for another one
        raise SystemExit("the report ended before this trial had its turn")


def main() -> None:
    """Examine a task, the first line of stdin, and print its row.

    The second line says that this process may use the first CUDA device.
    """
    given = json.loads(sys.stdin.readline())
    sizes, ceilings = Sizes(**given["sizes"]), Ceilings(**given["ceilings"])
    task = Task(given["index"], given["dtype"], sizes, ceilings)
    row = examined(task, devices.CupyDevice(), _wait_for_turn)
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
