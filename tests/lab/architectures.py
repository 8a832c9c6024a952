"""Tiny random models of transformers' classes, as a user's folder may hold."""

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
    "GptOssForCausalLM": {**EXPERTS, "head_dim": 8, "intermediate_size": 32},
    "DeepseekV3ForCausalLM": {
        **SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "OlmoForCausalLM": SMALL,
    "Olmo2ForCausalLM": SMALL,
    "StableLmForCausalLM": SMALL,
    "Starcoder2ForCausalLM": SMALL,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "CohereForCausalLM": SMALL,
}


def build(name, **changes):
    """Return a model of this class with random weights from a fixed seed."""
    kind = getattr(transformers, name)
    fields = {**EVERY[name], **changes}
    config = (
        kind.config_class(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        if "pad_token_id" not in fields
        else kind.config_class(**fields, bos_token_id=1, eos_token_id=2)
    )
    torch.manual_seed(0)
    return kind(config).eval()


BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MORE_CAUSAL = {
    "Gemma4ForCausalLM": {
        **SMALL,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "MambaForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
        "time_step_rank": 4,
    },
    "RwkvForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "context_length": 64,
        "rescale_every": 0,  # else `eval()` divides weights in place
        "use_cache": False,  # else `eval()` writes to a state that gradients need
    },
    "xLSTMForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 128,  # a multiple of what the class rounds widths to
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "num_heads": 4,
        "chunk_size": 8,
    },
    "RecurrentGemmaForCausalLM": {
        **SMALL,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "Zamba2ForCausalLM": {
        **SMALL,
        "num_key_value_heads": 4,
        "mamba_d_state": 4,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
        "adapter_rank": 4,
        "chunk_size": 8,
    },
    "DbrxForCausalLM": {
        "vocab_size": 64,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "Lfm2ForCausalLM": {**SMALL, "layer_types": ["conv", "full_attention"]},
    "Qwen2MoeForCausalLM": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
OTHERS = {
    "T5ForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "BertForMaskedLM": BERT,
    "BertForSequenceClassification": BERT,
    "WhisperForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "decoder_start_token_id": 3,
    },
    "ViTForImageClassification": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 8,
        "patch_size": 4,
    },
}
EVERY = {**CAUSAL, **MORE_CAUSAL, **OTHERS}


def operands(name):
    """Return the inputs of a model, labels included."""
    ids = torch.arange(4, 16).reshape(2, 6)
    if name.startswith("Whisper"):
        torch.manual_seed(1)
        return {"input_features": torch.randn(2, 8, 32), "labels": ids}
    if name.startswith("ViT"):
        torch.manual_seed(1)
        return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
    if name.endswith("SequenceClassification"):
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": ids}
