"""Tiny random models of real classes: what somebody's own folder may hold."""

import torch
import transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
EXPERTS = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}

# Class: the fields of its configuration.
CAUSAL = {
    "LlamaForCausalLM": SMALL,
    "MistralForCausalLM": SMALL,
    "Qwen2ForCausalLM": SMALL,
    "Qwen3ForCausalLM": {**SMALL, "head_dim": 8},
    "GemmaForCausalLM": {**SMALL, "head_dim": 8},
    "Gemma2ForCausalLM": {**SMALL, "head_dim": 8},
    "Gemma3ForCausalLM": {**SMALL, "head_dim": 8},
    "PhiForCausalLM": SMALL,
    "Phi3ForCausalLM": {**SMALL, "pad_token_id": 0},
    "GPT2LMHeadModel": GPT,
    "GPTNeoXForCausalLM": NEOX,
    "OPTForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "FalconForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "BloomForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
    },
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": {
        **SMALL,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "OlmoForCausalLM": SMALL,
    "Olmo2ForCausalLM": SMALL,
    "StableLmForCausalLM": SMALL,
    "Starcoder2ForCausalLM": SMALL,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "CohereForCausalLM": SMALL,
}


def build(name, **changes):
    """Return a model of this class with random weights, always the same."""
    kind = getattr(transformers, name)
    fields = {**CAUSAL[name], **changes}
    config = (
        kind.config_class(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        if "pad_token_id" not in fields
        else kind.config_class(**fields, bos_token_id=1, eos_token_id=2)
    )
    torch.manual_seed(0)
    return kind(config).eval()
