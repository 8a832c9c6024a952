"""The vectors find known bugs in published libraries, by their flags.

The versions are pinned. If a new version of a peer mends a bug, a test fails, and the
book must change.
"""

import json
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from minipeft.golden.operations import OPERATIONS
from minipeft.golden.vectors import load_all
from tests.golden.commands import minipeft

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    # bitsandbytes compiles its fallback for minutes; the values are the same.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


RESULTS = Path(__file__).parents[2] / "results"
PEFT = ("lora_batched", "adapter_files", "hira", "miss", "prefix")
ROWS = {
    "bitsandbytes": ("blockwise", "codebook", "double_quant", "adamw"),
    "torchao": ("blockwise", "codebook", "microscaling"),
    "peft": ("lora", *PEFT, "ia3", "dora", "vera", "pissa", "prompt"),
}


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """Return the cases of a library; each library is started once, for all its rows."""
    report = tmp_path_factory.mktemp("peers") / "report.json"

    @cache
    def cases(peer):
        only = [word for row in ROWS[peer] for word in ("--only", row)]
        done = minipeft("verify", peer, *only, "--json", str(report))
        found = json.loads(report.read_text())["cases"]
        failed = any(case["status"] == "fail" for case in found)
        assert done.returncode == failed, done.stderr
        return found

    return cases


@pytest.fixture
def flags(verified):
    """Return the flags of the failed cases of a row, and of those of another policy."""

    def of(peer, row):
        pytest.importorskip(peer)
        files = {file.name for file in load_all([row])}
        cases = [case for case in verified(peer) if case["file"] in files]
        assert cases
        return [
            {
                flag
                for case in cases
                if case["status"] == status
                for flag in case["flags"]
            }
            for status in ("fail", "policy")
        ]

    return of


@pytest.mark.parametrize("peer", ROWS)
def test_the_failures_are_those_of_the_committed_result(peer, verified):
    # Each of them is a named deviation: tests/book/test_matrix.py.
    pytest.importorskip(peer)
    path = RESULTS / peer / f"{metadata.version(peer).partition('+')[0]}.json"
    assert path.exists(), f"run: make matrix ARGS={peer}"
    told = json.loads(path.read_text("utf-8"))["operations"]
    listed = {
        (operation, case)
        for operation, count in told.items()
        if OPERATIONS[operation].row in ROWS[peer]
        for case in count.get("failed", ())
    }
    found = {
        (case["file"].removesuffix(".json"), case["tcId"])
        for case in verified(peer)
        if case["status"] == "fail"
    }
    # Other CPUs decode rows that end inside of a block as they should.
    rows = {(f"{code}_dequantize", n) for code in ("nf4", "fp4") for n in range(9, 17)}
    assert found <= listed
    assert listed - found <= rows


def test_bitsandbytes(flags):
    found, policy = flags("bitsandbytes", "blockwise")
    # MisalignedRows is found only on CPUs with AVX-512.
    assert {"Subnormal", "ShapeMismatch"} <= found
    assert not {"ZeroBlock", "ReciprocalMultiply"} & found  # by its own rule
    assert "NotFinite" in policy - found
    assert not {"Basic", "NibbleOrder", "Tie", "LargeBlock", "RoundOnce"} & found


def test_torchao(flags):
    found, policy = flags("torchao", "blockwise")
    assert {"Table", "Tie", "ReciprocalMultiply", "HalfInput"} <= found
    assert policy == {"NotFinite"}
    assert not {"NibbleOrder", "ZeroBlock"} & found


@pytest.mark.parametrize("row", PEFT)
def test_peft(row, flags):
    assert flags("peft", row)[0] == set()


def test_peft_merges_into_the_weight_that_a_tied_head_shares(flags):
    found, _ = flags("peft", "lora")
    assert found == {"TiedHead", "Scaling", "SquareTrap", "RankOne", "Normal"}


def test_peft_spreads_a_single_feature_in_ia3(flags):
    # l * x has as many features as l.
    assert flags("peft", "ia3")[0] == {"ShapeMismatch"}


def test_peft_divides_by_the_norm_of_a_zero_row_in_dora(flags):
    # And the output for a vector is a matrix of one row.
    found, _ = flags("peft", "dora")
    assert found == {"ZeroRow", "NormBelowZero", "LeadingAxes"}


def test_peft_takes_any_seed_in_vera(flags):
    found, policy = flags("peft", "vera")
    # One row of B is broadcast to all outputs.
    assert found == {"ShapeMismatch", "RankOne"}
    assert policy == {"SeedRange", "ZeroRank"}


def test_bitsandbytes_has_the_published_codebooks(flags):
    # Its constructor of NF4 divides infinity by infinity and does not refuse.
    pytest.importorskip("scipy", reason="needs scipy, as the constructor does")
    assert flags("bitsandbytes", "codebook")[0] == {"OutOfRange"}


def test_torchao_has_nf4_in_four_decimals(flags):
    assert "Literal" in flags("torchao", "codebook")[0]


def test_torchao_halves_a_block_of_subnormals_in_mxfp4(flags):
    # It divides by at least 2**-126, and stores 2**-127.
    found, policy = flags("torchao", "microscaling")
    assert found == {"Subnormal"}
    assert policy == {"NotFinite"}
