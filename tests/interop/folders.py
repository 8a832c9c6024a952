"""Small random models and adapters in files."""

import json

import safetensors.torch
import torch

from minipeft.interop.tensors import PIECE, About, in_pieces, open_tensors
from minipeft.lab import models

SIZES = {"square": (16, 16), "wide": (16, 32), "tall": (48, 16)}


class InMemory:
    """Named tensors that are in no file."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.about = {n: About(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        self.metadata = {}

    def read(self, name):
        return self.tensors[name].clone()

    def pieces(self, name, size=PIECE):
        return in_pieces(self.tensors[name], size)


def base_tensors(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for kind, shape in SIZES.items():
            W = torch.randn(shape, generator=draw) * 0.05
            tensors[f"model.layers.{layer}.{kind}.weight"] = W.to(dtype)
            bias = torch.randn(shape[0], generator=draw)
            tensors[f"model.layers.{layer}.{kind}.bias"] = bias.to(dtype)
    tensors["model.embed_tokens.weight"] = torch.randn(40, 16, generator=draw).to(dtype)
    tensors["model.norm.weight"] = torch.ones(16, dtype=dtype)
    return tensors


def adapter_tensors(seed=1, r=4, dora=False, layers=(0, 1)):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for kind, (out_features, in_features) in SIZES.items():
            key = f"base_model.model.model.layers.{layer}.{kind}"
            A = torch.randn(r, in_features, generator=draw) * 0.1
            B = torch.randn(out_features, r, generator=draw) * 0.1
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
            if dora:
                m = torch.rand(out_features, generator=draw) + 0.5
                tensors[f"{key}.lora_magnitude_vector"] = m
    return tensors


def adapter_of_tiny():
    """Return LoRA of rank 4 for every projection of the committed model."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, about in open_tensors(models.TINY).about.items():
        if name.endswith("_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            A = torch.randn(4, about.shape[1], generator=draw) * 0.1
            tensors[f"{key}A.weight"] = A
            B = torch.randn(about.shape[0], 4, generator=draw) * 0.1
            tensors[f"{key}B.weight"] = B
    return tensors


def write_adapter(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 12}
    fields |= {n: True for n, part in parts.items() if any(part in t for t in tensors)}
    fields |= config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    return folder


def write_model(folder, tensors, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i::shards]
        safetensors.torch.save_file({n: tensors[n] for n in mine}, folder / file)
        places |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
