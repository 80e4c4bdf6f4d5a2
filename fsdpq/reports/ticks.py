"""Axes of charts: what they reach over, where marks stand, and what those say."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where (percent from left or from the top) and what it says."""

    position: float
    label: str


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: value at its start.
        high: value at its end.
        values: where marks stand.
        is_log: equal factors are equally far apart.
    """

    low: float
    high: float
    values: tuple[float, ...]
    is_log: bool = False

    def percent(self, value: float) -> float:
        """Returns where ``value`` is, in percent from the start."""
        if self.is_log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[Tick]:
        """Returns the marks, in percent from the start."""
        return [Tick(self.percent(value), format_number(value)) for value in self.values]


def linear_scale(low: float, high: float, count: int, *, whole: bool = False) -> Scale:
    """Returns an axis over ``low`` to ``high`` with about ``count`` marks.

    Args:
        low: smallest value.
        high: largest value.
        count: wanted number of marks.
        whole: an axis that counts: it ends at the values themselves, its marks are whole numbers.
    """
    if not whole:
        values = tick_values(low, high, count)
        return Scale(values[0], values[-1], tuple(values))
    if not high > low:
        low, high = low - 1, high + 1
    inside = [x for x in tick_values(low, high, count) if low <= x <= high and x == round(x)]
    return Scale(low, high, tuple(inside))


def log_scale(low: float, high: float) -> Scale:
    """Returns a logarithmic axis: marks at powers of ten, and between them where those are few.

    Args:
        low: smallest value, above 0.
        high: largest value.
    """
    if not high > low:
        low, high = low / 2, high * 2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1, 2, 5) if decades <= 2 else (1,)
    stride = max(1, math.ceil(decades / 6)) if decades > 2 else 1
    marks = [f * 10.0**power for power in range(first, last + 1, stride) for f in factors]
    below = [mark for mark in marks if mark <= low * (1 + 1e-9)]
    above = [mark for mark in marks if mark >= high * (1 - 1e-9)]
    start, end = (below or marks)[-1], (above or [10.0**last])[0]
    return Scale(start, end, tuple(mark for mark in marks if start <= mark <= end), is_log=True)


def tick_values(low: float, high: float, count: int) -> list[float]:
    """Returns round values (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """Returns a short text: ``12k``, ``1.25``, ``5e-4``."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"
