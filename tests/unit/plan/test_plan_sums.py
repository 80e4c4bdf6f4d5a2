"""Bytes of groups add up, field by field."""

from __future__ import annotations

from dataclasses import fields

from fsdpq.plan.weights import Stored


def test_sums_and_multiples_have_every_field() -> None:
    count = len(fields(Stored))
    one = Stored(*range(1, count + 1))
    assert one + one == one * 2 == Stored(*range(2, 2 * count + 2, 2))
