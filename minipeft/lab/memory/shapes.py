"""The sizes of a decoder: what its weights are, by name, and how many.

Llama's block is the model for all: norm, attention, norm, feed-forward. What the other
families do otherwise stands in `Block`; experts in `Experts`.
"""

from dataclasses import dataclass, field

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + FEEDFORWARD
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

# What a linear layer reads, by its last name: streams of which autograd keeps one copy,
# however many layers read them.
READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn.c_attn"), "attention input"),
    **dict.fromkeys(("o_proj", "attn.c_proj"), "attention result"),
    **dict.fromkeys(("gate_proj", "up_proj", "mlp.c_fc"), "feed-forward input"),
    **dict.fromkeys(("down_proj", "mlp.c_proj"), "feed-forward product"),
}


@dataclass(frozen=True)
class Block:
    """What a family's block has besides Llama's.

    Attributes:
        gated: gate, up and down; otherwise up and down, as in GPT-2.
        biases: the linear layers with a bias.
        norms: of the model's width, in a block.
        norm_vectors: trained vectors of a norm: 1, or 2 with a bias.
        head_norms: norms of queries and of keys, of the width of one head.
        soft_caps: a tanh bounds attention's scores and the logits, as in Gemma 2.
    """

    gated: bool = True
    biases: tuple[str, ...] = ()
    norms: int = 2
    norm_vectors: int = 1
    head_norms: bool = False
    soft_caps: bool = False


@dataclass(frozen=True)
class Experts:
    """A feed-forward part in many copies, of which a router picks a few for a token.

    Attributes:
        count: experts of a layer.
        active: experts that a token uses.
        width: of one expert's feed-forward.
        shared: width of the feed-forward that every token uses besides; 0: none.
        layers: layers with experts; the others have the plain feed-forward.
    """

    count: int
    active: int
    width: int
    shared: int = 0
    layers: int = 0


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder; `head` is the width of one attention head.

    In `windowed` layers a token asks those of a `window` before it alone.
    """

    layers: int
    width: int
    feedforward: int
    heads: int
    key_value_heads: int
    vocabulary: int
    head: int
    tied: bool = True
    block: Block = field(default_factory=Block)
    experts: Experts | None = None
    positions: int = 0
    window: int = 0
    windowed: int = 0

    def masked(self, attention: str, seq: int) -> int:
        """Return the layers whose fused attention has a mask.

        transformers writes one for a window that is no longer than the sequence.
        """
        if attention == "fused" and seq >= self.window:
            return self.windowed
        return self.layers if attention == "masked" else 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block, without experts: {name: (out, in)}."""
        if not self.block.gated:
            d, f = self.width, self.feedforward
            shapes = ((3 * d, d), (d, d), (f, d), (d, f))
            return dict(zip(GPT2, shapes, strict=True))
        queries, keys = self.heads * self.head, self.key_value_heads * self.head
        attention = (
            (queries, self.width),
            (keys, self.width),
            (keys, self.width),
            (self.width, queries),
        )
        found = dict(zip(ATTENTION, attention, strict=True))
        return found | mlp(self.width, self.feedforward)

    @property
    def dense_layers(self) -> int:
        """Layers whose feed-forward is one network, without experts."""
        return self.layers - (self.experts.layers if self.experts else 0)

    def placed(self, names: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
        """Return how often each linear layer stands in the model, and its shape.

        In layers with experts the names of the feed-forward are the shared expert's.

        Args:
            names: of `linears`.

        Returns:
            {name: (how often, out_features, in_features)}.
        """
        found = {}
        for name in names:
            shape = self.linears[name]
            inside = name in FEEDFORWARD and self.experts is not None
            often = self.dense_layers if inside else self.layers
            if often:
                found[name] = (often, *shape)
            if inside and self.experts is not None and self.experts.shared:
                shape = mlp(self.width, self.experts.shared)[name]
                found[f"shared_expert.{name}"] = (self.experts.layers, *shape)
        return found

    @property
    def linear_parameters(self) -> int:
        """Weights in the linear layers of all blocks, without experts."""
        places = self.placed(tuple(self.linears)).values()
        return sum(often * m * n for often, m, n in places)

    @property
    def expert_parameters(self) -> int:
        """Weights of all experts."""
        if self.experts is None:
            return 0
        one = sum(m * n for m, n in mlp(self.width, self.experts.width).values())
        return self.experts.layers * self.experts.count * one

    @property
    def embedding_parameters(self) -> int:
        """The table of tokens, and the learned positions where there are any."""
        return (self.vocabulary + self.positions) * self.width

    @property
    def head_parameters(self) -> int:
        """The output layer; none where it is the table of tokens."""
        return 0 if self.tied else self.vocabulary * self.width

    @property
    def small_parameters(self) -> int:
        """Norms, biases, routers."""
        block, shapes = self.block, self.linears
        norms = self.width * (block.norms * self.layers + 1) * block.norm_vectors
        norms += 2 * self.head * self.layers * block.head_norms
        biases = self.layers * sum(shapes[name][0] for name in block.biases)
        routers = 0
        if self.experts is not None:
            gates = self.experts.count + bool(self.experts.shared)
            routers = self.experts.layers * gates * self.width
        return norms + biases + routers

    @property
    def parameters(self) -> int:
        """All weights: blocks, embeddings (once if tied), norms."""
        return (
            self.linear_parameters
            + self.expert_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.small_parameters
        )


def mlp(width: int, feedforward: int) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a gated feed-forward part: {name: (out, in)}."""
    shapes = (feedforward, width), (feedforward, width), (width, feedforward)
    return dict(zip(FEEDFORWARD, shapes, strict=True))


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
