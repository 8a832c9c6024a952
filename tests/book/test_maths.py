"""Formulas, and the font for them."""

import io

import pytest
from book import BookError, font, maths
from fontTools.ttLib import TTFont


def page(tmp_path, *formulas):
    spans = "".join(f'<span class="arithmatex">\\({f}\\)</span>' for f in formulas)
    block = '<div class="arithmatex">\\[\nW \\in \\mathbb{R}\n\\]</div>'
    (tmp_path / "a").mkdir(exist_ok=True)
    path = tmp_path / "a" / "lora.html"
    path.write_text(f"<p>{spans}</p>{block}")
    return path


def test_formulas_become_mathml(tmp_path):
    path = page(tmp_path, "s &lt; \\sqrt{r}", "\\lVert w \\rVert")
    characters = maths.typeset(tmp_path)
    text = path.read_text()
    assert "arithmatex" not in text
    assert "<msqrt><mi>r</mi></msqrt>" in text
    assert 'display="block"' in text
    assert 'class="formula" tabindex="0"' in text
    assert "<mi>ℝ</mi>" in text
    assert {"ℝ", "∈", "<", "𝑟"} <= characters


@pytest.mark.parametrize("tex", ["\\lVert w \\rVert", "\\left| w \\right|"])
def test_fences_hug_what_they_enclose(tex):
    (answer,) = maths.render([(tex, False)]).values()
    assert maths.element(answer["mathml"]).count('lspace="0" rspace="0">') == 2


def test_a_relation_keeps_its_distance():
    (answer,) = maths.render([("p(a \\mid b)", False)]).values()
    assert "lspace" not in maths.element(answer["mathml"])


def test_a_long_formula_in_a_line_of_text_can_break(tmp_path):
    path = page(tmp_path, "y = xW^\\top + s(xA^\\top)B^\\top + b", "y = x")
    maths.typeset(tmp_path)
    long, short = path.read_text().split("</span>")[:2]
    assert long.count("<math") == 4
    assert long.count("<annotation") == 1
    assert long.count("<mo>=</mo></mrow>") == 1
    assert "</math><math" in long
    assert short.count("<math") == 1


def test_a_bad_formula_fails_and_names_the_page(tmp_path):
    page(tmp_path, "x", "\\frac{a")
    with pytest.raises(BookError, match=r"a/lora\.html: KaTeX parse error"):
        maths.typeset(tmp_path)


@pytest.mark.parametrize(
    ("char", "alphabet", "expected"),
    [
        ("R", "DOUBLE-STRUCK", "ℝ"),
        ("A", "DOUBLE-STRUCK", "𝔸"),
        ("L", "SCRIPT", "ℒ"),
        ("h", "ITALIC", "ℎ"),
        ("x", "BOLD", "𝐱"),
        ("α", "ITALIC", "𝛼"),
        ("7", "BOLD", "𝟕"),
        ("+", "BOLD", "+"),
    ],
)
def test_letters_of_mathematical_alphabets(char, alphabet, expected):
    assert maths.letter(char, alphabet) == expected


def test_the_font_is_small_even_and_licensed(tmp_path):
    characters = maths.typeset(tmp_path) if page(tmp_path, "\\sqrt{(r)}") else set()
    file = font.publish(characters, tmp_path, tmp_path)
    assert file.stat().st_size < 150_000
    cut = TTFont(io.BytesIO(file.read_bytes()))
    for char, most in (("√", 1.01), ("(", 1.21)):
        first, larger = font.forms(cut, char)
        width = cut["hmtx"][first.VariantGlyph][0]
        assert max(cut["hmtx"][name][0] for name in larger) <= most * width
    assert "Open Font License" in str(cut["name"].getName(13, 3, 1))
    assert str(cut["name"].getName(1, 3, 1)) == "Book Math"


def test_the_font_is_cut_once(tmp_path, monkeypatch):
    font.publish({"α"}, tmp_path, tmp_path)
    monkeypatch.setattr(font, "subset", lambda *_: pytest.fail("cut again"))
    font.publish({"α"}, tmp_path, tmp_path)


def test_a_character_that_the_font_lacks_fails(tmp_path):
    with pytest.raises(BookError, match="STIX Two Math lacks"):
        font.publish({"🐘"}, tmp_path, tmp_path)
