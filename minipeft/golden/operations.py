"""The table of operations: the name, arguments and outputs of each function.

A function receives every argument by name. Tensors arrive as NumPy arrays, `dtype` as a
NumPy dtype, `shape` as a tuple, the rest as plain numbers and words. A new row
needs an entry here, a file in `cases/`, and a file of functions in each driver. Schemas
and lists of functions are written from this table.
"""

from dataclasses import replace

from minipeft.golden import arguments as a
from minipeft.golden.arguments import Operation as Operation
from minipeft.golden.arguments import exact, integer, number, tensor, word
from minipeft.golden.operations_on_adapters import ON_ADAPTERS

_QUANTIZE = Operation(
    row="blockwise",
    tensors={"W": a.VALUES},
    parameters={"blocksize": a.BLOCKSIZE},
    outputs={"packed": exact(a.PACKED), "absmax": exact(a.ABSMAX)},
)
_DEQUANTIZE = Operation(
    row="blockwise",
    tensors={"packed": a.PACKED, "absmax": a.ABSMAX},
    parameters={"blocksize": a.BLOCKSIZE, "shape": a.SHAPE, "dtype": a.DTYPE},
    outputs={"W": exact(a.VALUES)},
)
_OF_ROWS: tuple[a.Named, a.Named] = ({"W": a.ROWS}, {})
_TO_ROWS = ({"dtype": a.DTYPE}, {"W": exact(a.ROWS)})
_MISS = {"W": a.W, "D": tensor("(r, out_features)", "What r inputs add, in turn.")}
OPERATIONS: dict[str, Operation] = {
    "codebook_table": Operation(
        row="codebook",
        tensors={},
        parameters={"name": word("The data type.", "nf4", "fp4", "nf3", "nf2")},
        outputs={"codebook": a.CODEBOOK},
    ),
    "codebook_normal_float": Operation(
        row="codebook",
        tensors={},
        parameters={
            "bits": integer("Width of a code; 2**bits values."),
            "offset": number("The outermost probability."),
        },
        outputs={"codebook": a.CODEBOOK},
    ),
    "codebook_dynamic_map": Operation(
        row="codebook",
        tensors={},
        parameters={"signed": a.boolean("Whether there are values of both signs.")},
        outputs={"codebook": a.CODEBOOK},
    ),
    "nf4_quantize": _QUANTIZE,
    "nf4_dequantize": _DEQUANTIZE,
    "fp4_quantize": _QUANTIZE,
    "fp4_dequantize": _DEQUANTIZE,
    "bof4_quantize": replace(_QUANTIZE, row="bof4"),
    "bof4_dequantize": replace(_DEQUANTIZE, row="bof4"),
    "mxfp4_quantize": Operation("microscaling", *_OF_ROWS, a.exactly(a.MXFP4)),
    "mxfp4_dequantize": Operation("microscaling", a.MXFP4, *_TO_ROWS),
    "nvfp4_quantize": Operation("microscaling", *_OF_ROWS, a.exactly(a.NVFP4)),
    "nvfp4_dequantize": Operation("microscaling", a.NVFP4, *_TO_ROWS),
    "linear_forward": Operation(
        row="linear",
        tensors={"x": a.X, "W": a.W, "bias": a.BIAS},
        parameters={},
        outputs={"y": a.Y},
    ),
    "linear_backward": Operation(
        row="linear",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, "W": a.W},
        parameters={},
        outputs={
            "grad_x": a.GRAD_X,
            "grad_W": tensor("(out_features, in_features)", "The gradient of W."),
            "grad_bias": tensor("(out_features,)", "The gradient of a bias."),
        },
    ),
    "lora_forward": Operation(
        row="lora",
        tensors={"x": a.X, **a.LORA, "bias": a.BIAS},
        parameters=a.LORA_SCALING,
        outputs={"y": a.Y},
    ),
    "lora_backward": Operation(
        row="lora",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **a.LORA},
        parameters=a.LORA_SCALING,
        outputs=a.LORA_GRADIENTS,
    ),
    "lora_merge": Operation(
        row="lora",
        tensors=a.LORA | {"W": a.WEIGHT},
        parameters=a.LORA_SCALING,
        outputs={"merged": a.MERGED_WEIGHT},
    ),
    **ON_ADAPTERS,
    "pissa_init": Operation(
        row="pissa",
        tensors={"W": a.W},
        parameters={"r": a.R, "alpha": a.ALPHA},
        outputs={"base": a.BASE, "delta": a.DELTA},
    ),
    "pissa_to_lora": Operation(
        row="pissa",
        tensors={
            "A": a.A,
            "B": a.B,
            "A_0": tensor("(r, in_features)", "A before training."),
            "B_0": tensor("(out_features, r)", "B before training."),
        },
        parameters={},
        outputs={
            "A": tensor("(2 r, in_features)", "A of plain LoRA on the old weight."),
            "B": tensor("(out_features, 2 r)", "B of plain LoRA on the old weight."),
        },
    ),
    "loftq_init": Operation(
        row="loftq",
        tensors={"W": a.W},
        parameters={
            "r": a.R,
            "alpha": a.ALPHA,
            "blocksize": a.BLOCKSIZE,
            "steps": integer("Alternations: quantize, then the best update."),
        },
        outputs={
            "packed": exact(a.PACKED),
            "absmax": a.ABSMAX,
            "delta": a.DELTA,
        },
    ),
    "attention_forward": Operation(
        row="attention", tensors=a.HEAD, parameters={}, outputs={"y": a.MIXED}
    ),
    "attention_backward": Operation(
        row="attention",
        tensors={
            "grad_y": tensor("(..., queries, d_v)", "The gradient of y."),
            **a.HEAD,
        },
        parameters={},
        outputs={
            "grad_Q": tensor("(..., queries, d)", "The gradient of Q."),
            "grad_K": tensor("(..., keys, d)", "The gradient of K."),
            "grad_V": tensor("(..., keys, d_v)", "The gradient of V."),
        },
    ),
    "prefix_forward": Operation(
        row="prefix",
        tensors={
            "Q": a.Q,
            "K": a.K,
            "V": a.V,
            "P_K": tensor("(p, d)", "The keys of the prefix."),
            "P_V": tensor("(p, d_v)", "The values of the prefix."),
            "mask": a.MASK,
        },
        parameters={},
        outputs={"y": a.MIXED},
    ),
    "prefix_expand": Operation(
        row="prefix",
        tensors={
            "P": tensor("(p, width)", "The embeddings of the virtual tokens."),
            "W_down": tensor("(hidden, width)", "The weight of the first layer."),
            "b_down": tensor("(hidden,)", "Its bias."),
            "W_up": tensor("(2 d, hidden)", "The weight of the second layer."),
            "b_up": tensor("(2 d,)", "Its bias."),
        },
        parameters={},
        outputs={
            "K": tensor("(p, d)", "The keys of the prefix."),
            "V": tensor("(p, d)", "The values of the prefix."),
        },
    ),
    "prompt_init": Operation(
        row="prompt",
        tensors={
            "E": tensor("(vocabulary, d)", "The table of embeddings."),
            "tokens": tensor("(p,)", "The tokens to start from.", "uint8"),
        },
        parameters={},
        outputs={"P": tensor("(p, d)", "The soft prompt.")},
    ),
    "prompt_forward": Operation(
        row="prompt",
        tensors={
            "X": tensor("(..., tokens, d)", "The embedded text."),
            "P": tensor("(p, d)", "The soft prompt."),
        },
        parameters={},
        outputs={"y": tensor("(..., p + tokens, d)", "Prompt and text.")},
    ),
    "prompt_backward": Operation(
        row="prompt",
        tensors={
            "grad_y": tensor("(..., p + tokens, d)", "The gradient of y."),
            "P": tensor("(p, d)", "The soft prompt."),
        },
        parameters={},
        outputs={
            "grad_X": tensor("(..., tokens, d)", "The gradient of the text."),
            "grad_P": tensor("(p, d)", "The gradient of the prompt."),
        },
    ),
    "dora_forward": Operation(
        row="dora",
        tensors={"x": a.X, **a.DORA, "bias": a.BIAS},
        parameters={"alpha": a.ALPHA},
        outputs={"y": a.Y},
    ),
    "dora_backward": Operation(
        row="dora",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **a.DORA},
        parameters={"alpha": a.ALPHA},
        outputs={
            **a.LORA_GRADIENTS,
            "grad_magnitude": tensor("(out_features,)", "The gradient of magnitude."),
        },
    ),
    "dora_merge": Operation(
        row="dora",
        tensors=a.DORA,
        parameters={"alpha": a.ALPHA},
        outputs={"merged": a.MERGED},
    ),
    "vera_projections": Operation(
        row="vera",
        tensors={},
        parameters={
            "seed": integer("0 to 2**32 - 1."),
            "r": a.R,
            "in_features": integer("Columns of A."),
            "out_features": integer("Rows of B."),
        },
        outputs={"A": a.A, "B": a.B},
    ),
    "vera_forward": Operation(
        row="vera",
        tensors={"x": a.X, **a.VERA, "bias": a.BIAS},
        parameters={},
        outputs={"y": a.Y},
    ),
    "vera_backward": Operation(
        row="vera",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **a.VERA},
        parameters={},
        outputs={
            "grad_x": a.GRAD_X,
            "grad_d": tensor("(r,)", "The gradient of d."),
            "grad_b": tensor("(out_features,)", "The gradient of b."),
        },
    ),
    "vera_merge": Operation(
        row="vera", tensors=a.VERA, parameters={}, outputs={"merged": a.MERGED}
    ),
    "ia3_forward": Operation(
        row="ia3",
        tensors={"x": a.X, **a.IA3, "bias": a.BIAS},
        parameters=a.SIDE_ONLY,
        outputs={"y": a.Y},
    ),
    "ia3_backward": Operation(
        row="ia3",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **a.IA3, "bias": a.BIAS},
        parameters=a.SIDE_ONLY,
        outputs={
            "grad_x": a.GRAD_X,
            "grad_l": tensor("(features of the side,)", "The gradient of l."),
        },
    ),
    "ia3_merge": Operation(
        row="ia3", tensors=a.IA3, parameters=a.SIDE_ONLY, outputs={"merged": a.MERGED}
    ),
    "hira_forward": Operation(
        row="hira",
        tensors={"x": a.X, **a.LORA, "bias": a.BIAS},
        parameters={"scaling": a.SCALING},
        outputs={"y": a.Y},
    ),
    "hira_backward": Operation(
        row="hira",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **a.LORA},
        parameters={"scaling": a.SCALING},
        outputs=a.LORA_GRADIENTS,
    ),
    "hira_merge": Operation(
        row="hira",
        tensors=a.LORA,
        parameters={"scaling": a.SCALING},
        outputs={"merged": a.MERGED},
    ),
    "miss_forward": Operation(
        row="miss",
        tensors={"x": a.X, **_MISS, "bias": a.BIAS},
        parameters={},
        outputs={"y": a.Y},
    ),
    "miss_backward": Operation(
        row="miss",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **_MISS},
        parameters={},
        outputs={"grad_x": a.GRAD_X, "grad_D": a.gradient("D", _MISS["D"])},
    ),
    "miss_merge": Operation(
        row="miss", tensors=_MISS, parameters={}, outputs={"merged": a.MERGED}
    ),
    "bottleneck_forward": Operation(
        row="bottleneck",
        tensors=a.BOTTLENECK,
        parameters={"scaling": a.SCALING},
        outputs={"y": tensor("(..., features)", "What the adapter adds.")},
    ),
    "bottleneck_backward": Operation(
        row="bottleneck",
        tensors={
            "grad_y": tensor("(..., features)", "The gradient of y."),
            **a.BOTTLENECK,
        },
        parameters={"scaling": a.SCALING},
        outputs={
            f"grad_{name}": a.gradient(name, argument)
            for name, argument in a.BOTTLENECK.items()
        },
    ),
    "double_quant_quantize": Operation(
        row="double_quant",
        tensors={"W": a.VALUES},
        parameters=a.NESTED_SIZES,
        # A mean in float32 has last bits of its own.
        outputs={
            **a.exactly(a.NESTED),
            "nested_absmax": a.NESTED["nested_absmax"],
            "offset": a.NESTED["offset"],
        },
    ),
    "double_quant_dequantize": Operation(
        row="double_quant",
        tensors=a.NESTED,
        parameters=a.NESTED_SIZES | {"shape": a.SHAPE, "dtype": a.DTYPE},
        outputs={"W": exact(a.VALUES)},
    ),
    "adamw_step": Operation(
        row="adamw",
        tensors=a.STEP | a.MOMENTS,
        parameters=a.ADAMW,
        outputs={"W": a.STEP["W"], **a.MOMENTS},
    ),
    "adamw8_step": Operation(
        row="adamw",
        tensors=a.STEP | a.CODED,
        parameters=a.ADAMW,
        outputs={"W": a.STEP["W"], **a.exactly(a.CODED)},
    ),
    "paged_trace": Operation(
        row="paged",
        tensors={
            "touched": tensor("(touches,)", "The pages, in order.", "uint8"),
            "written": tensor("(touches,)", "1 where it is changed.", "uint8"),
        },
        parameters={
            "pages": integer("How many pages there are, all on the host."),
            "budget": integer("How many fit on the device; at least 1."),
        },
        outputs=a.exactly(a.TRACE),
    ),
    "qlora_forward": Operation(
        row="qlora",
        tensors={"x": a.X, **a.QLORA, "bias": a.BIAS},
        parameters=a.QLORA_SIZES,
        outputs={"y": a.Y},
    ),
    "qlora_backward": Operation(
        row="qlora",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, **a.QLORA},
        parameters=a.QLORA_SIZES,
        outputs=a.LORA_GRADIENTS,
    ),
    "qlora_requantize": Operation(
        row="qlora",
        tensors=a.QLORA,
        parameters=a.QLORA_SIZES,
        outputs={"packed": exact(a.PACKED), "absmax": exact(a.ABSMAX)},
    ),
}
