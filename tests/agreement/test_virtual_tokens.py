"""Virtual tokens made from a text act as that text everywhere in transformers."""

import functools
from itertools import product

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, NoRepeatNGramLogitsProcessor
from transformers import RepetitionPenaltyLogitsProcessor as Penalty

from minipeft.errors import InputError
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from tests.agreement.architectures import SAY, WORK, build, causal
from tests.agreement.llama import TEXT, llama
from tests.lab import architectures as tiny
from tests.operands import annotations_off
from tests.tolerance import assert_within, gamma

KINDS = {"prefix": (PrefixModel, PrefixConfig), "prompt": (PromptModel, PromptConfig)}
BEFORE = [5, 9, 13, 2]
N = len(BEFORE)
AFTER = torch.tensor([[7, 3, 11, 5, 6], [4, 9, 9, 30, 8]])
kinds = pytest.mark.parametrize("kind", KINDS)
models = functools.cache(causal)


def adapted(kind, model):
    wrapper, config = KINDS[kind]
    return wrapper(model, config(tokens=BEFORE))


def whole(ids):
    return torch.cat([torch.tensor([BEFORE]).expand(len(ids), -1), ids], dim=1)


def assert_same_logits(found, expected):
    """Check logits in float64, to better than a last bit of float32."""
    found, expected = found.detach().numpy(), expected.detach().numpy()
    assert_within(found, expected, gamma(1) * abs(expected).max())


def assert_same_loss(found, expected, logits):
    """Check losses, which transformers computes in float32, over a small vocabulary.

    Each logit is rounded; the exponentials of a row are added up, then the rows.
    """
    roundings = logits.shape[-1] + logits[..., 0].numel() + 4
    bound = 2 * gamma(roundings) * abs(logits.detach().numpy()).max()
    assert_within(found.item(), expected.item(), float(bound))


@kinds
@pytest.mark.parametrize("name", WORK)
def test_made_of_a_text_it_is_that_text(kind, name):
    model = models(name)
    ours = adapted(kind, model)
    out = ours(AFTER, labels=AFTER)
    expected = model(whole(AFTER)).logits[:, N:]
    assert_same_logits(out.logits, expected)
    out.loss.backward()
    assert ours.P.grad.abs().sum() > 0
    ours.P.grad = None
    loss = torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), AFTER[:, 1:].flatten()
    )
    assert_same_loss(out.loss, loss, expected)


@kinds
@pytest.mark.parametrize("name", WORK)
def test_padding_on_the_left_is_not_there(kind, name):
    ours = adapted(kind, models(name))
    padded = torch.nn.functional.pad(AFTER, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(AFTER), (3, 0))
    labels = padded.masked_fill(mask == 0, -100)
    out, expected = ours(padded, mask, labels), ours(AFTER, labels=AFTER)
    assert_same_logits(out.logits[:, 3:], expected.logits)
    assert_same_loss(out.loss, expected.loss, out.logits)


@kinds
@pytest.mark.parametrize("name", WORK)
def test_generation_goes_on_from_a_padded_batch(kind, name):
    model = models(name)
    ours = adapted(kind, model)
    padded = torch.nn.functional.pad(AFTER, (2, 0))
    padded[1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False}
    out = ours.generate(padded, (padded > 0).long(), **settings)
    for row, found in zip(padded, out, strict=True):
        alone = whole(row[row > 0][None])
        expected = model.generate(
            alone, attention_mask=torch.ones_like(alone), **settings
        )
        assert found[len(row) :].tolist() == expected[0, alone.shape[1] :].tolist()


class OnlyTheText(LogitsProcessor):
    """A logits processor that sees the tokens after the text alone."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, input_ids, scores):
        return self.inner(input_ids[:, N:], scores)


class Streamer:
    def __init__(self):
        self.words = []

    def put(self, ids):
        self.words += ids.flatten().tolist()

    def end(self):
        self.words.append("end")


# The settings of a generation, and the settings that replace them for the text.
SETTINGS = {
    "greedy": ({"do_sample": False}, {}),
    "beams": ({"num_beams": 3, "do_sample": False}, {}),
    "all beams": ({"num_beams": 3, "num_return_sequences": 3, "do_sample": False}, {}),
    "sampling": ({"do_sample": True, "top_k": 20}, {}),
    "sampled beams": ({"do_sample": True, "num_beams": 2}, {}),
    "several": ({"do_sample": True, "num_return_sequences": 3}, {}),
    "no cache": ({"do_sample": False, "use_cache": False}, {}),
    "min_new_tokens": ({"do_sample": False, "min_new_tokens": 3}, {}),
    "min_length": (
        {"do_sample": False, "min_length": 9, "eos_token_id": [*range(3, 40)]},
        {"min_length": 9 + N},
    ),
    "max_length": (
        {"do_sample": False, "max_length": 8, "max_new_tokens": None},
        {"max_length": 8 + N},
    ),
    "cut distributions": (
        {"do_sample": True, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
        {},
    ),
    "other distributions": (
        {"do_sample": True, "eta_cutoff": 0.01, "temperature": 0.5, "top_h": 0.5},
        {},
    ),
    "words": (
        {"do_sample": False, "bad_words_ids": [[3], [7]], "suppress_tokens": [4, 5]},
        {},
    ),
    "biases": (
        {"do_sample": False, "sequence_bias": [[[3], 9.0], [[5], 8.0]]},
        {},
    ),
    "beginnings and ends": (
        {
            "do_sample": False,
            "begin_suppress_tokens": [*range(3, 30)],
            "forced_eos_token_id": 2,
            "exponential_decay_length_penalty": (2, 1.5),
            "eos_token_id": 2,
        },
        {},
    ),
    "lengths of beams": (
        {"num_beams": 3, "do_sample": False, "length_penalty": 2.0, "eos_token_id": 3},
        {},
    ),
    "watermark": (
        {"do_sample": False, "watermarking_config": {"seeding_scheme": "lefthash"}},
        {},
    ),
    "a text read in pieces": ({"do_sample": False, "prefill_chunk_size": 2}, {}),
    "a cache by name": ({"do_sample": False, "cache_implementation": "dynamic"}, {}),
    "penalty": (
        {"do_sample": False, "repetition_penalty": 3.0},
        {"repetition_penalty": None, "logits_processor": [OnlyTheText(Penalty(3.0))]},
    ),
    "n-grams": (
        {"do_sample": False, "no_repeat_ngram_size": 1},
        {
            "no_repeat_ngram_size": None,
            "logits_processor": [OnlyTheText(NoRepeatNGramLogitsProcessor(1))],
        },
    ),
}


@pytest.mark.parametrize(
    ("kind", "setting"), sorted({*product(KINDS, SETTINGS)} - {("prefix", "no cache")})
)
def test_generation_is_that_after_the_text(kind, setting):
    model = models("Llama")
    mine, instead = SETTINGS[setting]
    torch.manual_seed(0)
    ours = adapted(kind, model)
    torch.manual_seed(1)
    out = ours.generate(AFTER, torch.ones_like(AFTER), **{"max_new_tokens": 6, **mine})
    torch.manual_seed(1)
    text = whole(AFTER)
    settings = {"max_new_tokens": 6, **mine, **instead}
    expected = model.generate(text, attention_mask=torch.ones_like(text), **settings)
    assert out.tolist() == expected[:, N:].tolist()


@kinds
def test_a_dict_a_stream_and_a_length_are_those_of_the_text(kind):
    model = models("Llama")
    ours, streamer = adapted(kind, model), Streamer()
    settings = {"do_sample": False, "return_dict_in_generate": True}
    out = ours.generate(
        AFTER[:1], max_length=9, output_scores=True, streamer=streamer, **settings
    )
    text = whole(AFTER[:1])
    expected = model.generate(text, max_length=9 + N, output_scores=True, **settings)
    assert out.sequences.tolist() == expected.sequences[:, N:].tolist()
    assert out.sequences.shape == (1, 9)
    assert_same_logits(torch.stack(out.scores), torch.stack(expected.scores))
    assert streamer.words == [*out.sequences[0].tolist(), "end"]


@kinds
def test_generation_leaves_the_model_as_it_was(kind):
    model = models("Llama")
    before = model.generate(AFTER, max_new_tokens=4, do_sample=False)
    ours = adapted(kind, model)
    with pytest.raises(ValueError, match="temperature"):
        ours.generate(AFTER, max_new_tokens=4, do_sample=True, temperature=-1.0)
    assert not model._forward_pre_hooks
    after = model.generate(AFTER, max_new_tokens=4, do_sample=False)
    assert after.tolist() == before.tolist()


@kinds
@pytest.mark.parametrize("name", SAY)
def test_other_models_work_or_are_refused_by_one_true_sentence(kind, name):
    settings, *sentences = SAY[name]
    sentence = sentences[list(KINDS).index(kind)]
    wrapper, config = KINDS[kind]
    for start in (config(num_virtual_tokens=4), config(tokens=BEFORE)):
        if sentence is None:
            ours = wrapper(build(name, settings), start)
            ours(AFTER, labels=AFTER).loss.backward()
            assert ours.P.grad.abs().sum() > 0
        else:
            with pytest.raises(InputError, match=sentence):
                wrapper(build(name, settings), start)


def test_layers_of_several_widths_take_a_prefix():
    model = build("Gemma4ForCausalLM", SAY["Gemma4ForCausalLM"][0])
    ours = adapted("prefix", model)
    assert len(set(ours.widths)) > 1
    assert_same_logits(ours(AFTER).logits, model(whole(AFTER)).logits[:, N:])


def test_a_prompt_works_beside_layers_that_keep_another_state():
    model = build("Lfm2ForCausalLM", SAY["Lfm2ForCausalLM"][0])
    out = adapted("prompt", model)(AFTER)
    assert_same_logits(out.logits, model(whole(AFTER)).logits[:, N:])


@pytest.mark.parametrize(
    "name", ["MambaForCausalLM", "RwkvForCausalLM", "xLSTMForCausalLM"]
)
def test_a_recurrent_model_reads_a_prompt_once(name):
    """Its state, which has other names than a cache, holds the prompt from then on."""
    model = tiny.build(name, use_cache=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # as trained ones: each step needs the state
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(whole(AFTER), **settings)[:, N + AFTER.shape[1] :]
    ours = adapted("prompt", model)
    found = ours.generate(AFTER, **settings)[:, AFTER.shape[1] :]
    assert found.tolist() == expected.tolist()
    assert len(set(found.flatten().tolist())) > 3
    ours(AFTER, labels=AFTER).loss.backward()  # in eval mode a cache would be in use
    assert ours.P.grad.abs().sum() > 0


def test_a_prefix_cannot_do_without_a_cache():
    ours = adapted("prefix", models("Llama"))
    with pytest.raises(InputError, match="use_cache is False"):
        ours.generate(AFTER, max_new_tokens=2, use_cache=False)


def test_a_text_longer_than_a_window_is_refused():
    model = build("MistralForCausalLM", {**WORK["Mistral"], "sliding_window": 4})
    with pytest.raises(InputError, match="its window slides; start from a shorter"):
        adapted("prefix", model)


@kinds
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"past_key_values": object()}, "the cache begins with the virtual tokens"),
        ({"inputs_embeds": AFTER}, "the text is given by its token ids"),
        ({"assistant_model": object()}, "a second model would not see"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens cannot be given"),
        ({"assistant_early_exit": 1}, "assistant_early_exit cannot be given here"),
        ({"guidance_scale": 1.5}, "its second pass would see the virtual tokens too"),
        (
            {
                "generation_config": GenerationConfig(prompt_lookup_num_tokens=2),
                "max_new_tokens": None,
            },
            "prompt_lookup_num_tokens cannot be given",
        ),
        ({"cache_implementation": "static"}, "a cache of fixed size has no room"),
    ],
)
def test_settings_that_cannot_be_there_are_refused_by_name(kind, setting, sentence):
    ours = adapted(kind, models("Llama"))
    with pytest.raises(InputError, match=sentence):
        ours.generate(AFTER, **{"max_new_tokens": 2, **setting})


@kinds
def test_a_setting_that_the_model_brings_along_is_refused_or_off(kind):
    model = causal("Llama")
    ours = adapted(kind, model)
    model.generation_config.guidance_scale = 1.0  # off
    ours.generate(AFTER, max_new_tokens=2, do_sample=False)
    model.generation_config.guidance_scale = 2.0
    with pytest.raises(InputError, match="guidance_scale cannot be given here"):
        ours.generate(AFTER, max_new_tokens=2, do_sample=False)


@kinds
@pytest.mark.parametrize("visible", [True, 0.5, 2, -1.0])
def test_what_is_not_0_in_a_mask_is_visible(kind, visible):
    ours, zero = adapted(kind, models("Llama")), torch.zeros(2, 2)
    mask = torch.full((2, 3), visible)
    with annotations_off():
        out = ours(AFTER, torch.cat([zero.to(mask.dtype), mask], dim=1))
    expected = ours(AFTER, torch.cat([zero, torch.ones(2, 3)], dim=1).long())
    assert torch.equal(out.logits[:, 2:], expected.logits[:, 2:])


@kinds
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_a_text_without_tokens_is_refused(kind, shape):
    ours, empty = adapted(kind, models("Llama")), torch.zeros(shape, dtype=torch.long)
    for act in (ours, lambda ids: ours.generate(ids, max_new_tokens=2)):
        with pytest.raises(InputError, match=r"input_ids has shape .*; give each text"):
            act(empty)


@kinds
def test_operands_of_another_text_are_refused(kind):
    ours = adapted(kind, models("Llama"))
    for wrong, sentence in (
        ({"labels": AFTER[:, 1:]}, "labels has shape"),
        ({"attention_mask": whole(AFTER)}, "virtual tokens are not counted"),
    ):
        with annotations_off(), pytest.raises(InputError, match=sentence):
            ours(AFTER, **wrong)


@pytest.mark.parametrize("spoil", ["sum", "narrow", "deep", "flat"])
@pytest.mark.parametrize(
    ("model", "config"),
    [(PromptModel, PromptConfig(3)), (PrefixModel, PrefixConfig(num_virtual_tokens=3))],
)
def test_a_replaced_P_of_another_shape_is_refused(model, config, spoil):
    adapted = model(llama(), config)
    ways = {
        "sum": lambda P: P.sum(),
        "narrow": lambda P: P[..., :1],
        "deep": lambda P: P[..., None],
        "flat": lambda P: P[0],
    }
    adapted.P = torch.nn.Parameter(ways[spoil](adapted.P.detach()))
    with annotations_off(), pytest.raises(InputError, match=r"P has shape \("):
        adapted(TEXT)
