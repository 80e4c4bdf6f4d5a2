"""A model of the hub is planned from its config and its headers; no weight is fetched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.hub_files import HubFiles, hub_of

CONFIG = {
    "model_type": "of-tomorrow",
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
LAYER = {"attn.qkv_proj": (1536, 512), "attn.o_proj": (512, 512), "norm": (512,)}

ASK = """
import json, sys
from fsdpq.errors import FsdpqError
from fsdpq.fetch.hub_shape import shape_from_hub
answers = []
for name in sys.argv[1:]:
    try:
        shape = shape_from_hub(name)
        answers.append([shape.num_weights, shape.num_layers, shape.checkpoint_bytes,
                        shape.source, shape.is_here, shape.layers_prefix])
    except FsdpqError as error:
        answers.append([type(error).__name__, error.message])
print(json.dumps([answers, "torch" in sys.modules]))
"""


def weights_file(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Returns a safetensors file of zeros in 16 bits."""
    fields: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        fields[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(fields).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


def ask(hub: HubFiles, tmp_path: Path, *names: str) -> tuple[list[list[Any]], bool]:
    """Asks in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    answers, has_torch = json.loads(done.stdout)
    return answers, has_torch


def test_headers_of_the_hub_give_the_shape_of_a_family_without_a_card(tmp_path: Path) -> None:
    layers = [
        {f"blocks.{index}.{name}.weight": shape for name, shape in LAYER.items()}
        for index in range(2)
    ]
    outside = {"wte.weight": (1000, 512), "out_norm.weight": (512,), "lm_head.weight": (1000, 512)}
    shards = {"model-00001-of-00002.safetensors": layers[0] | outside}
    shards["model-00002-of-00002.safetensors"] = layers[1]
    index = {name: file for file, shapes in shards.items() for name in shapes}
    files = {file: weights_file(shapes) for file, shapes in shards.items()}
    num_bytes = 2 * sum(math.prod(s) for shapes in shards.values() for s in shapes.values())
    files["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    files["config.json"] = json.dumps(CONFIG).encode()
    with hub_of("org/model", files) as hub:
        answers, has_torch = ask(hub, tmp_path, "org/model", "org/other")
        assert not has_torch
        assert answers[0] == [num_bytes // 2, 2, num_bytes, "headers", False, "blocks."]
        assert answers[1][0] == "FetchError"
        assert "no model repository `org/other`" in answers[1][1]
        assert hub.sent < num_bytes / 10  # headers come with the first 100 kB of each file
        del files["model.safetensors.index.json"]
        [[kind, message]], _ = ask(hub, tmp_path, "org/model")
        assert kind == "CheckpointError"
        assert "has no safetensors weights" in message
