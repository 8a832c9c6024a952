"""A command on files that is stopped: one sentence, the usual code, nothing left."""

import os
import signal
from pathlib import Path

import pytest

from minipeft import cli
from minipeft.interop import merging, tensors
from minipeft.interop.stopping import SIGNALS
from tests.interop.folders import (
    adapter_tensors,
    base_tensors,
    write_adapter,
    write_model,
)


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Hear Ctrl-C even where the tests run in the background of a shell."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, old in before.items():
        signal.signal(number, old)


def stopping(holder, name, number, monkeypatch):
    """Send a signal before each call of a function: one stops, none disturbs."""
    original = getattr(holder, name)

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, stopped)


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("command", "holder", "name"),
    [
        (["merge", "--out", "new"], merging, "_copy_others"),
        (["export", "--to", "peft", "--out", "new"], tensors.SafeTensors, "read"),
        (["audit", "--merged", "base"], tensors.SafeTensors, "pieces"),
        (["inspect", "adapter"], tensors.SafeTensors, "read"),
    ],
    ids=["merge", "export", "audit", "inspect"],
)
def test_a_command_that_is_stopped_leaves_nothing(
    command, holder, name, number, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    base = write_model(Path("base"), base_tensors(), shards=2)
    adapter = write_adapter(Path("adapter"), adapter_tensors())
    given = ["--base", str(base), "--adapter", str(adapter)]
    if command[0] == "inspect":
        given = given[:2]
    with monkeypatch.context() as patched:
        stopping(holder, name, number, patched)
        # rmtree, which cleans up, is reached with a second signal on its way.
        stopping(merging.shutil, "rmtree", number, patched)
        assert cli.main([*command, *given]) == 128 + number
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "minipeft: stopped; nothing was written"
    assert not any("Traceback" in line for line in said)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_what_was_written_before_is_named(tmp_path, monkeypatch, capsys):
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    report = tmp_path / "report.json"
    from minipeft.interop import inspect_command

    stopping(inspect_command, "report", signal.SIGTERM, monkeypatch)
    assert cli.main(["inspect", str(adapter), "--json", str(report)]) == 143
    assert capsys.readouterr().err.endswith(f"minipeft: stopped; look at {report}\n")


@pytest.mark.parametrize("buffering", [1, -1], ids=["line by line", "at the end"])
def test_a_reader_that_leaves_costs_neither_the_files_nor_the_code(
    tmp_path, monkeypatch, buffering
):
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    with open(writer, "w", buffering=buffering) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        given = ["inspect", str(adapter), "--fix", str(tmp_path / "fixed")]
        assert cli.main(given) == 0
        monkeypatch.undo()
    assert (tmp_path / "fixed" / "adapter_config.json").exists()


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    stopping(tensors.SafeTensors, "read", signal.SIGINT, monkeypatch)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.main(["inspect", str(adapter)]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
