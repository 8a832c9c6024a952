"""The settings of peft's files: which are read, and which change the function."""

import difflib
from collections.abc import Mapping
from typing import Any, NoReturn

from minipeft.errors import InputError

COMMON = """
    auto_mapping base_model_name_or_path bias exclude_modules inference_mode
    layers_pattern layers_to_transform modules_to_save peft_type peft_version revision
    target_modules task_type
"""
FIELDS = {
    "LORA": """
        alpha_pattern corda_config ensure_weight_tying eva_config fan_in_fan_out
        init_lora_weights loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
        megatron_core qalora_group_size r rank_pattern target_parameters
        trainable_token_indices use_dora use_rslora
    """,
    "VERA": """
        d_initial fan_in_fan_out init_weights projection_prng_key r save_projection
        vera_dropout
    """,
    "IA3": "fan_in_fan_out feedforward_modules init_ia3_weights",
    "HIRA": "fan_in_fan_out hira_dropout init_weights r rank_pattern",
    "MISS": "init_weights mini_r miss_dropout r",
}
"""Settings that are read, or that say nothing about the function."""
THEIRS = {
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("megatron_config", "monteclora_config", "runtime_config", "use_bdlora"),
    *("use_qalora", "velora_config"),
}
"""Peft's other settings, for which there is no method here."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start A and B that leave the base as it is."""
ALIKE = 0.75
"""Share of letters that two names have in common if one may be the other, damaged."""
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Ends of the names of a task's head, which peft then expects among the tensors."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a method or a setting that minipeft has no adapter for.

    Raises:
        InputError: the sentence names the first.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InputError(
            f"the adapter is of type {kind!r}, for which minipeft has no method; it "
            f"reads {', '.join(FIELDS)}, PROMPT_TUNING and PREFIX_TUNING"
        )
    known = f"{COMMON} {FIELDS[kind]}".split()
    for name, value in config.items():
        if name not in known and value not in (None, False, {}, [], "", 0):
            _refuse(name, value, [key for key in known if key not in config])
    if config.get("bias", "none") != "none":
        raise InputError(
            f"the adapter was made with bias = {config['bias']!r} and trains biases of "
            "the base; merge it with the library that trained it"
        )
    start = config.get("init_lora_weights")
    if start == "loftq":
        raise InputError(_LOFTQ)
    if start not in PLAIN_STARTS and start != "pissa":
        raise InputError(
            f"init_lora_weights is {start!r}, which changed the base, and the file "
            "does not hold that base; save it again with "
            "path_initial_model_for_weight_conversion"
        )


def _refuse(name: str, value: Any, absent: list[str]) -> NoReturn:
    """Refuse a setting; one spelled almost as an absent one may be damaged."""
    near = difflib.get_close_matches(name, absent, 1, ALIKE)
    if near and name not in THEIRS:
        raise InputError(
            f"the configuration has {name} = {value!r}, a name that minipeft does not "
            f"know, and no {near[0]}, which is nearest to it; get the file again, or, "
            f"if {name} is what was meant, merge it with the library that trained it"
        )
    raise InputError(
        f"the adapter was made with {name} = {value!r}, for which minipeft has no "
        "method; merge it with the library that trained it"
    )


_LOFTQ = (
    "init_lora_weights is 'loftq', so A and B belong to the quantized base Q; Q - W "
    "has full rank, so no LoRA of rank 2r on W is the same; give Q as the base, and "
    "true as init_lora_weights"
)
FLAGS = ("fan_in_fan_out", "lora_bias", "use_dora", "use_rslora")


def check_update(config: Mapping[str, Any]) -> None:
    """Refuse settings with which s B A is no update of the base's own weights.

    Args:
        config: of a file of LoRA or DoRA; biases that it trains are in the file.

    Raises:
        InputError: the sentence names the first.
    """
    for name in FLAGS:
        if config.get(name) not in (None, True, False):
            raise InputError(f"{name} is {config[name]!r}; it must be true or false")
    check_config({**config, "bias": "none"})
    if config.get("init_lora_weights") == "pissa":
        raise InputError(
            "init_lora_weights is 'pissa', which subtracted the first A and B from the "
            "base, so the file alone is no update of it; write it as plain LoRA first: "
            "minipeft export --to peft --rank with 2r"
        )
