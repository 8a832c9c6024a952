"""A tokenizer in llama.cpp's form: tokens, kinds, merges, and the rule of splitting.

Only byte-level BPE. llama.cpp knows each rule of splitting a text by a name, and a
wrong name gives other tokens without a message.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from minipeft.errors import InputError

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    LLAMA3: "llama-bpe",
    LLAMA3.replace("{1,3}", ""): "qwen2",
}


def write(writer: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the vocabulary of a model's folder.

    Raises:
        InputError: there is no tokenizer.json, or llama.cpp has no name for the way in
            which it splits a text.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text("utf-8"))
        model = tokenizer["model"]
        vocabulary, merges = model["vocab"], model["merges"]
    except FileNotFoundError:
        raise InputError(f"there is no {path}; save the tokenizer with it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); get the file again") from None
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(
            f"{path} is no byte-level BPE, and llama.cpp needs its SentencePiece file; "
            "export safetensors, and convert them with llama.cpp's own script"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split(tokenizer, path))
    tokens, kinds = _tokens(tokenizer, vocabulary, int(config["vocab_size"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    pairs = [m if isinstance(m, str) else " ".join(m) for m in merges]
    writer.add_token_merges(pairs)
    _specials(writer, config, tokenizer)


def split(tokenizer: Mapping[str, Any], path: Path) -> str:
    """Return llama.cpp's name of the split before the merges."""
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise InputError(
        f"{path} splits a text in a way ({', '.join(map(str, kinds))}) for which no "
        "name of llama.cpp is known here; export safetensors, and convert them with "
        "llama.cpp's own script"
    )


def _tokens(
    tokenizer: Mapping[str, Any], vocabulary: Mapping[str, int], size: int
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for token, number in vocabulary.items():
        tokens[number], kinds[number] = token, NORMAL
    for added in tokenizer.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    return tokens, kinds


def _specials(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> None:
    for name in ("bos", "eos", "pad"):
        number = config.get(f"{name}_token_id")
        if isinstance(number, list):
            number = number[0]
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    processor = json.dumps(tokenizer.get("post_processor") or {})
    bos = config.get("bos_token_id")
    starts = bos is not None and '"TemplateProcessing"' in processor
    writer.add_add_bos_token(starts)
    writer.add_add_space_prefix(False)
