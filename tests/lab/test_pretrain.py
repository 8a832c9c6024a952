"""The committed model is made by its recipe, small, and trained."""

import json
import math

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import pretrain
from minipeft.lab.data import AUSTEN_TRAIN, HELD_OUT, austen, checksums, sha256
from minipeft.lab.models import TINY, random_like
from minipeft.lab.text import consecutive, encode
from minipeft.lab.train import History, loss


def recipe():
    return json.loads((TINY / "recipe.json").read_text())


def test_the_recipe_names_the_data_that_is_here():
    sums = checksums()
    files = {f"{novel}.txt.xz" for novel in (*AUSTEN_TRAIN, HELD_OUT)}
    assert recipe()["data"] == {name: sums[name] for name in files}
    assert recipe()["held_out"] == HELD_OUT


def test_the_recipe_is_the_code_s(tiny):
    fields = recipe()["hyperparameters"]
    fields["betas"] = tuple(fields["betas"])
    assert pretrain.Recipe(**fields) == pretrain.Recipe()
    config = pretrain.architecture(pretrain.Recipe(), tiny.tokenizer).to_dict()
    stored = tiny.model.config.to_dict()
    own = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in stored.items() if k not in own} == {
        k: v for k, v in config.items() if k not in own
    }


def test_the_weights_are_those_that_were_measured(tiny):
    measured = recipe()["measured"]
    data = (TINY / "model.safetensors").read_bytes()
    assert sha256(data) == measured["weights_sha256"]
    parameters = list(tiny.model.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert sum(p.numel() for p in parameters) == measured["parameters"]


def test_the_loss_curve_belongs_to_the_recipe():
    history = History.load(TINY / "loss_curve.json")
    measured = recipe()["measured"]
    assert len(history.losses) == recipe()["hyperparameters"]["steps"]
    assert history.validation[-1][1] == measured["validation_loss"]
    assert round(history.seconds) == measured["seconds"]


def test_the_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "loss_curve.json",
        "model.safetensors",
        "recipe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 5_000_000


def test_the_tokenizer_gives_every_text_back(tiny):
    tokenizer = tiny.tokenizer
    text = "Emma's £5 -- naïve, \t 漢字 & so on.\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("Emma")[0] == tokenizer.bos_token_id
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<s>", "</s>", "<pad>")
    assert len(tokenizer) == 1024


def test_it_has_learned_english_that_it_never_read(tiny):
    """Its loss is far below chance, and below that of the same words shuffled."""
    passage = austen(HELD_OUT)[100_000:112_000]
    words = passage.split()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(words), generator=generator).tolist()
    shuffled = " ".join(words[i] for i in order)
    bos = tiny.tokenizer.bos_token_id
    ours, noise = (
        loss(tiny.model, consecutive(encode(tiny.tokenizer, [t]), (8, 256), bos))
        for t in (passage, shuffled)
    )
    tokens = consecutive(encode(tiny.tokenizer, [passage]), (8, 256), bos)
    untrained = loss(random_like(tiny.model), tokens)
    assert ours < noise - 1 < untrained - 1
    assert ours < math.log(1024) / 2


def test_another_width_keeps_the_shape_of_the_recipe(tiny):
    assert pretrain.sized(128) == pretrain.Recipe()
    small = pretrain.sized(32, steps=1800, seed=2)
    config = pretrain.architecture(small, tiny.tokenizer)
    assert config.intermediate_size == 3 * config.hidden_size == 96
    assert config.head_dim * config.num_attention_heads == 32
    assert (small.warmup, small.steps, small.seed) == (100, 1800, 2)
    assert (
        pretrain.folder(pretrain.Recipe()) == pretrain.base(pretrain.Recipe()) == TINY
    )
    other = pretrain.sized(32, steps=1800, seed=3)
    assert len({pretrain.folder(r) for r in (small, other, pretrain.Recipe())}) == 3


@pytest.mark.parametrize("width", [0, 20, -8])
def test_a_width_that_the_heads_do_not_divide_is_refused(width):
    with pytest.raises(InputError, match=f"width is {width}; give a multiple of 8"):
        pretrain.sized(width)
