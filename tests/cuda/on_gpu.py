"""`make test-gpu`: all that needs a CUDA device, or one line that says why nothing ran.

python -m tests.cuda.on_gpu            the tests, the vectors, the sanitizers
python -m tests.cuda.on_gpu --small    every row's small cases, for a sanitizer
"""

import shutil
import subprocess
import sys
from pathlib import Path

from minipeft.cupy.executor import missing, use
from minipeft.kernels import CTYPES
from tests.cuda.executors import DeviceExecutor
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import TOOLS

TOOLKIT = Path("/usr/local/cuda/bin")
# What compute-sanitizer looks for: wild and misaligned addresses; races in shared
# memory; barriers that some threads miss; reads of what nobody wrote.
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
PYTHON = sys.executable


def steps(sanitizer: Path | None) -> dict[str, list[str]]:
    """Name the programs to run."""
    verify = [PYTHON, "-m", "minipeft.cli", "verify"]
    small = [PYTHON, "-m", "tests.cuda.on_gpu", "--small"]
    found = {
        "agreement": [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests"],
        "vectors, cupy": [*verify, "cupy"],
        "vectors, torch": [*verify, "torch", "--device", "cuda"],
    }
    if sanitizer is None:
        print(
            "compute-sanitizer is not here, so nothing ran under it: "
            "`pip install nvidia-cuda-sanitizer-api`."
        )
        return found
    prefix = [str(sanitizer), "--error-exitcode", "1", "--tool"]
    return found | {tool: [*prefix, tool, *small] for tool in SANITIZERS}


def find_sanitizer() -> Path | None:
    """Look where a CUDA toolkit and where the wheel put it."""
    name = "compute-sanitizer"
    places = (shutil.which(name), TOOLKIT / name, TOOLS / name)
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


def small() -> None:
    """Launch every kernel a few times, each array in an allocation of its own."""
    import cupy

    cupy.cuda.set_allocator(None)  # in a pool, a neighbour would hide an overrun
    with use(DeviceExecutor()):
        for row in ROWS.values():
            row.small(CTYPES)


def main(arguments: list[str]) -> int:
    """Return 0 if all passed or there is no GPU, 1 otherwise.

    Under a sanitizer a GPU was there a moment ago: what is missing now is a failure.
    """
    if reason := missing():
        print(f"test-gpu: nothing ran. {reason}")
        return int(arguments == ["--small"])
    if arguments == ["--small"]:
        small()
        return 0
    failed = []
    for name, command in steps(find_sanitizer()).items():
        print(f"== {name}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
