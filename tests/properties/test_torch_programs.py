"""Adapted layers inside programs: every row in every wrapper and every global state.

A wrapper is code that a program puts around a model: offloading, sharding, hooks, a
compiler, copies. A global state is a setting for all of torch: autocast, default dtype
and device, modes. Each row runs in each of both; the values must be those of the plain
layer.
"""

import copy
import io
import os
import pickle
from contextlib import contextmanager, nullcontext
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from minipeft.errors import InputError
from minipeft.torch.adapted import Adapted
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import (
    adapted,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    merge,
    trainable_parameters,
    unload,
    unmerge,
)
from minipeft.torch.linear import transformed
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from tests.agreement.on_torch import CONFIGS
from tests.tolerance import assert_within, gamma

ROWS = CONFIGS | {
    "ia3": IA3Config(["2"]),
    "pissa": PiSSAConfig(2, 4.0),
    "loftq": LoftQConfig(2, 4.0, blocksize=8, steps=1),
    "bottleneck": BottleneckConfig(3),
    "lora on four bits": LoRAConfig(2, 4.0),
}
SPLIT = ("pissa", "loftq")  # rows that take a weight apart
MERGE = [name for name in ROWS if name != "bottleneck"]
each_row = pytest.mark.parametrize("row", list(ROWS))
each_mergeable = pytest.mark.parametrize("row", MERGE)


class Model(nn.Sequential):
    """Two linear layers with a nonlinear function between."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def plain(row):
    torch.manual_seed(0)
    return quantize_linears(Model(), blocksize=8) if "bits" in row else Model()


def trained(model):
    """Give every adapter values that differ from its initial ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p += 0.3 * torch.randn(p.shape, generator=generator).to(p)
    return model


def start(model, row):
    seed = torch.Generator().manual_seed(2)
    return inject(model, ROWS[row], ["0", "2"], generator=seed)


def make(row):
    return trained(start(plain(row), row))


def run(model):
    """Return the output and the gradients of all trained parameters."""
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in trainable_parameters(model))]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def adapters(model):
    return [a for layer in adapted(model).values() for a in layer.adapters.values()]


# --- what a program wraps around a model ---------------------------------------------


@contextmanager
def offloaded(model):
    """Keep all weights elsewhere; each weight is loaded for one call of its module."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    yield model


@contextmanager
def sharded(model):
    """Shard each adapter and each base with FSDP2, over one process."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    if not distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for layer in adapted(model).values():
        for adapter in layer.adapters.values():
            fully_shard(adapter)
        if next(layer.base.parameters(), None) is not None:
            fully_shard(layer.base)
    try:
        yield model
    finally:
        distributed.destroy_process_group()


@contextmanager
def hooked(model):
    """Count the calls of every adapter with hooks, as a profiler does."""
    called = set()
    for adapter in adapters(model):
        adapter.register_forward_hook(lambda module, *rest: called.add(module))
    yield model
    assert called == set(adapters(model))


class Same(nn.Module):
    def forward(self, tensor):
        return 1 * tensor


@contextmanager
def parametrized(model):
    """Make each trained tensor of an adapter a parametrized one."""
    for adapter in adapters(model):
        for name in [n for n, _ in adapter.named_parameters(recurse=False)]:
            parametrize.register_parametrization(adapter, name, Same())
    yield model


@contextmanager
def base_hooked(model):
    """Look at the input and output of each wrapped layer with hooks."""
    seen = []
    for layer in adapted(model).values():
        layer.base.register_forward_hook(lambda module, *rest: seen.append(module))
    yield model
    assert len(seen) >= 2


@contextmanager
def cast_by_the_instance(model):
    """Give the instance a `forward` that casts the weight, as some loaders do."""
    for layer in adapted(model).values():
        base = layer.base
        if isinstance(base, nn.Linear):
            base.forward = lambda x, b=base: nn.functional.linear(
                x, b.weight.to(torch.float32), b.bias
            )
    yield model


WRAPPERS = {
    "offloaded": offloaded,
    "sharded": sharded,
    "hooked": hooked,
    "base hooked": base_hooked,
    "parametrized": parametrized,
    "cast by the instance": cast_by_the_instance,
    "copied": lambda model: nullcontext(copy.deepcopy(model)),
    "pickled": lambda model: nullcontext(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
@each_row
def test_values_and_gradients_are_those_of_the_plain_model(row, wrapper):
    expected = run(make(row))
    with WRAPPERS[wrapper](make(row)) as model:
        if wrapper == "offloaded":  # the optimizer would need gathered gradients
            with torch.no_grad():
                y = model(torch.linspace(-1, 1, 18).reshape(3, 6))
            assert torch.equal(y, expected[0])
            return
        found = run(model)
        found = [t.full_tensor() if hasattr(t, "placements") else t for t in found]
        assert same(found, expected)


MERGED = ("hooked", "base hooked", "parametrized", "copied")


@pytest.mark.parametrize("wrapper", MERGED)
@each_mergeable
def test_merged_values_are_those_of_the_plain_model(row, wrapper):
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    expected = merge(make(row))(x)
    with WRAPPERS[wrapper](make(row)) as model:
        model(x)  # each adapter must be called for its hooks
        assert torch.equal(merge(model)(x), expected)


@pytest.mark.parametrize("wrapper", ["offloaded", "sharded"])
@pytest.mark.parametrize("row", ["lora", "dora"])
def test_weights_that_are_elsewhere_are_not_merged(row, wrapper):
    sentence = {"offloaded": "comes in for a call alone", "sharded": "is sharded over"}
    around = WRAPPERS[wrapper](make(row))
    with around as model, pytest.raises(InputError, match=sentence[wrapper]):
        merge(model)


@each_mergeable
def test_a_merged_model_may_be_offloaded(row):
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    expected = merge(make(row))(x)
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    for buffers in (False, True):
        model = accelerate.cpu_offload(merge(make(row)), "cpu", offload_buffers=buffers)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


# --- hooks and forwards of the wrapped layer -----------------------------------------


def doubled_by_a_hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def doubled_by_the_instance(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("double", [doubled_by_a_hook, doubled_by_the_instance])
@each_mergeable
def test_what_surrounds_the_product_stays_merged_or_not(row, double):
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model, twin = plain(row), make(row)
    double(model[2])
    if row == "loftq" and double is doubled_by_the_instance:
        with pytest.raises(InputError, match=r"^2: a forward was set on this Linear"):
            start(model, row)
        assert not adapted(model)
        return
    trained(start(model, row))
    y = model(x)
    assert torch.equal(y, 2 * twin(x))
    merged = merge(model)(x)
    assert torch.equal(merged, 2 * merge(twin)(x))
    assert torch.equal(unmerge(model)(x), y)
    if "bits" not in row or double is doubled_by_a_hook:
        assert torch.equal(unload(merge(model))(x), merged)


def test_a_forward_that_goes_another_way_is_refused():
    model = make("lora")
    model[0].base.forward = lambda x: x @ (2 * model[0].base.weight).T
    with pytest.raises(InputError, match="did not multiply by its weight as it stands"):
        model(torch.zeros(1, 6))


# --- what is ambient -----------------------------------------------------------------


@contextmanager
def default(dtype=None, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device) if device else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": deterministic,
    "default dtype": lambda: default(torch.float64),
    "default device": lambda: default(device="meta"),
}
each_state = pytest.mark.parametrize("state", list(AMBIENT))


@each_state
@each_row
def test_adapters_start_and_merge_as_if_nothing_were_ambient(row, state):
    model, expected = plain(row), run(make(row))
    with AMBIENT[state]():
        start(model, row)
    assert same(run(trained(model)), expected)
    if row in MERGE:
        with AMBIENT[state]():
            merged = [layer.merged_weight for layer in adapted(merge(model)).values()]
        right = [layer.merged() for layer in adapted(make(row)).values()]
        assert same(merged, right)
        run_of_a_merged_model = model(torch.ones(2, 6, requires_grad=True))
        run_of_a_merged_model.sum().backward()


FORWARD = ("inference mode", "no gradients", "deterministic")


@pytest.mark.parametrize("state", FORWARD)
@each_row
def test_the_forward_is_the_same(row, state):
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model = make(row)
    y = model(x)
    with AMBIENT[state]():
        assert torch.equal(model(x), y)


# Every wrapper in every state; the rows take turns.
PAIRS = [
    (list(ROWS)[i % len(ROWS)], wrapper, state)
    for i, (wrapper, state) in enumerate(product(WRAPPERS, AMBIENT))
    # FSDP2 runs no model in inference mode, with or without adapters.
    if (wrapper, state) != ("sharded", "inference mode")
]


@pytest.mark.parametrize(("row", "wrapper", "state"), PAIRS)
def test_a_wrapped_model_computes_under_a_state_what_the_plain_one_does(
    row, wrapper, state
):
    x, model = torch.linspace(-1, 1, 18).reshape(3, 6), make(row)
    with AMBIENT[state]():
        expected = model(x)
    with WRAPPERS[wrapper](make(row)) as wrapped, AMBIENT[state]():
        y = wrapped(x)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)


@each_row
def test_under_autocast_an_adapter_follows_its_layer(row):
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert make(row)(x).dtype == plain(row)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@each_row
def test_training_mode_follows_the_layer(row, training):
    model = inject(plain(row).train(training), ROWS[row], ["0", "2"])
    assert {module.training for module in model.modules()} == {training}
    if row in MERGE:
        parts = unload(merge(model)).modules()
        assert {module.training for module in parts} == {training}


# --- what reads the code -------------------------------------------------------------


def mapped(model, x):
    return torch.func.vmap(model)(x)


def pushed(model, x):
    """Return the value of a forward-mode derivative."""
    return torch.func.jvp(model, (x,), (x,))[0]


def test_where_torch_cannot_say_code_counts_as_transformed(monkeypatch):
    """torch's name for this is private: a later release may have another one."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 16))
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert not transformed()
    assert torch.func.vmap(lambda row: row + transformed())(x).gt(x).all()
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert transformed()
    assert torch.equal(layer(x), y)


def same_up_to_float64(found, expected):
    """Check that two float64 results differ by less than a last bit of float32.

    A float64 has 2**29 times the resolution, so even a million roundings stay below
    that bit.
    """
    found, expected = found.detach().numpy(), expected.detach().numpy()
    assert found.dtype == expected.dtype == "float64"
    assert_within(found, expected, gamma(1) * abs(expected).max())


def exported(model, x):
    return torch.export.export(model, (x,), strict=False).module()(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's
@pytest.mark.parametrize("reads", [mapped, pushed, exported])
@each_row
def test_a_transform_computes_what_the_model_computes(row, reads):
    x, model = torch.linspace(-1, 1, 18).reshape(3, 6).double(), make(row).double()
    same_up_to_float64(reads(model, x), model(x))


def in_a_dual_level(model, x, along):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, along))).tangent


def by_torch_func(model, x, along):
    return torch.func.jvp(model, (x,), (along,))[1]


@pytest.mark.parametrize("slope", [in_a_dual_level, by_torch_func])
@each_row
def test_forward_mode_gives_the_slope_that_backward_mode_gives(row, slope):
    x, model = torch.linspace(-1, 1, 18).reshape(3, 6).double(), make(row).double()
    along = torch.linspace(2, -1, 18).reshape(3, 6).double()
    columns = torch.autograd.functional.jacobian(model, x)
    expected = torch.tensordot(columns, along, 2)
    same_up_to_float64(slope(model, x, along), expected)


@each_row
def test_gradients_of_single_samples_add_up_to_the_gradient(row):
    x, model = torch.linspace(-1, 1, 18).reshape(3, 6).double(), make(row).double()
    trained_ = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, sample):
        y = torch.func.functional_call(model, parameters, (sample,))
        return y.square().sum()

    values = {n: p.detach() for n, p in trained_.items()}
    slopes = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    model(x).square().sum().backward()
    for name, parameter in trained_.items():
        same_up_to_float64(slopes[name].sum(0), parameter.grad)


# --- what is saved -------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [name for name in ROWS if name not in ("dora", *SPLIT, "lora on four bits")]
)
def test_a_model_without_memory_is_filled_by_assignment(row):
    """Only rows whose initial values do not depend on the weight."""
    source = make(row)
    with torch.device("meta"):
        model = Model()
    inject(model, ROWS[row], ["0", "2"])
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    assert torch.equal(model(x), source(x))
    model.to("meta").to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(x), source(x))


@each_row
def test_adapters_are_files_of_tensors_that_share_no_memory(row):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    source = make(row)
    file = safetensors.save(adapter_state_dict(source))
    model = inject(plain(row), ROWS[row], ["0", "2"])
    load_adapter_state_dict(model, safetensors.load(file))
    assert same(run(model), run(source))
    safetensors.save(source.state_dict())
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)


# --- attributes ----------------------------------------------------------------------


@each_row
def test_a_layer_answers_what_its_base_answers(row):
    layer = make(row)[0]
    assert (layer.in_features, layer.out_features) == (6, 8)
    layer.adapters.clear()  # a computation would fail or ignore the adapter
    assert layer.weight.shape == layer.base.weight.shape
    assert layer.weight.dtype == torch.float32
    assert layer.weight.device.type == "cpu"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = layer.nothing_of_the_kind
    assert isinstance(layer, Adapted)


def test_asking_for_the_dtype_of_four_bits_decodes_nothing():
    layer = make("lora on four bits")[0]
    layer.base.dequantize = None
    assert layer.weight.dtype == layer.base.weight.dtype == torch.float32
    assert layer.base.weight.shape == (8, 6)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.mul_(2),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: setattr(layer.weight, "data", torch.zeros(8, 6)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 6))),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: setattr(layer, "in_features", 3),
    ],
)
def test_what_would_be_lost_when_written_is_refused(write):
    with pytest.raises(InputError, match=r"lost; write to|set it on `layer\.base`"):
        write(make("lora")[0])
