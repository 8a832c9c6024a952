"""Damage valid files at random: a parser reads each, or refuses it in one sentence.

Run by hand, ten minutes a parser (`make fuzz`), or for seconds by the tests. The seed
fixes every file: a failure prints the number of its file, and the file is kept.
"""

import argparse
import json
import math
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.golden import vectors
from minipeft.interop import gguf_format, gguf_names, peft_folder, peft_format
from minipeft.interop.tensors import INDEX, Shards, Tensors, open_tensors
from minipeft.lab import checkpoint
from minipeft.torch.adamw import AdamW
from minipeft.torch.inject import inject
from minipeft.torch.lora import LoRAConfig

LONGEST = 20  # seconds that a parser may take for a file of some kilobytes
NUMBERS = (
    0,
    1,
    127,
    128,
    255,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 0.5, 2**31, -(2**70), 10**400, math.inf, math.nan),
    *("", "x", "F32", "../x", "\0", "\ud800", "(", "(a+)+$", [], {}, [[]], {"": None}),
)

Bytes = Callable[[random.Random, bytes], bytes]


class FuzzError(Exception):
    """A parser met a file with anything but a sentence."""


@dataclass(frozen=True)
class Parser:
    """A reader of one kind of file, and a valid file.

    Args:
        path: of the file that is damaged before each reading.
        good: its bytes.
        read: reads it and all it holds.
        damage: what may be done to the bytes, beside what may be done to any.
    """

    path: Path
    good: bytes
    read: Callable[[], object]
    damage: tuple[Bytes, ...] = ()

    def damaged(self, draw: random.Random) -> bytes:
        """Return the bytes of one damaged file."""
        data = draw.choice((*ANY, *self.damage * len(ANY)))(draw, self.good)
        return cut(draw, data) if draw.random() < 0.1 else data

    def check(self, data: bytes) -> bool:
        """Read one file; return whether it was refused.

        Raises:
            FuzzError: anything but a result or one sentence came out.
        """
        self.path.write_bytes(data)
        try:
            with limited(LONGEST):
                self.read()
        except InputError as error:
            if "\n" in str(error).strip() or not str(error).strip():
                raise FuzzError(f"not one sentence: {error}") from error
            return True
        except Exception as error:
            raise FuzzError("".join(traceback.format_exception(error))) from error
        return False


def flip(draw: random.Random, data: bytes) -> bytes:
    """Change one bit."""
    found = bytearray(data)
    found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def cut(draw: random.Random, data: bytes) -> bytes:
    """End early."""
    return data[: draw.randrange(len(data) or 1)]


def splice(draw: random.Random, data: bytes) -> bytes:
    """Put one piece in the place of another."""
    start, end = sorted(draw.choices(range(len(data) + 1), k=2))
    place = draw.randrange(len(data) + 1)
    size = draw.choice((0, 1, 4, 8, end - start))
    return (
        data[:place]
        + data[start : start + size]
        + data[place + draw.randint(0, size) :]
    )


def number(draw: random.Random, data: bytes) -> bytes:
    """Write an odd number of four or eight bytes near the start or anywhere."""
    code, size = draw.choice((("<I", 4), ("<Q", 8)))
    place = draw.randrange(draw.choice((64, 4096, len(data))) % len(data) or 1)
    value = draw.choice(NUMBERS) % 2 ** (8 * size)
    return data[:place] + struct.pack(code, value) + data[place + size :]


def deep(draw: random.Random, data: bytes) -> bytes:
    """Open more brackets than anybody closes."""
    return data[:8] + draw.choice((b"[", b'{"a":')) * draw.choice((200, 100_000))


ANY: tuple[Bytes, ...] = (flip, cut, splice, number, deep)


def odd_json(draw: random.Random, value: Any) -> Any:
    """Return a JSON value with one part replaced, left out, added or renamed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(VALUES)
    found: Any = dict(value) if isinstance(value, dict) else list(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    kind = draw.choice(("inside", "inside", "inside", "drop", "add"))
    if kind == "drop":
        del found[key]
    elif kind == "add" and isinstance(found, dict):
        found[draw.choice(("x", "", str(key) + ".x"))] = draw.choice(
            (*VALUES, found[key])
        )
    elif kind == "add":
        found.insert(key, draw.choice((*VALUES, found[key])))
    else:
        found[key] = odd_json(draw, found[key])
    return found


def in_json(draw: random.Random, data: bytes) -> bytes:
    """Damage a file that is JSON."""
    return json.dumps(odd_json(draw, json.loads(data))).encode()


def in_header(draw: random.Random, data: bytes) -> bytes:
    """Damage the header of a safetensors file; its length stays right."""
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(odd_json(draw, json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def in_checkpoint(draw: random.Random, data: bytes) -> bytes:
    """Damage what a checkpoint says, with a checksum that is right."""
    tensors = safetensors.torch.load(data)
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    header = json.loads(metadata["minipeft"])
    if draw.random() < 0.3:
        name = draw.choice(sorted(tensors))
        other = tensors.pop(name)
        draw.choice(
            (
                lambda: tensors.update({f"{name}x": other}),
                lambda: tensors.update({name: other.double()}),
                lambda: tensors.update({name: other.reshape(-1)[:1].clone()}),
                lambda: tensors.update({name: torch.full(other.shape, math.nan)}),
                lambda: None,
            )
        )()
    else:
        header = odd_json(draw, header)
    text = json.dumps(header)
    metadata = {"minipeft": text, "sha256": checkpoint._checksum(text, tensors)}
    return settled(safetensors.torch.save(tensors, metadata=metadata))


def settled(data: bytes) -> bytes:
    """Sort a header's keys: the library writes its metadata in a random order."""
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_all(tensors: Tensors) -> None:
    """Read every tensor, and its bytes."""
    for name in tensors.about:
        tensors.read(name)
        for _ in tensors.pieces(name):
            pass


def parser_of_checkpoints(folder: Path) -> Parser:
    """Return the parser, with the run of a small adapted model."""
    torch.manual_seed(0)
    path = folder / "run.safetensors"
    model = inject(nn.Sequential(nn.Linear(4, 3)), LoRAConfig(2, 4.0), ["0"])
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint.save_checkpoint(
        path,
        model,
        optimizer,
        checkpoint.Progress(3, [0.5], [(2, 0.25)], 1.0, {"a": "b"}),
    )
    read = partial(checkpoint.load_checkpoint, path, model, optimizer)
    return Parser(path, settled(path.read_bytes()), read, (in_header, in_checkpoint))


def weights() -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by peft's names."""
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{key}.lora_A.weight": torch.randn(2, 6),
        f"{key}.lora_B.weight": torch.randn(4, 2),
        f"{key}.lora_magnitude_vector": torch.rand(4),
        "base_model.model.lm_head.modules_to_save.weight": torch.randn(3, 6).half(),
    }


def folder_of_peft(folder: Path) -> tuple[bytes, bytes]:
    """Write an adapter's folder; return its two files."""
    folder.mkdir(exist_ok=True)
    config = {
        **{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True},
        **{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        **{"target_modules": ["q_proj"], "use_dora": True, "bias": "none"},
        **{"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]},
    }
    data = safetensors.torch.save(weights(), metadata={"format": "pt"})
    (folder / peft_folder.WEIGHTS).write_bytes(data)
    text = json.dumps(config).encode()
    (folder / peft_folder.CONFIG).write_bytes(text)
    return data, text


def parser_of_peft_weights(folder: Path) -> Parser:
    """Return the parser of an adapter's folder; its weights are damaged."""
    data, _ = folder_of_peft(folder)
    read = partial(peft_format.read, folder)
    return Parser(folder / peft_folder.WEIGHTS, data, read, (in_header,))


def parser_of_peft_configs(folder: Path) -> Parser:
    """Return the parser of an adapter's folder; its configuration is damaged."""
    _, text = folder_of_peft(folder)
    read = partial(peft_format.read, folder)
    return Parser(folder / peft_folder.CONFIG, text, read, (in_json,))


def parser_of_peft_checksums(folder: Path) -> Parser:
    """Return the parser of a folder as we write it; its weights hold a checksum."""
    _, text = folder_of_peft(folder)
    metadata = {"minipeft.note": "a", "note": "b"}  # the first is covered
    mine, contents = folder / "mine", peft_folder.Contents
    peft_folder.write(mine, contents(json.loads(text), weights(), metadata))
    path = mine / peft_folder.WEIGHTS
    good, read = settled(path.read_bytes()), partial(peft_format.read, mine)
    return Parser(path, good, read, (in_header,))


def parser_of_safetensors(folder: Path) -> Parser:
    """Return the parser of one file."""
    path = folder / "model.safetensors"
    data = safetensors.torch.save(weights(), metadata={"format": "pt"})
    return Parser(path, data, lambda: read_all(open_tensors(path)), (in_header,))


def parser_of_indices(folder: Path) -> Parser:
    """Return the parser of a folder of shards; its index is damaged."""
    places = {}
    for i, (name, tensor) in enumerate(weights().items()):
        places[name] = f"model-{i}.safetensors"
        (folder / places[name]).write_bytes(safetensors.torch.save({name: tensor}))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    return Parser(folder / INDEX, text, lambda: read_all(Shards(folder)), (in_json,))


def parser_of_gguf(folder: Path) -> Parser:
    """Return the parser, with a model of one layer."""
    path = folder / "model.gguf"
    config = {
        **{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "vocab_size": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32},
        **{"num_hidden_layers": 1, "max_position_embeddings": 8, "rms_norm_eps": 1e-5},
    }
    layer = "model.layers.0"
    theirs = gguf_names.names("llama", 1)
    plan: gguf_format.Plan = {
        "model.embed_tokens.weight": ((8, 32), gguf_format.TYPES["Q8_0"]),
        f"{layer}.self_attn.q_proj.weight": ((32, 32), gguf_format.TYPES["F16"]),
        f"{layer}.self_attn.k_proj.weight": ((16, 32), gguf_format.TYPES["BF16"]),
        "model.norm.weight": ((32,), gguf_format.TYPES["F32"]),
    }
    with gguf_format._writing(path, "llama") as writer:
        gguf_format._hyperparameters(writer, config)
        writer.add_token_list(["a", "b"])
        gguf_format._announce_all(writer, theirs, plan, None)
        for shape, kind in plan.values():
            writer.write_tensor_data(gguf_format.encode(torch.randn(shape), kind))
    return Parser(
        path, path.read_bytes(), lambda: read_all(gguf_format.GgufTensors(path))
    )


def parser_of_vectors(folder: Path) -> Parser:
    """Return the parser of a file of vectors."""
    path = folder / "pissa_to_lora.json"
    good = (vectors.V1 / path.name).read_bytes()
    return Parser(path, good, lambda: vectors.load(path), (in_json,))


PARSERS: Mapping[str, Callable[[Path], Parser]] = {
    "checkpoints": parser_of_checkpoints,
    "safetensors": parser_of_safetensors,
    "indices": parser_of_indices,
    "peft-weights": parser_of_peft_weights,
    "peft-configs": parser_of_peft_configs,
    "peft-checksums": parser_of_peft_checksums,
    "gguf": parser_of_gguf,
    "vectors": parser_of_vectors,
}


def fuzz(
    name: str, seed: int, keep: Path, seconds: float = math.inf, files: float = math.inf
) -> tuple[int, int]:
    """Damage files of one kind; return how many, and how many were refused.

    It ends after so many seconds or files, and the files follow from the seed alone.

    Raises:
        FuzzError: the first that was neither read nor refused in a sentence.
    """
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        parser = PARSERS[name](Path(folder))
        if parser.check(parser.good):
            raise FuzzError("the valid file is refused")
        refused, count, end = 0, 0, time.monotonic() + seconds
        while count < files and time.monotonic() < end:
            data = parser.damaged(random.Random(f"{seed} {name} {count}"))
            try:
                refused += parser.check(data)
            except FuzzError as failure:
                keep.mkdir(parents=True, exist_ok=True)
                place = keep / f"{name}-{seed}-{count}"
                place.write_bytes(data)
                raise FuzzError(
                    f"{failure}{name}: file {count}, kept as {place}"
                ) from None
            count += 1
    return count, refused


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parsers", nargs="*", default=[], metavar="PARSER")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    args = parser.parse_args()
    failed = 0
    for name in args.parsers or PARSERS:
        try:
            count, refused = fuzz(name, args.seed, args.keep, args.seconds)
        except FuzzError as failure:
            failed = 1
            print(failure, file=sys.stderr)
        else:
            print(f"{name}: {count} files, {refused} refused, the others read")
    return failed


if __name__ == "__main__":
    sys.exit(main())
