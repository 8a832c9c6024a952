"""Names of accepted answers other than ours, the same in all files and profiles."""

WAYS: dict[str, str] = {
    # Blockwise quantization
    "division": "those who divide by absmax, as the paper's formula does",
    "division-of-short-blocks": "bitsandbytes on a CPU, which divides by absmax in a "
    "short last block and nowhere else",
    "cuda-thresholds": "bitsandbytes' CUDA kernel and onnxruntime, whose thresholds "
    "are decimals: four of them are one float32 step beside the midpoint",
    "zero-block-code-0": "bitsandbytes' CUDA kernel and torchao, where 0/0 is code 0",
    "zero-block-scale-1": "those who store 1 as the scale of a block of zeros",
    "zero-block-scale-eps": "bitsandbytes on a CPU, which stores 1e-38 as the scale of "
    "a short block of zeros",
    "fp4-by-magnitude": "bitsandbytes' CUDA kernel, which compares magnitudes",
    "fp4-signed-zero": "those who give FP4's code 8 a sign",
    "unsigned-zero": "those whose zeros have no sign",
    "scale-at-least-normal": "torchao, which stores no scale below 2^-6, the smallest "
    "normal number of E4M3",
    "mean-in-float32": "those who sum the scales in float32 for their mean, as "
    "bitsandbytes does; its last bits depend on the order",
    "refuses-empty": "those who refuse an empty tensor",
    # Codebooks
    "float32-quantiles": "those who take float32 quantiles at float32 points, as NF4's "
    "authors did",
    "float32-quantiles-929-960": "those who take float32 quantiles from 929/960",
    "codes-from-samples": "those who take BOF4-S's table as its paper prints it, from "
    "samples; ours is the integral",
    "offset-in-seven-digits": "those who write the offset in seven digits",
    # Adapters
    "update-rounded-first": "those who round the update to the weight's dtype first",
    "computes-any-rank": "those who compute with any rank",
    "norm-not-detached": "those who differentiate DoRA's norm as well",
    "relative-to-1": "those who train l - 1",
    # The optimizer
    "epsilon-hat": "those who add eps before the root is divided by its correction",
}
