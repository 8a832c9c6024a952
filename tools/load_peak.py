"""Measure the memory that loading a model of a billion parameters in NF4 takes.

    python tools/load_peak.py [FOLDER]

Without a folder, a random Llama of 1.1 billion parameters is written in bfloat16,
shard by shard, and deleted afterwards (2.2 GB of disk). The peak is that of the pages
that belong to no file, from the end of the imports on; mapped pages of the model's
files are not counted, because the system can take them back.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from minipeft.lab import reading
from minipeft.torch.qlora import QuantizedLinear

SIZES = {  # of TinyLlama
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
PER_SHARD = 20


def write(folder: Path, sizes: dict[str, int]) -> None:
    """Write a random model; no more than one shard of it is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(**sizes, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    names, where = list(shapes), dict[str, str]()
    for start in range(0, len(names), PER_SHARD):
        part, file = names[start : start + PER_SHARD], f"model-{start}.safetensors"
        drawn = {n: torch.randn(shapes[n].shape).mul_(0.02).bfloat16() for n in part}
        save_file(drawn, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous() -> int:
    """Return the bytes of this process that belong to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report RssAnon")


def measured(folder: Path) -> tuple[int, int, int]:
    """Return the growth at its peak, the size of the model, and its largest layer."""
    before = anonymous()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(max(peak.pop(), anonymous()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = reading.read(folder, torch.bfloat16, "cpu", reading.nf4_double)
    done.set()
    watcher.join()
    size = sum(t.nbytes for t in model.state_dict().values())
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    largest = max(2 * m.in_features * m.out_features for m in layers)
    return peak[0] - before, size, largest


def main() -> None:
    """Write a model where none is given, load it in four bits, print the figures."""
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as made:
        small = {**SIZES, "hidden_size": 64, "intermediate_size": 96}
        small |= {"num_hidden_layers": 1, "vocab_size": 96}
        wanted = {"small": small} | ({} if sys.argv[1:] else {"large": SIZES})
        for (
            name,
            sizes,
        ) in wanted.items():  # in a process of its own: memory stays there
            words = [sys.executable, __file__, "--write", f"{made}/{name}"]
            subprocess.run([*words, json.dumps(sizes)], check=True)
        measured(Path(made) / "small")  # the last imports
        folder = Path(sys.argv[1]) if sys.argv[1:] else Path(made) / "large"
        grown, size, largest = measured(folder)
    print(f"the model in NF4 with double quantization: {size / 1e6:.0f} MB")
    print(f"its largest quantized layer, in 16 bits: {largest / 1e6:.0f} MB")
    print(f"peak while loading: {grown / 1e6:.0f} MB, {grown / size:.2f} x the model")
    print(f"1.3 x the model + the layer: {(1.3 * size + largest) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
