"""No adapters are made for layers whose weights accelerate has put elsewhere."""

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch.bottleneck import BottleneckConfig, place_beside
from minipeft.torch.inject import adapted, add, trainable_parameters
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from tests.agreement.llama import TEXT, llama
from tests.properties.test_torch_programs import (
    ROWS,
    Model,
    each_row,
    make,
    plain,
    start,
)


@pytest.mark.parametrize("buffers", [False, True])
@each_row
def test_a_layer_that_is_offloaded_gets_no_adapter_that_lies_nowhere(row, buffers):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model = plain(row)
    expected = model(x).detach()
    accelerate.cpu_offload(model, "cpu", offload_buffers=buffers)
    if "bits" in row and not buffers:  # the codes are buffers and stay
        start(model, row)
        assert not any(p.is_meta for p in trainable_parameters(model))
    else:
        with pytest.raises(InputError, match=r"^0 is offloaded: .* offload it then"):
            start(model, row)
        assert not adapted(model)
    assert torch.equal(model(x), expected)


def test_another_adapter_and_one_beside_need_memory_too():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = accelerate.cpu_offload(make("lora"), "cpu")
    with pytest.raises(InputError, match=r"^0 is offloaded"):
        add(model, ROWS["lora"], "second")
    assert [[*layer.adapters] for layer in adapted(model).values()] == [["default"]] * 2
    model = accelerate.cpu_offload(Model(), "cpu")
    with pytest.raises(InputError, match=r"^0 is offloaded"):
        place_beside(model, BottleneckConfig(3), ["0"], 6)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("config", [PromptConfig(3), PrefixConfig(3)])
def test_virtual_tokens_need_memory_too(config):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    accelerate.cpu_offload(model, "cpu")
    around = PromptModel if isinstance(config, PromptConfig) else PrefixModel
    with pytest.raises(InputError, match=r"^LlamaForCausalLM is offloaded"):
        around(model, config)


VIRTUAL = {
    "prompt": lambda model: PromptModel(model, PromptConfig(3)),
    "prefix": lambda model: PrefixModel(model, PrefixConfig(3)),
    "prefix with a network": lambda m: PrefixModel(m, PrefixConfig(3, hidden=5)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", list(VIRTUAL))
def test_virtual_tokens_work_around_an_offloaded_model_or_say_how(kind, tied):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def made():
        model = llama()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        torch.manual_seed(1)
        return VIRTUAL[kind](model)

    with torch.no_grad():
        y, text = made()(TEXT).logits, made().generate(TEXT, max_new_tokens=3)
        inside, whole = made(), made()
        accelerate.cpu_offload(inside.model, "cpu")
        assert torch.equal(inside(TEXT).logits, y)
        assert torch.equal(inside.generate(TEXT, max_new_tokens=3), text)
        with torch.autocast("cpu", torch.bfloat16):
            assert inside(TEXT).logits.dtype == made()(TEXT).logits.dtype
        accelerate.cpu_offload(whole, "cpu")
        if tied:
            with pytest.raises(
                InputError, match=r"^model\.lm_head\.weight is offloaded"
            ):
                whole(TEXT)
            with pytest.raises(InputError, match=r"is offloaded, .* inside alone"):
                whole.generate(TEXT, max_new_tokens=3)
            return
        assert torch.equal(whole(TEXT).logits, y)
        if "network" in kind:  # a module that is called
            assert torch.equal(whole.generate(TEXT, max_new_tokens=3), text)
        else:
            with pytest.raises(InputError, match=r"^P is offloaded, .* inside alone"):
                whole.generate(TEXT, max_new_tokens=3)
