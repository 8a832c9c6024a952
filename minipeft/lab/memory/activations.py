"""What autograd keeps from the forward pass for the backward pass, in bytes."""

from minipeft.lab.memory.rows import VIRTUAL, Adapter, kept_by
from minipeft.lab.memory.shapes import READS, Architecture

LOSS = 4
"""The loss's denominator, a float32."""


def activation_memory(
    model: Architecture,
    tokens: tuple[int, int],
    adapter: Adapter | None = None,
    bytes_per_value: int = 4,
    attention: str = "fused",
) -> int:
    """Return the bytes that autograd keeps from the forward pass for the backward pass.

    With n = batch · seq tokens, e bytes a value, and the float32 that RMSNorm and the
    cross-entropy compute in, full fine-tuning of a Llama keeps for each token

        block:   2 norms (4d + 4 + e d + e d)   the norm's input, 1/rms, x̂, the output
                 e (2 h d_h + 2 h_kv d_h) + 4h  queries, result; keys, values; logsumexp
                 e 4 d_ff                       gate, silu(gate), up, their product
        once:    4d + 4 + e d + e d + 4V        last norm, log-probabilities
                 16                             token ids for embedding and loss

    and 2 e seq d_h for the rotary table. A frozen weight does not need its input: with
    adapters the linear layers' inputs stay only where a target reads them, x̂ of the
    norms goes, nothing before the first adapter is kept, and each target adds what its
    method keeps, for LoRA the r values `A x` in float32. A prompt changes the very
    first input, and both kinds of virtual tokens lengthen what is read. Attention that
    is not fused keeps its probabilities besides, a float32 for each pair of tokens in
    each head, and keys and values for each head, but no logsumexp. Exact, to the byte,
    for Llama, Mistral and Qwen 2 and 3.

    Args:
        model: The sizes.
        tokens: Batch size, sequence length.
        adapter: What trains; None: everything.
        bytes_per_value: e, 4 for float32 and 2 for bfloat16.
        attention: `fused`; `masked`, which is fused too, for sequences that are padded
            or stand behind a prefix; or `eager`, which forms the probabilities.
    """
    batch, seq = tokens
    e, read = bytes_per_value, seq + prompt_tokens(adapter)
    per_token, fixed = block_memory(model, adapter, e)
    last = norm_memory(model, adapter, e) + 4 * model.vocabulary
    last += e * model.vocabulary * model.block.soft_caps
    ids = 16 if adapter is None else 8
    kept = batch * read * (model.layers * per_token + last + ids)
    kept += model.layers * (fixed + batch * pair_memory(model, read, e, attention))
    if adapter is not None:
        missing, never = before_adapters(model, adapter, e)
        kept -= batch * read * missing + never
    method = adapter.method if adapter is not None else "full"
    prefix = adapter.r if adapter and method == "prefix" else 0
    masked = model.layers if prefix else model.masked(attention, read)
    kept += masked * batch * mask_memory(model, read, read + prefix, e)
    rows = batch if method in VIRTUAL else 1  # then each has positions of its own
    return kept + rows * rotary_memory(model, read, e) + LOSS


def prompt_tokens(adapter: Adapter | None) -> int:
    """Return how many tokens a sequence is longer: a prompt's, which are read."""
    return adapter.r if adapter and adapter.method == "prompt" else 0


def before_adapters(
    model: Architecture, adapter: Adapter, bytes_per_value: int
) -> tuple[int, int]:
    """Return what the first block does not keep, for want of an adapter before it.

    Bytes a token, and bytes besides: there no gradient of the input is asked for.
    """
    if adapter.method == "prompt":
        return 0, 0
    e = bytes_per_value
    norm = norm_memory(model, adapter, e)
    if adapter.method == "prefix":
        return norm, 0
    read = {READS[name] for name in adapter.names(model)}
    if "attention input" in read:
        return norm, _never(model, adapter, e)
    missing = norm + attention_values(model, e)
    if "attention result" not in read:
        missing += norm + _idle(model, adapter, e)
    elif adapter.reads(model, "attention result"):
        missing -= e * model.heads * model.head
    return missing, 0


def _idle(model: Architecture, adapter: Adapter, bytes_per_value: int) -> int:
    """Return the bytes a token of the feed-forward before its first adapter."""
    names = adapter.names(model)
    if not {"gate_proj", "up_proj", "mlp.c_fc"} & set(names):
        return feedforward_memory(model, adapter, bytes_per_value)
    # A factor is kept for the other's gradient, the gate for its own.
    idle = 2 * ("gate_proj" not in names) or int("up_proj" not in names)
    return bytes_per_value * model.feedforward * idle * model.block.gated


def _never(model: Architecture, adapter: Adapter, bytes_per_value: int) -> int:
    """Return what the first block's queries, keys and values need not keep besides.

    DoRA's norms stay, and so does what HiRA multiplies in 32 bits over a base of 16.
    """
    if adapter.method == "dora" or (adapter.method == "hira" and bytes_per_value < 4):
        return 0
    names = [n for n in adapter.names(model) if READS[n] == "attention input"]
    own = Adapter(adapter.r, names, adapter.method)
    return kept_by(model, own, bytes_per_value)[1]


def mask_memory(model: Architecture, seq: int, wide: int, bytes_per_value: int) -> int:
    """Return what a mask makes fused attention keep in a layer, for one sequence.

    With a mask transformers repeats keys and values for every head of queries, and
    torch turns the mask into numbers.

    Args:
        model: the sizes.
        seq: the tokens that ask.
        wide: the tokens that are asked, with a prefix.
        bytes_per_value: of the activations.
    """
    repeated = 2 * model.head * (model.heads * wide - model.key_value_heads * seq)
    return bytes_per_value * (repeated + seq * wide)


def block_memory(
    model: Architecture, adapter: Adapter | None, bytes_per_value: int
) -> tuple[int, int]:
    """Return the bytes that an average block keeps: a token, and besides."""
    e, block = bytes_per_value, model.block
    token = block.norms * norm_memory(model, adapter, e)
    token += attention_values(model, e)
    if block.head_norms:
        heads, trained = model.heads + model.key_value_heads, 2 * e * (adapter is None)
        token += heads * (model.head * (4 + trained - e * (adapter is None)) + 4)
    token += feedforward_memory(model, adapter, e)
    if adapter is None:
        return token, 0
    more, fixed = kept_by(model, adapter, e)
    return token + more, fixed


def attention_values(model: Architecture, bytes_per_value: int) -> int:
    """Return the bytes a token of queries, keys, values, the result, logsumexp."""
    heads = model.heads + model.key_value_heads
    return bytes_per_value * 2 * model.head * heads + 4 * model.heads


def norm_memory(
    model: Architecture, adapter: Adapter | None, bytes_per_value: int
) -> int:
    """Return the bytes a token that one norm keeps."""
    d, e = model.width, bytes_per_value
    own = 4 * d + 4 * model.block.norm_vectors
    if model.block.norm_vectors == 2:  # LayerNorm is one operation in the model's dtype
        own = e * d + 8
    return own if adapter is not None else own + norm_trained(model, e)


def norm_trained(model: Architecture, bytes_per_value: int) -> int:
    """Return the bytes a token that a norm keeps for what is trained.

    Its x̂, for its own weight, and its output, which the linear layers read.
    """
    if model.block.norm_vectors == 2:
        return bytes_per_value * model.width
    return 2 * bytes_per_value * model.width


def feedforward_memory(
    model: Architecture, adapter: Adapter | None, bytes_per_value: int
) -> int:
    """Return the bytes a token that an average block's feed-forward keeps.

    Gate, silu(gate), up; and their product where the next layer's weight is trained. In
    a layer with experts each of the active ones keeps as much, and so does the shared
    one. GPT-2's form of the GELU is computed step by step, and keeps eight values.
    """
    values = 3 if adapter is not None else 4
    if not model.block.gated:
        values = 8 if adapter is not None else 9
    one = bytes_per_value * values
    dense = one * model.feedforward * model.dense_layers
    if model.experts is None:
        return dense // model.layers
    active = model.experts.active
    used = one * (active * model.experts.width + model.experts.shared)
    # What goes in, where a weight trains; what comes out, times the router's share.
    used += bytes_per_value * active * model.width * (1 if adapter is not None else 2)
    return (dense + used * model.experts.layers) // model.layers


def pair_memory(
    model: Architecture, seq: int, bytes_per_value: int, attention: str
) -> int:
    """Return the bytes a sequence that one layer's attention keeps for pairs of tokens.

    Eager attention keeps the softmax in float32, and its copy where values are shorter;
    a soft cap keeps its tanh besides. Keys and values are repeated for every head of
    queries, and there is no logsumexp.
    """
    if attention != "eager":
        return 0
    e = bytes_per_value
    copy = e if e != 4 else 0
    capped = e * model.block.soft_caps
    repeated = e * 2 * model.head * (model.heads - model.key_value_heads)
    pairs = model.heads * seq * seq * (4 + copy + capped)
    return pairs + seq * (repeated - 4 * model.heads)


def rotary_memory(model: Architecture, seq: int, bytes_per_value: int) -> int:
    """Return the bytes of the rotary table: cosines and sines."""
    rotates = model.block.gated
    return 2 * bytes_per_value * seq * model.head * rotates
