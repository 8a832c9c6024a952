"""The rows that have kernels: their cases and their planted mistakes.

A new row adds one line here, beside its .cu file and its entries in the table.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tests.cuda import (
    adamw_cases,
    blockwise_cases,
    double_quant_cases,
    paged_cases,
    product_cases,
)
from tests.cuda.mutation import Mutation


@dataclass(frozen=True)
class CheckedRow:
    """A row, as the checks use it.

    Args:
        small: a few launches in some dtypes, compared with the reference.
        mutations: mistakes that `small` must find.
    """

    small: Callable[[Collection[str]], None]
    mutations: tuple[Mutation, ...]


ROWS = {
    "blockwise": CheckedRow(blockwise_cases.small, blockwise_cases.MUTATIONS),
    "double_quant": CheckedRow(double_quant_cases.small, double_quant_cases.MUTATIONS),
    "adamw": CheckedRow(adamw_cases.small, adamw_cases.MUTATIONS),
    "paged": CheckedRow(paged_cases.small, paged_cases.MUTATIONS),
    "lora_batched": CheckedRow(
        product_cases.lora_batched_small, product_cases.LORA_BATCHED_MUTATIONS
    ),
    "qlora": CheckedRow(product_cases.qlora_small, product_cases.QLORA_MUTATIONS),
    "dora": CheckedRow(product_cases.dora_small, product_cases.DORA_MUTATIONS),
}
