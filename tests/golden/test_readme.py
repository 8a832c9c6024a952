"""The example programs in golden/README.md run."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from minipeft.golden.drivers.reference.blockwise import nf4_quantize
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.vectors import V1

README = (V1.parent / "README.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_the_python_runner_passes_the_reference_and_finds_a_bug(capsys):
    names = {}
    exec(block("python"), names)

    def right(values, blocksize):
        packed, absmax = nf4_quantize(np.array(values, np.float32), blocksize)
        return packed.tobytes(), absmax.tolist()

    def wrong(values, blocksize):
        packed, absmax = right(values, blocksize)
        return bytes(p >> 4 | p << 4 & 0xF0 for p in packed), absmax

    path = V1 / "nf4_quantize.json"
    assert names["check"](path, right) == 0
    assert names["check"](path, wrong) > 10
    assert "swapped in pairs" in capsys.readouterr().out


def test_the_c_functions_compile_and_decide(tmp_path):
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler (cc or g++)")
    (tmp_path / "runner.c").write_text(
        block("c")
        + r"""
        int main(void) {
            unsigned char bytes[4];
            float y[2] = {1, 1.5f}, expected[2] = {1, 1}, magnitude[2] = {4, 4};
            int ok = from_hex("0000803f", bytes) == 4 && bytes[3] == 0x3f
                && first_outside(y, expected, magnitude, 1, 3) == -1
                && first_outside(y, expected, magnitude, 2, 3) == 1;
            y[0] = NAN;
            return !(ok && first_outside(y, expected, magnitude, 2, 3) == 0);
        }"""
    )
    program = tmp_path / "runner"
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-o", program, "-x", "c"]
    subprocess.run([*command, tmp_path / "runner.c", "-lm"], check=True)
    subprocess.run([program], check=True)


def test_the_functions_are_those_of_the_table():
    signatures = [op.signature(name) for name, op in OPERATIONS.items()]
    shown = re.findall(r"^    (\w+\(.*?\) -> [\w, ]+)$", README, re.MULTILINE)
    assert shown == signatures
