"""How the files under `minipeft/lab/data/` were made: `python tools/prepare_data.py`.

Takes the folders into which `dpkg-deb -x` unpacked the Debian packages
`r-cran-janeaustenr` and `dict-devil`. Run once by hand; the results are committed.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
import struct
import zlib
from pathlib import Path

from minipeft.lab.data import DATA
from minipeft.lab.files import write_atomic

NAMES = {
    "emma": "emma",
    "mansfieldpark": "mansfield_park",
    "northangerabbey": "northanger_abbey",
    "persuasion": "persuasion",
    "prideprejudice": "pride_and_prejudice",
    "sensesensibility": "sense_and_sensibility",
}
EDITOR = re.compile(
    r"A NOTE ON THE TEXT.*"  # closes Northanger Abbey
    r"|\[At this point in the [^]]*\]|\[End volume [^]]*\]",
    re.DOTALL,
)
CROSS_REFERENCE = re.compile(
    r"\(See [^)]*\)|\[from [^]]*\]|^See \{[^}]*\}\.|\(Vide supra\.\)"
)
SENTENCE_END = re.compile(r"[a-z]{3}[.!?][\"')]?(?= |$)")  # not that of "Dr."
HEADWORD = re.compile(
    r"(?P<word>[A-Z][A-Z' -]+), ?"
    r"(?P<part>(?:n|adj|adv|v|v\.t|v\.i|n\.pl|pp|p\.p|pro|pron|x|interj)\.)"
    r"\s+(?P<definition>\S.*)",
    re.DOTALL,
)


def novels(folder: Path) -> dict[str, str]:
    """Return the six novels from R's compressed lazy-load database."""
    import rdata

    def load(data: bytes) -> object:
        return rdata.conversion.convert(rdata.parser.parse_data(data))

    root = folder / "usr/lib/R/site-library/janeaustenr/data"
    index = load(zlib.decompress((root / "Rdata.rdx").read_bytes(), wbits=47))
    database = (root / "Rdata.rdb").read_bytes()
    texts = {}
    for name, (offset, length) in index["variables"].items():  # type: ignore[index]
        record = database[int(offset) : int(offset) + int(length)]
        (size,) = struct.unpack(">I", record[:4])
        lines = load(_inflate(record[4:], size))
        texts[NAMES[name]] = one_paragraph_a_line("\n".join(map(str, lines)))  # type: ignore[call-overload]
    return texts


def _inflate(record: bytes, size: int) -> bytes:
    """Undo R's compression: `Z` marks raw LZMA2, anything else here is zlib."""
    if record[:1] != b"Z":
        return zlib.decompress(record, bufsize=size)
    filters = [{"id": lzma.FILTER_LZMA2}]
    return lzma.decompress(record[1:], lzma.FORMAT_RAW, filters=filters)


def one_paragraph_a_line(text: str) -> str:
    """Join wrapped lines, drop modern editors' notes; one line is one paragraph."""
    paragraphs = re.split(r"\n\s*\n", EDITOR.sub("", text))
    joined = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n".join(line for line in joined if line) + "\n"


def definitions(folder: Path) -> list[dict[str, str]]:
    """Return every entry whose definition is prose: its first paragraph, cleaned."""
    text = gzip.decompress((folder / "usr/share/dictd/devil.dict.dz").read_bytes())
    entries = []
    for block in re.split(r"\n\s*\n", text.decode("utf-8")):
        if match := HEADWORD.fullmatch(block.strip("\n")):
            entry = {
                "word": match["word"].lower(),
                "part": match["part"],
                "definition": sentences(match["definition"]),
            }
            if entry["definition"] and entry not in entries:
                entries.append(entry)
    return entries


def sentences(text: str) -> str:
    """Drop emphasis marks, cross-references, and the words that announce a verse."""
    unwrapped = " ".join(text.replace("_", "").split())
    plain = " ".join(CROSS_REFERENCE.sub("", unwrapped).split())
    ends = [match.end() for match in SENTENCE_END.finditer(plain)]
    announces = plain.endswith((":", "--", " he"))  # "... Xanadu -- that he"
    return plain[: max(ends, default=0)] if announces else plain


def compress(text: str) -> bytes:
    """Return UTF-8 text in the xz format, as small as it gets."""
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def main() -> None:
    """Write the data files and SHA256SUMS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("janeaustenr", type=Path, help="unpacked r-cran-janeaustenr")
    parser.add_argument("devil", type=Path, help="unpacked dict-devil")
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    files = {
        f"{name}.txt.xz": compress(text)
        for name, text in novels(options.janeaustenr).items()
    }
    lines = [json.dumps(entry) + "\n" for entry in definitions(options.devil)]
    files["devils_dictionary.jsonl.xz"] = compress("".join(lines))
    for name, data in files.items():
        write_atomic(options.out / name, data)
    sums = [
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)
    ]
    write_atomic(options.out / "SHA256SUMS", "".join(sums).encode())


if __name__ == "__main__":
    main()
