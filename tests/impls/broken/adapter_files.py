"""Bugs of programs that read the files of adapters."""

import re

import numpy as np

from minipeft.golden.drivers.reference import adapter_files as right
from minipeft.golden.drivers.reference import lora
from tests.impls.broken import bug

F32 = np.float32
SCALING, MERGE, GGUF = "adapter_config_scaling", "adapter_config_merge", "gguf_merge"


@bug(SCALING, "AlphaPattern")
def drops_the_patterns(A, B, module, config):
    right.adapter_config_scaling(A, B, module, config)
    plain = {k: v for k, v in config.items() if not k.endswith("_pattern")}
    return right.adapter_config_scaling(A, B, module, {**plain, "r": len(A)})


@bug(SCALING, "RankPattern")
def divides_by_the_common_rank(A, B, module, config):
    s = right.adapter_config_scaling(A, B, module, config)
    stable = config.get("use_rslora", False)
    factor = len(A) / max(config["r"], 1)
    return F32(s * (factor**0.5 if stable else factor))


@bug(SCALING, "RankStabilized")
def reads_no_use_rslora(A, B, module, config):
    plain = {**config, "use_rslora": False}
    return right.adapter_config_scaling(A, B, module, plain)


@bug(SCALING, "Scaling")
def takes_lora_alpha_for_the_scale(A, B, module, config):
    s = right.adapter_config_scaling(A, B, module, config)
    stable = config.get("use_rslora", False)
    return F32(s * (len(A) ** 0.5 if stable else len(A)))


@bug(SCALING, "Basic")
def wants_all_settings(A, B, module, config):
    return right.adapter_config_scaling(A, B, module, {**config, "x": config["bias"]})


@bug(SCALING, "PatternEnd")
def finds_a_key_anywhere_in_the_name(A, B, module, config):
    return right.adapter_config_scaling(A, B, module, _keys(config, ".*{}.*"))


@bug(SCALING, "PatternEnd")
def looks_up_the_whole_name(A, B, module, config):
    found = {
        name: {k: v for k, v in value.items() if k == module}
        for name, value in config.items()
        if name == "alpha_pattern"
    }
    return right.adapter_config_scaling(A, B, module, {**config, **found})


@bug(SCALING, "PatternRegex")
def reads_a_key_as_plain_text(A, B, module, config):
    found = {
        name: {k: v for k, v in value.items() if module.endswith(k)}
        for name, value in config.items()
        if name == "alpha_pattern"
    }
    return right.adapter_config_scaling(A, B, module, {**config, **found})


@bug(SCALING, "RankOfConfig")
def believes_the_matrices(A, B, module, config):
    plain = {k: v for k, v in config.items() if k != "rank_pattern"}
    if config["r"] < 0 or A.shape[0] != B.shape[1]:
        raise ValueError("r is negative, or the matrices differ")
    return right.adapter_config_scaling(A, B, module, {**plain, "r": len(A)})


@bug(SCALING, "OutOfRange", "r is negative")
def takes_the_absolute_rank(A, B, module, config):
    return right.adapter_config_scaling(A, B, module, {**config, "r": abs(config["r"])})


@bug(SCALING, "ShapeMismatch", "B has one column")
def does_not_look_at_b(A, B, module, config):
    return right.adapter_config_scaling(A, np.zeros((1, len(A)), F32), module, config)


@bug(SCALING, "ZeroRank", "r is 0")
def scales_rank_zero_by_one(A, B, module, config):
    return F32(1) if not len(A) else right.adapter_config_scaling(A, B, module, config)


@bug(MERGE, "FanInFanOut")
def adds_the_update_as_it_is(W, bias, A, B, module, config, **biases):
    merged = right.adapter_config_merge(W, bias, A, B, module, config, **biases)
    if not config.get("fan_in_fan_out") or W.shape[0] != W.shape[1]:
        return merged
    return np.ascontiguousarray(W + (merged[0] - W).T), merged[1]


@bug(MERGE, "FanInFanOut")
def returns_the_transpose(W, bias, A, B, module, config, **biases):
    merged, b = right.adapter_config_merge(W, bias, A, B, module, config, **biases)
    turned = config.get("fan_in_fan_out")
    return (np.ascontiguousarray(merged.T) if turned else merged), b


@bug(MERGE, "SquareTrap", "square")
def turns_a_square_weight(W, bias, A, B, module, config, **biases):
    if W.shape[0] == W.shape[1]:
        config = {**config, "fan_in_fan_out": True}
    return right.adapter_config_merge(W, bias, A, B, module, config, **biases)


@bug(MERGE, "Bias", "lora_bias", "lora_bias and fan_in_fan_out")
def spares_the_bias_of_the_file(
    W, bias, A, B, module, config, B_bias=None, trained_bias=None
):
    merged, b = right.adapter_config_merge(
        W, bias, A, B, module, config, B_bias, trained_bias
    )
    return merged, b if B_bias is None else bias + B_bias


@bug(MERGE, "TrainedBias", "bias: lora_only", "bias: all")
def adds_the_trained_bias(
    W, bias, A, B, module, config, B_bias=None, trained_bias=None
):
    merged, b = right.adapter_config_merge(
        W, bias, A, B, module, config, B_bias, trained_bias
    )
    return merged, b if trained_bias is None else bias + trained_bias


@bug(MERGE, "Normal")
def ten_bits_from_a_file(W, bias, A, B, module, config, **biases):
    W, A, B = (v.astype(np.float16).astype(F32) for v in (W, A, B))
    return right.adapter_config_merge(W, bias, A, B, module, config, **biases)


@bug(MERGE, "RankPattern")
def merges_without_patterns(W, bias, A, B, module, config, **biases):
    right.adapter_config_merge(W, bias, A, B, module, config, **biases)
    plain = {k: v for k, v in config.items() if not k.endswith("_pattern")}
    own = {**plain, "r": len(A), "lora_alpha": config["lora_alpha"] * len(A)}
    own["lora_alpha"] /= config["r"]
    return right.adapter_config_merge(W, bias, A, B, module, own, **biases)


@bug(GGUF, "ZeroAlpha")
def multiplies_by_a_zero_alpha(W, A, B, alpha, share):
    merged = right.gguf_merge(W, A, B, alpha, share)
    return merged if alpha else W.copy()


@bug(GGUF, "Share")
def ignores_the_share(W, A, B, alpha, share):
    return right.gguf_merge(W, A, B, alpha, 1.0)


@bug(GGUF, "Share")
def takes_a_share_of_zero_for_none(W, A, B, alpha, share):
    return right.gguf_merge(W, A, B, alpha, share or 1.0)


@bug(GGUF, "Basic")
def scales_the_gguf_by_alpha(W, A, B, alpha, share):
    right.gguf_merge(W, A, B, alpha, share)
    return right.gguf_merge(W, A, B, alpha * len(A), share)


@bug(GGUF, "RankOne", "r 1")
def squeezes_a_gguf(W, A, B, alpha, share):
    return right.gguf_merge(W, A.squeeze(), B.squeeze(), alpha, share)


@bug(GGUF, "Scaling")
def scales_a_gguf_as_rslora(W, A, B, alpha, share):
    right.gguf_merge(W, A, B, alpha, share)
    return lora.lora_merge(W, A, B, share * (alpha or len(A) ** 0.5), True)


def _keys(config, form):
    """Write the keys of the patterns in another form."""
    return {
        name: {form.format(k): v for k, v in value.items()}
        if name.endswith("_pattern")
        else value
        for name, value in config.items()
    }


@bug(
    SCALING, "PatternRegex", "k_proj|q_proj, for q_proj", "q_proj|k_proj, for q_proj.0"
)
def puts_no_brackets_around_a_key(A, B, module, config):
    found = {}
    for name, value in config.items():
        if name.endswith("_pattern"):
            fits = (k for k in value if re.match(rf"(.*\.)?{k}$", module))
            value = {re.escape(module): value[k] for k in fits}
        found[name] = value
    return right.adapter_config_scaling(A, B, module, found)
