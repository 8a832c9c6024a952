"""A chapter as a page and as a notebook."""

import json
from pathlib import Path

import nbformat
import pytest
from book import BookError, figures, notebook, shelf

from tests.book.test_repository import PARTS


def test_hide_fold_and_solution(small):
    small.chapter(
        """
        # %% tags=["hide"]
        print("from the hidden")

        # %% tags=["fold"]
        print("from the folded")

        # %% tags=["solution"]
        print("from the solution")
        """
    )
    small.build()
    page = small.page()
    assert 'print("from the hidden")' not in page
    assert "\nfrom the hidden\n" in page
    assert '??? code "Code"\n\n    ```python\n    print("from the folded")' in page
    assert "\nfrom the folded\n" in page
    assert (
        '??? code "Solution"\n\n    ```python\n    print("from the solution")' in page
    )
    assert "\n    from the solution\n" in page


def test_solutions_run_after_the_chapter_and_show_their_output(small):
    small.chapter(
        """
        # %% [markdown]
        # ??? question "Solution"
        #     ```python
        #     x = x + 1
        #     print("x is", x)
        #     ```
        #     Done.

        # %%
        x = 1

        # %% [markdown]
        # At the end x is {=x=}.
        """
    )
    small.build()
    page = small.page()
    assert (
        "    ``` { .text .output .no-copy }\n    x is 2\n    ```\n\n    Done." in page
    )
    assert "At the end x is 1." in page


def test_a_wrong_solution_fails(small):
    small.chapter(
        """
        # %% [markdown]
        # ??? question "Solution"
        #     ```python
        #     assert 1 == 2
        #     ```
        """
    )
    with pytest.raises(BookError, match=r"solution 1 \(line 7\), failed"):
        small.build()


def test_figures_have_two_copies_a_number_and_their_text(small, lab):
    small.chapter(f"{lab}\n# %%\nshow('loss', 'Loss < 1 & low')\nprint('shown')\n")
    small.build()
    folder = small.layout.docs / "book" / "01_lora"
    assert "#24292f" in (folder / "loss.svg").read_text()
    dark = (folder / "loss-dark.svg").read_text()
    assert "#24292f" not in dark
    assert figures.DARK["#24292f"] in dark
    page = small.page()
    for name, mode in (("loss", "light"), ("loss-dark", "dark")):
        assert (
            f'<img src="01_lora/{name}.svg#only-{mode}" alt="Loss &lt; 1 &amp; low" '
            'width="96" height="48" loading="lazy">'
        ) in page
    assert "<b>Figure 1.1</b> Loss &lt; 1 &amp; low</figcaption>" in page
    assert page.index("shown") < page.index("<figure>")


def test_a_caption_states_the_point_and_the_alternative_text_describes(small, lab):
    small.chapter(f"{lab}\n# %%\nshow('loss', 'Two lines.', 'LoRA gains 76 %.')\n")
    small.build()
    page = small.page()
    assert 'alt="Two lines."' in page
    assert "<figcaption><b>Figure 1.1</b> LoRA gains 76 %.</figcaption>" in page


@pytest.mark.parametrize("alt", ["", "   "])
def test_a_figure_without_alternative_text_fails(small, lab, alt):
    small.chapter(f"{lab}\n# %%\nshow('loss', {alt!r})\n")
    with pytest.raises(
        BookError, match=r"(?s)cell 3 .*'loss.svg' has no alternative text"
    ):
        small.build()


def test_output_cannot_leave_its_fence(small):
    small.chapter("# %%\nprint('```\\n# not a heading\\n```')\n")
    small.build()
    assert "```` { .text .output .no-copy }\n```\n# not" in small.page()


def test_the_colours_are_those_of_the_lab():
    plots = pytest.importorskip("minipeft.lab.plots", reason="needs matplotlib")
    assert {plots.INK, plots.FAINT} <= set(figures.DARK)


def test_downloads(small, lab):
    path = small.chapter(
        f"""
{lab}
# %% [markdown]
# See [`merge`][minipeft.reference.lora.merge], [next](02_nf4.md#why),
# [N](../notation.md), [@hu2021] and {{=1 + 1=}}.
#
# @source minipeft.reference.lora.merge
#
# !!! warning "Mind"
#     The scale.
#
# ??? question "Solution"
#     None.
#
# @references

# %%
show("loss", "It falls.")
print("done")
"""
    )
    small.build()
    folder = small.layout.docs / "book"
    assert (folder / "01_lora.py").read_bytes() == path.read_bytes()
    book = json.loads((folder / "01_lora.ipynb").read_text())
    nbformat.validate(book)
    prose = "".join(book["cells"][-2]["source"])
    site = "https://minipeft.github.io/minipeft"
    assert f"({site}/api/reference/lora.html#minipeft.reference.lora.merge)" in prose
    assert f"[next]({site}/book/02_nf4.html#why),\n[N]({site}/notation.html)" in prose
    assert "([Hu et al., 2021](https://example.org/lora)) and 2." in prose
    assert "```python\ndef merge(W, s):" in prose
    assert "> **Mind**\n>\n> The scale." in prose
    assert "<details><summary>Solution</summary>\n\nNone.\n\n</details>" in prose
    assert "Edward J. Hu, Yelong Shen, Phillip Wallis (2021)" in prose
    assert "{" not in prose
    stream, figure = book["cells"][-1]["outputs"]
    assert stream["text"] == ["done\n"]
    assert figure["data"]["text/plain"] == ["It falls."]


@pytest.mark.parametrize("end", [")", ",\n)"])
def test_a_notebook_does_not_read_the_command_line_of_jupyter(end):
    cell = f'import os\n\nchapter = start("01_lora", steps=50{end}'
    ours = notebook.in_jupyter(cell, "01_lora")
    assert ours == 'import os\n\nchapter = start("01_lora", steps=50, arguments=[])'


def test_a_notebook_has_no_file_but_lies_beside_its_chapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = 'COMMITTED = Path(__file__).with_name("results")'
    names = {"Path": Path}
    exec(notebook.in_jupyter(cell, "01_lora"), names)
    assert names["COMMITTED"] == tmp_path / "results"


def test_generated_files_of_a_removed_chapter_go(small, lab):
    path = small.chapter(f"{lab}\n# %%\nshow('loss', 'It falls.')\n")
    small.build()
    path.unlink()
    small.build()
    assert not [p for p in (small.layout.docs / "book").rglob("*") if p.is_file()]


def test_chapters_are_grouped_in_file_order(small):
    for name in ("00_why", "01_lora", "02_nf4", "03_dora", "04_surprise"):
        small.chapter("# %%\nx = 1\n", name)
    nav = small.build().nav["book/"]
    names = [
        [n.split("/")[1] for c in v for n in c.values()]
        for p in nav
        for v in p.values()
    ]
    assert [part for entry in nav for part in entry] == [
        "Foundations",
        "Fewer bits",
        "Adapting weights",
        list(dict(shelf.load(PARTS)))[-1],
    ]
    assert names == [
        ["00_why.md", "01_lora.md"],
        ["02_nf4.md"],
        ["03_dora.md"],
        ["04_surprise.md"],
    ]


def test_reference_pages_follow_the_files(small):
    small.chapter("# %% [markdown]\n# @source minipeft.reference.lora.merge\n")
    small.build()
    api = small.layout.docs / "api"
    page = (api / "reference" / "lora.md").read_text()
    assert "::: minipeft.reference.lora" in page
    # Constants and private names have no anchor; the link goes to their module's.
    assert page.startswith("# lora { #minipeft.reference.lora }\n")
    assert "The same row in [torch](../torch/lora.md), [CUDA](" in page
    assert "Shown in [A title](../../book/01_lora.md)." in page
    kernels = (api / "kernels" / "lora.md").read_text()
    assert "## `merge` { #minipeft.kernels.lora.merge }" in kernels
    small.write("minipeft/reference/vera.py", '"""New."""')
    assert {
        "NumPy": [{"lora": "api/reference/lora.md"}, {"vera": "api/reference/vera.md"}]
    } in (small.build().nav["api/"])


def test_terms_are_explained_where_they_first_stand():
    abbr = '<abbr title="Width.">rank</abbr>'
    page = f"<h1>{abbr}</h1><p>{abbr} and {abbr}, <a>{abbr}</a></p>"
    assert shelf.first_only(page) == f"<h1>rank</h1><p>{abbr} and rank, <a>rank</a></p>"


def test_a_data_file_with_a_wrong_entry_fails(small):
    small.write("site/glossary.yml", "rank:\n  shrt: oops\n")
    with pytest.raises(BookError, match=r"glossary.yml, 'rank': .*shrt"):
        small.build()
    twice = "rank:\n  short: one\n  text: ''\n"
    small.write("site/glossary.yml", twice + twice)
    with pytest.raises(BookError, match=r"glossary.yml: 'rank' stands twice"):
        small.build()
