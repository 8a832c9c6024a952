"""The matrix of libraries: drivers, committed results, and the drawn table."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from book import matrix, museum

from minipeft.golden.operations import OPERATIONS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tools/matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILT_IN = ROOT / "minipeft" / "golden" / "drivers"
DEVIATION = {"library", "version", "name", "kind", "what", "cases"}
KINDS = {"defect", "difference"}


def test_drivers_are_short_and_name_their_versions(tool):
    drivers = [p for p in tool.DRIVERS.glob("*.py") if p.stem != "torch_layers"]
    assert {path.stem for path in drivers} <= set(tool.LIBRARIES.values())
    peers = [path for name in tool.BUILT_IN for path in (BUILT_IN / name).glob("*.py")]
    assert peers
    for path in (*drivers, *peers):
        assert len(path.read_text("utf-8").splitlines()) <= 80, path
    for name in tool.LIBRARIES:
        packages = tool.requirements(name)
        assert f"{name}==" in " ".join(packages)
        assert all("==" in package or package == "scipy" for package in packages)


def test_every_failure_is_a_named_deviation():
    failed = [
        (found["library"], found["version"], operation, case)
        for versions in matrix.read(RESULTS).values()
        for found in versions
        for operation, count in found.get("operations", {}).items()
        for case in count.get("failed", ())
    ]
    assert len(failed) >= 100
    assert sorted(named_cases(matrix.deviations(RESULTS))) == sorted(failed)


def named_cases(deviations):
    return [
        (deviation["library"], deviation["version"], operation, case)
        for deviation in deviations
        for operation, cases in deviation["cases"].items()
        for case in cases
    ]


def test_a_deviation_says_what_the_library_does():
    deviations = matrix.deviations(RESULTS)
    names = [(d["library"], d["version"], d["name"]) for d in deviations]
    assert len(set(names)) == len(names)
    for deviation in deviations:
        assert set(deviation) == DEVIATION
        assert deviation["kind"] in KINDS
        assert re.fullmatch(r"[a-z0-9-]+", deviation["name"])
        assert re.fullmatch(r"[^\n]+\.", deviation["what"])


def stories():
    """Return what the page of bugs tells: libraries with versions, and vectors."""
    text = (ROOT / "site" / "bugs.md").read_text("utf-8")
    for said in re.findall(r"^\*\*.*?(?=\n\n)", text, re.S | re.M):
        told = said.replace("\n", " ")
        versions = re.findall(r"([\w-]+) (\d[\d.]+\d)", told)
        libraries = [v for v in versions if (RESULTS / v[0]).is_dir()]
        yield libraries, re.findall(r"`(\w+):(\d+)`", told)


def test_the_page_of_bugs_names_what_fails():
    named = 0
    for libraries, vectors in stories():
        found = [read_result(*library) for library in libraries]
        for operation, case in vectors:
            assert any(
                int(case) in result["operations"].get(operation, {}).get("failed", ())
                for result in found
            ), (libraries, operation, case)
            named += 1
    assert named >= 20


def test_the_page_of_bugs_tells_of_every_defect():
    told = {
        (*library, operation, int(case))
        for libraries, vectors in stories()
        for library in libraries
        for operation, case in vectors
    }
    for deviation in matrix.deviations(RESULTS):
        if deviation["kind"] == "defect":
            assert told & set(named_cases([deviation])), deviation["name"]


def test_the_museum_links_each_bug_to_its_reports():
    rows = museum.table(ROOT).splitlines()[2:]
    assert len(rows) >= 40
    reports = [
        re.findall(r"\[[\w.-]+#(\d+)\]\(https://github.com/", row) for row in rows
    ]
    assert all(reports)
    assert all(re.search(r"`\w+:\d+` \|$", row) for row in rows)
    with pytest.raises(ValueError, match="no issue"):
        museum.name("https://github.com/huggingface/peft")


def read_result(library, number):
    return json.loads((RESULTS / library / f"{number}.json").read_text("utf-8"))


def test_each_library_has_a_result_or_a_dated_reason(tool):
    libraries = matrix.read(RESULTS)
    assert set(libraries) == set(tool.LIBRARIES)
    for name, versions in libraries.items():
        newest = versions[0]
        assert newest["library"] == name
        assert newest["packages"] == tool.requirements(name)
        assert newest["date"]
        assert set(newest.get("operations", {})) <= set(OPERATIONS)


def test_a_result_is_that_of_this_version(tool):
    torch = pytest.importorskip("torch")
    path = RESULTS / "torch" / f"{torch.__version__.partition('+')[0]}.json"
    if not path.exists():
        pytest.skip(f"there is no result of torch {torch.__version__}")
    found = tool.condensed(tool.run(Path(sys.executable), "torch_itself"))
    told = json.loads(path.read_text())
    # Newer vectors add cases; operations stay, and so does what passes.
    assert set(found["operations"]) == set(told["operations"])
    for operation, count in told["operations"].items():
        now = found["operations"][operation]
        assert now["pass"] >= count["pass"]
        assert set(count.get("failed", ())) <= set(now.get("failed", ()))


def result(version, failed, **more):
    smallest = {
        **{"tcId": failed[0], "comment": "odd", "flags": ["OddLength"]},
        **{"detail": "packed [0] is 0x01", "links": ["https://example.org/1"]},
    }
    count = {"pass": 9, "fail": len(failed), "failed": failed, "smallest": smallest}
    choices = {"all": 2, "as": {"paper": 2}}
    return {
        **{"library": "lib", "version": version, "date": "2026-01-02"},
        **{"python": "3.12", "system": "Linux x86_64", "cpu": ["avx2"], "cases": 9},
        **{"choices": choices, "operations": {"nf4_quantize": count}, **more},
    }


def test_a_page_shows_counts_the_least_case_and_what_changed(tmp_path):
    (tmp_path / "lib").mkdir()
    for version, failed in {"1.9": [3, 4], "1.10": [4, 5, 12]}.items():
        path = tmp_path / "lib" / f"{version}.json"
        path.write_text(json.dumps(result(version, failed)))
    (tmp_path / "gone").mkdir()
    reason = {"library": "gone", "date": "2026-01-02", "reason": "no wheel"}
    (tmp_path / "gone" / "none.json").write_text(json.dumps(reason))
    (tmp_path / "deviations.toml").write_text(
        '[[deviation]]\nlibrary = "lib"\nversion = "1.10"\nname = "odd"\n'
        'kind = "difference"\nwhat = "It counts from 1."\n'
        "cases.nf4_quantize = [4, 5, 7]\n"
    )
    table = matrix.table(tmp_path)
    assert "[lib 1.10](#lib)" in table
    assert "| `nf4_quantize` | 9 of 12 |" in table
    details = matrix.details(tmp_path)
    assert "tcId 4, odd: `packed [0] is 0x01` (OddLength)" in details
    assert "<https://example.org/1>" in details
    assert "- odd (difference): It counts from 1. `nf4_quantize` 4–5, 7" in details
    assert (  # 1.9 had 11 cases
        "Since 1.9: newly failing: `nf4_quantize:5`; mended: `nf4_quantize:3`; "
        "failing in cases that are new: `nf4_quantize:12`."
    ) in details
    assert "Not run on 2026-01-02: `no wheel`" in details


def test_a_smallest_case_has_the_least_input(tool):
    failed = [
        {"tcId": n, "comment": "c", "flags": ["Basic"], "detail": "d"} for n in (1, 7)
    ]
    found = tool.smallest("nf4_quantize", failed)
    assert found["tcId"] == 7
    assert set(found) == {"tcId", "comment", "flags", "detail", "links"}
