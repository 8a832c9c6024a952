"""What training keeps, and its peak: the fullest moment of a step."""

from dataclasses import dataclass, replace

from minipeft.errors import InputError
from minipeft.lab.memory.activations import (
    activation_memory,
    block_memory,
    feedforward_memory,
    mask_memory,
    norm_memory,
    pair_memory,
    prompt_tokens,
    rotary_memory,
)
from minipeft.lab.memory.rows import Adapter, adapter_parameters, frozen_values
from minipeft.lab.memory.shapes import Architecture


@dataclass(frozen=True)
class Precision:
    """Bytes a number takes, by what the number is for.

    `states` is per trained parameter: 8 for Adam in float32, 2 for 8-bit Adam, and 12
    where a float32 master copy is kept besides. `rest` is for what a quantized base
    leaves alone: embeddings, output layer, norms. `experts` are quantized too, or not.
    """

    weights: float = 4.0
    gradients: float = 4.0
    states: float = 8.0
    activations: int = 4
    rest: float = 2.0
    experts: float | None = None


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


ATTENTIONS = ("fused", "masked", "eager")


@dataclass(frozen=True)
class Step:
    """How a step is taken: what the peak depends on besides.

    Attributes:
        attention: `fused`, `masked` or `eager`, as `activation_memory` takes it.
        checkpointing: each block keeps its input alone, and is computed again.
        transient: bytes a trained parameter that the optimizer needs while it steps;
            torch's AdamW takes one float32 copy of the second moments.
        paged: bytes of the optimizer's states that have left the card.
        accumulates: a step adds up the gradients of several batches, so that those of
            the batches before are there all the time.
    """

    attention: str = "fused"
    checkpointing: bool = False
    transient: float = 4.0
    paged: float = 0.0
    accumulates: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise InputError(
                f"there is no attention {self.attention!r}; choose from "
                f"{', '.join(ATTENTIONS)}"
            )


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a step, in bytes, and what is there then.

    Attributes:
        moment: `loss`, `output layer`, `last block`, `first block`, `embedding` or
            `optimizer`.
        logits: buffers of the size of the logits, but for the one that is kept.
        transient: of the operation that runs.
    """

    moment: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    transient: float

    @property
    def total(self) -> float:
        """The sum of the six parts."""
        kept = self.weights + self.gradients + self.optimizer + self.activations
        return kept + self.logits + self.transient


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


def base_memory(model: Architecture, precision: Precision) -> dict[str, float]:
    """Return the bytes of a base's weights, by what they are.

    Only linear layers are quantized. Embeddings are looked up and not multiplied; the
    output layer and routers stay exact by custom; norms and biases are vectors.
    Experts are stacks, which most loaders leave in 16 bits.
    """
    use = precision
    rest = use.rest if use.weights < 2 else use.weights
    experts = use.weights if use.experts is None else use.experts
    return {
        "linear layers": model.linear_parameters * use.weights,
        "experts": model.expert_parameters * experts,
        "embeddings": model.embedding_parameters * rest,
        "output layer": model.head_parameters * rest,
        "norms, biases, routers": model.small_parameters * rest,
    }


def trained_parameters(model: Architecture, adapter: Adapter | None) -> int:
    """Return what trains: the adapter, or everything."""
    return adapter_parameters(model, adapter) if adapter else model.parameters


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
            quantized base.
    """
    use = precision or Precision()
    trained = trained_parameters(model, adapter)
    weights = sum(base_memory(model, use).values())
    if adapter is not None:
        weights += trained * use.gradients + 4 * frozen_values(model, adapter)
    return Memory(
        weights=weights,
        gradients=trained * use.gradients,
        optimizer=trained * use.states,
        activations=activation_memory(model, tokens, adapter, use.activations),
    )


def peak(
    model: Architecture,
    tokens: tuple[int, int],
    adapter: Adapter | None = None,
    precision: Precision | None = None,
    step: Step | None = None,
) -> Peak:
    """Return the fullest moment of a training step.

    Weights and states are there all the time. A step passes these moments, and the
    largest of them is the peak, with n tokens, V words, P trained parameters:

        loss:         activations, and two more float32 buffers of n V: the gradients
                      of the log-probabilities and of the logits
        output layer: activations without the log-probabilities, the logits' gradient,
                      and the gradient of the output layer if it trains
        last block:   activations, and the gradients inside a block: its residual
                      stream and two or three of the feed-forward's width
        first block:  the gradients, and what one block keeps and needs
        embedding:    the gradients, and the embedding's once more if it is tied
        optimizer:    the gradients, and what the optimizer needs

    With checkpointing each block keeps its input, and one block at a time is whole.

    Args:
        model: the sizes.
        tokens: batch size, sequence length.
        adapter: what trains; None: everything.
        precision: as in `training_memory`.
        step: how the step is taken; None: fused attention, all kept, torch's AdamW.
    """
    use, how = precision or Precision(), step or Step()
    kept = training_memory(model, tokens, adapter, use)
    if how.checkpointing or how.attention != "fused":
        kept = replace(kept, activations=_activations(model, tokens, adapter, use, how))
    at = _Moments(model, tokens, adapter, use, how)
    found = [
        replace(moment, weights=kept.weights, optimizer=kept.optimizer - how.paged)
        for moment in at.all(kept)
    ]
    return max(found, key=lambda moment: moment.total)


def _activations(
    model: Architecture,
    tokens: tuple[int, int],
    adapter: Adapter | None,
    use: Precision,
    how: Step,
) -> float:
    e = use.activations
    if not how.checkpointing:
        return activation_memory(model, tokens, adapter, e, how.attention)
    read = tokens[1] + prompt_tokens(adapter)
    last = norm_memory(model, adapter, e) + 4 * model.vocabulary + 16
    n = tokens[0] * read
    inputs = model.layers * n * model.width * e
    # The mask of true and false is an input of every block too.
    rows = tokens[0] if how.attention == "masked" else 1
    mask = rows * read * read * bool(model.masked(how.attention, read))
    return inputs + n * last + rotary_memory(model, read, e) + mask


class _Moments:
    """The moments of a step, without weights and states."""

    def __init__(
        self,
        model: Architecture,
        tokens: tuple[int, int],
        adapter: Adapter | None,
        use: Precision,
        how: Step,
    ) -> None:
        self.model, self.tokens, self.adapter = model, tokens, adapter
        self.use, self.how = use, how
        self.n = tokens[0] * (tokens[1] + prompt_tokens(adapter))
        self.buffer = 4 * self.n * model.vocabulary
        self.trained = trained_parameters(model, adapter)
        self.gradients = self.trained * use.gradients

    def all(self, kept: Memory) -> list[Peak]:
        """Return every moment."""
        model, whole = self.model, self.adapter is None
        table = model.vocabulary * model.width * self.use.gradients * whole
        without = kept.activations - self.buffer
        last = without - self.n * norm_memory(model, self.adapter, self.use.activations)
        inside, rows = self.inside(), self.trained * self.how.transient
        one = self.block() if self.how.checkpointing else 0.0
        before = self.gradients if self.how.accumulates else 0.0
        table += before
        return [
            _moment("loss", before, kept.activations, 2 * self.buffer, 0),
            _moment("output layer", table, without, self.buffer, 0),
            _moment("last block", table, last + one, 0, inside),
            _moment("first block", self.before(), self.block(), 0, inside),
            _moment("embedding", self.gradients, 0, 0, (table - before) * model.tied),
            _moment("optimizer", self.gradients, 0, 0, rows),
        ]

    def before(self) -> float:
        """Return the gradients that are there when the first block's turn has come."""
        if self.adapter is not None:
            return self.gradients
        shapes = [m * n for m, n in self.model.linears.values()]
        missing = sum(shapes) - max(shapes)
        missing += 0 if self.model.tied else self.model.embedding_parameters
        return self.gradients - missing * self.use.gradients

    def block(self) -> float:
        """Return what one block keeps; with checkpointing its input is there before."""
        e, model = self.use.activations, self.model
        token, fixed = block_memory(model, self.adapter, e)
        if self.how.checkpointing and e == 4:
            token -= e * model.width
        return self.n * token + fixed + self.pairs()

    def inside(self) -> float:
        """Return the gradients inside a block, or a weight that is decoded for one.

        At the product of gate and up: its gradient and those of both factors, of which
        the first takes the place of the product where that was kept. At the softmax of
        eager attention: two gradients of 32 bits for each pair of tokens, when the
        softmax's copy of 16 bits and the feed-forward are gone.
        """
        e, model = self.use.activations, self.model
        kept = self.adapter is None or self.adapter.reads(model, "feed-forward product")
        wide, stream = self.n * e * model.feedforward, self.n * e * model.width
        if e < 4 and self.adapter is not None and self.adapter.method == "vera":
            stream += (
                2 * 4 * self.n * model.feedforward
            )  # its own gradients, in 32 bits
        largest = max(m * n for m, n in model.linears.values())
        decoded = e * largest * (self.use.weights < 2)
        gone = self.n * feedforward_memory(model, self.adapter, e)
        return stream + max(
            wide * (2 if kept else 3), wide + decoded, self.softmax() - gone
        )

    def softmax(self) -> float:
        """Return what the backward pass of eager attention needs, in one block."""
        if self.how.attention != "eager":
            return 0.0
        seq, e = self.n // self.tokens[0], self.use.activations
        each = 8 - (e if e != 4 else 0)
        return self.tokens[0] * self.model.heads * seq * seq * each

    def pairs(self) -> float:
        """Return what attention keeps for pairs of tokens, in one block."""
        seq, e, how = self.n // self.tokens[0], self.use.activations, self.how.attention
        masked = bool(self.model.masked(how, seq))
        mask = mask_memory(self.model, seq, seq, e) * masked
        return self.tokens[0] * (pair_memory(self.model, seq, e, how) + mask)


def _moment(
    name: str, gradients: float, activations: float, logits: float, transient: float
) -> Peak:
    return Peak(name, 0, gradients, 0, activations, logits, transient)
