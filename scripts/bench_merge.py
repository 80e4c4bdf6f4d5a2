"""Measures what merging needs, beside PEFT's ``merge_and_unload``: ``make bench-merge``.

A checkpoint of TinyLlama's shape (1.1 billion weights in bf16, 2.2 GB) and an adapter of rank 16 on
all linear layers are made up in a temporary directory, and merged in every way that ``fsdpq merge``
offers. Every process is fresh and merges a tiny model first, so that imports and what libraries set
up on first use lie in its baseline.

- peak: ``VmHWM`` of /proc/self/status at the end, set back before through /proc/self/clear_refs,
  less ``VmRSS`` at that moment.
- wall: of the merge, with the comparison where it is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fsdpq.metrics.peaks import status_bytes
from fsdpq.worker.bench.made_up import write_made_up
from fsdpq.worker.bench.shapes import SHAPES, with_layers

MB = 1e6
RANK = 16
TARGET_BYTES = 1.5e9
WAYS: dict[str, dict[str, Any]] = {
    "original": {"onto": "original", "compare_tokens": 0},
    "dequantized": {"compare_tokens": 0},
    "nf4": {"requantize": "nf4", "compare_tokens": 0},
    "hqq": {"requantize": "hqq", "compare_tokens": 0},
    "compared": {},
}


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer: Any = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def write_run(root: Path, base: Path, quantization: str) -> None:
    """A run directory as training leaves it, with a made-up adapter."""
    import torch
    from safetensors.torch import save_file

    from fsdpq.model.loading.checkpoint_files import CheckpointFiles
    from fsdpq.recipe.load import dump_recipe
    from fsdpq.recipe.root import Recipe
    from fsdpq.run_files.paths import RunFiles

    files = RunFiles(root)
    files.logs.mkdir(parents=True)
    files.adapter.mkdir()
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "bench",
            "model": {"name_or_path": str(base), "dtype": "bf16"},
            "quantization": {"kind": quantization},
            "adapter": {"kind": "lora", "rank": RANK, "alpha": 2.0 * RANK},
            "data": {"path": "rows.jsonl"},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "lr_scheduler": {"kind": "constant"},
            "training": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
            "launch": {"device": "cpu"},
            "export": {"format": "peft"},
        }
    )
    files.resolved.write_text(dump_recipe(recipe))
    model = {"directory": str(base), "revision": None, "sha256": "0" * 64, "source": str(base)}
    files.lock.write_text(json.dumps({"inputs": {"model": model, "data": None}}))
    checkpoint, tensors = CheckpointFiles(base), {}
    generator = torch.Generator().manual_seed(0)
    for name in sorted(checkpoint.names):
        if "_proj" in name:
            rows, columns = checkpoint.shape(name)
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            a = torch.randn(RANK, columns, generator=generator)
            tensors[f"{layer}.lora_A.weight"] = a / columns**0.5
            b = torch.randn(rows, RANK, generator=generator)
            tensors[f"{layer}.lora_B.weight"] = b * 1e-3
    save_file(tensors, files.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"base_model_name_or_path": str(base), "target_modules": "all-linear"}
    (files.adapter / "adapter_config.json").write_text(json.dumps(config))


def merge_with_fsdpq(way: str, root: Path, name: str) -> None:
    import torch

    from fsdpq.run_files.paths import RunFiles
    from fsdpq.worker.merge.run import MergeOptions, merge_run

    out = root / f"{name}-{way}-{os.getpid()}"
    merge_run(RunFiles(root / f"run-{name}"), MergeOptions(out, **WAYS[way]), torch.device("cpu"))
    for path in out.iterdir():
        path.unlink()


def merge_with_peft(_way: str, root: Path, name: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base, root / f"run-{name}" / "adapter")
    out = root / f"{name}-peft-{os.getpid()}"
    model.merge_and_unload().save_pretrained(out)
    for path in out.iterdir():
        path.unlink()


def run_process(way: str, root: Path, out: Path) -> None:
    """One process: warms up, merges, writes what it measured."""
    from fsdpq.dist import start_process_group

    start_process_group("cpu")
    merge = merge_with_peft if way == "peft" else merge_with_fsdpq
    merge(way, root, "tiny")
    Path("/proc/self/clear_refs").write_text("5")
    baseline, started = status_bytes("VmRSS"), time.perf_counter()
    merge(way, root, "model")
    found = {
        "way": way,
        "wall_s": time.perf_counter() - started,
        "baseline_bytes": baseline,
        "peak_bytes": status_bytes("VmHWM") - baseline,
    }
    out.write_text(json.dumps(found))


def measure(way: str, root: Path) -> dict[str, Any]:
    out = root / f"{way}.json"
    command = [sys.executable, __file__, "--process", way, str(root), str(out)]
    environment = os.environ | {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with (root / f"{way}.log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed: exit code {done.returncode}")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures merging beside PEFT.")
    parser.add_argument("--layers", type=int, default=SHAPES["1b"].layers)
    parser.add_argument("--ways", nargs="*", default=[*WAYS, "peft"])
    parser.add_argument("--quantization", choices=("bnb", "none"), default="bnb", help="of the run")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        way, root, out = options.process
        run_process(way, Path(root), Path(out))
        return
    shape = with_layers(SHAPES["1b"], options.layers)
    with tempfile.TemporaryDirectory(prefix="fsdpq-bench-") as directory:
        root = Path(directory)
        for name, sizes in (("tiny", SHAPES["tiny"]), ("model", shape)):
            weight_bytes = write_made_up(root / name, sizes)
            write_tokenizer(root / name)
            write_run(root / f"run-{name}", root / name, options.quantization)
        print(f"{weight_bytes / 1e9:.2f} GB of bf16 weights, {os.cpu_count()} cores")
        print("way            wall s   peak MB  baseline MB")
        rows: list[dict[str, Any]] = []
        for way in options.ways:
            rows.append(found := measure(way, root))
            peak, base = found["peak_bytes"], found["baseline_bytes"]
            print(
                f"{way:<12}{found['wall_s']:>9.1f}{peak / MB:>10.0f}{base / MB:>13.0f}", flush=True
            )
    worst = max((row["peak_bytes"] for row in rows if row["way"] != "peft"), default=0)
    verdict = "ok" if worst <= TARGET_BYTES else "MISSED"
    print(f"\nlargest peak of fsdpq: {worst / MB:.0f} MB, target {TARGET_BYTES / MB:.0f} {verdict}")
    if options.json:
        found = {"weight_bytes": weight_bytes, "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
