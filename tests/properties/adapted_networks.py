"""Networks and adapters of small integers: every order of a sum gives the same bits."""

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.torch.bottleneck import Bottleneck
from minipeft.torch.dora import DoRA
from minipeft.torch.hira import HiRA
from minipeft.torch.ia3 import IA3
from minipeft.torch.lora import LoRA
from minipeft.torch.miss import MiSS
from minipeft.torch.vera import Projections, VeRA


def whole(rng, *shape):
    return torch.from_numpy(rng.integers(-3, 4, shape).astype(np.float32))


def new(rng, kind, layer):
    """Return an adapter of small integers: every order of a sum gives the same bits."""
    d, k = layer.weight.shape
    r = int(rng.integers(1, 4))
    s = float(rng.choice([0.5, 2.0, 4.0]))
    if kind in (LoRA, HiRA):
        return kind(whole(rng, r, k), whole(rng, d, r), s)
    if kind is DoRA:
        return dora(rng, layer, r, s)
    if kind is VeRA:
        pair = Projections.given(whole(rng, r, k), whole(rng, d, r))
        return VeRA(whole(rng, r), whole(rng, d), pair)
    if kind is IA3:
        side = ("output", "input")[r % 2]
        return IA3(whole(rng, d if side == "output" else k), side)
    if kind is MiSS:
        return MiSS(whole(rng, min(r, k), d))
    return Bottleneck(whole(rng, r, d), whole(rng, d, r), s)


def dora(rng, layer, r, s):
    """Return a DoRA whose B is zero, on a weight whose norms are exact."""
    d, k = layer.weight.shape
    W = layer.weight.detach()
    norm = W.square().sum(dim=1).sqrt()
    update = LoRA(whole(rng, r, k), torch.zeros(d, r), s)
    return DoRA(update, norm * 2.0 ** torch.from_numpy(rng.integers(-2, 3, d)))


def squares(layer):
    """Give each row one nonzero entry, a power of two: its norm is that entry."""
    d, k = layer.weight.shape
    W = torch.zeros(d, k)
    W[range(d), torch.arange(d) * 3 % k] = 2.0 ** (torch.arange(d) % 3)
    layer.weight = nn.Parameter(W)
    return layer


def network(rng, with_dora=False):
    """Return a network of integers: linear layer, ReLU, Conv1D, linear layer."""
    k, d = (int(n) for n in rng.integers(2, 7, 2))
    first, last = nn.Linear(k, d), nn.Linear(d, 3, bias=False)
    conv = Conv1D(d, d)
    for layer in (first, conv, last):
        for p in layer.parameters():
            p.data = whole(rng, *p.shape)
    if with_dora:
        squares(first)
    return nn.Sequential(first, nn.ReLU(), conv, last)


def adapters(rng, model, kind):
    """Return adapters for some layers; DoRA only for the layer with exact norms."""
    layers = {"0": model[0], "3": model[3]}
    if kind is LoRA:
        layers["2"] = nn.Linear(*model[2].weight.shape)
    if kind is DoRA:
        return {"0": new(rng, kind, model[0])}
    keys = [key for key in layers if rng.integers(3)] or ["0"]
    return {key: new(rng, kind, layers[key]) for key in keys}
