"""Training from disk: frozen shards are pages of the base's file, and the numbers stay the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import bases
from support.alone import run_alone
from support.page_cache import anonymous_bytes
from support.ranks import RankPool
from support.sharded import train
from support.tiny import random_rows, save_tiny_llama
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import fake_pg

from fsdpq.dist import own_shard
from fsdpq.errors import CheckpointError, DamagedBaseError
from fsdpq.fsdp import group_read_ahead
from fsdpq.model.loading.mapped_base import replace_own_rows
from fsdpq.tensor_files import base_layout
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, read_manifest
from fsdpq.tensor_files.header import read_header
from fsdpq.worker.from_disk import base_watch


def train_three_steps(base: Path | None, directory: Path, offload: str) -> dict[str, Any]:
    """Loads and trains; returns losses and what of the base became memory."""
    before = anonymous_bytes()
    assembled = bases.assemble_from(base, directory, {"fsdp": {"offload": offload}})
    frozen = [own_shard(p).rows for p in assembled.model.parameters() if not p.requires_grad]
    loaded = anonymous_bytes() - before
    losses, norms = train(
        assembled,
        [random_rows(4, seed=seed) for seed in range(3)],
        micro_batch_size=2,
        lr=1e-3,
        max_norm=1.0,
    )
    mapped = assembled.mapped_base
    return {
        "numbers": (losses, norms),
        "loaded": loaded,
        "own": sum(rows.nbytes for rows in frozen),
        "copied": None if mapped is None else mapped.count_copied_bytes(),
    }


# 331 rows of embedding and head: 111, 111 and 109 on three ranks; the head is the file's end.
@pytest.mark.parametrize(("num_ranks", "tied"), [(1, True), (3, False)])
def test_losses_are_those_of_host_memory_and_uneven_rows_are_no_copies(
    ranks: RankPool, tmp_path: Path, num_ranks: int, tied: bool
) -> None:
    directory = save_tiny_llama(tmp_path / "model", tied=tied)
    ranks.run(2, bases.write, directory, tmp_path / "base", {})
    for mapped, copied in zip(
        ranks.run(num_ranks, train_three_steps, tmp_path / "base", directory, "disk"),
        ranks.run(num_ranks, train_three_steps, None, directory, "cpu"),
        strict=True,
    ):
        assert mapped["numbers"] == copied["numbers"]
        assert mapped["copied"] == 0


def told_of_a_base_without_room(directory: Path, base: Path) -> list[str]:
    """Writes a base that ends with its last tensor; returns what a run over it is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_layout, "MOST_RANKS", 1)
        bases.write(directory, base, {})
    assembled = bases.assemble_from(base, directory, {"fsdp": {"offload": "disk"}})
    train(assembled, [random_rows(4)], micro_batch_size=2, lr=1e-3, max_norm=1.0)
    events = Rows()
    watch = base_watch(assembled.mapped_base, events, bases.CPU)
    watch()
    watch()
    return [row["message"] for row in events.rows]


def test_rows_that_had_to_be_copied_are_told_once(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "model", tied=False)
    whole, short = ranks.run(2, told_of_a_base_without_room, directory, tmp_path / "base")
    assert whole == []
    # 165 of the head's 331 rows, 192 numbers of 4 bytes each.
    assert [message.partition(" are copies")[0] for message in short] == [
        "0.1 MB of the base's rows"
    ]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_base_never_becomes_memory_of_the_process(
    ranks: RankPool, tmp_path: Path, num_ranks: int
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 32768}
    directory = save_tiny_llama(tmp_path / "model", **wide)
    ranks.run(2, bases.write, directory, tmp_path / "base", {})
    ranks.run(num_ranks, train_three_steps, tmp_path / "base", directory, "disk")  # warms up
    for answer in ranks.run(num_ranks, train_three_steps, tmp_path / "base", directory, "disk"):
        assert answer["own"] > 60e6 / num_ranks
        adapters = 2e6
        assert answer["loaded"] < 0.05 * answer["own"] + adapters
        assert answer["copied"] == 0
    found = load_file(tmp_path / "base" / WEIGHTS_NAME)
    expected = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], expected)


def announced_groups(base: Path, directory: Path) -> list[str]:
    """Trains a step over a mapped base; returns whose bytes were asked for, in order."""
    asked: list[int] = []

    class AtOnce:
        def __init__(self, *_arguments: object) -> None: ...

        def submit(self, function: Callable[..., None], *arguments: object) -> None:
            function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_read_ahead, "ThreadPoolExecutor", AtOnce)
        patch.setattr(os, "posix_fadvise", lambda _file, at, _size, _what: asked.append(at))
        sections = {"fsdp": {"offload": "disk"}, "training": {"layer_chunks": 2}}
        assembled = bases.assemble_from(base, directory, sections)
        rows = random_rows(4)
        train(assembled, [rows], micro_batch_size=4, lr=1e-3, max_norm=1.0)
    entries = read_header(base / WEIGHTS_NAME).entries.values()
    names = [next(e.name for e in entries if e.start <= at < e.stop) for at in asked]
    # Of a layer the linears are one range, each norm one of its own.
    return [name.split(".self_attn")[0] for name in names if "norm" not in name]


def test_layers_are_read_ahead_in_forward_and_backward(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "model", tied=False, num_hidden_layers=5)
    ranks.run(1, bases.write, directory, tmp_path / "base", {})
    [asked] = ranks.run(1, announced_groups, tmp_path / "base", directory)
    layer = "model.layers.{}".format
    assert asked == [
        *map(layer, (0, 1, 2, 3, 4)), "lm_head.weight",
        # Backward: layer 4 has just run.
        *map(layer, (3, 2, 1, 0)), "model.embed_tokens.weight", layer(1),
    ]  # fmt: skip


def watch_a_base(base: Path, directory: Path) -> dict[str, Any]:
    """Trains over a mapped base to which things happen; returns what was told after each."""
    assembled = bases.assemble_from(base, directory, {"fsdp": {"offload": "disk"}})
    mapped, path = assembled.mapped_base, base / WEIGHTS_NAME
    assert mapped is not None
    events = Rows()
    watch = base_watch(mapped, events, bases.CPU)

    def step(seed: int) -> float:
        rows = random_rows(4, seed=seed)
        return train(assembled, [rows], micro_batch_size=4, lr=1e-3, max_norm=1.0)[0][0]

    def happens(change: Callable[[], object]) -> dict[str, Any]:
        change()
        events.rows.clear()
        try:
            watch()
            watch()  # says nothing twice
        except DamagedBaseError as error:
            return {"error": error.message, "hint": error.hint}
        return {"told": [row["message"] for row in events.rows], "loss": step(1)}

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(mapped.file_bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    found = {"nothing": happens(lambda: None), "touched": happens(path.touch)}
    found["changed"] = happens(flip)
    found["changed back"] = happens(flip)
    found["deleted"] = happens(lambda: path.rename(path.with_suffix(".gone")))
    path = path.with_suffix(".gone")
    found["cut"] = happens(lambda: os.truncate(path, mapped.file_bytes - 1))
    return found


class Rows:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)


def test_what_happens_to_the_file_while_it_is_used_is_told(ranks: RankPool, tmp_path: Path) -> None:
    directory, base = save_tiny_llama(tmp_path / "model"), tmp_path / "base"
    ranks.run(1, bases.write, directory, base, {})
    [found] = ranks.run(1, watch_a_base, base, directory)
    path = base / WEIGHTS_NAME
    assert found["nothing"]["told"] == []
    assert found["touched"]["told"] == [
        f"{path} was written to or touched while this run uses it; its weights are what they were"
    ]
    prefix = f"the base {base} is damaged: {WEIGHTS_NAME} was changed while this run uses it: "
    assert found["changed"]["error"].startswith(prefix + "bytes ")
    assert "do not fit their checksum (rank 0 needs them for `" in found["changed"]["error"]
    assert found["changed"]["hint"] == f"delete {base}: the next run makes it again"
    assert len(found["changed back"]["told"]) == 1
    told = f"{path} was deleted or replaced: this run goes on with the file that it opened, whose "
    assert found["deleted"]["told"] == [f"{told}room on the disk is free once it ends"]
    size = path.with_suffix(".gone").stat().st_size
    assert found["cut"]["error"] == prefix + f"it has {size} bytes instead of {size + 1}"


def refusal(base: Path | None, directory: Path) -> str:
    try:
        bases.assemble_from(base, directory, {"fsdp": {"offload": "disk"}})
    except CheckpointError as error:
        return str(error)
    return ""


def test_without_a_base_there_is_nothing_to_map(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "model")
    [told] = ranks.run(1, refusal, None, directory)
    assert "`fsdp.offload: disk` maps a quantized base from its file, and there is none" in told


def test_damage_is_found_before_rows_are_mapped(ranks: RankPool, tmp_path: Path) -> None:
    directory, base = save_tiny_llama(tmp_path / "model"), tmp_path / "base"
    ranks.run(1, bases.write, directory, base, {})
    content = bytearray((base / WEIGHTS_NAME).read_bytes())
    content[read_manifest(base).header_bytes + 5] ^= 1
    (base / WEIGHTS_NAME).write_bytes(content)
    [told] = ranks.run(1, refusal, base, directory)
    assert "do not fit their checksum" in told


def replace_rows_under_a_gpu_mesh() -> dict[str, Any]:
    """Replaces the shard of a parameter whose mesh is of a GPU that does not exist."""
    from fsdpq.worker.plan_trace.unreal_gpu import register_unreal_gpu

    device = register_unreal_gpu()
    store = fake_pg.FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=2)
    mesh = DeviceMesh(device.type, [0, 1], _init_backend=False)
    empty = torch.empty(3, 4, dtype=torch.uint8, device="meta")
    shape, stride = torch.Size((6, 4)), (4, 1)
    sharded = DTensor.from_local(
        empty, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    parameter, rows = (
        nn.Parameter(sharded, requires_grad=False),
        torch.zeros(3, 4, dtype=torch.uint8),
    )
    replace_own_rows(parameter, rows)
    local = parameter.to_local()
    return {
        "device": local.device.type,
        "same": local.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr(),
        "shape": list(parameter.shape),
    }


def test_mapped_rows_stay_in_host_memory_where_the_mesh_is_of_gpus() -> None:
    found = run_alone(replace_rows_under_a_gpu_mesh)
    assert found == {"device": "cpu", "same": True, "shape": [6, 4]}
