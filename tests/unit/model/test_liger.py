"""Where Liger's kernels go; the kernels themselves need a GPU (tests/gpu)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.tiny import save_tiny_llama
from torch.nn import functional

from fsdpq.errors import CheckpointError, MissingDependencyError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.meta import build_meta_model
from fsdpq.model.quantized_experts import QuantizedExperts
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.quantization.bnb import BnbQuantizer
from fsdpq.recipe.sections.quantization import BnbOptions

OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def _swiglu(module: Any, x: torch.Tensor) -> torch.Tensor:
    """``LigerSwiGLUMLP.forward``, without its kernel."""
    return module.down_proj(functional.silu(module.gate_proj(x)) * module.up_proj(x))


def _read_weights(module: Any, *_: Any) -> None:
    raise AssertionError("`LigerExperts.forward` reads the plain weights of experts")


def _apply(calls: list[dict[str, Any]], model: Any, **options: bool) -> None:
    """Binds methods to instances, as ``_apply_liger_kernel_to_instance`` does (0.8.5)."""
    calls.append(options)
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        forward = _swiglu if experts is None else _read_weights
        patched = experts or layer.mlp
        patched.__dict__["forward"] = forward.__get__(patched, type(patched))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every application of a stand-in for ``liger_kernel``."""
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("monkey_patch")
    found: list[dict[str, Any]] = []
    vars(package)["_apply_liger_kernel_to_instance"] = lambda **options: _apply(found, **options)
    vars(patches)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"llama": None, "mixtral": None}
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    return found


def _build(directory: Path) -> CausalLM:
    return build_meta_model(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        quantizer=BnbQuantizer(BnbOptions(kind="bnb")),
        use_liger_kernel=True,
    )


def test_projections_are_quantized_inside_liger_s_feed_forward(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    model = _build(save_tiny_llama(tmp_path))
    assert calls == [OFF]
    mlp: Any = model.decoder_layers[0].mlp
    assert mlp.forward.__func__ is _swiglu
    assert all(isinstance(child, QuantizedLinear) for child in list(mlp.children())[:3])


def test_quantized_experts_keep_their_own_forward(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    small = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = _build(save_tiny_llama(tmp_path, family="mixtral", **small))
    experts = [m for m in model.modules() if isinstance(m, QuantizedExperts)]
    assert len(experts) == 3
    assert calls == [OFF]
    assert all("forward" not in vars(module) for module in experts)


def test_a_family_without_kernels_is_refused_not_passed_by(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    directory = save_tiny_llama(tmp_path, family="stablelm")
    with pytest.raises(CheckpointError, match="no kernels for models of type `stablelm`"):
        _build(directory)
    assert calls == []


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingDependencyError) as caught:
        _build(save_tiny_llama(tmp_path))
    assert caught.value.hint == "pip install 'fsdpq[liger]'"
