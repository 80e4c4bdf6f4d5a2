"""Recipes made to do harm: nothing runs, nothing leaks, nothing takes long, nothing crashes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdpq.cli.main import main
from fsdpq.recipe.build_data import MAX_NODES
from fsdpq.recipe.source import MAX_BYTES, MAX_LINES, MAX_WORDS

HEAD = (
    "version: 1\nname: x\nmodel: {name_or_path: base}\ndata: {dataset: pypi:chatterbot-english}\n"
)


def grow(line: str, item: str, joint: str = ", ") -> str:
    """Lines whose values are nine times the one before: 9 ** 17 at the end."""
    steps = [(str(i), str(i - 1)) for i in range(1, 18)]
    return "".join(
        line.replace("NOW", now).replace("ITEMS", joint.join([item] * 9)).replace("LAST", last)
        for now, last in steps
    )


LAUGHS = grow("aNOW: &aNOW [ITEMS]\n", "*aLAST")
MERGES = grow("aNOW: &aNOW {<<: [ITEMS]}\n", "*aLAST")
TEXTS = grow("tNOW: 'ITEMS'\n", "${tLAST}", "")
LISTS = grow("tNOW: [ITEMS]\n", "'${tLAST}'")
CHAIN = "".join(f"t{i}: ${{t{i + 1}}}\n" for i in range(3000))

HOSTILE: dict[str, bytes | str] = {
    "python tag": "name: !!python/object/apply:os.system ['touch owned']\n",
    "python name": "name: !!python/name:os.system\n",
    "python tag on the root": "!!python/object/apply:os.system ['touch owned']\n",
    "python tag on a mapping": "!!python/object/new:os.system {a: 1}\n",
    "python tag in a merge": HEAD + "fsdp: {<<: !!python/object/apply:os.system ['touch owned']}\n",
    "hydra target": HEAD + "optimizer: {_target_: os.system, command: touch owned}\n",
    "torchtune component": HEAD + "model: {_component_: os.system}\n",
    "nested target": HEAD + "metrics: {wandb: {_target_: os.system}}\n",
    "hydra searchpath": HEAD + "hydra: {searchpath: ['pkg://os']}\n",
    "environment": HEAD + "description: ${oc.env:SECRET_TOKEN}\n",
    "environment in a list": HEAD + "metrics: {sample_prompts: ['${oc.env:SECRET_TOKEN}']}\n",
    "environment in a name": "version: 1\nname: ${oc.env:SECRET_TOKEN}\n",
    "environment setting": HEAD + "env: {LD_PRELOAD: evil.so}\n",
    "trust_remote_code": HEAD.replace("base}", "base, trust_remote_code: true}"),
    "remote data": HEAD.replace("dataset: pypi:chatterbot-english", "path: https://x.example/a"),
    "remote bucket": HEAD.replace("dataset: pypi:chatterbot-english", "path: s3://bucket/a"),
    "remote hub path": HEAD.replace("dataset: pypi:chatterbot-english", "dataset: hf://a/b"),
    "remote model": HEAD.replace("base", "gs://bucket/model"),
    "fragment outside": "defaults: [../../../../etc/passwd]\n" + HEAD,
    "fragment of the system": "defaults: [/etc/passwd]\n" + HEAD,
    "fragment from the network": "defaults: ['http://x.example/a.yaml']\n" + HEAD,
    "many fragments": "defaults: [" + "./x.yaml, " * 5000 + "]\n" + HEAD,
    "alias bomb": "a0: &a0 [x, x]\n" + LAUGHS,
    "merge bomb": "a0: &a0 {k: x}\n" + MERGES,
    "wide merges": "a: &a {" + "".join(f"k{i}: 1, " for i in range(3000)) + "}\n"
    + "".join(f"b{i}: {{<<: *a}}\n" for i in range(500)),
    "recursive alias": "a: &a [*a, *a]\n",
    "recursive merge": "a: &a {<<: *a, b: &b {<<: [*a, *b]}}\n",
    "text bomb": HEAD + "t0: xxxxxxxxxx\n" + TEXTS,
    "list bomb": HEAD + "t0: [x, x]\n" + LISTS,
    "reference chain": HEAD + CHAIN,
    "reference cycle": HEAD + "fsdp: {offload: '${fsdp.strategy}', strategy: '${fsdp.offload}'}\n",
    "10 MB of brackets": "[" * 10_000_000,
    "1 MB of brackets": "[" * MAX_BYTES,
    "1 MB of braces": "{" * MAX_BYTES,
    "1 MB of dashes": "- " * (MAX_BYTES // 2),
    "1 MB of question marks": "? " * (MAX_BYTES // 2),
    "1 MB of keys": "".join(f"k{i}: 1\n" for i in range(80_000)),
    "1 MB of the same key": "a: 1\n" * (MAX_BYTES // 5),
    "1 MB of items": "a: [" + "1," * (MAX_BYTES // 2 - 5) + "]",
    "1 MB of comments": "#\n" * (MAX_BYTES // 2),
    "1 MB of empty lines": "\n" * MAX_BYTES,
    "1 MB of words": "a: " + "x " * (MAX_BYTES // 2 - 2),
    "1 MB in one value": HEAD + "description: " + "x" * (MAX_BYTES - 200),
    "1 MB in one key": "x" * (MAX_BYTES - 10) + ": 1",
    "1 MB of wandb": HEAD + "description: " + "wandb" * (MAX_BYTES // 5 - 40),
    "1 MB of references": HEAD + "description: '" + "${name}" * (MAX_BYTES // 7 - 40) + "'",
    "1 MB of open references": HEAD + "description: '" + "${" * (MAX_BYTES // 2 - 80) + "'",
    "1 MB of backslashes": HEAD + "description: '" + "\\" * (MAX_BYTES - 200) + "${'",
    "all nodes on a line": "{" + ", ".join(f"key{i}: v" for i in range(MAX_NODES // 2 - 1)) + "}",
    "all nodes in a section": HEAD
    + "adapter: {kind: lora, "
    + ", ".join(f"rank{i}: v" for i in range(MAX_NODES // 2 - 20))
    + "}",
    "many mistakes": "".join(f"a{i}: !t 1\n" for i in range(MAX_NODES // 2 - 1)),
    "many lines": "a: 1\n" + "#\n" * MAX_LINES,
    "many words": "a: '" + "x " * MAX_WORDS + "'",
    "deep flow": "a: " + "[" * 5000 + "]" * 5000,
    "deep block": "".join(" " * i + f"k{i}:\n" for i in range(1000)),
    "reference in brackets": HEAD + "metrics: {sample_prompts: [${name}]}\n",
    "huge int": HEAD + "training: {steps: " + "9" * 100_000 + "}\n",
    "large int": HEAD + "training: {steps: " + "9" * 99 + "}\n",
    "huge hex int": HEAD + "training: {steps: 0x" + "f" * 100_000 + "}\n",
    "huge float": HEAD + "training: {max_grad_norm: 1e999999}\n",
    "not a number": HEAD + "training: {max_grad_norm: .nan}\n",
    "NUL": "name: a\0b\n",
    "only NULs": "\0" * 1000,
    "escape sequence": "name: '\x1b]0;owned\x07'\n",
    "escaped escape sequence": HEAD + 'description: 1\nmodel: {"\\e[31m": 1}\n',
    "lone surrogate": 'name: "\\ud800"\n',
    "invalid UTF-8": b"name: \xff\xfe\xfa\n",
    "overlong UTF-8": b"name: \xc0\xaf\n",
    "UTF-16": HEAD.encode("utf-16"),
    "UTF-32": HEAD.encode("utf-32"),
    "latin-1": "name: \xfc\n".encode("latin-1"),
    "an ELF header": b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 10,
    "empty": b"",
    "two documents": HEAD + "---\n" + HEAD,
    "directive": "%YAML 9.9\n---\n" + HEAD,
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\nname: !name:os.system x\n",
    "odd keys": "? [a, b]\n: 1\n? {c: d}\n: 2\n~: 3\n1.5: 4\n",
    "dunder keys": HEAD + "adapter: {kind: lora, __class__: x, model_config: y, __init__: z}\n",
    "kind is a list": HEAD + "adapter: {kind: [lora]}\n",
    "kind is a mapping": HEAD + "adapter: {kind: {kind: lora}}\n",
    "sections are lists": "version: [1]\nname: [x]\nmodel: [1]\ndata: [2]\nfsdp: [3]\n",
    "name climbs": HEAD.replace("name: x", "name: ../../x"),
    "name is absolute": HEAD.replace("name: x", "name: /tmp/x"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipe_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "not-to-be-seen")
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the command sets it for itself
    content = HOSTILE[name]
    Path("r.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    before = os.environ.copy()
    started = time.process_time()
    with pytest.raises(SystemExit) as end:
        main(["validate", "r.yaml"])
    elapsed = time.process_time() - started  # not wall time: tests share the machine
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "hint: " in captured.err
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert "not-to-be-seen" not in captured.err
    assert len(captured.err) < 40_000
    assert elapsed < 2
    assert os.environ == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"], "nothing has run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "optimizer: {_target_: os.system}\n", "`_target_` has no place in a recipe"),
        (HOSTILE["trust_remote_code"], "`trust_remote_code` is not for a recipe to decide"),
        (HOSTILE["remote data"], "`data.path` names something on the network"),
        (HOSTILE["remote model"], "`model.name_or_path` names something on the network"),
        (HOSTILE["alias bomb"], f"the aliases of this file expand to more than {MAX_NODES} values"),
        (HOSTILE["1 MB of items"], f"the file holds more than {MAX_NODES} keys and values"),
        (HOSTILE["10 MB of brackets"], "the file is larger than 1 MB"),
        (HOSTILE["text bomb"], "this text grows to more than 10000 characters"),
        (HOSTILE["1 MB of keys"], "the file has more than 20000 lines"),
        (HOSTILE["reference in brackets"], "hint: inside of brackets put quotes around `${...}`"),
        (HOSTILE["list bomb"], "is a list, and stands inside of a list"),
        (HOSTILE["reference chain"], "goes over more than 20 others"),
    ],
)
def test_the_reason_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["validate", str(tmp_path / "r.yaml")])
    assert message in capsys.readouterr().err


def test_trust_remote_code_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(str(HOSTILE["trust_remote_code"]))
    with pytest.raises(SystemExit):
        main(["validate", str(tmp_path / "r.yaml")])
    err = capsys.readouterr().err
    assert "fsdpq train --trust-remote-code" in err
    assert err.count("error: ") == 1, "one Problem, not an unknown key as well"


TOKENS = {
    "hub": "hf_" + "aB3" * 12,
    "openai": "sk-" + "aB3_" * 10,
    "aws": "AKIA" + "ABCD" * 4,
    "github": "ghp_" + "a1B" * 12,
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=list(TOKENS))
@pytest.mark.parametrize(
    "write",
    [
        lambda token: HEAD + f"description: the token is {token}\n",
        lambda token: HEAD + f"# export TOKEN={token}\n",
        lambda token: HEAD + f"metrics: {{sample_prompts: [{token}]}}\n",
        lambda token: HEAD + f"adapter: {{kind: lora, rank: {token}}}\n",
        lambda token: HEAD + f"{token}: 1\n",
    ],
)
def test_token_in_a_recipe_is_a_problem_that_does_not_show_it(
    token: str, write: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(write(token))
    for flag in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["validate", str(tmp_path / "r.yaml"), *flag])
        captured = capsys.readouterr()
        assert end.value.code == 2
        assert "this looks like a secret" in captured.err + captured.out
        assert "environment" in captured.err + captured.out
        assert token not in captured.err + captured.out


def test_token_in_an_override_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(HEAD)
    with pytest.raises(SystemExit):
        main(["validate", str(tmp_path / "r.yaml"), f"description={TOKENS['hub']}"])
    err = capsys.readouterr().err
    assert "--> command line: description=***" in err
    assert TOKENS["hub"] not in err


def test_value_of_a_token_variable_is_a_problem_that_names_the_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    revision = "fedcba9876543210fedcba9876543210fedcba98"  # a commit is no secret
    text = HEAD.replace("base}", f"org/base, revision: {revision}}}")
    (tmp_path / "r.yaml").write_text(text)
    main(["validate", str(tmp_path / "r.yaml")])
    (tmp_path / "r.yaml").write_text(HEAD + "description: " + os.environ["WANDB_API_KEY"] + "\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["validate", str(tmp_path / "r.yaml")])
    err = capsys.readouterr().err
    assert "this is the value of `$WANDB_API_KEY`" in err
    assert os.environ["WANDB_API_KEY"] not in err


@pytest.mark.parametrize(
    ("path", "outside"),
    [
        ("rows.jsonl", False),
        ("sub/../rows.jsonl", False),
        ("../rows.jsonl", True),
        ("~/rows.jsonl", True),
        ("{tmp}/rows.jsonl", True),
        ("link.jsonl", True),
    ],
)
def test_path_that_leaves_the_directory_is_a_notice(
    path: str,
    outside: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "project"
    (home / "sub").mkdir(parents=True)
    for directory in (home, tmp_path):
        (directory / "rows.jsonl").write_text("{}\n")
    (home / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = HEAD.replace("dataset: pypi:chatterbot-english", f"path: {path.format(tmp=tmp_path)}")
    (home / "r.yaml").write_text(text)
    main(["validate", str(home / "r.yaml")])
    captured = capsys.readouterr()
    assert "no mistakes found" in captured.out
    note = f"note: `data.path` ({home / 'r.yaml'}:4) leaves the recipe's directory: "
    assert captured.err == (f"{note}{tmp_path / 'rows.jsonl'}\n" if outside else "")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("yes", "write `true`"),
        ("On", "write `true`"),
        ("no", "write `false`"),
        ("off", "write `false`"),
        ("1", "write `true` or `false`"),
        ("'true'", "write it without quotes"),
    ],
)
def test_yes_and_no_are_no_booleans(
    word: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(HEAD + f"fsdp:\n  no_sync: {word}\n")
    with pytest.raises(SystemExit):
        main(["validate", str(tmp_path / "r.yaml")])
    err = capsys.readouterr().err
    assert "`fsdp.no_sync` must be true or false" in err
    assert "r.yaml:6:12" in err
    assert f"hint: {hint}\n" in err
