"""How `tiny` was made: `python -m minipeft.lab.pretrain`.

A byte-level BPE tokenizer and a small Llama learn five novels by Jane Austen; the
sixth is never read, so that later chapters can measure forgetting on it.
"""

import argparse
import json
import math
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from minipeft.errors import InputError
from minipeft.lab.data import AUSTEN_TRAIN, HELD_OUT, austen, checksums, sha256
from minipeft.lab.files import write_atomic
from minipeft.lab.text import consecutive, encode, windows
from minipeft.lab.train import (
    Checkpoint,
    History,
    TrainConfig,
    loss,
    train,
)

BASE = Path(__file__).with_name("base") / "tiny"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes the model."""

    seed: int = 0
    steps: int = 3600
    batch: int = 8
    context: int = 256
    vocabulary: int = 1024
    width: int = 128
    feedforward: int = 384
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    lr: float = 4e-3
    warmup: int = 200
    floor: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0


def folder(recipe: Recipe) -> Path:
    """Return where a model is written: `tiny` in the package, others in `build`."""
    if recipe == Recipe():
        return BASE
    name = f"width-{recipe.width}-steps-{recipe.steps}-seed-{recipe.seed}"
    return Path("build/bases") / name


def base(recipe: Recipe) -> Path:
    """Return the folder of a model, after pretraining it if it is not there.

    A run that was interrupted goes on from its checkpoint.
    """
    place = folder(recipe)
    if not (place / "recipe.json").exists():  # it is written last
        place.mkdir(parents=True, exist_ok=True)
        begun = (place / "checkpoint.safetensors").exists()
        pretrain(recipe, place, resume=begun)
    return place


def sized(width: int, steps: int = Recipe.steps, seed: int = 0) -> Recipe:
    """Return the recipe of `tiny` for another width or another number of steps.

    The feed-forward part grows with the width. The warmup keeps its share of the steps.

    Args:
        width: of the residual stream, a multiple of the heads.
        steps: of training.
        seed: of the weights and of the batches.

    Raises:
        InputError: the heads do not divide the width.
    """
    usual = Recipe()
    if width < 1 or width % (2 * usual.heads):
        raise InputError(
            f"width is {width}; give a multiple of {2 * usual.heads}, so that each of "
            f"the {usual.heads} heads gets an even part"
        )
    grown = usual.feedforward * width // usual.width
    warmup = usual.warmup * steps // usual.steps
    return replace(
        usual, width=width, feedforward=grown, steps=steps, warmup=warmup, seed=seed
    )


def texts() -> tuple[list[str], list[str]]:
    """Return each training novel's first 95 % of paragraphs, and each one's rest."""
    first, rest = [], []
    for novel in AUSTEN_TRAIN:
        paragraphs = austen(novel).splitlines(keepends=True)
        cut = round(len(paragraphs) * (1 - VALIDATION_SHARE))
        first.append("".join(paragraphs[:cut]))
        rest.append("".join(paragraphs[cut:]))
    return first, rest


def train_tokenizer(novels: list[str], size: int) -> Any:
    """Return a byte-level BPE tokenizer that opens every text with `<s>`."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(novels, trainer)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def architecture(recipe: Recipe, tokenizer: Any) -> Any:
    """Return the Llama configuration."""
    return transformers.LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.feedforward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pretrain(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train `tiny` by its recipe, write it to `out`, and return what was measured."""
    torch.set_num_threads(1)  # one thread: the same sums on every machine of a kind
    transformers.set_seed(recipe.seed)
    transformers.utils.logging.disable_progress_bar()
    first, rest = texts()
    tokenizer = train_tokenizer(first, recipe.vocabulary)
    size, bos = (recipe.batch, recipe.context), tokenizer.bos_token_id
    model = transformers.LlamaForCausalLM(architecture(recipe, tokenizer)).float()
    checkpoint = Checkpoint(out / "checkpoint.safetensors", every=200, resume=resume)
    history = train(
        model,
        windows(encode(tokenizer, first), size, bos, recipe.seed),
        config(recipe),
        consecutive(encode(tokenizer, rest), size, bos),
        checkpoint,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    history.save(out / "loss_curve.json")
    measured = _measure(model, tokenizer, history, size)
    measured["weights_sha256"] = sha256((out / "model.safetensors").read_bytes())
    _write_recipe(out, recipe, measured)
    checkpoint.path.unlink()
    return measured


def config(recipe: Recipe) -> TrainConfig:
    """Return the part of a recipe that the training loop takes."""
    return TrainConfig(
        steps=recipe.steps,
        lr=recipe.lr,
        warmup=recipe.warmup,
        floor=recipe.floor,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        clip=recipe.clip,
        validate_every=max(1, recipe.steps // 20),
    )


def _measure(
    model: Any, tokenizer: Any, history: History, size: tuple[int, int]
) -> dict[str, Any]:
    """Return final losses in nats a token, and bits a character of the unread novel."""
    novel = austen(HELD_OUT)
    tokens = encode(tokenizer, [novel])
    nats = loss(model, consecutive(tokens, size, tokenizer.bos_token_id))
    recent = history.losses[-100:]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": sum(recent) / len(recent),
        "validation_loss": history.validation[-1][1],
        "held_out_loss": nats,
        "held_out_bits_per_character": nats * len(tokens) / len(novel) / math.log(2),
        "seconds": round(history.seconds),
    }


def _write_recipe(out: Path, recipe: Recipe, measured: dict[str, Any]) -> None:
    """Write what it takes to repeat the run."""
    sums = checksums()
    text = {
        "command": f"python -m minipeft.lab.pretrain --steps {recipe.steps} "
        f"--seed {recipe.seed}"
        + (f" --width {recipe.width}" if recipe.width != Recipe.width else ""),
        "hyperparameters": asdict(recipe),
        "validation": f"the last {VALIDATION_SHARE:.0%} of each training novel",
        "held_out": HELD_OUT,
        "data": {f"{n}.txt.xz": sums[f"{n}.txt.xz"] for n in (*AUSTEN_TRAIN, HELD_OUT)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "measured": measured,
    }
    write_atomic(out / "recipe.json", (json.dumps(text, indent=2) + "\n").encode())


def main() -> None:
    """Parse the command line, pretrain, print what was measured."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--width", type=int, default=defaults.width)
    parser.add_argument("--out", type=Path, help="folder (default: by the width)")
    parser.add_argument("--resume", action="store_true", help="continue after Ctrl-C")
    options = parser.parse_args()
    recipe = sized(options.width, options.steps, options.seed)
    out = options.out or folder(recipe)
    out.mkdir(parents=True, exist_ok=True)
    for name, value in pretrain(recipe, out, options.resume).items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
