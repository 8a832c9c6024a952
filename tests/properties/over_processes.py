"""What one process or several compute: a program that test_sharding runs by torchrun.

    torchrun --nproc-per-node 2 -m tests.properties.over_processes FOLDER

Each row of the batch is a pass of its own, so that a row costs the same arithmetic on
any number of processes, and only the order of the sums over rows differs.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed, nn

from minipeft.torch.experts import Experts
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.sharding import (
    gathered,
    replicate,
    resume,
    save,
    shard,
    shardable,
)

ROWS, STEPS = 4, 2
CASES = [
    (way, bits) for way in ("shard", "replicate") for bits in (32, 4, 5, "experts")
]


class Block(nn.Module):
    """A residual block: a norm, a linear layer, a tanh, a linear layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class BlockOfExperts(nn.Module):
    """A residual block that sends the tokens to three experts in turn."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.experts = Experts(torch.randn(3, 24, 24) / 5, torch.randn(3, 24))

    def forward(self, x):
        chosen = torch.arange(x.shape[1]).expand(x.shape[:2]) % 3
        return x + self.experts(torch.tanh(self.norm(x)), chosen)


class Network(nn.Module):
    """Two blocks and a head; odd sizes, so that no two shards are equally large."""

    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(bits):
    """Return an adapted network; bits: 32, 4, 5 (4, nested scales), "experts"."""
    torch.manual_seed(0)
    model = Network(BlockOfExperts if bits == "experts" else Block)
    if bits in (4, 5):
        nested = 8 if bits == 5 else None
        quantize_linears(model, ["head"], blocksize=16, nested_blocksize=nested)
        shardable(model)
    targets = ["experts"] if bits == "experts" else ["up", "down"]
    inject(model, LoRAConfig(3, 6.0), targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.normal_()
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 5, 24, generator=generator)
    return x, torch.randint(0, 7, (ROWS, 5), generator=generator)


def losses(model, step, rows, world=1):
    """Add the gradient of the mean loss over the rows; return the loss of each row.

    Processes average their gradients, so each row counts `world` times here.
    """
    x, y = batch(step)
    found = []
    for number, row in enumerate(rows):
        last = number == len(rows) - 1
        quiet = getattr(model, "no_sync", None)
        with quiet() if quiet and not last else nullcontext():
            logits = model(x[row : row + 1])[0]
            loss = nn.functional.cross_entropy(logits, y[row])
            (loss * world / ROWS).backward()
        found.append(loss.detach())
    return torch.stack(found)


def adamw(model):
    return torch.optim.AdamW(trainable_parameters(model), lr=0.01)


def train(model, optimizer, steps, rows, world=1):
    for step in steps:
        optimizer.zero_grad()
        losses(model, step, rows, world)
        optimizer.step()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def moments(model, optimizer):
    """Return the optimizer's states, unsharded, in the order of the parameters."""
    states = [optimizer.state[p] for p in trainable_parameters(model)]
    return [full(s[k]).clone() for s in states for k in ("exp_avg", "exp_avg_sq")]


def together(model, bare, step):
    """Return the losses of all rows at a step, and the gradients, unsharded."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    bare.zero_grad()
    own = losses(model, step, range(rank, ROWS, world), world)
    every = [torch.empty_like(own) for _ in range(world)]
    distributed.all_gather(every, own)
    gradients = [full(p.grad).clone() for p in trainable_parameters(bare)]
    return torch.stack(every, dim=1).flatten(), gradients


def case(folder, way, bits):
    """Compute gradients, train, save; continue from a checkpoint of one process."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    bare = network(bits)
    model = shard(bare) if way == "shard" else replicate(bare)
    found = {"local": sum(_local(p).nbytes for p in bare.parameters())}
    found["first pass"] = together(model, bare, 0)
    optimizer = adamw(bare)
    train(model, optimizer, range(STEPS), range(rank, ROWS, world), world)
    save(folder / f"two-{way}-{bits}", bare, optimizer, STEPS)
    found["trained"] = {k: v.clone() for k, v in gathered(bare).items()}
    found["moments"] = moments(bare, optimizer)
    found["next pass"] = together(model, bare, STEPS)
    found["step"] = resume(folder / f"one-{bits}", bare, optimizer)
    found["resumed"] = gathered(bare)
    found["resumed moments"] = moments(bare, optimizer)
    found["resumed pass"] = together(model, bare, found["step"])
    if rank == 0:
        torch.save(found, folder / f"found-{way}-{bits}.pt")


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for way, bits in CASES:
        case(folder, way, bits)
    distributed.barrier()  # a process that ends first can abort the other
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
