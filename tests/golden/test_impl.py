"""`pytest tests --impl NAME`: one test for each case; without it, our own columns."""

import pytest

from minipeft.golden.errors import Unavailable
from minipeft.golden.report import failure
from minipeft.golden.runner import implementation, judge
from minipeft.golden.vectors import load_all

FILES = {file.name: file for file in load_all()}
# In the torch column a page is an object, so no number can name a missing page.
NOT_OFFERED = {("torch", "paged_trace.json", number) for number in (8, 9)}


def pytest_generate_tests(metafunc):
    names = metafunc.config.getoption("--impl") or ["reference", "torch"]
    cases = [(f.name, c.tcId) for f in FILES.values() for c in f.cases]
    metafunc.parametrize("name", names, scope="module")
    metafunc.parametrize(("file", "number"), cases, ids=lambda part: str(part))


@pytest.fixture(scope="module")
def subject(name):
    try:
        found = implementation(name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield found
    found.close()


def test_implementation(name, subject, file, number):
    case = FILES[file].cases[number - 1]
    outcome = judge(subject, FILES[file], case)
    if (name, file, number) in NOT_OFFERED:
        assert outcome.status == "skip"
        return
    if outcome.status == "skip":
        pytest.skip(outcome.detail)
    assert outcome.status == "pass", "\n" + failure(outcome)
