"""A long run along its rates: what its table and its comparison at equal gain say."""

import json

import pytest

from minipeft.lab.chapter import start
from minipeft.lab.long_run import LongRun, intruded


def one(gain, lost, tuning):
    losses = {"definitions": 5 - gain, "novel": 3 + lost, "tuning": tuning}
    return losses | {"rank": 4, "size": 0.5, "similar": [0.4, 0.6]}


@pytest.fixture
def edge():
    return 5  # the tuning loss of the smallest rate


@pytest.fixture
def made(tmp_path, edge):
    whole = [[0.1, [one(1, 0.5, 4)]], [0.2, [one(2, 1.5, 3)]], [0.3, [one(1, 9, 5)]]]
    lora = [[0.1, [one(1, 0.6, edge)]], [0.2, [one(1.5, 2, 2)]], [0.3, [one(0, 9, 5)]]]
    sweeps = {"full fine-tuning": {"sweep": whole}, "r = 8": {"sweep": lora}}
    kept = {"methods": sweeps, "seeds": [0], "steps": 8, "before": {}}
    kept["before"] = {"definitions": 5, "novel": 3}
    (tmp_path / "run.json").write_text(json.dumps(kept))
    chapter = start("27_learns_less", steps=3, arguments=[])
    return lambda: LongRun(chapter, tmp_path / "run.json", "a model, ")


@pytest.fixture
def run(made):
    return made()


def test_the_rate_is_the_best_on_the_definitions_for_tuning(run, capsys):
    assert run.rates == {"full fine-tuning": 0.2, "r = 8": 0.2}
    assert run.at("r = 8", "gain") == [1.5]
    assert run.at("r = 8", "forgotten") == [2]


@pytest.mark.parametrize("edge", [1])
def test_a_best_rate_at_the_edge_of_its_sweep_is_refused(made):
    with pytest.raises(AssertionError, match=r"a model, LoRA, r = 8, 8 steps"):
        made()


def test_equal_gain_lies_between_two_rates_of_full_fine_tuning(run):
    assert run.line("full fine-tuning", 0).tolist() == [[0, 1, 2], [0, 0.5, 1.5]]
    assert run.beside("r = 8", 0.2) == ([2], [1], [1])


def test_the_table_has_a_line_a_method(run):
    head, _, whole, lora = run.table("a model").splitlines()
    assert head.startswith("| a model | rate | gain, nats |")
    assert whole.startswith("| full fine-tuning | 0.2 | 2.000 ± 0.000 | 1.500 ± 0.000")
    assert lora.endswith("| 5.00 ± 0.00 | 1.000 ± 0.000 |")


def test_an_intruder_is_counted_among_ten():
    assert intruded({"similar": [0.4, 0.6]}, 0.5) == 5
