"""The torch column stays on the device that it is given; recipes are in on_a_device.

The device is pretended, so this runs without a GPU. What it cannot show is in the lists
below, by name: a new function, module or line for CUDA that is in none of them fails.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minipeft.torch
from tests.properties import modules, on_a_device

# Public functions that no recipe runs on the device.
NOT_ON_A_DEVICE = {
    "codebook.normal_float": "makes a table on the CPU; quantize moves it",
    "adapted.Adapted.change": "has no body; each row has its own",
    "adapted.Adapted.check_fits": "has no body; each row has its own",
    "inject.Config.adapters": "a protocol; each method has its own",
    "paged.Lanes.computing": "runs on pretended streams, in on_streams",
    "paged.Lanes.on": "runs on pretended streams, in on_streams",
    "virtual.VirtualTokens.enter": "has no body; each row has its own",
    "virtual.VirtualTokens.num_virtual_tokens": "has no body; each row has its own",
}

# Functions with a branch for CUDA alone: a pretended device takes the other. A GPU runs
# them in tests/agreement, test_paged.py and test_torch_on_cuda.py.
FOR_CUDA_ALONE = {
    "adamw._root": "there, torch's float32 root is rounded correctly",
    "paged.PagedAdamW.placed": "pins host memory, which needs the driver",
}


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.properties.on_a_device"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [r.__name__ for r in on_a_device.RECIPES])
def test_everything_stays_on_the_device(report, recipe):
    passed = f"passed {recipe}\n" in report.stdout
    assert passed, report.stdout + report.stderr


@pytest.mark.slow
def test_every_public_function_ran_on_the_device_or_says_why_not(report):
    not_run = json.loads(report.stdout.splitlines()[-1])
    assert not_run == sorted(NOT_ON_A_DEVICE)


def test_every_module_that_computes_has_an_example():
    assert set(modules.EXAMPLES) == modules.computing()


def functions(node, prefix):
    """Yield every function below a node of the syntax tree, with its full name."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}.{getattr(child, 'name', '')}"
        if isinstance(child, ast.FunctionDef):
            yield name, child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, name)


def speaks_of_cuda(function):
    nodes = list(ast.walk(function))
    words = [n.attr for n in nodes if isinstance(n, ast.Attribute)]
    words += [n.value for n in nodes if isinstance(n, ast.Constant)]
    return not {"cuda", "is_cuda", "pin_memory"}.isdisjoint(words)


def test_every_branch_for_cuda_alone_is_listed():
    files = Path(minipeft.torch.__path__[0]).glob("*.py")
    found = {
        name
        for file in files
        for name, function in functions(ast.parse(file.read_text()), file.stem)
        if speaks_of_cuda(function)
    }
    assert found == set(FOR_CUDA_ALONE)


def test_there_is_no_operator_of_our_own():
    """Then `torch.library.opcheck` has nothing to check.

    The column is written in torch's operators alone, which bring their own gradients,
    shapes and devices. An operator of ours would need opcheck, in a recipe of its own.
    """
    assert list(modules.members())  # all of the column is imported
    registered = torch._C._dispatch_get_all_op_names()
    assert not [name for name in registered if name.startswith("minipeft")]
    for file in Path(minipeft.torch.__path__[0]).glob("*.py"):
        assert "torch.library" not in file.read_text(), file.name
