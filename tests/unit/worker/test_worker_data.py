"""What the worker says about the rows that it cut, left out or packed."""

from __future__ import annotations

import pytest
from support.tiny import random_rows

from fsdpq.data.tokenize import TokenizedData
from fsdpq.errors import RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.worker.setup import Data, list_notices, pack_data, split_data


def test_what_was_done_to_rows_is_said() -> None:
    data = TokenizedData(random_rows(3), num_cut=2, num_untrained=5)
    assert list_notices(data, DataOptions(seq_len=64)) == [
        "2 rows are longer than 64 tokens: cut",
        "5 rows have no token that carries loss: left out",
    ]
    at_start = DataOptions(seq_len=64, truncation="truncate_start")
    assert list_notices(data, at_start)[0] == "2 rows are longer than 64 tokens: cut at their start"
    dropped = TokenizedData(random_rows(3), num_too_long=4)
    assert list_notices(dropped, DataOptions(seq_len=64, truncation="drop")) == [
        "4 rows are longer than 64 tokens: left out"
    ]
    assert list_notices(TokenizedData(random_rows(3)), DataOptions()) == []


def test_packing_keeps_held_out_rows_apart_and_says_how_full_sequences_are() -> None:
    rows = random_rows(40)
    split = split_data(rows, 0.25, seed=1)
    packed, notice = pack_data(split, 64)
    for before, after in ((split.train, packed.train), (split.held_out, packed.held_out)):
        assert sum(len(row.document_lengths) for row in after) == len(before)
        assert sum(row.num_trained for row in after) == sum(row.num_trained for row in before)
    tokens = sum(len(row.input_ids) for row in split.train)
    filled = tokens / (64 * len(packed.train))
    assert notice == (
        f"packed 30 training rows into {len(packed.train)} sequences of 64 tokens, "
        f"{filled:.1%} filled"
    )


def test_packing_without_held_out_rows_packs_none() -> None:
    packed, _ = pack_data(Data(random_rows(3), []), 64)
    assert packed.held_out == []


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(RecipeError, match="1 problem"):
        split_data(random_rows(1), 0.5, seed=0)
