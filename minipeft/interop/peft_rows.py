"""Two adapters in files of peft that no paper describes.

A bias that is trained with LoRA's B, and rows of an embedding table that are trained
while all others stay.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Float, Integer
from minipeft.torch.adapted import Adapted, mixed
from minipeft.torch.linear import (
    Bias,
    Form,
    Lookup,
    Output,
    Product,
    Weight,
    check_shape,
)
from minipeft.torch.lora import LoRA, LoRALinear, check_fits


class BiasedLoRA(LoRA):
    """LoRA whose B has a bias: the output gets $s (B A x + c)$.

    Args:
        update: LoRA; its A and B become this adapter's.
        c: of the outputs.
    """

    c: Float[Tensor, " out_features"]

    def __init__(self, update: LoRA, c: Float[Tensor, " out_features"]):
        A, B = update.A.detach(), update.B.detach()
        super().__init__(A, B, update.scaling, update.dropout)
        self.c = nn.Parameter(c)

    def forward(self, product: Product) -> Output:  # type: ignore[override]
        """Return the change of the output."""
        return super().forward(product) + self.scaling * self.c


class BiasedLoRALinear(LoRALinear):
    """A frozen layer, its updates, and their changes of the bias."""

    @staticmethod
    def check_fits(form: Form, adapter: Any) -> None:
        """Refuse parts of another layer; torch would broadcast a single number."""
        check_fits(form, adapter)
        check_shape("the bias of B", adapter.c, form.out_features)

    def add(self, name: str, adapter: LoRA) -> None:
        """Hold another adapter, inactive at first.

        Raises:
            InputError: the layer has no bias that the sum could be merged into.
        """
        if getattr(self.base, "bias", None) is None:
            raise InputError(
                "the adapter adds to a bias, and the layer has none; give the base "
                "that it was trained on"
            )
        super().add(name, adapter)

    def adapt_bias(self, bias: Bias) -> Bias:
        """Return the bias that belongs to the merged weight."""
        total = bias
        for share, adapter in self.shares():
            total = total + share * adapter.scaling * cast(BiasedLoRA, adapter).c
        return total.to(bias.dtype)


class TokenRows(nn.Module):
    """Trained rows of an embedding table.

    Args:
        rows: the embeddings of the tokens.
        tokens: the number of each row in the table, none twice.
    """

    rows: Float[Tensor, "n d"]
    tokens: Integer[Tensor, " n"]

    def __init__(self, rows: Float[Tensor, "n d"], tokens: Integer[Tensor, " n"]):
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("tokens", tokens)

    def forward(self, product: Product) -> Output:
        """Return the output, with trained rows in place of those of the table."""
        place = self.tokens.new_full((product.form.in_features,), -1)
        place[self.tokens] = torch.arange(len(self.tokens), device=place.device)
        at = place[product.x]
        new = self.rows[at.clamp(min=0)]
        return torch.where((at >= 0)[..., None], new, product.y)


class TokenRowsEmbedding(Adapted[TokenRows]):
    """An embedding of which some rows are trained."""

    @staticmethod
    def check_fits(form: Form, adapter: TokenRows) -> None:
        """Refuse rows of another table, and tokens that it does not have."""
        tokens = adapter.tokens
        check_shape("the trained rows", adapter.rows, len(tokens), form.out_features)
        outside = tokens[(tokens < 0) | (tokens >= form.in_features)]
        if len(outside) or len({*tokens.tolist()}) < len(tokens):
            strange = f"{int(outside[0])}" if len(outside) else "one of them twice"
            raise InputError(
                f"the trained rows are those of tokens 0 to {form.in_features - 1}, "
                f"each once, and not {strange}; give the base that they were trained on"
            )

    def add(self, name: str, adapter: TokenRows) -> None:
        """Hold other rows, inactive at first.

        Raises:
            InputError: the layer is no embedding.
        """
        if not isinstance(self.view, Lookup):
            raise InputError("only rows of an embedding can be trained; train LoRA")
        super().add(name, adapter)

    def adapt(self, product: Product) -> Output:
        """Return the rows of the table, or those that were trained."""
        y = mixed(product.y, self.shares(), lambda adapter: adapter(product))
        return y.to(product.y.dtype)

    def adapt_weight(self, W: Weight) -> Weight:
        """Return the table with the trained rows."""
        return mixed(W, self.shares(), lambda adapter: _table(adapter, W))

    def change(self, adapter: TokenRows, W: Weight) -> Weight:
        """Return the difference between trained rows and the table's rows."""
        return _table(adapter, W) - W


def _table(adapter: TokenRows, W: Weight) -> Weight:
    wide = torch.promote_types(W.dtype, adapter.rows.dtype)
    return W.to(wide).index_copy(1, adapter.tokens, adapter.rows.T.to(wide))
