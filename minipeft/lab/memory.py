"""What training keeps in memory: weights, gradients, optimizer states, activations.

The model is a Llama: RMSNorm, rotary attention with grouped keys and values, SwiGLU.
All results are bytes. What is not counted: the allocator's fragments, the workspace
of a kernel, and the copies that live only inside one operation.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from minipeft.errors import InputError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + FEEDFORWARD


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Llama; `head` is the width of one attention head."""

    layers: int
    width: int
    feedforward: int
    heads: int
    key_value_heads: int
    vocabulary: int
    head: int
    tied: bool = True

    @classmethod
    def of(cls, model: Any) -> "Architecture":
        """Read the sizes from a transformers model.

        Raises:
            InputError: its parameters are not those of a Llama of its sizes.
        """
        config = model.config
        counted = sum(parameter.numel() for parameter in model.parameters())
        sizes = ("intermediate_size", "num_key_value_heads", "head_dim")
        found = cls._read(config) if all(hasattr(config, n) for n in sizes) else None
        if found is None or found.parameters != counted:
            raise InputError(
                f"the formulas are those of Llama, and {type(model).__name__} with its "
                f"{counted:,} parameters is built otherwise; give a Llama, a Mistral "
                "or SmolLM2"
            )
        return found

    @classmethod
    def _read(cls, config: Any) -> "Architecture":
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            feedforward=config.intermediate_size,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            head=config.head_dim,
            tied=config.tie_word_embeddings,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: {name: (out_features, in_features)}."""
        queries, keys = self.heads * self.head, self.key_value_heads * self.head
        shapes = (
            (queries, self.width),
            (keys, self.width),
            (keys, self.width),
            (self.width, queries),
            (self.feedforward, self.width),
            (self.feedforward, self.width),
            (self.width, self.feedforward),
        )
        return dict(zip(LINEARS, shapes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """Weights in the linear layers of all blocks: what QLoRA quantizes."""
        return self.layers * sum(m * n for m, n in self.linears.values())

    @property
    def parameters(self) -> int:
        """All weights: blocks, embeddings (once if tied), norms."""
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        norms = self.width * (2 * self.layers + 1)
        return self.linear_parameters + embeddings + norms


LLAMA_7B = Architecture(
    layers=32,
    width=4096,
    feedforward=11008,
    heads=32,
    key_value_heads=32,
    vocabulary=32000,
    head=128,
    tied=False,
)
"""Llama 2 of 7 billion parameters (arXiv:2307.09288), which most counts are of."""


@dataclass(frozen=True)
class Precision:
    """Bytes a number takes, by what the number is for.

    `states` is per trained parameter: 8 for Adam in float32, 2 for 8-bit Adam, and 12
    where a float32 master copy is kept besides.
    """

    weights: float = 4.0
    gradients: float = 4.0
    states: float = 8.0
    activations: int = 4


@dataclass(frozen=True)
class Adapter:
    """Which linear layers of every block get a rank-r adapter (A, B)."""

    r: int
    targets: Collection[str] = LINEARS

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or not self.targets:
            raise InputError(
                f"targets are {[*self.targets]}; choose from {', '.join(LINEARS)}"
            )
        if self.r < 1:
            raise InputError(f"the rank is {self.r}; it must be at least 1")


@dataclass(frozen=True)
class Memory:
    """What training keeps, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """The sum of the four."""
        return self.weights + self.gradients + self.optimizer + self.activations


def lora_parameters(model: Architecture, adapter: Adapter) -> int:
    """Return LoRA's parameter count, `L · Σ r (d_out + d_in)` over the targets.

    Paper: LoRA (arXiv 2106.09685), section 4.2.
    """
    shapes = model.linears
    return model.layers * sum(adapter.r * sum(shapes[t]) for t in adapter.targets)


def quantized_bits(
    bits: int = 4, blocksize: int = 64, nested_blocksize: int | None = None
) -> float:
    """Return bits a parameter of a block-wise codec, constants included.

    One float32 constant a block: `bits + 32/blocksize`. Double quantization stores it
    in 8 bits, with a float32 constant for `nested_blocksize` of them:
    `bits + 8/blocksize + 32/(blocksize · nested_blocksize)`.

    Paper: QLoRA (arXiv 2305.14314), section 3.
    """
    if nested_blocksize is None:
        return bits + 32 / blocksize
    return bits + 8 / blocksize + 32 / (blocksize * nested_blocksize)


def activation_memory(
    model: Architecture,
    tokens: tuple[int, int],
    adapter: Adapter | None = None,
    bytes_per_value: int = 4,
) -> int:
    """Return the bytes that autograd keeps from the forward pass for the backward pass.

    With n = batch · seq tokens, e bytes a value, and the float32 that RMSNorm and the
    cross-entropy compute in, full fine-tuning keeps for each token

        block:   2 norms (4d + 4 + e d + e d)   the norm's input, 1/rms, x̂, the output
                 e (2 h d_h + 2 h_kv d_h) + 4h  queries, result; keys, values; logsumexp
                 e 4 d_ff                       gate, silu(gate), up, their product
        once:    4d + 4 + e d + e d + 4V        last norm, log-probabilities
                 16                             token ids for embedding and loss

    and 2 e seq d_h for the rotary table. A frozen weight does not need its input: with
    adapters the linear layers' inputs stay only where a target reads them, x̂ of the
    norms goes, nothing before the first adapter is kept, and each target adds its r
    values `A x`. Attention is the fused kind, which keeps no seq × seq matrix; nothing
    is checkpointed. Exact, but for one case: if no target reads the attention's input
    (`q_proj`, `k_proj`, `v_proj`), the first block keeps less than is counted here.

    Args:
        model: The sizes.
        tokens: Batch size, sequence length.
        adapter: What trains; None: everything.
        bytes_per_value: e, 4 for float32 and 2 for bfloat16.
    """
    batch, seq = tokens
    n, e, d = batch * seq, bytes_per_value, model.width
    rotary = 2 * e * seq * model.head
    if adapter is None:
        norm = 4 * d + 4 + 2 * e * d
        block = 2 * norm + _inside(model, e) + e * model.feedforward
        last = norm + 4 * model.vocabulary + 16
        return n * (model.layers * block + last) + rotary + _SCALAR
    norm = 4 * d + 4
    block = 2 * norm + _inside(model, e) + _read(model, adapter) * e
    last = norm + 4 * model.vocabulary + 8
    return n * (model.layers * block - norm + last) + rotary + _SCALAR


_SCALAR = 4
"""The loss's denominator, a float32."""


def _inside(model: Architecture, e: int) -> int:
    """Return bytes a token that the nonlinear parts keep, whatever trains."""
    attention = 2 * model.head * (model.heads + model.key_value_heads)
    return e * (attention + 3 * model.feedforward) + 4 * model.heads


def _read(model: Architecture, adapter: Adapter) -> int:
    """Return values a token kept for the adapters: inputs of targets, and `A x`.

    `o_proj` reads attention's result, which attention keeps anyway.
    """
    targets = set(adapter.targets)
    inputs = 0
    if targets & {"q_proj", "k_proj", "v_proj"}:
        inputs += model.width
    if targets & {"gate_proj", "up_proj"}:
        inputs += model.width
    if "down_proj" in targets:
        inputs += model.feedforward
    return inputs + adapter.r * len(targets)


def training_memory(
    model: Architecture,
    tokens: tuple[int, int],
    adapter: Adapter | None = None,
    precision: Precision | None = None,
) -> Memory:
    """Return what training keeps: full fine-tuning, or adapters on a frozen base.

    Args:
        model: The sizes.
        tokens: Batch size, sequence length.
        adapter: What trains; None: everything.
        precision: Bytes a number; None: float32 throughout, Adam. With an adapter
            `weights` is the base's (the adapter's own weights take as many bytes as
            its gradients), and `quantized_bits(...) / 8` for the linear layers of a
            quantized base; its embeddings and norms are then taken as 2 bytes.
    """
    use = precision or Precision()
    base = model.parameters * use.weights
    if use.weights < 2:  # only the linear layers are quantized
        rest = model.parameters - model.linear_parameters
        base = model.linear_parameters * use.weights + rest * 2
    trained = lora_parameters(model, adapter) if adapter else model.parameters
    return Memory(
        weights=base + (trained * use.gradients if adapter else 0),
        gradients=trained * use.gradients,
        optimizer=trained * use.states,
        activations=activation_memory(model, tokens, adapter, use.activations),
    )


COUNTED_TOKENS = (4, 512)
"""Sequences and their length, in every count of `LLAMA_7B` that the book compares."""

COUNTED_ADAPTER = Adapter(r=64)
"""LoRA on all linear layers at the rank of QLoRA's paper (arXiv:2305.14314)."""


def ways_to_train() -> dict[str, Memory]:
    """Return what `LLAMA_7B` needs in four ways of training, under the book's labels.

    `COUNTED_TOKENS` and `COUNTED_ADAPTER` in all of them; adapters, their gradients and
    Adam's states have 32 bits, activations 16 (all 32 in the first). Training
    everything in 16 bits keeps a float32 copy of the weights beside Adam's states.
    """
    model, tokens, adapter = LLAMA_7B, COUNTED_TOKENS, COUNTED_ADAPTER
    on_16 = Precision(weights=2, gradients=4, activations=2)
    on_4 = Precision(quantized_bits(4, 64, 256) / 8, gradients=4, activations=2)
    whole = Precision(weights=2, gradients=2, states=12, activations=2)
    return {
        "everything, 32 bits": training_memory(model, tokens),
        "everything, 16 bits": training_memory(model, tokens, None, whole),
        "LoRA on 16 bits": training_memory(model, tokens, adapter, on_16),
        "QLoRA: LoRA on 4 bits": training_memory(model, tokens, adapter, on_4),
    }
