"""Options, hypothesis profiles, and the rule for skips in continuous integration."""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

from tests import typechecker

IN_CI = os.environ.get("CI") == "true"

# As in the Makefile: workers with several threads each slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
typechecker.install()  # before minipeft is imported

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # the machines are shared
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "dev"))


def pytest_addoption(parser):
    parser.addoption(
        "--impl",
        action="append",
        default=[],
        metavar="NAME",
        help="also run the golden vectors on this implementation "
        "(reference, torch, cupy, bitsandbytes, peft, torchao, or package.module)",
    )


def pytest_collection_modifyitems(items):
    """Put the files with slow tests first: no worker runs a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Exclude imported objects from garbage collection, which some tests call often."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In continuous integration, a skip is a failure unless its reason is a GPU."""
    report = yield
    by_gpu = any(map(item.get_closest_marker, ("gpu", "no_gpu")))
    excused = by_gpu or hasattr(report, "wasxfail")
    if IN_CI and report.skipped and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped in continuous integration: {call.excinfo.value}"
    return report
