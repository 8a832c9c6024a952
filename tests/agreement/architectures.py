"""Tiny random models of transformers' classes, for tests of virtual tokens."""

import torch

WIDTH = 16
COMMON = {
    "vocab_size": 48,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 1}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HALVES = {"layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    **COMMON,
    **{"num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 2},
    **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "kv_lora_rank": 8},
    **{"q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
}
BERT = {k: v for k, v in COMMON.items() if k != "eos_token_id"}

WORK = {
    "Llama": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 32},
    "Gemma3": {**GROUPED, "head_dim": 8, "sliding_window": 32, **HALVES},
    "Mistral": {**GROUPED, "sliding_window": 32},
    "Phi": COMMON,
    "GPT2": {"vocab_size": 48, "n_embd": WIDTH, "n_layer": 2, "n_head": 2},
    "GPTNeoX": COMMON,
    "OPT": {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": WIDTH},
    "Falcon": COMMON,
    "Bloom": {"vocab_size": 48, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2},
    "Mixtral": {**GROUPED, **EXPERTS},
    "DeepseekV3": LATENT,
    "GptOss": {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": 32, **HALVES},
}
# What a prefix, and what a prompt, says of other models; None: it works.
SAY = {
    "Lfm2ForCausalLM": (
        {**GROUPED, "layer_types": ["conv", "full_attention"]},
        "layer 0 of Lfm2ForCausalLM keeps another state than keys and values",
        None,
    ),
    "Gemma4ForCausalLM": (
        {
            **{**GROUPED, "vocab_size_per_layer_input": 48, "head_dim": 8, **HALVES},
            **{"hidden_size_per_layer_input": 8, "sliding_window": 8},
        },
        None,
        "looks up more embeddings of a token in each layer",
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1},
        *["reads its text with an encoder"] * 2,
    ),
    "WhisperForConditionalGeneration": (
        {"vocab_size": 48, "d_model": 24, "pad_token_id": 0},
        *["reads its text with an encoder"] * 2,
    ),
    "BertForMaskedLM": (BERT, *["no causal language model"] * 2),
    "BertForSequenceClassification": (BERT, *["no causal language model"] * 2),
    "ViTForImageClassification": (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        *["no causal language model"] * 2,
    ),
}


def build(name, settings):
    """Return a model in float64, so that rounding explains no difference."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # GPT-OSS leaves some uninitialized
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.set_experts_implementation("eager")  # others know no float64
    return model.double().eval()


def causal(name):
    """Return a causal language model of a class that works."""
    suffix = {"GPT2": "LMHeadModel"}.get(name, "ForCausalLM")
    return build(f"{name}{suffix}", WORK[name])
