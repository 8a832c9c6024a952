"""The page of figures shows the counts of the tests."""

from tests.lab import figures


def test_the_page_is_the_one_that_the_tests_draw():
    drawn = figures.page()
    assert figures.PAGE.read_text() == drawn, "run: python -m tests.lab.figures"


def test_at_least_5000_damaged_files_are_refused():
    assert sum(figures.damages().values()) >= 5000
    assert len(figures.damages()) > 20
