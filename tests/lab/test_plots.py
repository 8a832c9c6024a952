import errno
import itertools
import os
import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.text import Text

from minipeft.errors import InputError
from minipeft.lab import files, plots
from minipeft.lab.memory import Memory

DARK_PAGE = "#1b1d27"


def figures():
    memories = {"full": Memory(4e6, 4e6, 8e6, 1e6), "LoRA": Memory(4e6, 1e5, 2e5, 9e5)}
    return {
        "bars": plots.bars({"NF4": 0.0938, "FP4": 0.12}, "error"),
        "memory": plots.memory_bars(memories, "Memory"),
        "heat": plots.heat_map(np.eye(3), "abc", "xyz", "value"),
    }


def contrast(first, second):
    """Return the contrast ratio of WCAG 2.2, between 1 and 21."""
    light, dark = sorted(map(luminance, (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", DARK_PAGE])
def test_every_data_color_stands_out_on_both_pages(page):
    for color in plots.PALETTE:
        assert contrast(color, page) >= 3, color
    assert len(set(plots.PALETTE)) == len(plots.PALETTE) == 7


@pytest.mark.parametrize("name", sorted(figures()))
def test_the_same_figure_gives_the_same_bytes(name, tmp_path):
    plots.save(figures()[name], tmp_path / "one.svg")
    plots.save(figures()[name], tmp_path / "two.svg")
    one = (tmp_path / "one.svg").read_bytes()
    assert one == (tmp_path / "two.svg").read_bytes()
    assert one.startswith(b"<?xml")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", sorted(figures()))
def test_only_known_colors_and_no_background(name, tmp_path):
    """The dark copy replaces INK and FAINT; another grey would stay the same."""
    plots.save(figures()[name], tmp_path / "figure.svg")
    svg = (tmp_path / "figure.svg").read_text()
    used = set(re.findall(r"#[0-9a-f]{6}", svg.partition("</metadata>")[2]))
    allowed = {plots.INK, plots.FAINT, *plots.PALETTE}
    assert plots.INK in used
    if name != "heat":  # its cells and colour bar have other colours
        assert used <= allowed
    assert "#000000" not in used
    assert "#ffffff" not in used
    assert "<text" not in svg


def test_numbers_on_the_axes_are_ink_and_their_marks_faint():
    _, ax = plots.axes()
    for axis in (ax.xaxis, ax.yaxis):
        assert {label.get_color() for label in axis.get_ticklabels()} == {plots.INK}
        assert {line.get_color() for line in axis.get_ticklines()} == {plots.FAINT}


def test_a_full_disk_leaves_no_figure(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(InputError, match="No space left"):
        plots.save(figures()["bars"], tmp_path / "figure.svg")
    assert not list(tmp_path.iterdir())


def test_smoothing_is_a_mean_of_the_past():
    assert plots.smooth([4.0, 2.0, 6.0, 8.0], 2).tolist() == [4.0, 3.0, 4.0, 7.0]
    assert plots.smooth([4.0, 2.0]).tolist() == [4.0, 2.0]


def test_impossible_figures_are_refused():
    with pytest.raises(InputError, match="needs a matrix; these values are 1-d"):
        plots.heat_map(np.ones(3))
    with pytest.raises(InputError, match=r"begins at 0; the smallest value is -0\.5"):
        plots.heat_map(np.eye(3) - 0.5)


def test_a_heat_map_begins_at_zero_and_says_its_values():
    figure = plots.heat_map(np.array([[0.1, 0.4]]), ["row"], ["a", "b"], form="{:.0%}")
    (image,) = figure.axes[0].images
    assert image.get_clim() == (0, 0.4)
    assert [text.get_text() for text in figure.axes[0].texts] == ["10%", "40%"]
    for text, value in zip(figure.axes[0].texts, (0.25, 1.0), strict=True):
        cell = mpl.colors.to_hex(plots.HEAT(value))
        assert contrast(text.get_color(), cell) > 4.5


def test_names_of_crowded_points_do_not_cover_each_other():
    figure, ax = plots.axes()
    points = {f"method {i}": (i % 3, 1 + i / 1000) for i in range(9)}
    ax.set(xlim=(0, 9), ylim=(0, 2))
    plots.name_points(figure, ax, points)
    figure.draw_without_rendering()
    assert [text.get_text() for text in ax.texts] == list(points)
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without lines
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
