"""Prompt tuning in peft."""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PromptTuningConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch
from minipeft.golden.drivers.peft.virtual import TASK, around
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array


def prompt_init(E: Array, tokens: Array) -> Array:
    """`prompt_tuning_init="TEXT"`, with a tokenizer whose words are the numbers."""
    if tokens.size and tokens.max() >= len(E):
        raise Unsupported("peft starts from a text, and a text has no such token")
    words = {str(number): number for number in range(len(E))}
    made = Tokenizer(WordLevel(words, unk_token="0"))
    made.pre_tokenizer = Whitespace()
    with TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
        config = PromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=len(tokens),
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=" ".join(map(str, tokens)),
            tokenizer_name_or_path=folder,
        )
        model = around(to_torch(E), config)
    return to_numpy(model.prompt_encoder["default"].embedding.weight)


def prompt_forward(X: Array, P: Array) -> Array:
    """Return what the model is given in place of its text."""
    if X.ndim > 3:
        raise Unsupported("peft has one axis of texts")
    model = _model(P)
    y, _ = model(inputs_embeds=to_torch(X if X.ndim == 3 else X[None]))
    return to_numpy(y if X.ndim == 3 else y[0])


def prompt_backward(grad_y: Array, P: Array) -> tuple[Array, Array]:
    """Return the gradients of the text and of the prompt."""
    if grad_y.ndim > 3:
        raise Unsupported("peft has one axis of texts")
    model = _model(P)
    grad = to_torch(grad_y if grad_y.ndim == 3 else grad_y[None])
    X = torch.zeros_like(grad[:, len(P) :]).requires_grad_()
    leaf = model.prompt_encoder["default"].embedding.weight
    grad_X, grad_P = torch.autograd.grad(model(inputs_embeds=X)[0], (X, leaf), grad)
    return to_numpy(grad_X if grad_y.ndim == 3 else grad_X[0]), to_numpy(grad_P)


def _model(P: Array) -> Any:
    config = PromptTuningConfig(task_type=TASK, num_virtual_tokens=len(P))
    model = around(torch.zeros(1, P.shape[1], device=DEVICE), config)
    encoder = model.prompt_encoder["default"]
    encoder.load_state_dict({"embedding.weight": to_torch(P)})
    return model
