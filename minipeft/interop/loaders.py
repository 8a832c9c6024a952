"""The rules by which other programs load an adapter's folder, each with its source.

Each rule was read in the program's source or in the thread that changed the program; a
file is named with its commit. If no rule covers a feature, the report says "not known".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from minipeft.interop.parts import BIAS, MAGNITUDE, Parts
from minipeft.interop.peft_settings import HEADS, PLAIN_STARTS

PEFT_TYPES = {
    *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A"),
    *("CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT", "FROD"),
    *("GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY"),
    *("LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING"),
    *("OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING"),
    *("PSOFT", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHADOW"),
    *("SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA"),
    *("VERA", "WAVEFT", "XLORA"),
}
WITHOUT_MODULES = ("ADAPTION_PROMPT", "TRAINABLE_TOKENS", "XLORA")
"""Of these, those whose files hold no modules as a whole."""
EXACT, SCALED, IGNORED, REFUSED = "exact", "scaled", "ignored", "refused"
UNKNOWN = "not known"
Scale = Callable[[Parts, str], float]


@dataclass(frozen=True)
class Rule:
    """The result for one feature in a loader.

    Args:
        outcome: EXACT, IGNORED, REFUSED or UNKNOWN.
        reason: in words, behind "because".
        source: file and commit, or thread and date.
    """

    outcome: str
    reason: str
    source: str


@dataclass(frozen=True)
class Loader:
    """One program that reads adapters in peft's format.

    Args:
        name: of the program.
        scale: the scale that it computes for a module; NaN where it is not known.
        scale_rule: the same in words, with its source.
        rules: by feature, a key of FEATURES; "any" stands for every adapter.
    """

    name: str
    scale: Scale
    scale_rule: Rule
    rules: dict[str, Rule]


def present(contents: Parts, architecture: str = "") -> dict[str, str]:
    """Return the features of an adapter besides plain pairs A, B: {feature: words}.

    Args:
        contents: of the adapter's folder.
        architecture: transformers' class of the base; "" where it is not known.
    """
    c = contents.config
    modules = contents.modules
    ranks = {contents.rank(module) for module in _pairs(contents)}
    parts = {part for module in modules.values() for part in module}
    found = {
        "another architecture": _is_another(architecture, c.get("task_type")),
        "method": c.get("peft_type") != "LORA",
        "unknown method": c.get("peft_type") not in PEFT_TYPES,
        "dora": MAGNITUDE in parts or bool(c.get("use_dora")),
        "bias": BIAS in parts,
        "trained bias": c.get("bias", "none") != "none",
        "saved modules": bool(c.get("modules_to_save")),
        "token rows": bool(c.get("trainable_token_indices")),
        "embedding": any(map(contents.embedding, modules)),
        "changed base": c.get("init_lora_weights") not in PLAIN_STARTS,
        "transposed": bool(c.get("fan_in_fan_out")),
        "experts": bool(c.get("target_parameters"))
        or any(".experts" in module for module in modules),
        "half pair": bool(contents.incomplete),
        "no head": _lacks_head(contents),
        "rank pattern": len(ranks - {c.get("r")}) > 0,
        "alpha pattern": any(contents.alpha(m) != c.get("lora_alpha") for m in modules),
    }
    return {feature: FEATURES[feature] for feature, there in found.items() if there}


def _is_another(architecture: str, task: object) -> bool:
    """Tell whether the base is no causal language model, as far as files say."""
    if architecture:
        return not architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return task not in (None, "CAUSAL_LM")


FEATURES = {
    "another architecture": "an architecture that is no causal language model",
    "method": "a method other than LoRA",
    "unknown method": "a method that peft does not have",
    "dora": "DoRA's magnitudes",
    "bias": "the biases beside B",
    "trained bias": "the base's trained biases",
    "saved modules": "the modules that are saved whole",
    "token rows": "the trained token rows",
    "embedding": "the update of the embedding",
    "changed base": "a base that the first A and B have changed",
    "transposed": "weights stored as (in, out)",
    "experts": "the updates of experts",
    "half pair": "the updates without A or without B",
    "no head": "a task whose trained head is not in the file",
    "rank pattern": "ranks that differ",
    "alpha pattern": "alphas that differ",
}


def _lacks_head(contents: Parts) -> bool:
    """Tell whether peft would look for a head that the file does not hold."""
    heads = HEADS.get(str(contents.config.get("task_type")), ())
    if not heads or contents.config.get("peft_type") in WITHOUT_MODULES:
        return False
    return not any(
        part.endswith(heads) for name in contents.others for part in name.split(".")
    )


def _pairs(contents: Parts) -> list[str]:
    half = {*contents.incomplete}
    return [module for module in contents.modules if module not in half]


def _right(contents: Parts, module: str) -> float:
    return contents.scaling(module)


def _config_rank(contents: Parts, module: str) -> float:
    """Alpha and rank of the configuration without patterns; the root for rsLoRA."""
    c = contents.config
    return c["lora_alpha"] / (math.sqrt(c["r"]) if c.get("use_rslora") else c["r"])


def _plain_config(contents: Parts, module: str) -> float:
    return float(contents.config["lora_alpha"] / contents.config["r"])


def _plain_tensor(contents: Parts, module: str) -> float:
    return float(contents.config["lora_alpha"] / contents.rank(module))


def _tensor_rank(contents: Parts, module: str) -> float:
    r = contents.rank(module)
    root = math.sqrt(r) if contents.config.get("use_rslora") else r
    return float(contents.config["lora_alpha"] / root)


def _one(contents: Parts, module: str) -> float:
    return 1.0


def _not_known(contents: Parts, module: str) -> float:
    return math.nan


_TYPES = "peft 0.21.2: src/peft/utils/peft_types.py"
_PEFT = "peft 0.21.2: src/peft/tuners/lora/model.py"
_VLLM = "vllm/lora/peft_helper.py @ e745baff"
_VLLM_BIAS = "vllm pull request 25807, 2025-09-27"
_SGLANG = "sglang/srt/lora/lora_config.py @ 0ceb81fe"
_LLAMA = "llama.cpp: convert_lora_to_gguf.py @ 0b03adaa"
_TENSORRT = "tensorrt_llm/lora_manager.py @ 007e181b"
_DIFFUSERS = "diffusers: src/diffusers/utils/peft_utils.py @ 18a3d237"
_DIFFUSERS_BIAS = "diffusers pull request 10474, 2025-01-06"
_MLX = "mlx-lm: mlx_lm/tuner/utils.py, load_adapters @ 03672867"
_OLLAMA = (
    "generative-computing/mellea issue 1651, 2026-09-18; ollama pull request 14969"
)

_NO_PAIRS = "it expects pairs A, B"
_TASKS = "peft 0.21.2: src/peft/peft_model.py, by the task"
_LOADING = "peft 0.21.2: src/peft/utils/save_and_load.py"

LOADERS = {
    loader.name: loader
    for loader in (
        Loader(
            "peft",
            _right,
            Rule(EXACT, "it wrote the format", _PEFT),
            {
                **dict.fromkeys(FEATURES, Rule(EXACT, "its own format", _PEFT)),
                "unknown method": Rule(REFUSED, "it has no such peft_type", _TYPES),
                "half pair": Rule(
                    IGNORED, "it leaves the missing matrix at its start", _LOADING
                ),
                "no head": Rule(
                    UNKNOWN,
                    "whether a module of the base has a name that ends in classifier "
                    "or score (for QUESTION_ANS: qa_outputs): if one has, peft refuses "
                    "the file, because the task_type has it look for this trained "
                    "head, which the file lacks; task_type null leaves it to the base",
                    _TASKS,
                ),
                "changed base": Rule(
                    UNKNOWN, "whether it changes the base in the same way again", _PEFT
                ),
            },
        ),
        Loader(
            "vLLM",
            _config_rank,
            Rule(SCALED, "it takes r and lora_alpha for all modules", _VLLM),
            {
                "method": Rule(REFUSED, "it needs r and lora_alpha of LoRA", _VLLM),
                "dora": Rule(REFUSED, "it does not support DoRA", _VLLM),
                "saved modules": Rule(REFUSED, "modules_to_save must be None", _VLLM),
                "trained bias": Rule(
                    REFUSED, "adapter bias is not supported", _VLLM_BIAS
                ),
                "bias": Rule(REFUSED, "it removed biases of adapters", _VLLM_BIAS),
                "alpha pattern": Rule(IGNORED, "it reads no alpha_pattern", _VLLM),
            },
        ),
        Loader(
            "SGLang",
            _plain_config,
            Rule(
                SCALED,
                "it computes lora_alpha / r for all modules",
                "sglang/srt/lora/lora.py: LoRAAdapter @ 002c60aa",
            ),
            {
                "method": Rule(
                    REFUSED,
                    "peft_type must be LORA",
                    "sglang/srt/lora/lora.py @ 002c60aa",
                ),
                "dora": Rule(
                    REFUSED,
                    "it does not support DoRA",
                    "sglang pull request 22125, 2026-04-04",
                ),
                "rank pattern": Rule(REFUSED, "it admits one rank", _SGLANG),
                "alpha pattern": Rule(REFUSED, "it admits one alpha", _SGLANG),
            },
        ),
        Loader(
            "llama.cpp",
            _plain_tensor,
            Rule(SCALED, "its converter writes lora_alpha alone", _LLAMA),
            {
                "method": Rule(REFUSED, _NO_PAIRS, _LLAMA),
                "dora": Rule(REFUSED, "a magnitude is no A and no B", _LLAMA),
                "half pair": Rule(REFUSED, "its converter needs A and B", _LLAMA),
                "bias": Rule(REFUSED, "a bias is no A and no B", _LLAMA),
                "trained bias": Rule(REFUSED, "a bias is no A and no B", _LLAMA),
                "saved modules": Rule(REFUSED, "a whole tensor is no A, no B", _LLAMA),
                "rank pattern": Rule(EXACT, "the rank is that of the tensor", _LLAMA),
                "alpha pattern": Rule(IGNORED, "it reads no alpha_pattern", _LLAMA),
                "embedding": Rule(EXACT, "it turns lora_embedding_A", _LLAMA),
            },
        ),
        Loader(
            "Ollama",
            _not_known,
            Rule(UNKNOWN, "", ""),
            {"any": Rule(REFUSED, "0.34.1 and later build no ADAPTER line", _OLLAMA)},
        ),
        Loader(
            "TensorRT-LLM",
            _tensor_rank,
            Rule(SCALED, "it takes lora_alpha for all modules", _TENSORRT),
            {
                "bias": Rule(REFUSED, "it knows no key lora_B.bias", _TENSORRT),
                "rank pattern": Rule(
                    EXACT, "the rank is that of the tensor", _TENSORRT
                ),
                "alpha pattern": Rule(IGNORED, "it reads no alpha_pattern", _TENSORRT),
                "embedding": Rule(IGNORED, "it skips keys of embed_tokens", _TENSORRT),
            },
        ),
        Loader(
            "diffusers",
            _one,
            Rule(
                SCALED,
                "it reads no adapter_config.json and takes alpha = r",
                "diffusers pull request 14409, 2026-08-06",
            ),
            {
                "any": Rule(
                    UNKNOWN,
                    "whether it finds keys that begin with base_model.model.",
                    "diffusers: src/diffusers/loaders/peft.py @ 01e87ccf",
                ),
                "dora": Rule(EXACT, "it finds magnitudes by their names", _DIFFUSERS),
                "bias": Rule(EXACT, "it asks peft for lora_bias", _DIFFUSERS_BIAS),
                "rank pattern": Rule(
                    EXACT, "the rank is that of the tensor", _DIFFUSERS
                ),
                "alpha pattern": Rule(
                    IGNORED, "it reads no adapter_config.json", _DIFFUSERS
                ),
            },
        ),
        Loader(
            "MLX",
            _not_known,
            Rule(UNKNOWN, "", ""),
            {"any": Rule(REFUSED, "it needs num_layers and its own file names", _MLX)},
        ),
    )
}


@dataclass(frozen=True)
class Judgement:
    """The result for an adapter in one loader.

    Args:
        loader: its name.
        verdict: the worst of exact, scaled, ignored, not known, refused.
        sentence: what happens, with the reason.
        sources: of the rules that were used.
    """

    loader: str
    verdict: str
    sentence: str
    sources: tuple[str, ...]

    @property
    def lost(self) -> bool:
        """Whether the loader loses something, as far as is known."""
        return self.verdict != EXACT


def judge(loader: Loader, contents: Parts, architecture: str = "") -> Judgement:
    """Judge how a loader loads an adapter: exactly, changed, or not at all."""
    features = present(contents, architecture)
    rules = {f: loader.rules[f] for f in ("any", *features) if f in loader.rules}
    refused = [rule for rule in rules.values() if rule.outcome == REFUSED]
    if refused:
        reasons = "; ".join(dict.fromkeys(rule.reason for rule in refused))
        return Judgement(loader.name, REFUSED, f"refuses: {reasons}", _sources(refused))
    wrong = scales(loader, contents)
    # An ignored pattern appears as a wrong scale of a layer.
    lost = [
        feature
        for feature, rule in rules.items()
        if rule.outcome == IGNORED and feature != "alpha pattern"
    ]
    # A head that is not in the file comes with an architecture that is no causal one.
    unclear = [f for f in features if f not in rules and f != "no head"]
    parts = [f"ignores {features[f]}: {rules[f].reason}" for f in lost]
    parts += [f"not known for {features[f]}" for f in unclear]
    doubts = [rule.reason for rule in rules.values() if rule.outcome == UNKNOWN]
    parts += [f"not known {doubt}" for doubt in doubts]
    if wrong:
        parts.insert(0, f"loads with {_factors(wrong)}: {loader.scale_rule.reason}")
    open_ = UNKNOWN if unclear or doubts else EXACT
    verdict = IGNORED if lost else SCALED if wrong else open_
    sentence = "; ".join(parts) or "loads exactly"
    used = [loader.scale_rule, *rules.values()]
    return Judgement(loader.name, verdict, sentence, _sources(used))


def _sources(rules: list[Rule]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.source for rule in rules))


def scales(loader: Loader, contents: Parts) -> dict[str, float]:
    """Return {module: factor} where a loader's scale is not the adapter's."""
    found: dict[str, float] = {}
    if contents.config.get("peft_type") != "LORA":
        return found
    for module in _pairs(contents):
        right = contents.scaling(module)
        factor = loader.scale(contents, module) / right if right else 1.0
        if abs(factor - 1) > 2.0**-40:  # two quotients of the same numbers, in float64
            found[module] = factor
    return found


def _factors(wrong: dict[str, float]) -> str:
    """Return "scale × 4 on 6 layers (first NAME)", for each factor."""
    groups: dict[str, list[str]] = {}
    for module, factor in wrong.items():
        groups.setdefault(f"{factor:.4g}", []).append(module)
    return ", ".join(
        f"scale × {factor} on {len(modules)} layers (first {modules[0]})"
        for factor, modules in groups.items()
    )
