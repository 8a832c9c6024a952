"""Why each case exists, and what breaks where it fails."""

from minipeft.golden.vectors import Note

_BNB = "https://github.com/bitsandbytes-foundation/bitsandbytes"


def _note(kind: str, description: str, effect: str, *links: str) -> Note:
    return Note(kind, description, effect, tuple(f"{_BNB}/{link}" for link in links))


BASIC = {
    "Basic": _note(
        "BASIC",
        "Plain values in whole blocks.",
        "Nothing that this implementation quantizes can be read by another one.",
    ),
    "FlattenRowMajor": _note(
        "CONVENTION",
        "The tensor is read row by row and blocks run across the ends of rows.",
        "Scales belong to other values as soon as a row is no multiple of a block.",
    ),
    "NibbleOrder": _note(
        "HISTORIC_BUG",
        "The first of two codes stands in the HIGH four bits of the byte.",
        "Neighbouring weights are swapped in pairs; the model still answers, badly.",
        "pull/1472",
    ),
    "ShortBlock": _note(
        "HISTORIC_BUG",
        "The last block holds fewer values than the others; it is scaled like them.",
        "The tail gets a scale from memory beyond the tensor, or another rounding.",
        "pull/1884",
    ),
    "OddLength": _note(
        "EDGE_CASE",
        "An odd number of values: half a byte is left over.",
        "The last value is lost, or a byte is missing.",
    ),
    "SingleElement": _note(
        "EDGE_CASE",
        "One value, which is its own absmax.",
        "A shape of length 1 is squeezed, transposed or taken for a scalar.",
    ),
    "BlockBoundary": _note(
        "EDGE_CASE",
        "A block size at the edge of what is allowed, or a tensor of one whole block.",
        "Index arithmetic is off by one block.",
    ),
    "LargeBlock": _note(
        "HISTORIC_BUG",
        "Blocks of 1024 or 4096 values, where a thread packs several bytes.",
        "A variable kept from the last byte, or a kernel without its data type: the "
        "error of the whole tensor grows sixfold.",
        "issues/565",
        "pull/1721",
        "pull/1160",
    ),
    "InvalidBlocksize": _note(
        "EDGE_CASE",
        "A block size that is not a positive power of two.",
        "Division by zero, or a tensor that no other implementation can read.",
    ),
    "Empty": _note(
        "EDGE_CASE",
        "No values at all.",
        "The maximum of nothing is taken; a sharded layer may hold such a tensor.",
    ),
}

QUANTIZE = {
    "PadNibble": _note(
        "CONVENTION",
        "The spare half byte at the end holds the code of 0.0.",
        "Two files of the same weights differ, so that their hashes do.",
    ),
    "Tie": _note(
        "CONVENTION",
        "A value exactly on the float32 midpoint of two neighbours takes the lower. An "
        "argmin over distances sees the exact midpoint instead, and goes either way.",
        "Where a value meets a midpoint, its code differs from that of all others.",
    ),
    "NextToTie": _note(
        "NUMERICS",
        "One float32 step above or below a midpoint. Thresholds written with a few "
        "digits, or computed in another precision, lie on the other side of it.",
        "A few codes in a million move by one.",
    ),
    "EveryCode": _note(
        "EDGE_CASE",
        "Values that stand exactly on the codebook, at an awkward scale.",
        "Quantizing what was dequantized changes it.",
    ),
    "ZeroBlock": _note(
        "CONVENTION",
        "Every value is zero, and so is absmax. The codes are those of 0.0.",
        "0/0 is NaN, which fails every comparison: code 0, and -0.0 after all, or NaN.",
    ),
    "NegativeZero": _note(
        "EDGE_CASE",
        "-0.0 is the value 0.0.",
        "A sign bit takes the value to a negative code.",
    ),
    "Subnormal": _note(
        "NUMERICS",
        "The absmax is subnormal, so that its float32 reciprocal overflows.",
        "A clamped or flushed scale sends every value of the block to the wrong code.",
    ),
    "LargeAbsmax": _note(
        "NUMERICS",
        "The absmax is so large that its reciprocal is subnormal.",
        "Hardware that flushes subnormals quantizes the whole block to zero.",
    ),
    "ReciprocalMultiply": _note(
        "NUMERICS",
        "A value whose code depends on W * (1/absmax) being two float32 roundings.",
        "Division, or a fused or approximate reciprocal, moves one code in millions: "
        "enough to break equality of bytes.",
    ),
    "AbsmaxReciprocal": _note(
        "NUMERICS",
        "absmax * (1/absmax) is not 1 but one step below.",
        "The largest value is looked up beyond the end, or misses the last code.",
    ),
    "HalfInput": _note(
        "NUMERICS",
        "The weight is bfloat16 or float16; scaling happens in float32 all the same.",
        "Scaling in the input's precision moves about one code in two hundred.",
    ),
    "NegativeAbsmax": _note(
        "EDGE_CASE",
        "The value of largest size is negative: absmax has no sign.",
        "The block comes back with all its signs flipped.",
    ),
    "Constant": _note(
        "EDGE_CASE",
        "All values are equal.",
        "A scale from the range (maximum minus minimum) is zero.",
    ),
    "Outlier": _note(
        "EDGE_CASE",
        "One value is a million times larger than all others.",
        "Clipping the outlier changes the scale, though the others must become 0.0.",
    ),
    "NotFinite": _note(
        "EDGE_CASE",
        "NaN or infinity among the weights must be refused.",
        "NaN turns into the largest or smallest weight of its block, silently, or "
        "spoils the whole block.",
    ),
    "FP4TwoZeros": _note(
        "CONVENTION",
        "FP4 has the codes 0 and 8 for zero. By midpoints small positive values meet "
        "code 8; by sign and magnitude small negative ones do.",
        "Half a per cent of the codes differ and no value does.",
    ),
    "FP4Tie": _note(
        "CONVENTION",
        "A tie takes the lower value: for negative ones the larger magnitude. Kernels "
        "that compare magnitudes, with thresholds of eight digits, go the other way.",
        "Codes of values on or next to a midpoint differ by one.",
    ),
}

DEQUANTIZE = {
    "Table": _note(
        "BASIC",
        "All sixteen codes at absmax 1: the codebook itself, bit for bit.",
        "A table of four decimals, or in half precision, is off by up to 2e-3.",
    ),
    "MisalignedRows": _note(
        "HISTORIC_BUG",
        "Rows are a multiple of 16 but not of the block, so that a block ends inside a "
        "row. A vectorized loop that counts blocks by row reads other blocks' scales.",
        "More than half of the weights come back with a wrong scale.",
        "pull/1828",
        "pull/2072",
    ),
    "RoundOnce": _note(
        "NUMERICS",
        "The product code * absmax is rounded to float32, then once to the output.",
        "Multiplying in the output's precision is off by one step in most values.",
    ),
    "RoundToEven": _note(
        "NUMERICS",
        "A float32 product half way between two values of the output's dtype.",
        "Truncation, or rounding halves up, biases every weight.",
    ),
    "Overflow": _note(
        "EDGE_CASE",
        "float16 ends at 65504; from 65520 on stands infinity.",
        "Saturating hides a wrong scale; wrapping makes a number of it.",
    ),
    "Underflow": _note(
        "NUMERICS",
        "Results that are subnormal in the output's dtype.",
        "Flushed to zero, a layer of small weights vanishes.",
    ),
    "ZeroScale": _note(
        "CONVENTION",
        "absmax is 0: IEEE gives -0.0 for negative codes.",
        "Only the sign of a zero.",
    ),
    "PadNibbleIgnored": _note(
        "EDGE_CASE",
        "The spare half byte at the end holds some other code.",
        "The result has one value too many.",
    ),
    "SizeMismatch": _note(
        "EDGE_CASE",
        "More or fewer scales, or bytes, than the shape needs.",
        "Memory beyond them is read, or parts of two tensors are mixed.",
    ),
    "FP4TwoZeros": _note(
        "CONVENTION",
        "FP4's code 8 is zero too; with a sign bit it is -0.0.",
        "Only the sign of a zero.",
    ),
}
