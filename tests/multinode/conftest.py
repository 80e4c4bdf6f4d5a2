"""Two hosts, a folder that both see, and what one host makes of the same recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts import ADDRESSES, Hosts, why_no_hosts
from support.tiny import save_tiny_llama
from support.tokenizer import save_tokenizer

from fsdpq.run_files.paths import RunFiles

RECIPE = f"""\
version: 1
name: tiny
model: {{name_or_path: model, dtype: fp32}}
quantization: {{kind: bnb}}
adapter: {{kind: lora, rank: 8, alpha: 16}}
data: {{path: rows.jsonl, seq_len: 64}}
optimizer: {{kind: adamw, lr: 1e-2}}
lr_scheduler: {{kind: constant}}
training: {{steps: 8, global_batch_size: 8, micro_batch_size: 2, seed: 3}}
checkpoint: {{interval: 4}}
export: {{verify: false}}
launch:
  device: cpu
  nproc_per_node: 2
  nnodes: 2
  rdzv_endpoint: {ADDRESSES[0]}:29500
  node_timeout_s: 4
"""
ALONE = (
    "launch.nnodes=1", "launch.rdzv_endpoint=null", "launch.node_timeout_s=30",
    "launch.nproc_per_node=4",
)  # fmt: skip


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``recipe.yaml``, ``model/`` and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("project")
    save_tokenizer(save_tiny_llama(folder / "model"))
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(32):
            word = words[index % len(words)]
            row = {"prompt": f"What is {word}? {index}", "completion": f" {word} is {word}"}
            file.write(json.dumps(row) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the commands: no colours, and a cache where data is prepared once."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return os.environ | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def hosts(
    project: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosts]:
    """The two hosts."""
    if why := why_no_hosts():
        pytest.skip(why)
    made = Hosts(project, environment, tmp_path_factory.mktemp("outputs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts, project: Path, environment: dict[str, str]) -> RunFiles:
    """The run of one host with as many ranks as both have."""
    del hosts  # nothing is trained where there are none
    subprocess.run(
        [sys.executable, "-m", "fsdpq", "train", "recipe.yaml", "--run-dir", "alone", *ALONE],
        cwd=project, env=environment, capture_output=True, timeout=200, check=True,
    )  # fmt: skip
    return RunFiles(project / "alone")
