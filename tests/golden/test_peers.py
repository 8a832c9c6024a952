"""The vectors bite in libraries that everybody uses: what they find is named.

The versions are pinned; a peer that mends its ways turns a test red, and the book's
account of it wrong.
"""

import json
from functools import cache

import pytest

from minipeft.golden.vectors import load_all
from tests.golden.test_verify import minipeft

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    # bitsandbytes compiles its own fallback for minutes, to the same values.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


ROWS = {
    "bitsandbytes": ("blockwise", "codebook"),
    "torchao": ("blockwise", "codebook", "microscaling"),
    "peft": ("lora", "hira", "miss", "ia3", "dora", "vera"),
}


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """Return the cases of a library; each is started once, for all its rows."""
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
    """Return the flags of what fails in a row, and of what another policy decides."""

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


def test_bitsandbytes(flags):
    found, policy = flags("bitsandbytes", "blockwise")
    # On CPUs with AVX-512 also MisalignedRows.
    assert {"Subnormal", "ShapeMismatch"} <= found
    assert not {"ZeroBlock", "ReciprocalMultiply"} & found  # a way of its own
    assert "NotFinite" in policy - found
    assert not {"Basic", "NibbleOrder", "Tie", "LargeBlock", "RoundOnce"} & found


def test_torchao(flags):
    found, policy = flags("torchao", "blockwise")
    assert {"Table", "Tie", "ReciprocalMultiply", "HalfInput"} <= found
    assert policy == {"NotFinite"}
    assert not {"NibbleOrder", "ZeroBlock"} & found


@pytest.mark.parametrize("row", ["lora", "hira", "miss"])
def test_peft(row, flags):
    assert flags("peft", row)[0] == set()


def test_peft_spreads_a_single_feature_in_ia3(flags):
    # l * x makes as many features as l has numbers.
    assert flags("peft", "ia3")[0] == {"ShapeMismatch"}


def test_peft_divides_by_the_norm_of_a_zero_row_in_dora(flags):
    # And a vector comes back as a matrix of one row.
    found, _ = flags("peft", "dora")
    assert found == {"ZeroRow", "NormBelowZero", "LeadingAxes"}


def test_peft_takes_any_seed_in_vera(flags):
    found, policy = flags("peft", "vera")
    # One row of B is spread over all outputs.
    assert found == {"ShapeMismatch", "RankOne"}
    assert policy == {"SeedRange", "ZeroRank"}


def test_bitsandbytes_has_the_published_codebooks(flags):
    # Its constructor of NF4 divides infinity by infinity instead of refusing.
    pytest.importorskip("scipy", reason="needs scipy, as the constructor does")
    assert flags("bitsandbytes", "codebook")[0] == {"OutOfRange"}


def test_torchao_has_nf4_in_four_decimals(flags):
    assert "Literal" in flags("torchao", "codebook")[0]


def test_torchao_halves_a_block_of_subnormals_in_mxfp4(flags):
    # It divides by 2**-126 at least, and stores 2**-127.
    found, policy = flags("torchao", "microscaling")
    assert found == {"Subnormal"}
    assert policy == {"NotFinite"}
