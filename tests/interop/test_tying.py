"""Tied weights stay tied, or are untied and the configuration says so."""

import copy
import json

import pytest
import torch

from minipeft import cli
from minipeft.interop import tying
from minipeft.interop.tensors import open_tensors
from tests.agreement.llama import TEXT, llama, logit_bound
from tests.interop import peers
from tests.tolerance import assert_within

peft = pytest.importorskip("peft")

CASES = {
    "body": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embedding saved whole": {"modules_to_save": ["embed_tokens"]},
    "tied": {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "ensure_weight_tying": True,
    },
    "tied, saved whole": {
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
}
KEPT = {"body", "tied", "tied, saved whole"}


def tied():
    """Return the Llama with one weight for embedding and head."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(llama().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("case", CASES)
def test_the_merged_folder_computes_what_peft_computes(case, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = tied()
    theirs = peers.trained(model, peers.lora(**CASES[case]))
    with peers.quiet():
        model.save_pretrained(tmp_path / "base")
        peers.saved(theirs, tmp_path / "adapter")
    assert "lm_head.weight" not in open_tensors(tmp_path / "base").about
    given = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter"]
    out = tmp_path / "merged"
    assert cli.main([*map(str, ("merge", *given, "--out", out))]) == 0
    found = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        expected, got = peers.logits(theirs), found(TEXT).logits
    assert_within(got.numpy(), expected.numpy(), logit_bound(found, expected))
    kept = case in KEPT
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] == kept
    assert ("lm_head.weight" in open_tensors(out).about) == (not kept)
    capsys.readouterr()
    assert cli.main([*map(str, ("audit", *given, "--merged", out))]) == 0
    if not kept:
        _lose_the_head(out)
        assert cli.main([*map(str, ("audit", *given, "--merged", out))]) == 1
        assert "head untied and lost" in capsys.readouterr().out


def _lose_the_head(folder):
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, path)


def test_what_ties_is_read_from_the_configuration(tmp_path):
    path = tmp_path / "config.json"
    for config, expected in (
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False, "architectures": ["XForCausalLM"]}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["BertModel"]}, False),
        ({}, False),
        ([], False),
    ):
        path.write_text(json.dumps(config))
        assert tying.ties(tmp_path) == expected, config
    path.unlink()
    assert not tying.ties(tmp_path)
    inside = {"text_config": {"tie_word_embeddings": True}, "limit": 3}
    tying.untie(inside)
    assert inside["text_config"] == {"tie_word_embeddings": False}
