"""Compare bottleneck adapters with AdapterHub's library, in an environment of its own.

The library `adapters` needs transformers 4, and the rest of this repository 5:

    python -m venv build/adapterhub
    build/adapterhub/bin/pip install adapters==1.3.0 torch jaxtyping safetensors
    build/adapterhub/bin/python tools/adapterhub.py

Each file is read and written by both. The logits have to agree as far as another order
of sums explains, and a file that both write has to hold the same bits.
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # nothing is installed here, not even this

from minipeft.interop import adapterhub_format, peft_folder  # noqa: E402
from minipeft.interop.adapterhub_format import OURS, WEIGHTS  # noqa: E402
from minipeft.torch import inject  # noqa: E402
from minipeft.torch.bottleneck import BottleneckConfig  # noqa: E402

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TARGETS = {"Pfeiffer": ["down_proj"], "Houlsby": ["o_proj", "down_proj"]}
TEXT = torch.tensor([[1, 5, 9, 13, 17, 2, 4, 6, 8, 3]])
BOUND = 2 * 2 * 8 * 42 * 2.0**-24
"""Logits differ by the order of sums of at most 42 terms, eight in each of two layers,
here and there, relative to the largest logit of a row."""


def main() -> int:
    """Print a line for each comparison; return 1 if one fails."""
    import adapters
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    print(f"adapters {adapters.__version__}, transformers {transformers.__version__}")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    right = True
    for name, targets in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            right &= _ours(base, name, targets, Path(folder))
            right &= _theirs(base, name, Path(folder))
    return int(not right)


def _ours(base: Any, name: str, targets: list[str], folder: Path) -> bool:
    """Save ours, and let the library load it and save it again."""
    model = inject.inject(copy.deepcopy(base), BottleneckConfig(5, 0.5), targets)
    _move(inject.trainable_parameters(model))
    adapterhub_format.save(model, folder / "ours")
    library = _library(base)
    loaded = library.load_adapter(str(folder / "ours"), use_safetensors=True)
    library.set_active_adapters(loaded)
    library.save_adapter(str(folder / "again"), loaded, use_safetensors=True)
    same = _same_tensors(folder / "ours", folder / "again")
    return _said(f"{name}, ours in the library", model, library, same)


def _theirs(base: Any, name: str, folder: Path) -> bool:
    """Let the library train and save one, and load it and save it again."""
    from adapters import BnConfig

    places = {"mh_adapter": name == "Houlsby", "output_adapter": True}
    library = _library(base)
    settings = {k: v for k, v in OURS.items() if k != "inv_adapter"}
    library.add_adapter(
        "default", config=BnConfig(reduction_factor=4, **places, **settings)
    )
    library.set_active_adapters("default")
    _move([p for n, p in library.named_parameters() if "adapters.default" in n])
    library.save_adapter(str(folder / "theirs"), "default", use_safetensors=True)
    model = adapterhub_format.load(copy.deepcopy(base), folder / "theirs")
    adapterhub_format.save(model, folder / "back")
    same = _same_tensors(folder / "theirs", folder / "back")
    return _said(f"{name}, the library's here", model, library, same)


def _library(base: Any) -> Any:
    import adapters

    model = copy.deepcopy(base)
    adapters.init(model)
    return model.eval()


def _move(parameters: list[Any]) -> None:
    torch.manual_seed(3)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)


def _same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = (
        peft_folder.read(folder, WEIGHTS).tensors for folder in (one, other)
    )
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


@torch.no_grad()
def _said(what: str, model: Any, library: Any, same: bool) -> bool:
    found, expected = model.eval()(TEXT).logits, library.eval()(TEXT).logits
    apart = float(((found - expected).abs() / expected.abs().max()).max())
    right = same and apart <= BOUND
    print(
        f"{what}: logits differ by {apart:.1e} of the largest (bound {BOUND:.1e}); "
        f"the file written again is {'the same' if same else 'another'}: "
        f"{'right' if right else 'WRONG'}"
    )
    return right


if __name__ == "__main__":
    sys.exit(main())
