"""What a run leaves behind, in the format that the recipe names, and how it comes back.

The formats are a table: each knows how to write what was trained and how to load it into a model
that was assembled from the same recipe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fsdpq.checkpoint.peft import export_adapter, import_adapter
from fsdpq.checkpoint.whole_model import DeltaInfo, ModelTensor, export_delta, export_model
from fsdpq.data.templates.choose import exported_tokenizer
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.dist import rank
from fsdpq.model.expansion import source_name
from fsdpq.model.loading.checkpoint_names import ModelTensors
from fsdpq.model.loading.source import open_checkpoint
from fsdpq.model.loading.stream import load_trained_base
from fsdpq.model.loading.targets import full_shape, loading_targets
from fsdpq.protocols import DTYPES
from fsdpq.recipe.root import Recipe
from fsdpq.worker.assemble import Assembled, Inputs


@dataclass(frozen=True)
class Format:
    """How trained weights leave and come back.

    Attributes:
        save: writes them into a directory, from recipe, inputs and model; all ranks call it.
        load: fills the model from such a directory.
    """

    save: Callable[[Recipe, Inputs, Assembled, Path], None]
    load: Callable[[Assembled, Path], None]


def save_peft(recipe: Recipe, inputs: Inputs, assembled: Assembled, directory: Path) -> None:
    """Writes the adapter in PEFT's format.

    Ranks: all (collective).
    """
    export_adapter(
        assembled.adapted_layers,
        directory,
        options=recipe.adapter,  # pyright: ignore[reportArgumentType] - a check of the recipe
        base_model=_base_name(recipe, inputs),
        revision=inputs.model_revision,
        hf_config=assembled.model.hf.config,
        saved=assembled.trained_base,
    )


def _base_name(recipe: Recipe, inputs: Inputs) -> str:
    """Returns how others find the base: by its name on a hub, or by its directory here."""
    on_hub = inputs.model_revision is not None
    return recipe.model.name_or_path if on_hub else str(inputs.model_dir)


def load_peft(assembled: Assembled, directory: Path) -> None:
    """Fills the adapter from PEFT's format."""
    import_adapter(assembled.adapted_layers, directory, saved=assembled.trained_base)


def save_transformers(
    recipe: Recipe, inputs: Inputs, assembled: Assembled, directory: Path
) -> None:
    """Writes the whole model: trained weights, and the original's where nothing was trained.

    The original's are those of its checkpoint in ``model.dtype``, not quantized.

    Ranks: all (collective).
    """
    model = assembled.model
    original = open_checkpoint(model, inputs.model_dir)
    tensors = [
        ModelTensor(
            name,
            full_shape(target),
            target
            if isinstance(target, nn.Parameter) and target.requires_grad
            else functools.partial(
                _read_whole, original, source_name(model, name), (*full_shape(target), 1)[0]
            ),
        )
        for name, target in loading_targets(model).items()
    ]
    export_model(
        tensors,
        directory,
        config=model.hf.config,
        dtype=DTYPES[recipe.model.dtype],
        original=inputs.model_dir,
    )


def _read_whole(tensors: ModelTensors, name: str, num_rows: int) -> Tensor:
    return tensors.read_rows(name, 0, num_rows)


def save_delta(recipe: Recipe, inputs: Inputs, assembled: Assembled, directory: Path) -> None:
    """Writes the trained weights of the base alone, and which base they belong to.

    Ranks: all (collective).
    """
    model = assembled.model
    tensors = [
        ModelTensor(name, tuple(target.shape), target)
        for name, target in loading_targets(model).items()
        if isinstance(target, nn.Parameter) and target.requires_grad
    ]
    dtype = DTYPES[recipe.model.dtype]
    info = DeltaInfo(
        base_model=_base_name(recipe, inputs),
        revision=inputs.model_revision,
        layers_prefix=model.layers_prefix,
        layer_sources=model.layer_sources,
        config=model.hf.config.to_dict(),
    )
    export_delta(tensors, directory, info=info, dtype=dtype)


def load_trained(assembled: Assembled, directory: Path) -> None:
    """Fills the trained weights of the base from a whole model or a delta."""
    load_trained_base(assembled.model, directory)


def save_template(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: RowTokenizer, directory: Path
) -> None:
    """Writes the tokenizer with the recipe's chat template beside what was trained.

    Nothing is written where the template is the tokenizer's own, or there is none.

    Ranks: all (collective); rank 0 writes.
    """
    chat = rows.renderer.chat
    if recipe.data.chat_template is not None and chat is not None and rank() == 0:
        mark = (chat.marks.of_answers() or "").strip()
        exported_tokenizer(tokenizer, chat.template, mark).save_pretrained(directory)


FORMATS = {
    "peft": Format(save_peft, load_peft),
    "transformers": Format(save_transformers, load_trained),
    "delta": Format(save_delta, load_trained),
}
"""Values of ``export.format`` in a resolved recipe."""
