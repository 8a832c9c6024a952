"""Layers and optimizers of the torch column run the kernels where there is a GPU."""

import subprocess
import sys

from tests.cuda.on_a_device import RECIPES
from tests.cuda.toolchain import needs_cpu_build, needs_nvrtc


@needs_cpu_build
@needs_nvrtc
def test_each_does_on_a_pretended_gpu_what_it_does_on_the_cpu():
    command = [sys.executable, "-m", "tests.cuda.on_a_device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "".join(f"passed {name}\n" for name in RECIPES)
    assert done.stdout == said, done.stderr[-3000:]
