"""Plots: equal bytes, the page's colours, no state left behind, and texts that stay texts."""

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from stages.reports.plots import Plot, Series, draw

SVG = "{http://www.w3.org/2000/svg}"


def plot(name: str = "one", **changes: object) -> Plot:
    series = [Series([1, 10, 100], [0.2, 0.4, 0.6], 0, (0.1, None, 0.05), (1,), True), Series([1, 10], [0.3, 0.3], 1)]
    given: dict[str, object] = {"description": "A plot", "series": series, "x_label": "labels"}
    return Plot(name, **(given | changes))  # type: ignore[arg-type]


def test_equal_plots_are_equal_text() -> None:
    assert draw(plot(percent=True, x_logarithmic=True)) == draw(plot(percent=True, x_logarithmic=True))


def test_a_plot_has_no_size_no_font_and_no_colour_of_its_own() -> None:
    svg = draw(plot())
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib
    assert root.attrib["viewBox"] == "0 0 380 236"
    assert "font-family" not in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert {"var(--series-0)", "var(--series-1)", "var(--muted)", "var(--grid)"} <= set(
        re.findall(r"var\([^)]*\)", svg)
    )
    assert not list(root.iter(f"{SVG}style"))
    assert not list(root.iter(f"{SVG}metadata"))


def test_two_plots_share_no_id() -> None:
    first, second = (set(re.findall(r' id="([^"]+)"', draw(plot(name)))) for name in ("one", "two"))
    assert first
    assert not first & second


def test_every_reference_has_its_target() -> None:
    svg = draw(plot())
    ids = set(re.findall(r' id="([^"]+)"', svg))
    assert set(re.findall(r"#([\w-]+)", svg)) == ids


def test_texts_stay_texts() -> None:
    hostile = "<script>alert(1)</script> & $x_1$"
    ticks = [(1, f"{hostile}\nsecond"), (10, "鳥\x00")]
    root = ElementTree.fromstring(draw(plot(description=hostile, x_label=hostile, x_ticks=ticks)))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts.count(hostile) == 2
    assert "second" in texts
    assert "鳥 " in texts
    assert root.findtext(f"{SVG}title") == hostile
    assert not list(root.iter(f"{SVG}script"))


def test_matplotlib_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 7.0)
    before = dict(matplotlib.rcParams)
    with_own_settings = draw(plot())
    assert dict(matplotlib.rcParams) == before
    monkeypatch.undo()
    assert draw(plot()) == with_own_settings


def test_logarithmic_axes_name_powers_of_ten_without_formulas() -> None:
    series = [Series([1e-8, 1e-4, 1.0, 100.0], [1e-3, 1e-2, 1e-1, 1.0])]
    root = ElementTree.fromstring(draw(plot(series=series, x_logarithmic=True, y_logarithmic=True)))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert "1e\N{MINUS SIGN}8" in texts
    assert "0.001" in texts
    assert not [text for text in texts if "$" in text]


@pytest.mark.parametrize("points", [1, 2])
def test_few_points_are_drawn(points: int) -> None:
    series = [Series([1.0, 2.0][:points], [0.5, 0.5][:points])]
    assert "var(--series-0)" in draw(plot(series=series))
