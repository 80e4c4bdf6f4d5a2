"""Every combination of dtypes: what is held, gathered, reduced and computed in which, and the loss.

References are PEFT and transformers with masters in plain torch. Presets are names of combinations,
so every preset is here as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import reference
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.protocols import BASE, DTYPES
from fsdpq.recipe.precision import precision_of
from fsdpq.training.scaler import INITIAL_SCALE, LossScaler
from fsdpq.worker.assemble import Assembled

Sections = dict[str, dict[str, Any]]

NUM_STEPS = 2
BATCH = 8
LR = 1e-3
SMALL_LR = 1e-5
"""Steps that a magnitude near 0.3 in bf16 rounds away."""
FULL: Sections = {"adapter": {"kind": "none"}, "quantization": {"kind": "none"}}
DORA = {"kind": "dora", "rank": 4, "alpha": 8.0}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One ``fsdp.precision``, and the dtypes that it means.

    Attributes:
        written: the preset or the combination.
        dtype: ``model.dtype`` as the recipe gives it.
        param: of trained weights and their gradients.
        base: of the weights that layers see, when they are gathered.
        autocast: what forward autocasts to.
        reduce: of gradients while they are summed.
        rel: how far losses may be from plain torch's in the same dtypes.
    """

    written: str | dict[str, str]
    dtype: str
    param: torch.dtype
    base: torch.dtype
    autocast: torch.dtype | None
    reduce: torch.dtype = FP32
    rel: float = 5e-4

    @property
    def sections(self) -> Sections:
        return {"fsdp": {"precision": self.written}, "model": {"dtype": self.dtype}}


# bf16 keeps 8 bits, and roundings average out over tokens: seen are 1.2e-4 in the losses. fp16 keeps
# 11 bits: 2e-5. Norms are sums over fewer numbers after more roundings: 20 times that.
CASES = {
    "fp32": Case("fp32", "fp32", FP32, FP32, None, rel=1e-6),
    "auto in bf16": Case("auto", "bf16", FP32, BF16, None),
    "auto in fp16": Case("auto", "fp16", FP32, FP16, None, rel=5e-5),
    "bf16": Case("bf16", "bf16", BF16, BF16, None),
    "fp16_autocast": Case("fp16_autocast", "fp32", FP32, FP32, FP16, rel=5e-5),
    "bf16_autocast": Case("bf16_autocast", "fp32", FP32, FP32, BF16),
    "bf16_buffers_autocast": Case("bf16_buffers_autocast", "bf16", BF16, BF16, BF16),
    "bf16 reduction": Case({"reduce": "bf16"}, "fp32", FP32, FP32, None, BF16, rel=5e-5),
    "bf16 masters": Case({"param": "bf16", "compute": "fp32"}, "fp32", BF16, FP32, None, rel=5e-5),
    "bf16 base under autocast": Case(
        {"compute": "bf16", "buffers": "fp32", "reduce": "bf16"}, "bf16", FP32, BF16, BF16, BF16
    ),
    "fp16 base under autocast": Case(
        {"compute": "fp16", "buffers": "fp32", "reduce": "bf16"},
        "fp16", FP32, FP16, FP16, BF16, rel=5e-5,
    ),
    "all in bf16": Case(
        {"param": "bf16", "compute": "bf16", "reduce": "bf16", "buffers": "bf16"},
        "bf16", BF16, BF16, None, BF16,
    ),
}  # fmt: skip
WRITTEN_OUT = {
    "fp32": {"param": "fp32", "compute": "fp32", "reduce": "fp32", "buffers": "fp32"},
    "bf16": {"param": "bf16", "compute": "bf16", "reduce": "fp32", "buffers": "bf16"},
    "fp16_autocast": {"param": "fp32", "compute": "fp16", "reduce": "fp32", "buffers": "fp32"},
    "bf16_autocast": {"param": "fp32", "compute": "bf16", "reduce": "fp32", "buffers": "fp32"},
    "bf16_buffers_autocast": {
        "param": "bf16", "compute": "bf16", "reduce": "fp32", "buffers": "fp32",
    },
}  # fmt: skip
"""The presets of the first script as combinations."""


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(NUM_STEPS * BATCH, shortest=4, longest=12)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


class Reductions(TorchDispatchMode):
    """Records the dtypes of what is summed over ranks, along the axes of the mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in func.__name__:
            self.dtypes.add(args[1].dtype)
            self.operators.add("reduce_scatter")
        elif "allreduce" in func.__name__:
            self.dtypes |= {tensor.dtype for tensor in args[0]}
            self.operators.add("all_reduce")
        return func(*args, **(kwargs or {}))


def observe(assembled: Assembled) -> dict[str, set[Any]]:
    """Runs one forward and backward; returns the dtypes that are seen on the way."""
    weights: set[torch.dtype] = set()
    products: set[torch.dtype] = set()
    layer: Any = assembled.model.decoder_layers[1]

    def look(module: nn.Module, _args: Any, output: Tensor) -> None:
        base = getattr(module, BASE, module)
        weights.update(p.dtype for p in (*base.parameters(), layer.input_layernorm.weight))
        products.add(output.dtype)

    hook = layer.mlp.up_proj.register_forward_hook(look)
    step = build_step(
        batches()[0], micro_batch_size=4, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    batch = step.micro_batches[0]
    with Reductions() as reductions:
        assembled.model(batch.input_ids, batch.loss_positions, batch.targets).backward()
    hook.remove()
    gradients = {p.grad.dtype for p in assembled.trainable if p.grad is not None}
    for parameter in assembled.trainable:
        parameter.grad = None
    return {
        "weights": {dtype for dtype in weights if dtype.is_floating_point},
        "products": products,
        "reduced": reductions.dtypes,
        "operators": reductions.operators,
        "gradients": gradients,
        "params": {p.dtype for p in assembled.trainable},
        "rope": {b.dtype for n, b in assembled.model.named_buffers() if n.endswith("inv_freq")},
    }


def run(directory: Path, sections: Sections) -> dict[str, Any]:
    """Trains on this rank; returns losses, norms, dtypes and the trained weights."""
    assembled = assemble(directory, **sections)
    layers: dict[str, Any] = dict(assembled.adapted_layers)
    initial = {name: gather_whole(layer.lora_A).clone() for name, layer in layers.items()}
    dtypes = observe(assembled)
    scales = precision_of(tiny_recipe(**sections)).scales_loss
    losses, norms = train(
        assembled,
        batches(),
        micro_batch_size=4,
        lr=LR,
        max_norm=1.0,
        scaler=LossScaler() if scales else None,
    )
    trained = [gather_whole(p).clone() for p in assembled.trainable]
    return {
        "dtypes": dtypes, "losses": losses, "norms": norms, "initial": initial, "trained": trained,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def expected_of(case: Case, model: nn.Module) -> tuple[list[float], list[float]]:
    """Returns losses and norms of plain torch: masters in ``param``, weights in ``base``."""
    masters = [p.detach().to(case.param) for p in model.parameters() if p.requires_grad]
    return reference.train_with_masters(
        model.to(case.base),
        masters,
        batches(),
        lr=LR,
        max_norm=1.0,
        autocast=case.autocast,
        loss_scale=INITIAL_SCALE if FP16 in (case.base, case.autocast) else 1.0,
    )


def check(
    answer: dict[str, Any],
    case: Case,
    expected: tuple[list[float], list[float]],
    fp32: tuple[list[float], list[float]],
) -> None:
    """Compares one rank with the case's dtypes, with plain torch in them, and with fp32."""
    assert answer["dtypes"] == {
        "weights": {case.base},
        "products": {case.autocast or case.base},
        "reduced": {case.reduce},
        "operators": {"reduce_scatter"},
        "gradients": {case.param},
        "params": {case.param},
        "rope": {FP32},
    }
    assert answer["losses"] == pytest.approx(expected[0], rel=case.rel)
    assert answer["norms"] == pytest.approx(expected[1], rel=20 * case.rel)
    # What 16 bits cost, whoever computes in them: at most 4.2e-4 is seen.
    assert answer["losses"] == pytest.approx(fp32[0], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_lora_in_every_precision_equals_peft_with_masters(
    ranks: RankPool, tiny: Path, name: str
) -> None:
    case = CASES[name]
    answers = ranks.run(2, run, tiny, case.sections)
    models = [
        reference.with_peft_lora(
            # The base is quantized from what it is held in, as fsdpq does.
            reference.load_dequantized(tiny, dtype=dtype), answers[0]["initial"], rank=4
        )
        for dtype in (case.base, FP32)
    ]  # fmt: skip
    expected, fp32 = expected_of(case, models[0]), expected_of(CASES["fp32"], models[1])
    for answer in answers:
        check(answer, case, expected, fp32)
    if name in WRITTEN_OUT:
        written_out = {"fsdp": {"precision": WRITTEN_OUT[name]}, "model": {"dtype": case.dtype}}
        for answer, other in zip(answers, ranks.run(2, run, tiny, written_out), strict=True):
            assert other["losses"] == answer["losses"]
            pairs = zip(other["trained"], answer["trained"], strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize(
    "name",
    ["auto in bf16", "auto in fp16", "bf16", "fp16_autocast", "bf16_autocast", "bf16 masters",
     "bf16 base under autocast"],
)  # fmt: skip
def test_full_finetuning_in_every_precision_equals_plain_torch_with_masters(
    ranks: RankPool, tiny: Path, name: str
) -> None:
    case = CASES[name]
    expected = expected_of(case, reference.load_plain(tiny))
    fp32 = expected_of(CASES["fp32"], reference.load_plain(tiny))
    for answer in ranks.run(2, run, tiny, case.sections | FULL):
        check(answer, case, expected, fp32)


def observe_hybrid(directory: Path, sections: Sections) -> dict[str, set[Any]]:
    """Returns what one forward and backward show."""
    return observe(assemble(directory, **sections))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_axes_of_a_hybrid_mesh_sum_in_the_told_dtype(
    ranks: RankPool, tiny: Path, dtype: str
) -> None:
    fsdp = {"strategy": "hybrid_full_shard", "precision": {"reduce": dtype, "param": "bf16"}}
    for answer in ranks.run(4, observe_hybrid, tiny, {"fsdp": fsdp, "adapter": DORA}):
        assert answer["operators"] == {"reduce_scatter", "all_reduce"}
        assert answer["reduced"] == {DTYPES[dtype]}
        assert answer["gradients"] == answer["params"] == {BF16, FP32}, "magnitudes are fp32"


def run_dora(directory: Path, sections: Sections) -> dict[str, Any]:
    """Trains DoRA on this rank; returns what PEFT needs to start there too, and what comes out."""
    assembled = assemble(directory, **sections)
    layers: dict[str, Any] = dict(assembled.adapted_layers)
    bases = {name: layer._whole_base(BF16, CPU).clone() for name, layer in layers.items()}
    initial = {name: gather_whole(layer.lora_A).float() for name, layer in layers.items()}
    losses, norms = train(
        assembled,
        batches(),
        micro_batch_size=2,
        lr=SMALL_LR,
        max_norm=1.0,
        no_sync=sections["fsdp"].get("no_sync", False),
    )
    return {
        "bases": bases,
        "initial": initial,
        "losses": losses,
        "norms": norms,
        "dtypes": {n.rpartition(".")[2]: p.dtype for n, p in assembled.named_trainable.items()},
        "magnitudes": {n: gather_whole(layer.magnitude).clone() for n, layer in layers.items()},
    }


def layer_of(peft_name: str) -> str:
    """Returns the name of the layer that a magnitude of PEFT's belongs to."""
    return peft_name.removeprefix("base_model.model.").partition(".lora_magnitude")[0]


def peft_dora(directory: Path, answer: dict[str, Any]) -> tuple[nn.Module, list[Tensor]]:
    """Returns PEFT's DoRA over the rank's base in bf16, and its masters: magnitudes in fp32."""
    model = reference.load_plain(directory, BF16)
    for name, weight in answer["bases"].items():
        model.get_submodule(name).weight.data = weight
    model = reference.with_peft_lora(model, answer["initial"], rank=4, use_dora=True)
    masters: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.data = answer["bases"][layer_of(name)].float().norm(dim=1)
        else:
            parameter.data = parameter.data.to(BF16)
        masters.append(parameter.detach().clone())
    return model, masters


@pytest.mark.parametrize(
    ("quantization", "num_ranks", "fsdp", "training"),
    [
        ({"kind": "bnb"}, 2, {}, {"layer_chunks": 2}),
        ({"kind": "bnb", "quant_type": "fp4"}, 4, {"strategy": "hybrid_full_shard"}, {}),
        ({"kind": "hqq", "nbits": 4}, 2, {"offload": "cpu", "no_sync": True}, {}),
        ({"kind": "none"}, 2, {"strategy": "shard_grad_op"}, {}),
    ],
)
def test_dora_in_bf16_trains_fp32_magnitudes_as_peft(
    ranks: RankPool,
    tiny: Path,
    quantization: dict[str, Any],
    num_ranks: int,
    fsdp: dict[str, Any],
    training: dict[str, Any],
) -> None:
    sections: Sections = {
        "fsdp": {"precision": "bf16", **fsdp},
        "model": {"dtype": "bf16"},
        "adapter": DORA,
        "quantization": quantization,
        "training": training,
    }
    answers = ranks.run(num_ranks, run_dora, tiny, sections)
    model, masters = peft_dora(tiny, answers[0])
    losses, norms = reference.train_with_masters(
        model, masters, batches(), lr=SMALL_LR, max_norm=1.0
    )
    start = {name: base.float().norm(dim=1) for name, base in answers[0]["bases"].items()}
    theirs = {
        layer_of(name): parameter.detach() - start[layer_of(name)]
        for name, parameter in model.named_parameters()
        if "magnitude" in name
    }
    for answer in answers:
        assert answer["dtypes"] == {"lora_A": BF16, "lora_B": BF16, "magnitude": FP32}
        assert answer["losses"] == pytest.approx(losses, rel=5e-4)
        assert answer["norms"] == pytest.approx(norms, rel=1e-2)
        moves = {name: value - start[name] for name, value in answer["magnitudes"].items()}
        assert moves.keys() == theirs.keys()
        assert all((move != 0).all() for move in moves.values()), "in bf16 none would move"
        # Adam's first steps are as long for the smallest gradient, whose sign may be rounding's:
        # 2.6% of a layer's magnitudes at most are seen to differ by a tenth of a step.
        for name, move in moves.items():
            assert ((move - theirs[name]).abs() > 0.1 * SMALL_LR).float().mean() < 0.05


def held_buffers(directory: Path, sections: Sections) -> dict[str, tuple[torch.dtype, float]]:
    """Returns dtype and first value of every floating buffer."""
    return {
        name.rpartition(".")[2]: (buffer.dtype, buffer.flatten()[0].item())
        for name, buffer in assemble(directory, **sections).model.named_buffers()
        if buffer.is_floating_point()
    }


def test_buffers_are_held_as_told_and_rope_in_fp32(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path, tied=False, family="gemma3_text", head_dim=48)
    scale = torch.tensor(192**0.5)
    for written, dtype, held in [
        ("auto", "bf16", BF16),
        ({"compute": "bf16", "buffers": "fp32"}, "bf16", FP32),
        ({"compute": "bf16", "buffers": "bf16"}, "fp32", BF16),
    ]:
        sections = {"fsdp": {"precision": written}, "model": {"dtype": dtype}}
        found = ranks.run(1, held_buffers, directory, sections)[0]
        assert found.pop("embed_scale") == (held, scale.to(held).item())
        assert {name.rpartition("_attention_")[2] for name in found} == {
            "inv_freq", "original_inv_freq",
        }  # fmt: skip
        assert {kind for kind, _ in found.values()} == {FP32}
