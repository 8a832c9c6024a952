"""Compile the kernels without a GPU: for a device with NVRTC, for this CPU with g++.

Compiled files are kept under build/cuda. Each name has a hash of everything that the
file depends on, so a second run compiles nothing.
"""

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from minipeft import kernels
from minipeft.kernels import compiler
from minipeft.lab import machine_code
from minipeft.lab.machine_code import MachineCode

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "cuda"
CPU = Path(kernels.__file__).with_name("cpu")
MODEL = CPU / "model.hpp"
ARCHITECTURES = ("75", "80", "90", "100")

# The ways to build the CPU program, and the errors that each shows: wrong values; races
# between the threads of a block; addresses outside a buffer, misaligned or undefined.
FLAVOURS = {
    "values": "-DSHIM_POISON",
    "races": "-g1 -fsanitize=thread",
    "addresses": "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all",
}
GXX_FLAGS = (
    "-std=c++20 -O1 -ffp-contract=off -fno-strict-aliasing "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Winvalid-pch"
)


def wheel(module: str) -> Path | None:
    """Return the folder of an installed NVIDIA wheel."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(next(iter(found.submodule_search_locations))) if found else None


def cuda_folder() -> Path | None:
    folder = wheel("nvidia.cu13")
    return folder if folder and (folder / "include" / "cuda_fp16.h").exists() else None


TOOLS = (cuda_folder() or Path()) / "bin"


def missing_for_cpu() -> str | None:
    if not shutil.which("g++"):
        return "g++ is not installed"
    return None if cuda_folder() else "the wheel nvidia-cuda-runtime is not installed"


def missing_for_device() -> str | None:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:
        return f"NVRTC or its Python bindings are not installed ({error})"
    return None if cuda_folder() else "the wheel nvidia-cuda-runtime is not installed"


def missing_for_listing() -> str | None:
    tools = [TOOLS / name for name in ("cuobjdump", "nvdisasm")]
    absent = [f"nvidia-cuda-{tool.name}" for tool in tools if not tool.exists()]
    reason = f"not installed: {' '.join(absent)}" if absent else None
    return missing_for_device() or reason


needs_listing = pytest.mark.skipif(
    missing_for_listing() is not None, reason=str(missing_for_listing())
)
needs_cpu_build = pytest.mark.skipif(
    missing_for_cpu() is not None, reason=str(missing_for_cpu())
)
needs_nvrtc = pytest.mark.skipif(
    missing_for_device() is not None, reason=str(missing_for_device())
)


def cached(name: str, parts: list[str], make: Callable[[Path], None]) -> Path:
    """Return build/cuda/<name>-<hash of parts>; call `make` if it does not exist."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = BUILD / f"{name}-{digest}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait
            if not path.exists():
                unfinished = path.with_name(f"{path.name}.unfinished")
                remove(unfinished)  # left by an interrupted run
                make(unfinished)
                unfinished.replace(path)
    return path


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# For this CPU -------------------------------------------------------------------------


def cpu_source(row: str, variants: dict[str, str], dtypes: Collection[str]) -> str:
    """Write the program for one row: every variant of its source in a namespace.

    Variants are the source itself and its mutants. They are compiled together because
    much of the time goes into NVIDIA's headers.
    """
    names = [k.expression(d) for k, d in kernels.instances(row) if d in dtypes]
    parts = ['#include "shim.hpp"']
    entries = []
    for number, (variant, text) in enumerate(variants.items()):
        parts.append(f"namespace v{number} {{\n{text}\n}}")
        entries += [
            f'    {{"{variant}:{name}", shim::describe(&v{number}::{name})}},'
            for name in names
        ]
    parts.append(
        "Registry registry() {\n  return {\n" + "\n".join(entries) + "\n  };\n}"
    )
    return "\n".join(parts)


def compile_cpu(
    row: str,
    flavour: str,
    variants: dict[str, str],
    dtypes: Collection[str] = tuple(kernels.CTYPES),
) -> Path:
    """Build the program that runs a row's kernels on this CPU."""
    program = cpu_source(row, variants, dtypes)
    flags = FLAVOURS[flavour].split()
    runner = compile_runner(flavour)
    parts = [program, str(runner), *flags]
    headers = precompile(flavour)
    command = [f"-I{headers}", "-x", "c++", "-", "-x", "none", runner, *flags]
    return cached(f"{row}-{flavour}", parts, lambda path: gxx(command, path, program))


def precompile(flavour: str) -> Path:
    """Compile NVIDIA's headers once for all programs: they take half of the time."""
    header = HERE / "shim.hpp"
    flags = FLAVOURS[flavour].split()
    parts = [
        header.read_text(),
        MODEL.read_text(),
        *flags,
        GXX_FLAGS,
        gxx_version(),
        str(cuda_folder()),
    ]

    def make(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(header, folder)
        gxx(["-x", "c++-header", header, *flags], folder / "shim.hpp.gch")

    return cached(f"headers-{flavour}", parts, make)


def compile_runner(flavour: str) -> Path:
    """Build the part that all rows share: the execution model and the main loop."""
    sources = [CPU / "fibers.cpp", HERE / "runner.cpp"]
    parts = [MODEL.read_text(), *(s.read_text() for s in sources)]
    # ThreadSanitizer must see the kernels, not the scheduler.
    flags = "-DSHIM_RACES" if flavour == "races" else FLAVOURS[flavour]
    command = ["-r", "-nostdlib", *flags.split(), *sources]
    parts += [flags, GXX_FLAGS, gxx_version(), str(cuda_folder())]
    return cached(f"runner-{flavour}", parts, lambda path: gxx(command, path))


def gxx(command: list[str | Path], output: Path, program: str = "") -> None:
    include = [f"-I{CPU}", "-isystem", str(cuda_folder() / "include")]
    line = ["g++", *GXX_FLAGS.split(), *command, *include, "-o", output]
    built = subprocess.run(line, input=program, text=True, capture_output=True)
    assert built.returncode == 0, f"g++ fails:\n{built.stderr}"


@cache
def gxx_version() -> str:
    return subprocess.check_output(["g++", "--version"], text=True)


# For a device -------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """NVRTC's output for one row: PTX or cubin, its log, and the mangled names."""

    image: Path
    log: str
    names: dict[str, str]


def compile_device(
    row: str,
    kind: str,
    architecture: str,
    text: str,
    dtypes: Collection[str] = tuple(kernels.CTYPES),
) -> Compiled:
    """Compile a row's source; `kind` is "ptx" or "cubin".

    The executor's own function compiles a cubin of all of a row as it is.
    """
    expressions = [k.expression(d) for k, d in kernels.instances(row) if d in dtypes]
    target = {"ptx": "compute", "cubin": "sm"}[kind]
    options = [*kernels.OPTIONS, f"--gpu-architecture={target}_{architecture}"]
    options += [f"-I{cuda_folder() / 'include'}"]
    parts = [text, *expressions, *options, nvrtc_version(), code_of(compiler)]
    whole = text == kernels.source(row) and expressions == kernels.expressions(row)

    def make(folder: Path) -> None:
        folder.mkdir()
        if whole and kind == "cubin":
            made = compiler.compile_row(row, architecture)
        else:
            made = compiler.compile_text(text, f"{row}.cu", expressions, options)
        (folder / "image").write_bytes(made.image)
        (folder / "log").write_text(made.log)
        names = "".join(f"{k}\t{v}\n" for k, v in made.names.items())
        (folder / "names").write_text(names)

    folder = cached(f"{row}-{kind}{architecture}", parts, make)
    lines = (folder / "names").read_text().splitlines()
    names = dict(line.split("\t") for line in lines)
    return Compiled(folder / "image", (folder / "log").read_text(), names)


@cache
def disassemble(row: str, architecture: str) -> dict[str, MachineCode]:
    """Return what `machine_code.disassemble` does, and keep it under build/cuda."""
    compiled = compile_device(row, "cubin", architecture, kernels.source(row))

    def make(path: Path) -> None:
        found = machine_code.read(compiled.image.read_bytes(), compiled.names)
        path.write_text(json.dumps({name: asdict(f) for name, f in found.items()}))

    parts = [str(compiled.image), code_of(machine_code)]
    kept = cached(f"{row}-listing{architecture}", parts, make)
    return {
        name: MachineCode(**{**code, "instructions": tuple(code["instructions"])})
        for name, code in json.loads(kept.read_text()).items()
    }


def code_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text("utf-8")


@cache
def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    return str(nvrtc.nvrtcVersion())
