"""Compile every kernel with NVRTC 12, which `make cuda12` installs: the extra `cupy12`.

NVIDIA's bindings for CUDA 13 cannot call NVRTC 12, so this module calls the library
itself. The wheels, 93 MB, are not part of the tests' environment.
"""

import ctypes
import sys
from pathlib import Path

from minipeft import kernels

ARCHITECTURES = ("75", "90", "120")


def main(folder: str) -> int:
    """Compile all rows for all architectures; return the exit code."""
    root = Path(folder) / "nvidia"
    library = ctypes.CDLL(str(root / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"))
    include = root / "cuda_runtime" / "include"
    failed = 0
    for row in sorted({kernel.row for kernel in kernels.KERNELS}):
        for architecture in ARCHITECTURES:
            said = refusal(library, row, (f"sm_{architecture}", str(include)))
            failed += bool(said)
            print(f"{row} sm_{architecture}: {said or 'compiled'}", flush=True)
    return bool(failed)


def refusal(library: ctypes.CDLL, row: str, where: tuple[str, str]) -> str:
    """Return the compiler's complaints about a row: warnings, spills, errors."""
    program = ctypes.c_void_p()
    text, name = kernels.source(row).encode(), f"{row}.cu".encode()
    _call(library.nvrtcCreateProgram, ctypes.byref(program), text, name, 0, None, None)
    for expression in kernels.expressions(row):
        _call(library.nvrtcAddNameExpression, program, expression.encode())
    given = (*kernels.OPTIONS, f"--gpu-architecture={where[0]}", f"-I{where[1]}")
    options = [option.encode() for option in given]
    array = (ctypes.c_char_p * len(options))(*options)
    status = library.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    _call(library.nvrtcGetProgramLogSize, program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    _call(library.nvrtcGetProgramLog, program, log)
    _call(library.nvrtcDestroyProgram, ctypes.byref(program))
    return log.value.decode().strip() or (f"status {status}" if status else "")


def _call(function: object, *arguments: object) -> None:
    status = function(*arguments)  # type: ignore[operator]
    if status:
        raise RuntimeError(f"{getattr(function, '__name__', '')}: status {status}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
