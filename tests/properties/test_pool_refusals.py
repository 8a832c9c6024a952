"""A pool refuses wrong requests and adapters, and a refusal changes nothing."""

from copy import deepcopy

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch import inject
from minipeft.torch.experts import ExpertsLoRA
from minipeft.torch.ia3 import IA3
from minipeft.torch.lora import LoRA
from minipeft.torch.lora_batched import Pool, stack


@pytest.fixture
def plainly(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def served():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    pool = Pool(model, budget=4 * (6 + 4) * 2)
    for name, r in (("a", 1), ("b", 1), ("c", 3)):
        lora = LoRA(torch.ones(r, 6), torch.ones(4, r), 2.0)
        pool.add(name, {"0": lora})
    pool.add("ia3", {"0": IA3(torch.ones(4), "output")})
    return pool, model


def state(pool):
    plans = [layer.plan for layer in pool.layers.values()]
    return (*pool.host, *pool.resident, pool.traffic, pool.requests, *map(id, plans))


LORA = LoRA(torch.ones(2, 6), torch.ones(4, 2), 2.0)
OFF = LoRA(torch.ones(1, 6), torch.tensor([[1.0], [torch.inf], [1], [1]]), 2.0)
NAN = LoRA(torch.ones(1, 6), torch.ones(4, 1), 2.0)
NAN.scaling = np.nan
META = deepcopy(LORA).to("meta")
EXPERTS = ExpertsLoRA({})
WRONG = {
    "an unknown name": (lambda p: p.switch(0, "z"), "no adapter 'z'; choose from a, b"),
    "removing an unknown name": (lambda p: p.remove("z"), "no adapter 'z'"),
    "no such row": (lambda p: p.switch(2, "a"), "row 2 is none of the 2 requests"),
    "removed in use": (
        lambda p: p.remove("a"),
        "uses adapter 'a'; switch it before removing",
    ),
    "evicted in use": (lambda p: p.evict("a"), "before evicting it"),
    "a taken name": (lambda p: p.add("a", {"0": LORA}), "remove it first"),
    "nothing": (lambda p: p.add("n", {}), "'n' is empty"),
    "another layer": (lambda p: p.add("n", {"9": LORA}), "9 is none of the layers"),
    "another shape": (lambda p: p.add("n", {"2": LORA}), r"2: A has shape \(2, 6\)"),
    "infinite": (lambda p: p.add("n", {"0": OFF}), "0: B is not finite"),
    "experts": (lambda p: p.add("n", {"0": EXPERTS}), "a ExpertsLoRA cannot be served"),
    "a share": (
        lambda p: p.switch(0, {"a": np.nan}),
        "the share of 'a' in request 0 is nan",
    ),
    "a share of text": (lambda p: p.switch(0, {"a": "x"}), "request 0 is 'x'; choose"),
    "a request of another kind": (lambda p: p.switch(0, 5), "request 0 is of type int"),
    "a row of text": (lambda p: p.switch("0", "a"), "row is '0'; choose a whole"),
    "a name that is a list": (lambda p: p.add(["l"], {"0": LORA}), "is of type list"),
    "an empty name": (lambda p: p.add("", {"0": LORA}), "give it a letter"),
    "a list of adapters": (lambda p: p.add("n", [1]), "adapters is of type list"),
    "a scaling of NaN": (lambda p: p.add("n", {"0": NAN}), "0: scaling is nan; choose"),
    "on meta": (lambda p: p.add("n", {"0": META}), "0: the adapter is on the meta"),
    "two methods": (lambda p: p.switch(1, {"a": 1, "ia3": 1}), "IA3 and LoRA in 0"),
    "too many": (lambda p: p.switch(1, "c"), "take 160 bytes and the budget is 80"),
    "served twice": (lambda p: p.serve(["a"]).__enter__(), "2 requests are served"),
    "merging": (lambda p: p.layers["0"].merge(), "there is no one weight"),
    "its weight": (lambda p: p.layers["0"].weight + 1, "there is no one weight"),
    "rows": (lambda p: p.layers["0"](torch.ones(3, 6)), r"\(3, 6\) and 2 requests"),
    "a vector": (lambda p: p.layers["0"](torch.ones(6)), r"shape \(6,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_in_a_sentence_and_changes_nothing(case, plainly):
    pool, _ = served()
    wrong, sentence = WRONG[case]
    with pool.serve(["a", None]):
        before = state(pool)
        with pytest.raises(InputError, match=sentence):
            wrong(pool)
        assert state(pool) == before


def test_a_vector_is_no_batch_of_as_many_requests_as_it_has_values():
    pool, _ = served()
    with pool.serve([None] * 6), pytest.raises(InputError, match=r"shape \(6,\) and 6"):
        pool.layers["0"](torch.ones(6))


@pytest.mark.parametrize("requests", ["a", [], (), None, {"a": 1}])
def test_a_list_of_requests_is_needed(requests, plainly):
    pool, _ = served()
    with (
        pytest.raises(InputError, match="give a list, one a row"),
        pool.serve(requests),
    ):
        pass


def test_what_cannot_become_a_pool_is_left_alone(plainly):
    model = nn.Sequential(nn.Linear(6, 4))
    for budget in (0, 1.5, "5", True, np.nan, np.inf):
        with pytest.raises(InputError, match=r"budget is .*; choose 1 or more"):
            Pool(model, budget=budget)
    with pytest.raises(InputError, match=r"targets is \[\], so no layer would be"):
        Pool(model, [])
    with pytest.raises(InputError, match="matches no layer"):
        Pool(model, ["q_proj"])
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("switched", [False, True])
def test_a_failure_in_the_second_layer_leaves_no_half_batch(monkeypatch, switched):
    pool, model = served()
    own = LoRA(torch.ones(1, 4), torch.ones(3, 1), 2.0)
    pool.add("d", {"0": LoRA(torch.ones(1, 6), torch.ones(4, 1), 2.0), "2": own})
    x, calls = torch.ones(2, 6), []

    def failing(updates):
        calls.append(updates)
        if len(calls) == 2:
            raise MemoryError
        return stack(updates)

    def fails(begin):
        before = state(pool)
        monkeypatch.setattr("minipeft.torch.lora_batched.stack", failing)
        with pytest.raises(MemoryError):
            begin()
        assert state(pool) == before

    pool.budget = None
    if not switched:
        fails(lambda: pool.serve(["d", None]).__enter__())
        assert model(torch.ones(5, 6)).shape == (5, 3)
        return
    with pool.serve(["a", None]):
        y = model(x)
        fails(lambda: pool.switch(1, "d"))
        assert torch.equal(model(x), y)


def test_a_model_that_was_unloaded_serves_no_more():
    pool, model = served()
    inject.unload(model)
    with (
        pytest.raises(InputError, match="no longer holds this pool's layers"),
        pool.serve(["a"]),
    ):
        pass


@pytest.mark.parametrize("name", ["a", "ia3"])
def test_a_batch_without_tokens_is_served(name):
    pool, model = served()
    with pool.serve([name, None]):
        assert model(torch.ones(2, 0, 6)).shape == (2, 0, 3)
