"""GGUF, the format of llama.cpp and Ollama: adapters, merged models, and reading both.

llama.cpp computes the scale of an adapter as alpha / r, with one alpha for all layers,
and supports neither rank-stabilized scales nor patterns. So B is multiplied by its
scale here, and alpha is written as 0, which means "scale 1" to llama.cpp.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from minipeft.errors import InputError, cannot_write
from minipeft.interop import fingerprint, gguf_vocabulary, made, tying
from minipeft.interop.adapter import Adapter
from minipeft.interop.gguf_names import family, heads_turned, names, turn, turn_back
from minipeft.interop.merging import cast
from minipeft.interop.rounding import Q8, Cast, Rounding, Through
from minipeft.interop.tensors import PIECE, About, Tensors, in_pieces
from minipeft.interop.update import merged
from minipeft.values import check_integer

TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
ALPHA = 0.0  # in every adapter that is written here: B holds the scale
Config = Mapping[str, Any]
Plan = dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType]]


def scaling(alpha: float, r: int, share: float = 1.0) -> float:
    """Return the factor of B A in llama.cpp.

    Args:
        alpha: `adapter.lora.alpha` in the file; 0 stands for "scale 1".
        r: the rank of the matrices.
        share: what the user sets with `--lora-scaled`.

    Raises:
        InputError: r is below 1.
    """
    check_integer("r", r, 1)
    return share * alpha / r if alpha else share


def write_lora(path: str | Path, adapter: Adapter, config: Config) -> None:
    """Write a LoRA for `llama-server --lora`; B is multiplied by the scale.

    Args:
        path: of the file.
        adapter: LoRA on linear layers or embeddings.
        config: of the base model, as in its config.json.

    Raises:
        InputError: the adapter holds a magnitude, a bias, a saved module or experts,
            which the format cannot store; the message names the alternative.
    """
    _check_holds(adapter)
    arch = family(config)
    theirs = names(arch, int(config["num_hidden_layers"]))
    with _writing(path, arch) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
        _add_facts(writer, made.origin(adapter))
        for name, update in adapter.updates.items():
            if name not in theirs:
                raise InputError(f"llama.cpp has no tensor for {name}; merge instead")
            s = update.scaling / scaling(ALPHA, update.r)
            A, B = update.A.float(), s * update.B.float()
            if heads := heads_turned(name, arch, config):
                B = turn(B, heads)
            if theirs[name].startswith("token_embd"):
                A = A.T  # llama.cpp looks up rows of A
            writer.add_tensor(f"{theirs[name]}.lora_a", A.contiguous().numpy())
            writer.add_tensor(f"{theirs[name]}.lora_b", B.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _check_holds(adapter: Adapter) -> None:
    if adapter.stacks:
        raise InputError(
            f"{next(iter(adapter.stacks))} holds stacks of experts, which a GGUF "
            "adapter cannot hold; export the merged model instead"
        )
    for name, update in adapter.updates.items():
        if update.magnitude is not None:
            raise InputError(
                f"{name} has a magnitude (DoRA), which a GGUF adapter cannot hold; "
                "export the merged model instead"
            )
    for what, found in (("a bias", adapter.biases), ("a saved module", adapter.saved)):
        if found:
            raise InputError(
                f"the adapter holds {what} ({next(iter(found))}), which a GGUF adapter "
                "cannot hold; export the merged model instead"
            )


def write_model(
    path: str | Path,
    base: Tensors,
    folder: str | Path,
    adapter: Adapter | None = None,
    kind: str = "F16",
) -> None:
    """Write a model, optionally merged with an adapter, for llama.cpp and Ollama.

    A merged weight is computed in float32 and rounded once to the kind of the file.
    One-dimensional tensors stay in float32, as llama.cpp expects them.

    Args:
        path: of the file.
        base: the model's tensors.
        folder: with its config.json and its tokenizer.
        adapter: what to merge.
        kind: F32, F16, BF16 or Q8_0.

    Raises:
        InputError: the architecture, the tokenizer or the kind is not one that can be
            written here.
    """
    if kind not in TYPES:
        raise InputError(f"kind is {kind!r}; choose one of {', '.join(TYPES)}")
    config = read_config(folder)
    arch = family(config)
    theirs = names(arch, int(config["num_hidden_layers"]))
    facts = made.origin(adapter or Adapter({}), fingerprint.of_files(base))
    base, adapter = _fitted(base, adapter or Adapter({}), folder)
    plan = _plan(base, adapter, theirs, kind)
    with _writing(path, arch) as writer:
        _hyperparameters(writer, config)
        writer.add_file_type(FILE_TYPES[kind])
        _add_facts(writer, facts)
        gguf_vocabulary.write(writer, Path(folder), config)
        factors = rope_factors(config)
        _announce_all(writer, theirs, plan, factors)
        for name, (_, type_) in plan.items():
            values = _values(name, base, adapter)
            if heads := heads_turned(name, arch, config):
                values = turn(values, heads)
            _check_range(name, values, type_)
            writer.write_tensor_data(encode(values, type_))
        if factors is not None:
            writer.write_tensor_data(factors)


def _fitted(
    base: Tensors, adapter: Adapter, folder: str | Path
) -> tuple[Tensors, Adapter]:
    """Return base and adapter by the same names, with a head if they are untied."""
    base, adapter = tying.pulled_apart(base, adapter, tying.ties(folder))
    adapter = adapter.renamed(base.about)
    adapter.check_tables(base)
    return base, adapter


def _add_facts(writer: gguf.GGUFWriter, facts: Mapping[str, str]) -> None:
    """Add the metadata about the origin of a file."""
    for key, text in facts.items():
        writer.add_string(key, text)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return a model's config.json.

    Raises:
        InputError: it is absent, no JSON, or no object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); give a model's folder"
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is no JSON object; give a model's folder")
    return config


def _announce_all(
    writer: gguf.GGUFWriter,
    theirs: Mapping[str, str],
    plan: Plan,
    factors: np.ndarray | None,
) -> None:
    for name, (shape, type_) in plan.items():
        _announce(writer, theirs[name], shape, type_)
    if factors is not None:
        size, dtype = factors.nbytes, factors.dtype
        writer.add_tensor_info(FACTORS, factors.shape, dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _plan(
    base: Tensors, adapter: Adapter, theirs: Mapping[str, str], kind: str
) -> Plan:
    """Return shape and type of every tensor, in the order of the file."""
    plan = {}
    for name in [*base.about, *(n for n in adapter.saved if n not in base.about)]:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in theirs:
            raise InputError(f"llama.cpp has no tensor for {name} of this model")
        new = adapter.saved.get(name)
        shape = base.about[name].shape if new is None else tuple(new.shape)
        whole = shape[-1] % gguf.GGML_QUANT_SIZES[TYPES[kind]][0] == 0
        flat = len(shape) == 1
        plan[name] = (shape, TYPES["F32" if flat else kind if whole else "F16"])
    return plan


def _values(name: str, base: Tensors, adapter: Adapter) -> Tensor:
    if name in adapter.saved:
        return adapter.saved[name].float()
    W = base.read(name).float()  # wider than the file, so that only the end rounds
    if name in adapter.updates:
        return merged(W, adapter.updates[name])
    return W + adapter.biases[name].float() if name in adapter.biases else W


def _check_range(name: str, values: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    """Refuse values that become infinite in the file.

    Raises:
        InputError: a finite value, or the scale of a block, is beyond float16.
    """
    scale = {TYPES["F16"]: 1, TYPES["Q8_0"]: 127}.get(kind)
    if scale:
        cast(name, values / scale, torch.float16)


def encode(values: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the bytes that GGUF stores."""
    array = values.contiguous().numpy()
    if kind == TYPES["F32"]:
        return array
    if kind == TYPES["F16"]:
        return array.astype(np.float16)
    return np.asarray(gguf.quantize(array, kind))


def _announce(
    writer: gguf.GGUFWriter,
    name: str,
    shape: tuple[int, ...],
    kind: gguf.GGMLQuantizationType,
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    dtypes = {TYPES["F32"]: np.float32, TYPES["F16"]: np.float16}
    if kind in dtypes:
        writer.add_tensor_info(name, shape, np.dtype(dtypes[kind]), count)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), count, raw_dtype=kind)


def _hyperparameters(writer: gguf.GGUFWriter, config: Config) -> None:
    heads = int(config["num_attention_heads"])
    width = int(config["hidden_size"])
    head = int(config.get("head_dim") or width // heads)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope(config).get("rope_theta", 10000.0)))
    writer.add_vocab_size(int(config["vocab_size"]))


def rope(config: Config) -> dict[str, Any]:
    """Return the rotary parameters, which transformers has in several places."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    if found["rope_type"] not in ("default", "llama3"):
        raise InputError(
            f"rotary embeddings of type {found['rope_type']!r} cannot be written here; "
            "export safetensors, and convert them with llama.cpp's own script"
        )
    return found


def rope_factors(config: Config) -> np.ndarray | None:
    """Return the divisors of llama.cpp for each frequency, or None if all are 1.

    Llama 3.1 keeps short wavelengths and stretches long ones by `factor`. Between the
    two it interpolates.
    """
    found = rope(config)
    if found["rope_type"] != "llama3":
        return None
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    steps = np.arange(0, head, 2, dtype=np.float32) / head
    wavelength = 2 * np.pi * float(found["rope_theta"]) ** steps
    low, high = float(found["low_freq_factor"]), float(found["high_freq_factor"])
    turns = float(found["original_max_position_embeddings"]) / wavelength
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / float(found["factor"]) + share)).astype(np.float32)


@contextmanager
def _writing(path: str | Path, arch: str) -> Iterator[gguf.GGUFWriter]:
    """Write a GGUF file that appears whole, or not at all."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}."
        )
        os.close(descriptor)
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            yield writer
        finally:
            writer.close()
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # or a crash may leave the name without the values
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


LAYERS = 512  # llama.cpp loads no more
HEADS = 10_000


class GgufTensors:
    """The tensors of a GGUF model by transformers' names, decoded to float32.

    Raises:
        InputError: the file is absent, damaged, big-endian, or of another family.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        self._reader = _opened(path)
        with _decoding(path):
            self.metadata: Mapping[str, str] = {
                key: str(field.contents())
                for key, field in self._reader.fields.items()
                if not key.startswith("tokenizer.")
            }
        self.arch = self.metadata.get("general.architecture", "none")
        if self.arch not in FAMILIES_READ:
            raise InputError(
                f"{path} holds a model of the family {self.arch!r}; only "
                f"{', '.join(sorted(FAMILIES_READ))} are read"
            )
        layers = self._count("block_count", LAYERS)
        ours = {theirs: name for name, theirs in names(self.arch, layers).items()}
        self.stored = [tensor.name for tensor in self._reader.tensors]
        if odd := set(self.stored) - ours.keys() - {FACTORS}:
            raise InputError(f"{path} holds {min(odd)}, which no {self.arch} has")
        self._heads = {
            "num_attention_heads": self._count("attention.head_count"),
            "num_key_value_heads": self._count("attention.head_count_kv"),
        }
        self._found = {ours[t.name]: t for t in self._reader.tensors if t.name in ours}
        self.about: Mapping[str, About] = {
            name: About(torch.float32, tuple(int(n) for n in reversed(t.shape)))
            for name, t in self._found.items()
        }

    def _count(self, key: str, most: int = HEADS) -> int:
        """Return a number of layers or heads."""
        text = self.metadata.get(f"{self.arch}.{key}", "none")
        if not text.isdecimal() or int(text) > most:
            raise InputError(
                f"{self.path} says {text!r:.60} for {self.arch}.{key}, which is no "
                f"count from 0 to {most}; get the file again"
            )
        return int(text)

    def read(self, name: str) -> Tensor:
        """Return one tensor in float32, in transformers' order of rows.

        Raises:
            InputError: its values do not fit its shape, its kind or the heads.
        """
        tensor = self._found[name]
        turned = heads_turned(name, self.arch, self._heads)
        with _decoding(self.path):
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            values = np.asarray(values, np.float32).reshape(self.about[name].shape)
            values = turn_back(values, turned) if turned else values
            return torch.from_numpy(np.array(values))

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, decoded."""
        return in_pieces(self.read(name), size)

    def rounding(self, name: str) -> Rounding:
        """Return how the file rounds one tensor.

        Raises:
            InputError: minipeft does not write this kind.
        """
        kind = self.kind(name)
        if kind not in ROUNDINGS:
            raise InputError(
                f"{name} in {self.path} is stored as {kind.name}; only merges in "
                f"{', '.join(TYPES)} are judged"
            )
        return ROUNDINGS[kind]

    def kind(self, name: str) -> gguf.GGMLQuantizationType:
        """Return how the file stores a tensor."""
        return self._found[name].tensor_type


ROUNDINGS: dict[gguf.GGMLQuantizationType, Rounding] = {
    TYPES["F32"]: Cast(torch.float32),
    TYPES["F16"]: Through(torch.float32, torch.float16),
    TYPES["BF16"]: Through(torch.float32, torch.bfloat16),
    TYPES["Q8_0"]: Q8(),
}
FAMILIES_READ = {"llama", "qwen2", "qwen3"}
FACTORS = "rope_freqs.weight"


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn the many errors of the package `gguf` for damaged files into one message."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path} is damaged or no GGUF file ({reason}); get the file again"
        ) from None


def _opened(path: Path) -> gguf.GGUFReader:
    with _decoding(path):
        reader = gguf.GGUFReader(path)
    if reader.byte_order != "I":
        raise InputError(f"{path} is big-endian; convert it to little-endian first")
    return reader
