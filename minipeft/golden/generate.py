"""Write the vectors: `python -m minipeft.golden.generate [--out DIR]`.

The only writer of `v1/`. It is deterministic, so that regenerating into another folder
and comparing shows whether the reference still means what the vectors say.
"""

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from minipeft import __version__
from minipeft.golden.cases import File, Named, Spec, reference, used
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Array, Tensor
from minipeft.golden.vectors import V1

LARGEST_FILE = 64 * 1024
F32_INFINITY = np.float32(np.inf)
WIDTH = 100  # what fits on a line stays on a line


def main(arguments: list[str] | None = None) -> None:
    """Write every file into a folder, `v1/` unless told otherwise."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.golden.generate")
    parser.add_argument("--out", type=Path, default=V1, metavar="DIR")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for file in files():
        text = render(content(file)) + "\n"
        if len(text) > LARGEST_FILE:
            raise SystemExit(
                f"{file.operation}.json has {len(text)} bytes; 64 KB at most"
            )
        path = out / f"{file.operation}.json"
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
        print(f"{path}: {text.count('tcId')} cases, {len(text)} bytes")


def files() -> Iterator[File]:
    """Collect the files of every row of the table."""
    for row in dict.fromkeys(operation.row for operation in OPERATIONS.values()):
        yield from import_module(f"minipeft.golden.cases.{row}").files()


def content(file: File) -> dict[str, Any]:
    """Return what stands in the file."""
    groups, tests = [], 0
    for shared, specs in groupby(file.specs, key=lambda s: _shared(file, s)):
        group = json.loads(shared)
        numbered = list(enumerate(specs, start=tests + 1))
        tests += len(numbered)
        group["tests"] = [_test(file, spec, number) for number, spec in numbered]
        groups.append(group)
    return {
        "method": file.operation,
        "schema": OPERATIONS[file.operation].schema,
        "license": "CC0-1.0",
        "header": list(file.header),
        "notes": {
            flag: {
                "kind": file.notes[flag].kind,
                "description": file.notes[flag].description,
                "effect": file.notes[flag].effect,
                "links": list(file.notes[flag].links),
            }
            for flag in used(file.notes, file.specs)
        },
        "numberOfTests": tests,
        "testGroups": groups,
    }


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
    """Return what neighbouring cases have in common, as text that can be compared."""
    rules = {
        output: f"gamma:{spec.roundings[output]}"
        if output in spec.roundings
        else "bitwise"
        for output in OPERATIONS[file.operation].outputs
    }
    source = {"name": file.source, "version": __version__}
    group = {"source": source, "parameters": dict(spec.parameters), "compare": rules}
    return json.dumps(group)


def _test(file: File, spec: Spec, number: int) -> dict[str, Any]:
    test: dict[str, Any] = {
        "tcId": number,
        "comment": spec.comment,
        "flags": list(spec.flags),
        "result": spec.result,
        "inputs": _json(spec.inputs),
    }
    refuses = spec.result == "invalid" or spec.outputs == {}
    if not refuses:
        test["outputs"] = _json(_expected(file.operation, spec))
    if spec.roundings:
        test["magnitudes"] = _json(_magnitudes(file.operation, spec))
    if spec.alternatives:
        test["alternatives"] = [
            {"by": way.by, **({"outputs": _json(way.outputs)} if way.outputs else {})}
            for way in spec.alternatives
        ]
    return test


def _expected(operation: str, spec: Spec) -> Named:
    if spec.outputs is not None:
        return spec.outputs
    if not spec.roundings:
        return reference(operation, spec.inputs, spec.parameters)
    # Under a bound the exact result is wanted: float64, then one rounding.
    exact = reference(operation, _map(spec.inputs, _double), spec.parameters)
    return _map(exact, lambda array: array.astype(np.float32))


def _magnitudes(operation: str, spec: Spec) -> Named:
    if spec.magnitudes is not None:
        return _map(spec.magnitudes, _round_up)
    # Where outputs are sums of products, absolute values bound every partial sum.
    parameters = {
        name: abs(value) if name == "alpha" else value
        for name, value in spec.parameters.items()
    }
    sizes = _map(spec.inputs, lambda array: np.abs(_double(array)))
    return _map(reference(operation, sizes, parameters), _round_up)


def _round_up(array: Array) -> Array:
    return np.nextafter(array.astype(np.float32), F32_INFINITY)


def _double(array: Array) -> Array:
    return array.astype(np.float64)


def _map(arrays: Named, change: Any) -> Named:
    return {name: change(array) for name, array in arrays.items()}


def _json(arrays: Named) -> dict[str, Any]:
    return {name: Tensor.from_array(array).to_json() for name, array in arrays.items()}


if __name__ == "__main__":
    main()
