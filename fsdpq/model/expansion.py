"""A model with more decoder layers than its checkpoint: each is read from a layer of that."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from fsdpq.model.causal_lm import CausalLM


def expand_config(config: PretrainedConfig, sources: Sequence[int]) -> None:
    """Gives a config as many layers as ``sources`` names, in place.

    Its lists with one entry a layer (``layer_types``, ``no_rope_layers``) follow.

    Args:
        config: of the checkpoint.
        sources: the checkpoint's layer of every layer of the model.
    """
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    if tuple(sources) == tuple(range(num_layers)):
        return
    lists = {
        name: [value[source] for source in sources]
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }
    text.num_hidden_layers = len(sources)
    for name, value in lists.items():
        setattr(text, name, value)


def source_name(model: CausalLM, name: str) -> str:
    """Returns the tensor of the checkpoint that the model's tensor ``name`` is read from.

    Args:
        model: the model.
        name: a name as transformers has it, without an adapter's parts.
    """
    prefix = model.layers_prefix
    if not name.startswith(prefix):
        return name
    index, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{model.layer_sources[int(index)]}.{rest}"
