"""Many adapters on one model: a mixed batch gives what a loop over its samples gives.

The loop has a model for each request, adapted by the layer of the adapter's method.
"""

import re
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.torch import inject
from minipeft.torch.dora import DoRA
from minipeft.torch.lora import LoRA, LoRAConfig
from minipeft.torch.lora_batched import METHODS, Pool, forward, stack
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.vera import VeRAConfig
from tests.agreement.llama import TEXT, llama, logit_bound
from tests.bounds import assert_both_within, counted
from tests.properties.adapted_networks import (
    adapters,
    network,
    new,
    whole,
)
from tests.properties.test_pool_refusals import LORA, served
from tests.strategies import seeds
from tests.tolerance import assert_within

pytestmark = pytest.mark.slow

NAMES = ("a", "b", "c", "d", "e", "f")
VERA = VeRAConfig(8, dropout=0.5)
STEPS = st.sampled_from(["switch", "remove", "evict"])
SHARES = st.sampled_from([-1.0, 0.5, 1.0, 2.0])


def alone(model, found, shares):
    """Return the model of one request, adapted by the layers of its methods."""
    model = deepcopy(model)
    for key in {key for name in shares for key in found[name]}:
        own = {n: found[n][key] for n in shares if key in found[n]}
        base = model.get_submodule(key)
        layer = METHODS[type(next(iter(own.values())))](base, None)
        for name, adapter in own.items():
            layer.add(name, deepcopy(adapter))
        layer.activate({n: s for n, s in shares.items() if n in own})
        model.set_submodule(key, layer.eval())
    return model


def loop(model, found, requests, x):
    rows = [alone(model, found, r)(x[i : i + 1]) for i, r in enumerate(requests)]
    return torch.cat(rows).detach()


@st.composite
def batches(draw):
    """Draw a method for each adapter name, and requests for the names."""
    kinds = draw(st.lists(st.sampled_from([*METHODS]), min_size=1, max_size=len(NAMES)))
    kind_of = dict(zip(NAMES, kinds, strict=False))
    return kind_of, draw(st.lists(requests(kind_of), min_size=1, max_size=6))


def requests(kind_of):
    """Draw the shares of a request: no adapter, one, or several of one method."""
    sums = [
        st.lists(st.sampled_from(names), unique=True, max_size=3).flatmap(
            lambda chosen: st.fixed_dictionaries(dict.fromkeys(chosen, SHARES))
        )
        for kind in {*kind_of.values()}
        if (names := [n for n, k in kind_of.items() if k is kind])
    ]
    return st.one_of(st.just({}), *sums)


def inputs(rng, model, n):
    lead = (n, int(rng.integers(1, 4)))
    return whole(rng, *lead, model[0].in_features)


@given(batch=batches(), seed=seeds)
def test_a_mixed_batch_is_the_loop_over_its_samples_bit_for_bit(batch, seed):
    kind_of, wanted = batch
    rng = np.random.default_rng(seed)
    model = network(rng, DoRA in kind_of.values())
    found = {n: adapters(rng, model, k) for n, k in kind_of.items()}
    x = inputs(rng, model, len(wanted))
    expected = loop(model, found, wanted, x)
    pool = Pool(model)
    for name, own in found.items():
        pool.add(name, own)
    plain = model(x)
    with torch.no_grad(), pool.serve(wanted):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), plain)


@given(seed=seeds, n=st.integers(1, 5), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_low_rank_updates_are_those_of_the_loop_up_to_rounding(seed, n, dtype):
    rng = np.random.default_rng(seed)
    k, d, m = (int(v) for v in rng.integers(1, 9, 3))
    base = nn.Linear(k, d)
    loras = [
        LoRA(
            torch.randn(r, k, generator=torch.manual_seed(seed % 2**31 + i)),
            torch.randn(d, r),
            0.3 + i,
        )
        for i, r in enumerate(rng.integers(1, 6, m))
    ]
    pool = Pool(nn.Sequential(base), ["0"])
    for i, lora in enumerate(loras):
        pool.add(str(i), {"0": lora.to(getattr(torch, dtype))})
    wanted = [
        {str(i): float(rng.choice([1, 0.7, -1.3])) for i in rng.permutation(m)[:2]}
        for _ in range(n)
    ]
    x = torch.randn(n, 2, k)
    with torch.no_grad(), pool.serve(wanted):
        mixed = pool.layers["0"](x).numpy()
    found = {str(i): {"0": lora} for i, lora in enumerate(loras)}
    one_by_one = loop(nn.Sequential(base), found, wanted, x).numpy()
    sizes = np.stack(
        [formula(x[i].numpy(), base, found, r) for i, r in enumerate(wanted)]
    )
    assert_both_within(mixed, one_by_one, sizes, sizes, dtype=dtype)


def formula(x, base, found, shares):
    """Return y + sum of w s (x A^T) B^T on counted values.

    The stack rounds w s B where the loop rounds w (s h): as many roundings. In 16 bits,
    the operands x and h of a product, and its result, are each rounded once more.
    """
    x, W = counted(x), counted(base.weight.detach().numpy())
    total = x @ W.T + counted(base.bias.detach().numpy())
    for name, share in shares.items():
        lora = found[name]["0"]
        A, B = (counted(M.detach().float().numpy()) for M in (lora.A, lora.B))
        once = counted(np.ones(1)) * 1
        update = (x * once @ A.T * once * lora.scaling) @ B.T * once * share
        total = total + update
    return total


@given(seed=seeds, ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_stack_holds_the_updates_themselves(seed, ranks):
    rng = np.random.default_rng(seed)
    layer = nn.Linear(6, 7)
    loras = [new(rng, LoRA, layer) for _ in ranks]
    A, B, _ = stack([[(1.0, lora)] for lora in loras])
    assert A.shape == (len(loras), max(len(lora.A) for lora in loras), 6)
    for i, lora in enumerate(loras):
        r = len(lora.A)
        assert torch.equal(A[i, :r], lora.A)
        assert torch.equal(B[i, :, :r], lora.B)
        assert not A[i, r:].any()
        assert not B[i, :, r:].any()
    together = stack([[(2.0, lora) for lora in loras]])
    total = sum(2 * lora.scaling * lora.B @ lora.A for lora in loras)
    s = together.scaling[0]
    assert torch.equal(s * together.B[0] @ together.A[0], total.detach())


class Expected:
    """The names that a pool should hold, least recently used first."""

    def __init__(self, sizes, budget):
        self.sizes, self.budget = sizes, budget
        self.held, self.hits, self.loads, self.moved = [], 0, 0, 0

    def serve(self, requests):
        names = list(dict.fromkeys(n for r in requests for n in r))
        self.hits += sum(n in self.held for n in names)
        self.loads += sum(n not in self.held for n in names)
        self.moved += sum(self.sizes[n] for n in names if n not in self.held)
        while sum(self.sizes[n] for n in {*self.held, *names}) > self.budget:
            self.held.remove(next(n for n in self.held if n not in names))
        self.held = [n for n in self.held if n not in names] + names

    def forget(self, name):
        self.held = [n for n in self.held if n != name]


def drop(pool, expected, current, step, name):
    """Remove or evict an adapter; the pool refuses if a request uses the adapter."""
    if any(name in request for request in current):
        with pytest.raises(InputError, match="uses adapter"):
            getattr(pool, step)(name)
    else:
        getattr(pool, step)(name)
        expected.forget(name)


@given(seed=seeds, data=st.data())
def test_adapters_come_and_go_while_requests_are_served(seed, data):
    rng = np.random.default_rng(seed)
    model = network(rng)
    found = {n: adapters(rng, model, LoRA) for n in NAMES}
    sizes = {
        n: sum(p.nbytes for a in own.values() for p in a.parameters())
        for n, own in found.items()
    }
    budget = sum(sorted(sizes.values())[-3:])
    plain, pool, current = deepcopy(model), Pool(model, budget=budget), [{}, {"a": 1.0}]
    for name in NAMES[:5]:
        pool.add(name, found[name])
    expected, x = Expected(sizes, budget), inputs(rng, plain, 2)

    @cache
    def outputs(row, *shares):
        return loop(plain, found, [dict(shares)], x[row : row + 1])

    steps = [("switch", n) for n in data.draw(st.permutations(NAMES[:5]))]
    steps += data.draw(st.lists(st.tuples(STEPS, st.sampled_from(NAMES)), max_size=6))
    with torch.no_grad(), pool.serve(current):
        expected.serve(current)
        for step, name in steps:
            if name not in pool.host:
                pool.add(name, found[name])
            elif step == "switch":
                row = data.draw(st.integers(0, 1))
                current[row] = {name: data.draw(SHARES)}
                pool.switch(row, current[row])
                expected.serve(current)
            else:
                drop(pool, expected, current, step, name)
            assert list(pool.resident) == expected.held
            assert sum(map(pool.nbytes, pool.resident)) <= budget
            counted = pool.traffic._replace(evictions=0)
            assert counted == (expected.hits, expected.loads, expected.moved, 0)
            apart = [outputs(i, *request.items()) for i, request in enumerate(current)]
            assert torch.equal(model(x), torch.cat(apart))


def test_a_llama_serves_several_methods():
    """GQA, an output head without adapters, layers without some adapters."""
    model, ids = llama(), TEXT[:1].repeat(4, 1) + torch.arange(4)[:, None]
    configs = {
        "lora": (LoRAConfig(3, 6.0), ["q_proj", "down_proj"]),
        "small": (LoRAConfig(1, 1.0), ["v_proj"]),
        "vera": (VeRAConfig(8), ["o_proj"]),
    }
    served, tuned = deepcopy(model), {}
    pool = Pool(served)
    for name, (config, targets) in configs.items():
        tuned[name] = inject.inject(deepcopy(model), config, targets, name)
        with torch.no_grad():
            for p in inject.trainable_parameters(tuned[name]):
                p.add_(torch.randn_like(p) / 4)
        pool.add(name, inject.adapters_of(tuned[name], name))
    bound = logit_bound(model, model(ids).logits)
    with torch.no_grad(), pool.serve(["lora", None, "vera", "small"]):
        mixed = served(ids).logits
    for i, one in enumerate((tuned["lora"], model, tuned["vera"], tuned["small"])):
        own = one(ids[i : i + 1]).logits[0].detach()
        assert_within(mixed[i].numpy(), own.numpy(), 2 * bound)
        off = (mixed[i] - model(ids[i : i + 1]).logits[0].detach()).abs().numpy()
        assert (i == 1) == bool((off <= 2 * bound).all())


def test_a_base_of_four_bits_serves():
    rng = np.random.default_rng(0)
    base = QuantizedLinear.from_linear(nn.Linear(64, 24))
    lora = LoRA(whole(rng, 2, 64), whole(rng, 24, 2), 0.5)
    x = whole(rng, 2, 3, 64)
    expected = base(x)
    pool = Pool(model := nn.Sequential(base), ["0"])
    pool.add("a", {"0": lora})
    with torch.no_grad(), pool.serve([None, "a"]):
        y = model(x)
    assert torch.equal(y[0], expected[0])
    change = 0.5 * (x[1] @ lora.A.T) @ lora.B.T
    assert torch.equal(y[1], expected[1] + change)


def test_an_embedding_serves():
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, _weight=torch.randint(-3, 4, (9, 4)).float())
    found = {
        n: {"0": LoRA(torch.ones(r, 9), torch.full((4, r), float(r)), 0.5)}
        for n, r in (("a", 1), ("b", 2))
    }
    ids = torch.tensor([[1, 2], [3, 3], [8, 0]])
    pool = Pool(model := nn.Sequential(table), ["0"])
    for name, own in found.items():
        pool.add(name, own)
    with torch.no_grad(), pool.serve(["b", None, {"a": 2.0}]):
        y = model(ids)
        single = model(ids[:, 0])  # one token a request
    rows = torch.tensor([2 * 2 * 0.5, 0, 2 * 0.5]).view(3, 1, 1)
    assert torch.equal(y, table(ids) + rows)
    assert torch.equal(single, y[:, 0])


def test_pissa_is_refused_with_its_remedy():
    tuned = inject.inject(nn.Sequential(nn.Linear(6, 4)), PiSSAConfig(2, 4.0), ["0"])
    pool, _ = served()
    with pytest.raises(InputError, match=re.escape("`pissa.to_lora` makes PiSSA LoRA")):
        pool.add("p", inject.adapters_of(tuned))


def test_bytes_are_those_of_the_tensors_and_a_shared_pair_counts_once():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    config, pool = VeRAConfig(8), Pool(deepcopy(model))
    for name in "ab":
        tuned = inject.inject(deepcopy(model), config, "all-linear", name)
        pool.add(name, inject.adapters_of(tuned, name))
        assert pool.nbytes(name) == 4 * (8 + 4 + 8 + 5) + 2 * 4 * 8  # d, b; drawn
    assert pool.shared_bytes == 0
    with pool.serve(["a", "b"]):
        assert pool.shared_bytes == 4 * (8 * 6 + 5 * 8)
        assert pool.stacked_bytes == 0
    pool.remove("a")
    assert pool.shared_bytes > 0
    pool.remove("b")
    assert pool.shared_bytes == 0
    pool, _ = served()
    with pool.serve(["a", "b"]):
        assert pool.stacked_bytes == 2 * (pool.nbytes("a") + 4)


def test_what_is_served_is_a_copy_in_evaluation():
    pool, model = served()
    lora = LoRA(torch.ones(1, 6), torch.ones(4, 1), 2.0, dropout=0.5)
    pool.add("d", {"0": lora})
    x = torch.randn(1, 6)
    with torch.no_grad(), pool.serve(["d"]):
        y = model.train()(x)
        lora.A.zero_()
        assert all(torch.equal(model(x), y) for _ in range(4))
    assert not [p for p in model.parameters() if p.requires_grad]
    inject.unload(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("config", [LoRAConfig(2, 4.0, dropout=0.5), VERA], ids=repr)
def test_training_is_the_mode_of_the_base_and_drops_nothing_of_an_adapter(config):
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    tuned = inject.inject(deepcopy(model), config, "all-linear", "a")
    with torch.no_grad():
        for p in inject.trainable_parameters(tuned):
            p.copy_(torch.randn_like(p))
    pool = Pool(model)
    pool.add("a", inject.adapters_of(tuned, "a"))
    with torch.no_grad(), pool.serve(["a", "a"]):
        quiet = model.eval()(x)
        assert not model[0].base.training
        assert all(torch.equal(model.train()(x), quiet) for _ in range(4))
        assert model[0].base.training


def test_layers_that_no_adapter_changes_are_frozen_too():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    Pool(model, ["0"])
    assert not any(p.requires_grad for p in model.parameters())


def test_rows_without_an_adapter_keep_every_bit():
    torch.manual_seed(0)
    x, y = torch.randn(4, 6), torch.randn(4, 4)
    updates = stack([[(1.0, LORA)]])
    found = forward(x, y, updates, torch.tensor([-1, 0, -1, 0], dtype=torch.int32))
    same = [bool((found[i] == y[i]).all()) for i in range(4)]
    assert same == [True, False, True, False]
    with pytest.raises(InputError, match="x has 4 rows for 3 requests"):
        forward(x, y, updates, torch.tensor([0, 0, 0], dtype=torch.int32))


def test_stacks_of_different_layers_are_refused():
    other = LoRA(torch.ones(1, 5), torch.ones(4, 1), 1.0)
    for updates in ([], [[]], [[(1.0, LORA)], [(1.0, other)]]):
        with pytest.raises(InputError, match="stack at least one"):
            stack(updates)


def test_a_batch_may_be_as_large_as_the_budget():
    pool, _ = served()
    for wanted in (["a", "b"], ["b", "ia3"], ["a", "a"]):
        with pool.serve(wanted):
            assert {*wanted} <= {*pool.resident}
    assert pool.traffic.evictions == 2  # a parameter of ia3, two of b for a
