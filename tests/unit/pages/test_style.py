"""Colours of the pages can be read and told apart, in light and dark, also by colour-blind people.

References: WCAG 2.2, 1.4.3 and 1.4.11 (contrast); Machado, Oliveira and Fernandes 2009 (what
somebody without red or green cones sees); CIE 1976 colour difference, where 2.3 is just noticeable.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import fsdpq.pages

STYLE = (Path(fsdpq.pages.__file__).parent / "style.css").read_text()
THEMES = ("light", "dark")
CURVES = [f"c{index}" for index in range(8)]

SIGHT = {
    "all cones": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "no red cones": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "no green cones": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}  # fmt: skip


def colours(theme: str) -> dict[str, str]:
    blocks = re.findall(r":root \{([^}]*)\}", STYLE)
    assert len(blocks) == 2
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", blocks[0]))
    return found | (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", blocks[1])) if theme == "dark" else {}
    )


def linear(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    low, high = sorted(
        sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))
        for colour in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, sight: str) -> tuple[float, float, float]:
    light = linear(colour)
    seen = [
        min(1, max(0, sum(a * b for a, b in zip(row, light, strict=True)))) for row in SIGHT[sight]
    ]
    to_xyz = (
        (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
    )
    xyz = [sum(a * b for a, b in zip(row, seen, strict=True)) for row in to_xyz]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(one: str, other: str, sight: str) -> float:
    pairs = zip(lab(one, sight), lab(other, sight), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) ** 0.5


def test_the_formulas_give_what_their_sources_say():
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert lab("#ff0000", "all cones") == pytest.approx((53.24, 80.09, 67.20), abs=0.05)
    assert (
        difference("#a05000", "#508000", "no green cones")
        < 30
        < difference("#a05000", "#508000", "all cones")
    )


@pytest.mark.parametrize("theme", THEMES)
def test_text_has_the_contrast_that_wcag_aa_wants(theme):
    found = colours(theme)
    for text, back in itertools.product(("ink", "soft", "good", "bad", "warn"), ("card", "bg")):
        assert contrast(found[text], found[back]) >= 4.5, (text, back)


@pytest.mark.parametrize("theme", THEMES)
def test_curves_and_bars_have_the_contrast_that_wcag_wants_of_graphics(theme):
    found = colours(theme)
    for name in [*CURVES, "train", "eval", "other", "base", "adapter"]:
        assert contrast(found[name], found["card"]) >= 3, name


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", THEMES)
def test_curves_are_told_apart_by_everybody(theme, sight):
    found = colours(theme)
    pairs = itertools.combinations(CURVES, 2)
    worst = min((difference(found[a], found[b], sight), a, b) for a, b in pairs)
    assert worst[0] >= 20, worst
    assert difference(found["train"], found["eval"], sight) >= 40
