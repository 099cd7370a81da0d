"""Figures as SVG that lives inside the page: it takes the page's colours and fonts, and is equal for equal numbers."""

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Transform, blended_transform_factory

from stages.reports.formats import MINUS

WIDTH, HEIGHT = 380, 236
"""Units of a figure; the page shows it at about one pixel a unit on a phone and on a wide screen."""
MARGINS = {"left": 48 / WIDTH, "right": 1 - 14 / WIDTH, "top": 1 - 10 / HEIGHT}
LINE = 15
"""Height of a line of text below the axis."""

# Colours that the page decides, light or dark: matplotlib draws with these, `_adopt` puts CSS variables in their place.
INK, MUTED, GRID = "#000001", "#000002", "#000003"
SERIES = tuple(f"#0001{number:02x}" for number in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_PARAMETERS = {
    "svg.hashsalt": "simclr",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Series:
    """A line of a plot.

    Attributes:
        colour: number of the series on the page: its colour and marker are the same in every plot, and no two of the
            first 64 share both.
        spread: half the length of the error bar at each point.
        highlighted: positions of the points that get a large marker.
        points: whether every point has a marker.
        dashed: where a second line has the colour of a first.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    spread: Sequence[float | None] | None = None
    highlighted: Sequence[int] = ()
    points: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A line plot.

    Attributes:
        name: unique on the page, letters and digits: begins every id inside the SVG.
        description: what the figure shows, for those who do not see it.
        x_ticks: (position, text) where the ticks are not matplotlib's choice; a text may have two lines.
        percent: y is a share from 0 to 1.
    """

    name: str
    description: str
    series: Sequence[Series]
    x_label: str = ""
    x_logarithmic: bool = False
    y_logarithmic: bool = False
    percent: bool = False
    x_ticks: Sequence[tuple[float, str]] = field(default_factory=tuple)


def draw(plot: Plot) -> str:
    """The plot as an <svg> element to put into HTML: no fixed size, no colours and no fonts of its own."""
    with style.context("default", after_reset=True), matplotlib.rc_context(_PARAMETERS), warnings.catch_warnings():
        # The page's font draws the text; that matplotlib's own lacks a letter does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        lines = max((text.count("\n") + 1 for _, text in plot.x_ticks), default=1)
        figure.subplots_adjust(**MARGINS, bottom=(10 + LINE * (lines + bool(plot.x_label))) / HEIGHT)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        for series in plot.series:
            _line(axes, series)
        _scales(axes, plot)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _adopt(buffer.getvalue(), plot.name, plot.description)


def marker_number(colour: int) -> int:
    """The marker of a series: where colours come round again, it is the next one."""
    return (colour + colour // len(SERIES)) % len(MARKERS)


def _line(axes: Axes, series: Series) -> None:
    colour, marker = SERIES[series.colour % len(SERIES)], MARKERS[marker_number(series.colour)]
    shown = marker if series.points or len(series.x) == 1 else "none"
    axes.plot(series.x, series.y, color=colour, marker=shown, linestyle="--" if series.dashed else "-", zorder=3)
    if series.spread is not None:
        bars = [(x, y, size) for x, y, size in zip(series.x, series.y, series.spread, strict=True) if size is not None]
        for x, y, size in bars:
            axes.plot([x, x], [y - size, y + size], color=colour, linewidth=1.2, alpha=0.7, zorder=2)
    for position in series.highlighted:
        axes.plot(
            series.x[position],
            series.y[position],
            color=colour,
            marker=marker,
            markersize=9,
            linestyle="none",
            zorder=4,
        )


def _scales(axes: Axes, plot: Plot) -> None:
    if plot.x_logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}".replace("-0", "-").replace("-", MINUS))
        )
        axes.xaxis.set_minor_locator(NullLocator())
    if plot.x_ticks:
        axes.xaxis.set_major_locator(FixedLocator([position for position, _ in plot.x_ticks]))
        axes.xaxis.set_major_formatter(NullFormatter())
        for position, text in plot.x_ticks:
            _tick_text(axes, position, text)
    if plot.y_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    if plot.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    elif not (plot.y_logarithmic and _decades(plot) < 1):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("-", MINUS)))
    axes.tick_params(length=0, pad=6)
    if plot.x_label:
        axes.text(1, 4 / HEIGHT, plot.x_label, transform=_right_edge(axes), ha="right", va="bottom", color=MUTED)
    axes.margins(x=0.03, y=0.08)


def _tick_text(axes: Axes, position: float, text: str) -> None:
    """A text for each line: matplotlib centres several lines by its own font, which is not the page's."""
    for number, line in enumerate(text.split("\n")):
        printable = "".join(letter if letter.isprintable() else " " for letter in line)
        axes.annotate(
            printable,
            (position, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -7 - LINE * number),
            textcoords="offset points",
            ha="center",
            va="top",
            color=MUTED,
        )


def _right_edge(axes: Axes) -> Transform:
    """x in shares of the axes, y in shares of the figure."""
    return blended_transform_factory(axes.transAxes, axes.figure.transFigure)


def _decades(plot: Plot) -> float:
    values = [value for series in plot.series for value in series.y if value > 0]
    return max(values) / min(values) if values else 1


def _adopt(data: bytes, name: str, description: str) -> str:
    """Make matplotlib's file part of a page: own ids, the page's colours and fonts, a description, no style sheet."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(data)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata")]:
            parent.remove(child)
    used = set(re.findall(rb"#([\w.-]+)[\")]", data))
    for element in root.iter():
        if element.attrib.get("id", "").encode() in used:
            element.set("id", f"{name}-{element.attrib['id']}")
        else:
            element.attrib.pop("id", None)
        link = element.get(f"{{{_XLINK}}}href", "")
        if link.startswith("#"):
            element.set(f"{{{_XLINK}}}href", f"#{name}-{link[1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
        if "style" in element.attrib:
            element.set("style", _restyle(element.attrib["style"]))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if element.tag != f"{{{_SVG}}}text":
            element.text = None
        element.tail = None
    title = ElementTree.Element(f"{{{_SVG}}}title")
    title.text = description
    root.insert(0, title)
    root.set("role", "img")
    root.set("class", "plot")
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(text: str) -> str:
    """A style attribute without a font family, and with CSS variables for the colours of the page."""
    parts = [part.strip() for part in text.split(";")]
    kept = "; ".join(part for part in parts if part and not part.startswith("font-family"))
    return re.sub(r"#[0-9a-f]{6}", lambda match: _variable(match.group()), kept)


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour
