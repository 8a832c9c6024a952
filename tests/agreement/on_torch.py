"""The reference's layers as modules of the torch column."""

from importlib import import_module

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.reference import blockwise as reference_blockwise
from minipeft.torch import blockwise, double_quant
from minipeft.torch.dora import DoRA, DoRALinear
from minipeft.torch.lora import LoRA, LoRALinear
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.vera import Projections, VeRA, VeRALinear
from tests.parametrizations import ROWS


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
    """Return the reference's quantized tensor as a tensor of the torch column."""
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


def _same_fields(base, case):
    """Return a layer whose adapter has the same fields as the reference's adapter."""
    wrapper = CONFIGS[case.row.name].wrapper
    kind = getattr(_column(case.row), case.row.kind)
    parts = {k: _part(v) for k, v in vars(case.adapter).items()}
    return wrapper(base, kind(**parts))


def _part(value):
    if isinstance(value, np.ndarray):
        return tensor(value)
    return value if isinstance(value, str) else float(value)


def _column(row):
    return import_module(f"minipeft.torch.{row.name}")


# The configuration of each row; some need a model of two layers.
CONFIGS = {
    row.name: getattr(_column(row), f"{row.kind}Config")(**row.hyper)
    for row in ROWS
    if row.hyper is not None
}

# The function that puts the adapter of a case on a base.
ADAPTED = dict.fromkeys(CONFIGS, _same_fields) | {
    "dora": _dora,
    "vera": _vera,
    "qlora": lambda base, case: LoRALinear(base, lora(case.adapter)),
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
