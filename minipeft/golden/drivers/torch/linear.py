"""The frozen layer that the drivers of this column adapt."""

from torch import nn

from minipeft.golden.drivers.bridge import to_torch
from minipeft.golden.tensors import Array


def frozen(W: Array, bias: Array | None = None) -> nn.Linear:
    """Return the linear layer of this weight and bias."""
    out_features, in_features = W.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(to_torch(W))
    if bias is not None:
        layer.bias = nn.Parameter(to_torch(bias))
    return layer
