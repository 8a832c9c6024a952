"""Streams and waits of a pretended device; on_streams.py has the recipes."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.properties.on_streams"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_whichever_stream_is_late_the_bits_are_those_of_the_plain_optimizer(report):
    assert len(report["paging"]) == 8 * 2 * 2
    assert [name for name, same in report["paging"].items() if not same] == []


def test_a_page_that_was_only_read_is_not_overwritten_before_it_was(report):
    assert [slow for slow, same in report["read only"].items() if not same] == []


def test_a_parameter_that_moves_to_another_device_keeps_its_state(report):
    assert [slow for slow, same in report["moved"].items() if not same] == []


def test_as_many_pages_are_on_their_way_as_the_budget_allows(report):
    assert report["ahead"] == [[1, 1, 1, 1], [1, 2, 2, 2], [1, 4, 4, 4]]


def test_no_forward_or_backward_pass_makes_the_host_wait(report):
    assert {"dora", "lora", "nested"} < report["waits"].keys()
    assert {name: at for name, at in report["waits"].items() if at} == {}


def test_a_step_looks_at_the_device_once_for_all_its_tensors(report):
    for places in report["steps"].values():
        assert len(places) == 1, places
        assert "adamw.AdamW.check" in places[0]
