"""How far the result of a whole model may be off in float32, by each of its operations.

Under `Recorded`, each operation on floats is noted with a bound of the error that it
adds if its operands are exact. The slopes of the result at the outputs of the
operations carry these errors to the result, to first order. An operation that has no
rule here stops the run, so none is left out.
"""

import torch
from torch.overrides import TorchFunctionMode

from tests.tolerance import gamma

# NumPy's, torch's and llama.cpp's exp err by less than 3 last bits, which are 6
# roundings; their logarithms, sines and cosines by less than 2 last bits.
EXP, LOG = 6, 4


def linear(y, x, weight, bias=None):
    """Bound a sum of as many products as x has columns; there is no bias here."""
    assert bias is None
    return gamma(x.shape[-1]) * (x.abs() @ weight.abs().mT)


def matmul(y, a, b):
    return gamma(a.shape[-1]) * (a.abs() @ b.abs())


def mean(y, x, dim, keepdim):
    """Bound the sum of n terms and its division by n."""
    return gamma(x.shape[dim]) * x.abs().mean(dim, keepdim)


def shift(x):
    """Return what the subtraction of the maximum adds to an exponent."""
    distance = x.amax(-1, keepdim=True) - x
    return torch.where(x.softmax(-1) > 0, gamma(1) * distance, 0.0)


def softmax(y, x, dim, dtype=None, _stacklevel=3):
    """Bound e_j / (e_1 + … + e_n) where e_j is exp(x_j - max).

    An error of the exponent is a relative error of e_j, and its mean one of the sum.
    The rest: exp above and below, n - 1 additions, 1 / sum, and a product.
    """
    assert dim == -1
    off = shift(x)
    relative = off + (y * off).sum(-1, keepdim=True)
    return y * (relative + gamma(2 * EXP + x.shape[-1] - 1 + 2))


def log_softmax(y, x, dim):
    """Bound the logarithm of a softmax, computed after it or as a difference.

    A relative error of the softmax is an absolute error of its logarithm. The logarithm
    itself is off by a part of its value, or of the value of log(e_1 + … + e_n), which
    is at most log(n), less than 8 for fewer than 2981 terms. A difference rounds once.
    """
    assert dim == -1
    assert x.shape[-1] < 2981
    off = shift(x)
    exponents = off + (y.exp() * off).sum(-1, keepdim=True)
    return exponents + gamma(2 * EXP + x.shape[-1] + 1) + gamma(LOG + 1) * (y.abs() + 8)


def of_value(roundings):
    """Bound an operation that errs by so many roundings of its value."""
    return lambda y, *operands, **settings: gamma(roundings) * y.abs()


def added(y, *operands):
    """Bound a sum; a number of Python is rounded to float32 first."""
    numbers = sum(abs(n) for n in operands if not isinstance(n, torch.Tensor))
    return gamma(1) * (y.abs() + numbers)


def multiplied(y, *operands):
    numbers = sum(not isinstance(n, torch.Tensor) for n in operands)
    return gamma(1 + numbers) * y.abs()


def squared(y, x, exponent):
    assert exponent == 2
    return gamma(1) * y


ROUNDED = {
    "add": added,
    "mul": multiplied,
    "pow": squared,
    "rsqrt": of_value(2),  # a root and a quotient
    "silu": of_value(EXP + 2),  # x / (1 + exp(-x))
    "linear": linear,
    "matmul": matmul,
    "mean": mean,
    "softmax": softmax,
    "log_softmax": log_softmax,
}
# These copy values, or change signs.
EXACT = {
    *("cat", "contiguous", "dropout", "embedding", "expand", "float", "neg", "reshape"),
    *(
        "requires_grad",
        "to",
        "transpose",
        "unsqueeze",
        "view",
        "getitem",
        "detach",
        "clone",
        "get",
    ),
}


class Recorded(TorchFunctionMode):
    """Notes each operation's output, and the bound of the error that it adds."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.__name__.removeprefix("__r").strip("_")  # __rmul__ is mul
        floats = isinstance(found, torch.Tensor) and found.is_floating_point()
        if floats and torch.is_grad_enabled() and found.requires_grad:
            if name in ROUNDED:
                self.note(found, ROUNDED[name](found, *args, **(kwargs or {})))
            else:
                assert name in EXACT, f"no rule for {function}"
        return found

    def note(self, output, bound, together=False):
        """Count an error of at most `bound` at this output.

        Errors that come `together` have one cause, so that their signs may agree.
        """
        self.places.append((output, bound.detach(), together))

    def carried(self, result):
        """Return how far errors that come together move one number of the result.

        And the sum of the squares of how far each other error moves it.
        """
        outputs = [output for output, *_ in self.places]
        slopes = torch.autograd.grad(result, outputs, retain_graph=True)
        linear, squares = 0.0, 0.0
        for slope, (_, bound, together) in zip(slopes, self.places, strict=True):
            moves = (slope.abs() * bound).double()
            linear += float(moves.sum()) if together else 0.0
            squares += 0.0 if together else float(moves.square().sum())
        return linear, squares
