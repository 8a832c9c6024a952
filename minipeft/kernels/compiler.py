"""Compile the kernels of a method with NVRTC."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minipeft.errors import InputError
from minipeft.kernels import OPTIONS, expressions, source

BINDINGS = (
    "NVIDIA's bindings are not installed: in the clone of minipeft, run "
    "`pip install '.[kernels]'` for CUDA 13, `pip install '.[cupy12]'` for CUDA 12; "
    "minipeft.torch runs without them."
)


@dataclass(frozen=True)
class Compiled:
    """The result of a compilation by NVRTC.

    Args:
        image: machine code (a cubin), or PTX.
        log: messages of the compiler.
        names: the name in the image of each C++ expression.
    """

    image: bytes
    log: str
    names: dict[str, str]


def compile_row(row: str, architecture: str) -> Compiled:
    """Compile a row for a device.

    Args:
        row: the file in this folder without its ending.
        architecture: of the device, as in "80".

    Raises:
        InputError: if the compiler is missing, or does not know the architecture.
    """
    if reason := missing():
        raise InputError(reason)
    nvrtc = _nvrtc()
    known = _call(nvrtc.nvrtcGetSupportedArchs)
    if int(architecture) not in known:
        raise InputError(
            f"NVRTC {version()} does not know the architecture sm_{architecture}; "
            "install the nvidia-cuda-nvrtc that fits the GPU."
        )
    options = (*OPTIONS, f"--gpu-architecture=sm_{architecture}", f"-I{headers()}")
    return compile_text(source(row), f"{row}.cu", expressions(row), options)


def compile_text(
    text: str, file: str, names: Sequence[str], options: Sequence[str]
) -> Compiled:
    """Compile CUDA C++; PTX where the architecture is virtual, as in `compute_80`.

    Args:
        text: the source.
        file: the name of the source in the compiler's messages.
        names: the template instances to make, as C++ expressions.
        options: of NVRTC.

    Raises:
        RuntimeError: with the compiler's messages, if it refuses the text.
    """
    nvrtc = _nvrtc()
    program = _call(nvrtc.nvrtcCreateProgram, text.encode(), file.encode(), 0, [], [])
    try:
        for name in names:
            _call(nvrtc.nvrtcAddNameExpression, program, name.encode())
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        said = log.rstrip(b"\0 \n").decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:  # a defect of minipeft: show all
            raise RuntimeError(f"NVRTC refuses {file}:\n{said}")
        lowered = nvrtc.nvrtcGetLoweredName
        mangled = {n: _call(lowered, program, n.encode()).decode() for n in names}
        return Compiled(_image(program, options), said, mangled)
    finally:
        _call(nvrtc.nvrtcDestroyProgram, program)


def missing() -> str | None:
    """Say in one sentence why nothing can be compiled here; None where it can."""
    try:
        nvrtc = _nvrtc()
    except ImportError:
        return BINDINGS
    try:
        _call(nvrtc.nvrtcVersion)
    except Exception:  # many types of error mean: not found
        return (
            "NVRTC, the CUDA compiler library, is not found: "
            "`pip install nvidia-cuda-nvrtc`."
        )
    try:
        headers()
    except InputError as error:
        return str(error)
    return None


def version() -> str:
    """Return the version of the compiler, as in "13.0"."""
    return ".".join(map(str, _call(_nvrtc().nvrtcVersion)))


def headers() -> str:
    """Return the folder of cuda_fp16.h and the other CUDA headers.

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


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _image(program: Any, options: Sequence[str]) -> bytes:
    nvrtc = _nvrtc()
    if any("compute_" in option for option in options):
        return _read(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
    return _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)


def _read(program: Any, size: Callable[..., Any], content: Callable[..., Any]) -> bytes:
    # NVRTC overwrites the buffer. Python shares bytes objects of length one; NVRTC
    # writes a zero into such a buffer (an empty log), so the object must hold a zero.
    buffer = bytes(_call(size, program))
    _call(content, program, buffer)
    return buffer


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    status, *results = function(*arguments)
    if int(status):
        raise RuntimeError(f"{function.__name__}: {status}")
    return results[0] if len(results) == 1 else results
