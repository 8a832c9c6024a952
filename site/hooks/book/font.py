"""STIX Two Math, cut down to what the book's formulas use, as a web font."""

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

from . import BookError, write

# Letters and digits, and what a browser draws for an element rather than a character:
# the root of <msqrt>.
ALWAYS = {*map(chr, range(0x20, 0x7F)), "√"}
SMALLEST_ROOT = 0.82
ROOT_GAP = 150  # thousandths of an em
BRACKETS = set("()[]{}")
WIDEST_BRACKET = 1.2


def publish(characters: set[str], site: Path, cache: Path) -> Path:
    """Write the font into the site; cut it anew only for other characters."""
    source = original()
    wanted = "".join(sorted(characters | ALWAYS))
    recipe = source.read_bytes() + Path(__file__).read_bytes() + wanted.encode()
    state = hashlib.sha256(recipe).hexdigest()[:16]
    cut = cache / "fonts" / f"stix-two-math-{state}.woff2"
    if not cut.exists():
        for old in cut.parent.glob("stix-two-math-*"):
            old.unlink()
        write(cut, subset(source, wanted))
    return write(site / "assets" / "stix-two-math.woff2", cut.read_bytes())


def original() -> Path:
    """Find the font in the installed wheel that carries it."""
    found = importlib.util.find_spec("ziamath")
    places = found.submodule_search_locations if found else None
    font = Path(places[0], "fonts", "STIXTwoMath-Regular.ttf") if places else None
    if font is None or not font.exists():
        raise BookError("the formulas' font is missing: pip install ziamath")
    return font


def subset(source: Path, characters: str) -> bytes:
    """Keep these characters, with their larger and script forms and the licence."""
    font = TTFont(source)
    missing = [c for c in characters if ord(c) not in font.getBestCmap() and c > "\xa0"]
    drawn = [c for c in missing if c not in "\u2061\u2062\u2063\u200b"]
    if drawn:
        raise BookError(f"formulas use characters that STIX Two Math lacks: {drawn}")
    options = Options()
    options.flavor = "woff2"
    options.hinting = False
    options.layout_features = ["*"]
    options.name_IDs = [0, 1, 2, 3, 4, 5, 6, 7, 13, 14]
    cutter = Subsetter(options)
    cutter.populate(text=characters)
    cutter.subset(font)
    even_widths(font, characters)
    rename(font)
    font.flavor = "woff2"
    out = io.BytesIO()
    font.save(out)
    return out.getvalue()


def even_widths(font: TTFont, characters: str) -> None:
    """Keep tall forms of roots and brackets about as wide as the smallest one.

    Browsers reserve the width of the widest form, which leaves a gap after the others.
    The smallest root is also too tall for a single letter, its rule too close.
    """
    font["MATH"].table.MathConstants.RadicalVerticalGap.Value = ROOT_GAP
    root, larger = forms(font, "√")
    scale(font, root.VariantGlyph, SMALLEST_ROOT, SMALLEST_ROOT)
    root.AdvanceMeasurement = round(root.AdvanceMeasurement * SMALLEST_ROOT)
    narrow(font, larger, font["hmtx"][root.VariantGlyph][0])
    for bracket in BRACKETS & set(characters):
        first, larger = forms(font, bracket)
        narrow(font, larger, font["hmtx"][first.VariantGlyph][0] * WIDEST_BRACKET)


def forms(font: TTFont, char: str) -> tuple[Any, list[str]]:
    """Return a character's smallest form, and the glyphs of its taller ones."""
    variants = font["MATH"].table.MathVariants
    at = variants.VertGlyphCoverage.glyphs.index(font.getBestCmap()[ord(char)])
    construction = variants.VertGlyphConstruction[at]
    first, *others = construction.MathGlyphVariantRecord
    names = [record.VariantGlyph for record in others]
    names += [part.glyph for part in construction.GlyphAssembly.PartRecords]
    return first, list(dict.fromkeys(names))


def narrow(font: TTFont, names: list[str], widest: float) -> None:
    """Condense the glyphs that are wider than this."""
    for name in names:
        scale(font, name, min(1.0, widest / font["hmtx"][name][0]), 1)


def scale(font: TTFont, name: str, x: float, y: float) -> None:
    """Scale one glyph and its advance."""
    glyph = font["glyf"][name]
    glyph.coordinates.scale((x, y))
    glyph.coordinates.toInt()
    glyph.recalcBounds(font["glyf"])
    font["hmtx"][name] = (round(font["hmtx"][name][0] * x), glyph.xMin)


def rename(font: TTFont) -> None:
    """Call it what it is now; the copyright and the licence stay as they are."""
    for record in font["name"].names:
        if record.nameID in (1, 3, 4, 6):
            record.string = "BookMath" if record.nameID == 6 else "Book Math"
