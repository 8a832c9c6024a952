"""No adapters are made for weights that lie elsewhere: offloaded, or on processes."""

from contextlib import contextmanager

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)

from minipeft.errors import InputError
from minipeft.interop import adapterhub_format, peft_model
from minipeft.torch.bottleneck import BottleneckConfig, place_beside
from minipeft.torch.inject import (
    adapted,
    adapter_state_dict,
    add,
    inject,
    load_adapter_state_dict,
    trainable_parameters,
)
from minipeft.torch.lora import LoRA
from minipeft.torch.lora_batched import Pool
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
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


@pytest.mark.parametrize("bits", [4, 32])
def test_a_pool_serves_no_layer_that_is_offloaded(bits):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model = quantize_linears(model) if bits == 4 else model
    expected, requests = model(x).detach(), ["a", None, "a"]
    sentence = r"^0 is offloaded: its tensors come in for .* bring the model back first"
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    with pytest.raises(InputError, match=sentence):
        Pool(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    pool = Pool(model)
    pool.add("a", {"0": LoRA(torch.ones(2, 6), torch.ones(6, 2), 1.0)})
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    with pytest.raises(InputError, match=sentence):
        pool.serve(requests).__enter__()
    assert not pool.requests
    assert torch.equal(model(x), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    with pool.serve(requests):
        assert torch.equal(model(x)[1], expected[1])


@pytest.mark.parametrize("config", [PromptConfig(3), PrefixConfig(3)])
def test_virtual_tokens_need_memory_too(config):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    accelerate.cpu_offload(model, "cpu")
    around = PromptModel if isinstance(config, PromptConfig) else PrefixModel
    sentence = r"^LlamaForCausalLM is offloaded: its tensors come in for a call alone"
    with pytest.raises(InputError, match=sentence):
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


@contextmanager
def one_process():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def by_columns(model):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = distributed.init_device_mesh("cpu", (1,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel()})


def each_layer(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return model


def fully_shard(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


DISTRIBUTED = {
    "FSDP2": (fully_shard, r"^(FSDPModel|FSDPLlamaForCausalLM) is sharded over "),
    "FSDP2, layer by layer": (each_layer, "^0 is sharded over processes: each process"),
    "tensor parallel": (by_columns, "^0 is sharded over processes"),
    "DDP": (
        nn.parallel.DistributedDataParallel,
        "^DistributedDataParallel is copied to processes: .* adapt the model first",
    ),
}


@pytest.mark.parametrize("how", list(DISTRIBUTED))
@each_row
def test_a_model_that_is_distributed_is_adapted_before(row, how):
    """Adapters made now would be each process's own, and drift apart in silence."""
    if "bits" in row and how != "DDP":
        return  # codes are buffers, which FSDP2 and tensor parallel leave alone
    distribute, sentence = DISTRIBUTED[how]
    with one_process():
        model = plain(row)
        model[0].bias.requires_grad_(True)  # DDP wants something that trains
        model = distribute(model)
        with pytest.raises(InputError, match=sentence):
            inject(model, ROWS[row], ["0", "2"])
        assert not adapted(model)
        if row == "lora":
            inner = model.module if how == "DDP" else model
            if how != "DDP":
                with pytest.raises(InputError, match="0: the weight is sharded over"):
                    quantize_linears(inner)
            with pytest.raises(InputError, match=sentence):
                place_beside(model, BottleneckConfig(3), ["0"], 6)


def test_adapters_that_are_distributed_get_no_other_and_no_whole_file():
    with one_process():
        model = make("lora")
        saved = adapter_state_dict(make("lora"))
        for layer in adapted(model).values():
            fully_shard(layer.adapters["default"])
        with pytest.raises(
            InputError, match=r"^0\.adapters\.default is sharded over pro"
        ):
            add(model, ROWS["lora"], "second")
        before = [p.to_local().clone() for p in trainable_parameters(model)]
        with pytest.raises(
            InputError, match=r"^0\.A of the model is sharded, and the on"
        ):
            load_adapter_state_dict(model, {k: t + 1 for k, t in saved.items()})
        now = [p.to_local() for p in trainable_parameters(model)]
        assert all(map(torch.equal, now, before))
        whole = {f"0.adapters.default.{n}": saved[f"0.{n}"] + 1 for n in "AB"}
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, whole, options=options)  # the remedy
        A = model[0].adapters["default"].A.to_local()
        assert torch.equal(A, saved["0.A"] + 1)


@pytest.mark.parametrize("config", [PromptConfig(3), PrefixConfig(3)])
def test_virtual_tokens_are_made_before_a_model_is_distributed(config):
    around = PromptModel if isinstance(config, PromptConfig) else PrefixModel
    with one_process():
        model = fully_shard(llama())
        with pytest.raises(InputError, match=DISTRIBUTED["FSDP2"][1]):
            around(model, config)


@pytest.mark.parametrize("way", ["offloaded", "FSDP2"])
def test_files_of_adapters_are_loaded_before_a_model_lies_elsewhere(way, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    peft_model.save(inject(llama(), ROWS["lora"], ["q_proj"]), tmp_path / "peft")
    serial = inject(llama(), BottleneckConfig(2), ["o_proj", "down_proj"])
    adapterhub_format.save(serial, tmp_path / "hub")
    sentence = {"offloaded": "is on the device meta", "FSDP2": "is sharded over"}[way]
    unknown = {"offloaded": "is offloaded: its tens", "FSDP2": "is sharded over"}[way]
    with one_process():
        for load, kind in ((peft_model.load, "peft"), (adapterhub_format.load, "hub")):
            model = llama()
            if way == "offloaded":
                accelerate.cpu_offload(model, "cpu")
            else:
                fully_shard(model)
            before = [p.requires_grad for p in model.parameters()]
            with pytest.raises(
                InputError, match=f"{sentence}.*identify the base|{unknown}"
            ):
                load(model, tmp_path / kind)
            with pytest.raises(InputError, match=unknown):
                load(model, tmp_path / kind, allow_base_mismatch=True)
            assert not adapted(model)
            assert [p.requires_grad for p in model.parameters()] == before


def test_placeholders_are_never_given_out_as_adapters(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = inject(llama(), ROWS["lora"], ["q_proj"])
    serial = inject(llama(), BottleneckConfig(2), ["o_proj", "down_proj"])
    before = {key: t.clone() for key, t in adapter_state_dict(model).items()}
    tokens = PromptModel(llama(), PromptConfig(3))
    for one in (model, serial, tokens):
        accelerate.cpu_offload(one, "cpu")
    sentence = r"^model\.layers\.0\..* has no values here: .* \(accelerate: remove_hook"
    for give in (
        lambda: adapter_state_dict(model),
        lambda: peft_model.save(model, tmp_path / "peft"),
        lambda: adapterhub_format.save(serial, tmp_path / "hub"),
    ):
        with pytest.raises(InputError, match=sentence):
            give()
    with pytest.raises(InputError, match=sentence):
        load_adapter_state_dict(model, before)
    with pytest.raises(InputError, match="identify the base; save and load adapters"):
        peft_model.save(tokens, tmp_path / "tokens")
    assert not [*tmp_path.iterdir()]
    accelerate.hooks.remove_hook_from_submodules(model)  # the remedy
    after = adapter_state_dict(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    peft_model.save(model, tmp_path / "peft")
    with torch.device("meta"):  # without a program that could bring it back
        nowhere = inject(Model(), ROWS["lora"], ["0"])
    with pytest.raises(InputError, match=r"^0\.A has no values here"):
        adapter_state_dict(nowhere)
