"""Every kernel compiles for every GPU generation, without a warning or a spill."""

import pytest

from minipeft import kernels
from minipeft.kernels.compiler import compile_row
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import ARCHITECTURES, compile_device, needs_nvrtc

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
def test_what_the_executor_compiles_is_what_is_proved(row):
    """Both compile to the same machine code, byte for byte, with the same options."""
    made = compile_row(row, "90")
    proved = compile_device(row, "cubin", "90", kernels.source(row))
    assert made.names == proved.names
    assert made.image == proved.image.read_bytes()


def test_every_source_is_in_both_tables():
    sources = {path.stem for path in kernels.FOLDER.glob("*.cu")}
    assert {kernel.row for kernel in kernels.KERNELS} == sources
    assert set(ROWS) == sources
