"""The quantized base of a run is made once, kept where that pays, and never stops a run."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.screens import Lines

from fsdpq.errors import FetchError, FsdpqError, LaunchError, UsageError
from fsdpq.fetch import cache
from fsdpq.launch import quantize
from fsdpq.launch.inputs import base_cache
from fsdpq.launch.inputs.base_cache import find_base, planned_bytes, remove_damaged_base
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.quantize import QuantizeJob
from fsdpq.plan import base_file
from fsdpq.recipe.load import load_recipe
from fsdpq.run_files.rows import RankError
from fsdpq.tensor_files.base_manifest import (
    BaseManifest,
    damaged,
    is_base,
    read_manifest,
    write_manifest,
)

RECIPE = """\
version: 1
name: tiny
model: {name_or_path: org/Tiny-Model, dtype: fp32}
quantization: {kind: bnb}
data: {format: dummy}
launch: {nproc_per_node: 1, device: cpu}
"""


class Writer:
    """Stands in for the ranks: writes a base and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: BaseException | None = None

    def __call__(self, job: QuantizeJob, directory: Path, *, screen: Lines) -> None:
        assert screen.lines[0].startswith(("quantizing", "`"))
        self.calls += 1
        (directory / "base.safetensors").write_bytes(b"w" * 1000)
        if self.error is not None:
            raise self.error
        (directory / "checksums.bin").write_bytes(b"cccc")
        write_manifest(directory, BaseManifest(job.key, 1000, 1 << 20, 10, "", "", 500, 400))


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FSDPQ_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(base_file, "MIN_BASE_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    made = Writer()
    monkeypatch.setattr(base_cache, "run_quantizer", made)
    monkeypatch.setattr(quantize, "run_quantizer", made)
    return made


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., QuantizeJob]:
    """Returns what to quantize under some overrides."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    model = tmp_path / "model"
    model.mkdir()
    shapes = {"model.layers.0.q.weight": [64, 64], "model.embed_tokens.weight": [8, 64]}
    fields: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        fields[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(fields).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(end)
    (model / "model.safetensors").write_bytes(content)
    (model / "config.json").write_text("{}")

    def make(*overrides: str, sha256: str = "a" * 64) -> QuantizeJob:
        loaded = load_recipe(tmp_path / "recipe.yaml", overrides)
        recipe = resolve_launch(loaded.recipe, num_gpus=0, cpu_dtype="fp32")
        given = {"directory": str(model), "sha256": sha256, "source": "here", "revision": None}
        return QuantizeJob(loaded, recipe, [], given)

    return make


def find(job: QuantizeJob) -> tuple[dict[str, Any] | None, list[str]]:
    screen = Lines()
    return find_base(job, screen=screen), screen.lines


def test_second_run_finds_what_the_first_made(job, writer, cache_dir) -> None:
    base, lines = find(job())
    assert base is not None
    directory = Path(base["directory"])
    assert directory.parent == cache_dir / "bases"
    assert directory.name.startswith("tiny-model-")
    assert lines[0].startswith("quantizing tiny-model once, ")
    assert lines[0].endswith(": the cache has none of it")
    assert read_manifest(directory).key == base["key"]
    assert find(job()) == (base, [f"the quantized base is in {directory}"])
    assert writer.calls == 1


@pytest.mark.parametrize(
    ("overrides", "changes", "reason"),
    [
        (["quantization.block_size=128"], {}, "block_size 64, the recipe says 128"),
        (["quantization.double_quant=false"], {}, "double_quant true, the recipe says false"),
        (["model.dtype=bf16"], {}, "kept in dtype fp32, not bf16"),
        ([], {"sha256": "b" * 64}, "made from here (sha256 aaaaaaaaaaaa), not from"),
    ],
)
def test_other_base_is_made_beside_it_and_the_difference_is_said(
    job, writer, overrides: list[str], changes: dict[str, str], reason: str
) -> None:
    first, _ = find(job())
    second, lines = find(job(*overrides, **changes))
    assert writer.calls == 2
    assert first is not None
    assert second is not None
    assert first["directory"] != second["directory"]
    assert "the one in the cache was " in lines[0]
    assert reason in lines[0]


def test_what_cannot_change_the_bits_needs_no_other_base(job, writer) -> None:
    first, _ = find(job())
    second, _ = find(job("training.seed=5", "adapter.rank=8", "launch.nproc_per_node=2"))
    assert (first, writer.calls) == (second, 1)


@pytest.mark.parametrize("override", ["quantization.kind=none", "quantization.cache=false"])
def test_recipe_can_do_without(job, writer, override: str) -> None:
    assert find(job(override)) == (None, [])
    assert writer.calls == 0


def test_small_or_quantized_models_are_not_kept(
    job, writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = planned_bytes(job().recipe, tmp_path / "model")
    assert 4096 * 4.1 / 8 < num_bytes < 4 * 4096 + 63 * 4 * 64  # a header and padding are in it
    monkeypatch.setattr(base_file, "MIN_BASE_BYTES", num_bytes + 1)
    assert find(job()) == (None, [])
    monkeypatch.setattr(base_file, "MIN_BASE_BYTES", num_bytes)
    (tmp_path / "model" / "config.json").write_text('{"quantization_config": {}}')
    assert find(job()) == (None, [])
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find(job())[0] is not None


def test_disk_without_room_costs_a_notice(job, writer, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    base, lines = find(job())
    assert (base, writer.calls) == (None, 0)
    assert lines[-1].startswith("note: no quantized base is kept: a quantized base of 24.5 kB does")


def test_limit_smaller_than_the_base_costs_a_notice(
    job, writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "2kB")
    base, lines = find(job())
    assert (base, writer.calls) == (None, 0)
    assert lines[-1].endswith("which may hold 2.0 kB")


def test_limit_that_is_no_size_is_an_error(job, writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="`much`, and that is no size"):
        find(job())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_that_refuses_costs_a_notice_and_leaves_nothing(
    job, writer, cache_dir: Path, number: int
) -> None:
    writer.error = OSError(number, "refused")
    base, lines = find(job())
    assert base is None
    assert lines[-1].startswith("note: no quantized base is kept: ")
    assert [path for path in (cache_dir / "bases").iterdir() if path.is_dir()] == []


def test_read_only_cache_costs_a_notice(job, writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.Path, "mkdir", refuse)
    base, lines = find(job())
    assert base is None
    assert "cannot be written: Read-only file system" in lines[-1]


def test_ranks_that_fail_stop_the_run(job, writer, cache_dir: Path) -> None:
    writer.error = LaunchError("rank 0 was killed")
    with pytest.raises(FsdpqError, match="rank 0 was killed"):
        find(job())
    assert [path for path in (cache_dir / "bases").iterdir() if path.is_dir()] == []
    writer.error = None
    assert find(job())[0] is not None


def test_truncated_base_is_made_again(job, writer) -> None:
    base, _ = find(job())
    assert base is not None
    (Path(base["directory"]) / "base.safetensors").write_bytes(b"w")
    again, lines = find(job())
    assert again == base
    assert writer.calls == 2
    assert any("is damaged (`base.safetensors` has 1 bytes instead of 1000)" in x for x in lines)


def test_base_that_a_rank_found_damaged_leaves_the_cache(job, writer) -> None:
    base, _ = find(job())
    assert base is not None
    fields = {
        "rank": 0, "kind": "CheckpointError", "message": f"{base['directory']} is odd",
        "hint": "", "traceback": "", "exit_code": 1, "time": 0.0,
    }  # fmt: skip
    records = [RankError(**fields)]
    error = LaunchError("it is damaged", hint="delete it")
    remove_damaged_base({"base": base}, error, records)
    assert is_base(Path(base["directory"])), "another mistake than damage"
    # A rank that was killed over the file leaves no record: the error itself says it.
    error = damaged(Path(base["directory"]), "base.safetensors has 1 bytes instead of 2")
    remove_damaged_base({"base": base}, error, records)
    assert not Path(base["directory"]).exists()
    assert error.hint.startswith("start again")
    assert find(job())[0] == base
    error = LaunchError("it is damaged", hint="delete it")
    records = [RankError(**fields | {"kind": "DamagedBaseError"})]
    remove_damaged_base({"base": base}, error, records)
    assert not Path(base["directory"]).exists()
    assert error.hint.startswith("start again")
    assert find(job())[0] == base


def test_given_base_must_be_what_the_recipe_says(job, writer, tmp_path: Path) -> None:
    base, _ = find(job())
    assert base is not None
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(base["directory"], tmp_path / "model")
    # The hash is another now: that of the base's own files.
    given, lines = find(job(sha256="c" * 64))
    assert given == {**base, "directory": str(tmp_path / "model")}
    assert lines == []
    with pytest.raises(FetchError, match="block_size 64, the recipe says 128") as caught:
        find(job("quantization.block_size=128"))
    assert "change `quantization`" in caught.value.hint
