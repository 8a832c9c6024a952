"""Laws of the settings in adapter files."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import adapter_files, lora
from minipeft.reference.adapter_files import Parts, gguf_scaling, merge, settings
from minipeft.reference.lora import LoRA
from tests.exact import equal
from tests.operands import annotations_off
from tests.strategies import rational_layers

WORD = st.text("abc", min_size=1, max_size=3)
NAMES = st.lists(WORD, min_size=1, max_size=4).map(".".join)
PLAIN = {"r": 2, "lora_alpha": 8}


@given(NAMES, NAMES)
def test_a_key_of_words_fits_the_last_words_of_a_name_alone(name, key):
    found = settings({**PLAIN, "alpha_pattern": {key: 32}}, name)
    words, last = name.split("."), key.split(".")
    fits = words[-len(last) :] == last
    # A dot in a key stands for any character, such as another dot.
    assert (found.scaling == 16) == fits or "." in key


@given(rational_layers, st.booleans())
def test_merging_a_stored_weight_is_merging_and_storing(t, turned):
    config = {"r": len(t.A), "lora_alpha": 3 * len(t.A), "fan_in_fan_out": turned}
    W = t.W.T if turned else t.W
    bias = t.W[:, 0]
    stored, b = merge(np.ascontiguousarray(W), bias, Parts(t.A, t.B), config, "a.b")
    plain = lora.merge(t.W, LoRA(t.A, t.B, 3.0))
    assert equal(stored.T if turned else stored, plain)
    assert equal(b, bias)


def test_the_first_key_that_fits_counts():
    for keys, s in (("q_proj", "a.q_proj"), 16), (("a.q_proj", "q_proj"), 16):
        pattern = {keys[0]: 32, keys[1]: 64}
        assert settings({**PLAIN, "alpha_pattern": pattern}, "a.q_proj").scaling == s


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": "2"}, "r in config is '2'"),
        ({"rank_pattern": {"b": True}}, "r in config is True"),
        ({"lora_alpha": None}, "lora_alpha in config is None"),
        ({"alpha_pattern": {"b": np.inf}}, "lora_alpha in config is inf"),
        ({"use_rslora": 1}, "use_rslora in config is 1"),
        ({"fan_in_fan_out": "yes"}, "fan_in_fan_out in config is 'yes'"),
        ({"rank_pattern": [4]}, "rank_pattern in config is of type list"),
        ({"alpha_pattern": {"(": 4}}, "'(' in alpha_pattern of config is no regular"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(change, said):
    with annotations_off(), pytest.raises(InputError, match=re.escape(said)):
        settings({**PLAIN, **change}, "a.b")


def test_a_config_names_its_rank():
    with pytest.raises(InputError, match="r in config is 0"):
        settings({"lora_alpha": 8}, "a.b")


def test_llama_cpp_multiplies_by_the_share_alone_where_alpha_is_zero():
    assert gguf_scaling(0.0, 4, 0.5) == 0.5
    assert gguf_scaling(8.0, 4) == 2
    assert gguf_scaling(8.0, 4, 0.0) == 0


def test_the_config_says_the_rank_that_the_matrices_have():
    A, B = np.ones((2, 5), np.float32), np.ones((4, 2), np.float32)
    config = {**PLAIN, "rank_pattern": {"b": 3}}
    assert adapter_files.scaling(Parts(A, B), config, "a.c") == 4
    with pytest.raises(
        InputError, match=r"A has 2 rows and config says r = 3 for 'a\.b'"
    ):
        adapter_files.scaling(Parts(A, B), config, "a.b")
