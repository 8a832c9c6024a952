"""The types and meanings of arguments and outputs, each defined once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Argument:
    """One argument or output of a function."""

    meaning: str
    type: Mapping[str, Any]  # a JSON schema; of a tensor {"dtypes": …, "axes": …}
    optional: bool = False  # a case may leave it out
    exact: bool = False  # an output that is always compared as bytes

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, not a plain number or word."""
        return "dtypes" in self.type


Named = Mapping[str, Argument]


def tensor(axes: str, meaning: str, *dtypes: str) -> Argument:
    """Describe a tensor; float32 where no other dtype is named."""
    return Argument(meaning, {"axes": axes, "dtypes": dtypes or ("float32",)})


def integer(meaning: str) -> Argument:
    """Describe a whole number."""
    return Argument(meaning, {"type": "integer"})


def number(meaning: str) -> Argument:
    """Describe a real number."""
    return Argument(meaning, {"type": "number"})


def boolean(meaning: str) -> Argument:
    """Describe a boolean."""
    return Argument(meaning, {"type": "boolean"})


def word(meaning: str, *choices: str) -> Argument:
    """Describe a choice among words."""
    return Argument(meaning, {"enum": list(choices)})


def optional(argument: Argument) -> Argument:
    """Return the argument as one that a case may leave out."""
    return replace(argument, optional=True)


def exact(argument: Argument) -> Argument:
    """Return the output as one that is always compared as bytes."""
    return replace(argument, exact=True)


def exactly(arguments: Named) -> Named:
    """Return the outputs as ones that are always compared as bytes."""
    return {name: exact(argument) for name, argument in arguments.items()}


def gradient(name: str, argument: Argument) -> Argument:
    """Return the gradient of an argument, which has its shape."""
    return tensor(argument.type["axes"], f"The gradient of {name}.")


# A layer
X = tensor("(..., in_features)", "The layer's input.")
Y = tensor("(..., out_features)", "The layer's output.")
W = tensor("(out_features, in_features)", "The frozen weight.")
BIAS = optional(tensor("(out_features,)", "The frozen bias."))
GRAD_Y = tensor("(..., out_features)", "The gradient of the output.")
GRAD_X = tensor("(..., in_features)", "The gradient of the input.")
WEIGHT = tensor("(out_features, in_features)", "The frozen weight.", *FLOATS)
BASE = tensor("(out_features, in_features)", "What the adapter leaves of W.")
MERGED_WEIGHT = tensor("(out_features, in_features)", "W and the update.", *FLOATS)
MERGED = tensor("(out_features, in_features)", "The weight that holds the update.")

# An adapter
A = tensor("(r, in_features)", "The matrix that reads the input.")
B = tensor("(out_features, r)", "The matrix that writes to the output.")
GRAD_A = tensor("(r, in_features)", "The gradient of A.")
GRAD_B = tensor("(out_features, r)", "The gradient of B.")
DELTA = tensor("(out_features, in_features)", "The update: scaling * B A.")
MAGNITUDE = tensor("(out_features,)", "The trained length of each row.")
R = integer("The rank.")
ALPHA = number("Numerator of the scaling alpha/r.")
ALPHA_EITHER = number("Numerator of the scaling alpha/r or alpha/sqrt(r).")
RANK_STABILIZED = boolean("Whether the scaling is alpha/sqrt(r).")
SCALING = number("The factor of the change.")
SIDE = word("Which side of the layer l scales.", "output", "input")

# Several adapters, and the files of one
ADAPTERS = {
    "A": tensor("(n, r, in_features)", "The matrix of each adapter that reads."),
    "B": tensor("(n, out_features, r)", "The matrix of each that writes."),
    "scaling": tensor("(n,)", "The scaling of each."),
}
NO_ADAPTER = 255
INDICES = tensor(
    "(requests,)", "The adapter of each request, from 0 on; 255: none.", "uint8"
)
OTHER_A = tensor("(q, in_features)", "The matrix of the other adapter that reads.")
OTHER_B = tensor("(out_features, q)", "The matrix of the other that writes.")
TABLE = tensor("(tokens, features)", "The embedding, which is the head's weight too.")
MODULE = Argument("The layer's name in the model.", {"type": "string"})
_NUMBER = {"type": "number"}
_INTEGER = {"type": "integer"}
_FLAG = {"type": "boolean"}
CONFIG = Argument(
    "The settings in adapter_config.json, by peft's names. What is not there is false, "
    "or empty. The keys of patterns are regular expressions for the ends of names.",
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["r", "lora_alpha"],
        "properties": {
            "r": _INTEGER,
            "lora_alpha": _NUMBER,
            "use_rslora": _FLAG,
            "rank_pattern": {"type": "object", "additionalProperties": _INTEGER},
            "alpha_pattern": {"type": "object", "additionalProperties": _NUMBER},
            "fan_in_fan_out": _FLAG,
            "bias": {"enum": ["none", "all", "lora_only"]},
            "lora_bias": _FLAG,
        },
    },
)
STORED = tensor(
    "(out_features, in_features), with fan_in_fan_out (in_features, out_features)",
    "The weight, as the base stores it.",
)

# A codec
VALUES = tensor("any", "The values, read row by row.", *FLOATS)
PACKED = tensor("(ceil(n / 2),)", "Two codes in a byte, the first one high.", "uint8")
ABSMAX = tensor("(blocks,)", "The scale of each block.")
BLOCKSIZE = integer("Values in a block: a power of two.")
NESTED_BLOCKSIZE = integer("Scales in a block of their own: a power of two.")
SHAPE = Argument(
    "The shape of the result.",
    {"type": "array", "items": {"type": "integer", "minimum": 0}},
)
DTYPE = word("The dtype of the result.", *FLOATS)
NIBBLES = tensor(
    "(..., in_features / 2)", "Two codes in a byte, the first one low.", "uint8"
)
ROWS = tensor("(..., in_features)", "The weight; blocks lie within rows.", *FLOATS)
MXFP4 = {
    "packed": NIBBLES,
    "scales": tensor("(..., blocks of 32)", "The exponent of each, + 127.", "uint8"),
}
NVFP4 = {
    "packed": NIBBLES,
    "scales": tensor("(..., blocks of 16)", "The scale of each in E4M3.", "uint8"),
    "tensor_scale": tensor("()", "The scale of the scales."),
}
CODEBOOK = tensor("(codes,)", "The values, in the order of their codes.")

# Attention
Q = tensor("(..., queries, d)", "The queries.")
K = tensor("(..., keys, d)", "The keys.")
V = tensor("(..., keys, d_v)", "The values.")
MASK = optional(
    tensor("(..., queries, keys)", "1 where a query may look, else 0.", "uint8")
)
MIXED = tensor("(..., queries, d_v)", "The values, mixed for each query.")

# Groups of arguments
LORA = {"W": W, "A": A, "B": B}
LORA_SCALING = {"alpha": ALPHA_EITHER, "rank_stabilized": RANK_STABILIZED}
LORA_GRADIENTS = {"grad_x": GRAD_X, "grad_A": GRAD_A, "grad_B": GRAD_B}
STACK = tensor("(experts, out_features, in_features)", "The frozen weights.")
EXPERTS = {
    "W": STACK,
    "A": tensor("(experts, r, in_features)", "The matrix of each expert that reads."),
    "B": tensor("(experts, out_features, r)", "The matrix of each that writes."),
}
CHOSEN = tensor("(...,)", "The expert of each token, counted from 0.", "uint8")
DORA = LORA | {"magnitude": MAGNITUDE}
HEAD = {"Q": Q, "K": K, "V": V, "mask": MASK}
VERA = {
    "W": W,
    "A": tensor("(r, at least in_features)", "The shared matrix that reads."),
    "B": tensor("(at least out_features, r)", "The shared matrix that writes."),
    "d": tensor("(r,)", "The trained scales of the rows of A."),
    "b": tensor("(out_features,)", "The trained scales of the outputs."),
}
IA3 = {"W": W, "l": tensor("(features of the side,)", "The trained scales.")}
SIDE_ONLY = {"side": SIDE}
BOTTLENECK = {
    "x": tensor("(..., features)", "The input."),
    "down": tensor("(bottleneck, features)", "The projection down."),
    "down_bias": tensor("(bottleneck,)", "Its bias."),
    "up": tensor("(features, bottleneck)", "The projection up."),
    "up_bias": tensor("(features,)", "Its bias."),
}
NESTED = {
    "packed": PACKED,
    "absmax_codes": tensor("(blocks,)", "The codes of the scales.", "uint8"),
    "nested_absmax": tensor("(nested blocks,)", "The scales of the scales."),
    "offset": tensor("()", "The mean of the scales."),
}
NESTED_SIZES = {
    "blocksize": BLOCKSIZE,
    "nested_blocksize": NESTED_BLOCKSIZE,
}
ADAMW = {
    "t": integer("Steps taken before this one."),
    "lr": number("The learning rate."),
    "beta1": number("The decay of the first moment."),
    "beta2": number("The decay of the second moment."),
    "eps": number("What is added to the root: 0 or more."),
    "weight_decay": number("The rate of decay, times lr: 0 or more."),
}
STEP = {"W": tensor("any", "The weight."), "grad": tensor("as W", "Its gradient.")}
MOMENTS = {
    "m": tensor("as W", "The first moment."),
    "v": tensor("as W", "The second moment."),
}
CODED = {
    "m_codes": tensor("(n,)", "Codes of m in the signed dynamic map.", "uint8"),
    "m_absmax": tensor("(blocks of 256,)", "The scales of m."),
    "v_codes": tensor("(n,)", "Codes of v in the unsigned dynamic map.", "uint8"),
    "v_absmax": tensor("(blocks of 256,)", "The scales of v."),
}
QLORA = {
    "packed": PACKED,
    "absmax": ABSMAX,
    "A": A,
    "B": B,
}
QLORA_SIZES = {"alpha": ALPHA, "blocksize": BLOCKSIZE}
TRACE = {
    "faulted": tensor("(touches,)", "Whether the page was not there.", "uint8"),
    "left": tensor("(touches,)", "The page that made room; 255: none.", "uint8"),
    "written_back": tensor("(touches,)", "Whether it had been changed.", "uint8"),
    "resident": tensor(
        "(pages there,)", "The pages at the end, the least recent first.", "uint8"
    ),
}


@dataclass(frozen=True)
class Operation:
    """One function of an implementation, and the file of vectors that checks it."""

    row: str  # the file in cases/ and in every driver
    tensors: Mapping[str, Argument]
    parameters: Mapping[str, Argument]
    outputs: Mapping[str, Argument]

    @property
    def optional(self) -> tuple[str, ...]:
        """The tensors that a case may leave out."""
        return tuple(name for name, t in self.tensors.items() if t.optional)

    def signature(self, name: str) -> str:
        """Return the call as one would write it."""
        required = [t for t in self.tensors if t not in self.optional]
        absent = [f"{t}=None" for t in self.optional]
        arguments = ", ".join([*required, *self.parameters, *absent])
        return f"{name}({arguments}) -> {', '.join(self.outputs)}"
