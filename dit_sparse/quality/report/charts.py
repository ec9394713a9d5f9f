# SPDX-License-Identifier: Apache-2.0
"""Draw curves and the speed-quality plot as inline SVG; colours come from the page's style."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 520, 180
WIDE = 760  # pixels: the speed-quality plot
LEAST = {"dB": 2.0}  # an axis is never narrower: a hair's breadth must not look like a cliff
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 34  # pixels around the plot


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels.

    Args:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Pixel.
        end: Pixel.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Give the pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Give round values within the axis."""
        raw = (self.high - self.low) / about
        size = 10 ** math.floor(math.log10(raw))
        step = next((m * size for m in (1, 2, 2.5, 5) if m * size >= raw * 0.999), 10 * size)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


def axis(values: Sequence[float], start: float, end: float, least: float = 0.0) -> Axis:
    """Make an axis around values, with air at both ends; never narrower than ``least``."""
    low, high = min(values), max(values)
    width = max(high - low, least, 1e-6 * max(abs(high), 1.0))
    middle = (low + high) / 2
    return Axis(middle - 0.56 * width, middle + 0.56 * width, start, end)


def curve(
    values: Sequence[float],
    first: int,
    step: int,
    median: float,
    worst: int,
    unit: str,
    fps: float | None = None,
) -> Markup:
    """Draw one number per frame, with the median and the worst frame marked.

    Args:
        values: One per measured frame.
        first: Frame number of the first.
        step: Frames from one to the next.
        median: Of the values.
        worst: Number of the worst frame.
        unit: Of the values.
        fps: To write seconds beside the worst frame's number.
    """
    numbers = [first + step * i for i in range(len(values))]
    x = Axis(numbers[0], max(numbers[-1], numbers[0] + 1), LEFT, WIDTH - RIGHT)
    y = axis(values, HEIGHT - BOTTOM, TOP, LEAST.get(unit, 0.02))
    parts = [_grid_y(y), _ticks_x(x, "frame")]
    line = " ".join(f"{x(n)},{y(v)}" for n, v in zip(numbers, values, strict=True))
    floor = HEIGHT - BOTTOM
    area = f"{x(numbers[0])},{floor} {line} {x(numbers[-1])},{floor}"
    parts.append(Markup('<polygon class="area" points="{}"/>').format(area))
    parts.append(Markup('<polyline class="line" points="{}"/>').format(line))
    level = y(median)
    parts.append(_line("median", LEFT, WIDTH - RIGHT, level, level))
    low = values[(worst - first) // step]
    at = "" if fps is None else f", {worst / fps:.2f} s"
    told = f"worst: frame {worst}{at}, {number(low)}{' ' + unit if unit else ''}"
    anchor = "end" if x(worst) > WIDTH / 2 else "start"
    shift = -10 if anchor == "end" else 10
    below = y(low) < HEIGHT / 2
    parts.append(
        Markup('<circle class="worst" cx="{}" cy="{}" r="4.5"/>').format(x(worst), y(low))
        + Markup('<text class="mark" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            x(worst) + shift, y(low) + (16 if below else -8), anchor, told
        )
    )
    parts.append(
        Markup('<text class="mark soft" x="{}" y="{}" text-anchor="end">median {}</text>').format(
            WIDTH - RIGHT, level - 5, number(median)
        )
    )
    return _svg(WIDTH, HEIGHT, parts, f"{unit or 'value'} per frame")


@dataclass(frozen=True)
class Point:
    """One setting in the speed-quality plot.

    Args:
        label: Its name.
        speed: Dense time / sparse time.
        value: The quality's median.
        low: The lowest of all pairs.
        high: The highest.
    """

    label: str
    speed: float
    value: float
    low: float
    high: float


def pareto(points: Sequence[Point], quality: str, *, higher: bool, floor: float | None) -> Markup:
    """Plot speed-up against quality; settings that no other beats in both are joined.

    Args:
        points: One per setting.
        quality: The vertical axis in words.
        higher: More is better.
        floor: Where two dense runs of different backends stand, drawn as a line; None: unknown.
    """
    height = 340
    bottom = height - BOTTOM - 8
    x = axis([1.0, *(p.speed for p in points)], LEFT, WIDE - RIGHT - 40, 0.5)
    values = [v for p in points for v in (p.low, p.value, p.high)]
    y = axis([*values, *([] if floor is None else [floor])], bottom, TOP, 0.02)
    parts = [_grid_y(y, WIDE), _ticks_x(x, "speed-up against dense, whole call", WIDE, height)]
    one = x(1.0)
    parts.append(_line("median", one, one, TOP, bottom))
    parts.append(
        Markup('<text class="mark soft" x="{}" y="{}">dense, 1x</text>').format(one + 5, TOP + 12)
    )
    if floor is not None:
        level = y(floor)
        parts.append(
            _line("floor", LEFT, WIDE - RIGHT, level, level)
            + Markup('<text class="mark soft" x="{}" y="{}" text-anchor="end">{}</text>').format(
                WIDE - RIGHT, level + (14 if higher else -6), "noise floor: dense against dense"
            )
        )
    # The dense run beats all that is not faster than itself.
    best = front([point for point in points if point.speed > 1], higher=higher)
    if len(best) > 1:
        steps = [f"{x(best[0].speed)},{y(best[0].value)}"]
        for before, after in pairwise(best):
            steps.append(f"{x(after.speed)},{y(before.value)}")
            steps.append(f"{x(after.speed)},{y(after.value)}")
        parts.append(Markup('<polyline class="front" points="{}"/>').format(" ".join(steps)))
    parts += [_point(point, x, y) for point in points]
    parts.append(
        Markup('<text class="axis" x="{}" y="11">{}</text>').format(
            LEFT + 6, quality + " ↑" if higher else quality + " ↓ is better"
        )
    )
    return _svg(WIDE, height, parts, f"speed-up against {quality}")


def front(points: Sequence[Point], *, higher: bool) -> list[Point]:
    """Give the points that no other beats in speed and quality both, fastest last."""
    sign = 1 if higher else -1

    def beaten(point: Point) -> bool:
        return any(
            other.speed >= point.speed
            and sign * other.value >= sign * point.value
            and (other.speed, other.value) != (point.speed, point.value)
            for other in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: p.speed)


def number(value: float) -> str:
    """Write a number with four digits that matter, never as a power of ten."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < 1e-6:
        return "0" if value == 0 else "below 1e-6"
    digits = max(0, min(6, 3 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"


def _point(point: Point, x: Axis, y: Axis) -> Markup:
    at, level = x(point.speed), y(point.value)
    end = at > 0.7 * WIDE  # the label stands left of the point
    told = (
        f"{point.label}: {point.speed:.2f}x, median {number(point.value)}, "
        f"{number(point.low)} to {number(point.high)}"
    )
    return (
        _line("bar", at, at, y(point.low), y(point.high))
        + Markup('<circle class="dot" cx="{}" cy="{}" r="6"><title>{}</title></circle>').format(
            at, level, told
        )
        + Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            at + (-11 if end else 11), level + 4, "end" if end else "start", point.label
        )
    )


def _line(style: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    text = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    return text.format(style, x1, x2, y1, y2)


def _grid_y(y: Axis, width: int = WIDTH) -> Markup:
    return Markup("").join(
        _line("grid", LEFT, width - RIGHT, y(value), y(value))
        + Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT - 8, y(value) + 4, f"{value:g}"
        )
        for value in y.ticks()
    )


def _ticks_x(x: Axis, label: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    under = height - BOTTOM + 16
    whole = label == "frame"
    return Markup("").join(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            x(value), under, f"{value:g}"
        )
        for value in x.ticks(8)
        if not whole or value == int(value)
    ) + Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + width - RIGHT) / 2, under + 15, label
    )


def _svg(width: int, height: int, parts: Sequence[Markup], title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, escape(title), Markup("").join(parts)
    )
