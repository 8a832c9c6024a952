"""A chapter is read from a script with percent cells."""

import pytest
from book import BookError
from book.chapter import read, read_all


def test_cells_tags_and_lines(small):
    path = small.chapter(
        """
        # limit: 120 s
        # %% [markdown]
        # # NF4: sixteen numbers
        #
        # Prose.

        # %% tags=["hide", "fold"]

        x = 1
        """
    )
    chapter = read(path)
    assert chapter.title == "NF4: sixteen numbers"
    assert (chapter.number, chapter.limit) == (1, 120)
    assert chapter.prose[0].source == "# NF4: sixteen numbers\n\nProse."
    (code,) = chapter.code
    assert code.source == "x = 1"
    assert code.tags == ("hide", "fold")
    assert path.read_text().splitlines()[code.line - 1] == "x = 1"


def test_a_cell_stands_where_its_line_says(root):
    for path in sorted((root / "chapters").glob("[0-9][0-9]_*.py")):
        lines = path.read_text("utf-8").splitlines()
        for cell in read(path).cells:
            first, written = cell.source.split("\n")[0], lines[cell.line - 1]
            assert written.removeprefix("# " * (cell.kind == "markdown")) == first


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# limit: 600 s\n# %%\nx = 1", "asks for 600 s; a chapter may ask for 180 s"),
        ('# %% tags=["hidden"]\nx = 1', "unknown tag 'hidden'"),
        ("# %% [markdown]\nx = 1", "code in a prose cell: 'x = 1'"),
    ],
)
def test_what_a_chapter_may_not_say(small, text, complaint):
    path = small.write("chapters/01_lora.py", f"{text}\n")
    with pytest.raises(BookError, match=complaint):
        _ = read(path).limit


def test_no_title(small):
    path = small.write("chapters/01_lora.py", "# %% [markdown]\n# Prose.\n")
    with pytest.raises(BookError, match=r"01_lora\.py: no prose cell has a title"):
        _ = read(path).title


def test_solutions_are_the_python_fences_of_folded_blocks(small):
    path = small.chapter(
        """
        # %% [markdown]
        # ??? question "Solution"
        #     First.
        #
        #     ```python
        #     a = 1
        #     b = 2
        #     ```
        #
        #     ```text
        #     not code
        #     ```
        #
        # ```python
        # outside = True
        # ```
        """
    )
    (solution,) = read(path).solutions
    assert solution.source == "a = 1\nb = 2"
    assert "a = 1" in path.read_text().splitlines()[solution.line - 1]


def test_only_numbered_scripts_are_chapters(small):
    small.chapter("# %%\nx = 1")
    small.write("chapters/helper.py", "x = 1")
    assert [c.name for c in read_all(small.layout.chapters)] == ["01_lora"]
