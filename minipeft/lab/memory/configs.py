"""From a model's `config.json` to its sizes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from minipeft.errors import InputError
from minipeft.lab.memory.shapes import GPT2, Architecture, Block, Experts
from minipeft.values import check_flag, check_integer, check_kind

QKV = ("q_proj", "k_proj", "v_proj")
BLOCKS: Mapping[str, Block] = {
    "llama": Block(),
    "mistral": Block(),
    "mixtral": Block(),
    "qwen2": Block(biases=QKV),
    "qwen2_moe": Block(biases=QKV),
    "qwen3": Block(head_norms=True),
    "qwen3_moe": Block(head_norms=True),
    "gemma": Block(),
    "gemma2": Block(norms=4, soft_caps=True),
    "gemma3_text": Block(norms=4, head_norms=True),
    "gpt2": Block(gated=False, biases=GPT2, norm_vectors=2),
}
"""The families whose blocks are known, by the `model_type` of their configuration."""

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
QWEN = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
NEEDED: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions"),
    "mixtral": (*SIZES, "num_local_experts", "num_experts_per_tok"),
    "qwen2_moe": (*SIZES, *QWEN),
    "qwen3_moe": (*SIZES, *QWEN),
}
"""What a family's configuration must say; the others say `SIZES`."""


def of_config(config: Any) -> Architecture:
    """Read the sizes from a configuration of transformers.

    Of a model that sees, the part that writes is counted.

    Raises:
        InputError: the family is not known here, or has parts that are not counted.
    """
    config = getattr(config, "text_config", config)
    family = getattr(config, "model_type", None)
    if family is None:
        raise InputError(
            f"text_config is of type {type(config).__name__}; give the configuration "
            "of the part that writes, with its model_type"
        )
    if family not in BLOCKS:
        raise InputError(
            f"the sizes of {family!r} are not known here; give one of "
            f"{', '.join(BLOCKS)}"
        )
    _check_parts(family, config)
    _check_numbers(family, config)
    if family == "gpt2":
        return _gpt2(config)
    plain = Architecture(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        feedforward=config.intermediate_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        vocabulary=config.vocab_size,
        head=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        tied=config.tie_word_embeddings,
        block=BLOCKS[family],
    )
    return _particular(config, plain)


def _particular(config: Any, plain: Architecture) -> Architecture:
    """Add experts and windows, where there are any."""
    if config.model_type in EXPERTS:
        plain = EXPERTS[config.model_type](config, plain)
    window = getattr(config, "sliding_window", None)
    if not window:
        return plain
    check_integer("sliding_window", window, 1)
    kinds = getattr(config, "layer_types", None)
    count = kinds.count("sliding_attention") if kinds else plain.layers
    return replace(plain, window=window, windowed=count)


def _check_parts(family: str, config: Any) -> None:
    """Refuse weights that a family may have and that are not counted."""
    for part in ("mlp_bias", "attention_bias"):
        if getattr(config, part, False) and family not in ("qwen2", "qwen2_moe"):
            raise InputError(
                f"{part} is true, and biases are not counted for {family}; set it to "
                "false if the model has none"
            )
    if family == "qwen2_moe" and not getattr(config, "qkv_bias", True):
        raise InputError(
            "qkv_bias is false, and qwen2_moe is counted with these biases; set it to "
            "true if the model has them"
        )
    if family == "gpt2" and getattr(config, "add_cross_attention", False):
        raise InputError(
            "add_cross_attention is true, and such layers are not counted for gpt2; "
            "set it to false if the model has none"
        )


def _check_numbers(family: str, config: Any) -> None:
    """Refuse sizes that are no whole numbers of 1 or more, or contradict each other."""
    for name in NEEDED.get(family, SIZES):
        given: Any = getattr(config, name, None)
        check_integer(name, given, 1)
    for name in ("num_key_value_heads", "head_dim", "n_inner"):
        value: Any = getattr(config, name, None)
        if value is not None:
            check_integer(name, value, 1)
    check_flag("tie_word_embeddings", config.tie_word_embeddings)
    wide, heads = ("n_embd", "n_head") if family == "gpt2" else (SIZES[1], SIZES[3])
    width, count = getattr(config, wide), getattr(config, heads)
    if getattr(config, "head_dim", None) is None and width % count:
        raise InputError(
            f"{wide} is {width} for {count} heads; choose a multiple of the heads"
        )
    _check_groups(count, getattr(config, "num_key_value_heads", None))
    if family in EXPERTS:
        _check_experts(config)


def _check_groups(heads: int, groups: int | None) -> None:
    if groups and heads % groups:
        raise InputError(
            f"num_key_value_heads is {groups} for {heads} heads; each serves as many "
            f"heads as another, so choose a divisor of {heads}"
        )


def _check_experts(config: Any) -> None:
    mixtral = config.model_type == "mixtral"
    name = "num_local_experts" if mixtral else "num_experts"
    count, active = getattr(config, name), config.num_experts_per_tok
    if active > count:
        raise InputError(
            f"num_experts_per_tok is {active} and {name} is {count}; a token cannot "
            "use more experts than there are, so choose a lower number"
        )
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared is not None:
        check_integer("shared_expert_intermediate_size", shared, 0)
    check_kind("mlp_only_layers", getattr(config, "mlp_only_layers", None) or [], list)


def of_model(model: Any) -> Architecture:
    """Read the sizes from a transformers model.

    Raises:
        InputError: its parameters are not those of its configuration's sizes.
    """
    counted = sum(parameter.numel() for parameter in model.parameters())
    try:
        found = of_config(model.config)
    except (InputError, AttributeError):
        found = None
    if found is None or found.parameters != counted:
        raise InputError(
            f"the formulas are those of Llama and its kin, and {type(model).__name__} "
            f"with its {counted:,} parameters is built otherwise; give a model of "
            f"{', '.join(BLOCKS)}"
        )
    return found


def named(name: str) -> Architecture:
    """Read the sizes of a model: a `config.json`, a folder, or a name on this machine.

    Raises:
        InputError: there is no such file or model, or its family is not known here.
    """
    return of_config(configuration(name))


def configuration(name: str) -> Any:
    """Return the configuration of a model: a file, a folder, or a name.

    Raises:
        InputError: there is no such file or model.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        path = _file(name)
    except OSError as error:
        raise InputError(
            f"{shortened(name)} cannot be read ({error.strerror}); give a model's "
            "config.json"
        ) from error
    if path.suffix == ".gguf":
        from minipeft.lab import reading_gguf

        return reading_gguf.config(path)
    wrong = (OSError, ValueError, TypeError, LookupError, AttributeError)
    broken = (StrictDataclassError, RecursionError, ArithmeticError)
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (*wrong, *broken) as error:
        raise InputError(
            f"{path} is no configuration of a model ({_reason(error)}); repair it, or "
            "give another config.json"
        ) from error


def _file(name: str) -> Path:
    """Return where the configuration of a model stands."""
    from minipeft.lab import models

    path = Path(name)
    if path.suffix != ".json":
        if path.is_file():
            raise InputError(
                f"{name} is no configuration of a model; give its config.json"
            )
        models.check_name(name)
        if name == "smollm2":
            return models.cached(name) / models.WHEELS[name].files[0]
        path = models.folder_of(name) / "config.json"
    if not path.is_file():
        raise InputError(f"there is no file {name}; give a model's config.json")
    return path


def _reason(error: Exception) -> str:
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join([first, *(others[:1] if first.endswith(":") else ())])


def _gpt2(config: Any) -> Architecture:
    return Architecture(
        layers=config.n_layer,
        width=config.n_embd,
        feedforward=config.n_inner or 4 * config.n_embd,
        heads=config.n_head,
        key_value_heads=config.n_head,
        vocabulary=config.vocab_size,
        head=config.n_embd // config.n_head,
        tied=config.tie_word_embeddings,
        block=BLOCKS["gpt2"],
        positions=config.n_positions,
    )


def _mixtral(config: Any, dense: Architecture) -> Architecture:
    experts = Experts(
        count=config.num_local_experts,
        active=config.num_experts_per_tok,
        width=config.intermediate_size,
        layers=config.num_hidden_layers,
    )
    return replace(dense, experts=experts)


def _qwen_moe(config: Any, dense: Architecture) -> Architecture:
    plain = set(config.mlp_only_layers or ())
    step, layers = config.decoder_sparse_step, config.num_hidden_layers
    sparse = [i for i in range(layers) if i not in plain and (i + 1) % step == 0]
    experts = Experts(
        count=config.num_experts,
        active=config.num_experts_per_tok,
        width=config.moe_intermediate_size,
        shared=getattr(config, "shared_expert_intermediate_size", 0) or 0,
        layers=len(sparse),
    )
    return replace(dense, experts=experts if sparse else None)


EXPERTS: Mapping[str, Callable[[Any, Architecture], Architecture]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
}
"""How the families with experts name them."""
