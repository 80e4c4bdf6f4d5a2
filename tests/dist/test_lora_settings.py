"""LoRA's first values, targets and saved modules equal stock PEFT's, sharded and after export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import reference
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch import Tensor, nn

from fsdpq.dist import gather_whole
from fsdpq.errors import RecipeError
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.export.formats import FORMATS

Sections = dict[str, dict[str, Any]]
PLAIN = {"kind": "none"}
LR = 1e-3
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]
STEPS = [random_rows(6, seed=index) for index in range(3)]


def _weights(assembled: Assembled) -> dict[str, Tensor]:
    found = {}
    for name, layer in assembled.adapted_layers.items():
        for attribute in ("lora_A", "lora_B"):
            found[f"{name}.{attribute}"] = gather_whole(getattr(layer, attribute)).clone()
    return found


def _eval_loss(model: nn.Module) -> float:
    """Returns the loss of some rows by our own forward, without training."""
    from fsdpq.data.dealing.collate import build_step
    from fsdpq.training.step import evaluate

    step = build_step(
        random_rows(6, seed=9), micro_batch_size=6,
        rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size(),
    )  # fmt: skip
    return evaluate(model, [step], device=torch.device("cpu"))


def train_and_export(base: Path, exported: Path, sections: Sections) -> dict[str, Any]:
    """Trains, exports, loads the export into a fresh model; returns what each stage computes."""
    assembled = assemble(base, **sections)
    first = _weights(assembled)
    losses, norms = train(assembled, STEPS, micro_batch_size=2, lr=LR, max_norm=None)
    FORMATS["peft"].save(
        tiny_recipe(**sections), Inputs(base, None, Path("rows.jsonl")), assembled, exported
    )
    trained = _eval_loss(assembled.model)
    torch.distributed.barrier()
    again = assemble(base, **sections)
    FORMATS["peft"].load(again, exported)
    return {
        "first": first, "losses": losses, "norms": norms, "trained": trained,
        "again": _eval_loss(again.model), "adapted": sorted(assembled.adapted_layers),
        "saved": {name: p.dtype for name, p in assembled.trained_base.items()},
    }  # fmt: skip


def _check(
    answers: list[dict[str, Any]], peft_model: nn.Module, fresh: nn.Module, exported: Path
) -> None:
    """Compares losses, gradient norms, and the loss of the export loaded by stock PEFT."""
    expected = reference.train(peft_model, STEPS, lr=LR, max_norm=1e9)
    stock = PeftModel.from_pretrained(fresh, exported)  # pyright: ignore
    with torch.no_grad():
        stock_loss = reference.batch_loss(stock.eval(), random_rows(6, seed=9)).item()
    for answer in answers:
        # fp32 sums in another order, amplified by Adam: 1e-5 relative.
        assert answer["losses"] == pytest.approx(expected[0], rel=1e-5)
        assert answer["norms"] == pytest.approx(expected[1], rel=2e-5)
        assert answer["trained"] == pytest.approx(stock_loss, rel=1e-5)
        assert answer["again"] == pytest.approx(answer["trained"], rel=1e-5)


def _peft(model: nn.Module, first: dict[str, Tensor], **options: Any) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, **options)
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    for name, weight in first.items():
        layer, _, attribute = name.rpartition(".")
        module = peft_model.get_submodule(f"base_model.model.{layer}")
        getattr(module, attribute)["default"].weight.data.copy_(weight)
    return peft_model


@pytest.mark.parametrize(("num_ranks", "init", "rslora"), [(3, "pissa", False), (2, "olora", True)])
def test_adapters_taken_from_the_base_are_pefts(
    ranks: RankPool, tmp_path: Path, num_ranks: int, init: str, rslora: bool
) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=False)
    adapter = {"rank": 4, "alpha": 8.0, "init": init, "use_rslora": rslora}
    sections = {"adapter": adapter, "quantization": PLAIN}
    answers = ranks.run(num_ranks, train_and_export, base, tmp_path / "out", sections)
    peft_model = _peft(
        reference.load_plain(base), {}, target_modules="all-linear", init_lora_weights=init,
        use_rslora=rslora,
    )  # fmt: skip
    for name, ours in answers[0]["first"].items():
        layer, _, attribute = name.rpartition(".")
        theirs = getattr(peft_model.get_submodule(f"base_model.model.{layer}"), attribute)
        # The same decomposition of the same matrix by LAPACK.
        assert torch.allclose(ours, theirs["default"].weight, rtol=1e-4, atol=1e-5), name
    _check(answers, peft_model, reference.load_plain(base), tmp_path / "out")


@pytest.mark.parametrize(
    ("saved", "tied", "quantization"),
    [
        (["lm_head", "input_layernorm", "model.norm"], False, {"kind": "bnb"}),
        (["embed_tokens", "lm_head"], True, {"kind": "bnb"}),
        (["mlp.gate_proj", "embed_tokens"], False, PLAIN),
    ],
)
def test_saved_modules_are_trained_and_saved_as_peft_does(
    ranks: RankPool, tmp_path: Path, saved: list[str], tied: bool, quantization: dict[str, Any]
) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=tied)
    sections = {"adapter": {"rank": 4, "alpha": 8.0, "modules_to_save": saved}}
    sections["quantization"] = quantization
    answers = ranks.run(2, train_and_export, base, tmp_path / "out", sections)
    load = reference.load_plain if quantization is PLAIN else reference.load_dequantized
    targets = sorted({name.rpartition(".")[2] for name in answers[0]["adapted"]})
    # PEFT unties tied weights and trains two copies: the reference ties them again.
    peft_model = _peft(
        load(base), answers[0]["first"], target_modules=targets, modules_to_save=saved,
        ensure_weight_tying=tied,
    )  # fmt: skip
    assert set(answers[0]["saved"].values()) == {torch.float32}
    assert ("gate_proj" in targets) == ("mlp.gate_proj" not in saved)
    _check(answers, peft_model, load(base), tmp_path / "out")


def masters(base: Path, sections: Sections) -> tuple[set[torch.dtype], float, float]:
    """Returns the dtypes of what is trained, and the losses of the first and last step."""
    assembled = assemble(base, **sections)
    losses, _ = train(assembled, STEPS[:1] * 4, micro_batch_size=2, lr=1e-2, max_norm=None)
    return {p.dtype for p in assembled.trainable}, losses[0], losses[-1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saved_modules_are_fp32_masters_beside_a_bf16_base(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    base = save_tiny_llama(tmp_path, tied=False)
    adapter = {"kind": kind, "rank": 4, "alpha": 8.0, "modules_to_save": ["lm_head", "model.norm"]}
    for answer in ranks.run(2, masters, base, {"adapter": adapter, "model": {"dtype": "bf16"}}):
        assert answer[0] == {torch.float32}
        assert answer[2] < 0.9 * answer[1], "it learns the batch that it sees again"


def refusal(base: Path, sections: Sections) -> str:
    """Returns what is said instead of a model."""
    try:
        assemble(base, **sections)
    except RecipeError as error:
        [problem] = error.problems
        return f"{problem.key}: {problem.message} / {problem.hint}"
    return ""


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "shares its weight.*name `lm_head` too"),
        ({"modules_to_save": ["embed_token"]}, "no module `embed_token`.*embed_tokens"),
        ({"kind": "dora", "modules_to_save": ["input_layernorm"]}, "magnitudes.*outside"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused(
    ranks: RankPool, tmp_path: Path, adapter: dict[str, Any], message: str
) -> None:
    import re

    base = save_tiny_llama(tmp_path, tied=True)
    [said] = ranks.run(1, refusal, base, {"adapter": adapter})
    assert re.search(f"^adapter.modules_to_save: .*{message}", said), said


def adapted(base: Path, targets: str) -> tuple[list[str], Tensor]:
    """Returns the adapted layers, and one of the matrices A."""
    adapter = {"rank": 64, "target_modules": targets, "init": "gaussian"}
    assembled = assemble(base, adapter=adapter)
    weights = _weights(assembled)
    return sorted(assembled.adapted_layers), next(iter(weights.values()))


def test_a_pattern_adapts_the_layers_that_it_adapts_in_peft(
    ranks: RankPool, tmp_path: Path
) -> None:
    base = save_tiny_llama(tmp_path)
    pattern = r".*layers\.[02]\.(self_attn\.[qv]|mlp\.down)_proj"
    one, a = ranks.run(1, adapted, base, pattern)[0]
    three, same_a = ranks.run(3, adapted, base, pattern)[0]
    model: Any = get_peft_model(
        reference.load_plain(base),  # pyright: ignore[reportArgumentType]
        LoraConfig(target_modules=pattern),
    )
    theirs = sorted(
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    )
    assert one == three == theirs
    assert torch.equal(a, same_a), "values do not depend on the number of ranks"
    # 12288 draws: the deviation is known to 0.7 per cent, four times that is allowed.
    assert a.std().item() == pytest.approx(1 / 64, rel=0.03)
