"""Hydra's grammar: what it lists is what Hydra lists, and what is written is read back."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from fsdpq.errors import Problem
from fsdpq.recipe.compose import parse_overrides
from fsdpq.sweep.choosing.grammar import (
    MAX_VALUES,
    Interval,
    Parameter,
    Patterns,
    parse_sweeps,
    sort_words,
    write_override,
)


def parse(text: str) -> Parameter | Problem:
    key, _, values = text.partition("=")
    [found] = [item for items in parse_sweeps([(key, values, None)]) for item in items]
    return found


def read(text: str) -> Parameter:
    found = parse(text)
    assert isinstance(found, Parameter), found
    return found


@pytest.mark.parametrize(
    "text",
    [
        "a=1,2,3",
        "a=1,b,c d,'e,f',null,true,1e-4,1_000",
        "a=choice(1,x)",
        "a=range(8)",
        "a=range(1,8)",
        "a=range(1,8,step=3)",
        "a=range(8,1,step=-2)",
        "a=sort(range(1,8),reverse=true)",
        "a=sort(3,1,2)",
        "a=sort(b,c,a,reverse=true)",
        "a=[1,2],[3],[]",
        "a=str(1,2)",
        "a=bool(0,1)",
        "a=float(range(1,4))",
    ],
)
def test_values_are_those_that_hydra_iterates_over(text: str) -> None:
    override = OverridesParser.create().parse_override(text)
    theirs = [override._convert_value(value) for value in override.sweep_iterator()]
    assert list(read(text).values) == theirs


def test_decimal_steps_stay_decimal() -> None:
    """Hydra's own sum ends in 0.30000000000000004, which would be another trial."""
    assert read("a=range(0.1,0.5,step=0.1)").values == (0.1, 0.2, 0.3, 0.4)


def test_one_value_is_a_parameter_with_one_value() -> None:
    assert read("a=16").values == (16,)
    assert read("a=[q,v]").values == (["q", "v"],)


def test_glob_keeps_its_patterns() -> None:
    assert read("recipe=glob(r/*-qlora-*)").patterns == Patterns(("r/*-qlora-*",))
    assert read("a=glob([x*,y*],exclude=z*)").patterns == Patterns(("x*", "y*"), ("z*",))


def test_shuffle_is_noted_and_not_done() -> None:
    found = read("a=shuffle(range(1,5))")
    assert (found.values, found.shuffle) == ((1, 2, 3, 4), True)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("a=interval(1e-5,1e-3)", Interval(1e-5, 1e-3)),
        ("a=tag(log,interval(1e-5,1e-3))", Interval(1e-5, 1e-3, log=True)),
        ("a=int(interval(1,5))", Interval(1, 5, whole=True)),
        ("a=tag(log,int(interval(1,64)))", Interval(1, 64, log=True, whole=True)),
    ],
)
def test_intervals_keep_their_ends(text: str, interval: Interval) -> None:
    assert read(text).interval == interval


def test_interval_is_drawn_evenly_and_log_by_magnitude() -> None:
    places = [(index + 0.5) / 3000 for index in range(3000)]
    even = [Interval(1.0, 1000.0).at(place) for place in places]
    log = [Interval(1.0, 1000.0, log=True).at(place) for place in places]
    whole = [Interval(1, 3, whole=True).at(place) for place in places]
    assert sum(value < 100 for value in even) == pytest.approx(297, abs=2)  # 99 of 999
    assert [sum(10**n <= value < 10 ** (n + 1) for value in log) for n in range(3)] == [1000] * 3
    assert [whole.count(value) for value in (1, 2, 3)] == [1000] * 3
    assert (Interval(1, 3, whole=True).at(1.0), Interval(2.0, 3.0).at(0.0)) == (3, 2.0)


def test_drawn_numbers_are_short_enough_to_copy() -> None:
    random = Random(0)
    drawn = [Interval(1e-5, 1e-3, log=True).at(random.random()) for _ in range(100)]
    assert all(float(f"{value:.6g}") == value for value in drawn)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a=range(1,2", "`a=range(1,2` cannot be read", "close the bracket"),
        ("a=1,,2", "`a=1,,2` cannot be read", "quote"),
        ("a=nope(1,2)", "Unknown function 'nope'", "quote"),
        ("a=tag(hot,choice(1,2))", "the tag `hot` of `a` means nothing here", "tag(log"),
        ("a=tag(log,choice(1,2))", "the tag `log` of `a` means nothing here", "tag(log"),
        ("a=interval(5,1)", "interval(5,1) holds no numbers", "smaller number first"),
        ("a=interval(0,inf)", "interval(0,inf) has no end", "finite"),
        ("a=tag(log,interval(0,1))", "interval(0,1) reaches down to 0", "start above 0"),
        ("a=range(5,1)", "range(5,1,1) is empty", "before the second"),
        ("a=range(1,5,step=0)", "range(1,5,0) has no end", "a step"),
        ("a=range(0,1e300)", "1E+300", "larger `step=`"),
        (f"a=range({MAX_VALUES + 1})", f"more than {MAX_VALUES}", "larger `step=`"),
        ("a={x:1},{x:2}", "a value of `a` is a mapping", "recipe files"),
        ("+a=1,2", "it neither adds nor deletes one", "`a`"),
        ("a=1,\x1b[2J", "cannot be printed", "quote"),
    ],
)
def test_what_cannot_be_tried_says_why(text: str, message: str, hint: str) -> None:
    found = parse(text)
    assert isinstance(found, Problem)
    assert message in found.message
    assert hint in found.hint


def test_words_of_a_command_line_are_sorted() -> None:
    words = [
        "a.b=1,2",
        "c=3",
        "d=[1,2]",
        "recipe=x.yaml",
        "broken",
        "e=range(1,",
        "f=[1,,2",
        "g=1,,2",
    ]
    found = sort_words(words)
    assert found.sweeps == {"a.b": "1,2", "recipe": "x.yaml", "e": "range(1,", "g": "1,,2"}
    assert found.fixed == ("c=3", "d=[1,2]", "broken", "f=[1,,2")
    assert found.typed["a.b"] == "a.b=1,2"


def test_a_key_that_is_swept_twice_is_refused() -> None:
    [problem] = sort_words(["a=1,2", "a=3,4"]).problems
    assert problem.message == "`a` is given twice"


_SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
    | st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=20)
)  # fmt: skip


@given(_SCALARS | st.lists(_SCALARS, max_size=4))
def test_an_override_that_is_written_is_read_back(value: Any) -> None:
    text = write_override("a.b", value)
    overrides, problems = parse_overrides([text])
    if problems:
        assert not text.isprintable()
        return
    assert _typed([overrides[0].value]) == _typed([value])


@pytest.mark.parametrize(
    "word", ["true", "Null", "1e-4", "12", "nan", "", " a", "a,b", "it's", "\\'"]
)
def test_words_that_look_like_something_else_stay_words(word: str) -> None:
    [override], _ = parse_overrides([write_override("a", word)])
    assert (override.value, type(override.value)) == (word, str)


def _typed(values: Sequence[Any]) -> list[Any]:
    return [(type(v), _typed(v)) if isinstance(v, list) else (type(v), v) for v in values]
