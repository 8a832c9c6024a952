"""Chapters on a pretended device: no operation meets tensors of two devices.

`make devices` runs every chapter, which takes minutes. This test runs one chapter that
trains and times models on the device.
"""

import subprocess
import sys

import pytest

HERE = "13"
MIXING = """
import torch
from minipeft.lab.chapter import start

chapter = start("99_mixing", steps=1, model=None)
print(torch.ones(3, device=chapter.device) + torch.ones(3))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chapters")
    mixing = folder / "99_mixing.py"
    mixing.write_text(MIXING)
    line = [sys.executable, "-W", "ignore", "-m", "tests.book.on_a_device"]
    line += [str(folder / "out"), HERE, str(mixing)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_chapter_stays_on_its_device(report):
    assert f"ran {HERE}_" in report.stdout, report.stdout + report.stderr


@pytest.mark.slow
def test_a_chapter_that_mixes_devices_is_found(report):
    assert report.returncode == 1
    assert "MixedDevicesError: aten.add.Tensor" in report.stdout
