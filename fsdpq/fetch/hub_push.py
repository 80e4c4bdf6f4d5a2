"""Uploads what a run exported to a repository of the Hugging Face hub, when somebody asks for it.

Only ``fsdpq push`` calls this, never a recipe: what a stranger's recipe says uploads nothing. The
account is the one of ``hf auth login`` (or ``HF_TOKEN``); the token is read by huggingface_hub and
nowhere else. https://huggingface.co/docs/huggingface_hub/guides/upload
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import ExportError, FetchError, UsageError
from fsdpq.fetch.hub import REPOSITORY_PATTERN
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

BASE_KEYS = {"adapter_config.json": "base_model_name_or_path", "delta.json": "base_model"}
"""Files that name the base model, and under which key."""

CARD_NAME = "README.md"

MAX_TEXT_BYTES = 1 << 20
"""Texts up to this size are searched for paths of this machine."""


@dataclass(frozen=True)
class UploadFile:
    """One file to upload.

    Attributes:
        name: in the repository.
        content: the file, or what stands there instead of what it says here.
        num_bytes: its size.
    """

    name: str
    content: Path | bytes
    num_bytes: int


def list_upload(files: RunFiles, *, base: str | None) -> list[UploadFile]:
    """Returns what to upload of a finished run.

    Args:
        files: the run directory.
        base: repository of the base model on the hub, for a run whose base was a local directory.

    Raises:
        ExportError: the run is not finished, or its export was not checked or is gone.
        UsageError: the base is a directory of this machine, which nobody else has.
    """
    exported = _finished_export(files)
    found = [_read_file(path, exported, base) for path in sorted(exported.rglob("*"))]
    uploads = [each for each in found if each is not None]
    private = [part for part in (str(Path.home()), str(files.root.absolute())) if len(part) > 1]
    for upload in uploads:
        text = upload.content if isinstance(upload.content, bytes) else _text_of(upload.content)
        told = [part for part in private if part.encode() in text]
        if told:
            raise UsageError(
                f"`{upload.name}` names a directory of this machine: {told[0]}",
                hint="take it out of the file, then push again",
            )
    return uploads


def _finished_export(files: RunFiles) -> Path:
    """Returns the exported directory of a finished run."""
    rows = list(read_json_lines(files.events))
    exports = [row for row in rows if row.get("event") == "export"]
    if not exports or not any(row.get("event") == "done" for row in rows):
        raise ExportError(
            f"the run in {files.root} is not finished: there is nothing to push",
            hint=f"`fsdpq resume {files.root}` goes on",
        )
    if not exports[-1]["verified"]:
        raise ExportError(
            "nobody checked that stock libraries load what this run exported",
            hint="train with `export.verify: true`",
        )
    directory = files.exported(exports[-1]["format"])
    if not directory.is_dir():
        raise ExportError(f"{directory} is gone", hint="run again")
    return directory


def _read_file(path: Path, root: Path, base: str | None) -> UploadFile | None:
    if not path.is_file() or path.name.startswith("."):
        return None
    name = path.relative_to(root).as_posix()
    content: Path | bytes = path
    if name in BASE_KEYS:
        content = _name_base(path, BASE_KEYS[name], base)
    elif name == CARD_NAME and base is not None:
        content = _name_base_in_card(path.read_text(encoding="utf-8"), base).encode()
    size = path.stat().st_size if isinstance(content, Path) else len(content)
    return UploadFile(name, content, size)


def _name_base(path: Path, key: str, base: str | None) -> Path | bytes:
    """Returns a configuration that names ``base``, or the one that is there if it names a hub's."""
    config = json.loads(path.read_text(encoding="utf-8"))
    named = str(config[key])
    is_on_hub = config.get("revision") is not None
    if base is None and is_on_hub:
        return path
    if base is None:
        raise UsageError(
            f"the base of this run is {named}, which nobody else has",
            hint="say where it is on the hub: `--base ORG/NAME`",
        )
    if is_on_hub and named != base:
        raise UsageError(
            f"the base of this run is `{named}`, not `{base}`", hint="leave `--base` out"
        )
    return json.dumps({**config, key: base}, indent=2).encode()


def _name_base_in_card(card: str, base: str) -> str:
    """Returns a card with the base in its metadata and in the code that loads it."""
    if not re.search(r"^base_model:", card, flags=re.MULTILINE):
        relation = "adapter" if "library_name: peft" in card else "finetune"
        metadata = f"---\nbase_model: {base}\nbase_model_relation: {relation}\n"
        card = card.replace("---\n", metadata, 1)
    return card.replace('from_pretrained("BASE")', f'from_pretrained("{base}")').replace(
        "; `BASE` is a directory with the base model", ""
    )


def _text_of(path: Path) -> bytes:
    return path.read_bytes() if path.stat().st_size <= MAX_TEXT_BYTES else b""


def push_files(
    uploads: list[UploadFile], repository: str, *, public: bool, revision: str | None
) -> str:
    """Uploads files in one commit, and returns its address.

    The repository is made if it is not there, private unless ``public``.

    Args:
        uploads: see `list_upload`.
        repository: ``USER/NAME``.
        public: whether everybody may see it.
        revision: branch, made if it is not there; None is the main branch.

    Raises:
        UsageError: no name of a repository, or one that everybody sees and ``public`` is not set.
        FetchError: nobody is logged in, the hub refuses, or it cannot be reached.
    """
    if not REPOSITORY_PATTERN.fullmatch(repository):
        raise UsageError(f"`{repository}` is no name of a repository", hint="it is `USER/NAME`")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api: Any = huggingface_hub.HfApi()
    try:
        api.whoami()
        if not public:
            _check_not_public(api, repository)
        api.create_repo(repository, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations = [
            huggingface_hub.CommitOperationAdd(
                each.name, each.content if isinstance(each.content, bytes) else str(each.content)
            )
            for each in uploads
        ]
        done = api.create_commit(
            repository, operations, commit_message="Upload with fsdpq", revision=revision
        )
    except LocalTokenNotFoundError as error:
        raise FetchError(
            "nobody is logged in to the hub", hint="run `hf auth login`, then push again"
        ) from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explain_refusal(repository, error) from error
    except Exception as error:
        # Connection errors come from the HTTP library below, see `fsdpq.fetch.hub`.
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore")):
            raise _explain_refusal(repository, error) from error
        raise
    return str(done.commit_url)


def _check_not_public(api: Any, repository: str) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        everybody_sees = not api.repo_info(repository).private
    except RepositoryNotFoundError:
        return
    if everybody_sees:
        raise UsageError(
            f"everybody sees `{repository}`, and uploads are private unless you say otherwise",
            hint="add `--public`, or push to another repository",
        )


def _explain_refusal(repository: str, error: Exception) -> FetchError:
    """Returns the error for an upload that failed; tokens are in no message of the hub's."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        found = FetchError(
            f"the hub does not let you write to `{repository}`",
            hint="log in with a token that may write (`hf auth login`), or name a repository of "
            "your own",
        )
    else:
        found = FetchError(
            f"cannot upload to `{repository}`: the hub cannot be reached or answered with an error",
            hint="check the network (HF_HUB_OFFLINE must not be set) and push again",
        )
    found.details = f"{type(error).__name__}: {error}"
    return found
