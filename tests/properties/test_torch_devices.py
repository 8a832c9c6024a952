"""The torch column stays on its device; on_a_device.py has the recipes.

The device is pretended, so these tests need no GPU. The lists below name what they
cannot show. A new function, module or line for CUDA that no list names fails a test.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minipeft.torch
from tests.cuda import test_operators
from tests.properties import modules, on_a_device

# These launch a kernel; tests/cuda/test_operators.py and test_wired.py run them on a
# pretended device with the CPU build of the kernels.
LAUNCHES = (
    "launches.Ready.holds",
    "launches.adamw_",
    "launches.adamw_8bit_",
    "launches.check_indices",
    "launches.decode",
    "launches.decodes",
    "launches.dequantize",
    "launches.dora_row_norm",
    "launches.layout_of",
    "launches.lora_batched",
    "launches.matmul_4bit",
    "launches.multiply",
    "launches.quantize",
    "launches.ready",
    "operators.parts",
)

# Experts of a model: tests/agreement/test_experts.py runs them, on the CPU only.
EXPERTS = (
    "experts.Experts.forward",
    "experts.ExpertsLoRA.forward",
    "experts.LoRAExperts.add",
    "experts.LoRAExperts.W",
    "experts.LoRAExperts.change",
    "experts.LoRAExperts.check_fits",
    "experts.LoRAExperts.forward",
    "experts.LoRAExperts.merge",
    "experts.LoRAExperts.merged_stacks",
    "experts.LoRAExperts.names",
    "experts.LoRAExperts.stack",
    "experts.LoRAExperts.unload",
    "experts.LoRAExperts.unmerge",
    "experts.StackLoRA.delta",
    "experts.StackLoRA.forward",
    "experts.check_fits",
    "experts.init",
    "linear.Respelled.call",
    "linear.Stacked.form",
    "linear.Stacked.held",
    "linear.Stacked.names",
    "linear.Stacked.one",
    "linear.Stacked.plain",
    "linear.without_hooks",
    "qlora.QuantizedExperts.forward",
    "qlora.QuantizedExperts.from_experts",
    "qlora.QuantizedExperts.stack",
    "stack.Coded.decode",
    "stack.Coded.grouped",
    "stack.Coded.product",
    "stack.Coded.take",
    "stack.Stack.added",
    "stack.Stack.whole",
    "stack.name_of",
)

# One model over several processes: test_sharding runs them, on the CPU only.
PROCESSES = (
    "sharding.gathered",
    "sharding.replicate",
    "sharding.resume",
    "sharding.save",
    "sharding.shard",
    "sharding.shardable",
)

# Public functions that no recipe runs on the device.
NOT_ON_A_DEVICE = {
    **dict.fromkeys(LAUNCHES, "runs on another pretended device, in tests/cuda"),
    **dict.fromkeys(EXPERTS, "runs on a CPU only, in tests/agreement/test_experts"),
    **dict.fromkeys(PROCESSES, "runs over processes, in test_sharding"),
    "linear.computes_as_linear": "probes a layer with numbers on the CPU",
    "qlora.prepare": "casts parameters where they are",
    "qlora.quantizable": "reads a weight where it is",
    "codebook.normal_float": "makes a table on the CPU; quantize moves it",
    "adapted.Adapted.own_parameters": "lists them where they are",
    "adapted.Adapted.change": "has no body; each row has its own",
    "adapted.Adapted.check_fits": "has no body; each row has its own",
    "inject.Config.adapters": "a protocol; each method has its own",
    "paged.Lanes.computing": "runs on pretended streams, in on_streams",
    "paged.Lanes.on": "runs on pretended streams, in on_streams",
    "virtual.VirtualTokens.config": "reads an attribute of the model",
    "virtual.VirtualTokens.own_parameters": "lists them where they are",
    "virtual.VirtualTokens.save_pretrained": "refuses, and reads no tensor",
    "virtual.VirtualTokens.enter": "has no body; each row has its own",
    "virtual.VirtualTokens.num_virtual_tokens": "has no body; each row has its own",
}

# Functions with a branch for CUDA alone: a pretended device takes the other. A GPU runs
# them in tests/agreement, test_paged.py and test_torch_on_cuda.py.
FOR_CUDA_ALONE = {
    "launches._shared": "asks torch for the generation of the GPU",
    "launches._stream": "asks torch for the stream that computes",
    "launches.capturing": "asks torch whether a CUDA graph is being captured",
    "operators._register": "names the device whose kernels these are",
    "adamw._root": "there, torch's float32 root is rounded correctly",
    "lora_batched.Pool._on_host": "pins host memory, which needs the driver",
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


def test_every_operator_of_our_own_is_checked():
    """For each operator, tests/cuda calls `torch.library.opcheck` with samples."""
    assert list(modules.members())  # every module of the column is imported
    registered = {
        name.removeprefix("minipeft::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("minipeft::")
    }
    assert registered == set(test_operators.samples())
