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


def flags_of_failures(peer, row, folder):
    pytest.importorskip(peer)
    report = folder / "report.json"
    done = minipeft("verify", peer, "--only", row, "--json", str(report))
    cases = json.loads(report.read_text())["cases"]
    failed = [case for case in cases if case["status"] == "fail"]
    assert done.returncode == (1 if failed else 0), done.stderr
    return {flag for case in failed for flag in case["flags"]}


def test_bitsandbytes(tmp_path):
    found = flags_of_failures("bitsandbytes", "blockwise", tmp_path)
    # On CPUs with AVX-512 also MisalignedRows.
    expected = {"Subnormal", "ZeroBlock", "ReciprocalMultiply", "NotFinite"}
    assert expected <= found
    assert not {"Basic", "NibbleOrder", "Tie", "LargeBlock", "RoundOnce"} & found


def test_torchao(tmp_path):
    found = flags_of_failures("torchao", "blockwise", tmp_path)
    assert {"Table", "Tie", "ReciprocalMultiply", "HalfInput", "NotFinite"} <= found
    assert not {"NibbleOrder", "ZeroBlock"} & found


def test_peft(tmp_path):
    assert flags_of_failures("peft", "lora", tmp_path) == set()
