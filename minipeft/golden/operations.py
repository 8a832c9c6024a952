"""The table of operations: what a function is called, what it takes and returns.

A function receives every argument by name. Tensors arrive as NumPy arrays, `dtype` as a
NumPy dtype, `shape` as a tuple, the rest as plain numbers. Another row is another entry
here, a file in `cases/`, a schema, and a file of functions in each driver.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One function of an implementation, and the file of vectors that checks it."""

    row: str  # the file in cases/ and in every driver
    tensors: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    schema: str
    optional: tuple[str, ...] = ()  # tensors that a case may leave out

    def signature(self, name: str) -> str:
        """Return the call as one would write it."""
        required = [t for t in self.tensors if t not in self.optional]
        absent = [f"{t}=None" for t in self.optional]
        arguments = ", ".join([*required, *self.parameters, *absent])
        return f"{name}({arguments}) -> {', '.join(self.outputs)}"


_QUANTIZE = Operation(
    row="blockwise",
    tensors=("W",),
    parameters=("blocksize",),
    outputs=("packed", "absmax"),
    schema="blockwise_quantize.json",
)

_DEQUANTIZE = Operation(
    row="blockwise",
    tensors=("packed", "absmax"),
    parameters=("blocksize", "shape", "dtype"),
    outputs=("W",),
    schema="blockwise_dequantize.json",
)

OPERATIONS: dict[str, Operation] = {
    "nf4_quantize": _QUANTIZE,
    "nf4_dequantize": _DEQUANTIZE,
    "fp4_quantize": _QUANTIZE,
    "fp4_dequantize": _DEQUANTIZE,
    "lora_forward": Operation(
        row="lora",
        tensors=("x", "W", "A", "B", "bias"),
        parameters=("alpha", "rank_stabilized"),
        outputs=("y",),
        schema="lora_forward.json",
        optional=("bias",),
    ),
    "lora_backward": Operation(
        row="lora",
        tensors=("grad_y", "x", "W", "A", "B"),
        parameters=("alpha", "rank_stabilized"),
        outputs=("grad_x", "grad_A", "grad_B"),
        schema="lora_backward.json",
    ),
    "lora_merge": Operation(
        row="lora",
        tensors=("W", "A", "B"),
        parameters=("alpha", "rank_stabilized"),
        outputs=("merged",),
        schema="lora_merge.json",
    ),
}
