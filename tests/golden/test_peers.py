"""The vectors bite in libraries that everybody uses: what they find is named.

The versions are pinned; a peer that mends its ways turns a test red, and the book's
account of it wrong.
"""

import json

import pytest

from tests.golden.test_verify import minipeft

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    # bitsandbytes compiles its own fallback for minutes, to the same values.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def flags(peer, row, folder):
    pytest.importorskip(peer)
    report = folder / "report.json"
    done = minipeft("verify", peer, "--only", row, "--json", str(report))
    cases = json.loads(report.read_text())["cases"]
    failed = [case for case in cases if case["status"] == "fail"]
    assert done.returncode == (1 if failed else 0), done.stderr
    return {flag for case in failed for flag in case["flags"]}, {
        flag for case in cases if case["status"] == "policy" for flag in case["flags"]
    }


def test_bitsandbytes(tmp_path):
    found, policy = flags("bitsandbytes", "blockwise", tmp_path)
    # On CPUs with AVX-512 also MisalignedRows.
    assert {"Subnormal", "ShapeMismatch"} <= found
    assert not {"ZeroBlock", "ReciprocalMultiply"} & found  # a way of its own
    assert "NotFinite" in policy - found
    assert not {"Basic", "NibbleOrder", "Tie", "LargeBlock", "RoundOnce"} & found


def test_torchao(tmp_path):
    found, policy = flags("torchao", "blockwise", tmp_path)
    assert {"Table", "Tie", "ReciprocalMultiply", "HalfInput"} <= found
    assert policy == {"NotFinite"}
    assert not {"NibbleOrder", "ZeroBlock"} & found


@pytest.mark.parametrize("row", ["lora", "hira", "miss"])
def test_peft(row, tmp_path):
    assert flags("peft", row, tmp_path)[0] == set()


def test_peft_spreads_a_single_feature_in_ia3(tmp_path):
    # l * x makes as many features as l has numbers.
    assert flags("peft", "ia3", tmp_path)[0] == {"ShapeMismatch"}


def test_peft_divides_by_the_norm_of_a_zero_row_in_dora(tmp_path):
    # And a vector comes back as a matrix of one row.
    found, _ = flags("peft", "dora", tmp_path)
    assert found == {"ZeroRow", "NormBelowZero", "LeadingAxes"}


def test_peft_takes_any_seed_in_vera(tmp_path):
    found, policy = flags("peft", "vera", tmp_path)
    # One row of B is spread over all outputs.
    assert found == {"ShapeMismatch", "RankOne"}
    assert policy == {"SeedRange", "ZeroRank"}


def test_bitsandbytes_has_the_published_codebooks(tmp_path):
    # Its constructor of NF4 divides infinity by infinity instead of refusing.
    pytest.importorskip("scipy", reason="needs scipy, as the constructor does")
    assert flags("bitsandbytes", "codebook", tmp_path)[0] == {"OutOfRange"}


def test_torchao_has_nf4_in_four_decimals(tmp_path):
    assert "Literal" in flags("torchao", "codebook", tmp_path)[0]


def test_torchao_halves_a_block_of_subnormals_in_mxfp4(tmp_path):
    # It divides by 2**-126 at least, and stores 2**-127.
    found, policy = flags("torchao", "microscaling", tmp_path)
    assert found == {"Subnormal"}
    assert policy == {"NotFinite"}
