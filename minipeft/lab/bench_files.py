"""The pairs of `make bench` on files: a merge and an audit of 1.1 billion parameters.

The other side does what no program can leave out: it copies the same files, and hashes
them. So a ratio of 2 is half of its speed. The base is one file of bfloat16, and every
linear layer has LoRA; the fingerprint of the base is compared, as the commands do.
"""

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from minipeft.interop import audit, fingerprint, merging, peft_folder, peft_format
from minipeft.interop.adapter import Adapter
from minipeft.interop.tensors import About, open_tensors, writing
from minipeft.lab.timing import Pair, check

DEPTH, WIDTH, INNER, GROUPED, WORDS, RANK, ALPHA = 22, 2048, 5632, 256, 32000, 16, 32
HALF_THE_SPEED = 2.0
PIECE = 2**20


def shapes() -> dict[str, tuple[int, int]]:
    """Return the matrices of a Llama with grouped keys and values."""
    layer = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (GROUPED, WIDTH),
        "self_attn.v_proj": (GROUPED, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    found = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for i in range(DEPTH):
        found |= {f"model.layers.{i}.{n}.weight": s for n, s in layer.items()}
    return found


@cache
def folders() -> Path:
    """Write the base and an adapter into a folder that ends with the program."""
    root = Path(tempfile.mkdtemp(prefix="minipeft-bench-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    path = root / "base" / "model.safetensors"
    about = {name: About(torch.bfloat16, shape) for name, shape in shapes().items()}
    with writing(path, about, {"format": "pt"}) as file:
        for name, one in about.items():
            file.write(name, drawn(*one.shape).to(one.dtype))
    pairs = {}
    for name, (rows, columns) in shapes().items():
        if "_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            pairs[f"{key}A.weight"] = drawn(RANK, columns)
            pairs[f"{key}B.weight"] = drawn(rows, RANK)
    own = fingerprint.of_files(open_tensors(root / "base"))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    contents = peft_folder.Contents(config, pairs, {fingerprint.BASE: own.to_json()})
    peft_folder.write(root / "adapter", contents)
    return root


def merge() -> Pair:
    """A merge of the folder, with the comparison of the base."""
    root = folders()

    def ours() -> None:
        shutil.rmtree(root / "merged", ignore_errors=True)
        adapter = peft_format.read(root / "adapter")
        merging.merge(root / "base", adapter, root / "merged")

    size = (root / "base" / "model.safetensors").stat().st_size
    note = f"{size / 1e9:.1f} GB"
    theirs = copied(root / "base")
    return Pair("merge", "copy and SHA-256", ours, theirs, HALF_THE_SPEED, note)


def audited() -> Pair:
    """An audit of the merged folder, with the comparison of the base."""
    root = folders()
    merge().ours()

    def verdicts() -> Mapping[str, str]:
        opened = (open_tensors(root / name) for name in ("base", "merged"))
        base, found = opened
        found_out = audit.audit(base, _adapter(root), found)
        return {finding.tensor: finding.verdict for finding in found_out}

    wrong = sum(verdict != audit.EXACT for verdict in verdicts().values())
    check("the audit of a right merge", float(wrong), 0.0)
    theirs = copied(root / "base", root / "merged")
    return Pair("audit", "copy and SHA-256", verdicts, theirs, HALF_THE_SPEED)


def _adapter(root: Path) -> Adapter:
    adapter = peft_format.read(root / "adapter")
    own = fingerprint.of_files(open_tensors(root / "base"))
    merging.check_base(adapter, own)
    return adapter


def copied(*sources: Path) -> Callable[[], object]:
    """Return a turn that copies folders and hashes each of their files."""

    def turn() -> list[str]:
        found = []
        for source in sources:
            copy = source.with_name(f"{source.name}-copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
            found += [hashed(path) for path in sorted(source.iterdir())]
        return found

    return turn


def hashed(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces that stay in the cache."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


PAIRS: dict[str, Callable[[], Pair]] = {"files-merge": merge, "files-audit": audited}
