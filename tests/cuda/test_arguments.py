"""The host passes the arguments that the kernel reads, according to the compilers."""

import re
import subprocess

import pytest

from minipeft import kernels
from tests.cuda import ptx_parser
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import (
    ARCHITECTURES,
    compile_cpu,
    compile_device,
    needs_cpu_build,
    needs_nvrtc,
)

ROW = pytest.mark.parametrize("row", ROWS)
ARCHITECTURE = pytest.mark.parametrize(
    "architecture", [ARCHITECTURES[0], ARCHITECTURES[-1]]
)


@ROW
@ARCHITECTURE
@needs_nvrtc
def test_widths_and_threads_in_ptx(row, architecture):
    compiled = compile_device(row, "ptx", architecture, kernels.source(row))
    entries = ptx_parser.parse(compiled.image.read_text())
    for kernel, dtype in kernels.instances(row):
        entry = entries[compiled.names[kernel.expression(dtype)]]
        assert list(entry.parameters.values()) == kernel.widths()
        assert entry.threads == kernel.threads


@ROW
@needs_cpu_build
def test_widths_in_the_cpu_build(row):
    program = compile_cpu(row, "values", {"source": kernels.source(row)})
    lines = subprocess.check_output([program, "--widths"], text=True).splitlines()
    found = {name: widths for name, *widths in (line.split() for line in lines)}
    for kernel, dtype in kernels.instances(row):
        widths = [str(width) for width in kernel.widths()]
        assert found[f"source:{kernel.expression(dtype)}"] == widths


@ROW
@ARCHITECTURE
@needs_nvrtc
def test_arithmetic_is_exact(row, architecture):
    """Nothing is approximated, flushed to zero, or fused without being asked for."""
    text = kernels.source(row)
    image = compile_device(row, "ptx", architecture, text).image.read_text()
    assert not re.findall(r"\.(?:approx|ftz|full)\b", image)
    if "__fmaf_rn" not in text:
        assert not re.findall(r"\bfma\.", image)
