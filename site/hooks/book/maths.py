"""Formulas, from TeX to MathML, in the pages that MkDocs has written.

KaTeX does it at build time, inside Python (mini-racer), so a page needs no script and a
formula with a mistake stops the build. It happens after the search index was written:
the index keeps the TeX, which a reader can type.
"""

import html
import importlib.util
import json
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

from py_mini_racer import MiniRacer

from . import BookError

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
VARIANT = re.compile(r'<(mi|mn|mo|mtext) mathvariant="([\w-]+)">([^<]*)</\1>')
FENCE = re.compile(r'<mo (fence="true"(?=>)|stretchy="false"(?=>[∥∣]))')
NAMES = {
    "double-struck": "DOUBLE-STRUCK",
    "script": "SCRIPT",
    "fraktur": "FRAKTUR",
    "bold": "BOLD",
    "italic": "ITALIC",
    "bold-italic": "BOLD ITALIC",
    "sans-serif": "SANS-SERIF",
    "monospace": "MONOSPACE",
}
RENDER = """
function render(formulas) {
  return formulas.map(([tex, display]) => {
    try {
      return {mathml: katex.renderToString(tex, {
        displayMode: display, output: "mathml", throwOnError: true, strict: "error"})};
    } catch (error) { return {error: String(error.message)}; }
  });
}
"""
MATHML = "http://www.w3.org/1998/Math/MathML"
RELATIONS = set("=≈≠≡≤≥<>≪≫∈∼≔←→↦+−⋅×,;")
LONG = 16  # characters
ElementTree.register_namespace("", MATHML)
Formula = tuple[str, bool]  # the TeX, and whether it is displayed


def typeset(site: Path) -> set[str]:
    """Typeset every page below `site`; return the characters that formulas use."""
    pages = {path: path.read_text("utf-8") for path in sorted(site.rglob("*.html"))}
    wanted: dict[Formula, Path] = {}
    for path, text in pages.items():
        for match in FORMULA.finditer(text):
            wanted.setdefault(_formula(match), path)
    done = render(list(wanted))
    problems = [
        f"{wanted[formula].relative_to(site)}: {answer['error']}"
        for formula, answer in done.items()
        if "error" in answer
    ]
    if problems:
        raise BookError("formulas that KaTeX refuses:\n" + "\n".join(problems))
    mathml = {
        (tex, display): element(answer["mathml"])
        if display
        else breakable(element(answer["mathml"]))
        for (tex, display), answer in done.items()
    }
    for path, text in pages.items():
        new = FORMULA.sub(lambda m: _place(m[1], mathml[_formula(m)]), text)
        if new != text:
            path.write_text(new, "utf-8")
    return set("".join(visible(element) for element in mathml.values()))


def render(formulas: list[Formula]) -> dict[Formula, dict[str, str]]:
    """Ask KaTeX for all formulas at once."""
    if not formulas:
        return {}
    with MiniRacer() as engine:  # without `with`, the process never ends
        engine.eval("var self = this, window = this;" + script() + RENDER)
        answers = engine.eval(f"JSON.stringify(render({json.dumps(formulas)}))")
    return dict(zip(formulas, json.loads(str(answers)), strict=True))


def script() -> str:
    """Return KaTeX's own script, from the installed wheel that carries it."""
    found = importlib.util.find_spec("pelican_katex")
    places = found.submodule_search_locations if found else None
    scripts = sorted(Path(places[0]).glob("katex.*.js")) if places else []
    if not scripts:
        raise BookError("KaTeX is missing: pip install --no-deps pelican-katex")
    return scripts[-1].read_text("utf-8")


def element(markup: str) -> str:
    """Keep the `<math>` element, and spell its alphabets as browsers need them."""
    math = markup[markup.index("<math") : markup.rindex("</math>") + len("</math>")]
    # A fence hugs what it encloses, also one that browsers take for a relation (∥).
    math = FENCE.sub(r'\g<0> lspace="0" rspace="0"', math)
    return VARIANT.sub(_spell, math)


def breakable(math: str) -> str:
    """Cut a long formula of a text line after its relations: browsers break none.

    The pieces stand side by side as `<math>` elements, between which a line may end.
    """
    if len(drawn(math)) < LONG:
        return math
    tree = ElementTree.fromstring(math)
    semantics = tree[0]
    pieces: list[list[ElementTree.Element]] = [[]]
    for child in semantics[0]:
        pieces[-1].append(child)
        if child.tag == f"{{{MATHML}}}mo" and (child.text or "") in RELATIONS:
            pieces.append([])
    for old in list(semantics[0]):
        semantics[0].remove(old)
    semantics[0].extend(pieces[0])
    more = [_row(piece) for piece in pieces[1:] if piece]
    return "".join(ElementTree.tostring(t, "unicode") for t in (tree, *more))


def _row(children: list[ElementTree.Element]) -> ElementTree.Element:
    row = ElementTree.Element(f"{{{MATHML}}}math")
    ElementTree.SubElement(row, f"{{{MATHML}}}mrow").extend(children)
    return row


def _spell(match: re.Match[str]) -> str:
    """`<mi mathvariant="double-struck">R</mi>` is drawn as R by browsers; ℝ as ℝ."""
    tag, variant, text = match.groups()
    if variant not in NAMES:
        return match[0]
    letters = "".join(letter(char, NAMES[variant]) for char in html.unescape(text))
    return f"<{tag}>{html.escape(letters)}</{tag}>"


def letter(char: str, alphabet: str) -> str:
    """Return a character of a mathematical alphabet, or itself where there is none."""
    if (char, alphabet) == ("h", "ITALIC"):
        return "ℎ"  # Unicode calls it the Planck constant
    name = unicodedata.name(char, "").replace("LATIN ", "").replace("GREEK ", "")
    name = name.replace("LETTER ", "").replace("SMALL LETTER", "SMALL")
    for prefix in ("MATHEMATICAL ", "", "BLACK-LETTER "):
        stem = name if prefix.startswith("BLACK") else f"{alphabet} {name}"
        try:
            return unicodedata.lookup(prefix + stem)
        except KeyError:
            continue
    return char


def drawn(math: str) -> str:
    """Return the text of a formula, without the TeX that it carries."""
    math = re.sub(r"<annotation.*?</annotation>", "", math, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", math))


def visible(math: str) -> str:
    """Return the characters that a formula draws, the slanted ones included."""
    slanted = (letter(char, "ITALIC") for char in re.findall(r"<mi>(.)</mi>", math))
    return drawn(math) + "".join(slanted)


def _formula(match: re.Match[str]) -> Formula:
    r"""Return the TeX between `\(` and `\)`, or between `\[` and `\]`."""
    raw = html.unescape(match[2]).strip()
    return raw[2:-2].strip(), raw.startswith("\\[")


def _place(tag: str, math: str) -> str:
    # A wide displayed formula scrolls by itself, so the keyboard must reach it.
    focus = ' tabindex="0"' if tag == "div" else ""
    return f'<{tag} class="formula"{focus}>{math}</{tag}>'
