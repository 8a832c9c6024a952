"""Published figures, parameter counts, and the bytes that autograd keeps."""

import pytest
import torch
import transformers
from torch import nn

from minipeft.errors import InputError
from minipeft.lab import memory
from minipeft.lab.memory import (
    ATTENTION,
    FEEDFORWARD,
    LINEARS,
    LLAMA_7B,
    Adapter,
    Architecture,
    Precision,
)
from minipeft.torch.inject import inject
from minipeft.torch.linear import weight_of
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.targets import all_linear
from minipeft.torch.virtual import VirtualTokens
from tests.lab import architectures

LLAMA_3_2_3B = Architecture(28, 3072, 8192, 24, 8, 128256, 128)
LLAMA_65B = Architecture(80, 8192, 22016, 64, 64, 32000, 128, tied=False)


def test_parameter_counts_are_the_published_ones():
    assert LLAMA_3_2_3B.parameters == 3_212_749_824
    assert LLAMA_7B.parameters == 6_738_415_616
    assert LLAMA_65B.parameters == 65_285_660_672


def test_full_fine_tuning_takes_twelve_bytes_a_parameter():
    """QLoRA, abstract: 65B needs more than 780 GB. Two, two, and Adam's eight."""
    sixteen = Precision(weights=2, gradients=2, states=8, activations=2)
    need = memory.training_memory(LLAMA_65B, (1, 1), precision=sixteen)
    kept = need.weights + need.gradients + need.optimizer
    assert kept == 12 * LLAMA_65B.parameters
    assert 12 * 65e9 == 780e9
    assert need.total == kept + need.activations


def test_double_quantization_saves_what_the_paper_says():
    """QLoRA, section 3: 0.5 to 0.127 bit a parameter, 0.373 saved, 3 GB at 65B."""
    once = memory.quantized_bits()
    twice = memory.quantized_bits(nested_blocksize=256)
    assert once == 4.5
    assert twice == 4.126953125
    assert once - twice == 0.373046875
    assert round(65e9 * (once - twice) / 8 / 1e9, 2) == 3.03


@pytest.mark.parametrize(
    ("r", "targets", "count"),
    [(32, ("q_proj", "v_proj"), 9_175_040), (64, ("q_proj", "v_proj"), 18_350_080)],
)
def test_lora_counts_are_those_of_the_peft_benchmark(r, targets, count):
    assert memory.adapter_parameters(LLAMA_3_2_3B, Adapter(r, targets)) == count


@pytest.mark.parametrize(
    ("layers", "width", "mebibytes"),
    [(32, 4096, 1152), (40, 5120, 1800), (60, 6656, 3510), (80, 8192, 5760)],
)
def test_qlora_adam_states_are_those_of_the_paper_s_memory_figure(
    layers, width, mebibytes
):
    """QLoRA's memory figure: 8 bytes, r = 64, and an MLP of two matrices 4d wide.

    With that MLP in place of SwiGLU's three matrices (up and down only).
    """
    model = Architecture(layers, width, 4 * width, 64, 64, 1, width // 64)
    two_matrices = (*ATTENTION, "up_proj", "down_proj")
    trained = memory.adapter_parameters(model, Adapter(64, two_matrices))
    assert 8 * trained == mebibytes * 2**20


def test_qlora_keeps_only_the_linear_layers_in_four_bits():
    bits = memory.quantized_bits(nested_blocksize=256)
    use = Precision(weights=bits / 8, gradients=2, states=8, activations=2)
    adapter = Adapter(64)
    need = memory.training_memory(LLAMA_7B, (1, 512), adapter, use)
    rest = LLAMA_7B.parameters - LLAMA_7B.linear_parameters
    trained = memory.adapter_parameters(LLAMA_7B, adapter)
    assert trained == 159_907_840
    base = LLAMA_7B.linear_parameters * bits / 8 + rest * 2
    assert need.weights == base + 2 * trained
    assert need.gradients == 2 * trained
    assert need.optimizer == 8 * trained


FAMILIES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
]
TO_THE_BYTE = FAMILIES[:4]
WITHIN = 0.15
"""The band of the activations in the other families."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameters_of_every_family_are_counted_exactly(name):
    model = architectures.build(name)
    sizes = memory.of_model(model)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    layers = all_linear(model).values()
    linears = sum(weight_of(layer).numel() for layer in layers)
    assert sizes.linear_parameters == linears
    stacks = [p for p in model.parameters() if p.ndim > 2]
    assert sizes.expert_parameters == sum(p.numel() for p in stacks)


@pytest.mark.parametrize("whole", [True, False], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_activations_of_every_family(name, whole):
    model = architectures.build(name).requires_grad_(True)
    sizes, ids = memory.of_model(model), torch.randint(3, 64, (2, 24))
    adapter = None if whole else Adapter(4)
    if adapter:
        inject(model, LoRAConfig(4, 8), "all-linear")
    eager = model.config._attn_implementation == "eager"
    kind = "eager" if eager else "fused"
    counted = memory.activation_memory(sizes, (2, 24), adapter, attention=kind)
    kept = kept_by_autograd(model, ids)
    if name in TO_THE_BYTE:
        assert kept == counted
    assert abs(kept / counted - 1) < WITHIN


def test_architecture_of_tiny_counts_its_parameters(tiny):
    model = memory.of_model(tiny.model)
    assert model.parameters == sum(p.numel() for p in tiny.model.parameters())


def kept_by_autograd(model, ids):
    """Add up the storages that the graph holds, each once, without the model's own."""
    tensors = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    # Virtual tokens need a cache, which copies keys and values; other models need none.
    call = {} if isinstance(model, VirtualTokens) else {"use_cache": False}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor  # alive, so no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids, **call)
    model.eval()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("tokens", [(2, 16), (3, 33), (4, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_full_fine_tuning_to_the_byte(tiny, tokens, dtype):
    model = transformers.LlamaForCausalLM(tiny.model.config).to(dtype)
    ids = torch.randint(0, 1024, tokens)
    expected = memory.activation_memory(
        memory.of_model(model), tokens, bytes_per_value=dtype.itemsize
    )
    assert kept_by_autograd(model, ids) == expected


class _LoRA(nn.Module):
    """A plain LoRA: the test measures autograd, not an implementation."""

    def __init__(self, base, r):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(r, base.in_features))
        self.B = nn.Parameter(torch.randn(base.out_features, r))

    def forward(self, x):
        return self.base(x) + 0.5 * ((x @ self.A.T) @ self.B.T)


def with_adapters(config, adapter):
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for parent, names in ((layer.self_attn, ATTENTION), (layer.mlp, FEEDFORWARD)):
            for name in set(names) & set(adapter.targets or LINEARS):
                setattr(parent, name, _LoRA(getattr(parent, name), adapter.r))
    return model


@pytest.mark.parametrize(
    "targets",
    [
        LINEARS,
        ("q_proj", "v_proj"),
        ("k_proj", "gate_proj"),
        ("v_proj", "down_proj"),
        ("down_proj",),
        ("o_proj",),
        ("up_proj",),
        ("gate_proj",),
    ],
)
def test_activations_of_adapters_to_the_byte(tiny, targets):
    adapter = Adapter(5, targets)
    model = with_adapters(tiny.model.config, adapter)
    sizes = memory.of_model(tiny.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == memory.adapter_parameters(sizes, adapter)
    ids = torch.randint(0, 1024, (2, 16))
    expected = memory.activation_memory(sizes, (2, 16), adapter)
    assert kept_by_autograd(model, ids) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_lora_keeps_what_is_counted_to_the_byte(tiny, dtype):
    adapter, tokens = Adapter(5), (2, 16)
    model = transformers.LlamaForCausalLM(tiny.model.config).to(dtype)
    inject(model, LoRAConfig(adapter.r, alpha=8), LINEARS)
    sizes = memory.of_model(tiny.model)
    # A and B are float32 on any base, and so are the values between them.
    expected = memory.activation_memory(sizes, tokens, adapter, dtype.itemsize)
    ids = torch.randint(0, 1024, tokens)
    assert kept_by_autograd(model, ids) == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, LINEARS), "the rank is 0"),
        ((8, ("query",)), "targets are .*query.*; choose from q_proj, "),
        ((8, ()), "targets are "),
    ],
)
def test_bad_adapters_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        Adapter(*arguments)
