"""Streams and waits on a pretended device: a program that test_torch_streams runs.

The program runs in a process of its own, because the device is registered for the whole
process. It checks three laws. Whichever stream is slow, the paged optimizer has the
bits of the plain one. As many pages are fetched ahead as the budget allows. No forward
or backward pass makes the host wait.
"""

import json
from itertools import combinations, product

import torch
from torch import nn

from minipeft.torch import adamw, attention, paged, prefix
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import Page, PagedAdamW, PageTable, Paging
from minipeft.torch.qlora import QuantizedLinear
from tests.properties import device, modules, streams
from tests.properties.streams import GPU

LANES = ("computing", "inward", "outward")
SLOW = [c for n in range(4) for c in combinations(LANES, n)]


def later(W, grad, state, group, span):
    """Enqueue `adamw.update` on the computing stream."""
    memory = {k: getattr(v, "here", v) for k, v in state.items()}
    values, slope, settings = W.here, grad.here.clone(), dict(group)
    GPU.current.enqueue(
        ("call", lambda: adamw.update(values, slope, memory, settings, span))
    )


def descend(ours, p, steps):
    for k in range(steps):
        torch.manual_seed(k)
        p.grad = torch.randn(p.shape).to(p.device)
        ours.step()


def compare(slow, budget, bits):
    torch.manual_seed(0)
    W = torch.randn(5000)
    q = nn.Parameter(W.clone())
    plain = AdamW([q], bits=bits)
    descend(plain, q, 3)
    with device.pretending() as there:
        p = nn.Parameter(W.clone().to(there))
        streams.register(slow)
        ours = PagedAdamW([p], bits=bits, paging=Paging(512, budget))
        with streams.Copies():
            descend_there(ours, p)
            states = ours.state_dict()["state"][0]
        GPU.current.synchronize()
    good = torch.equal(p.data.here, q.data)
    expected = plain.state_dict()["state"][0]
    return good and all(
        torch.equal(states[k], v) for k, v in expected.items() if k != "step"
    )


def descend_there(ours, p):
    for k in range(3):
        torch.manual_seed(k)
        p.grad = device.There(torch.randn(p.shape))
        ours.step()


class Elsewhere(device.There):
    """A tensor on a second device of the same kind."""

    NUMBER = 1


def moved(slow):
    """Return whether a device gets the newest state of a parameter that moved there."""
    torch.manual_seed(0)
    W = torch.randn(5000)
    q = nn.Parameter(W.clone())
    plain = AdamW([q])
    descend(plain, q, 3)
    with device.pretending() as there:
        p = nn.Parameter(W.clone().to(there))
        streams.register(slow)
        ours = PagedAdamW([p], paging=Paging(512, 4))
        with streams.Copies():
            descend_there(ours, p)
            p.grad, p.data = None, Elsewhere(p.data.here)
            table, found = ours.table, []
            for page in ours._pages(p, 32):
                memory = table.touch(page)["m"].here
                table.lanes[page.device].inward.synchronize()
                found.append(memory.clone())
    return torch.equal(torch.cat(found), plain.state[q]["m"])


def read_only(slow):
    """Return whether late reads of an evicted, unchanged page see its values."""
    with device.pretending() as there:
        streams.register(slow)
        state = {"m": torch.arange(1024.0)}
        pages = [Page(state, slice(i, i + 512), there) for i in (0, 512)]
        table, seen = PageTable(1), []
        with streams.Copies():
            for page in pages:
                memory = table.touch(page)["m"].here
                GPU.current.enqueue(("call", lambda m=memory: seen.append(m.clone())))
            table.evict(pages[1])
        GPU.current.synchronize()
    return torch.equal(torch.cat(seen), state["m"])


def waits(call):
    """Return the places in the column where the host waits for the device."""
    with device.Waits() as counted:
        call()
    return sorted(set(counted.places))


def forward_and_backward():
    """Run every module twice; return where the second run waits."""
    examples = {b.__name__: b for bs in modules.EXAMPLES.values() for b in bs}
    found = {}
    for name, build in {**examples, "nested": nested, "attended": attended}.items():
        with device.pretending() as there:
            made = build(there)
            made.module.train()
            modules.run(made)
            found[name] = waits(lambda made=made: modules.run(made))
    return found


def nested(there):
    layer = nn.Linear(modules.IN, modules.OUT).to(there)
    q = QuantizedLinear.from_linear(layer, blocksize=4, nested_blocksize=8)
    return modules.Example(
        q.to(there), {"input": modules.integers(5, modules.IN).to(there)}
    )


def attended(there):
    """Return a module with one attention head, a mask and a prefix."""
    Q, K, V = (modules.integers(2, 5, 4).to(there) for _ in range(3))
    head = attention.Head(Q, K, V, attention.causal(5, 5).to(there))

    class Attended(nn.Module):
        def forward(self, P):
            y = prefix.forward(head, prefix.Prefix(P, P))
            return (
                y
                + attention.forward(head)
                + prefix.gate(head, prefix.Prefix(P, P))[..., None]
            )

    return modules.Example(Attended(), {"P": modules.integers(3, 4).to(there)})


def steps():
    """Return where a step of many parameters waits."""
    found = {}
    for bits in (8, 32):
        with device.pretending() as there:
            params = [nn.Parameter(torch.ones(70, 70).to(there)) for _ in range(5)]
            ours = AdamW(params, bits=bits)
            for p in params:
                p.grad = torch.ones(70, 70).to(there)
            ours.step()
            with device.Waits() as counted:
                ours.step()
        found[bits] = counted.places
    return found


def ahead(budget):
    """Return how many pages have arrived while the first page is still computed."""
    with device.pretending() as there:
        p = nn.Parameter(torch.zeros(5120).to(there))
        streams.register(("computing",))
        ours = PagedAdamW([p], paging=Paging(512, budget))
        seen = []
        with streams.Copies():
            touch = ours.table.touch

            def counted(page):
                copy = touch(page)
                seen.append([other.arrived.happened for other in ours.table.resident])
                return copy

            ours.table.touch = counted
            p.grad = device.There(torch.ones(5120))
            ours.step()
    return [len(arrived) for arrived in seen if all(arrived)][:4]


def main():
    torch.set_num_threads(1)
    device.register()
    report = {"waits": forward_and_backward(), "steps": steps()}
    paged.update = later
    report["paging"] = {
        f"{'+'.join(slow) or 'none'}-{budget}-{bits}": compare(slow, budget, bits)
        for slow, budget, bits in product(SLOW, (1, 4), (8, 32))
    }
    report["read only"] = {"+".join(slow): read_only(slow) for slow in SLOW}
    report["moved"] = {"+".join(slow): moved(slow) for slow in SLOW}
    report["ahead"] = [ahead(budget) for budget in (1, 2, 4)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
