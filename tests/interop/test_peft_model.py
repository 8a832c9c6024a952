"""peft's files, read and written: our results against those of peft."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.interop import adapterhub_format, loaders, parts, peft_folder, peft_model
from minipeft.interop.to_lora import to_lora
from minipeft.torch import inject
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.vera import VeRAConfig
from tests.agreement.llama import TEXT, llama, logit_bound
from tests.interop import peers
from tests.interop.peers import TARGETS
from tests.tolerance import assert_within

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")

LORA = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True, "r": 5},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"v_proj": 7},
    },
    "patterns, rank-stabilized": {"use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilized": {"use_dora": True, "use_rslora": True, "r": 3},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings, DoRA": {
        "target_modules": ["embed_tokens", "q_proj"],
        "use_dora": True,
    },
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved whole": {"modules_to_save": ["lm_head"]},
    "rows of tokens": {"trainable_token_indices": [3, 5]},
    "every linear layer": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"},
}
VERA = {"r": 8, "target_modules": TARGETS, "projection_prng_key": 3}


def config(case):
    if case in LORA:
        return peers.lora(**LORA[case])
    task = {"task_type": "CAUSAL_LM"}
    return {
        "VeRA": lambda: peft.VeraConfig(**VERA, **task),
        "IA3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            **task,
        ),
        "HiRA": lambda: peft.HiraConfig(
            r=4, target_modules=TARGETS, rank_pattern={"v_proj": 3}, **task
        ),
        "HiRA on embeddings": lambda: peft.HiraConfig(
            r=4, target_modules=["embed_tokens", "q_proj"], **task
        ),
        "MiSS": lambda: peft.MissConfig(r=8, target_modules=TARGETS, **task),
        "MiSS, uneven": lambda: peft.MissConfig(r=5, target_modules=TARGETS, **task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
    }[case]()


CASES = [*LORA, "VeRA", "IA3", "prompt", "prefix"]
CASES += ["HiRA", "HiRA on embeddings", "MiSS", "MiSS, uneven"]


def silent(line):
    pass


def assert_same_logits(model, found, expected):
    bound = logit_bound(model, expected)
    assert_within(found.numpy(), expected.numpy(), bound)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_gives_its_logits_and_is_written_back_bit_for_bit(
    case, tmp_path
):
    base = llama()
    theirs = peers.trained(base, config(case))
    folder = peers.saved(theirs, tmp_path / "theirs")
    expected = peers.logits(theirs, 3 if case == "prompt" else 0)
    assert not torch.equal(expected, peers.logits(base))
    mine = peft_model.load(llama(), folder, say=silent).eval()
    assert_same_logits(base, peers.logits(mine), expected)
    peft_model.save(mine, tmp_path / "mine")
    one, other = (peft_folder.read(tmp_path / f) for f in ("theirs", "mine"))
    assert_same_tensors(one.tensors, other.tensors)
    again = peers.reloaded(base, tmp_path / "mine")
    found = peers.logits(again, 3 if case == "prompt" else 0)
    assert torch.equal(found, expected)


def test_the_settings_are_written_back(tmp_path):
    theirs = peers.trained(llama(), config("patterns, rank-stabilized"))
    folder = peers.saved(theirs, tmp_path / "theirs")
    peft_model.save(peft_model.load(llama(), folder, say=silent), tmp_path / "mine")
    one, other = (peft_folder.read_config(tmp_path / f) for f in ("theirs", "mine"))
    for name in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "task_type"):
        assert one[name] == other[name], name
    assert sorted(one["target_modules"]) == sorted(other["target_modules"])
    assert set(other["rank_pattern"].values()) == {3}


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (peers.biased, {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
        (peers.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (peers.gpt2, {"target_modules": ["c_fc"], "use_dora": True, "r": 3}),
        (peers.gpt2, {"hira": 3, "target_modules": ["c_attn", "c_proj"]}),
    ],
)
def test_biases_and_transposed_layers(make, settings, tmp_path):
    base = make()
    r = settings.pop("hira", None)
    given = peft.HiraConfig(r=r, **settings) if r else peers.lora(**settings)
    theirs = peers.trained(base, given)
    folder = peers.saved(theirs, tmp_path / "theirs")
    mine = peft_model.load(make(), folder, say=silent).eval()
    assert_same_logits(base, peers.logits(mine), peers.logits(theirs))
    assert_same_logits(base, peers.logits(inject.merge(mine)), peers.logits(theirs))
    peft_model.save(mine, tmp_path / "mine")
    one, other = (peft_folder.read(tmp_path / f) for f in ("theirs", "mine"))
    assert_same_tensors(one.tensors, other.tensors)
    again = peers.reloaded(base, tmp_path / "mine")
    assert torch.equal(peers.logits(again), peers.logits(theirs))


def test_pissa_of_peft_needs_its_base_and_leaves_as_plain_lora(tmp_path):
    base = llama()
    theirs = peers.trained(base, peers.lora(init_lora_weights="pissa"))
    folder = peers.saved(theirs, tmp_path / "theirs")
    mine = peft_model.load(llama(), folder, say=silent).eval()
    assert_same_logits(base, peers.logits(mine), peers.logits(theirs))
    peft_model.save(mine, tmp_path / "mine")
    written = peft_folder.read_config(tmp_path / "mine")
    assert (written["r"], written["lora_alpha"]) == (8, 12)
    assert written["init_lora_weights"] is True
    again = peers.reloaded(base, tmp_path / "mine")
    assert_same_logits(base, peers.logits(again), peers.logits(theirs))


def test_loftq_leaves_as_lora_on_its_own_base(tmp_path):
    model = inject.inject(llama(), LoftQConfig(r=3, alpha=7, blocksize=16), TARGETS)
    quantized = inject.unload(copy.deepcopy(model))
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = peers.logits(model.eval())
    peft_model.save(model, tmp_path / "adapter")
    base = llama()
    for name, layer in inject.adapted(model).items():
        base.get_submodule(name).weight.data = layer.base.dequantize(torch.float32)
    theirs = peers.reloaded(base, tmp_path / "adapter")
    assert_same_logits(base, peers.logits(theirs), expected)
    said = []
    mine = peft_model.load(quantized, tmp_path / "adapter", say=said.append)
    assert "the base is the one" in said[0]
    assert_same_logits(base, peers.logits(mine.eval()), expected)
    with pytest.raises(InputError, match="another base"):
        peft_model.load(llama(), tmp_path / "adapter", say=silent)


def test_the_small_matrix_of_miss_serves_the_outputs_in_turn(tmp_path):
    settings = {"r": 8, "mini_r": 4, "init_weights": "mini", "target_modules": TARGETS}
    theirs = peers.trained(llama(), peft.MissConfig(**settings))
    folder = peers.saved(theirs, tmp_path / "theirs")
    mine = peft_model.load(llama(), folder, say=silent).eval()
    assert_same_logits(llama(), peers.logits(mine), peers.logits(theirs))
    peft_model.save(mine, tmp_path / "mine")
    again = peers.reloaded(llama(), tmp_path / "mine")
    assert_same_logits(llama(), peers.logits(again), peers.logits(theirs))


def test_a_miss_that_multiplies_the_weight_is_refused(tmp_path):
    settings = {"r": 8, "init_weights": "bat", "target_modules": ["q_proj"]}
    theirs = peers.trained(llama(), peft.MissConfig(**settings))
    folder = peers.saved(theirs, tmp_path / "theirs")
    model = llama()
    with pytest.raises(InputError, match="init_weights is 'bat'"):
        peft_model.load(model, folder, say=silent)
    assert not inject.adapted(model)


def test_one_rank_serves_all_layers_of_hira(tmp_path):
    model = inject.inject(llama(), HiRAConfig(r=3), TARGETS)
    layer = next(iter(inject.adapted(model).values()))
    adapter = layer.adapters["default"]
    adapter.A.data, adapter.B.data = adapter.A.data[:2], adapter.B.data[:, :2]
    with pytest.raises(InputError, match="r is 2 in one layer and 3 in another"):
        peft_model.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


OURS = {
    "LoRA": LoRAConfig(r=3, alpha=7, rank_stabilized=True, dropout=0.1),
    "DoRA": DoRAConfig(r=3, alpha=7),
    "VeRA": VeRAConfig(r=8, seed=4),
    "IA3": IA3Config(feedforward=["down_proj"]),
    "PiSSA": PiSSAConfig(r=3, alpha=7),
    "HiRA": HiRAConfig(r=3, scaling=0.7),
    "MiSS": MiSSConfig(r=5, dropout=0.1),
    "prompt": PromptConfig(num_virtual_tokens=3),
    "prefix": PrefixConfig(num_virtual_tokens=3, hidden=5),
}


def ours(method):
    if method == "prompt":
        model = PromptModel(llama(), OURS[method])
    elif method == "prefix":
        model = PrefixModel(llama(), OURS[method])
    else:
        model = inject.inject(llama(), OURS[method], TARGETS)
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("method", OURS)
def test_what_minipeft_trained_is_loaded_by_peft_and_by_minipeft(method, tmp_path):
    base, model = llama(), ours(method)
    peft_model.save(model, tmp_path / "adapter")
    theirs = peers.reloaded(base, tmp_path / "adapter")
    expected = peers.logits(model)
    found = peers.logits(theirs, 3 if method == "prompt" else 0)
    assert_same_logits(base, found, expected)
    mine = peft_model.load(llama(), tmp_path / "adapter", say=silent).eval()
    assert_same_logits(base, peers.logits(mine), expected)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 48])
@pytest.mark.parametrize("stabilized", [False, True])
def test_an_alpha_gives_the_scaling_bit_for_bit(r, stabilized, tmp_path):
    from minipeft.interop.peft_write import scales
    from minipeft.torch.lora import scaling

    for alpha in (1, 6, 7, 0.3, 16.5, 1e-3):
        s = scaling(alpha, r, stabilized)
        fields = scales({"layer": (r, s)})
        found = scaling(fields["lora_alpha"], r, fields["use_rslora"])
        assert torch.tensor(found) == torch.tensor(s)  # as float32 computes
        if alpha in (1, 6, 7):
            assert found == s


def test_names_of_transformers_4_are_found(tmp_path):
    folder = peers.saved(peers.trained(llama(), peers.lora()), tmp_path / "theirs")
    contents = peft_folder.read(folder)
    older = {
        k.replace(".model.model.", ".model."): t for k, t in contents.tensors.items()
    }
    assert older.keys() != contents.tensors.keys()
    renamed = peft_folder.Contents(contents.config, older)
    peft_folder.write(tmp_path / "older", renamed)
    models = [
        peft_model.load(llama(), tmp_path / f, say=silent) for f in ("theirs", "older")
    ]
    assert torch.equal(*(peers.logits(model) for model in models))


REFUSED = {
    "use_qalora": ({"use_qalora": True}, "use_qalora"),
    "a1": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "more parameters": ({"target_parameters": ["k_proj.weight"]}, "k_proj"),
    "unknown": ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "a changed base": ({"init_lora_weights": "olora"}, "olora"),
    "a random SVD": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "another method": ({"peft_type": "LOHA"}, "LOHA"),
    "a lost magnitude": ({"use_dora": True}, "use_dora"),
    "a lost bias": ({"lora_bias": True}, "lora_bias"),
    "another rank": ({"r": 8}, "rank 4 in the file and 8"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "more targets": ({"target_modules": [*TARGETS, "k_proj"]}, "k_proj"),
    "dropout": ({"lora_dropout": 1.5}, "1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_minipeft_has_no_method_for_is_refused(case, tmp_path):
    change, words = REFUSED[case]
    folder = peers.saved(peers.trained(llama(), peers.lora()), tmp_path / "theirs")
    path = folder / peft_folder.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = llama()
    with pytest.raises(InputError, match=r"\A.+\Z") as refusal:
        peft_model.load(model, folder, say=silent)
    assert words in str(refusal.value)
    assert not inject.adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_joins_the_first(tmp_path):
    one, two = (
        peers.saved(peers.trained(llama(), peers.lora(), seed), tmp_path / str(seed))
        for seed in (5, 6)
    )
    model = peft_model.load(llama(), one, "one", say=silent)
    peft_model.load(model, two, "two", say=silent)
    alone = peft_model.load(llama(), two, say=silent)
    assert torch.equal(peers.logits(inject.activate(model, "two")), peers.logits(alone))
    other = ours("IA3")
    with pytest.raises(InputError, match="another method"):
        peft_model.load(other, one, "one", say=silent)


def test_a_folder_is_never_overwritten(tmp_path):
    model = ours("LoRA")
    peft_model.save(model, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(InputError, match="exists"):
        peft_model.save(model, tmp_path / "adapter")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("first", ["tokens", "adapters"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_and_adapters_are_never_saved_without_each_other(
    kind, first, tmp_path
):
    around = PromptModel if kind == "prompt" else PrefixModel

    def both(config):
        targets = ["o_proj", "down_proj"]
        if first == "adapters":
            return around(inject.inject(llama(), config, targets), OURS[kind])
        return inject.inject(around(llama(), OURS[kind]), config, targets)

    low, serial = both(LoRAConfig(r=3, alpha=7)), both(BottleneckConfig(2))
    for write in (
        lambda: peft_model.save(low, tmp_path / "adapter"),
        lambda: peft_model.save(nn.Sequential(low), tmp_path / "adapter"),
        lambda: to_lora(low, rank=2),
        lambda: adapterhub_format.save(serial, tmp_path / "adapter"),
    ):
        with pytest.raises(InputError, match=r"virtual tokens and adapters .*o_proj"):
            write()
        assert not [*tmp_path.iterdir()]
    peft_model.save(low.model, tmp_path / "adapter")  # the remedies
    mine = peft_model.load(llama(), tmp_path / "adapter", say=silent)
    found, expected = (inject.adapter_state_dict(m) for m in (mine, low.model))
    assert_same_tensors(found, expected)
    adapterhub_format.save(serial.model, tmp_path / "serial")
    again = both(LoRAConfig(r=3, alpha=7))
    again.load_state_dict(low.state_dict())
    assert torch.equal(peers.logits(again.eval()), peers.logits(low.eval()))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("merged", [True, False])
def test_virtual_tokens_around_adapters_are_saved_after_unload(kind, merged, tmp_path):
    around = PromptModel if kind == "prompt" else PrefixModel
    model = inject.inject(llama(), LoRAConfig(r=2, alpha=4), ["q_proj"])
    with torch.no_grad():
        for tensor in inject.trainable_parameters(model):
            tensor.fill_(0.1)
    model = around(inject.merge(model) if merged else model, OURS[kind])
    remedy = r"save the virtual tokens alone, call unload\(model\.model\) first"
    with pytest.raises(InputError, match=remedy):
        peft_model.save(model, tmp_path / "adapter")
    before = peers.logits(model.eval())
    inject.unload(model.model)
    peft_model.save(model, tmp_path / "adapter")
    again = peft_model.load(
        copy.deepcopy(model.model), tmp_path / "adapter", say=silent
    )
    assert_same_tensors(
        peft_model.contents_of(again).tensors, peft_model.contents_of(model).tensors
    )
    assert torch.equal(peers.logits(model.eval()), before) == merged


def test_what_is_trained_beside_virtual_tokens_is_not_lost(tmp_path):
    model = PromptModel(llama(), OURS["prompt"])
    model.model.lm_head.requires_grad_(True)
    with pytest.raises(InputError, match=r"lm_head\.weight is trained too"):
        peft_model.save(model, tmp_path / "adapter")
    assert not [*tmp_path.iterdir()]


CLASSIFIERS = {
    "Bert, sequences": ("BertForSequenceClassification", "classifier", "SEQ_CLS"),
    "Bert, tokens": ("BertForTokenClassification", "classifier", "TOKEN_CLS"),
    "Bert, answers": ("BertForQuestionAnswering", "qa_outputs", "QUESTION_ANS"),
    "Llama": ("LlamaForSequenceClassification", "score", "SEQ_CLS"),
    "Roberta": ("RobertaForSequenceClassification", "classifier", None),
    "XLNet": ("XLNetForSequenceClassification", "logits_proj", None),
}
TARGETED = {"Llama": ["q_proj"], "XLNet": ["layer_1", "layer_2"]}


@pytest.mark.parametrize("head", ["frozen", "trained", "adapted"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_peft_loads_the_adapter_of_a_classifier_with_its_head_or_without(
    case, head, tmp_path
):
    import transformers

    kind, name, task = CLASSIFIERS[case]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"d_head": 8} if case == "XLNet" else {}
    config = getattr(transformers, kind).config_class(
        vocab_size=64, intermediate_size=16, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    base = getattr(transformers, kind)(config).eval()
    targets = TARGETED.get(case, ["query"])
    if head == "adapted":
        targets = [*targets, "out_proj" if case == "Roberta" else name]
    model = inject.inject(copy.deepcopy(base), LoRAConfig(r=2, alpha=3), targets)
    model.get_submodule(name).requires_grad_(head != "frozen")
    if head == "adapted":
        inject.freeze(model)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path / "adapter"
    peft_model.save(model, folder)
    said = loaders.judge(loaders.LOADERS["peft"], parts.read(folder))
    assert said.verdict == loaders.EXACT
    saved = peft_folder.read_config(folder)
    assert saved["task_type"] == (task if head == "trained" else None)
    with torch.no_grad(), peers.quiet():
        expected = model(TEXT)[0]
        assert not torch.equal(expected, base(TEXT)[0])
        theirs = peft.get_peft_model_state_dict(peers.reloaded(base, folder))
        mine = peft_model.load(copy.deepcopy(base), folder, say=silent)(TEXT)[0]
    assert torch.equal(mine, expected)
    assert_same_tensors(theirs, peft_folder.read(folder).tensors)
    if head == "frozen":  # as files of before, which peft refuses where it finds a head
        settings = folder / peft_folder.CONFIG
        settings.write_text(json.dumps({**saved, "task_type": task or "SEQ_CLS"}))
        said = loaders.judge(loaders.LOADERS["peft"], parts.read(folder))
        assert said.verdict == loaders.UNKNOWN
        assert "whether a module of the base has a name that ends in" in said.sentence
        refused = pytest.raises(KeyError, match=name)
        with refused if name != "logits_proj" else nullcontext():
            peers.reloaded(base, folder)
