"""Loaders of the vectors for C++, Rust and TypeScript, written from the schema.

One file for each language, without dependencies: a JSON parser if the language has
none, and a type for every object of `schema/common.json`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.golden.schemas import schemas

HERE = Path(__file__).parent
NOTICE = "// Written from schema/common.json by minipeft; licence CC0-1.0.\n"

# A type is a word (text, integer, any), a list or map of types, or a struct.
Type = tuple[str, ...]


@dataclass(frozen=True)
class Field:
    """A property of an object."""

    name: str
    type: Type
    required: bool


Structs = dict[str, list[Field]]


def write() -> dict[str, str]:
    """Return each loader's text by the name of its file."""
    types = structs()
    return {
        "minipeft_vectors.hpp": NOTICE + (HERE / "json.hpp").read_text() + _cpp(types),
        "minipeft_vectors.rs": NOTICE + (HERE / "json.rs").read_text() + _rust(types),
        "minipeft_vectors.ts": NOTICE + _typescript(types),
    }


def structs() -> Structs:
    """Return the objects of the schema; each comes after the objects inside it."""
    definitions: Mapping[str, Any] = schemas()["common.json"]["$defs"]
    found: Structs = {}
    _type(definitions, definitions["file"], "file", found)
    return found


def _type(
    definitions: Mapping[str, Any], schema: Mapping[str, Any], name: str, found: Structs
) -> Type:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _type(definitions, definitions[name], name, found)
    if "properties" in schema:
        fields = [
            Field(key, _type(definitions, value, key, found), key in schema["required"])
            for key, value in schema["properties"].items()
        ]
        title = "VectorFile" if name == "file" else name.capitalize()
        found.setdefault(title, fields)
        return (title,)
    if "additionalProperties" in schema:
        return ("map", *_type(definitions, schema["additionalProperties"], name, found))
    if schema.get("type") == "array":
        return ("list", *_type(definitions, schema["items"], name, found))
    return (_WORDS.get(schema.get("type", "string"), "text"),)


_WORDS = {"string": "text", "integer": "integer", "object": "any"}


def _spell(kind: Type, words: Mapping[str, str]) -> str:
    head, rest = kind[0], kind[1:]
    if head in ("list", "map"):
        return words[head].format(_spell(rest, words))
    return words.get(head, head)


_CPP = {
    "text": "std::string",
    "integer": "std::int64_t",
    "any": "Json",
    "list": "std::vector<{}>",
    "map": "std::map<std::string, {}>",
}


def _cpp(types: Structs) -> str:
    return "\nnamespace minipeft {\n" + "".join(_cpp_parts(types)) + _CPP_END


def _cpp_parts(types: Structs) -> Iterator[str]:
    for name, fields in types.items():
        yield f"\nstruct {name} {{\n"
        for field in fields:
            spelled = _spell(field.type, _CPP)
            spelled = spelled if field.required else f"std::optional<{spelled}>"
            yield f"    {spelled} {field.name};\n"
        yield f"}};\ninline void read(const Json &json, {name} &to) {{\n"
        for field in fields:
            read = f'read(json.at("{field.name}"), to.{field.name}'
            if field.required:
                yield f"    {read});\n"
            else:
                yield f'    if (json.has("{field.name}")) {read}.emplace());\n'
        yield "}\n"


_CPP_END = """
inline VectorFile load(const std::string &text) {
    VectorFile file;
    read(Json::parse(text), file);
    return file;
}

// The bytes of a tensor, in C order, little-endian.
inline std::vector<unsigned char> bytes(const Tensor &tensor) {
    const std::string digits = "0123456789abcdef";
    std::vector<unsigned char> found(tensor.data.size() / 2);
    for (std::size_t i = 0; i < tensor.data.size(); i++) {
        auto digit = digits.find(tensor.data[i]);
        if (digit == std::string::npos || tensor.data.size() % 2)
            throw std::runtime_error("data is no hexadecimal text");
        found[i / 2] = static_cast<unsigned char>(found[i / 2] << 4 | digit);
    }
    return found;
}

}  // namespace minipeft
"""

_RUST = {
    "text": "String",
    "integer": "i64",
    "any": "Json",
    "list": "Vec<{}>",
    "map": "BTreeMap<String, {}>",
}


def _rust(types: Structs) -> str:
    return "".join(_rust_parts(types)) + _RUST_END


def _rust_parts(types: Structs) -> Iterator[str]:
    for name, fields in types.items():
        yield f"\n#[derive(Clone, Debug)]\npub struct {name} {{\n"
        for field in fields:
            spelled = _spell(field.type, _RUST)
            spelled = spelled if field.required else f"Option<{spelled}>"
            yield f"    pub {field.name}: {spelled},\n"
        yield f"}}\n\nimpl Read for {name} {{\n"
        yield "    fn read(json: &Json) -> Result<Self> {\n        Ok(Self {\n"
        for field in fields:
            read = f'Read::read(json.at("{field.name}")?)?'
            if not field.required:
                read = f'json.get("{field.name}").map(Read::read).transpose()?'
            yield f"            {field.name}: {read},\n"
        yield "        })\n    }\n}\n"


_RUST_END = """
pub fn load(text: &str) -> Result<VectorFile> {
    VectorFile::read(&Json::parse(text)?)
}

/// The bytes of a tensor, in C order, little-endian.
pub fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let digit = |c: &u8| char::from(*c).to_digit(16);
    let byte = |pair: &[u8]| {
        Some((digit(pair.first()?)? << 4 | digit(pair.get(1)?)?) as u8)
    };
    let found: Option<_> = tensor.data.as_bytes().chunks(2).map(byte).collect();
    found.ok_or_else(|| "data is no hexadecimal text".into())
}
"""

_TYPESCRIPT = {
    "text": "string",
    "integer": "number",
    "any": "Record<string, unknown>",
    "list": "{}[]",
    "map": "Record<string, {}>",
}


def _typescript(types: Structs) -> str:
    parts = []
    for name, fields in types.items():
        lines = [
            f"  {field.name}{'' if field.required else '?'}: "
            f"{_spell(field.type, _TYPESCRIPT)};\n"
            for field in fields
        ]
        parts.append(f"\nexport interface {name} {{\n{''.join(lines)}}}\n")
    return "".join(parts) + _TYPESCRIPT_END


_TYPESCRIPT_END = """
export function load(text: string): VectorFile {
  return JSON.parse(text) as VectorFile;
}

/** The bytes of a tensor, in C order, little-endian. */
export function bytes(tensor: Tensor): Uint8Array {
  if (tensor.data.length % 2 || /[^0-9a-f]/.test(tensor.data))
    throw new Error("data is no hexadecimal text");
  const pairs = tensor.data.match(/../g) ?? [];
  return Uint8Array.from(pairs, (pair) => parseInt(pair, 16));
}
"""
