"""Train as on a card of a stated size: a step that needs more does not survive."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.memory_peak import held, watched
from minipeft.torch.paged import PagedAdamW


class Card:
    """A device of a stated size, to be entered; more ends in `OutOfMemoryError`.

    On a CPU the bytes are counted: what is kept, and the peak of torch's allocator. On
    CUDA the size is a limit for torch itself, which then raises the same error; what it
    has reserved counts there, and not only what is in use.

    Args:
        size: bytes.
        device: `cpu` or `cuda`.

    Raises:
        InputError: the size is no positive number.
        OutOfMemoryError: on entering, on CUDA: more is taken already.
    """

    def __init__(self, size: float, device: str = "cpu") -> None:
        if not size > 0:
            raise InputError(f"the card has {size:g} bytes; give a positive number")
        self.size, self.device = size, device

    def __enter__(self) -> "Card":
        if self.device.startswith("cuda"):
            clear(self.device)  # what an earlier run left would count
            taken = torch.cuda.memory_reserved(self.device)
            if taken > self.size:
                raise torch.OutOfMemoryError(
                    f"out of memory: {taken:,} bytes are taken before the first step "
                    f"and the card has {self.size:,.0f}"
                )
            _, total = torch.cuda.mem_get_info(self.device)
            # torch takes whole bytes of the product, which may be one too few
            part = (self.size + 0.5) / total
            self._limit(min(1.0, part))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.startswith("cuda"):
            self._limit(1.0)

    def _limit(self, part: float) -> None:
        at = torch.device(self.device).index  # None: of the current device
        torch.cuda.set_per_process_memory_fraction(part, at)

    @contextmanager
    def takes(self, kept: int) -> Iterator[list[int]]:
        """Note the most bytes that are in use inside.

        Args:
            kept: bytes that are in use before.

        Yields:
            a list that holds the bytes, once the block is left.

        Raises:
            OutOfMemoryError: they are more than the card has.
        """
        with watched(self.device) as found:
            yield found
        found[0] += kept
        if not self.device.startswith("cuda") and found[0] > self.size:
            raise torch.OutOfMemoryError(
                f"out of memory: {found[0]:,} bytes were needed and the card has "
                f"{self.size:,.0f}"
            )


def clear(device: str) -> None:
    """Give back to a CUDA device what is unused; on others nothing is kept."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def on_device(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of a model, its gradients, and the states that lie beside it.

    Of a paged optimizer these are the pages that have been brought; the others are on
    the host.
    """
    found = (p.grad for p in model.parameters())
    gradients = sum(grad.nbytes for grad in found if grad is not None)
    if isinstance(optimizer, PagedAdamW):
        pages = sum(page.nbytes for page in optimizer.table.resident)
        return held(model) + gradients + pages
    return held(model, optimizer) + gradients


def demand(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> int:
    """Return the most bytes of a forward and backward pass, without an optimizer.

    Args:
        model: with what trains; its gradients are dropped.
        batch: on the device of the model.
        device: `cpu` or `cuda`.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what is reserved counts there
    for _ in range(2):  # the first call makes what is made once
        with watched(device) as found:
            torch.autograd.backward(model(**batch).loss)
        model.zero_grad(set_to_none=True)
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    return held(model) + found[0]
