"""Virtual tokens before the text of a causal model of transformers.

The model's `generate` gets only the token ids of the text, so lengths, penalties,
banned words, beams and streams concern the text alone. The virtual tokens are added
when the model is called: its mask and positions are extended there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minipeft.errors import InputError
from minipeft.shapes import Integer
from minipeft.torch import loading, saving
from minipeft.torch.adapted import Adapted, freeze_all_but_adapters
from minipeft.torch.operands import check_in_memory
from minipeft.values import check_integer, check_kind

REMEDY = (
    "virtual tokens have no place in a model that from_pretrained builds; save "
    "model.state_dict() and load it into the same PromptModel or PrefixModel; "
)
ALONE = "model.model.save_pretrained saves the model without them."
UNLOADED = (
    "after unload(merge(model.model)), or unload(model.model), which drops its "
    f"adapters, {ALONE}"
)
NOT_ALONE = "model.model.save_pretrained, of the model without them, is refused too."
IGNORE = -100  # torch's cross-entropy ignores this label
Ids = Integer[Tensor, "batch tokens"]

# Settings of transformers' `generate` that do not work with virtual tokens.
TAKEN = {
    "past_key_values": "the cache begins with the virtual tokens",
    "inputs_embeds": "the text is given by its token ids",
    "position_ids": "the positions follow from the mask",
    "assistant_model": "a second model would not see the virtual tokens",
    "prompt_lookup_num_tokens": "candidates are checked by a length without them",
    "assistant_early_exit": "candidates are checked by a length without them",
    "guidance_scale": "its second pass would see the virtual tokens too",
}


class VirtualTokens(nn.Module, ABC):
    """A frozen causal model of transformers with trained virtual tokens.

    `self.model` is the given model; its layers are not changed. A state dict holds a
    tied weight once, under its first name: safetensors, and so transformers' `Trainer`,
    refuses two names of one tensor.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_causal(model)
        check_in_memory(model, [(type(model).__name__, model.device)])
        self.model = model
        self.register_state_dict_post_hook(_leave_out_tied)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_fill_in_tied)  # type: ignore[no-untyped-call]
        loading.watch(self)
        taken = signature(model.forward).parameters
        self.takes_positions = "position_ids" in taken
        self.recurrent = "state" in taken or "cache_params" in taken

    def freeze(self) -> None:
        """Train only adapters of the model, and follow its mode; nothing is refused."""
        freeze_all_but_adapters(self.model)
        self.train(self.model.training)

    def check_load(self, state: Mapping[str, Any], prefix: str, assign: bool) -> None:
        """Refuse trained tensors that are not finite.

        Args:
            state: of `load_state_dict`.
            prefix: of the module's names in the state.
            assign: whether the tensors replace those of the layer.
        """
        loading.check_values(self, state, prefix, [*self._own()], assign)

    def own_parameters(self) -> list[nn.Parameter]:
        """Return what is trained here, without the adapters of the model."""
        return list(self._own().values())

    @property
    def config(self) -> Any:
        """The config of the model, which knows no virtual tokens."""
        return self.model.config

    @property
    def save_pretrained(self) -> Callable[..., None]:
        """Refuse, unless a program keeps its state: see `saving`."""
        held = vars(self.model).get(saving.METHOD)
        reasons = held.reasons if isinstance(held, saving.Refusal) else ()
        inside = any(isinstance(module, Adapted) for module in self.model.modules())
        remedies = {(0, False): ALONE, (1, True): UNLOADED}  # else: few bits, or beside
        without = remedies.get((len(reasons), inside), NOT_ALONE)
        return saving.Refusal(self, (REMEDY + without,))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    @abstractmethod
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens before the text."""

    @abstractmethod
    def enter(self, call: dict[str, Any]) -> int:
        """Put the virtual tokens before a text of which the model has read nothing yet.

        Args:
            call: the arguments of the model; changed in place.

        Returns:
            The number of virtual tokens that the model reads in this call.
        """

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        labels: Ids | None = None,
    ) -> Any:
        """Run the model with the virtual tokens; logits and loss are those of the text.

        Raises:
            InputError: if an operand does not fit the text.
        """
        check_text(input_ids, attention_mask, labels)
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        call, n = self.ahead(text)
        if self.recurrent:  # some write to their state, which no gradient survives
            call["use_cache"] = False
        if labels is not None:
            call["labels"] = pad(
                predicted(labels, attention_mask), (n, 0), value=IGNORE
            )
        with self._finding_tied():
            out = self.model(**call)
        out.logits = out.logits[:, n:]
        return out

    def generate(
        self,
        input_ids: Ids | None = None,
        attention_mask: Ids | None = None,
        **settings: Any,
    ) -> Any:
        """Continue a text; `settings` are those of transformers' `generate`.

        Raises:
            InputError: for a setting that does not work with virtual tokens; unless
                one text is given, as `input_ids` or by transformers' name `inputs`.
        """
        input_ids = _one_text(input_ids, settings.pop("inputs", None))
        ruled = settings.get("generation_config") or self.model.generation_config
        for name, why in TAKEN.items():
            value = settings.get(name, getattr(ruled, name, None))
            off = value is None or (name == "guidance_scale" and value == 1)
            if not off:
                raise InputError(f"{name} cannot be given here: {why}; leave it out.")
        check_text(input_ids, attention_mask, None)
        if attention_mask is not None:
            settings["attention_mask"] = attention_mask
        with self._entering(), self._finding_tied():
            return self.model.generate(input_ids, **settings)

    def ahead(self, call: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the model's arguments, and the number of virtual tokens it reads.

        The mask lets every query see the virtual tokens. Positions count the visible
        tokens, so that padding on the left gets none.
        """
        call, n = dict(call), self.num_virtual_tokens
        ids, cache = call["input_ids"], call.get("past_key_values")
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.is_meta and not ids.is_meta:
                raise _offload_inside(name, "comes in only for a call of the whole")
        if getattr(cache, "is_compileable", False):
            raise InputError(
                "a cache of fixed size has no room for virtual tokens; leave out "
                "cache_implementation, or choose 'dynamic'."
            )
        if _has_read(call):  # such a state needs no mask and no positions
            return call, 0
        past = 0 if cache is None else cache.get_seq_length()
        mask = call.get("attention_mask")
        if mask is None:
            mask = ids.new_ones(len(ids), max(past - n, 0) + ids.shape[1])
        # As a model without virtual tokens reads it: what is not 0 is visible.
        call["attention_mask"] = seen = pad((mask != 0).long(), (n, 0), value=1)
        read = 0 if past else self.enter(call)
        if self.takes_positions:
            positions = (seen.cumsum(dim=1) - 1).clamp(min=0)
            call["position_ids"] = positions[:, -(read + ids.shape[1]) :]
        return call, read

    def _own(self) -> dict[str, nn.Parameter]:
        named = self.named_parameters()
        return {n: p for n, p in named if not n.startswith("model.")}

    @contextmanager
    def _finding_tied(self) -> Iterator[None]:
        # accelerate looks for what the state dict has left out.
        try:
            yield
        except KeyError as error:
            if error.args[0] in dict(self.named_parameters(remove_duplicate=False)):
                raise _offload_inside(
                    error.args[0], "is tied, and saved once"
                ) from None
            raise

    @contextmanager
    def _entering(self) -> Iterator[None]:
        def hook(_: Any, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, self.ahead(call)[0]

        handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _offload_inside(name: str, why: str) -> InputError:
    return InputError(
        f"{name} is offloaded, and {why}; offload the model inside alone (`.model`), "
        "and leave the virtual tokens where they are."
    )


def _one_text(input_ids: Ids | None, inputs: Ids | None) -> Ids:
    if (input_ids is None) == (inputs is None):
        given = "twice, as input_ids and as inputs" if inputs is not None else "nowhere"
        raise InputError(f"the text is given {given}; give its token ids as input_ids.")
    return cast(Tensor, inputs if input_ids is None else input_ids)


def _has_read(call: Mapping[str, Any]) -> bool:
    """Tell whether the state of a recurrent model contains a text already."""
    if call.get("state") is not None:  # RWKV has one from its first call on
        return True
    cache = call.get("cache_params")  # Mamba and xLSTM are given an empty one
    known = getattr(cache, "has_previous_state", lambda: False)
    return bool(known()) or int(getattr(cache, "seqlen_offset", 0)) > 0


def _later_names(module: nn.Module) -> dict[str, str]:
    """Return the first name of each tied parameter by its later names."""
    first: dict[nn.Parameter, str] = {}
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            found[name] = first[parameter]
    return found


def _leave_out_tied(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    for name in _later_names(module):
        state.pop(prefix + name, None)


def _fill_in_tied(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    for name, first in _later_names(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def predicted(labels: Ids, attention_mask: Ids | None) -> Ids:
    """Ignore the label of a text's first token, which no token of the text predicts.

    A model without virtual tokens ignores this label too, so both losses are means over
    the same tokens.
    """
    before = torch.zeros_like(labels[:, :1])
    if attention_mask is None:
        seen = torch.ones_like(labels[:, 1:])
    else:
        seen = attention_mask[:, :-1].to(labels.dtype)
    return labels.masked_fill(torch.cat([before, seen], dim=1) == 0, IGNORE)


def check_text(input_ids: Ids, attention_mask: Ids | None, labels: Ids | None) -> None:
    """Refuse a mask or labels of another shape than the text; no value is read."""
    _check_ids("input_ids", input_ids)
    if labels is not None:
        _check_ids("labels", labels)
    check_kind("attention_mask", attention_mask, Tensor, type(None))
    if input_ids.dim() != 2:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}; give (batch, tokens)."
        )
    if not input_ids.numel():
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}; give each text a token, "
            "such as that of a beginning, and the batch a text."
        )
    for name, operand in (("attention_mask", attention_mask), ("labels", labels)):
        if operand is not None and operand.shape != input_ids.shape:
            raise InputError(
                f"{name} has shape {tuple(operand.shape)}; the text has "
                f"{tuple(input_ids.shape)}, and virtual tokens are not counted."
            )


def _check_ids(name: str, ids: Ids) -> None:
    check_kind(name, ids, Tensor)
    if ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{name} has dtype {ids.dtype}; give whole numbers (int64).")


def check_causal(model: Any) -> None:
    """Refuse a model that does not read a text from left to right."""
    check_kind("model", model, nn.Module)
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", lambda: False)
    if config is None or not can():
        raise InputError(
            f"{type(model).__name__} is no causal language model; give one that can "
            "generate, such as LlamaForCausalLM."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} reads its text with an encoder; virtual tokens "
            "stand before the text of a decoder: give a decoder-only model."
        )


def check_count(num_virtual_tokens: int) -> None:
    """Refuse fewer than one virtual token."""
    check_integer("num_virtual_tokens", num_virtual_tokens)
    if num_virtual_tokens < 1:
        raise InputError(
            f"num_virtual_tokens is {num_virtual_tokens}; choose at least 1."
        )


def check_tokens(tokens: Sequence[int]) -> None:
    """Refuse what is no list of token ids."""
    if isinstance(tokens, str | bytes):
        raise InputError(f"tokens is {tokens!r}; give the ids of a text's tokens.")
    check_kind("tokens", tokens, Sequence)
    for token in tokens:
        check_integer("one of the tokens", token, 0)


def wide(values: Tensor) -> Tensor:
    """Return the trained tensor in float32, or in the model's dtype if wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout, gradients, autocast or inference mode."""
    training = {module: module.training for module in model.modules()}
    kind = next(model.parameters()).device.type
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(kind, enabled=False),
    ):
        model.eval()
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was
