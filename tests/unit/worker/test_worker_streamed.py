"""A model that reads its weights while it computes is the model that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import reference
from support.families import FAMILIES, ONLY_EAGER
from support.tiny import save_tiny_llama
from transformers import AutoConfig, LlamaForCausalLM

from fsdpq.errors import CheckpointError
from fsdpq.worker.export.readers import checkpoint_reader
from fsdpq.worker.export.streamed import StreamedModel

IDS = torch.tensor([[5, 17, 230, 44, 9, 101, 77, 300], [7, 8, 9, 10, 11, 12, 13, 14]])


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("llama", True, torch.float32),
        ("llama", False, torch.bfloat16),
        ("mixtral", False, torch.float32),
        ("gemma2", True, torch.float32),  # scaled embedding, capped logits
        ("deepseek_v3", False, torch.bfloat16),
        ("gpt_oss", False, torch.float32),
    ],
)
def test_logits_are_those_of_the_model_that_transformers_loads(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    save_tiny_llama(tmp_path, tied=tied, family=family, **FAMILIES[family])
    attention = "eager" if family in ONLY_EAGER else "sdpa"
    whole = reference.load_plain(tmp_path, dtype, attn_implementation=attention).eval()
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
    model = StreamedModel(
        AutoConfig.from_pretrained(tmp_path), checkpoint_reader(tmp_path), dtype=dtype,
        attn_implementation=attention,
    )  # fmt: skip
    assert torch.equal(model.logits(IDS), expected)
    kept = torch.tensor([2, 7])
    # A product of fewer rows sums in another order.
    bound = {torch.float32: 2e-5, torch.bfloat16: 0.02}[dtype] * expected.abs().max().item()
    found = model.logits(IDS, kept)
    assert torch.allclose(found, expected[:, kept], rtol=0, atol=bound)
    assert all(parameter.is_meta for parameter in model.module.parameters()), "nothing stays"


def test_what_transformers_keeps_in_fp32_stays_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["model.norm", "lm_head"]
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", kept)
    save_tiny_llama(tmp_path, tied=False)
    with torch.no_grad():
        expected = reference.load_plain(tmp_path, torch.bfloat16).eval()(input_ids=IDS).logits
    config, read = AutoConfig.from_pretrained(tmp_path), checkpoint_reader(tmp_path)
    assert torch.equal(StreamedModel(config, read, dtype=torch.bfloat16).logits(IDS), expected)
    assert expected.dtype == torch.float32


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, tied=False)
    read = checkpoint_reader(tmp_path)
    held: list[int] = []

    def counted(name: str) -> torch.Tensor:
        tensor = read(name)
        kept = sum(each.nbytes for each in model.module.parameters() if not each.is_meta)
        held.append(kept + tensor.nbytes)
        return tensor

    model = StreamedModel(AutoConfig.from_pretrained(tmp_path), counted)
    model.logits(IDS)
    layer = model.module.get_submodule("model.layers.0")
    assert max(held) == sum(4 * parameter.numel() for parameter in layer.parameters())


def test_stock_peft_goes_around_it(tmp_path: Path) -> None:
    directory, adapter = save_tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True)
    whole = get_peft_model(reference.load_plain(directory), config)  # pyright: ignore
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    whole.save_pretrained(str(adapter))
    with torch.no_grad():
        expected = whole.eval()(input_ids=IDS).logits
    read = checkpoint_reader(directory)
    model = StreamedModel(
        AutoConfig.from_pretrained(directory), read,
        wrap=lambda hf: PeftModel.from_pretrained(hf, str(adapter)),
    )  # fmt: skip
    assert torch.equal(model.logits(IDS), expected)
    base = StreamedModel(AutoConfig.from_pretrained(directory), read)
    assert not torch.allclose(base.logits(IDS), expected)
    empty = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"6 tensors .* got no values"):
        StreamedModel(
            AutoConfig.from_pretrained(directory), read,
            wrap=lambda hf: get_peft_model(hf, empty, low_cpu_mem_usage=True),
        )  # fmt: skip


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    read = checkpoint_reader(save_tiny_llama(tmp_path))
    model = StreamedModel(AutoConfig.from_pretrained(tmp_path), lambda name: read(name)[:-1])
    with pytest.raises(
        CheckpointError, match=r"`model.embed_tokens.weight` has shape \[330, 192\]"
    ):
        model.logits(IDS)
