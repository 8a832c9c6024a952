import pytest

from minipeft.errors import InputError
from minipeft.lab import claims
from minipeft.lab.chapter import start
from minipeft.lab.claims import Claims

USUAL, OTHER = Claims(usual=True), Claims(usual=False)
INSIDE = {1e-3: 4.2, 1e-2: 4.0, 1e-1: 4.3}
EDGES = [{1e-3: 4.0, 1e-2: 4.1, 1e-1: 4.3}, {1e-3: 4.3, 1e-2: 4.1, 1e-1: 4.0}]


@pytest.fixture(autouse=True)
def _as_before():
    count = len(claims.QUANTITIES)
    yield
    del claims.QUANTITIES[count:]


@pytest.mark.parametrize(
    ("line", "usual"),
    [
        ([], True),
        (["--steps", "30", "--model", "tiny"], True),
        (["--steps", "1"], False),
        (["--model", "smollm2"], False),
        (["--device", "cuda"], False),
    ],
)
def test_only_the_default_model_and_steps_on_a_cpu_are_usual(line, usual, monkeypatch):
    on = "cuda" if "cuda" in line else "cpu"
    monkeypatch.setattr("minipeft.lab.chapter.pick_device", lambda asked: on)
    monkeypatch.setattr("minipeft.lab.chapter.fetch", lambda name: None)
    monkeypatch.setattr("minipeft.lab.chapter.check_name", lambda *_: None)
    assert start("01_lora", steps=30, arguments=line).usual is usual


def test_a_claim_that_holds_is_shown_with_its_control(capsys):
    for statements in (USUAL, OTHER):
        assert statements.claim("A learns more than B", 1 < 2, control="B")
    line = "claim: A learns more than B\n  control: B\n  holds\n"
    assert capsys.readouterr().out == 2 * line


def test_a_claim_that_does_not_hold_fails_in_the_usual_setting_only(capsys):
    with pytest.raises(AssertionError, match=r"A learns more than B \(control: B\)"):
        USUAL.claim("A learns more than B", 2 < 1, control="B")
    assert OTHER.claim("A learns more than B", 2 < 1, control="B") is False
    said = "claim: A learns more than B\n  control: B\n"
    said += "  does NOT hold with these options\n"
    assert capsys.readouterr().out == said


def test_a_claim_without_a_control_is_refused():
    with pytest.raises(InputError, match="'A wins' names no control; name one"):
        USUAL.claim("A wins", True, control=" ")


def test_a_best_rate_inside_its_sweep_is_returned(capsys):
    assert USUAL.best("LoRA", INSIDE) == 1e-2
    said = "best learning rate of LoRA: 0.01 (tried 0.001 to 0.1)\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("losses", [*EDGES, {1e-2: 4.0}])
def test_a_best_rate_at_the_edge_fails_in_the_usual_setting_only(losses, capsys):
    best = min(losses, key=losses.get)
    with pytest.raises(AssertionError, match=f"of LoRA, {best:g}, is at the edge"):
        USUAL.best("LoRA", losses)
    assert OTHER.best("LoRA", losses) == best
    assert "; at the edge: a rate beyond it may be better\n" in capsys.readouterr().out


def test_a_quantity_needs_a_label_and_gives_its_value_back(capsys):
    assert USUAL.quantity("loss before", 4.29349, "nats per token") == 4.29349
    assert USUAL.quantity("trained", 12345, "", digits=0) == 12345
    assert (
        capsys.readouterr().out
        == "loss before: 4.293 nats per token\ntrained: 12,345\n"
    )
    assert claims.QUANTITIES[-1] == ("trained", "12,345")
    with pytest.raises(InputError, match="the value 3 GB has no label; name it"):
        USUAL.quantity("", 3, "GB")
