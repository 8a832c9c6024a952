"""A damaged checkpoint is refused; an interrupted save leaves a whole file."""

import copy
import json
import math
import os
import random
import signal
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from minipeft.errors import InputError
from minipeft.lab import checkpoint as checkpoints
from minipeft.lab import files
from minipeft.lab.checkpoint import (
    Progress,
    load_checkpoint,
    save_checkpoint,
)
from tests.lab.test_checkpoint import small, step, tensors_of


def damaged_files(good, count=5000):
    """Yield the kind and the bytes of files that are cut or have one flipped bit."""
    draw = random.Random(0)
    (header,) = struct.unpack("<Q", good[:8])
    kinds = ("cut", "a bit of the header", "a bit of the data")
    for kind in draw.choices(kinds, k=count):
        if kind == "cut":
            yield kind, good[: draw.randrange(len(good))]
            continue
        last = 8 + header
        low, high = (0, last) if "header" in kind else (last, len(good))
        data = bytearray(good)
        data[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
        yield kind, bytes(data)


def test_every_damaged_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizer = small()
    step(model, optimizer)
    save_checkpoint(path, model, optimizer, Progress(3))
    load_checkpoint(path, model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _, data in damaged_files(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            load_checkpoint(path, model, optimizer)
        assert str(caught.value).count("\n") == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert str(optimizer.state_dict()) == str(before[1])


def forged(path, header, tensors):
    """Write a file with a correct checksum and wrong content."""
    text = json.dumps(header)
    metadata = {"minipeft": text, "sha256": checkpoints._checksum(text, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


FORGERIES = {
    "no identity": lambda h, t: (without(h, "identity"), t),
    "no progress": lambda h, t: (without(h, "progress"), t),
    "no optimizer": lambda h, t: (without(h, "optimizer"), t),
    "progress has a field more": lambda h, t: (
        {**h, "progress": {**h["progress"], "epoch": 1}},
        t,
    ),
    "progress is a list": lambda h, t: ({**h, "progress": []}, t),
    "losses are words": lambda h, t: (
        {**h, "progress": {**h["progress"], "losses": ["x"]}},
        t,
    ),
    "step is below zero": lambda h, t: (
        {**h, "progress": {**h["progress"], "step": -1}},
        t,
    ),
    **{
        f"a validation at step {at}": lambda h, t, at=at: (
            {**h, "progress": {**h["progress"], "validation": [[at, 1.5]]}},
            t,
        )
        for at in (math.inf, math.nan, 1.5, -1, True, "3", None)
    },
    **{
        f"a step of a state is {at!r:.9}": lambda h, t, at=at: (
            {**h, "numbers": {name: at for name in h["numbers"]}},
            t,
        )
        for at in (math.inf, math.nan, 1.5, -1, True, "3", None, 10**400)
    },
    "seconds are a word": lambda h, t: (
        {**h, "progress": {**h["progress"], "seconds": "("}},
        t,
    ),
    "seconds are beyond every float": lambda h, t: (
        {**h, "progress": {**h["progress"], "seconds": 10**400}},
        t,
    ),
    "a setting is a number": lambda h, t: (
        {**h, "progress": {**h["progress"], "settings": {"batch": 1}}},
        t,
    ),
    "identity is a list": lambda h, t: ({**h, "identity": []}, t),
    "no generator": lambda h, t: (h, without(t, "random/torch")),
    "a generator of another kind": lambda h, t: (
        h,
        {**t, "random/torch": torch.zeros(3, dtype=torch.uint8)},
    ),
    "a number of no parameter": lambda h, t: ({**h, "numbers": {"x/step": 1}}, t),
    "a state of no parameter": lambda h, t: ({**h, "numbers": {"9/step": 1}}, t),
    "a parameter missing": lambda h, t: (
        h,
        without(t, "parameter/0.adapters.default.A"),
    ),
    "a parameter more": lambda h, t: (h, {**t, "parameter/other": torch.zeros(2)}),
    "a parameter of another shape": lambda h, t: (
        h,
        {**t, "parameter/0.adapters.default.A": torch.zeros(1, 4)},
    ),
    "a parameter of another dtype": lambda h, t: (
        h,
        {**t, "parameter/0.adapters.default.A": torch.zeros(2, 4).half()},
    ),
    "a moment of another shape": lambda h, t: (
        h,
        {**t, "optimizer/0/m": torch.zeros(1)},
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_every_malformed_field_is_one_sentence(tmp_path, name):
    path = tmp_path / "run.safetensors"
    model, optimizer = small()
    step(model, optimizer)
    save_checkpoint(path, model, optimizer, Progress(3))
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["minipeft"])
    forged(path, *FORGERIES[name](header, tensors_of(path)))
    model, optimizer = small()
    step(model, optimizer, -1.0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    drawn = torch.get_rng_state()
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, model, optimizer)
    assert str(caught.value).count("\n") == 0
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][key])
    assert str(optimizer.state_dict()) == str(before[1])
    assert torch.equal(torch.get_rng_state(), drawn)


CALLS = ("mkdir", "mkstemp", "_write", "fchmod", "fsync", "replace", "_sync_folder")


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [False, True])
def test_a_process_stopped_at_any_call_leaves_the_old_or_the_new_file(
    tmp_path, call, after, number
):
    path = tmp_path / "run.safetensors"
    files.write_atomic(path, b"old" * 1000)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            _stop_at(call, after, number)
            files.write_atomic(path, b"new" * 1000)
        except KeyboardInterrupt:
            os._exit(-signal.SIGINT % 256)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (-number, -number % 256), "the call was never reached"
    assert path.read_bytes() in (b"old" * 1000, b"new" * 1000)
    replaced = CALLS.index(call) > 5 or (call == "replace" and after)
    assert (path.read_bytes()[:3] == b"new") == replaced
    if number == signal.SIGINT and (call, after) != ("mkstemp", True):
        assert list(tmp_path.iterdir()) == [path]  # no later call would delete it


def _stop_at(call, after, number):
    holder = {"mkstemp": files.tempfile, "mkdir": files.Path}.get(call)
    holder = holder or (files if call.startswith("_") else files.os)
    original = getattr(holder, call)

    def stopped(*args, **kwargs):
        found = original(*args, **kwargs) if after else None
        signal.raise_signal(number)
        return found

    setattr(holder, call, stopped)
