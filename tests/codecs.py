"""All codecs, in the form in which the laws of their kind use them."""

from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
from hypothesis import strategies as st

from minipeft.reference import blockwise, codebook, double_quant

CODEBOOKS = {
    "NF4": codebook.NF4,
    "FP4": codebook.FP4,
    "NF3": codebook.NF3,
    "NF2": codebook.NF2,
    "one bit": np.array([1, -1], np.float32),
    "normal, five bits": codebook.normal_float(5),
    "dynamic": codebook.dynamic_map(),
}
codebooks = st.sampled_from(list(CODEBOOKS.values()))


@dataclass(frozen=True)
class Codec:
    """One codec: the names of its codes and of its scales."""

    module: ModuleType
    codes: tuple[str, ...]
    scales: tuple[str, ...]
    sizes: int = 1  # the number of block sizes in its arguments

    @property
    def name(self):
        return self.module.__name__.split(".")[-1]

    @property
    def parts(self):
        return (*self.codes, *self.scales)

    def quantize(self, W, values=codebook.NF4, sizes=(8, 2)):
        return self.module.quantize(W, values, *sizes[: self.sizes])

    def spoilt(self):
        """Yield quantized tensors in which one part is too short or too long."""
        q = self.quantize(np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8))
        for name in self.parts:
            part = np.asarray(getattr(q, name))
            for size in (part.size - 1, part.size + 1) if part.ndim else ():
                yield replace(q, **{name: np.resize(part, size)}), part.size


CODECS = (
    Codec(blockwise, ("packed",), ("absmax",)),
    Codec(
        double_quant, ("packed", "absmax_codes"), ("nested_absmax", "offset"), sizes=2
    ),
)
