"""One label, one value: every build compares what chapters print below a label."""

import pytest
from book import BookError, quantities
from book.run import Result

QUANTITY = "# %%\nfrom minipeft.lab.claims import Claims\n"
QUANTITY += "Claims(usual=True).quantity('LoRA 7B: memory in all', {}, 'GB', 1)\n"


def test_a_quantity_is_printed_and_collected(book_of_quantities):
    book = book_of_quantities(25.44, 25.44)
    assert book.results["01_one"].quantities == [["LoRA 7B: memory in all", "25.4 GB"]]
    assert book.results["01_one"].cells[0]["stdout"] == (
        "LoRA 7B: memory in all: 25.4 GB\n"
    )


def test_one_label_with_two_values_fails_the_build(book_of_quantities):
    with pytest.raises(BookError) as caught:
        book_of_quantities(25.4, 18.9)
    said = str(caught.value)
    assert said.startswith("'LoRA 7B: memory in all' is 25.4 GB in 01_one")
    assert "and 18.9 GB in 02_two: compute one value" in said


def test_a_bare_print_below_a_known_label_is_compared_too(small, book_of_quantities):
    small.chapter("# %%\nprint('LoRA 7B: memory in all: 18.9 GB')\n", "03_three")
    with pytest.raises(BookError, match=r"25\.4 GB in 01_one and 18\.9 GB in 03_three"):
        book_of_quantities(25.44, 25.44)


def test_one_chapter_may_not_contradict_itself_either(tmp_path):
    pairs = [["the loss before", "4.325"], ["the loss before", "4.293"]]
    result = Result(tmp_path, 1.0, {"quantities": pairs, "cells": [], "solutions": []})
    with pytest.raises(BookError, match=r"is 4\.325 in 01_one and 4\.293 in 01_one"):
        quantities.check({"01_one": result})


@pytest.fixture
def book_of_quantities(small, root):
    """Build two chapters, each of which prints its value below the same label."""

    def build(first, second):
        small.write(
            "minipeft/lab/claims.py", (root / "minipeft/lab/claims.py").read_text()
        )
        small.write("minipeft/lab/__init__.py", "")
        small.write("minipeft/errors.py", (root / "minipeft/errors.py").read_text())
        small.chapter(QUANTITY.format(first), "01_one")
        small.chapter(QUANTITY.format(second), "02_two")
        return small.build()

    return build
