"""Directives, quoted numbers, citations."""

import pytest
from book import BookError, source


def test_one_source_is_shown_with_a_link_to_its_description(small):
    small.chapter("# %% [markdown]\n# @source minipeft.reference.lora.merge\n")
    small.build()
    assert (
        "[`minipeft.reference.lora.merge`][minipeft.reference.lora.merge]"
        "{ .source }\n\n"
        "```python\ndef merge(W, s):\n"
        '    """Return the merged weight."""\n    return W + s\n```'
    ) in small.page()


def test_columns_become_tabs(small):
    small.chapter(
        """
        # %% [markdown]
        # @source minipeft.reference.lora.merge
        # @source minipeft.torch.lora.LoRALinear.forward
        # @source minipeft.kernels.lora:merge
        """
    )
    small.build()
    page = small.page()
    for tab in ('! "NumPy"', ' "torch"', ' "CUDA"'):
        assert f"==={tab}\n\n    [`minipeft." in page
    assert "    @functools.cache\n    def forward(self, x):" in page
    kernel = page.split("```cuda\n")[1].split("```")[0]
    assert kernel.lstrip().startswith(
        "// Adds s to each weight.\n    template <class T>"
    )
    assert kernel.rstrip().endswith('= "}";\n    }')
    assert "helper" not in kernel


def test_two_sources_of_one_column_need_no_tabs(small):
    small.chapter(
        """
        # %% [markdown]
        # @source minipeft.reference.lora.LIMIT
        # @source minipeft.reference.lora.merge
        """
    )
    small.build()
    assert "===" not in small.page()
    assert "[`minipeft.reference.lora.LIMIT`][minipeft.reference.lora]" in small.page()


def test_a_source_in_a_box_stays_in_it(small):
    small.chapter(
        """
        # %% [markdown]
        # ??? note "Around it"
        #     @source minipeft.reference.lora.merge
        """
    )
    small.build()
    assert "\n    [`minipeft.reference.lora.merge`][" in small.page()
    assert "\n    ```python\n    def merge(W, s):\n" in small.page()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("minipeft.reference.lora.merged", "lora.py defines no 'merged'"),
        ("minipeft.reference.vera.merge", "no module of that name"),
        ("numpy.linalg.svd", "no module of that name"),
        ("minipeft.kernels.lora:nothing", "lora.cu has no function 'nothing'"),
        ("minipeft.kernels.lora:ghost", "lora.cu has no function 'ghost'"),
        ("minipeft.kernels.vera:merge", "there is no vera.cu"),
    ],
)
def test_an_unknown_source_fails(small, name, complaint):
    small.chapter(f"# %% [markdown]\n# @source {name}\n")
    with pytest.raises(BookError, match=rf"chapters/01_lora.py: @source {name}: ") as e:
        small.build()
    assert complaint in str(e.value)


def test_a_function_of_a_cuda_header(small):
    small.write(
        "minipeft/kernels/dot.cuh",
        "// Products.\n\n// Doubles.\n__device__ float twice(float x) {\n"
        "  return 2 * x;\n}\n",
    )
    small.chapter("# %% [markdown]\n# @source minipeft.kernels.dot:twice\n")
    small.build()
    assert "```cuda\n// Doubles.\n__device__ float twice(float x) {" in small.page()
    anchor = "minipeft.kernels.dot.twice"
    assert f"][{anchor}]" in small.page()
    reference = (small.layout.docs / "api/kernels/dot.md").read_text()
    assert f"{{ #{anchor} }}" in reference


def test_kernels_of_the_real_files(root):
    for path in (root / "minipeft" / "kernels").glob("*.cu"):
        found = source.kernels(path.read_text())
        assert len(found) >= path.read_text().count("\n__global__ ")
        for name, text in found.items():
            assert name in text
            assert text.endswith("}")


def test_citations(small):
    small.chapter(
        """
        # %% [markdown]
        # A claim [@hu2021], a page [@hu2021, section 4.1], and `[@nobody]` in code.
        #
        # ```text
        # [@nobody] {=nothing=} @nothing
        # ```
        #
        # ## References
        #
        # @references
        """
    )
    book = small.build()
    page = small.page()
    link = "[Hu et al., 2021](../bibliography.md#hu2021)"
    assert f"A claim ({link}), a page ({link}, section 4.1), and `[@nobody]`" in page
    assert "[@nobody] {=nothing=} @nothing" in page
    assert "Edward J. Hu, Yelong Shen, Phillip Wallis (2021). [LoRA](https" in page
    assert book.cited_in == {"hu2021": ["[A title](book/01_lora.md)"]}


@pytest.mark.parametrize(
    ("prose", "complaint"),
    [
        ("[@he2021]", r"\[@he2021\] is not in site/bibliography.yml"),
        ("@sources all", "unknown directive '@sources all'"),
    ],
)
def test_unknown_citation_and_directive_fail(small, prose, complaint):
    small.chapter(f"# %% [markdown]\n# {prose}\n")
    with pytest.raises(BookError, match=f"chapters/01_lora.py: {complaint}"):
        small.build()


def test_formulas_below_each_other_are_two(small):
    small.chapter("# %% [markdown]\n# $$ a = b $$\n# $$ c = d $$\n")
    small.build()
    assert "$$ a = b $$\n\n$$ c = d $$" in small.page()


def test_quoted_numbers_come_from_the_end_of_the_chapter(small):
    small.chapter(
        """
        # %% [markdown]
        # It is {=loss:.2f=}, or {=names['a']!r=}, $x = {=loss=}$, `{=max(1, 2)=}`.

        # %%
        loss, names = 1.0, {"a": "b"}

        # %%
        loss = 0.127
        """
    )
    small.build()
    assert "It is 0.13, or 'b', $x = 0.127$, `2`." in small.page()


def test_an_unknown_quoted_name_fails(small):
    small.chapter("# %% [markdown]\n# It is {=los:.2f=}.\n\n# %%\nloss = 1.0\n")
    with pytest.raises(
        BookError, match=r"the quoted value \{=los:\.2f=\}, failed"
    ) as e:
        small.build()
    assert "name 'los' is not defined" in str(e.value)
