"""The schemas of the files, made from the table of operations.

`common.json` describes the parts that every file has. The schema of an operation adds
its own parameters, rules, inputs, outputs and magnitudes.
"""

from collections.abc import Mapping
from typing import Any

from minipeft.golden.arguments import Argument
from minipeft.golden.operations import OPERATIONS, Operation

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def schemas() -> dict[str, Schema]:
    """Return every schema by the name of its file."""
    narrowed = {f"{name}.json": _operation(name) for name in OPERATIONS}
    return {"common.json": COMMON, **narrowed}


def _operation(name: str) -> Schema:
    operation = OPERATIONS[name]
    magnitudes = {k: _common("magnitude") for k in _bounded(operation)}
    return {
        "$schema": DRAFT,
        "$id": f"{name}.json",
        "title": operation.signature(name),
        "$ref": "common.json#/$defs/file",
        "properties": {
            "method": {"const": name},
            "schema": {"const": f"{name}.json"},
            "testGroups": _each(_group(operation)),
        },
        "$defs": {
            "outputs": _closed(_types(operation.outputs)),
            **({"magnitudes": _some_of(magnitudes)} if magnitudes else {}),
        },
    }


def _group(operation: Operation) -> Schema:
    bounded = _bounded(operation)
    test: Schema = {
        "inputs": _closed(_types(operation.tensors), operation.optional),
        "outputs": _own("outputs"),
        "magnitudes": _own("magnitudes") if bounded else False,
    }
    rules = _closed(
        {
            name: _common("rule") if name in bounded else {"const": "bitwise"}
            for name in operation.outputs
        }
    )
    way = {k: test[k] for k in ("outputs", "magnitudes")} | {"compare": rules}
    test["alternatives"] = _each(way)
    return {
        "parameters": _closed(_types(operation.parameters)),
        "compare": rules,
        "tests": _each(test),
    }


def _bounded(operation: Operation) -> list[str]:
    """Return the outputs that a case may compare with a bound."""
    return [name for name, output in operation.outputs.items() if not output.exact]


def _types(arguments: Mapping[str, Argument]) -> Schema:
    return {name: _type(argument) for name, argument in arguments.items()}


def _type(argument: Argument) -> Schema:
    if not argument.is_tensor:
        return {"description": argument.meaning, **argument.type}
    axes, dtypes = argument.type["axes"], list(argument.type["dtypes"])
    return {
        "description": f"{argument.meaning} Shape: {axes}.",
        "$ref": "common.json#/$defs/tensor",
        "properties": {"dtype": {"enum": dtypes}},
    }


def _closed(properties: Schema, optional: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object with exactly these properties."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name in properties if name not in optional],
        "properties": properties,
    }


def _some_of(properties: Schema) -> Schema:
    """Return the schema of an object with some of these properties."""
    return _closed(properties, optional=tuple(properties))


def _each(properties: Schema) -> Schema:
    """Add rules for every item of a list that `common.json` describes."""
    return {"items": {"properties": properties}}


def _common(name: str) -> Schema:
    return {"$ref": f"common.json#/$defs/{name}"}


def _own(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _text(description: str) -> Schema:
    return {"description": description, "type": "string"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _some(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


def _when(result: str, then: Schema) -> Schema:
    return {"if": {"properties": {"result": {"const": result}}}, "then": then}


_REFUSED = {
    "not": {"anyOf": [{"required": ["outputs"]}, {"required": ["alternatives"]}]}
}

_FILE = _closed(
    {
        "method": _text("The operation: the function to call."),
        "schema": {"type": "string", "pattern": "^[a-z0-9_]+\\.json$"},
        "license": {"const": "CC0-1.0"},
        "header": _some(_text("What it computes.")),
        "notes": {
            "description": "What the flags of the tests stand for.",
            "type": "object",
            "propertyNames": {"pattern": "^[A-Z][A-Za-z0-9]*$"},
            "additionalProperties": _own("note"),
        },
        "numberOfTests": {"type": "integer", "minimum": 1},
        "testGroups": _some(_own("group")),
    }
)

_NOTE = _closed(
    {
        "kind": {
            "enum": ["BASIC", "EDGE_CASE", "CONVENTION", "NUMERICS", "HISTORIC_BUG"]
        },
        "description": _text("What is special about the input."),
        "effect": _text("What breaks where the test fails."),
        "links": _list({"type": "string", "pattern": "^https://"}),
    }
) | {
    "if": {"properties": {"kind": {"const": "HISTORIC_BUG"}}},
    "then": {"properties": {"links": {"minItems": 1}}},
}

_GROUP = _closed(
    {
        "source": {
            "description": "What computed the outputs.",
            **_closed({"name": {"type": "string"}, "version": {"type": "string"}}),
        },
        "parameters": {"type": "object", "description": "Arguments but the tensors."},
        "compare": _own("rules"),
        "tests": _some(_own("test")),
    }
)

_ALTERNATIVE = _closed(
    {
        "name": _text("What a profile states; one way has one name in all files.")
        | {"pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"},
        "by": _text("Who answers so."),
        "outputs": {"description": "Absent: they refuse.", **_own("tensors")},
        "compare": {
            "description": "Rules for these outputs; absent: the group's.",
            **_own("rules"),
        },
        "magnitudes": {"description": "Those of compare.", **_own("tensors")},
    },
    optional=("outputs", "compare", "magnitudes"),
)

_TEST = _closed(
    {
        "tcId": {"type": "integer", "minimum": 1},
        "comment": {"type": "string", "minLength": 1},
        "flags": _some({"type": "string"}) | {"uniqueItems": True},
        "result": {"enum": ["valid", "invalid", "acceptable", "policy"]},
        "inputs": _own("tensors"),
        "outputs": _own("tensors"),
        "magnitudes": {
            "description": "For outputs under gamma:n, the sum of the absolute values "
            "of all terms.",
            **_own("tensors"),
        },
        "alternatives": _some(_own("alternative"))
        | {"description": "Answers that others give with good reason."},
    },
    optional=("outputs", "magnitudes", "alternatives"),
) | {
    "allOf": [
        _when(
            "valid", {"required": ["outputs"], "not": {"required": ["alternatives"]}}
        ),
        _when("invalid", _REFUSED),
        _when("policy", _REFUSED),
        _when("acceptable", {"required": ["alternatives"]}),
    ]
}

_TENSOR = {
    "description": "C order, little-endian, two hexadecimal digits for each byte."
} | _closed(
    {
        "dtype": {"enum": ["uint8", "float16", "bfloat16", "float32", "float64"]},
        "shape": _list({"type": "integer", "minimum": 0}),
        "data": {"type": "string", "pattern": "^([0-9a-f]{2})*$"},
    }
)

COMMON: Schema = {
    "$schema": DRAFT,
    "$id": "common.json",
    "title": "What every file of golden vectors holds",
    "description": "The schema of an operation narrows parameters, compare, inputs, "
    "outputs and magnitudes, which are open here. Everything else is closed here.",
    "$defs": {
        "file": _FILE,
        "note": _NOTE,
        "group": _GROUP,
        "rule": {
            "type": "string",
            "pattern": "^(bitwise|ulp:[1-9][0-9]*|gamma:[1-9][0-9]*)$",
        },
        "rules": {"type": "object", "additionalProperties": _own("rule")},
        "test": _TEST,
        "alternative": _ALTERNATIVE,
        "tensors": {"type": "object", "additionalProperties": _own("tensor")},
        "tensor": _TENSOR,
        "magnitude": {
            "properties": {"dtype": {"const": "float32"}},
            **_own("tensor"),
        },
    },
}
