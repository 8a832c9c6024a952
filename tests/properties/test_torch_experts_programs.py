"""LoRA on experts inside programs: the wrappers and states of the other rows."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from minipeft.errors import InputError
from minipeft.torch.experts import Experts, ExpertsLoRA
from minipeft.torch.inject import (
    adapter_state_dict,
    constants,
    inject,
    load_adapter_state_dict,
    merge,
    trainable_parameters,
    unload,
    unmerge,
)
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedExperts, quantize_linears
from tests.operands import annotations_off
from tests.properties.test_torch_programs import (
    AMBIENT,
    Same,
    offloaded,
    sharded,
    trained,
)
from tests.tolerance import assert_within, gamma

CONFIG = LoRAConfig(2, 4.0)
CHOSEN = torch.tensor([0, 2, 1, 2])
KINDS = ("plain", "four bits")
each_kind = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    """A model with one module of experts; every token is sent to one expert."""

    def __init__(self):
        super().__init__()
        self.experts = Experts(torch.randn(3, 5, 8), torch.randn(3, 5))

    def forward(self, x):
        return self.experts(x, CHOSEN.to(x.device))


def plain(kind):
    torch.manual_seed(0)
    model = Model()
    return quantize_linears(model, blocksize=8) if kind == "four bits" else model


def start(model):
    return inject(
        model, CONFIG, ["experts"], generator=torch.Generator().manual_seed(2)
    )


def make(kind):
    return trained(start(plain(kind)))


def x_of(dtype=torch.float32):
    return torch.linspace(-1, 1, 32).reshape(4, 8).to(dtype)


def run(model):
    model.zero_grad()
    y = model(x_of())
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in trainable_parameters(model))]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


COPIES = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", list(COPIES))
@each_kind
def test_copies_compute_and_train_alike_and_apart(kind, way):
    model = make(kind)
    expected = run(model)
    twin = COPIES[way](model)
    assert same(run(twin), expected)
    with torch.no_grad():
        for p in trainable_parameters(twin):
            p += 1
    assert same(run(model), expected)
    assert torch.equal(merge(COPIES[way](model))(x_of()), merge(model)(x_of()))


@each_kind
def test_merged_experts_save_what_they_saved_before(kind):
    model = make(kind)
    names = set(model.state_dict())
    assert set(merge(model).state_dict()) == names


def test_an_adapter_of_another_stack_or_of_none_is_refused():
    layer = make("plain").experts
    part = layer.adapters["default"]["W"]
    for parts, said in (({"U": part}, "is of U; these"), ({}, "these experts hold W")):
        with pytest.raises(InputError, match=said):
            layer.add("other", ExpertsLoRA(parts))


class Projections(nn.Module):
    """Experts of another program, which hold a stack by a name of their own."""

    num_experts, is_transposed = 3, False

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x):
        return torch.matmul(x, self.up.mT)


def test_a_stack_that_another_program_reads_comes_with_its_update():
    model = trained(start(nn.ModuleDict({"experts": Projections()})))
    layer = model["experts"]
    assert not torch.equal(x_of() @ layer.up.mT, x_of() @ layer.base.up.mT)
    merged = merge(model)["experts"]
    assert torch.equal(merged.up, merged.merged_stacks()["up"])
    assert not torch.equal(merged.up, merged.base.up)


@each_kind
def test_offloaded_experts_come_in_for_a_call(kind):
    y = make(kind)(x_of()).detach()
    with offloaded(make(kind)) as model, torch.no_grad():
        assert torch.equal(model(x_of()), y)
        if kind == "plain":
            with pytest.raises(InputError, match="is offloaded and comes in for a"):
                merge(model)
    for ready in (merge(make(kind)), unmerge(merge(make(kind)))):
        y = ready(x_of()).detach()
        with offloaded(ready) as model, torch.no_grad():
            assert torch.equal(model(x_of()), y)


def test_sharded_experts_compute_and_train_alike():
    expected = run(make("plain"))
    with sharded(make("plain")) as model:
        found = run(model)
        found = [t.full_tensor() if hasattr(t, "placements") else t for t in found]
        assert same(found, expected)
        with pytest.raises(InputError, match="is sharded over several processes"):
            merge(model)


@pytest.mark.parametrize("state", list(AMBIENT))
@each_kind
def test_they_start_and_merge_as_if_nothing_were_ambient(kind, state):
    model, expected = plain(kind), run(make(kind))
    right = merge(make(kind))(x_of())
    with AMBIENT[state]():
        start(model)
    assert same(run(trained(model)), expected)
    with AMBIENT[state]():
        merge(model)
    assert torch.equal(model(x_of()), right)
    assert torch.equal(unmerge(model)(x_of()).detach(), expected[0])


@pytest.mark.parametrize("state", ["inference mode", "no gradients", "deterministic"])
@each_kind
def test_the_forward_is_the_same(kind, state):
    model = make(kind)
    y = model(x_of())
    with AMBIENT[state]():
        assert torch.equal(model(x_of()), y)


@each_kind
def test_under_autocast_they_follow_the_module(kind):
    model, bare = make(kind), plain(kind)
    exact = model(x_of()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x_of())
        assert y.dtype == bare(x_of()).dtype
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable_parameters(model))
    # On the longest way x, A, x A^T, its product with s, B, the change and its sum with
    # y are rounded to bfloat16. The roundings to float32 are together less than one.
    bound = gamma(8, "bfloat16") * absolute(model, bare)
    assert_within(y.detach().float().numpy(), exact.numpy(), bound.numpy())


@torch.no_grad()
def absolute(model, bare):
    """Return the sum of the absolute values of all products in `model(x_of())`."""
    x, nothing = x_of(), bare(torch.zeros(4, 8))
    products = [(bare(x * unit) - nothing).abs() for unit in torch.eye(8)]
    A, B = (p.detach().abs()[CHOSEN] for p in trainable_parameters(model))
    change = CONFIG.alpha / CONFIG.r * torch.einsum("tor,tri,ti->to", B, A, x.abs())
    return nothing.abs() + sum(products) + change


@each_kind
def test_in_16_bits_the_adapters_have_32_and_the_output_16(kind):
    model = plain("plain").bfloat16()
    model = quantize_linears(model, blocksize=8) if kind == "four bits" else model
    model = trained(start(model))
    y = model(x_of(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    merged = merge(model)(x_of(torch.bfloat16))
    assert merged.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(model))


def test_a_model_without_memory_is_filled_by_assignment():
    source = make("plain")
    with torch.device("meta"):
        model = Model()
    inject(model, CONFIG, ["experts"])
    assert model.experts.W.is_meta
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(x_of()), source(x_of()))
    model.to("meta").to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(x_of()), source(x_of()))


@each_kind
def test_their_tensors_carry_over_and_hooks_see_every_adapter(kind):
    source, model = make(kind), start(plain(kind))
    load_adapter_state_dict(model, adapter_state_dict(source))
    called = []
    model.experts.adapters["default"].register_forward_hook(lambda *_: called.append(1))
    assert same(run(model), run(source))
    assert called


@each_kind
def test_a_stack_that_is_read_is_the_adapted_one_and_is_not_written_to(kind):
    layer = make(kind).experts
    read = layer.W
    assert read.shape == (3, 5, 8)
    assert read.dtype == torch.float32
    merged = layer.merged_stacks()["W"]
    assert_within(
        (read + 0).detach().numpy(),
        merged.numpy(),
        gamma(8) * float(merged.abs().max()),
    )
    with pytest.raises(InputError, match="what is written to it would be lost"):
        read.mul_(2)


@each_kind
def test_training_mode_follows_the_module(kind):
    for training in (True, False):
        model = start(plain(kind).train(training))
        assert {module.training for module in model.modules()} == {training}
        assert {m.training for m in unload(merge(model)).modules()} == {training}


def test_the_kinds_are_those_that_a_model_may_hold():
    assert isinstance(plain("four bits").experts, QuantizedExperts)
    assert isinstance(plain("plain").experts, Experts)


# --- how a program calls the module, and how the module uses its stacks ---------------


@pytest.mark.parametrize("adapted", [False, True])
@each_kind
def test_operands_may_have_names(kind, adapted):
    layer = (make(kind) if adapted else plain(kind)).experts
    y = layer(x_of(), CHOSEN)
    assert torch.equal(layer(x=x_of(), chosen=CHOSEN), y)
    assert torch.equal(layer(x_of(), chosen=CHOSEN), y)


class Holding(nn.Module):
    """A module of experts that every token visits; a subclass says how."""

    is_transposed = False

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 5, 8))


class ByName(Holding):
    def forward(self, x):
        turned = torch.swapaxes(input=self.W, axis0=-1, axis1=-2)
        return torch.matmul(input=x.expand(3, -1, -1), other=turned)


class InAList(Holding):
    def forward(self, x):
        parts = torch.cat([self.W, self.W], 0)
        return x.expand(6, -1, -1) @ parts.mT


class AskedByName(Holding):
    def forward(self, x):
        rows = self.W[0].size(dim=0)
        return (x.expand(3, -1, -1) @ self.W.mT).narrow(-1, 0, rows)


class IntoMemory(Holding):
    def forward(self, x):
        y = torch.empty(4, 5)
        torch.mm(x, self.W[0].T, out=y)
        return y


@pytest.mark.parametrize("kind", [ByName, InAList, AskedByName, IntoMemory])
def test_a_stack_has_its_update_however_a_function_receives_it(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    with torch.no_grad():
        base = model(x_of())
    model = trained(inject(model, CONFIG, ["0"]))
    with torch.no_grad():
        y, merged = model(x_of()), merge(model)(x_of())
    assert not torch.equal(y, base)
    assert_within(y.numpy(), merged.numpy(), gamma(32) * float(8 * merged.abs().max()))


def test_the_constants_of_experts_are_named_and_compared():
    source = make("plain")
    assert constants(source) == {"experts.W.scaling": 2.0}
    other = inject(plain("plain"), LoRAConfig(2, 32.0), ["experts"])
    tensors, saved = adapter_state_dict(source), constants(source)
    with pytest.raises(InputError, match=r"experts\.W\.scaling is 2\.0, not 16\.0"):
        load_adapter_state_dict(other, tensors, saved=saved)
    load_adapter_state_dict(start(plain("plain")), tensors, saved=saved)


COMPUTED = "W of this .* was a parameter when it was adapted, and now something"


def test_a_stack_that_something_computes_later_is_refused():
    model = make("plain")
    parametrize.register_parametrization(model.experts.base, "W", Same())
    for act in (lambda: model(x_of()), lambda: merge(model)):
        with pytest.raises(InputError, match=COMPUTED):
            act()


def test_a_stack_that_is_pruned_later_keeps_its_update_and_is_not_merged():
    model, twin = make("plain"), make("plain")
    prune.random_unstructured(model.experts.base, "W", 0.5)
    model(x_of())
    twin.experts.base.W.data = model.experts.base.W.detach().clone()
    assert torch.equal(model(x_of()), twin(x_of()))
    with pytest.raises(InputError, match=COMPUTED):
        merge(model)


@each_kind
def test_a_tracer_that_cannot_see_their_adapters_is_named(kind):
    with annotations_off(), pytest.raises(InputError, match=r"^torch\.fx records"):
        torch.fx.symbolic_trace(make(kind))


def doubled(layer):
    return layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def test_hooks_of_experts_run_once_through_four_bits_adapters_and_a_merge():
    model, twin = plain("plain"), make("four bits")
    handle = doubled(model.experts)
    quantize_linears(model, blocksize=8)
    second = doubled(model.experts)
    trained(start(model))
    y, merged = twin(x_of()), merge(twin)(x_of())
    assert torch.equal(model(x_of()), 4 * y)
    assert torch.equal(unload(merge(model))(x_of()), 4 * merged)
    handle.remove()
    second.remove()
    assert torch.equal(model(x_of()), merged)


def test_a_forward_of_experts_that_four_bits_would_lose_is_refused():
    model = plain("plain")
    model.experts.forward = plain("plain").experts.forward
    with pytest.raises(InputError, match="experts: a forward was set on this Experts"):
        quantize_linears(model, blocksize=8)
    del model.experts.forward
    model = trained(start(quantize_linears(model, blocksize=8)))
    model.experts.base.forward = plain("four bits").experts.forward
    with pytest.raises(InputError, match="experts: a forward was set on this Quant"):
        unload(merge(model))
