"""One label, one value: every build compares the values that chapters print."""

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


TWICE = "# %%\nfor loss in ({}, {}):\n    print('loss of a run:', loss)\n"


def test_a_line_that_nobody_registered_is_compared_between_chapters(small):
    small.chapter(TWICE.format(4.1, 4.2), "01_one")
    small.build()  # one chapter may print several values, as in a loop
    small.chapter(TWICE.format(4.1, 4.3), "02_two")
    with pytest.raises(BookError) as caught:
        small.build()
    said = str(caught.value)
    assert said.startswith("'loss of a run' is 4.1 in 01_one and 4.3 in 02_two")


def test_sentences_of_a_claim_are_no_quantities(small):
    said = "# %%\nprint('claim: {0} bits are enough\\n  control: {0} bits')\n"
    small.chapter(said.format(8), "01_one")
    small.chapter(said.format(4), "02_two")
    small.build()


README = """<picture>
  <img alt="It ends at 3.76." src="x.svg">
</picture>

*A figure. LoRA has {} % of the gain.*

Version 9.99
"""


@pytest.mark.parametrize(("share", "agrees"), [("89", True), ("88", False)])
def test_the_readme_tells_what_its_figure_shows(tmp_path, share, agrees):
    pairs = [["loss", "3.761 nats per token"], ["of the gain", "89 %"]]
    result = Result(tmp_path, 1.0, {"quantities": pairs, "cells": [], "solutions": []})
    told = README.format(share)
    if agrees:
        quantities.check_readme(told, "01_lora", result)
    else:
        with pytest.raises(BookError, match=r"README.md says 88 of its figure"):
            quantities.check_readme(told, "01_lora", result)


def test_the_real_readme_has_a_figure_to_compare(root):
    result = Result(root, 1.0, {"quantities": [], "cells": [], "solutions": []})
    with pytest.raises(BookError, match=r"README.md says 3\.70"):
        quantities.check_readme((root / "README.md").read_text(), "01_lora", result)


def test_one_chapter_may_not_contradict_itself_either(tmp_path):
    pairs = [["the loss before", "4.325"], ["the loss before", "4.293"]]
    result = Result(tmp_path, 1.0, {"quantities": pairs, "cells": [], "solutions": []})
    with pytest.raises(BookError, match=r"is 4\.325 in 01_one and 4\.293 in 01_one"):
        quantities.check({"01_one": result})


@pytest.fixture
def book_of_quantities(small, root):
    """Build two chapters; each prints its value below the same label."""

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
