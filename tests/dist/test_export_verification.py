"""What stock libraries do not reproduce never gets the name of a finished export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from support.tokenizer import save_tokenizer
from transformers import AutoTokenizer

from fsdpq.errors import ExportError
from fsdpq.worker.assemble import Inputs
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


def test_damage_is_found_and_said_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=False)
    first, second = ranks.run(2, find_damage, base, tmp_path)
    assert first == second
    assert first.keys() == DAMAGE.keys()
    for name, (*_, pattern) in DAMAGE.items():
        assert pytest.RaisesExc(ExportError, match=pattern).matches(ExportError(first[name])), first


def test_prompts_are_cut_to_the_shortest(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(save_tiny_llama(tmp_path)))
    ids = prompt_ids(tokenizer)
    assert ids.shape[0] == len(PROMPTS)
    assert 8 <= ids.shape[1] <= 32
    assert ids[0].tolist() == tokenizer(PROMPTS[0])["input_ids"][: ids.shape[1]]
