"""The process that measures a CPU's rates."""

from __future__ import annotations

import json

import pytest

from fsdpq.worker import matmul_rates


def test_rates_are_those_of_products(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_rates.torch, "set_num_threads", lambda _num: None)
    matmul_rates.main()
    rates = json.loads(capsys.readouterr().out)
    assert rates.keys() == {"fp32", "bf16"}
    # A core does 1 GFLOP/s at least, in bf16 without instructions too, and below 10 TFLOP/s.
    assert all(1e9 < rate < 1e13 for rate in rates.values())
