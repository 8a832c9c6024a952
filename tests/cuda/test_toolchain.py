"""Every file is built once, and a build that was cut short leaves no file."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cuda import toolchain


@pytest.fixture(autouse=True)
def build(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "BUILD", tmp_path / "cuda")


def test_what_one_worker_makes_another_waits_for():
    made = []

    def make(path):
        made.append(path)
        time.sleep(0.05)
        path.write_text("whole")

    with ThreadPoolExecutor(4) as workers:
        jobs = [workers.submit(toolchain.cached, "x", ["a"], make) for _ in range(4)]
    assert len(made) == 1
    assert {job.result().read_text() for job in jobs} == {"whole"}


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_was_cut_short_is_made_again(is_folder):
    def cut_short(path):
        if is_folder:
            path.mkdir()
        else:
            path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toolchain.cached("x", ["a"], cut_short)
    path = toolchain.cached("x", ["a"], lambda path: path.write_text("whole"))
    assert path.read_text() == "whole"


def test_other_parts_make_another_file():
    paths = [
        toolchain.cached("x", [part], lambda path: path.write_text("")) for part in "ab"
    ]
    assert paths[0] != paths[1]
