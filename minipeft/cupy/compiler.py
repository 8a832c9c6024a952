"""Compile a row's kernels with NVRTC, for a device or to look at.

Not through `cupy.RawModule(code=…)`: CuPy appends `-ftz=true` to what it compiles
there. Subnormals would be flushed to zero, and the kernels would give other bits than
the reference.
"""

from typing import Any

from minipeft.cupy.kernels import OPTIONS, expressions, source
from minipeft.errors import InputError


def compile_row(row: str, architecture: str) -> tuple[bytes, dict[str, str]]:
    """Return the machine code of a row, and the name in it of each C++ expression.

    Args:
        row: the file in kernels/ without its ending.
        architecture: of the device, as in "80".

    Raises:
        InputError: if the headers of CUDA are missing, or the compiler does not know
            the architecture.
    """
    from cupy.cuda import nvrtc

    if int(architecture) not in nvrtc.getSupportedArchs():
        version = ".".join(map(str, nvrtc.getVersion()))
        raise InputError(
            f"NVRTC {version} does not know the architecture sm_{architecture}; "
            "install the nvidia-cuda-nvrtc that fits the GPU."
        )
    options = (*OPTIONS, f"--gpu-architecture=sm_{architecture}", f"-I{headers()}")
    program = nvrtc.createProgram(source(row), f"{row}.cu", (), ())
    try:
        for name in expressions(row):
            nvrtc.addNameExpression(program, name)
        _run(nvrtc, program, options)
        names = {n: nvrtc.getLoweredName(program, n) for n in expressions(row)}
        # CuPy leaves the last byte out: a zero, without which the file is no ELF.
        return nvrtc.getCUBIN(program) + b"\0", names
    finally:
        nvrtc.destroyProgram(program)


def missing() -> str | None:
    """Say in one sentence why nothing can be compiled here; None where it can."""
    try:
        from cupy.cuda import nvrtc
    except ImportError:
        return (
            "CuPy is not installed: `pip install minipeft[cupy]`, or use "
            "minipeft.torch, which needs no CuPy."
        )
    try:
        nvrtc.getVersion()
    except Exception:  # each way of not finding it has its own type
        return (
            "NVRTC, the CUDA compiler library, is not found: "
            "`pip install nvidia-cuda-nvrtc`."
        )
    try:
        headers()
    except InputError as error:
        return str(error)
    return None


def headers() -> str:
    """Return the folder of cuda_fp16.h and its like.

    Raises:
        InputError: if there is none.
    """
    from cuda.pathfinder import find_nvidia_header_directory

    found: str | None = find_nvidia_header_directory("cudart")
    if found is None:
        raise InputError(
            "the headers of the CUDA runtime are not found: "
            "`pip install nvidia-cuda-runtime`."
        )
    return found


def _run(nvrtc: Any, program: Any, options: tuple[str, ...]) -> None:
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:  # a defect here: say all that the compiler said
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
