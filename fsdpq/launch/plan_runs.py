"""What ``fsdpq plan --trace`` and ``--measure`` start: a worker process that stands for rank 0."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.single_worker import WorkerFiles, run_single_worker
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.traced import Traced
from fsdpq.recipe.load import dump_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles

WORKER = ("-m", "fsdpq.worker")
MEMORY_HINT = "trace or measure a recipe with fewer layers or ranks, or on a machine with more RAM"


def trace_recipe(
    recipe: Recipe,
    shape: ModelShape,
    *,
    config_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> Traced:
    """Runs the worker's own step of rank 0 under fake tensors; no GPU, no weights.

    Args:
        recipe: resolved; its ``launch`` says how many ranks there are.
        shape: of the model.
        config_dir: holds the model's ``config.json``; None makes one from ``shape``.
        trust_remote_code: run Python code that the model brings.

    Raises:
        PlanError: a step of this recipe depends on values (experts), or transformers makes another
            model from the sizes of ``shape``.
        FsdpqError: whatever else the worker reports.
    """
    return _run("trace", recipe, shape, config_dir, trust_remote_code=trust_remote_code)


def measure_recipe(
    recipe: Recipe,
    shape: ModelShape,
    *,
    config_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> Traced:
    """Runs two steps of rank 0 for real, on random weights and the first GPU of this machine.

    A recipe with ``launch.device: cpu`` is measured by the resident memory of the process.

    Args:
        recipe: resolved; its ``launch`` says how many ranks there are.
        shape: of the model.
        config_dir: holds the model's ``config.json``; None makes one from ``shape``.
        trust_remote_code: run Python code that the model brings.

    Raises:
        EnvironmentProblemError: this machine has no GPU.
        FsdpqError: whatever the worker reports.
    """
    if recipe.launch.device == "cuda" and not list_gpus():
        raise EnvironmentProblemError(
            "`--measure` runs a step on a GPU, and this machine shows none",
            hint="use `--trace`, which needs none, or run it where `nvidia-smi -L` lists a GPU",
        )
    return _run("measure", recipe, shape, config_dir, trust_remote_code=trust_remote_code)


def _run(
    verb: str,
    recipe: Recipe,
    shape: ModelShape,
    config_dir: Path | None,
    *,
    trust_remote_code: bool,
) -> Traced:
    with tempfile.TemporaryDirectory(prefix=f"fsdpq-{verb}-") as root:
        files = RunFiles(Path(root))
        files.logs.mkdir()
        files.resolved.write_text(dump_recipe(recipe), encoding="utf-8")
        out = Path(root) / "found.json"
        arguments = [*WORKER, verb, root, f"--out={out}"]
        if config_dir is None:
            config_dir = Path(root) / "model"
            config_dir.mkdir()
            config = json.dumps(config_of(shape))
            (config_dir / "config.json").write_text(config, encoding="utf-8")
            arguments.append(f"--num-weights={shape.num_weights}")
        arguments.append(f"--config-dir={config_dir}")
        arguments += [TRUST_FLAG] if trust_remote_code else []
        logs = WorkerFiles(files.logs / "out", files.rank_log(0), files.rank_error(0))
        run_single_worker(arguments, logs, memory_hint=MEMORY_HINT)
        return Traced.from_json(json.loads(out.read_text(encoding="utf-8")))


def config_of(shape: ModelShape) -> dict[str, Any]:
    """Returns a ``config.json`` of transformers that has the sizes of ``shape``."""
    config: dict[str, Any] = {
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size or shape.moe_intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "use_qkv_bias": _has_query_bias(shape),  # StableLM's
    }
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        config["head_dim"] = shape.head_dim
    if shape.num_experts:
        config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_experts_per_tok,
            "moe_intermediate_size": shape.moe_intermediate_size,
        }
    return config


def _has_query_bias(shape: ModelShape) -> bool:
    names = (tensor.name for group in shape.layers for tensor in group.tensors)
    return any(name.endswith("q_proj.bias") for name in names)
