"""A small Llama with random weights, made here and not loaded."""

import torch

from tests.tolerance import gamma

TEXT = torch.tensor(
    [[1, 5, 9, 13, 17, 2, 4, 6, 8, 3], [1, 7, 8, 2, 5, 9, 11, 30, 31, 4]]
)


def llama(vocabulary=40):
    """Return a `LlamaForCausalLM`: two layers, width 32, four heads, two of keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def logit_bound(model, logits):
    """Bound the difference of logits that are the same sums in another order.

    Normalized states have norm sqrt(width), so a logit is at most that times the norm
    of its row; each block adds two branches of a few sums of `width` terms. A test
    compares this with the sum of the bounds of all operations, which is a little less.
    """
    config = model.config
    terms = config.num_hidden_layers * 8 * (config.hidden_size + logits.shape[1])
    rows = model.lm_head.weight.detach().norm(dim=1)
    return (gamma(terms) * config.hidden_size**0.5 * rows).double().numpy()
