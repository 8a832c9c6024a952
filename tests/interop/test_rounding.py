"""A merge in a GGUF or in four bits is judged with the rounding of its file."""

import json
import re
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import bitsandbytes_format, gguf_format
from minipeft.interop.adapter import Adapter
from minipeft.interop.audit import (
    BOUND,
    EXACT,
    WRONG,
    Stored,
    audit,
    concluded,
    judge,
    same,
)
from minipeft.interop.bitsandbytes_format import FourBitTensors
from minipeft.interop.gguf_format import GgufTensors
from minipeft.interop.rounding import Q8, FourBits, Through
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import Update, merged
from minipeft.lab import models
from minipeft.torch import blockwise, double_quant
from tests.interop.folders import InMemory, base_tensors, write_adapter, write_model
from tests.interop.test_audit import drawn, summed_backwards

BF16 = torch.bfloat16


def four_bits(nested, values):
    q = (double_quant if nested else blockwise).quantize(values)
    return FourBits(q, torch.float32)


ROUNDINGS = {
    "F16": lambda values: Through(torch.float32, torch.float16),
    "BF16": lambda values: Through(torch.float32, BF16),
    "Q8_0": lambda values: Q8(),
    "NF4": lambda values: four_bits(False, values),
    "NF4 twice": lambda values: four_bits(True, values),
}
SHAPE = (48, 64)


def held(kind, values):
    rounding = ROUNDINGS[kind](values)
    return Stored(rounding.round(values), rounding)


@pytest.mark.parametrize("kind", ROUNDINGS)
@pytest.mark.parametrize("dora", [False, True])
def test_right_merges_are_never_called_wrong(kind, dora):
    for seed in range(40):
        W, update = drawn(seed, SHAPE, r=1 + seed % 16, dora=dora)
        right = judge("W", W, update, held(kind, merged(W, update)), {7.5})
        assert right.verdict == EXACT, (seed, right)
        other = held(kind, summed_backwards(W, update))
        finding = judge("W", W, update, other, {7.5})
        assert finding.verdict in (EXACT, BOUND), (seed, finding)


MADE = {
    "not applied": lambda W, u: W,
    "alpha alone": lambda W, u: merged(W, replace(u, alpha=7.5 * u.r)),
    "another layer's alpha": lambda W, u: merged(W, replace(u, alpha=8.0)),
    "applied twice": lambda W, u: merged(merged(W, u), u),
}


@pytest.mark.parametrize("kind", ROUNDINGS)
@pytest.mark.parametrize("name", MADE)
def test_a_mistake_is_named_through_the_rounding(kind, name):
    W, update = drawn(5, SHAPE)
    finding = judge("W", W, update, held(kind, MADE[name](W, update)), {7.5, 8.0})
    assert (finding.verdict, finding.mistake) == (WRONG, name), finding
    assert finding.residual == 0


def test_one_integer_of_q8_that_no_sum_gives_is_wrong():
    W, update = drawn(5, SHAPE)
    one = held("Q8_0", merged(W, update))
    row = one.values[0, :32]
    place = int(row.abs().argmin())  # the largest value sets the scale
    row[place] += 2 * float(row.abs().max()) / 127
    assert judge("W", W, update, one, {7.5}).verdict == WRONG


@pytest.mark.parametrize("nested", [False, True])
def test_one_code_that_no_sum_gives_is_wrong(nested):
    W, update = drawn(5, SHAPE)
    right = merged(W, update)
    q = (double_quant if nested else blockwise).quantize(right)
    packed = q.packed.clone()
    packed[0] ^= 2  # the second code moves by two steps
    changed = replace(q, packed=packed)
    values = bitsandbytes_format.decode(changed, torch.float32)
    one = Stored(values, FourBits(changed, torch.float32))
    assert judge("W", W, update, one, {7.5}).verdict == WRONG


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_we_round_as_the_package_gguf_does(kind):
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(64, 96, generator=draw)
    values[0, :32] = 0
    values[1, :4] = torch.tensor([127.0, 0.5, -1.5, 2.5])  # ties, at scale 1
    values[1, 4:32] = 0
    type_ = gguf_format.TYPES[kind]
    stored = gguf.dequantize(gguf.quantize(values.numpy(), type_), type_)
    theirs = torch.from_numpy(np.asarray(stored, np.float32))
    assert same(ROUNDINGS[kind](values).round(values), theirs.reshape(values.shape))


@pytest.fixture(scope="module")
def setting():
    base = open_tensors(models.TINY)
    draw = torch.Generator().manual_seed(0)
    updates = {}
    for name, about in base.about.items():
        if "proj" in name:
            A = torch.randn(4, about.shape[1], generator=draw) * 0.1
            B = torch.randn(about.shape[0], 4, generator=draw) * 0.1
            updates[name] = Update(A, B, 6.0)
    return base, Adapter(updates)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gguf_is_judged_as_it_is_rounded(tmp_path, setting, kind):
    base, adapter = setting
    path = tmp_path / "model.gguf"
    gguf_format.write_model(path, base, models.TINY, adapter, kind)
    assert {f.verdict for f in audit(base, adapter, GgufTensors(path))} == {EXACT}
    gguf_format.write_model(path, base, models.TINY, None, kind)
    found = audit(base, adapter, GgufTensors(path))
    assert {f.mistake for f in found if f.adapted} == {"not applied"}


def four_bit_tensors(tensors, names, nested=True):
    found = {}
    for name, tensor in tensors.items():
        if name in names:
            q = (double_quant if nested else blockwise).quantize(tensor)
            found |= bitsandbytes_format.write(name, q, tensor.dtype)
        else:
            found[name] = tensor
    return FourBitTensors(InMemory(found))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_four_bits_are_judged_as_base_and_as_merge(setting, nested, dtype):
    files, adapter = setting
    # All layers have the same shapes; the first shows what the others would.
    first = [n for n in files.about if not re.search(r"layers\.[1-9]", n)]
    adapter = Adapter({n: u for n, u in adapter.updates.items() if n in first})
    plain = {name: files.read(name).to(dtype) for name in first}
    base = InMemory(plain)
    merge = {n: merged(W, adapter.updates[n]) for n, W in plain.items() if "proj" in n}
    whole = {**plain, **merge}
    found = four_bit_tensors(whole, merge, nested)
    assert {f.verdict for f in audit(base, adapter, found)} == {EXACT}
    packed = four_bit_tensors(plain, merge, nested)
    untouched = [f for f in audit(base, Adapter({}), packed) if f.tensor in merge]
    assert {f.stored for f in untouched} == {"rounded to 4 bits (nf4)"}
    into = {n: merged(packed.read(n), adapter.updates[n]) for n in merge}
    verdicts = {f.verdict for f in audit(packed, adapter, InMemory({**plain, **into}))}
    assert verdicts == {EXACT}
    # The correct merge of the plain base is a wrong merge of the 4-bit base.
    wrong = [f for f in audit(packed, adapter, InMemory(whole)) if f.verdict == WRONG]
    assert {f.tensor for f in wrong} == set(merge)
    lost = [f for f in audit(base, adapter, packed) if f.verdict == WRONG]
    assert {f.mistake for f in lost} == {"not applied"}


@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_quantizes_is_not_called_wrong(setting, nested):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    files, adapter = setting
    for name, update in adapter.updates.items():
        W = files.read(name).to(BF16)
        weight = bnb.nn.Params4bit(
            merged(W, update),
            requires_grad=False,
            compress_statistics=nested,
            quant_type="nf4",
        ).to("cpu")
        state = {
            f"{name}.{key}": value
            for key, value in weight.quant_state.as_dict(packed=True).items()
        }
        tensors = FourBitTensors(InMemory({name: weight.data, **state}))
        one = Adapter({name: update})
        (finding,) = audit(InMemory({name: W}), one, tensors)
        assert finding.verdict in (EXACT, BOUND), finding


def expert_setting():
    draw = torch.Generator().manual_seed(1)
    tensors, updates = {"model.norm.weight": torch.ones(16)}, {}
    for i in range(4):
        name = f"model.layers.0.mlp.experts.{i}.up_proj.weight"
        tensors[name] = torch.randn(24, 16, generator=draw) * 0.1
        A = torch.randn(3, 16, generator=draw)
        updates[name] = Update(A, torch.randn(24, 3, generator=draw), 7.5)
    return tensors, Adapter(updates)


def test_experts_in_the_wrong_order_are_named():
    tensors, adapter = expert_setting()
    names = [*adapter.updates]
    right = {n: merged(tensors[n], u) for n, u in adapter.updates.items()}
    turned = dict(zip(names, [right[n] for n in names[1:] + names[:1]], strict=True))
    found = audit(InMemory(tensors), adapter, InMemory({**tensors, **turned}))
    wrong = [f for f in found if f.verdict == WRONG]
    assert {f.mistake for f in wrong} == {"experts in the wrong order"}
    assert {f.residual for f in wrong} == {0.0}
    assert wrong[0].sentence == f"it is {names[1]}, merged"
    crossed = {
        n: merged(tensors[n], adapter.updates[m])
        for n, m in zip(names, names[::-1], strict=True)
    }
    found = audit(InMemory(tensors), adapter, InMemory({**tensors, **crossed}))
    wrong = [f for f in found if f.verdict == WRONG]
    assert {f.mistake for f in wrong} == {"experts in the wrong order"}
    assert "the update of" in wrong[0].sentence
    alone = InMemory({**tensors, names[0]: tensors[names[0]]})
    assert {f.mistake for f in audit(InMemory(tensors), adapter, alone)} == {
        "",
        "not applied",
    }


def test_another_base_is_said_once(tmp_path, capsys):
    one = write_model(tmp_path / "one", base_tensors(seed=0))
    two = write_model(tmp_path / "two", base_tensors(seed=9))
    key = "base_model.model.model.layers.0.wide.lora_"
    pair = {f"{key}A.weight": torch.ones(4, 32), f"{key}B.weight": torch.ones(16, 4)}
    adapter = write_adapter(tmp_path / "a", pair)
    given = ["--adapter", str(adapter), "--base", str(one)]
    report = tmp_path / "report.json"
    arguments = ["audit", *given, "--merged", str(two), "--json", str(report)]
    assert cli.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrong base: 12 of the 13 tensors that the adapter")
    assert sum("wrong" in f["verdict"] for f in json.loads(report.read_text())) == 1
    # The same if one tensor shows it, and the merge is right with the other base.
    fine = {**base_tensors(), "model.embed_tokens.weight": torch.ones(40, 16)}
    name = "model.layers.0.wide.weight"
    fine[name] = base_tensors(seed=9)[name] + 12 * torch.ones(16, 32)
    other = write_model(tmp_path / "fine", fine)
    assert cli.main([*arguments[:-3], str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrong base: 1 of the 13 tensors that the adapter")
    assert "the update" in lines[1]
    assert lines[2].startswith("0 adapted tensors")
    changed = {**base_tensors(), "model.norm.weight": torch.zeros(16)}
    few = list(audit(InMemory(base_tensors()), Adapter({}), InMemory(changed)))
    assert concluded(few) == few


def test_a_kind_of_gguf_that_is_not_judged_is_refused(tmp_path, setting):
    base, adapter = setting
    path = tmp_path / "model.gguf"
    gguf_format.write_model(path, base, models.TINY, adapter, "F16")
    tensors = GgufTensors(path)
    tensors.kind = lambda name: gguf.GGMLQuantizationType.Q4_0
    with pytest.raises(InputError, match=r"stored as Q4_0; only merges in F32, F16"):
        list(audit(base, adapter, tensors))
