"""A correct merge passes in any order of sums; a wrong merge gets its mistake named."""

from dataclasses import replace

import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import merging, mistakes, peft_format
from minipeft.interop.adapter import Adapter
from minipeft.interop.audit import (
    BOUND,
    EXACT,
    RETIED,
    UNEXPLAINED,
    WRONG,
    audit,
    judge,
)
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import Update, merged
from tests.interop.folders import (
    InMemory,
    adapter_tensors,
    base_tensors,
    write_adapter,
    write_model,
)
from tests.tolerance import assert_within, gamma

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(seed, shape=(24, 16), r=3, dora=False, **fields):
    draw = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    A = torch.randn(r, in_features, generator=draw) * 0.2
    B = torch.randn(out_features, r, generator=draw) * 0.2
    m = torch.rand(out_features, generator=draw) + 0.5 if dora else None
    W = torch.randn(shape, generator=draw) * 0.1
    return W, Update(A, B, alpha=7.5, magnitude=m, **fields)


def summed_backwards(W, update):
    """Return the same merge with every sum in reverse order."""
    flipped = replace(update, A=update.A.flip(0), B=update.B.flip(1))
    rows = [
        merged(W[i : i + 1], replace(flipped, B=flipped.B[i : i + 1], magnitude=m))
        for i, m in enumerate(_magnitudes(update))
    ]
    return torch.cat(rows)


def _magnitudes(update):
    if update.magnitude is None:
        return [None] * len(update.B)
    return [update.magnitude[i : i + 1] for i in range(len(update.magnitude))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_200_right_merges_are_never_called_wrong(dtype, dora):
    verdicts = []
    for seed in range(200):
        W, update = drawn(
            seed, r=1 + seed % 16, dora=dora, rank_stabilized=seed % 2 > 0
        )
        W = W.to(dtype)
        for found in (merged(W, update), summed_backwards(W, update)):
            finding = judge("W", W, update, found, {update.alpha})
            assert finding.verdict in (EXACT, BOUND), (seed, finding)
            verdicts.append(finding.verdict)
    assert verdicts[::2] == [EXACT] * 200


CHANGES = {
    "not applied": lambda W, u: W,
    "applied twice": lambda W, u: merged(merged(W, u), u),
    "subtracted": lambda W, u: (W.float() - u.scaling * u.B @ u.A).to(W.dtype),
    "alpha alone": lambda W, u: (W.float() + 7.5 * u.B @ u.A).to(W.dtype),
    "not scaled": lambda W, u: (W.float() + u.B @ u.A).to(W.dtype),
    "1/r for 1/√r, or the reverse": lambda W, u: (
        W.float() + 7.5 / 3**0.5 * u.B @ u.A
    ).to(W.dtype),
    "another layer's alpha": lambda W, u: (W.float() + 32 / 3 * u.B @ u.A).to(W.dtype),
    "transposed": lambda W, u: (W.float() + u.scaling * (u.B @ u.A).T).to(W.dtype),
    "A and B swapped": lambda W, u: (
        W.float() + u.scaling * u.A.reshape(16, 3) @ u.B.reshape(3, 16)
    ).to(W.dtype),
    "merged into dequantized NF4": lambda W, u: merged(_nf4(W), u),
    "requantized": lambda W, u: _nf4(merged(_nf4(W), u)),
    "quantized": lambda W, u: _nf4(merged(W, u)),
}


def _nf4(W):
    from minipeft.reference import blockwise

    q = blockwise.quantize(W.float().numpy())
    return torch.from_numpy(blockwise.dequantize(q)).to(W.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_is_named(name, dtype):
    W, update = drawn(5, shape=(16, 16))
    W = W.to(dtype)
    found = CHANGES[name](W, update)
    finding = judge("W", W, update, found, {7.5, 32.0})
    assert (finding.verdict, finding.mistake) == (WRONG, name), finding
    assert finding.residual < 0.05


@pytest.mark.parametrize("part", [0.25, 0.75])
@pytest.mark.parametrize("name", ["not applied", "transposed"])
def test_a_mistake_has_its_name_only_if_it_explains_more_than_it_leaves(name, part):
    W, update = drawn(5, shape=(16, 16))
    right, wrong = merged(W, update), CHANGES[name](W, update)
    noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    noise *= part * (wrong - right).norm() / noise.norm()  # what the mistake leaves
    finding = judge("W", W, update, wrong + noise, {7.5})
    assert finding.mistake == (name if part == 0.25 else UNEXPLAINED), finding
    size = float((right - W).norm())
    other = right if part == 0.75 else wrong
    # The residual is at most 1. Each of the two norms adds up 256 squares, and its root
    # halves their errors; with the differences before, the quotient has fewer roundings
    # than both sums.
    rest = float((wrong + noise - other).norm()) / size
    assert_within(finding.residual, rest, gamma(2 * W.numel()))
    if part == 0.75:
        assert f"the nearest, {name!r}, leaves" in finding.sentence


def test_a_small_change_that_no_mistake_makes_is_unexplained():
    W, update = drawn(5)
    found = merged(W, update)
    found[3, 4] += 0.01
    finding = judge("W", W, update, found, {7.5, 8.0})
    assert (finding.verdict, finding.mistake) == (WRONG, UNEXPLAINED), finding


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            "delta rounded first",
            lambda W, u: W + (u.scaling * (u.B @ u.A)).to(torch.bfloat16),
        ),
        (
            "computed in bfloat16",
            lambda W, u: W + u.scaling * (u.B.bfloat16() @ u.A.bfloat16()),
        ),
        (
            "A and B in bfloat16",
            lambda W, u: merged(
                W, replace(u, A=u.A.bfloat16().float(), B=u.B.bfloat16().float())
            ),
        ),
        ("A and B in float16", lambda W, u: merged(W, _matrices(u, torch.float16))),
        (
            "computed in float16",
            lambda W, u: (W.half() + u.scaling * (u.B.half() @ u.A.half())).to(W.dtype),
        ),
    ],
)
def test_a_mistake_of_precision_is_named(name, found):
    # A large update on a small weight, so that the rounding to 16 bits shows.
    W, update = drawn(6, shape=(64, 64), r=8)
    W = (W * 0.01).to(
        torch.bfloat16 if "bfloat16" in name or "first" in name else torch.float32
    )
    finding = judge("W", W, update, found(W, update), {7.5})
    assert (finding.verdict, finding.mistake) == (WRONG, name), finding


def _matrices(update, dtype):
    return replace(update, A=update.A.to(dtype).float(), B=update.B.to(dtype).float())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rounded to float16", torch.float16), ("rounded to bfloat16", torch.bfloat16)],
)
def test_a_detour_through_16_bits_is_named(name, dtype):
    W, update = drawn(7)
    found = (W + update.scaling * update.B @ update.A).to(dtype).float()
    finding = judge("W", W, update, found, {7.5})
    assert (finding.mistake, finding.residual) == (name, 0.0)


def _gained(W, u, norm):
    V = W.float() + u.scaling * u.B @ u.A
    return (u.magnitude / norm(V))[:, None] * V


DORA = {
    "DoRA norm of the base": lambda W, u: _gained(
        W, u, lambda V: W.float().norm(dim=1)
    ),
    "DoRA norm over the wrong axis": lambda W, u: _gained(
        W, u, lambda V: V.norm(dim=0)
    ),
    "DoRA by columns": lambda W, u: (
        (W.float() + u.scaling * u.B @ u.A)
        * (u.magnitude / (W.float() + u.scaling * u.B @ u.A).norm(dim=0))
    ),
    "DoRA norm of the merged weight": lambda W, u: _gained(
        W, u, lambda V: (merged(W, u) + u.scaling * u.B @ u.A).norm(dim=1)
    ),
    "magnitude lost": lambda W, u: W.float() + u.scaling * u.B @ u.A,
    "applied twice": lambda W, u: merged(merged(W, u), u),
    "not applied": lambda W, u: W,
}


@pytest.mark.parametrize("name", DORA)
def test_a_mistake_of_dora_is_named(name):
    W, update = drawn(8, shape=(16, 16), dora=True)
    found = DORA[name](W, update).to(W.dtype)
    finding = judge("W", W, update, found, {7.5})
    assert (finding.verdict, finding.mistake) == (WRONG, name), finding


def test_every_mistake_of_the_list_is_made_by_a_test():
    tested = {*CHANGES, *DORA, "delta rounded first", "computed in bfloat16"}
    tested |= {"computed in float16", "A and B in bfloat16", "A and B in float16"}
    tested |= {"rounded to float16", "rounded to bfloat16"}
    assert {m.name for m in mistakes.MISTAKES} <= tested
    assert {m.name for m in mistakes.BIAS_MISTAKES} == {
        *("bias lost", "bias scaled", "applied twice")  # see the whole model, below
    }
    assert len(mistakes.MISTAKES) >= 18


@pytest.fixture
def setting(tmp_path):
    base = base_tensors(torch.bfloat16)
    tensors = adapter_tensors()
    tensors["base_model.model.model.layers.0.wide.lora_B.bias"] = torch.ones(16)
    tensors["base_model.model.lm_head.weight"] = torch.randn(40, 16)
    folder = write_adapter(
        tmp_path / "adapter", tensors, alpha_pattern={"tall": 32}, lora_bias=True
    )
    return base, peft_format.read(folder), tmp_path


def verdicts(base, adapter, tensors):
    found = audit(InMemory(base), adapter, InMemory(tensors))
    return {f.tensor: f for f in found if f.verdict == WRONG}


@pytest.mark.parametrize("shards", [1, 3])
def test_our_merge_of_a_folder_is_exact(setting, shards):
    base, adapter, path = setting
    folder = write_model(path / "base", base, shards)
    merging.merge(folder, adapter, path / "merged")
    found = list(audit(open_tensors(folder), adapter, open_tensors(path / "merged")))
    assert {f.verdict for f in found} == {EXACT}
    assert sum(f.adapted for f in found) == 8  # six weights, a bias, the head
    assert not list(path.glob(".*"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_in_pieces_has_the_bits_of_a_merge_at_once(dtype, dora, tmp_path):
    W, update = drawn(4, shape=(1300, 16), dora=dora)
    W = W.to(dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write_model(tmp_path / "base", {name: W})
    source = open_tensors(folder)
    adapter = Adapter({name: update})
    merger = merging.Merger(source, adapter, None, print)
    assert merger.streams(name)
    assert len([*merger.rows(name, dtype)]) == 6
    merging.merge(folder, adapter, tmp_path / "merged")
    found = open_tensors(tmp_path / "merged").read(name)
    assert torch.equal(found, merged(W, update))


def right(base, adapter, tmp_path):
    folder = write_model(tmp_path / "base", base)
    merging.merge(folder, adapter, tmp_path / "right")
    opened = open_tensors(tmp_path / "right")
    return {name: opened.read(name) for name in opened.about}


def test_what_concerns_the_whole_model_is_named(setting):
    base, adapter, path = setting
    whole = right(base, adapter, path)
    assert verdicts(base, adapter, whole) == {}

    def only(change):
        (finding,) = verdicts(base, adapter, {**whole, **change}).values()
        return finding.mistake

    bias = "model.layers.0.wide.bias"
    assert only({bias: base[bias]}) == "bias lost"
    added = adapter.biases[bias].bfloat16()
    assert only({bias: base[bias] + added / 3}) == "bias scaled"  # B's own, unscaled
    assert only({bias: base[bias] + added * 3}) == "bias scaled"
    assert only({bias: base[bias] * 3 + added}) == "bias scaled"
    assert only({bias: base[bias] + added * 2}) == "applied twice"
    assert only({bias: base[bias] + 1.3 * added}) == UNEXPLAINED
    assert only({"model.norm.weight": whole["model.norm.weight"] * 2}) == "wrong base"
    assert only({"lm_head.weight": torch.zeros(40, 16)}) == "changed"
    assert only({"other": torch.zeros(2)}) == "surplus"
    tall = "model.layers.0.tall.weight"
    default = Update(adapter.updates[tall].A, adapter.updates[tall].B, alpha=12.0)
    assert only({tall: merged(base[tall], default)}) == "another layer's alpha"
    assert only({tall: whole[tall][:-1]}) == "reshaped"
    headless = {n: t for n, t in whole.items() if n != "lm_head.weight"}
    (finding,) = verdicts(base, adapter, headless).values()
    assert finding.mistake == "head untied and lost"
    assert (
        verdicts(
            base,
            adapter,
            {**whole, "model.norm.weight": whole["model.norm.weight"].float()},
        )
        == {}
    )


def test_a_head_that_was_tied_to_the_merged_embedding_is_named():
    E = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    base = {embedding: E, "model.norm.weight": torch.ones(16)}
    adapter = Adapter({}, saved={embedding: E + 1})
    right = {**base, embedding: E + 1, head: E}
    assert verdicts(base, adapter, right) == {}
    found = verdicts(base, adapter, {**right, head: E + 1})
    assert {n: f.mistake for n, f in found.items()} == {head: RETIED}
    found = verdicts(base, adapter, {**right, head: E + 2})
    assert {n: f.mistake for n, f in found.items()} == {head: "wrong base"}


def test_an_adapter_of_another_model_is_refused(setting):
    base, adapter, _ = setting
    other = {n.replace("wide", "broad"): t for n, t in base.items()}
    with pytest.raises(InputError, match="which the base does not have; give the base"):
        list(audit(InMemory(other), adapter, InMemory(other)))


def test_a_merge_never_replaces_a_folder(setting):
    base, adapter, path = setting
    folder = write_model(path / "base", base)
    (path / "merged").mkdir()
    with pytest.raises(InputError, match="exists; choose another folder"):
        merging.merge(folder, adapter, path / "merged")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_floats_kept_as_integers_are_wrong(dtype):
    W, update = torch.ones(4, 6), Update(torch.ones(2, 6), torch.ones(4, 2), 2.0)
    base = InMemory({"W": W, "norm": torch.ones(3)})
    kept = InMemory({"W": merged(W, update).to(dtype), "norm": torch.ones(3).to(dtype)})
    findings = list(audit(base, Adapter({"W": update}), kept))
    assert [f.verdict for f in findings] == [WRONG, WRONG]
    assert all("and the base float32" in f.sentence for f in findings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_called_so(value):
    W, update = drawn(3)
    found = merged(W, update)
    found[0, 0] = value
    finding = judge("W", W, update, found, {update.alpha})
    assert (finding.verdict, finding.mistake) == (WRONG, "not finite")
