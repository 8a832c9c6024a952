"""Adapters made by peft on small models, and the same models without them."""

import copy
import warnings
from contextlib import contextmanager

import torch

from tests.agreement.llama import TEXT, llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


@contextmanager
def quiet():
    """Silence warnings of the library about itself and its imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def biased():
    """Return the Llama whose attention has biases, none of them zero."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(llama().config)
    config.attention_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def gpt2():
    """Return a model whose layers store the transpose of their weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return GPT2LMHeadModel(config).eval()


def trained(model, config, seed=5):
    """Return a model of peft with every trained number changed."""
    import peft

    with quiet():
        made = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def lora(**settings):
    import peft

    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
    return peft.LoraConfig(**{**given, "task_type": "CAUSAL_LM", **settings})


def saved(model, folder):
    with quiet():
        model.save_pretrained(folder)
    return folder


def reloaded(model, folder):
    """Return the model that peft makes from a folder."""
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@torch.no_grad()
def logits(model, prompt=0):
    """Return the logits of a text; peft puts those of a soft prompt before them."""
    with quiet():
        return model(TEXT).logits[:, prompt:]
