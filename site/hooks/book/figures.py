"""Figures as the site needs them: a light and a dark copy, their size, their markup."""

import html
import re
from pathlib import Path
from typing import Any

from . import BookError, write

# What chapters draw with (minipeft/lab/plots.py), and its counterpart on a dark page.
DARK = {
    "#24292f": "#e2e6eb",  # ink
    "#d0d7de": "#454c56",  # faint
    "#ffffff": "#16181d",  # paper
}
POINT = 4 / 3  # one point is 4/3 of a CSS pixel


def darken(svg: str) -> str:
    """Replace the inks of a figure by those for a dark page."""
    for light, dark in DARK.items():
        svg = re.sub(light, dark, svg, flags=re.I)
    return svg


def size(svg: str, name: str) -> tuple[int, int]:
    """Return width and height in CSS pixels."""
    opening = svg[svg.find("<svg") : svg.find(">", svg.find("<svg"))]
    found = [
        re.search(rf'\b{side}="([\d.]+)(pt|px)?"', opening)
        for side in ("width", "height")
    ]
    if not all(found):
        raise BookError(f"figure {name} does not give its width and height")
    pixels = [float(f[1]) * (POINT if f[2] == "pt" else 1) for f in found if f]
    return round(pixels[0]), round(pixels[1])


def publish(figure: dict[str, Any], source: Path, folder: Path, label: str) -> str:
    """Write both copies into `folder`, and return the figure's HTML."""
    name = Path(figure["file"]).stem
    svg = (source / figure["file"]).read_text("utf-8")
    write(folder / f"{name}.svg", svg)
    write(folder / f"{name}-dark.svg", darken(svg))
    return markup(figure, size(svg, name), f"{folder.name}/{name}", label)


def markup(figure: dict[str, Any], pixels: tuple[int, int], at: str, label: str) -> str:
    """Write the element; a caption repeats the alternative text only to the eye."""
    width, height = pixels
    alt = html.escape(figure["alt"], quote=True)
    images = "".join(
        f'<img src="{at}{dark}.svg#only-{mode}" alt="{alt}" '
        f'width="{width}" height="{height}" loading="lazy">'
        for dark, mode in (("", "light"), ("-dark", "dark"))
    )
    hidden = "" if figure.get("caption") else ' aria-hidden="true"'
    caption = html.escape(figure.get("caption") or figure["alt"])
    below = f"<figcaption{hidden}><b>{label}</b> {caption}</figcaption>"
    return f"<figure>{images}{below}</figure>"
