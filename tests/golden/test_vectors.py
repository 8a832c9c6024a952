"""The files of vectors fit their schemas, are counted, small and reproducible."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from minipeft.errors import InputError
from minipeft.golden import cases, generate, manifest
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Tensor
from minipeft.golden.vectors import V1, load_all
from minipeft.golden.ways import WAYS

SCHEMAS = V1.parent / "schema"
FILES = sorted(V1.glob("*.json"))


def content(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cases_in(file):
    return [test for group in file["testGroups"] for test in group["tests"]]


@pytest.fixture(scope="module")
def registry():
    resources = (
        (p.name, Resource.from_contents(content(p))) for p in SCHEMAS.iterdir()
    )
    return Registry().with_resources(resources)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_file_follows_its_schema(path, registry):
    file = content(path)
    schema = content(SCHEMAS / file["schema"])
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema, registry=registry).validate(file)


def objects(schema, path="$"):
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            yield path, schema
        for key, value in schema.items():
            yield from objects(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value, path)


@pytest.mark.parametrize("path", sorted(SCHEMAS.iterdir()), ids=lambda p: p.name)
def test_schema_is_closed_everywhere(path):
    for where, schema in objects(content(path)):
        assert schema.get("additionalProperties") is False, where


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
@pytest.mark.parametrize("spoil", ["extra", "hex", "kind", "input", "output"])
def test_schema_refuses_a_spoilt_file(path, spoil, registry):
    file = content(path)
    valid = next(test for test in cases_in(file) if "outputs" in test)
    if spoil == "extra":
        valid["weight"] = 1
    if spoil == "hex":
        next(iter(valid["outputs"].values()))["data"] += "f"
    if spoil == "kind":
        next(iter(file["notes"].values()))["kind"] = "OTHER"
    if spoil == "input":
        valid["inputs"]["unknown"] = next(iter(valid["outputs"].values()))
    if spoil == "output":
        valid["outputs"].popitem()
    schema = content(SCHEMAS / file["schema"])
    assert not Draft202012Validator(schema, registry=registry).is_valid(file)


def test_there_is_a_file_and_a_schema_for_every_operation_and_no_other():
    assert [p.stem for p in FILES] == sorted(OPERATIONS)
    names = {path.name for path in SCHEMAS.iterdir()}
    assert names == {"common.json", *(path.name for path in FILES)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_numbers(path):
    file = content(path)
    tests = cases_in(file)
    assert file["method"] == path.stem
    assert [test["tcId"] for test in tests] == list(range(1, len(tests) + 1))
    assert file["numberOfTests"] == len(tests)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_flag_is_defined_and_every_note_used(path):
    file = content(path)
    used = {flag for test in cases_in(file) for flag in test["flags"]}
    assert used == set(file["notes"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_comments_tell_the_tests_of_a_file_apart(path):
    counted = Counter(test["comment"] for test in cases_in(content(path)))
    assert max(counted.values()) == 1, counted.most_common(2)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_file_is_small(path):
    assert path.stat().st_size <= generate.LARGEST_FILE


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in FILES) < 3 * 1024 * 1024


def test_magnitudes_stand_exactly_where_a_bound_needs_them():
    for file in load_all():
        for case in file.cases:
            bounded = {
                o for o, rule in case.compare.items() if rule.startswith("gamma")
            }
            assert set(case.magnitudes) == bounded, (file.name, case.tcId)


def test_no_adapter_is_tested_at_a_scaling_of_0_or_1():
    for file in load_all(["lora"]):
        for case in file.cases:
            r = case.question.inputs["A"].shape[0]
            alpha = case.question.parameters["alpha"]
            stable = case.question.parameters.get("rank_stabilized", False)
            assert not r or alpha / (r**0.5 if stable else r) not in (0, 1)


def test_exact_outputs_are_exact():
    """Outputs compared as bytes must not depend on the order of summation."""
    for file in load_all(["linear", "lora", "lora_batched"]):
        for case in file.cases:
            if "bitwise" in case.compare.values() and case.result == "valid":
                for tensor in case.outputs.values():
                    values = tensor.numbers()
                    assert np.array_equal(values * 8, np.round(values * 8))
                    assert np.abs(values).max(initial=0) < 2**20


def test_regeneration_is_identical(tmp_path: Path):
    generate.main(["--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in FILES]
    for path in FILES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("row", generate.BY_SVD)
def test_another_lapack_changes_no_published_value(row):
    held = json.loads((V1 / f"{row}.json").read_text("utf-8"))
    noise = np.random.default_rng(0)
    for test in cases_in(held):
        for name, magnitude in test.get("magnitudes", {}).items():
            size = Tensor.from_json(magnitude).to_array()
            value = Tensor.from_json(test["outputs"][name]).to_array()
            moved = value + size * noise.uniform(-1e-8, 1e-8, size.shape)
            changed = Tensor.from_array(moved.astype(np.float32)).to_json()
            test["outputs"][name] = changed
    assert generate.render(held) + "\n" != (V1 / f"{row}.json").read_text("utf-8")
    settled = generate.render(generate.published(held)) + "\n"
    assert settled == (V1 / f"{row}.json").read_text("utf-8")


def test_a_wrong_svd_changes_the_file():
    held = json.loads((V1 / "pissa_init.json").read_text("utf-8"))
    first = cases_in(held)[0]["outputs"]["delta"]
    wrong = Tensor.from_json(first).to_array() * np.float32(1.01)
    cases_in(held)[0]["outputs"]["delta"] = Tensor.from_array(wrong).to_json()
    with pytest.raises(InputError, match="is not what it was"):
        manifest.grown(manifest.read(), "pissa_init", generate.published(held))


def test_schemas_readme_and_manifest_are_what_the_table_gives():
    made = generate.derived(manifest.read())
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path
    assert SCHEMAS / "nf4_quantize.json" in made


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_case_is_in_the_manifest_and_none_has_changed(path):
    known = manifest.read()
    hashes = manifest.grown(known, path.stem, content(path))
    assert hashes == known[path.stem]


@pytest.mark.parametrize("change", ["parameter", "input", "output", "order", "loss"])
def test_the_manifest_sees_a_change(change):
    known, file = manifest.read(), content(V1 / "lora_merge.json")
    first, second = cases_in(file)[:2]
    if change == "parameter":
        file["testGroups"][0]["parameters"]["alpha"] += 1
    if change == "input":
        first["inputs"]["B"]["data"] = "f" + first["inputs"]["B"]["data"][1:]
    if change == "output":
        first["outputs"]["merged"]["data"] = second["outputs"]["merged"]["data"]
    if change == "order":
        file["testGroups"].reverse()
    if change == "loss":
        file["testGroups"][-1]["tests"].pop()
    with pytest.raises(InputError, match="is not what it was"):
        manifest.grown(known, "lora_merge", file)


@pytest.mark.parametrize("change", ["rule", "bound"])
def test_the_manifest_sees_a_bound_that_is_loosened(change):
    file = content(V1 / "lora_merge.json")
    group = next(g for g in file["testGroups"] if "magnitudes" in g["tests"][0])
    if change == "rule":
        group["compare"]["merged"] = "gamma:100000"
    else:
        size = group["tests"][0]["magnitudes"]["merged"]
        size["data"] = "0000807f" * (len(size["data"]) // 8)
    with pytest.raises(InputError, match="is not what it was"):
        manifest.grown(manifest.read(), "lora_merge", file)


def test_no_operation_of_the_manifest_can_go():
    known = manifest.read()
    manifest.check_operations(known, [*OPERATIONS, "another"])
    with pytest.raises(
        InputError, match=r"bof4_dequantize has cases .* its name again"
    ):
        manifest.check_operations(known, set(OPERATIONS) - {"bof4_dequantize"})


def test_what_a_flag_says_is_said_once_and_true_in_all_files():
    said = {}
    for path in FILES:
        for flag, note in content(path)["notes"].items():
            wording = note["kind"], note["description"], note["effect"]
            assert said.setdefault(flag, wording) == wording, (path.name, flag)
    assert said.keys() == cases.catalogue().keys()
    assert len(set(said.values())) == len(said)


def test_a_way_has_one_name_and_every_name_is_used():
    ways = [w for f in load_all() for c in f.cases for w in c.alternatives]
    assert {way.name for way in ways} == set(WAYS)
    assert all(WAYS[way.name] == way.by for way in ways)


def test_policies_are_what_their_flags_say():
    for file in load_all():
        for case in file.cases:
            refused = case.result in ("invalid", "policy")
            choice = refused and bool(cases.POLICIES & set(case.flags))
            assert (case.result == "policy") == choice, (file.name, case.tcId)


def test_tensors_in_the_files_survive_a_round_trip():
    for file in load_all():
        for case in file.cases:
            for tensor in (*case.question.inputs.values(), *case.outputs.values()):
                assert Tensor.from_array(tensor.to_array()) == tensor
