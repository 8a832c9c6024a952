"""Tensors stay on their device: a program that test_torch_devices runs.

The program runs in a process of its own: the device is registered for the whole
process, and the checks of shapes that the tests put around every function do not know
the device.

Each recipe runs on the CPU and on the device. On the device, no operation may meet
tensors of two devices, every result must be on the device, and the values must be those
of the CPU.
"""

import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from minipeft.errors import InputError
from minipeft.torch import (
    adamw,
    attention,
    blockwise,
    bof4,
    bottleneck,
    codebook,
    dora,
    double_quant,
    ia3,
    inject,
    loftq,
    lora,
    lora_batched,
    lora_plus,
    microscaling,
    paged,
    pissa,
    prefix,
    prompt,
    qlora,
    vera,
)
from tests.agreement.llama import llama
from tests.agreement.on_torch import CONFIGS
from tests.properties import device, modules


def codecs(there):
    W = torch.randn(9, 13).to(there)
    out = []
    for values in (codebook.NF4, codebook.FP4, codebook.NF3, codebook.dynamic_map()):
        q = blockwise.quantize(W, values, 32)
        out += [vars(q), blockwise.dequantize(q, torch.bfloat16)]
    q = double_quant.quantize(W, codebook.NF4, 4, 8)
    assert double_quant.bits_per_parameter(q) > 4
    rows, signed = torch.randn(3, 64).to(there), bof4.quantize(W, 8)
    mx, nv = microscaling.quantize_mxfp4(rows), microscaling.quantize_nvfp4(rows)
    out += [vars(signed), blockwise.dequantize(signed), vars(mx), vars(nv)]
    out += [microscaling.dequantize_mxfp4(mx), microscaling.dequantize_nvfp4(nv)]
    return out, vars(q), double_quant.dequantize(q), vars(double_quant.unnest(q))


def bad_weights_are_named(there):
    W = torch.ones(9, 13).to(there)
    W[1, 2] = torch.nan
    return refused(lambda: blockwise.quantize(W), "nan at flat index 15")


def refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
    return []


def optimizer(kind, there, **settings):
    p = nn.Parameter(torch.randn(70, 60).to(there))
    bias = nn.Parameter(torch.randn(60).to(there))
    ours = kind([p, bias], **settings)
    for _ in range(2):
        p.grad, bias.grad = torch.randn(70, 60).to(there), torch.ones(60).to(there)
        ours.step()
    again = kind([p, bias], **settings)
    again.load_state_dict(ours.state_dict())
    again.step(lambda: float((p.sum() + bias.sum()).detach()))
    p.grad[5, 6] = torch.inf
    refused(again.step, "the gradient of parameter 0 holds inf at index 306")
    return p, bias, again


def adamw_with_states_of_32_bits(there):
    p, bias, ours = optimizer(adamw.AdamW, there)
    return p, bias, list(ours.state.values())


def adamw_with_states_of_8_bits(there):
    p, bias, ours = optimizer(adamw.AdamW, there, bits=8)
    return p, bias, list(ours.state.values())


def one_tensor_of_adamw(there):
    W, grad = torch.randn(9, 7).to(there), torch.randn(9, 7).to(there)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    turned, state = W.T, adamw.init(W.T)
    adamw.step(turned, grad.T, state, settings)
    return W, state


def paged_adamw(there):
    """The states are on the host; a page in use is on the device."""
    paging = paged.Paging(page_size=512, budget=3)
    p, bias, ours = optimizer(paged.PagedAdamW, there, bits=8, paging=paging)
    copies = [page.copy for page in ours.table.resident]
    assert all(t.device.type == "cpu" for t in host(ours))
    ours.table.resize(1)
    ours.table.evict(next(iter(ours.table.resident)))
    return p, bias, [values for copy in copies for values in tensors(copy)]


def host(ours):
    pages = [page for pages in ours.pages.values() for page in pages]
    return [tensor for page in pages for tensor in page.host.values()]


def one_head(there):
    Q, K, V = (torch.randn(2, 5, 4).to(there) for _ in range(3))
    return attention.Head(Q, K, V, attention.causal(5, 5).to(there))


def attended(there):
    head = one_head(there)
    with sdpa_kernel(SDPBackend.MATH):
        return attention.weights(head), attention.forward(head)


def attended_with_a_prefix(there):
    head, network = one_head(there), prefix.Reparametrization(3, 6, 5, 8).to(there)
    virtual = prefix.expand(network)
    with sdpa_kernel(SDPBackend.MATH):
        y = prefix.forward(head, virtual)
    return vars(virtual), y, prefix.gate(head, virtual)


def a_prompt_before_a_text(there):
    E, ids = torch.randn(9, 4).to(there), torch.tensor([3, 1]).to(there)
    started = prompt.init(E, ids)
    refused(lambda: prompt.init(E, ids + 8), "token 11 is not in the vocabulary")
    return vars(started), prompt.forward(E[None, :3], started)


def generated(there):
    out = []
    for build in (modules.prefix, modules.prompt):
        example = build(there)
        model, ids = example.module.eval(), example.inputs["input_ids"]
        assert model.device == ids.device
        out.append(model.generate(ids, max_new_tokens=2, do_sample=False))
    model = modules.prefix_with_a_network(there).module
    model.drop_network()
    return out, model.P


def splits_of_a_weight(there):
    W = torch.randn(9, 6).to(there)
    exact, fast = pissa.init(W, 2, 4.0), pissa.init_randomized(W, 2, 4.0)
    trained = pissa.to_lora(fast[1], fast[1])
    q, found = loftq.init(W, 2, 4.0, codebook.NF2, 8)
    error = torch.tensor(loftq.error(W, q, found)).to(there)
    assert loftq.plan({"a": W, "b": W[:3]}, 2.5, 8) == {"a": 2, "b": 4}
    refused(lambda: pissa.init(W / 0, 2, 4.0), "repair it before taking an SVD")
    return exact, fast, trained, vars(q), found, error


def functions_of_the_adapters(there):
    W = torch.randn(9, 6).to(there)
    new = dora.init(torch.Generator().manual_seed(0), W, 2, 4.0)
    pair = vera.Projections(0, 3, 6, 9).to(there)
    pair.draw((1, 3, 6, 9), there)
    given = vera.Projections.given(pair.A, pair.B)
    return (
        *(given(5, 4)[0], given(5, 4)[1]),
        *(new, lora.delta(new), dora.merge(W, new), dora.row_norm(W, new)),
        *(dora.squared_row_norm(W, new), vera.delta(vera.init(pair, 9), 6)),
    )


class Small(nn.Module):
    """One layer of each kind that can be adapted."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed, self.conv = nn.Embedding(9, 6), Conv1D(8, 6)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)

    def forward(self, ids):
        return self.down(self.up(self.conv(self.embed(ids))))


def adapted(config, targets, more=True):
    """Return a recipe that calls all that a model offers for a method.

    more: also add a second adapter.
    """

    def recipe(there):
        model, ids = Small().to(there), torch.arange(9).to(there)
        inject.inject(model, config, targets)(ids)  # VeRA moves its pair here
        modules.whole(nn.ModuleList(a.adapters for a in inject.adapted(model).values()))
        out = [model.train()(ids)]
        out[0].square().sum().backward()
        out += [p.grad for p in inject.trainable_parameters(model)]
        if more:
            out += two_adapters(model, config, ids)
        if config.wrapper is bottleneck.Serial:
            refused(lambda: inject.merge(model), "there is nothing to merge")
        else:
            out += [layer.delta() for layer in layers(model)]
            out += [inject.merge(model)(ids), *map(effective, layers(model))]
        return out, inject.unload(model)(ids), *model.state_dict().values()

    recipe.__name__ = f"injected_{type(config).__name__}_in_{'_'.join(targets)}"
    return recipe


def two_adapters(model, config, ids):
    state = inject.adapter_state_dict(model)
    inject.add(model, config, "other")
    inject.load_adapter_state_dict(model, state, "other")
    inject.activate(model, {"default": 0.5, "other": 2.0})
    out = [model.eval()(ids), *map(effective, layers(model))]
    inject.remove(inject.activate(inject.unmerge(model), "other"), "default")
    return [*out, model(ids)]


def effective(layer):
    """Return the bias and, if there is one, the weight, as other code reads them."""
    has_none = isinstance(layer, bottleneck.Serial)
    return [layer.bias] if has_none else [layer.bias, layer.weight]


def layers(model):
    return inject.adapted(model).values()


def two_rates(there):
    model = inject.inject(Small().to(there), lora.LoRAConfig(2, 4.0), ["embed", "up"])
    return [group["params"] for group in lora_plus.parameter_groups(model, 0.1)]


def tables_of_the_host_are_refused(there):
    x, at, table = torch.ones(3).to(there), torch.arange(3).to(there), torch.ones(3, 2)
    for mixture in (
        lambda: table[at],
        lambda: nn.functional.embedding(at, table),
        lambda: table.index_select(0, at),
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: torch.bucketize(x, torch.ones(3)),
        lambda: x.requires_grad_().detach() @ table,
    ):
        if there.type == device.NAME:
            with pytest.raises(device.MixedDevicesError):
                mixture()
    home = torch.zeros(3)
    assert home.copy_(x) is home  # copying to the CPU gives the CPU's tensor
    return x + torch.tensor(1.0), table.to(there)[at], table.to(there).T * x


def four_bits(there):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(there)
    x, out = torch.randn(3, 8).to(there), []
    qlora.quantize_linears(model, codebook=codebook.FP4, blocksize=4)
    inject.inject(model.bfloat16(), lora.LoRAConfig(2, 4.0), ["*"])
    for merge in (qlora.merge, qlora.requantize):
        merged = merge(model[0])
        out += [merged.weight, merged(x.to(merged.weight.dtype)), str(merged)]
    moved = qlora.QuantizedLinear.from_linear(nn.Linear(6, 8)).to(there)
    return out, model(x.bfloat16()), moved.weight, dict(moved.named_buffers())


def many_adapters_at_once(there):
    """The host holds every adapter; the device holds those of the current requests."""
    model, ids = Small().to(there), torch.arange(6).to(there).view(3, 2)
    pool, configs = lora_batched.Pool(model, ALL, budget=4000), CONFIGS
    layers = {n: m.base for n, m in pool.layers.items()}
    for name in ("lora", "vera", "miss"):
        pool.add(name, whole_adapters(configs[name].adapters(layers)))
    with torch.no_grad(), pool.serve(["lora", None, "vera"]):
        out = [model(ids)]
        assert pool.stacked_bytes > 0
        pool.switch(0, {"miss": 2.0})
        out += [model(ids), pool.layers["up"].weight.shape[0] * ids]
    pool.evict("vera")
    pool.remove("miss")
    assert pool.shared_bytes > 0
    layer = pool.layers["up"]
    for wrong in (layer.merge, layer.delta, lambda: layer.change(None, layer.W)):
        refused(wrong, "there is no one weight")
    held = inject.adapters_of(inject.inject(Small(), configs["lora"], ["up"]))
    return out, [pool.resident["lora"][key] for key in ALL], len(held) * ids


def whole_adapters(found):
    return {key: modules.whole(adapter) for key, adapter in found.items()}


def beside_a_sublayer(there):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.ReLU()).to(there)
    config = bottleneck.BottleneckConfig(3)
    bottleneck.place_beside(model, config, ["0.0"], 6)
    return model(torch.randn(2, 6).to(there)), *model.parameters()


def loaded(there):
    """What is loaded is checked where it lies, also in merged layers."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)).to(there)
    qlora.quantize_linears(model, ["0"], blocksize=4)
    bottleneck.place_beside(model, bottleneck.BottleneckConfig(3), ["0.0"], 8)
    inject.merge(inject.inject(model, lora.LoRAConfig(2, 4.0), ["1"]))
    model.load_state_dict(model.state_dict())
    soft = prompt.PromptModel(llama().to(there), prompt.PromptConfig(2))
    soft.load_state_dict(soft.state_dict())
    return *model.state_dict().values(), model[1].merged_weight, soft.P


def example(build):
    def recipe(there):
        made = build(there)
        outputs = modules.run(made)
        tensors_of_the_module = [*made.module.parameters(), *made.module.buffers()]
        exact = outputs if made.exact else outputs[:1]
        return exact, tensors_of_the_module, [t.sum() * 0 for t in outputs]

    recipe.__name__ = build.__name__
    return recipe


LINEAR, ALL = ["up", "down"], ["embed", "conv", "up", "down"]
RECIPES: list[Callable[[Any], Any]] = [
    tables_of_the_host_are_refused,
    *(codecs, bad_weights_are_named, splits_of_a_weight, functions_of_the_adapters),
    *(adamw_with_states_of_32_bits, adamw_with_states_of_8_bits, paged_adamw),
    one_tensor_of_adamw,
    *(attended, attended_with_a_prefix, a_prompt_before_a_text, generated),
    *(four_bits, many_adapters_at_once, beside_a_sublayer, two_rates, loaded),
    *(adapted(config, ALL) for row, config in CONFIGS.items() if row != "ia3"),
    adapted(ia3.IA3Config(["down"]), ALL),
    adapted(pissa.PiSSAConfig(2, 4.0), ALL),
    adapted(pissa.PiSSAConfig(2, 4.0, sketch=None), ["up"]),
    adapted(loftq.LoftQConfig(2, 4.0, blocksize=8), LINEAR, more=False),
    adapted(bottleneck.BottleneckConfig(3), ALL),
    *(example(build) for builds in modules.EXAMPLES.values() for build in builds),
]


def tensors(tree):
    """Return the tensors in the result of a recipe, also those inside modules."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, nn.Module):
            found += [*leaf.parameters(), *leaf.buffers()]
        elif isinstance(leaf, Tensor):
            found.append(leaf.detach())
    return found


def check(recipe):
    # On a device DoRA stores z and does not compute it from y; the last bits differ.
    # Here the CPU stores it too; tests/agreement/test_dora.py has both ways.
    with mock.patch.object(dora, "_looks", return_value=False):
        _check(recipe)


def _check(recipe):
    torch.manual_seed(0)
    expected = tensors(recipe(torch.device("cpu")))
    torch.manual_seed(0)
    with device.pretending() as there:
        found = tensors(recipe(there))
        strays = [t.shape for t in found if t.device != there]
        assert not strays, f"on the CPU are tensors of shapes {strays}"
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.cpu(), theirs), (ours.shape, ours.cpu(), theirs)


class Called:
    """Notes the qualified name of every function of the column that is called."""

    def __init__(self):
        self.names = set()

    def __call__(self, frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("minipeft.torch."):
            row = module.removeprefix("minipeft.torch.")
            self.names.add(f"{row}.{frame.f_code.co_qualname}")


def public():
    """Name every public function, and every public method of a public class."""
    for name, member in modules.members():
        if inspect.isclass(member):
            row, _, own = name.partition(".")
            for attribute, method in vars(member).items():
                borrowed = isinstance(method, staticmethod) and (
                    getattr(method.__func__, "__qualname__", "") != f"{own}.{attribute}"
                )
                if not attribute.startswith("_") and is_code(method) and not borrowed:
                    yield f"{row}.{own}.{attribute}"
        elif is_code(member):
            yield name


def is_code(member):
    return inspect.isroutine(member) or isinstance(member, property)


def main():
    torch.set_num_threads(1)
    device.register()
    llama()  # the profiler would also count imports
    called = Called()
    for recipe in RECIPES:
        sys.setprofile(called)
        try:
            check(recipe)
        except Exception:
            sys.setprofile(None)
            traceback.print_exc(file=sys.stdout)
        else:
            sys.setprofile(None)
            print(f"passed {recipe.__name__}", flush=True)
    print(json.dumps(sorted(set(public()) - called.names)))


if __name__ == "__main__":
    main()
