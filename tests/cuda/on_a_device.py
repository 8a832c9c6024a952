"""The torch column on a pretended GPU: its layers and optimizers launch the kernels.

A program that test_wired runs, because the device is registered for the whole process.
Each recipe runs on the CPU, eagerly, and there, by what g++ made of the kernels: the
same bits, and the launches that were expected.
"""

import sys

import torch
from torch import Tensor, nn

from minipeft.kernels import driver
from minipeft.torch import (
    adamw,
    dora,
    launches,
    lora,
    lora_batched,
    operators,
    paged,
    qlora,
)
from tests.cuda.executors import CpuLauncher
from tests.properties import device


class Noting(CpuLauncher):
    """Runs the kernels, and notes their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def launch(self, kernel, dtype, args, stream):
        self.names.append(kernel.template)
        super().launch(kernel, dtype, args, stream)


def whole(*shape: int) -> Tensor:
    """Draw small integers: every partial sum is exact, in any order."""
    return torch.randint(-2, 3, shape).float()


def quantized(there, nested=None, rows=2):
    layer = nn.Linear(64, 24).to(there)
    base = qlora.QuantizedLinear.from_linear(layer, nested_blocksize=nested)
    x = torch.randn(rows, 64).to(there).requires_grad_()
    y = base(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    own = [getattr(base, name) for name in base.tensors]
    return [*own, base.weight, base.dequantize(torch.bfloat16), grad, y * 0]


def optimizer(there, kind=adamw.AdamW, **settings):
    p = nn.Parameter(torch.randn(70, 64).to(there))
    ours = kind([p], lr=0.01, **settings)
    for _ in range(2):
        p.grad = torch.randn(70, 64).to(there)
        ours.step()
    saved = ours.state_dict()["state"][0]
    return [p, *(v for v in saved.values() if isinstance(v, Tensor))]


def norms(there):
    W, adapter = whole(24, 64).to(there), lora.LoRA(whole(2, 64), whole(24, 2), 0.5)
    norm = dora.row_norm(W, adapter.to(there))
    return [(4 * norm.square()).round()]  # torch's root may be off by the last bit


def norms_in_training(there):
    """A frozen weight has 16 bits, an adapter 32, and dora.init makes the magnitude."""
    W, adapter = whole(24, 64).to(there), lora.LoRA(whole(2, 64), whole(24, 2), 0.5)
    adapter = adapter.to(there)
    found = [
        dora.row_norm(W.to(kind), adapter) for kind in (torch.bfloat16, torch.half)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(dora.row_norm(W.bfloat16(), adapter))
    found.append(dora.row_norm(W, adapter.bfloat16()))
    return [(4 * norm.square()).round() for norm in found]


def many_adapters(there, tokens=1):
    """One token a request goes through the kernels; a prompt is a batched product."""
    base = nn.Linear(64, 24, bias=False)
    base.weight = nn.Parameter(whole(24, 64))
    pool = lora_batched.Pool(model := nn.Sequential(base).to(there), ["0"])
    for name, r in (("a", 8), ("b", 16)):
        pool.add(name, {"0": lora.LoRA(whole(r, 64), whole(24, r), 0.5)})
    x = whole(3, tokens, 64).to(there)
    with torch.no_grad(), pool.serve(["a", None, {"a": 2.0, "b": 0.5}]):
        return [model(x)]


PAGING = paged.Paging(page_size=2048, budget=2)
RECIPES = {
    "a layer": (quantized, {"quantize", "product", "dequantize"}),
    "a nested layer": (
        lambda there: quantized(there, 256),
        {"quantize", "product_nested", "dequantize_nested"},
    ),
    "many rows": (lambda there: quantized(there, rows=9), {"quantize", "dequantize"}),
    "AdamW": (optimizer, {"adamw"}),
    "AdamW of 8 bits": (lambda there: optimizer(there, bits=8), {"adamw_8bit"}),
    "paged": (
        lambda there: optimizer(there, paged.PagedAdamW, bits=8, paging=PAGING),
        {"adamw_8bit"},
    ),
    "many adapters": (many_adapters, {"shrink", "expand"}),
    "many adapters, prompts": (lambda there: many_adapters(there, 9), set()),
    "norms": (norms, {"row_norm"}),
    "norms in training": (norms_in_training, {"row_norm", "row_norm_mixed"}),
}


def check(recipe, expected_names):
    torch.manual_seed(0)
    expected = recipe(torch.device("cpu"))
    torch.manual_seed(0)
    launcher = Noting()
    with device.pretending() as there, driver.use(launcher):
        found = recipe(there)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.detach().cpu(), theirs.detach())
    assert set(launcher.names) == expected_names, launcher.names


def main():
    torch.set_num_threads(1)
    device.register()
    device.KERNELS.update(operators.LAUNCHES)
    launches.GPUS.add(device.NAME)
    for name, (recipe, expected) in RECIPES.items():
        check(recipe, expected)
        print(f"passed {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
