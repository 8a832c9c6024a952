"""The reference's layers as modules of the torch column."""

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.reference import blockwise as reference_blockwise
from minipeft.torch import blockwise, double_quant
from minipeft.torch.dora import DoRA, DoRAConfig, DoRALinear
from minipeft.torch.ia3 import IA3, IA3Config, IA3Linear
from minipeft.torch.lora import LoRA, LoRAConfig, LoRALinear
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.vera import Projections, VeRA, VeRAConfig, VeRALinear


def tensor(array):
    return torch.from_numpy(np.array(array))


def numpy(value):
    return value.detach().numpy()


def dense(W, bias):
    base = nn.Linear(*W.T.shape, bias=bias is not None)
    base.weight = nn.Parameter(tensor(W))
    base.bias = None if bias is None else nn.Parameter(tensor(bias))
    return base


def conv1d(W, bias):
    base = Conv1D(*W.shape)
    base.weight = nn.Parameter(tensor(W.T))
    zeros = np.zeros(len(W), W.dtype)
    base.bias = nn.Parameter(tensor(zeros if bias is None else bias))
    return base


def codes(q):
    """Return the reference's quantized tensor as one of this column."""
    plain = isinstance(q, reference_blockwise.Blockwise)
    kind = blockwise.Blockwise if plain else double_quant.Nested
    parts = {k: tensor(v) if hasattr(v, "dtype") else v for k, v in vars(q).items()}
    return kind(**parts)


def lora(adapter):
    return LoRA(tensor(adapter.A), tensor(adapter.B), float(adapter.scaling))


def _dora(base, case):
    return DoRALinear(base, DoRA(lora(case.adapter), tensor(case.adapter.magnitude)))


def _vera(base, case):
    pair = Projections.given(tensor(case.frozen[0].A), tensor(case.frozen[0].B))
    return VeRALinear(base, VeRA(tensor(case.adapter.d), tensor(case.adapter.b), pair))


def _ia3(base, case):
    return IA3Linear(base, IA3(tensor(case.adapter.l), case.adapter.side))


ADAPTED = {
    "lora": lambda base, case: LoRALinear(base, lora(case.adapter)),
    "dora": _dora,
    "vera": _vera,
    "ia3": _ia3,
    "qlora": lambda base, case: LoRALinear(base, lora(case.adapter)),
}

# How a model gets the adapters of a row, and which of two layers learn.
CONFIGS = {
    "lora": LoRAConfig(r=4, alpha=8),
    "dora": DoRAConfig(r=4, alpha=8),
    "vera": VeRAConfig(r=6),
    "ia3": IA3Config(feedforward=["1"]),
}


def module(case, layout=dense):
    """Return the adapted layer of a case as a module."""
    if case.row.name == "qlora":
        bias = None if case.bias is None else tensor(case.bias)
        base = QuantizedLinear(codes(case.base), bias)
    else:
        base = layout(case.base, case.bias)
    return ADAPTED[case.row.name](base, case)


def run(layer, case):
    """Return the output, then the gradients in the order of the reference."""
    x = tensor(case.x).requires_grad_()
    y = layer(x)
    y.backward(tensor(case.grad_y))
    adapter = layer.adapters["default"]
    trained = [getattr(adapter, name) for name in case.row.trained]
    return [numpy(y), *(numpy(value.grad) for value in (x, *trained))]
