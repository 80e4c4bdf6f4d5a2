"""The checks of the self-test notice what they are there for: each fault is put in and found."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.late_transfer import LateTransfer, late_activations
from support.ranks import RankPool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fsdpq import dist
from fsdpq.dist import Shard
from fsdpq.run_files.rows import CheckResult
from fsdpq.worker.self_test import (
    byte_checks,
    model_check,
    offload_checks,
    quantizer_checks,
    run,
    speed_check,
)
from fsdpq.worker.self_test.check import (
    Bench,
    Check,
    CheckFailedError,
    CheckSkippedError,
    require_close,
    require_same_bytes,
)

Fault = Callable[[pytest.MonkeyPatch], None]


def flip_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank's last code has one bit wrong."""
    build = quantizer_checks.build_quantizer

    def build_wrong(options: Any, in_features: int) -> Any:
        quantizer = build(options, in_features)
        right = quantizer.quantize_shards

        def quantize_shards(read: Any, shape: Any, shards: Mapping[str, Shard]) -> None:
            right(read, shape, shards)
            if shards["codes"].stop == shape[0] and shards["codes"].rows.numel():
                shards["codes"].rows[-1, -1] ^= 1

        quantizer.quantize_shards = quantize_shards
        return quantizer

    monkeypatch.setattr(quantizer_checks, "build_quantizer", build_wrong)


def rewrite_nans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered bytes went through bf16 -> fp32 -> bf16, as on CUDA: NaNs come out as one."""

    def damaged(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        even = flat[: flat.numel() // 2 * 2].clone().view(torch.bfloat16)
        even[even.isnan()] = torch.tensor(float("nan"), dtype=torch.bfloat16)
        return torch.cat([even.view(torch.uint8), flat[even.numel() * 2 :]]).reshape(tensor.shape)

    def gather(group: Any) -> dict[str, Tensor]:
        whole = right(group)
        return {n: damaged(t) if t.dtype is torch.uint8 else t for n, t in whole.items()}

    right = byte_checks.gather_group
    monkeypatch.setattr(byte_checks, "gather_group", gather)


def average_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP's default: gradients of two ranks come out halved."""
    monkeypatch.setattr(quantizer_checks, "apply_gradient_sums", lambda _model: None)


def shift_input_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the quantized product is off by 1%."""
    from fsdpq.model import quantized_linear

    right = quantized_linear._DequantizedProduct.backward

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return right(ctx, grad_output * 1.01)

    product = quantized_linear._DequantizedProduct
    monkeypatch.setattr(product, "backward", staticmethod(backward))


def shift_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's scale, and so its gradient, is off by 1%."""
    right = quantizer_checks.LoraLinear

    def build(layer: Any, options: Any) -> Any:
        linear = right(layer, options)
        linear.scaling *= 1.01
        return linear

    monkeypatch.setattr(quantizer_checks, "LoraLinear", build)


def shift_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dequantized weight is one unit in the last place too large somewhere."""
    from fsdpq.model.quantized_linear import QuantizedLinear

    right = QuantizedLinear.dequantize

    def dequantize(self: Any, packed: Any, dtype: torch.dtype) -> Tensor:
        weight = right(self, packed, dtype)
        weight[0, 0] = torch.nextafter(weight[0, 0], weight.new_tensor(torch.inf))
        return weight

    monkeypatch.setattr(QuantizedLinear, "dequantize", dequantize)


def forget_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank but the first trains without a quarter of its loss."""
    right = model_check.train_step

    def train_step(model: Any, step: Any, **given: Any) -> Any:
        if dist.rank() == 1:
            step.micro_batches[0].targets[:2] = 3
        return right(model, step, **given)

    monkeypatch.setattr(model_check, "train_step", train_step)


def copy_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault: activations move as on a device, where a CPU's would stay."""
    monkeypatch.setattr(offload_checks, "build_host_activations", late_activations)


def read_before_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for copies back."""
    copy_late(monkeypatch)
    monkeypatch.setattr(LateTransfer, "wait", lambda _self, _copied: None)


def results_of(prefixes: tuple[str, ...], fault: Fault | None) -> list[CheckResult]:
    """Runs the checks whose ``group/name`` begins so on this rank and combines all ranks."""
    bench = Bench(torch.device("cpu"), init_device_mesh("cpu", (dist.world_size(),)))
    chosen = [c for c in run.CHECKS if f"{c.group}/{c.name}".startswith(prefixes)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if fault is not None:
            fault(monkeypatch)
        every = [
            run.gather_results(run.run_check(check, bench), torch.distributed.group.WORLD)
            for check in chosen
        ]
    return [run.combine_results(results) for results in every]


SOME = (
    "bytes/",
    "offload/trained",
    "shards against the library's whole matrix/bnb nf4, double",
    "shards against the library's whole matrix/hqq 3",
    "dequantized weights against the library's/bnb fp4",
    "dequantized weights against the library's/hqq 3",
    "gradients against plain torch/bnb nf4",
    "gradients against plain torch/hqq 4",
    "training/",
)


def skip_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank adds what the first one does."""
    monkeypatch.setattr(speed_check, "rank", lambda: 0)


def speed_of(fault: Fault | None) -> str:
    """Returns what the speed check says on this rank, in a twentieth of a second."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(speed_check, "CPU_BYTES", 2**20)
        if fault is not None:
            fault(monkeypatch)
        try:
            return speed_check.measure_all_reduce(torch.device("cpu"), seconds=0.05)
        except CheckFailedError as error:
            return str(error)


def test_speed_counts_sums_and_compares_the_last_one(ranks: RankPool) -> None:
    assert re.fullmatch(
        r"\d+ sums of 1 MiB exact, \d+\.\d\d GB/s between 2 ranks", ranks.run(2, speed_of, None)[0]
    )
    assert re.fullmatch(r"\d+ sums of 1 MiB exact, on one rank", ranks.run(1, speed_of, None)[0])
    assert "the sum: " in ranks.run(2, speed_of, skip_a_rank)[0]


def test_nothing_is_wrong_without_a_fault(ranks: RankPool) -> None:
    found = ranks.run(2, results_of, SOME, None)[0]
    assert len(found) >= 10
    assert [(r.name, r.detail) for r in found if r.status != "passed"] == []


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        (flip_a_bit, "shards against the library's whole matrix/bnb nf4", "`codes`"),
        (flip_a_bit, "shards against the library's whole matrix/hqq 3 bit", "`codes`"),
        (rewrite_nans, "bytes/gather", "of 131193 bytes differ"),
        (rewrite_nans, "bytes/offload to the host", "bytes differ"),
        (read_before_the_copy, "offload/activations", "of 1048576 bytes differ"),
        (average_gradients, "gradients against plain torch/bnb nf4", "lora_A differs by 5.0e-01"),
        (shift_input_gradients, "gradients against plain torch/hqq 4 bit", "gradient of x"),
        (shift_lora, "gradients against plain torch/bnb fp4", "the output differs by"),
        (shift_dequantized, "dequantized weights against the library's/bnb nf4", "in bf16"),
        (forget_a_rank, "training/", "the loss differs by"),
    ],
)  # fmt: skip
def test_fault_is_found(ranks: RankPool, fault: Fault, check: str, says: str) -> None:
    found = ranks.run(2, results_of, (check,), fault)[0]
    assert found
    for result in found:
        assert result.status == "failed", result
        assert says in result.detail
        assert result.remedy


def test_activations_come_back_from_host_memory(ranks: RankPool) -> None:
    moved = ranks.run(1, results_of, ("offload/activations",), copy_late)[0]
    assert [r.status for r in moved] == ["passed"], moved
    on_cpu = ranks.run(1, results_of, ("offload/activations",), None)[0]
    assert [r.status for r in on_cpu] == ["skipped"]


def test_all_byte_values_stand_in_all_places() -> None:
    tensors = byte_checks.byte_tensors()
    positions = tensors["positions"]
    for place in range(8):
        assert len(set(positions[:, place].tolist())) == 256
    for name, shift in (("words", 0), ("shifted", 1)):
        flat = tensors[name].flatten()[shift:]
        words = flat[: flat.numel() // 2 * 2].clone().view(torch.int16)
        assert len(words.unique()) == 1 << 16, name
    assert all(tensor.shape[0] % 2 for tensor in tensors.values())


def test_first_different_byte_is_named() -> None:
    ours, theirs = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    with pytest.raises(CheckFailedError, match="1 of 8 bytes differ, the first is byte 6: 0x00"):
        require_same_bytes("x", ours, theirs)
    with pytest.raises(CheckFailedError, match="4 bytes instead of 8"):
        require_same_bytes("x", ours[:1], theirs)
    assert require_same_bytes("x", ours, ours.clone()) == 8


def test_one_percent_and_nan_are_not_close() -> None:
    right = torch.linspace(-1, 1, 50)
    assert require_close("x", right, right * (1 + 1e-7), tolerance=1e-5) < 1e-6
    for wrong in (right * 1.01, right * torch.nan):
        with pytest.raises(CheckFailedError):
            require_close("x", wrong, right, tolerance=1e-5)


def ends(error: Exception | None) -> CheckResult:
    def body(_bench: Bench) -> str:
        if error is not None:
            raise error
        return "5 bytes"

    bench: Any = None
    return run.run_check(Check("bytes", "gather", body, "update torch"), bench)


def test_what_cannot_run_is_skipped_and_what_raises_has_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    skipped = ends(CheckSkippedError("no GPU"))
    assert (skipped.status, skipped.detail, skipped.remedy) == ("skipped", "no GPU", "")
    raised = ends(ValueError("boom\nat length"))
    assert (raised.status, raised.detail) == ("failed", "raised ValueError: boom")
    assert raised.remedy == "update torch"
    assert "Traceback" in capsys.readouterr().err


def test_failure_of_one_rank_is_the_failure_of_all() -> None:
    good, bad = ends(None), ends(CheckFailedError("a byte differs"))
    assert run.combine_results([good, good]) == good
    assert run.combine_results([good, bad]).detail == "rank 1: a byte differs"
    assert run.combine_results([bad, bad]).detail == "all ranks: a byte differs"
    assert run.combine_results([bad]) == bad


def test_missing_library_is_skipped_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantizer_checks, "is_installed", lambda _package: False)
    bench: Any = None
    hqq = [c for c in quantizer_checks.CHECKS if c.name.startswith("hqq")]
    for check in hqq:
        result = run.run_check(check, bench)
        assert result.status == "skipped"
        assert "pip install 'fsdpq[hqq]'" in result.detail
    assert len(hqq) == 15


def test_watchdog_says_which_check_hung_and_what_this_rank_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[CheckResult] = []
    codes: list[int] = []
    monkeypatch.setattr(run, "end_process", codes.append)
    monkeypatch.setattr(run, "SPEAK_LATER_S", 0.05)
    check = Check("collectives", "all-reduce", lambda _bench: "", "update the driver")
    dog = run.Watchdog(written.append, limit_s=0.05)
    with dog.over(check):
        time.sleep(0.5)
    with dog.over(check):
        dog.found(ends(CheckFailedError("a byte differs")))
        time.sleep(0.5)
    with dog.over(check):
        dog.found(ends(None))
    waited, knows = written
    assert waited.name == "all-reduce"
    assert "rank 0 waited" in waited.detail
    assert "NCCL_P2P_DISABLE=1" in waited.remedy
    assert knows.detail == "rank 0: a byte differs"
    assert codes == [4, 4]
