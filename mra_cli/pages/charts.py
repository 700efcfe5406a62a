"""Line charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mra_cli.pages.elements import Html, tag

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 14, 48


@dataclass(frozen=True)
class Series:
    """What is drawn.

    Attributes:
        label: For the legend.
        points: Where.
        kind: A ``line`` with or without ``dots``, dots alone, or a ``ring`` around points.
        colour: Which of the page's colours, from 1.
        titles: What points say when pointed at.
    """

    label: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "lined dots", "dots", "ring"]
    colour: int
    titles: Sequence[str] = ()


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    summary: str,
    doubling_x: bool = False,
    log_y: bool = False,
) -> Html:
    """A chart with a legend; ``summary`` says in words what it shows.

    Args:
        doubling_x: The x axis is logarithmic, with a tick at each point of the first series.
        log_y: The y axis is logarithmic.
    """
    drawn = [one for one in series if one.points]
    xs = _Axis([x for one in drawn for x, _ in one.points], doubling_x, _LEFT, _WIDTH - _RIGHT)
    ys = _Axis([y for one in drawn for _, y in one.points], log_y, _HEIGHT - _BOTTOM, _TOP)
    x_ticks = [x for x, _ in drawn[0].points] if doubling_x else xs.ticks()
    parts = [*_grid(xs, ys, x_ticks, x_label, y_label)]
    for one in drawn:
        places = [(xs.at(x), ys.at(y)) for x, y in one.points]
        if "line" in one.kind:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(tag("polyline", points=path, class_=f"line c{one.colour}"))
        if one.kind == "line":
            continue
        titles = one.titles or [""] * len(places)
        for (x, y), title in zip(places, titles, strict=True):
            parts.append(_mark(one, x, y, title))
    legend = tag("ul", *(tag("li", _key(one), one.label) for one in drawn), class_="legend")
    picture = tag(
        "svg",
        tag("title", summary),
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
    )
    return tag("figure", picture, legend, class_="chart")


class _Axis:
    """From values to places on the drawing."""

    def __init__(self, values: Sequence[float], log: bool, first: float, last: float) -> None:
        self.log, self.first, self.last = log, first, last
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
            pad = max(0.06 * (high - low), 0.05)
            self.low, self.high = low - pad, high + pad
        else:
            self.low, self.high = min(0.0, low), high + 0.06 * ((high - min(0.0, low)) or 1.0)

    def at(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        if self.log:
            for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
                decades = range(math.floor(self.low), math.ceil(self.high) + 1)
                found = [m * 10.0**k for k in decades for m in steps]
                found = [t for t in found if self.low <= math.log10(t) <= self.high]
                if len(found) >= 3:
                    return found
            return found
        raw = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        count = int(self.high / step)
        return [k * step for k in range(count + 1)]


def _grid(xs: _Axis, ys: _Axis, x_ticks: Sequence[float], x_label: str, y_label: str) -> list[Html]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ys.ticks():
        y = f"{ys.at(value):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        label = {"x": _LEFT - 7, "y": y, "class_": "tick end"}
        parts.append(tag("text", _number(value), dominant_baseline="middle", **label))
    for value in x_ticks:
        x = f"{xs.at(value):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="grid"))
        parts.append(tag("text", _number(value), x=x, y=bottom + 17, class_="tick middle"))
    middle = (_LEFT + right) / 2
    parts.append(tag("text", x_label, x=middle, y=_HEIGHT - 8, class_="axis middle"))
    turned = f"rotate(-90 14 {(_TOP + bottom) / 2})"
    place = {"x": 14, "y": (_TOP + bottom) / 2, "transform": turned}
    parts.append(tag("text", y_label, class_="axis middle", **place))
    return parts


def _mark(one: Series, x: float, y: float, title: str) -> Html:
    inside = [tag("title", title)] if title else []
    if one.kind == "ring":
        return tag("circle", *inside, cx=f"{x:.1f}", cy=f"{y:.1f}", r=9, class_="ring")
    shape = {1: "circle", 2: "square", 3: "triangle"}.get(one.colour, "circle")
    kind = f"dot c{one.colour}"
    if shape == "square":
        return tag(
            "rect", *inside, x=f"{x - 4:.1f}", y=f"{y - 4:.1f}", width=8, height=8, class_=kind
        )
    if shape == "triangle":
        corners = f"{x:.1f},{y - 5.5:.1f} {x - 5:.1f},{y + 4:.1f} {x + 5:.1f},{y + 4:.1f}"
        return tag("polygon", *inside, points=corners, class_=kind)
    return tag("circle", *inside, cx=f"{x:.1f}", cy=f"{y:.1f}", r=4.2, class_=kind)


def _key(one: Series) -> Html:
    parts = []
    if "line" in one.kind:
        parts.append(tag("polyline", points="1,8 25,8", class_=f"line c{one.colour}"))
    if one.kind != "line":
        parts.append(_mark(one, 13, 8, ""))
    return tag("svg", *parts, viewBox="0 0 26 18", width=26, height=18, aria_hidden="true")


def _number(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:g}" if abs(value) >= 0.001 or value == 0 else f"{value:.0e}"
