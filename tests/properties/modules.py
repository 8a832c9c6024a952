"""Every computing module of the torch column, with small integers as trained values.

Weights and inputs are small integers, so every order of summation gives the same bits.
Where a network has a nonlinear function (tanh, softmax), both devices run the same
kernels.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import minipeft.torch
from minipeft.torch.blockwise import Blockwise, pack
from minipeft.torch.bottleneck import Bottleneck, BottleneckConfig, Parallel, Serial
from minipeft.torch.dora import DoRAConfig, DoRALinear
from minipeft.torch.ia3 import IA3Config, IA3Linear
from minipeft.torch.loftq import LoftQConfig, LoftQLinear
from minipeft.torch.lora import LoRA
from minipeft.torch.lora_batched import Pool
from minipeft.torch.pissa import PiSSAConfig, PiSSALinear
from minipeft.torch.prefix import PrefixConfig, PrefixModel, Reparametrization
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.sharding import ByteLinear
from tests.agreement.llama import TEXT, llama
from tests.agreement.on_torch import CONFIGS
from tests.parametrizations import ROWS

IN, OUT = 12, 7
PLAIN = [row for row in ROWS if row.name in CONFIGS.keys() - {"dora", "ia3"}]


@dataclass(frozen=True)
class Example:
    """A module and its inputs; a floating-point input gets a gradient.

    exact: every order of its sums gives the same bits, also in the gradients.
    """

    module: nn.Module
    inputs: dict[str, Any]
    exact: bool = True


def rows():
    """Return the names of the files of the column."""
    return [found.name for found in pkgutil.iter_modules(minipeft.torch.__path__)]


def members():
    """Yield every public function and class with the name by which it is imported."""
    for row in rows():
        module = importlib.import_module(f"minipeft.torch.{row}")
        for name, member in vars(module).items():
            own = getattr(member, "__module__", None) == module.__name__
            if own and not name.startswith("_"):
                yield f"{row}.{name}", member


# A layer calls these modules; nothing else does.
INSIDE_A_LAYER = {
    *(f"{row.name}.{row.kind}" for row in ROWS if row.hyper is not None),
    *("vera.Projections", "pissa.PiSSA", "loftq.LoftQ"),
}

# A model calls its experts with tokens and the numbers of the chosen experts.
# tests/agreement/test_experts and tests/properties/test_torch_targets run them, on the
# CPU only.
EXPERTS = {
    *(f"experts.{name}" for name in ("Experts", "ExpertsLoRA", "LoRAExperts")),
    *("experts.StackLoRA", "qlora.QuantizedExperts"),
}


def computing():
    """Return the names of all modules that a caller calls directly."""
    return (
        {
            name
            for name, member in members()
            if inspect.isclass(member)
            and issubclass(member, nn.Module)
            and not inspect.isabstract(member)
            and member.forward is not nn.Module.forward
        }
        - INSIDE_A_LAYER
        - EXPERTS
    )


def integers(*shape):
    return torch.randint(-3, 4, shape).float()


def whole(module):
    """Fill every parameter and every floating-point buffer with integers, in place."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(integers(*tensor.shape))
    return module


def wrapped(kind, config, device, features=OUT):
    """Wrap a linear layer on the device; its adapter gets values as after training."""
    base = whole(nn.Linear(IN, features)).to(device)
    layer, x = kind(base, config.adapters({"": base})[""]), integers(5, IN).to(device)
    whole(layer.adapters)
    return Example(layer, {"input": x})


def adapted_by(row):
    """Return an example of a parametrization, at the hyperparameters of its entry."""

    def build(device):
        config = CONFIGS[row.name]
        return wrapped(config.wrapper, config, device)

    build.__name__ = row.name
    return build


def dora(device):
    """Return a DoRA layer; each row of V = W + s B A has one entry, a power of two."""
    example = wrapped(DoRALinear, DoRAConfig(3, 6.0), device)
    layer = example.module
    (adapter,) = layer.adapters.values()
    V = torch.zeros(OUT, IN)
    V[range(OUT), torch.arange(OUT) * 5 % IN] = 2.0 ** torch.arange(OUT).sub(2)
    with torch.no_grad():
        layer.base.weight.copy_(V.to(device) - 2.0 * (adapter.B @ adapter.A))
        adapter.magnitude.copy_(2.0 ** torch.arange(OUT).flip(0).sub(3))
    return example


def ia3(device):
    return wrapped(IA3Linear, IA3Config(), device)


def pissa(device):
    return wrapped(PiSSALinear, PiSSAConfig(3, 6.0), device)


def loftq(device):
    return wrapped(LoftQLinear, LoftQConfig(3, 6.0, EIGHTHS, 8, steps=1), device)


def serial(device):
    return wrapped(Serial, BottleneckConfig(4, 0.5), device)


def batched(device):
    """Return a batch of three requests for two adapters; one row has no adapter."""
    base = whole(nn.Linear(IN, OUT)).to(device)
    pool = Pool(nn.Sequential(base), ["0"])
    for name, r in (("a", 2), ("b", 3)):
        pool.add(name, {"0": LoRA(integers(r, IN), integers(OUT, r), 0.5)})
    layer = pool.layers["0"]
    pool.serve(["b", None, {"a": 2.0, "b": 0.5}]).__enter__()
    return Example(layer, {"input": integers(3, 5, IN).to(device)})


def quantized(device, kind=QuantizedLinear):
    codes = torch.randint(0, 16, (OUT * IN,), dtype=torch.uint8)
    absmax = torch.full((-(-OUT * IN // 8),), 8.0)
    q = Blockwise(pack(codes, 4), absmax, EIGHTHS, 8, (OUT, IN))
    layer = kind(q, integers(OUT)).to(device)
    return Example(layer, {"input": integers(5, IN).to(device)})


def in_bytes(device):
    return quantized(device, ByteLinear)


def bottleneck(device):
    adapter = whole(Bottleneck(integers(4, IN), integers(IN, 4), 0.5))
    return Example(adapter.to(device), {"x": integers(5, IN).to(device)})


def parallel(device):
    inner = bottleneck(device)
    base = whole(nn.Linear(IN, IN)).to(device)
    return Example(Parallel(base, inner.module), inner.inputs)


def reparametrization(device):
    return Example(Reparametrization(4, 6, 5, 8).to(device), {}, exact=False)


def prefix(device):
    return causal(PrefixModel, PrefixConfig(3), device)


def prefix_with_a_network(device):
    return causal(PrefixModel, PrefixConfig(3, hidden=5), device)


def prefix_from_text(device):
    return causal(PrefixModel, PrefixConfig(3, tokens=(4, 9, 2)), device)


def prompt(device):
    return causal(PromptModel, PromptConfig(3), device)


def prompt_from_text(device):
    return causal(PromptModel, PromptConfig(3, tokens=(4, 9, 2)), device)


def causal(kind, config, device):
    """Return a small Llama on the device with virtual tokens before its text."""
    model, ids = llama().to(device), TEXT.to(device)
    model.set_attn_implementation("eager")  # the fused kernels depend on the device
    torch.manual_seed(1)
    return Example(kind(model, config), {"input_ids": ids, "labels": ids}, exact=False)


# Integers over 8: with small integers as scales, every decoded value is exact.
EIGHTHS = (torch.arange(16) - 8) / 8

EXAMPLES: dict[str, tuple[Callable[[Any], Example], ...]] = {
    **{f"{row.name}.{row.kind}Linear": (adapted_by(row),) for row in PLAIN},
    "dora.DoRALinear": (dora,),
    "ia3.IA3Linear": (ia3,),
    "pissa.PiSSALinear": (pissa,),
    "loftq.LoftQLinear": (loftq,),
    "lora_batched.BatchedLinear": (batched,),
    "bottleneck.Bottleneck": (bottleneck,),
    "bottleneck.Serial": (serial,),
    "bottleneck.Parallel": (parallel,),
    "qlora.QuantizedLinear": (quantized,),
    "sharding.ByteLinear": (in_bytes,),
    "prefix.Reparametrization": (reparametrization,),
    "prefix.PrefixModel": (prefix, prefix_with_a_network, prefix_from_text),
    "prompt.PromptModel": (prompt, prompt_from_text),
}


def run(example, call=None):
    """Call the module; return its output and all gradients of a loss, as tensors."""
    module = example.module
    module.zero_grad()
    inputs = {
        name: value.detach().requires_grad_(value.is_floating_point())
        for name, value in example.inputs.items()
    }
    out = (module if call is None else call)(**inputs)
    loss = getattr(out, "loss", None)
    y = out if loss is None else out.logits
    (y.square().sum() if loss is None else loss).backward()
    wanted = [*inputs.values(), *module.parameters()]
    return [y.detach(), *(t.grad for t in wanted if t.grad is not None)]
