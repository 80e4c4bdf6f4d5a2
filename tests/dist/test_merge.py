"""Merged weights are those of PEFT's `merge_and_unload`, and load in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import bases, reference
from support.bnb_repository import dequantized, load_stock, save_quantized, stored_tensors
from support.finished_runs import Sections, train_run, write_run
from support.ranks import RankPool
from support.sharded import CPU
from support.tiny import save_tiny_llama, tiny_recipe
from support.tokenizer import save_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fsdpq.errors import FsdpqError
from fsdpq.plan.disk import export_bytes
from fsdpq.plan.shapes import shape_from_directory
from fsdpq.plan.weights import plan_weights
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.header import read_header
from fsdpq.worker.bench.allocations import Allocations
from fsdpq.worker.merge import weights
from fsdpq.worker.merge.run import MergeOptions, merge_run

LORA: Sections = {"adapter": {"kind": "lora", "rank": 4, "alpha": 16.0}}
RUNS: dict[str, Sections] = {
    "lora": LORA,
    "rslora": {"adapter": LORA["adapter"] | {"use_rslora": True, "target_modules": ["q_proj"]}},
    "dora": {"adapter": LORA["adapter"] | {"kind": "dora"}},
    "pissa": {
        "adapter": LORA["adapter"] | {"init": "pissa"},
        "quantization": {"kind": "none"},
    },
    "saved": {"adapter": LORA["adapter"] | {"modules_to_save": ["lm_head", "input_layernorm"]}},
    "bf16": LORA | {"model": {"dtype": "bf16"}},
}


def train_all(root: Path, base: Path) -> None:
    """Trains every run on the same base."""
    for name, sections in RUNS.items():
        train_run(root / name, base, sections)


def merge(run: Path, out: Path, options: dict[str, Any]) -> str:
    """Merges on this rank; returns the error's message, if any."""
    try:
        merge_run(RunFiles(run), MergeOptions(out, **options), CPU)
    except FsdpqError as error:
        return error.message
    return ""


@pytest.fixture(scope="module")
def project(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base/``, an fp32 model, and runs over it by their names."""
    root = tmp_path_factory.mktemp("merge")
    base = save_tokenizer(save_tiny_llama(root / "base", tied=False))
    ranks.run(1, train_all, root, base)
    return root


def written(ranks: RankPool, run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Merges and returns the receipt."""
    assert ranks.run(1, merge, run, out, options) == [""]
    return json.loads((out / "merge.json").read_text())


def tensor_bytes(directory: Path) -> int:
    """Returns the bytes of all tensors in the files of ``directory``."""
    headers = [read_header(path) for path in directory.glob("*.safetensors")]
    return sum(entry.num_bytes for header in headers for entry in header.entries.values())


def planned_bytes(project: Path, name: str, **export: Any) -> int:
    """Returns what a plan says that a run leaves behind."""
    sections = RUNS[name] | {"export": {"format": "peft"} | export}
    recipe = tiny_recipe(**sections, launch={"nproc_per_node": 1})
    shape = shape_from_directory(project / "base")
    return export_bytes(recipe, shape, plan_weights(recipe, shape))


def peft_weights(base: nn.Module, run: Path) -> dict[str, Tensor]:
    """Returns what PEFT merges."""
    model: Any = PeftModel.from_pretrained(base, run / "adapter")  # pyright: ignore[reportArgumentType]
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("name", "onto"),
    [
        ("lora", "dequantized"),
        ("lora", "original"),
        ("rslora", "dequantized"),
        ("dora", "dequantized"),
        ("dora", "original"),
        ("pissa", "dequantized"),
        ("saved", "dequantized"),
    ],
)
def test_merged_weights_are_those_of_peft(
    ranks: RankPool, project: Path, tmp_path: Path, name: str, onto: str
) -> None:
    out = tmp_path / "out"
    receipt = written(
        ranks, project / name, out, onto=onto, compare_tokens=0, max_file_bytes=1 << 19
    )
    assert len(receipt["files"]) > 2
    assert receipt["likeness"] is None
    plain = onto == "original" or name == "pissa"
    load = reference.load_plain if plain else reference.load_dequantized
    expected = peft_weights(load(project / "base"), project / name)
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert found.keys() == expected.keys()
    # Both multiply in fp32; rows of a product may be summed in another order than the whole.
    for tensor, value in expected.items():
        assert torch.allclose(found[tensor], value, rtol=0, atol=1e-6), tensor
    base = load(project / "base").state_dict()
    for weight, one in receipt["merged"]["weights"].items():
        change = expected[weight] - base[weight]
        assert one["change_norm"] == pytest.approx(change.norm().item(), rel=1e-4)
        assert one["relative_error"] == 0.0, "fp32 keeps all"
    assert {w for w in expected if not torch.equal(expected[w], base[w])} == set(
        receipt["merged"]["weights"]
    ), "every changed weight is in the receipt, no other"
    assert not list(tmp_path.glob(".*partial"))
    adapter_bytes = tensor_bytes(project / name / "adapter")
    assert planned_bytes(project, name) == adapter_bytes
    assert planned_bytes(project, name, merge=True) == adapter_bytes + tensor_bytes(out)


def token_losses(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of the next tokens, and the mean loss."""
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, :-1].double()
    own = logits.log_softmax(dim=-1)
    return own, nn.functional.nll_loss(own, ids[0, 1:])


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_the_receipt_says_how_like_the_trained_model_a_bf16_merge_answers(
    ranks: RankPool, project: Path, tmp_path: Path, onto: str
) -> None:
    from transformers import AutoTokenizer

    from fsdpq.worker.merge.compare import FIXED_TEXT

    out, run = tmp_path / "out", project / "bf16"
    receipt = written(ranks, run, out, onto=onto, dtype="bf16")
    ids = torch.tensor([AutoTokenizer.from_pretrained(project / "base")(FIXED_TEXT).input_ids])
    # The trained model: weights dequantized in bf16, the sum with the change in fp32.
    base = reference.load_dequantized(project / "base", dtype=torch.bfloat16).float()
    trained = PeftModel.from_pretrained(base, run / "adapter")  # pyright: ignore[reportArgumentType]
    own, loss = token_losses(trained, ids)
    merged, merged_loss = token_losses(
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), ids
    )
    divergence = nn.functional.kl_div(merged, own, log_target=True, reduction="none").sum(-1)
    models = receipt["likeness"]["models"]
    assert receipt["likeness"]["tokens"] == ids.shape[1] - 1
    assert models["trained"]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert models["merged"]["loss"] == pytest.approx(merged_loss.item(), abs=1e-5)
    # fp32 forwards: divergences below about 1e-7 are rounding.
    assert models["merged"]["mean_kl"] == pytest.approx(
        divergence.mean().item(), rel=0.05, abs=2e-7
    )
    assert models["merged"]["max_kl"] == pytest.approx(divergence.max().item(), rel=0.05, abs=1e-6)
    assert models["base"]["mean_kl"] > 50 * models["merged"]["mean_kl"]
    assert "is the trained model" in receipt["verdict"][0]


def test_a_cast_is_made_once_and_what_it_leaves_of_the_change_is_told(
    ranks: RankPool, project: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", project / "lora"
    receipt = written(ranks, run, out, dtype="bf16", compare_tokens=0)
    base = reference.load_dequantized(project / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    whole = peft_weights(base, run)
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    change = survived = error = 0.0
    for name, value in whole.items():
        assert torch.equal(found[name], value.bfloat16()), name
        if name in receipt["merged"]["weights"]:
            kept = found[name].double() - before[name].double()
            change += (value - before[name]).double().square().sum().item()
            survived += kept.square().sum().item()
            error += (kept - (value - before[name]).double()).square().sum().item()
    told = receipt["merged"]["all"]
    assert told["change_norm"] == pytest.approx(change**0.5, rel=1e-5)
    assert told["survived_norm"] == pytest.approx(survived**0.5, rel=1e-5)
    assert told["relative_error"] == pytest.approx((error / change) ** 0.5, rel=1e-3)
    assert 0.001 < told["relative_error"] < 0.1


def test_nf4_again_is_what_bitsandbytes_makes_of_the_merged_weights(
    ranks: RankPool, project: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", project / "saved"
    receipt = written(ranks, run, out, requantize="nf4")
    merged = peft_weights(reference.load_dequantized(project / "base"), run)
    stock = load_stock(out)
    again = dequantized(stock)
    assert len(again) == 7 * 3
    for layer, weight in again.items():
        assert torch.allclose(
            weight, reference.round_weight(merged[f"{layer}.weight"]), rtol=0, atol=1e-6
        ), layer
    assert torch.allclose(stock.state_dict()["lm_head.weight"], merged["lm_head.weight"], atol=1e-6)
    told = receipt["requantized"]["weights"]["lm_head.weight"]
    assert told["relative_error"] == 0.0, "what stays unquantized keeps its change"
    assert 0.05 < receipt["requantized"]["kinds"]["mlp.up_proj"]["relative_error"] < 1
    models = receipt["likeness"]["models"]
    assert models["merged"]["mean_kl"] < 1e-7 < models["requantized"]["mean_kl"]
    assert "Quantizing again (nf4)" in receipt["verdict"][1]


HQQ: Sections = LORA | {"quantization": {"kind": "hqq", "nbits": 4, "group_size": 64}}


def logits_from(base: Path) -> Tensor:
    """Returns the logits of a model loaded from a base of fsdpq's own, without an adapter."""
    sections = HQQ | {"adapter": {"kind": "lora", "rank": 4, "alpha": 16.0}}
    assembled = bases.assemble_from(base, base, sections)
    ids = torch.tensor([[5, 17, 230, 44]])
    with torch.no_grad():
        return assembled.model.eval().hf(input_ids=ids).logits[0]  # pyright: ignore


def test_hqq_again_is_a_base_that_recipes_name(
    ranks: RankPool, project: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", project / "lora"
    receipt = written(ranks, run, out, requantize="hqq")
    assert receipt["requantize_options"]["nbits"] == 4
    found = ranks.run(1, logits_from, out)[0]
    trained = PeftModel.from_pretrained(
        reference.load_dequantized(project / "base"),  # pyright: ignore[reportArgumentType]
        run / "adapter",
    )
    with torch.no_grad():
        expected = trained(input_ids=torch.tensor([[5, 17, 230, 44]])).logits[0]
        untrained = reference.load_plain(project / "base")(
            input_ids=torch.tensor([[5, 17, 230, 44]])
        ).logits[0]
    # Rounding to 4 bits moves logits by less than a fifth of what training did.
    assert (found - expected).norm() < 0.2 * (untrained - expected).norm()
    assert "transformers does not load it" in (out / "README.md").read_text()


def merge_from_bases(root: Path, outs: Path) -> list[str]:
    """Trains over a 4-bit repository and a base of fsdpq's own; merges each; returns messages."""
    own = outs / "own"
    bases.write(root / "base", own, {})
    for path in (root / "base").glob("*.json"):
        if path.name != "model.safetensors.index.json":
            (own / path.name).write_bytes(path.read_bytes())
    messages: list[str] = []
    files = write_run(outs / "run-own", own, LORA)
    lock = json.loads(files.lock.read_text())
    key = json.loads((own / "base.json").read_text())["key"]
    lock["inputs"]["base"] = {"directory": str(own), "key": key}
    files.lock.write_text(json.dumps(lock))
    (root / "lora" / "adapter").rename(files.adapter)
    try:
        for onto in ("original", "dequantized"):
            messages.append(
                merge(files.root, outs / f"own-{onto}", {"onto": onto, "compare_tokens": 0})
            )
    finally:
        files.adapter.rename(root / "lora" / "adapter")
    return messages


def test_a_base_without_originals_is_merged_into_as_it_was_trained_over(
    ranks: RankPool, project: Path, tmp_path: Path
) -> None:
    refused, done = ranks.run(1, merge_from_bases, project, tmp_path)[0]
    assert "there is no original to merge into" in refused
    assert done == ""
    # A quantized base holds the same bits as quantizing again.
    again = tmp_path / "again"
    written(ranks, project / "lora", again, compare_tokens=0)
    first, second = stored_tensors(again), stored_tensors(tmp_path / "own-dequantized")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_repository_of_4_bit_weights_comes_out_unquantized(
    ranks: RankPool, tmp_path: Path
) -> None:
    repository = save_tokenizer(
        save_quantized(tmp_path, dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
    )
    sections = LORA | {"model": {"dtype": "bf16"}}
    ranks.run(1, train_run, tmp_path / "run", repository, sections)
    options = {"onto": "original"}
    message = ranks.run(1, merge, tmp_path / "run", tmp_path / "no", options)[0]
    assert "there is no original" in message
    assert not (tmp_path / "no").exists()
    receipt = written(ranks, tmp_path / "run", tmp_path / "out")
    assert receipt["dtype"] == "bf16"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    stock = dequantized(load_stock(repository, torch.bfloat16))
    [a, b] = [
        stored_tensors(tmp_path / "run" / "adapter")[
            f"base_model.model.model.layers.1.mlp.up_proj.lora_{each}.weight"
        ]
        for each in "AB"
    ]
    expected = stock["model.layers.1.mlp.up_proj"].float() + 4.0 * (b @ a)
    found = plain.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-6)


MIXTRAL: dict[str, Any] = {
    "family": "mixtral", "tied": False, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_a_mixture_keeps_the_names_of_its_checkpoint(
    ranks: RankPool, tmp_path: Path, onto: str
) -> None:
    base = save_tokenizer(save_tiny_llama(tmp_path / "base", **MIXTRAL))
    ranks.run(1, train_run, tmp_path / "run", base, LORA)
    receipt = written(ranks, tmp_path / "run", tmp_path / "out", onto=onto)
    before, after = stored_tensors(base), stored_tensors(tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in after
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    load = reference.load_plain if onto == "original" else reference.load_dequantized
    expected = peft_weights(load(base), tmp_path / "run")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-6), name
    models = receipt["likeness"]["models"]
    assert models["merged"]["mean_kl"] < 0.1 * models["base"]["mean_kl"]


def test_a_delta_comes_out_as_a_whole_model(ranks: RankPool, tmp_path: Path) -> None:
    base = save_tokenizer(save_tiny_llama(tmp_path / "base"))
    sections: Sections = {
        "adapter": {"kind": "llama_pro", "num_new_layers": 3},
        "export": {"format": "delta"},
    }
    ranks.run(1, train_run, tmp_path / "run", base, sections)
    receipt = written(ranks, tmp_path / "run", tmp_path / "out", onto="original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    tensors, old = model.state_dict(), reference.load_plain(base).state_dict()
    trained = stored_tensors(tmp_path / "run" / "delta")
    assert set(receipt["merged"]["weights"]) == trained.keys()
    for name, value in trained.items():
        assert torch.equal(tensors[name], value)
    for layer, source in enumerate([0, 0, 1, 1, 2, 2]):
        kept = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert torch.equal(kept, old[f"model.layers.{source}.self_attn.q_proj.weight"])
    # New layers start as identities: the model before training is the base.
    models = receipt["likeness"]["models"]
    assert models["base"]["loss"] > models["merged"]["loss"]
    assert receipt["merged"]["all"]["base_norm"] == 0.0


CHUNK = 1 << 14


def peak_of_merge(run: Path, out: Path, options: dict[str, Any]) -> int:
    """Merges with small chunks; returns the peak of allocations in bytes."""
    weights.CHUNK_WEIGHTS = CHUNK
    with Allocations() as record:
        assert merge(run, out, options) == ""
    return record.peak_bytes


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_memory_is_a_few_chunks_however_large_the_model_is(
    ranks: RankPool, tmp_path: Path, onto: str
) -> None:
    base = save_tokenizer(save_tiny_llama(tmp_path / "base", tied=False, intermediate_size=2048))
    ranks.run(1, train_run, tmp_path / "run", base, LORA)
    peak = ranks.run(
        1, peak_of_merge, tmp_path / "run", tmp_path / "out",
        {"onto": onto, "compare_tokens": 0},
    )[0]  # fmt: skip
    model = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    largest = 2048 * 192
    # A dozen chunks in fp32, A of one layer, the packed bytes of the largest matrix and what
    # bitsandbytes needs to make them (20 bytes a weight of a sixteenth).
    bound = 12 * 4 * CHUNK + 4 * 4 * 2048 + (4 * largest if onto == "dequantized" else 0)
    assert peak < bound < model / 4


def test_another_models_adapter_is_refused_and_leaves_nothing(
    ranks: RankPool, project: Path, tmp_path: Path
) -> None:
    other = save_tokenizer(save_tiny_llama(tmp_path / "other", intermediate_size=256))
    files = write_run(tmp_path / "run", other, LORA)
    files.adapter.mkdir()
    for path in (project / "lora" / "adapter").iterdir():
        (files.adapter / path.name).write_bytes(path.read_bytes())
    message = ranks.run(1, merge, files.root, tmp_path / "out", {})[0]
    assert "cannot be merged" in message
    assert "`model.layers.0.mlp.down_proj` is [192, 256], its A and B have shapes" in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))
