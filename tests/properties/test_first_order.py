"""The bound of a model's roundings holds, for each operation and for all together."""

import pytest
import torch
from torch.nn import functional

from tests.agreement.llama import TEXT, llama, logit_bound
from tests.first_order import ROUNDED, Recorded
from tests.tolerance import assert_within

OPERATIONS = {
    "add": lambda x, W: x + W,
    "mul": lambda x, W: 1 / 3 * x,
    "pow": lambda x, W: x.pow(2),
    "rsqrt": lambda x, W: x.rsqrt(),
    "silu": lambda x, W: functional.silu(x.neg()),
    "linear": lambda x, W: functional.linear(x, W),
    "matmul": lambda x, W: x @ W.mT,
    "mean": lambda x, W: x.mean(-1, keepdim=True),
    "softmax": lambda x, W: functional.softmax(x, dim=-1),
    "log_softmax": lambda x, W: x.log_softmax(-1),
}


def operands(seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(40, 40, generator=draw) * 85 + 2**-9
    return x.requires_grad_(), torch.randn(40, 40, generator=draw)


@pytest.mark.parametrize("name", ROUNDED)
def test_an_operation_errs_by_no_more_than_its_rule_says(name):
    for seed in range(5):
        x, W = operands(seed)
        with Recorded() as record:
            y = OPERATIONS[name](x, W)
        output, bound, _ = record.places[-1]
        assert output is y
        exact = OPERATIONS[name](x.double(), W.double()).detach()
        assert_within(y.detach(), exact, bound.double().numpy())
        assert bound.min() >= 0
        assert not torch.equal(y.double(), exact)


def network(x, W):
    y = functional.linear(x, W)
    y = functional.silu(y * (y.pow(2).mean(-1, keepdim=True) + 1).rsqrt())
    shares = functional.softmax(y @ x.mT, dim=-1)
    return (shares @ y + x).log_softmax(-1)


def test_the_errors_of_all_operations_are_carried_to_the_result():
    x, W = operands(0)
    with Recorded() as record:
        y = network(x, W)
    assert len(record.places) == 12
    off = (y.double() - network(x.double(), W.double())).abs()
    for i in range(40):
        together, squares = record.carried(y[i, i])
        assert together == 0
        # All errors at their worst are at most this many times the root of the squares.
        count = sum(output.numel() for output, *_ in record.places)
        assert 0 < float(off[i, i].detach()) <= (count * squares) ** 0.5


def test_the_bound_of_a_llama_s_logits_is_about_that_of_all_its_operations():
    model = llama()
    model.set_attn_implementation("eager")
    model.get_input_embeddings().weight.requires_grad_(True)
    with Recorded() as record:
        logits = model(TEXT).logits
    outputs, bounds, _ = zip(*record.places, strict=True)
    last = logits[:, -1].flatten()
    every = torch.autograd.grad(
        last, outputs, torch.eye(len(last)), is_grads_batched=True
    )
    pairs = zip(every, bounds, strict=True)
    worst = sum((slope.abs() * bound).flatten(1).sum(1) for slope, bound in pairs)
    both = 2 * worst.reshape(2, -1).amax(0).double().numpy()
    found = logit_bound(model, logits)
    assert (both < found).all()
    assert (found < 3 * both).all()


def test_an_operation_without_a_rule_stops_the_run():
    x, _ = operands(0)
    with pytest.raises(AssertionError, match=r"no rule for .*sigmoid"), Recorded():
        x.sigmoid()
