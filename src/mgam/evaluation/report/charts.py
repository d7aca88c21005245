"""Charts as SVG text, with no library: lines, points with a path through them, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
DENSE_COLOUR = "#7b8794"
TOP = 24  # room above the line of 100 percent
APART = 20  # nearer labels of one line would cover each other
WHITE_FROM = 72  # percent: below this the squares are too light for white figures
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#be185d", "#0f766e", "#a16207")


@dataclass(frozen=True)
class Dot:
    """A value on a chart."""

    x: float
    y: float
    error: float | None
    label: str  # shown when the pointer rests on it
    text: str = ""  # written beside it


@dataclass(frozen=True)
class Series:
    """The values of one method."""

    name: str
    colour: str
    dots: Sequence[Dot]


def colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method; dense is grey."""
    others = [method for method in methods if method != "dense"]
    return {"dense": DENSE_COLOUR} | {method: COLOURS[n % len(COLOURS)] for n, method in enumerate(others)}


def short_number(value: float) -> str:
    """1,024 as 1k, 131,072 as 128k, 1,234,567 as 1.2M, 0.25 as 0.25."""
    if value >= 1024 and value % 1024 == 0 and value < 2**20:
        return f"{int(value) // 1024}k"
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, 1e-12)))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    x_title: str,
    ticks: Sequence[float] = (),
    mark: tuple[float, str] | None = None,
    width: int = 640,
    height: int = 300,
) -> str:
    """Percent scores over a logarithmic axis, a line for each series; `mark` is a dashed line with words."""
    values = [dot.x for one in series for dot in one.dots]
    if not values:
        return '<p class="none">Nothing to draw: no method could read anything here.</p>'
    low, high = min([*values, *ticks]), max([*values, *ticks])
    if mark is not None:
        high = max(high, min(mark[0], 4 * high))
    x = _Axis(low / 1.08, high * 1.08, 46, width - 12, log=True)
    y = _Axis(0, 100, height - 40, TOP, log=False)
    parts = [_svg(width, height)]
    parts += [_percent_line(value, x, y) for value in (0, 25, 50, 75, 100)]
    for tick in ticks or _ticks(low, high):
        parts.append(_text(x.at(tick), height - 22, short_number(tick), "middle"))
    parts.append(_text((x.start + x.end) / 2, height - 6, x_title, "middle", FAINT))
    if mark is not None and x.low <= mark[0] <= x.high:
        place = x.at(mark[0])
        parts.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{height - 40}" stroke="{FAINT}" class="dash"/>'
        )
        anchor = "end" if place > width * 0.8 else "middle"
        parts.append(_text(place, 14, mark[1], anchor, FAINT))
    parts += [_series(one, x, y) for one in series]
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Powers of two or ten that lie in the range, few enough to be read."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    found = [factor * 10.0**power for power in range(first, last) for factor in (1, 2, 5)]
    inside = [tick for tick in found if low / 1.08 <= tick <= high * 1.08]
    if len(inside) > 8:
        inside = [tick for tick in inside if f"{tick:e}".startswith("1")]
    return inside or [low, high]


def _percent_line(value: float, x: _Axis, y: _Axis) -> str:
    place = y.at(value)
    line = f'<line x1="{x.start}" x2="{x.end}" y1="{place:.1f}" y2="{place:.1f}" stroke="{GRID}"/>'
    return line + _text(x.start - 6, place + 4, f"{value:.0f} %", "end", FAINT)


def _series(one: Series, x: _Axis, y: _Axis) -> str:
    dots = sorted(one.dots, key=lambda dot: dot.x)
    path = " ".join(f"{x.at(dot.x):.1f},{y.at(dot.y):.1f}" for dot in one.dots)
    parts = [f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2.5" opacity="0.85"/>']
    written: list[tuple[float, float]] = []
    for dot in dots:
        across, down = x.at(dot.x), y.at(dot.y)
        if dot.error:
            top, bottom = y.at(min(100.0, dot.y + dot.error)), y.at(max(0.0, dot.y - dot.error))
            parts.append(
                f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{one.colour}" '
                'stroke-width="1.5"/>'
            )
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4.5" fill="{one.colour}"><title>{escape(dot.label)}</title>'
            "</circle>"
        )
        if dot.text and all(abs(across - left) > APART or abs(down - above) > APART for left, above in written):
            written.append((across, down))
            parts.append(_text(across, down - 9 if down > 30 else down + 18, dot.text, "middle", one.colour))
    return "".join(parts)


def heat_map(
    columns: Sequence[int], bins: int, score: Callable[[int, int], tuple[float | None, int, bool]], width: int = 0
) -> str:
    """Lengths across, depths down. `score` gives percent, trials, and whether the method could read that length."""
    side, tall, left = 56, 30, 68
    width = width or left + side * len(columns) + 6
    height = 26 + tall * bins + 24
    parts = [_svg(width, height)]
    for row in range(bins):
        middle = 26 + tall * row + tall / 2 + 4
        parts.append(_text(left - 6, middle, f"{100 * row // bins}–{100 * (row + 1) // bins} %", "end", FAINT))
    for number, length in enumerate(columns):
        across = left + side * number
        parts.append(_text(across + side / 2, 18, short_number(length), "middle"))
        for row in range(bins):
            parts.append(_square(across, 26 + tall * row, side, tall, *score(length, row)))
    parts.append(_text(left + side * len(columns) / 2, height - 6, "tokens", "middle", FAINT))
    return "".join([*parts, "</svg>"])


def _square(across: float, down: float, side: float, tall: float, value: float | None, trials: int, fits: bool) -> str:
    if not fits:
        fill, ink, shown, title = "#f0f1f3", FAINT, "–", "does not fit"
    elif value is None:
        fill, ink, shown, title = "#fff", FAINT, "", "no sample here"
    else:
        fill, ink, shown = heat_colour(value), "#fff" if value >= WHITE_FROM else INK, f"{value:.0f}"
        title = f"{value:.1f} % over {trials} trial{'s' if trials != 1 else ''}"
    box = f'<rect x="{across + 1}" y="{down + 1}" width="{side - 2}" height="{tall - 2}" rx="3" fill="{fill}"'
    words = _text(across + side / 2, down + tall / 2 + 4, shown, "middle", ink)
    return f"<g>{box}><title>{title}</title></rect>{words}</g>"


def heat_colour(percent: float) -> str:
    """From pale orange (nothing found) by way of pale to deep blue-green (all found); told apart when colour-blind."""
    stops = ((0, (253, 186, 140)), (40, (253, 230, 205)), (60, (140, 190, 200)), (100, (8, 84, 112)))
    for (low, first), (high, last) in pairwise(stops):
        if percent <= high:
            share = (percent - low) / (high - low)
            return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(first, last, strict=True))
    return "#085470"


def _svg(width: float, height: float) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img">'


def _text(x: float, y: float, words: str, anchor: str, colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
