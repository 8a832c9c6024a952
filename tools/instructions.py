"""Count the instructions of a LoRA layer beside its products, ours and peft's.

    python tools/instructions.py

The layer has 16 x 16 weights and two rows of x, so that nearly all of a pass is what
Python and torch do around the products. The counts of valgrind depend on no clock and
on no other program. It needs valgrind, its headers, a C compiler and peft.
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import nn

from minipeft.torch.inject import inject
from minipeft.torch.lora import LoRAConfig

CALLS = 20
SHIM = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def layers() -> dict[str, Any]:
    """Return a layer with our adapter, one with peft's, and a frozen one."""
    plain = [nn.Sequential(nn.Linear(16, 16, bias=False)) for _ in range(3)]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    theirs = cast(Any, peft.get_peft_model(cast(Any, plain[0]), config))
    ours = inject(plain[1], LoRAConfig(8, 16), "*")
    frozen = plain[2].requires_grad_(False)
    return {"ours": ours[0], "peft": theirs.base_model.model[0], "frozen": frozen[0]}


def run(shim: str) -> None:
    """Run the layers, and tell valgrind where each pass begins and ends."""
    torch.set_num_threads(1)
    grind, made = ctypes.CDLL(shim), layers()
    x = torch.randn(2, 1, 16, requires_grad=True)
    gradient = torch.randn(2, 1, 16)
    gc.disable()
    for layer in made.values():
        layer(x).backward(gradient)
    grind.start()
    for name, layer in made.items():
        layer(x).backward(gradient)
        grind.zero()
        outputs = [layer(x) for _ in range(CALLS)]
        grind.dump(f"{name}, forward".encode())
        grind.zero()
        for y in outputs:
            y.backward(gradient)
        grind.dump(f"{name}, backward".encode())


def main() -> None:
    """Compile the requests to valgrind, run under it, print instructions a call."""
    with tempfile.TemporaryDirectory() as made:
        source, shim, out = (Path(made) / n for n in ("shim.c", "shim.so", "out"))
        source.write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, "-W", "ignore"]
        fixed = os.environ | {"PYTHONHASHSEED": "0"}
        subprocess.run(
            [*command, __file__, str(shim)], check=True, env=fixed, capture_output=True
        )
        for file in sorted(Path(made).glob("out.*")):
            text = file.read_text()
            name = re.search(r"Client Request: (.*)", text)
            total = re.search(r"^summary: (\d+)", text, re.MULTILINE)
            if name and total:
                print(f"{name[1]:17} {int(total[1]) // CALLS:>9,}")


if __name__ == "__main__":
    run(sys.argv[1]) if sys.argv[1:] else main()
