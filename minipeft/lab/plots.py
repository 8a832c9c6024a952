"""The book's figures: one style, a few shapes, deterministic SVG.

Text, axes and grid are drawn in exactly two colours, `INK` and `FAINT`, so that a dark
copy of a figure is the same file with these two strings replaced; the data's colours
(`PALETTE`) have at least 3:1 contrast on white and on the dark page alike.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from minipeft.errors import InputError
from minipeft.lab.files import write_atomic
from minipeft.lab.memory import Memory

INK = "#24292f"
FAINT = "#d0d7de"
PAPER = "#ffffff"
PALETTE = (
    "#0072b2",  # Okabe and Ito's blue, vermilion and bluish green as they are
    "#d55e00",
    "#009e73",
    "#c18600",  # their orange, reddish purple, sky blue and yellow, darkened
    "#ca78a5",
    "#4999c6",
    "#9c942b",
)
HEAT = LinearSegmentedColormap.from_list("minipeft", ("#eef4f9", PALETTE[0]))
HEAT_TEXT = ("#1f2328", "#fcfcfc")
"""The colours of text on pale and on dark cells, the same on both pages."""
SIZE = (6.4, 3.6)
"""Width and height in inches: the width of the book's column."""
NAME_SIZE = (95, 15)
"""Width and height in pixels that a name beside a point may need."""

STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),  # type: ignore[attr-defined]
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "path",  # glyphs as outlines: the same picture everywhere
    "svg.hashsalt": "minipeft",
}


def use() -> None:
    """Draw everything from here on in the book's style, legends and texts included."""
    mpl.rcParams.update(STYLE)


def axes(
    title: str = "", x: str = "", y: str = "", size: tuple[float, float] = SIZE
) -> tuple[Figure, Axes]:
    """Return an empty figure in the book's style and its axes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        ax.set_title(title, loc="left")
        ax.set_xlabel(x)
        ax.set_ylabel(y)
    return figure, ax


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, atomically; the same figure gives the same bytes.

    Raises:
        InputError: The folder cannot be written or the disk is full.
    """
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            buffer,
            format="svg",
            dpi=200,  # only for the cells of a heat map; all other parts are outlines
            metadata={"Date": None, "Creator": "minipeft"},
        )
    write_atomic(path, buffer.getvalue())


def smooth(values: Sequence[float], window: int | None = None) -> np.ndarray:
    """Return the mean of each value and those before it, up to `window` of them."""
    width = window or max(1, len(values) // 50)
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    mean: np.ndarray = (total[end] - total[start]) / (end - start)
    return mean


def bars(
    values: Mapping[str, float], x: str = "", title: str = "", form: str = "{:.3g}"
) -> Figure:
    """Draw one horizontal bar a name, the number at its end in the given form."""
    names = list(values)
    figure, ax = axes(title, x, size=(SIZE[0], 1.0 + 0.36 * len(names)))
    with mpl.rc_context(STYLE):
        drawn = ax.barh(names, list(values.values()), color=PALETTE[0], height=0.62)
        ax.bar_label(drawn, fmt=form, padding=4, color=INK)
        ax.margins(x=0.1)  # room for the numbers
        ax.invert_yaxis()
        ax.grid(visible=False)
    return figure


def memory_bars(memories: Mapping[str, Memory], title: str = "") -> Figure:
    """Draw one stacked bar a configuration, the four parts of its memory."""
    unit, name = _unit(max(memory.total for memory in memories.values()))
    figure, ax = axes(title, name, size=(SIZE[0], 1.4 + 0.42 * len(memories)))
    parts = ("weights", "gradients", "optimizer", "activations")
    with mpl.rc_context(STYLE):
        left = np.zeros(len(memories))
        for color, part in zip(PALETTE, parts, strict=False):
            width = np.array([getattr(m, part) / unit for m in memories.values()])
            ax.barh([*memories], width, left=left, color=color, height=0.62, label=part)
            left += width
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=len(parts))
    return figure


def heat_map(
    values: np.ndarray,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    scale: str = "",
    form: str = "{:.2g}",
) -> Figure:
    """Draw a matrix, pale at zero, dark at its largest value; each cell says its own.

    Args:
        values: (rows, columns), none negative.
        rows: Their names.
        columns: Their names.
        scale: What the numbers are.
        form: Of the number in a cell.
    """
    if values.ndim != 2:
        raise InputError(f"a heat map needs a matrix; these values are {values.ndim}-d")
    if values.min() < 0:
        raise InputError(
            f"a heat map begins at 0; the smallest value is {values.min():g}"
        )
    figure, ax = axes(size=(SIZE[0], 0.9 + 0.5 * len(values)))
    limit = float(values.max()) or 1.0
    with mpl.rc_context(STYLE):
        image = ax.imshow(values, cmap=HEAT, vmin=0, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            color = HEAT_TEXT[int(value > 0.55 * limit)]
            text = form.format(value)
            ax.text(column, row, text, color=color, ha="center", va="center")
        ax.grid(visible=False)
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xticks(range(len(columns)), columns)
        figure.colorbar(image, ax=ax, label=scale).outline.set_visible(False)
    return figure


def legend_below(figure: Figure, columns: int) -> None:
    """Put the figure's legend below its axes."""
    with mpl.rc_context(STYLE):
        figure.legend(
            loc="outside lower center", ncols=columns, fontsize=9, columnspacing=1
        )


def name_points(
    figure: Figure, ax: Axes, points: Mapping[str, tuple[float, float]]
) -> None:
    """Write each point's name to its right, pushed up or down until none is covered.

    Call this function last: it fixes the layout.
    """
    figure.draw_without_rendering()  # now the points have positions in pixels
    pixels = {n: _pixels(ax, point) for n, point in points.items()}
    heights = _apart(pixels, NAME_SIZE)
    for name, point in points.items():
        ax.annotate(
            name,
            point,
            xytext=(14, (heights[name] - pixels[name][1]) * 72 / figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5},
            # What a name crosses must not run through its letters.
            path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
        )


def _pixels(ax: Axes, point: tuple[float, float]) -> tuple[float, float]:
    x, y = ax.transData.transform(point)
    return float(x), float(y)


def _apart(
    pixels: Mapping[str, tuple[float, float]], size: tuple[float, float]
) -> dict[str, float]:
    """Return a height for each name, so that no two boxes of this size overlap."""
    heights = {name: y for name, (_, y) in pixels.items()}
    for _ in range(300):
        for low, high in itertools.combinations(
            sorted(heights, key=heights.__getitem__), 2
        ):
            missing = size[1] - abs(heights[high] - heights[low])
            if abs(pixels[high][0] - pixels[low][0]) < size[0] and missing > 0:
                heights[low] -= missing / 2
                heights[high] += missing / 2
    return heights


def _unit(largest: float) -> tuple[float, str]:
    """Return the decimal unit in which the largest bar has at most three digits."""
    for power, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= power:
            return power, name
    return 1.0, "bytes"
