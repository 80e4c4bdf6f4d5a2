"""What stock libraries do not reproduce never gets the name of a finished export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from support.tokenizer import save_tokenizer
from transformers import AutoTokenizer

from fsdpq.errors import ExportError
from fsdpq.metrics.sinks import NoSink
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RunSummary
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.export.finish import Trained, check_exportable, export_run
from fsdpq.worker.export.formats import FORMATS
from fsdpq.worker.export.verify import PROMPTS, prompt_ids, verify_export

LORA: dict[str, Any] = {
    "adapter": {"kind": "lora", "rank": 4, "alpha": 16.0},
    "export": {"format": "peft"},
}
PRO: dict[str, Any] = {
    "adapter": {"kind": "llama_pro", "num_new_layers": 3},
    "export": {"format": "transformers"},
}
IDS = torch.tensor([[5, 17, 230, 44, 9, 101, 77, 300]])


def _change_alpha(directory: Path) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 17.0}))


def _change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _drop_tensor(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    _change_tensors(path, lambda tensors: tensors.pop(min(tensors)))


def _change_frozen(directory: Path) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    _change_tensors(directory / "model.safetensors", lambda tensors: tensors[name][0, 0].add_(1e-3))


def _change_trained(directory: Path) -> None:
    name = "model.layers.5.mlp.down_proj.weight"
    _change_tensors(directory / "model.safetensors", lambda tensors: tensors[name].mul_(1.1))


DAMAGE = {
    "alpha": (LORA, _change_alpha, r"logits differ by 0\.0\d+ of the largest, and 0\.0001 is"),
    "missing": (LORA, _drop_tensor, r"PEFT did not take 1 of the adapter's tensors .*lora_A"),
    "frozen": (PRO, _change_frozen, r"`model\.layers\.4\.mlp\.up_proj\.weight` was not trained"),
    "trained": (PRO, _change_trained, r"logits differ by"),
}


def find_damage(base: Path, out: Path) -> dict[str, str]:
    """Exports once a method, and returns what is said of each damage."""
    said: dict[str, str] = {}
    for sections in (LORA, PRO):
        assembled = assemble(base, **sections)
        train(assembled, [random_rows(4)], micro_batch_size=2, lr=1e-2, max_norm=None)
        recipe, inputs = tiny_recipe(**sections), Inputs(base, None, None)
        for name, (of, damage, _) in DAMAGE.items():
            if of is not sections:
                continue
            directory = out / name
            FORMATS[recipe.export.format].save(recipe, inputs, assembled, directory)
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                damage(directory)
            torch.distributed.barrier()
            try:
                verify_export(recipe, inputs, assembled, directory, IDS, device=CPU)
            except ExportError as error:
                said[name] = error.message
    return said


def finish_damaged(base: Path, root: Path) -> str:
    """Ends a run whose adapter is damaged as it is written; returns what is said."""
    recipe, assembled = tiny_recipe(**LORA), assemble(base, **LORA)
    train(assembled, [random_rows(4)], micro_batch_size=2, lr=1e-2, max_norm=None)
    untouched = FORMATS["peft"]

    def save(recipe: Recipe, inputs: Inputs, assembled: Assembled, directory: Path) -> None:
        untouched.save(recipe, inputs, assembled, directory)
        if torch.distributed.get_rank() == 0:
            _change_alpha(directory)

    FORMATS["peft"] = dataclasses.replace(untouched, save=save)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows: Any = SimpleNamespace(renderer=SimpleNamespace(chat=None))
    summary = RunSummary(1, 1.0, 1, 1, None, None, [1], [1], "")
    trained = Trained(recipe, Inputs(base, None, None), assembled, tokenizer, rows, summary)
    try:
        export_run(trained, RunFiles(root), NoSink(), device=CPU)
    except ExportError as error:
        return error.message
    finally:
        FORMATS["peft"] = untouched
    return ""


def test_what_is_not_verified_does_not_take_the_place_of_what_is(
    ranks: RankPool, tmp_path: Path
) -> None:
    base = save_tokenizer(save_tiny_llama(tmp_path / "base"))
    files = RunFiles(tmp_path / "run")
    files.adapter.mkdir(parents=True)
    (files.adapter / "before").touch()
    for said in ranks.run(2, finish_damaged, base, files.root):
        assert "logits differ by" in said
    assert [path.name for path in files.adapter.iterdir()] == ["before"]
    kept = {path.name for path in (files.root / "adapter.unverified").iterdir()}
    assert kept == {"adapter_config.json", "adapter_model.safetensors"}


def test_damage_is_found_and_said_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=False)
    first, second = ranks.run(2, find_damage, base, tmp_path)
    assert first == second
    assert first.keys() == DAMAGE.keys()
    for name, (*_, pattern) in DAMAGE.items():
        assert pytest.RaisesExc(ExportError, match=pattern).matches(ExportError(first[name])), first


def check_before_training(base: Path, kind: str) -> str:
    """Returns what is said before training of adapters of all linear layers."""
    sections = {"adapter": {"kind": kind, "rank": 4, "alpha": 8.0}, "export": {"format": "peft"}}
    try:
        recipe, inputs = tiny_recipe(**sections), Inputs(base, None, None)
        check_exportable(recipe, inputs, assemble(base, **sections))
    except ExportError as error:
        return error.message
    return ""


def test_what_peft_cannot_load_is_said_before_training(ranks: RankPool, tmp_path: Path) -> None:
    family = "deepseek_v3"  # PEFT takes `gate_proj` of a dense layer for one of the experts
    save_tiny_llama(tmp_path, tied=False, family=family, **FAMILIES[family])
    assert ranks.run(1, check_before_training, tmp_path, "lora") == [""]
    (said,) = ranks.run(1, check_before_training, tmp_path, "dora")
    assert said.startswith(
        "PEFT could not load what this recipe trains of a `DeepseekV3ForCausalLM`"
    )


def verify_mixture(base: Path, out: Path) -> float:
    """Exports adapters of a mixture's dense layers and shared experts; returns the difference."""
    recipe, assembled = tiny_recipe(**LORA), assemble(base, **LORA)
    train(assembled, [random_rows(4)], micro_batch_size=2, lr=1e-2, max_norm=None)
    inputs = Inputs(base, None, None)
    FORMATS["peft"].save(recipe, inputs, assembled, out)
    return verify_export(recipe, inputs, assembled, out, IDS, device=CPU).max_difference


@pytest.mark.parametrize("family", ["deepseek_v3", "hunyuan_v1_moe"])
def test_dense_layers_of_a_mixture_keep_their_adapters(
    ranks: RankPool, tmp_path: Path, family: str
) -> None:
    base = tmp_path / "base"
    save_tiny_llama(base, tied=False, family=family, **FAMILIES[family])
    # fp32, sums in another order.
    assert max(ranks.run(2, verify_mixture, base, tmp_path / "out")) < 2e-6


def test_prompts_are_cut_to_the_shortest(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(save_tiny_llama(tmp_path)))
    ids = prompt_ids(tokenizer)
    assert ids.shape[0] == len(PROMPTS)
    assert 8 <= ids.shape[1] <= 32
    assert ids[0].tolist() == tokenizer(PROMPTS[0])["input_ids"][: ids.shape[1]]
