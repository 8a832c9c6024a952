"""The operations on several adapters, tied layers, files of adapters, and experts."""

from minipeft.golden import arguments as a
from minipeft.golden.arguments import Operation, number, tensor, word

ON_ADAPTERS: dict[str, Operation] = {
    "lora_weighted_sum": Operation(
        row="lora",
        tensors={"A": a.A, "B": a.B, "other_A": a.OTHER_A, "other_B": a.OTHER_B},
        parameters={
            "alpha": a.ALPHA,
            "other_alpha": number("The same of the other adapter, over its own rank."),
            "weight": number("What the update is multiplied by; it may be negative."),
            "other_weight": number("The same of the other adapter."),
        },
        outputs={"delta": tensor("(out_features, in_features)", "The sum of both.")},
    ),
    "lora_merge_tied": Operation(
        row="lora",
        tensors={
            "E": a.TABLE,
            "A": tensor("(r, features)", "The matrix of r rows."),
            "B": tensor("(tokens, r)", "The matrix of r columns."),
        },
        parameters={
            "alpha": a.ALPHA,
            "layer": word("The layer that has the adapter.", "embedding", "head"),
        },
        outputs={
            "embedding": tensor("(tokens, features)", "The embedding from now on."),
            "head": tensor("(tokens, features)", "The head's weight from now on."),
        },
    ),
    "lora_batched_forward": Operation(
        row="lora_batched",
        tensors={
            "x": tensor("(requests, ..., in_features)", "The rows of each request."),
            "W": a.W,
            **a.ADAPTERS,
            "indices": a.INDICES,
            "bias": a.BIAS,
        },
        parameters={},
        outputs={"y": tensor("(requests, ..., out_features)", "The layer's output.")},
    ),
    "adapter_config_scaling": Operation(
        row="adapter_files",
        tensors={"A": a.A, "B": a.B},
        parameters={"module": a.MODULE, "config": a.CONFIG},
        outputs={"scaling": tensor("()", "The factor of B A in this layer.")},
    ),
    "adapter_config_merge": Operation(
        row="adapter_files",
        tensors={
            "W": a.STORED,
            "bias": tensor("(out_features,)", "The frozen bias."),
            "A": a.A,
            "B": a.B,
            "B_bias": a.optional(
                tensor("(out_features,)", "The bias of B in the file (lora_bias).")
            ),
            "trained_bias": a.optional(
                tensor(
                    "(out_features,)", "The bias in the file (bias: lora_only, all)."
                )
            ),
        },
        parameters={"module": a.MODULE, "config": a.CONFIG},
        outputs={
            "merged": tensor("as W", "The weight, stored as before."),
            "merged_bias": tensor("(out_features,)", "The bias of the merged layer."),
        },
    ),
    "gguf_merge": Operation(
        row="adapter_files",
        tensors=a.LORA,
        parameters={
            "alpha": number("adapter.lora.alpha in the file; 0: B holds the scale."),
            "share": number("The factor that the user sets (--lora-scaled)."),
        },
        outputs={"merged": a.MERGED},
    ),
    "experts_forward": Operation(
        row="experts",
        tensors={
            "x": a.X,
            "chosen": a.CHOSEN,
            **a.EXPERTS,
            "bias": a.optional(tensor("(experts, out_features)", "The frozen biases.")),
        },
        parameters=a.LORA_SCALING,
        outputs={"y": a.Y},
    ),
    "experts_backward": Operation(
        row="experts",
        tensors={"grad_y": a.GRAD_Y, "x": a.X, "chosen": a.CHOSEN, **a.EXPERTS},
        parameters=a.LORA_SCALING,
        outputs={
            "grad_x": a.GRAD_X,
            "grad_A": a.gradient("A", a.EXPERTS["A"]),
            "grad_B": a.gradient("B", a.EXPERTS["B"]),
        },
    ),
    "experts_merge": Operation(
        row="experts",
        tensors=a.EXPERTS,
        parameters=a.LORA_SCALING,
        outputs={
            "merged": tensor(
                "(experts, out_features, in_features)", "W and the updates."
            )
        },
    ),
}
