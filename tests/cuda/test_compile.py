"""Every kernel compiles for every GPU generation, without a warning or a spill."""

import pytest

from minipeft import kernels
from minipeft.kernels import compiler
from minipeft.lab import machine_code
from tests.cuda import toolchain
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import (
    ARCHITECTURES,
    compile_device,
    needs_listing,
    needs_nvrtc,
)

pytestmark = needs_nvrtc


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("row", ROWS)
def test_no_warning_and_no_spill(row, architecture):
    compiled = compile_device(row, "cubin", architecture, kernels.source(row))
    assert compiled.log == "", f"the compiler says:\n{compiled.log}"


def test_a_spilling_kernel_is_reported():
    """Forced into 24 registers, the kernel spills: so the check above can fail."""
    text = kernels.source("blockwise")
    bound = "__launch_bounds__(THREADS)"
    crowded = text.replace(bound, "__maxnreg__(24)")
    compiled = compile_device("blockwise", "cubin", "80", crowded)
    assert "Registers are spilled" in compiled.log


@pytest.mark.parametrize("row", ROWS)
def test_what_the_executor_compiles_is_what_is_proved(row, tmp_path, monkeypatch):
    """A cubin is made by the executor's function; PTX by all that it gives to NVRTC."""
    given, entire = [], []

    def compile_text(text, file, names, options):
        given.append((text, file, [*names], [*options]))
        return compiler.Compiled(b"", "", {})

    def compile_row(*which):
        entire.append(which)
        return own(*which)

    own = compiler.compile_row
    monkeypatch.setattr(toolchain, "BUILD", tmp_path)
    monkeypatch.setattr(compiler, "compile_text", compile_text)
    monkeypatch.setattr(compiler, "compile_row", compile_row)
    for kind in ("cubin", "ptx"):
        compile_device(row, kind, "90", kernels.source(row))
    assert entire == [(row, "90")]
    cubin, ptx = given
    assert ptx[:3] == cubin[:3]
    virtual = [option.replace("=sm_", "=compute_") for option in cubin[3]]
    assert ptx[3] == virtual != cubin[3]


@needs_listing
def test_a_listing_that_is_kept_is_the_one_that_is_read():
    assert toolchain.disassemble("paged", "80") == machine_code.disassemble("paged")


def test_every_source_is_in_both_tables():
    sources = {path.stem for path in kernels.FOLDER.glob("*.cu")}
    assert {kernel.row for kernel in kernels.KERNELS} == sources
    assert set(ROWS) == sources
