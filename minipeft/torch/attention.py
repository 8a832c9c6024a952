"""One head of attention, to which prefix tuning adds keys and values."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minipeft.errors import InputError
from minipeft.shapes import Bool, Inexact
from minipeft.torch.operands import check_tensor, check_tensors
from minipeft.values import check_integer, check_kind

Queries = Inexact[Tensor, "*batch queries d"]
Keys = Inexact[Tensor, "*batch keys d"]
Values = Inexact[Tensor, "*batch keys d_v"]
Mixed = Inexact[Tensor, "*batch queries d_v"]
Shares = Inexact[Tensor, "*batch queries keys"]
Mask = Bool[Tensor, "... queries keys"]


@dataclass(frozen=True)
class Head:
    """The inputs of one head: queries, keys, values, and a mask.

    The mask is checked here, once. A check in each pass would make the host wait for
    the device.

    Raises:
        InputError: if a part is no tensor of floats, or the mask is not boolean or
            hides all keys from a query.
    """

    Q: Queries
    K: Keys
    V: Values
    mask: Mask | None = None  # True: the query may use the key

    def __post_init__(self) -> None:
        for name in ("Q", "K", "V"):
            check_tensor(name, getattr(self, name))
        if self.mask is not None:
            _check_mask(self.mask)


def causal(queries: int, keys: int) -> Mask:
    """Return the mask of a text read from left to right, on the default device.

    Raises:
        InputError: if there are fewer keys than queries.
    """
    check_integer("queries", queries, 0)
    check_integer("keys", keys, 0)
    if keys < queries:
        raise InputError(
            f"{queries} queries and {keys} keys; every query needs its key."
        )
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def weights(head: Head) -> Shares:
    r"""Return $P = softmax(Q K^T / \sqrt d)$, as `reference.attention.weights` does.

    Raises:
        InputError: if the shapes of the parts contradict each other.
    """
    check_fits(head)
    logits = head.Q @ head.K.transpose(-1, -2) / sqrt(head.Q.shape[-1])
    if head.mask is not None:
        logits = logits.masked_fill(~head.mask, -torch.inf)
    return logits.softmax(dim=-1)


def forward(head: Head) -> Mixed:
    """Return the mixed values $Y = P V$; a fused kernel of torch does not store P.

    Raises:
        InputError: if the shapes of the parts contradict each other.
    """
    check_fits(head)
    return scaled_dot_product_attention(head.Q, head.K, head.V, head.mask)


def check_fits(head: Head) -> None:
    """Refuse parts of different heads by their shapes; no value is read."""
    check_kind("head", head, Head)
    check_tensors(
        {
            "Q": (head.Q, "... queries d"),
            "K": (head.K, "... keys d"),
            "V": (head.V, "... keys d_v"),
        }
    )
    queries, keys, mask = head.Q.shape[-2], head.K.shape[-2], head.mask
    if mask is not None:
        _check_booleans(mask)
    if not keys:
        raise InputError("there are 0 keys; give every query at least one.")
    fitting = (queries, keys), (*head.Q.shape[:-1], keys)
    if mask is not None and mask.shape not in fitting:
        raise InputError(
            f"the mask has shape {tuple(mask.shape)}; these queries and keys need "
            f"({queries}, {keys}), or one such mask for each text."
        )


def _check_booleans(mask: Mask) -> None:
    check_kind("the mask", mask, Tensor)
    if mask.dtype != torch.bool:
        raise InputError(
            f"the mask has dtype {mask.dtype}; give booleans, True where a query may "
            "look at a key."
        )


def _check_mask(mask: Mask) -> None:
    _check_booleans(mask)
    blind = torch.nonzero(~mask.any(dim=-1))
    if len(blind):
        raise InputError(
            f"query {int(blind[0, -1])} may look at no key; give every row of the "
            "mask a True."
        )
