"""`minipeft verify --device`: the torch drivers compute on that device only."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from minipeft import cli
from minipeft.errors import InputError
from minipeft.golden import command

torch = pytest.importorskip("torch")

# torch's meta device has tensors without values. A driver that computes there fails
# when a value is read; torch refuses a driver that mixes devices.
PROGRAM = """
import json
from minipeft.golden.implementations import functions
from minipeft.golden.vectors import load_all

said, column = {}, functions("torch")
for file in load_all([]):
    for case in file.cases:
        if case.operation not in said and case.result == "valid":
            try:
                column.run(case)
                said[case.operation] = ""
            except Exception as error:
                said[case.operation] = str(error)
print(json.dumps(said))
"""
VALUES_ASKED_FOR = (
    "Cannot copy out of meta tensor",
    "Tensor.item() cannot be called on meta tensors",
    "The register_meta function for torch.nonzero()",
    # Our own: they name what the driver has put there.
    "the adapter is on the meta device; load its values first",
    "W is on the device meta, and has no values to split",
    "W is a placeholder on the device meta",
)
# These are made on the CPU by definition; the page table only counts.
ON_THE_CPU = {
    "codebook_table",
    "codebook_dynamic_map",
    "vera_projections",
    "paged_trace",
}


@pytest.mark.parametrize("name", ["reference", "cupy"])
def test_what_has_one_device_is_told_so(name, capsys):
    assert cli.main(["verify", name, "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert f"that compute with it; leave it out for {name}." in said


def test_the_drivers_compute_on_the_device_of_that_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("MINIPEFT_DEVICE", "")
    options = Namespace(device="cuda:1", program=None, implementation="torch")
    command._place(options)
    assert os.environ["MINIPEFT_DEVICE"] == "cuda:1"
    options.device = "cuda:2"
    with pytest.raises(InputError, match="sees no cuda:2 here; it sees cuda:0 to"):
        command._place(options)


def test_nothing_of_a_driver_stays_on_the_cpu():
    text = subprocess.check_output(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "MINIPEFT_DEVICE": "meta"},
        text=True,
    )
    said = json.loads(text)
    wrong = {
        operation: sentence
        for operation, sentence in said.items()
        if operation not in ON_THE_CPU
        and not any(end in sentence for end in VALUES_ASKED_FOR)
    }
    assert len(said) > 30
    assert wrong == {}


@pytest.mark.no_gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_one_sentence_says_so():
    start = [sys.executable, "-m", "minipeft.cli"]
    done = subprocess.run(
        [*start, "verify", "torch", "--device", "cuda"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "minipeft: torch sees no CUDA device here; leave out --device.\n"
    )
