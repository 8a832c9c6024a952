"""One linear layer, adapted by peft."""

from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array

TARGET = ["0"]  # the only layer of the model


def adapted(W: Array, bias: Array | None, config: PeftConfig) -> Any:
    """Return peft's model around the layer of this weight and bias."""
    out_features, in_features = W.shape
    base = nn.Linear(in_features, out_features, bias=bias is not None)
    base = base.to(to_torch(W))  # its dtype and its device
    state = {"weight": to_torch(W)}
    base.load_state_dict(state if bias is None else state | {"bias": to_torch(bias)})
    return get_peft_model(nn.Sequential(base), config)


def layer_of(model: Any) -> Any:
    """Return the adapted layer."""
    return model.base_model.model[0]


def gradients(
    layer: Any, grad_y: Array, x: Array, trained: list[Any]
) -> tuple[Array, ...]:
    """Return autograd's gradients of x and what is trained."""
    leaf = to_torch(x).requires_grad_()
    found = torch.autograd.grad(layer(leaf), (leaf, *trained), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in found)


def merged(layer: Any) -> Array:
    """Return the weight as `merge()` leaves it."""
    layer.merge()
    return to_numpy(layer.base_layer.weight)
