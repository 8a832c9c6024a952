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

_ADAMW = ("t", "lr", "beta1", "beta2", "eps", "weight_decay")

OPERATIONS: dict[str, Operation] = {
    "codebook_table": Operation(
        row="codebook",
        tensors=(),
        parameters=("name",),
        outputs=("codebook",),
        schema="codebook_table.json",
    ),
    "codebook_normal_float": Operation(
        row="codebook",
        tensors=(),
        parameters=("bits", "offset"),
        outputs=("codebook",),
        schema="codebook_normal_float.json",
    ),
    "codebook_dynamic_map": Operation(
        row="codebook",
        tensors=(),
        parameters=("signed",),
        outputs=("codebook",),
        schema="codebook_dynamic_map.json",
    ),
    "nf4_quantize": _QUANTIZE,
    "nf4_dequantize": _DEQUANTIZE,
    "fp4_quantize": _QUANTIZE,
    "fp4_dequantize": _DEQUANTIZE,
    "linear_forward": Operation(
        row="linear",
        tensors=("x", "W", "bias"),
        parameters=(),
        outputs=("y",),
        schema="linear_forward.json",
        optional=("bias",),
    ),
    "linear_backward": Operation(
        row="linear",
        tensors=("grad_y", "x", "W"),
        parameters=(),
        outputs=("grad_x", "grad_W", "grad_bias"),
        schema="linear_backward.json",
    ),
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
    "pissa_init": Operation(
        row="pissa",
        tensors=("W",),
        parameters=("r", "alpha"),
        outputs=("base", "delta"),
        schema="pissa_init.json",
    ),
    "pissa_to_lora": Operation(
        row="pissa",
        tensors=("A", "B", "A_0", "B_0"),
        parameters=(),
        outputs=("A", "B"),
        schema="pissa_to_lora.json",
    ),
    "loftq_init": Operation(
        row="loftq",
        tensors=("W",),
        parameters=("r", "alpha", "blocksize", "steps"),
        outputs=("packed", "absmax", "delta"),
        schema="loftq_init.json",
    ),
    "attention_forward": Operation(
        row="attention",
        tensors=("Q", "K", "V", "mask"),
        parameters=(),
        outputs=("y",),
        schema="attention_forward.json",
        optional=("mask",),
    ),
    "attention_backward": Operation(
        row="attention",
        tensors=("grad_y", "Q", "K", "V", "mask"),
        parameters=(),
        outputs=("grad_Q", "grad_K", "grad_V"),
        schema="attention_backward.json",
        optional=("mask",),
    ),
    "prefix_forward": Operation(
        row="prefix",
        tensors=("Q", "K", "V", "P_K", "P_V", "mask"),
        parameters=(),
        outputs=("y",),
        schema="prefix_forward.json",
        optional=("mask",),
    ),
    "prefix_expand": Operation(
        row="prefix",
        tensors=("P", "W_down", "b_down", "W_up", "b_up"),
        parameters=(),
        outputs=("K", "V"),
        schema="prefix_expand.json",
    ),
    "prompt_init": Operation(
        row="prompt",
        tensors=("E", "tokens"),
        parameters=(),
        outputs=("P",),
        schema="prompt_init.json",
    ),
    "prompt_forward": Operation(
        row="prompt",
        tensors=("X", "P"),
        parameters=(),
        outputs=("y",),
        schema="prompt_forward.json",
    ),
    "prompt_backward": Operation(
        row="prompt",
        tensors=("grad_y", "P"),
        parameters=(),
        outputs=("grad_X", "grad_P"),
        schema="prompt_backward.json",
    ),
    "dora_forward": Operation(
        row="dora",
        tensors=("x", "W", "A", "B", "magnitude", "bias"),
        parameters=("alpha",),
        outputs=("y",),
        schema="dora_forward.json",
        optional=("bias",),
    ),
    "dora_backward": Operation(
        row="dora",
        tensors=("grad_y", "x", "W", "A", "B", "magnitude"),
        parameters=("alpha",),
        outputs=("grad_x", "grad_A", "grad_B", "grad_magnitude"),
        schema="dora_backward.json",
    ),
    "dora_merge": Operation(
        row="dora",
        tensors=("W", "A", "B", "magnitude"),
        parameters=("alpha",),
        outputs=("merged",),
        schema="dora_merge.json",
    ),
    "vera_projections": Operation(
        row="vera",
        tensors=(),
        parameters=("seed", "r", "in_features", "out_features"),
        outputs=("A", "B"),
        schema="vera_projections.json",
    ),
    "vera_forward": Operation(
        row="vera",
        tensors=("x", "W", "A", "B", "d", "b", "bias"),
        parameters=(),
        outputs=("y",),
        schema="vera_forward.json",
        optional=("bias",),
    ),
    "vera_backward": Operation(
        row="vera",
        tensors=("grad_y", "x", "W", "A", "B", "d", "b"),
        parameters=(),
        outputs=("grad_x", "grad_d", "grad_b"),
        schema="vera_backward.json",
    ),
    "vera_merge": Operation(
        row="vera",
        tensors=("W", "A", "B", "d", "b"),
        parameters=(),
        outputs=("merged",),
        schema="vera_merge.json",
    ),
    "ia3_forward": Operation(
        row="ia3",
        tensors=("x", "W", "l", "bias"),
        parameters=("feedforward",),
        outputs=("y",),
        schema="ia3_forward.json",
        optional=("bias",),
    ),
    "ia3_backward": Operation(
        row="ia3",
        tensors=("grad_y", "x", "W", "l", "bias"),
        parameters=("feedforward",),
        outputs=("grad_x", "grad_l"),
        schema="ia3_backward.json",
        optional=("bias",),
    ),
    "ia3_merge": Operation(
        row="ia3",
        tensors=("W", "l"),
        parameters=("feedforward",),
        outputs=("merged",),
        schema="ia3_merge.json",
    ),
    "bottleneck_forward": Operation(
        row="bottleneck",
        tensors=("x", "down", "down_bias", "up", "up_bias"),
        parameters=("scaling",),
        outputs=("y",),
        schema="bottleneck_forward.json",
    ),
    "bottleneck_backward": Operation(
        row="bottleneck",
        tensors=("grad_y", "x", "down", "down_bias", "up", "up_bias"),
        parameters=("scaling",),
        outputs=("grad_x", "grad_down", "grad_down_bias", "grad_up", "grad_up_bias"),
        schema="bottleneck_backward.json",
    ),
    "double_quant_quantize": Operation(
        row="double_quant",
        tensors=("W",),
        parameters=("blocksize", "nested_blocksize"),
        outputs=("packed", "absmax_codes", "nested_absmax", "offset"),
        schema="double_quant_quantize.json",
    ),
    "double_quant_dequantize": Operation(
        row="double_quant",
        tensors=("packed", "absmax_codes", "nested_absmax", "offset"),
        parameters=("blocksize", "nested_blocksize", "shape", "dtype"),
        outputs=("W",),
        schema="double_quant_dequantize.json",
    ),
    "adamw_step": Operation(
        row="adamw",
        tensors=("W", "grad", "m", "v"),
        parameters=_ADAMW,
        outputs=("W", "m", "v"),
        schema="adamw_step.json",
    ),
    "adamw8_step": Operation(
        row="adamw",
        tensors=("W", "grad", "m_codes", "m_absmax", "v_codes", "v_absmax"),
        parameters=_ADAMW,
        outputs=("W", "m_codes", "m_absmax", "v_codes", "v_absmax"),
        schema="adamw8_step.json",
    ),
    "paged_trace": Operation(
        row="paged",
        tensors=("touched", "written"),
        parameters=("pages", "budget"),
        outputs=("faulted", "left", "written_back", "resident"),
        schema="paged_trace.json",
    ),
    "qlora_forward": Operation(
        row="qlora",
        tensors=("x", "packed", "absmax", "A", "B", "bias"),
        parameters=("alpha", "blocksize"),
        outputs=("y",),
        schema="qlora_forward.json",
        optional=("bias",),
    ),
    "qlora_backward": Operation(
        row="qlora",
        tensors=("grad_y", "x", "packed", "absmax", "A", "B"),
        parameters=("alpha", "blocksize"),
        outputs=("grad_x", "grad_A", "grad_B"),
        schema="qlora_backward.json",
    ),
    "qlora_requantize": Operation(
        row="qlora",
        tensors=("packed", "absmax", "A", "B"),
        parameters=("alpha", "blocksize"),
        outputs=("packed", "absmax"),
        schema="qlora_requantize.json",
    ),
}
