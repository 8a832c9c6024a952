"""Write the archive of vectors: `python -m minipeft.golden.archive`, `make vectors`.

The archive is a folder and a zip file, whose bytes depend on nothing but the version of
zlib. It holds the files, their schemas, every case on a line of its own, loaders and
examples in other languages, the licence, and a checksum for each file.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from minipeft.errors import InputError, cannot_write
from minipeft.golden import loaders
from minipeft.golden.vectors import V1

NAME = "minipeft-vectors-v1"
GOLDEN = V1.parent
COPIED = ("v1/*.json", "schema/*.json", "profiles.json", "LICENSE", "README.md")


def main(arguments: list[str] | None = None) -> None:
    """Write `minipeft-vectors-v1` and its zip file into a folder."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.golden.archive")
    parser.add_argument("--out", type=Path, default=Path("build"), metavar="DIR")
    out: Path = parser.parse_args(arguments).out
    path, files = out / f"{NAME}.zip", contents()
    try:
        _write(out / NAME, files)
        pack(path, files)
    except OSError as error:
        parser.exit(2, f"archive: {cannot_write(error.filename or out, error)}\n")
    except InputError as error:
        parser.exit(2, f"archive: {error}\n")
    print(f"{path}: {len(files)} files, {path.stat().st_size} bytes")
    print(f"sha256 {sha256(path.read_bytes()).hexdigest()}")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files, unless the folder holds vectors that are none of them."""
    for path in sorted([*folder.glob("v1/*.json"), *folder.glob("schema/*.json")]):
        if path.relative_to(folder).as_posix() not in files:
            raise InputError(
                f"{path} is no file of this archive, and a loader would read it; "
                f"remove {folder}"
            )
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def contents() -> dict[str, bytes]:
    """Return every file of the archive by its name."""
    files = {
        path.relative_to(GOLDEN).as_posix(): path.read_bytes()
        for pattern in COPIED
        for path in sorted(GOLDEN.glob(pattern))
    }
    files["cases.jsonl"] = "".join(lines()).encode()
    for name, text in loaders.write().items():
        files[f"languages/{name}"] = text.encode()
    for path in sorted((GOLDEN / "examples").iterdir()):
        files[f"languages/{path.name}"] = path.read_bytes()
    sums = (f"{sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    return {**files, "SHA256SUMS": "".join(sums).encode()}


def lines() -> Iterator[str]:
    """Return every case as one complete line of JSON."""
    for path in sorted(V1.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        for group in file["testGroups"]:
            shared = {name: group[name] for name in ("parameters", "compare")}
            for test in group["tests"]:
                case = {"operation": file["method"], **shared, **test}
                yield json.dumps(case, ensure_ascii=False) + "\n"


def pack(path: Path, files: dict[str, bytes]) -> None:
    """Write a zip file whose bytes depend on no time, user or order of files."""
    with ZipFile(path, "w") as archive:
        for name, data in sorted(files.items()):
            entry = ZipInfo(f"{NAME}/{name}")
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, ZIP_DEFLATED)


if __name__ == "__main__":
    main()
