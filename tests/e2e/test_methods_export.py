"""What every method leaves behind, stock transformers and PEFT load and reproduce; so do we."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import reference
from support.commands import Run
from support.library_linears import with_library_linears
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from support.tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from fsdpq.checkpoint import whole_model
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.worker.assemble import Inputs
from fsdpq.worker.export.formats import FORMATS
from fsdpq.worker.export.verify import verify_export

CPU = torch.device("cpu")
NEW = ("self_attn.o_proj", "mlp.down_proj")
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]
NONE, HQQ = ({"quantization": {"kind": kind}} for kind in ("none", "hqq"))
FP4 = {"quantization": {"kind": "bnb", "quant_type": "fp4", "double_quant": False}}
DORA = {"adapter": {"kind": "dora", "rank": 4, "alpha": 16.0}}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 16.0}}
CHUNKS = {"training": {"layer_chunks": 2}}
RSLORA = {"adapter": {**LORA["adapter"], "use_rslora": True}}
PISSA = {"adapter": {**LORA["adapter"], "init": "pissa"}, **NONE}
SAVED = {"adapter": {**LORA["adapter"], "modules_to_save": ["embed_tokens", "lm_head"]}}
FULL = {"adapter": {"kind": "none"}, **NONE}
PRO = {"adapter": {"kind": "llama_pro", "num_new_layers": 3}}
PRO_PLAIN = {**PRO, **NONE}
DELTA = {**PRO, "export": {"format": "delta"}}
Sections = dict[str, dict[str, Any]]


def export_format(sections: Sections) -> str:
    """Returns what the launcher makes of ``export.format``."""
    auto = "peft" if sections["adapter"]["kind"] in ("lora", "dora") else "transformers"
    return sections.get("export", {}).get("format", auto)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Returns logits after the prompt by our own forward, through the cache."""
    model.eval()
    cache = DynamicCache(config=model.hf.config)  # pyright: ignore
    model.next_token_logits(torch.tensor([PROMPT[:3]]), cache)  # pyright: ignore
    return model.next_token_logits(torch.tensor([PROMPT[3:]]), cache)[0]  # pyright: ignore


def train_and_export(base: Path, exported: Path, sections: Sections) -> tuple[torch.Tensor, float]:
    """Trains three steps, exports and checks; returns the logits and the difference found."""
    whole_model.FILE_BYTES = 1 << 19  # several files
    assembled = assemble(base, **sections)
    batches = [random_rows(4, seed=index) for index in range(3)]
    train(assembled, batches, micro_batch_size=2, lr=1e-2, max_norm=None)
    inputs = Inputs(base, None, None)
    recipe = tiny_recipe(**{**sections, "export": {"format": export_format(sections)}})
    FORMATS[recipe.export.format].save(recipe, inputs, assembled, exported)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    found = verify_export(recipe, inputs, assembled, exported, ids, device=CPU)
    return logits(assembled.model), found.max_difference


def import_and_answer(base: Path, exported: Path, sections: Sections) -> torch.Tensor:
    """Loads what was exported into a fresh model on this rank; returns the logits."""
    assembled = assemble(base, **sections)
    FORMATS[export_format(sections)].load(assembled, exported)
    return logits(assembled.model)


def stock_logits(base: Path, exported: Path, sections: Sections) -> torch.Tensor:
    """Returns the logits of stock transformers or PEFT over the quantization library's linears."""
    is_adapter = export_format(sections) == "peft"
    model = reference.load_plain(base) if is_adapter else whole_model_of(exported)
    quantization = sections.get("quantization", {"kind": "bnb"})
    if quantization["kind"] != "none":
        new = () if is_adapter else [f"model.layers.{i}.{n}" for i in (1, 3, 5) for n in NEW]
        with_library_linears(model, quantization, trained=new)
    if is_adapter:
        model = PeftModel.from_pretrained(model, exported)  # pyright: ignore
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROMPT])).logits[0, -1]


def whole_model_of(exported: Path) -> torch.nn.Module:
    """Returns the model that was exported, a delta put together as docs/concepts/methods.md says.

    A delta must not be taken for a model: transformers does not load it.
    """
    if not (exported / "delta.json").exists():
        return AutoModelForCausalLM.from_pretrained(exported)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(exported)
    page = Path(__file__).parents[2] / "docs/concepts/methods.md"
    code = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"DELTA": str(exported)}
    exec(code.replace('"RUN/delta"', "DELTA"), names)
    return names["model"]


@pytest.mark.parametrize(
    ("sections", "tied"),
    [
        (DORA, True),
        (DORA | HQQ, False),
        (DORA | NONE, True),
        (LORA | FP4, True),
        (LORA | HQQ | CHUNKS, True),
        (RSLORA | NONE, False),
        (PISSA, True),
        (SAVED, True),
        (SAVED | HQQ, False),
        (FULL, True),
        (FULL, False),
        (PRO, False),
        (PRO | HQQ, True),
        (PRO_PLAIN, True),
        (DELTA, True),
    ],
)
def test_stock_libraries_reproduce_our_logits(
    ranks: RankPool, tmp_path: Path, sections: Sections, tied: bool
) -> None:
    base, exported = save_tokenizer(save_tiny_llama(tmp_path / "base", tied=tied)), tmp_path / "out"
    (ours, difference), (others, _) = ranks.run(2, train_and_export, base, exported, sections)
    assert torch.equal(ours, others), "all ranks compute the same logits"
    assert difference < 2e-6, "and the run itself sees that stock libraries reproduce them"
    stock = stock_logits(base, exported, sections)
    # Same weights, fp32 everywhere: only the order of sums differs.
    bound = 2e-5 * stock.abs().max().item()
    assert torch.allclose(ours, stock, rtol=0, atol=bound)
    with torch.no_grad():
        untrained = reference.load_plain(base)(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    assert (ours - untrained).abs().max() > 0.1, "training changes the logits"
    again = ranks.run(3, import_and_answer, base, exported, sections)[0]
    assert torch.allclose(again, ours, rtol=0, atol=bound)
    if sections is DELTA:
        trained = sum(3 * 192 * inputs for inputs in (192, 320))
        size = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
        assert 4 * trained < size < 4 * trained + 4096, "nothing but what was trained"
    assert not list(tmp_path.glob(".*partial"))


def test_a_whole_model_comes_with_its_tokenizer_in_several_files(
    ranks: RankPool, tmp_path: Path
) -> None:
    base, exported = save_tokenizer(save_tiny_llama(tmp_path / "base")), tmp_path / "out"
    ranks.run(2, train_and_export, base, exported, {**PRO, "model": {"dtype": "bf16"}})
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 2
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base, exported))
    assert after("What is the capital?").input_ids == before("What is the capital?").input_ids
    assert after.chat_template == before.chat_template
    original, model = reference.load_plain(base), AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 6
    old, new = original.state_dict(), model.state_dict()
    for layer, source in enumerate([0, 0, 1, 1, 2, 2]):
        name = "self_attn.q_proj.weight"
        kept = new[f"model.layers.{layer}.{name}"]
        assert torch.equal(kept, old[f"model.layers.{source}.{name}"].bfloat16()), "unquantized"
    trained = new["model.layers.1.mlp.down_proj.weight"]
    assert 0 < trained.abs().max() < 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.kind=none", "quantization.kind=none", "optimizer.lr=3e-3"),
        ("adapter.kind=llama_pro", "adapter.expansion_rate=0.3333"),
    ],
)
def test_what_leaves_a_model_trains_and_generates(
    fsdpq: Run, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    files = RunFiles(tmp_path / "run")
    done = fsdpq(
        "train", "recipe.yaml", *overrides, "training.steps=12", "--run-dir", str(files.root)
    )
    assert done.returncode == 0, done.stderr
    held_out = [row for row in read_json_lines(files.metrics) if row["event"] == "eval"]
    assert held_out[1]["loss"] < 0.9 * held_out[0]["loss"]
    answer = fsdpq("generate", str(files.root), "--prompt", "What is one?")
    assert answer.returncode == 0, answer.stderr
    samples = [row for row in read_json_lines(files.events) if row["event"] == "sample"]
    after = next(row["answer"] for row in samples if row["when"] == "after")
    assert answer.stdout.strip().startswith(after), "generate answers as the run did at its end"
    assert "exporting the model\n" in done.stderr
    assert re.search(rf"^  model +{re.escape(str(files.model))}$", done.stderr, re.MULTILINE)
    AutoModelForCausalLM.from_pretrained(files.model)
