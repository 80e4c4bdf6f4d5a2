"""What was exported as others load it: where each weight comes from, by the format of the files.

Frozen weights that training held quantized come from the model that was trained, as it holds them:
that is the base that the trained weights belong to. All others come from files, under the names and
in the layout in which transformers and PEFT read them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fsdpq.checkpoint.peft import wrap_in_peft
from fsdpq.checkpoint.whole_model import DELTA_NAME
from fsdpq.errors import ExportError
from fsdpq.model.config import read_config
from fsdpq.model.expansion import source_name
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.export.gathered import GatheredBase
from fsdpq.worker.export.readers import checkpoint_reader
from fsdpq.worker.export.streamed import Read


@dataclass(frozen=True)
class Stock:
    """What other libraries make of an exported directory.

    Attributes:
        config: of the model.
        read: reads its weights, given what reads those of the trained model.
        wrap: puts around it what its format needs.
    """

    config: PreTrainedConfig
    read: Callable[[Read], Read]
    wrap: Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class Exported:
    """What was exported, and from what.

    Attributes:
        directory: what was written.
        inputs: of the run.
        assembled: the trained model.
        base: its weights.
        dtype: of the run's unquantized weights.
    """

    directory: Path
    inputs: Inputs
    assembled: Assembled
    base: GatheredBase
    dtype: torch.dtype

    @functools.cached_property
    def original(self) -> Read:
        """Reads the original checkpoint by the names that the trained model has."""
        trust = self.inputs.trust_remote_code
        read = checkpoint_reader(self.inputs.model_dir, trust_remote_code=trust)
        return lambda name: read(source_name(self.assembled.model, name))


def open_adapter(exported: Exported) -> Stock:
    """Returns stock PEFT around the base.

    What the run changed in the base itself is read from the original: weights that are trained
    beside the adapter, and those that gave a part of themselves to it.
    """
    assembled, inputs = exported.assembled, exported.inputs
    changed = {
        f"{name}.weight" for name, layer in assembled.adapted_layers.items() if layer.initial
    }
    changed |= assembled.trained_base.keys()

    def read_base(trained: Read) -> Read:
        return lambda name: exported.original(name) if name in changed else trained(name)

    return Stock(
        config=read_config(inputs.model_dir, trust_remote_code=inputs.trust_remote_code),
        read=read_base,
        wrap=functools.partial(wrap_in_peft, directory=exported.directory),
    )


def open_whole_model(exported: Exported) -> Stock:
    """Returns the model of the exported files."""
    directory, trust = exported.directory, exported.inputs.trust_remote_code
    config = read_config(directory, trust_remote_code=trust)
    written = checkpoint_reader(directory, trust_remote_code=trust)

    def read_files(trained: Read) -> Read:
        def read(name: str) -> torch.Tensor:
            found = written(name)
            if not exported.base.is_packed(name):
                return found
            if not torch.equal(found, exported.original(name).to(exported.dtype)):
                raise ExportError(
                    f"`{name}` was not trained, and is not what the original has",
                    hint="the disk may be failing: run again with another run directory",
                )
            return trained(name)

        return read

    return Stock(config, read_files, lambda hf: hf)


def open_delta(exported: Exported) -> Stock:
    """Returns the base with the layers of the delta, put together by what ``delta.json`` says."""
    info = json.loads((exported.directory / DELTA_NAME).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**info["config"])
    names = CheckpointFiles(exported.directory).names
    written = checkpoint_reader(exported.directory, config=config, only=sorted(names))

    def read_both(trained: Read) -> Read:
        def read(name: str) -> torch.Tensor:
            if name in names:
                return written(name)
            return trained(name) if exported.base.is_packed(name) else exported.original(name)

        return read

    return Stock(config, read_both, lambda hf: hf)


OPENERS = {"peft": open_adapter, "transformers": open_whole_model, "delta": open_delta}
"""By ``export.format`` of a resolved recipe."""
