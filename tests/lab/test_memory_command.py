"""`minipeft memory`: its output for a configuration, without a model."""

import json
import re

import pytest

from minipeft import cli
from minipeft.errors import InputError
from minipeft.lab.memory import LLAMA_7B, command, named
from minipeft.lab.memory.options import BASES, OPTIMIZERS, Options
from tests.operands import annotations_off

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "vocab_size": 32000,
}

QWEN = {**LLAMA, "model_type": "qwen2_moe", "num_experts": 4}
NAN = '{"model_type": "llama", "hidden_size": NaN}'
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}


@pytest.fixture
def config(tmp_path):
    """Write a configuration, and return its path."""

    def written(**fields):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return str(path)

    return written


def ran(capsys, *arguments):
    code = cli.main(["memory", *arguments])
    return code, *capsys.readouterr()


def test_llama_3_1_8b_from_its_config_alone(config, capsys):
    code, out, _ = ran(capsys, config(**LLAMA), "--base", "nf4-double", "-r", "64")
    assert code == 0
    share = "2.046% of all, adapters included"
    assert out.startswith(f"8,030,261,248 parameters; 167,772,160 train ({share})\n")
    assert out.splitlines()[1].split() == ["GB", "GiB"]
    for part in ("embeddings", "output layer", "norms, biases, routers"):
        line = next(line for line in out.splitlines() if part in line)
        assert f"not quantized: {command.STAYS[part]}" in line
    assert "quantization constants" in out
    assert "fits on: T4" in out


def test_below_a_gigabyte_the_table_is_in_megabytes(config, capsys):
    small = LLAMA | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    path = config(**small, head_dim=16)
    _, out, _ = ran(capsys, path, "--method", "full", "--sequence", "16")
    first, units, *rest = out.splitlines()
    assert first.endswith("(100.000% of all)")
    assert units.split() == ["MB", "MiB"]
    total = Options(method="full", sequence=16).peak(named(path)).total
    (line,) = (line for line in rest if line.startswith("at the fullest moment"))
    assert line.endswith(f"{total / 1e6:.3f} {total / 2**20:10.3f}")


def test_json_holds_bytes_that_add_up(config, capsys):
    code, out, _ = ran(capsys, config(**LLAMA), "--json", "--checkpointing")
    found = json.loads(out)
    assert code == 0
    peak = found["peak"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "transient")
    assert peak["total"] == sum(peak[part] for part in parts)
    assert peak["weights"] == sum(found["weights"].values())
    assert found["parameters"] == 8_030_261_248
    assert found["options"]["checkpointing"] is True
    assert found["cards"]["T4, sold as 16 GB"] is False
    assert found["cards"]["RTX 4090, sold as 24 GB"] is True


def test_experts_stay_exact_where_that_is_asked(config, capsys):
    path = config(**MIXTRAL)
    model = named(path)
    assert model.parameters == 46_702_792_704  # Mixtral 8x7B
    ours = Options(base="nf4-double").peak(model)
    theirs = Options(base="nf4-double", experts=False).peak(model)
    bits = 8 * BASES["nf4-double"].linears
    saved = model.expert_parameters * (16 - bits) / 8
    assert theirs.weights - ours.weights == pytest.approx(saved)
    _, out, _ = ran(capsys, path, "--base", "nf4-double", "--exact-experts")
    assert f"not quantized: {command.STAYS['experts']}" in out
    _, out, _ = ran(capsys, path, "--base", "nf4-double", "--adapt-experts")
    assert f"not quantized: {command.STAYS['experts']}" not in out
    plain = Options().trained(model)
    adapted = Options(adapt_experts=True).trained(model)
    # Of rank 16, in 32 layers, 8 experts: gate and up are one matrix.
    one = 16 * ((4096 + 2 * 14336) + (14336 + 4096))
    assert adapted - plain == 32 * 8 * one


def test_names_and_folders_are_found(tmp_path, tiny):
    tiny.model.config.save_pretrained(tmp_path)
    assert named(str(tmp_path)) == named("tiny")
    assert named("tiny").parameters == 918_656


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_optimizers_keep_what_they_say(name):
    options = Options(method="full", optimizer=name)
    peak, P = options.peak(LLAMA_7B), LLAMA_7B.parameters
    assert peak.optimizer + options.host(LLAMA_7B) == pytest.approx(
        P * OPTIMIZERS[name].states
    )
    assert (peak.optimizer == 0) == (name.startswith("paged") or name == "sgd")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_and_attention_move_the_peak_as_they_should(method):
    def total(**changes):
        return (
            Options(**{"method": method, "sequence": 2048, "batch": 16} | changes)
            .peak(LLAMA_7B)
            .total
        )

    usual = total()
    assert total(checkpointing=True) < usual
    assert usual < total(attention="masked") < total(attention="eager")
    assert total(batch=17) > usual


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "lorra"), "there is no method 'lorra'; choose full, lora"),
        (("--method", "qlora"), "choose the method lora and the base nf4-double"),
        (("--base", "int3"), "there is no base 'int3'; choose float32, bfloat16"),
        (("--optimizer", "lion"), "there is no optimizer 'lion'; choose adamw"),
        (("--attention", "flash"), "there is no attention 'flash'; choose from fused"),
        (("--batch", "0"), "batch is 0; give at least 1"),
        (("-r", "0"), "the rank is 0; it must be at least 1"),
        (("--targets", "query"), "targets are ['query']; choose from q_proj"),
        (("--targets", "experts"), "LoRA on every expert by adapt_experts (--adapt-ex"),
        (("--targets", "q_proj,gate_up_proj"), "by adapt_experts (--adapt-experts)"),
        (("--targets", "c_fc"), "targets are ['c_fc']; choose from q_proj"),
        (("--method", "full", "--base", "nf4"), "weights in 4 bits are not trained"),
        (("--method", "loftq"), "the base is bfloat16, and loftq stores the layers"),
        (("--method", "loftq", "--base", "nf4-double"), "choose the base nf4 (--base"),
        (("--method", "dora", "--adapt-experts"), "dora does not adapt experts"),
        (("--method", "full", "--targets", "q_proj"), "full stands on no linear layer"),
        (("--method", "prompt", "--targets", "q_proj"), "prompt stands on no linear"),
        (("--method", "full", "--adapt-experts"), "full trains the experts without"),
        (("--adapt-experts",), "this model has no experts to adapt"),
        (("-r", "1025"), "choose 1 to 1024 for k_proj of shape (1024, 4096)"),
    ],
)
def test_wrong_options_are_one_sentence(config, capsys, arguments, sentence):
    code, out, err = ran(capsys, config(**LLAMA), *arguments)
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "bert"}, "the sizes of 'bert' are not known here; give one of"),
        ({"hidden_size": 8}, "is no configuration of a model"),
        ({**LLAMA, "attention_bias": True}, "attention_bias is true, and biases are"),
        ({**LLAMA, "hidden_size": -256}, "hidden_size is -256; choose 1 or more"),
        ({**LLAMA, "num_attention_heads": 0}, "; repair it, or give another config"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0; choose 1 or more"),
        ({**LLAMA, "num_key_value_heads": 0}, "num_key_value_heads is 0; choose 1"),
        ({**LLAMA, "num_key_value_heads": 3}, "is 3 for 32 heads; each serves as many"),
        ({**LLAMA, "num_key_value_heads": 64}, "so choose a divisor of 32"),
        ({**LLAMA, "head_dim": -64}, "head_dim is -64; choose 1 or more"),
        ({**LLAMA, "hidden_size": "256"}, "expected int, got str (value: '256')"),
        ({**LLAMA, "hidden_size": None}, "expected int, got NoneType"),
        ({**LLAMA, "hidden_size": [1]}, "expected int, got list"),
        ({**LLAMA, "vocab_size": 10**30}, "choose a number that fits an index"),
        ({**LLAMA, "text_config": None}, "text_config is of type NoneType"),
        ({**LLAMA, "text_config": {"model_type": "llama"}}, "text_config is of type"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "is 9 and num_local_experts is 8"),
        ({**MIXTRAL, "num_local_experts": 0}, "num_local_experts is 0; choose 1"),
        ({**QWEN, "decoder_sparse_step": 0}, "decoder_sparse_step is 0; choose 1"),
        ({**QWEN, "qkv_bias": False}, "qkv_bias is false, and qwen2_moe is counted"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention is true"),
        ({**GPT2, "n_head": 0}, "n_head is 0; choose 1 or more"),
        ({**GPT2, "n_positions": "x"}, "n_positions"),
        ({**GPT2, "n_positions": 32}, "has 512 tokens, and this model has positions"),
    ],
)
def test_a_configuration_that_is_not_known_is_one_sentence(
    config, capsys, fields, sentence
):
    code, _, err = ran(capsys, config(**fields))
    assert code == 2
    assert sentence in err


def test_a_target_inside_experts_alone_is_refused(config, capsys):
    code, _, err = ran(capsys, config(**MIXTRAL), "--targets", "q_proj,gate_proj")
    assert code == 2
    assert "the target gate_proj stands only inside experts here" in err


@pytest.mark.parametrize("text", ["[" * 100_000, NAN])
def test_a_file_that_cannot_be_decoded_is_one_sentence(tmp_path, capsys, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = ran(capsys, str(path))
    assert code == 2
    assert "is no configuration of a model" in err


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 5000 + ".json"])
def test_a_name_that_is_too_long_is_one_sentence(capsys, name):
    code, _, err = ran(capsys, name)
    assert code == 2
    assert "cannot be read (File name too long)" in err


def test_of_a_model_that_sees_the_part_that_writes_is_counted(config, capsys):
    code, alone, err = ran(capsys, config(model_type="gemma3_text"))
    assert (code, err) == (0, "")
    code, out, err = ran(capsys, config(model_type="gemma3"))
    assert (code, out) == (0, alone)
    assert err.startswith("counted: the part that writes text, and not what reads")


def test_no_such_file_is_one_sentence(tmp_path, capsys):
    code, _, err = ran(capsys, str(tmp_path / "none.json"))
    assert code == 2
    assert "give a model's config.json" in err
    (tmp_path / "notes.txt").write_text("no configuration")
    code, _, err = ran(capsys, str(tmp_path / "notes.txt"))
    assert code == 2
    assert "notes.txt is no configuration of a model; give its config.json" in err
    code, _, err = ran(capsys, str(tmp_path))
    assert code == 2
    assert f"the folder {tmp_path} has no config.json, so it is no model" in err
    with pytest.raises(InputError, match="there is no model"):
        named("no-such-model")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": "2"}, "batch is '2'; choose a whole number"),
        ({"sequence": 1.5}, "sequence is 1.5; choose a whole number"),
        ({"r": True}, "r is True; choose a whole number"),
        ({"method": None}, "method is of type NoneType; give one of type str"),
        ({"checkpointing": "no"}, "checkpointing is 'no'; choose True or False"),
        (
            {"targets": "q_proj"},
            "targets is of type str; give one of type list or tupl",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_another_kind_are_refused_by_name(changes, sentence):
    with annotations_off(), pytest.raises(InputError, match=re.escape(sentence)):
        Options(**changes)
