"""Write the vectors: `python -m minipeft.golden.generate [--out DIR]`.

Only this module writes `v1/`. Its output is deterministic, so regenerating into another
folder and comparing shows whether the reference still agrees with the vectors.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from minipeft import __version__
from minipeft.golden import functions, manifest
from minipeft.golden.cases import Alternative, File, Named, Spec, reference, used
from minipeft.golden.compare import difference
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.schemas import schemas
from minipeft.golden.tensors import Array, Tensor
from minipeft.golden.vectors import V1, Note
from minipeft.golden.ways import WAYS

LARGEST_FILE = 128 * 1024
BY_SVD = ("pissa_init", "loftq_init")  # whose last bits depend on the CPU
F32_INFINITY = np.float32(np.inf)
WIDTH = 100  # characters in a line; shorter objects stay on one line


def main(arguments: list[str] | None = None) -> None:
    """Write every file into a folder, `v1/` unless told otherwise.

    With `v1/`, also write the schemas, the list of functions and the manifest.
    """
    parser = argparse.ArgumentParser(prog="python -m minipeft.golden.generate")
    parser.add_argument("--out", type=Path, default=V1, metavar="DIR")
    out: Path = parser.parse_args(arguments).out
    known = manifest.read()
    manifest.check_operations(known, OPERATIONS)
    for file in files():
        held = published(content(file))
        known[file.operation] = manifest.grown(known, file.operation, held)
        _write(out / f"{file.operation}.json", render(held) + "\n")
    if out == V1:
        for path, text in derived(known).items():
            _write(path, text)


def derived(hashes: manifest.Hashes) -> dict[Path, str]:
    """Return the text of every other file that is written from the table."""
    folder = V1.parent
    made = {folder / "schema" / n: render(s) + "\n" for n, s in schemas().items()}
    made[functions.README] = functions.listed(functions.README.read_text("utf-8"))
    ordered = {name: hashes[name] for name in OPERATIONS}
    return made | {manifest.MANIFEST: render(ordered) + "\n"}


def _write(path: Path, text: str) -> None:
    if len(text) > LARGEST_FILE:
        raise SystemExit(f"{path.name} has {len(text)} bytes; 128 KB at most")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)
    print(f"{path}: {len(text)} bytes")


def files() -> Iterator[File]:
    """Collect the files of every row of the table."""
    for row in dict.fromkeys(operation.row for operation in OPERATIONS.values()):
        yield from import_module(f"minipeft.golden.cases.{row}").files()


def content(file: File) -> dict[str, Any]:
    """Return the content of the file."""
    groups, tests = [], 0
    for shared, specs in groupby(file.specs, key=lambda s: _shared(file, s)):
        group = json.loads(shared)
        numbered = list(enumerate(specs, start=tests + 1))
        tests += len(numbered)
        group["tests"] = [_test(file, spec, number) for number, spec in numbered]
        groups.append(group)
    return {
        "method": file.operation,
        "schema": f"{file.operation}.json",
        "license": "CC0-1.0",
        "header": list(file.header),
        "notes": {flag: _note(note) for flag, note in used(file).items()},
        "numberOfTests": tests,
        "testGroups": groups,
    }


def published(held: dict[str, Any]) -> dict[str, Any]:
    """Return the content, with the values of `v1/` where an SVD agrees with them.

    Where zero is exact, LAPACK leaves some 1e-17, and another number on another CPU.
    Within the case's own bound both are right, and the published one stays.
    """
    path = V1 / held["schema"]
    if held["method"] not in BY_SVD or not path.exists():
        return held
    old = json.loads(path.read_text(encoding="utf-8"))
    for test, known in zip(_rows(held), _rows(old), strict=False):
        if test["inputs"] == known["inputs"]:
            _settle(test, known)
    return held


def _rows(held: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for group in held["testGroups"]:
        for test in group["tests"]:
            yield {"compare": group["compare"], **test}


def _settle(test: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Put the known outputs in place of those that keep the test's bound."""
    for name, magnitude in test.get("magnitudes", {}).items():
        parts = (test["outputs"][name], known["outputs"][name], magnitude)
        rule = test["compare"][name]
        if difference(rule, *map(Tensor.from_json, parts)) is None:
            test["outputs"][name] = known["outputs"][name]


def _note(note: Note) -> dict[str, Any]:
    return {**asdict(note), "links": list(note.links)}


def render(value: Any, indent: str = "") -> str:
    """Format JSON so that a tensor, a list of flags, a note's link stay on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if _is_tensor(value) or len(indent + line) <= WIDTH:
        return line
    if isinstance(value, dict) and len(value) == 1 and _is_tensor(*value.values()):
        return line
    if not isinstance(value, dict | list):
        return line
    deeper = indent + " "
    if isinstance(value, list):
        items = [deeper + render(item, deeper) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    pairs = [
        f"{deeper}{json.dumps(name)}: {render(item, deeper)}"
        for name, item in value.items()
    ]
    return "{\n" + ",\n".join(pairs) + f"\n{indent}}}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"dtype", "shape", "data"}


def _shared(file: File, spec: Spec) -> str:
    """Return the common properties of neighbouring cases, as text to compare."""
    rules = _rules(file.operation, spec.roundings)
    source = {"name": file.source, "version": __version__}
    group = {"source": source, "parameters": dict(spec.parameters), "compare": rules}
    return json.dumps(group)


def _rules(operation: str, roundings: Mapping[str, int]) -> dict[str, str]:
    return {
        output: f"gamma:{roundings[output]}" if output in roundings else "bitwise"
        for output in OPERATIONS[operation].outputs
    }


def _test(file: File, spec: Spec, number: int) -> dict[str, Any]:
    test: dict[str, Any] = {
        "tcId": number,
        "comment": spec.comment,
        "flags": list(spec.flags),
        "result": spec.result,
        "inputs": _json(spec.inputs),
    }
    refuses = spec.result in ("invalid", "policy") or spec.outputs == {}
    if not refuses:
        test["outputs"] = _json(_expected(file.operation, spec))
    if spec.roundings:
        test["magnitudes"] = _json(_magnitudes(file.operation, spec))
    if spec.alternatives:
        test["alternatives"] = [_alternative(file, way) for way in spec.alternatives]
    return test


def _alternative(file: File, way: Alternative) -> dict[str, Any]:
    found: dict[str, Any] = {"name": way.name, "by": WAYS[way.name]}
    if way.outputs:
        found["outputs"] = _json(way.outputs)
    if way.roundings is not None:
        found["compare"] = _rules(file.operation, way.roundings)
    if way.magnitudes:
        found["magnitudes"] = _json(_map(way.magnitudes, _round_up))
    return found


def _expected(operation: str, spec: Spec) -> Named:
    if spec.outputs is not None:
        return spec.outputs
    if not spec.roundings:
        return reference(operation, spec.inputs, spec.parameters)
    # With a bound, the expected output is the exact one: float64, rounded once.
    exact = reference(operation, _map(spec.inputs, _double), spec.parameters)
    return _map(exact, lambda array: array.astype(np.float32))


def _magnitudes(operation: str, spec: Spec) -> Named:
    if spec.magnitudes is not None:
        return _map(spec.magnitudes, _round_up)
    # If outputs are sums of products, absolute values bound every partial sum.
    parameters = {
        name: abs(value) if name == "alpha" else value
        for name, value in spec.parameters.items()
    }
    sizes = _map(spec.inputs, lambda array: np.abs(_double(array)))
    return _map(reference(operation, sizes, parameters), _round_up)


def _round_up(array: Array) -> Array:
    # Of a number without axes NumPy would return no array.
    return np.asarray(np.nextafter(array.astype(np.float32), F32_INFINITY))


def _double(array: Array) -> Array:
    return array if array.dtype == np.uint8 else array.astype(np.float64)


def _map(arrays: Named, change: Any) -> Named:
    return {name: change(array) for name, array in arrays.items()}


def _json(arrays: Named) -> dict[str, Any]:
    return {name: Tensor.from_array(array).to_json() for name, array in arrays.items()}


if __name__ == "__main__":
    main()
