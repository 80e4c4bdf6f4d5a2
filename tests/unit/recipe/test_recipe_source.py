"""YAML is read as YAML 1.2 says, remembers its lines, and cannot do harm."""

import math
import time
from pathlib import Path

import pytest
import yaml

from fsdpq.errors import RecipeError, UsageError
from fsdpq.recipe.source import MAX_BYTES, Source, read_source


def read(tmp_path: Path, content: str | bytes) -> Source:
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_source(path)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, content)
    return caught.value.problems[0].message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("on", "on"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("-3", -3),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("'16'", "16"),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("!!float 3", 3.0),
        ("[a, 1]", ["a", 1]),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    data = read(tmp_path, f"a: {text}\n").data
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


def test_every_key_and_value_has_its_place(tmp_path: Path) -> None:
    marks = read(tmp_path, "# c\nadapter:\n  rank: 16\n  names: [q, v]\n").marks
    rank = marks.key(("adapter", "rank"))
    assert rank is not None
    assert (rank.line, rank.column, rank.length, rank.text) == (3, 3, 4, "  rank: 16")
    second = marks.value(("adapter", "names", 1))
    assert second is not None
    assert (second.line, second.column, second.length) == (4, 14, 1)


def test_mark_of_what_was_not_written_is_its_section(tmp_path: Path) -> None:
    marks = read(tmp_path, "adapter:\n  rank: 16\n").marks
    assert marks.key(("adapter", "alpha")) == marks.keys[("adapter",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "the key `a` is there twice"),
        (
            "a: !!python/object/apply:os.system ['x']\n",
            "the tag `!!python/object/apply:os.system` has no place in a recipe",
        ),
        ("a: !foo 3\n", "the tag `!foo` has no place in a recipe"),
        ("a: !!int abc\n", "`abc` is no int that can be used"),
        ("1: x\n", "a key must be a string"),
        ("? [1, 2]\n: 3\n", "a key must be a string"),
        ("a: " + "9" * 5000, "`" + "9" * 37 + "...` is no int that can be used"),
        ('a: "\\ud800"\n', "`\\ud800` is no string that can be used"),
    ],
)
def test_what_cannot_be_used_is_a_problem(tmp_path: Path, text: str, message: str) -> None:
    assert [problem.message for problem in read(tmp_path, text).problems] == [message]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a:\n\tb: 1\n", "a tab cannot indent YAML"),
        (b"a: \x00\n", "the character U+0000 cannot stand in YAML"),
        ("a: '\x1b[31m'\n", "the character U+001B cannot stand in YAML"),
        (b"x: 1\na: \xff", "line 2 is not UTF-8 text"),
        ("[1]", "a recipe is a mapping of sections"),
        ("# only this\n", "the recipe is empty"),
        ("a: b: c\n", "this is not YAML: mapping values are not allowed here"),
        ("a: " + "[" * 30000, "nested deeper than 20 levels"),
        ("- " * 30000, "nested deeper than 20 levels"),
        ("{" * 30000, "nested deeper than 20 levels"),
        (b"a" * (MAX_BYTES + 1), "the file is larger than 1 MB: that is no recipe"),
    ],
)
def test_hostile_and_broken_files_are_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    started = time.process_time()
    assert refusal(tmp_path, content) == message
    assert time.process_time() - started < 3  # a bomb takes minutes


def test_aliases_repeat_values_and_point_at_the_anchor(tmp_path: Path) -> None:
    source = read(tmp_path, "a: &x 16\nb: *x\nc: &l [q, v]\nd: *l\n")
    assert source.data == {"a": 16, "b": 16, "c": ["q", "v"], "d": ["q", "v"]}
    assert source.data["c"] is not source.data["d"], "an override of one must not change the other"
    assert source.marks.values[("b",)].line == 1
    assert source.marks.keys[("b",)].line == 2
    assert source.marks.values[("d", 1)].line == 3


def test_merge_keys_fill_in_and_point_at_the_anchor(tmp_path: Path) -> None:
    text = """\
a: &a
  x: 1
  y: 2
b: &b {y: 3, z: 4}
c:
  <<: [*a, *b]
  x: 5
d: {<<: *b}
"""
    source = read(tmp_path, text)
    assert source.problems == []
    assert source.data["c"] == {"x": 5, "y": 2, "z": 4}
    assert source.data["d"] == {"y": 3, "z": 4}
    lines = {key: source.marks.keys[("c", key)].line for key in "xyz"}
    assert lines == {"x": 7, "y": 3, "z": 4}
    assert source.marks.values[("c", "y")].line == 3


def test_merge_keys_agree_with_pyyaml(tmp_path: Path) -> None:
    text = """\
a: &a {x: 1, y: 2}
b: &b {<<: *a, y: 3, w: {v: 1}}
c: {<<: [*b, *a], q: 0}
d: {p: 1, <<: *b}
e: {"<<": 1}
"""
    assert read(tmp_path, text).data == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: *x\n", "this is not YAML: found undefined alias 'x'", 1),
        ("a: &x 1\nb: &x 2\n", "duplicate anchor 'x'", 2),
        ("a: &x\n  b: *x\n", "this anchor holds an alias of itself", 1),
        ("a: &x\n  <<: *x\n", "this anchor holds an alias of itself", 1),
        ("a: &x [*x]\n", "this anchor holds an alias of itself", 1),
        ("a: 1\nb: {<<: 1}\n", "`<<` merges a mapping, or a list of mappings", 2),
        ("a: &x {k: 1}\nb:\n  <<: *x\n  <<: *x\n", "the key `<<` is there twice", 4),
        ("a: &x {k: !t 1}\nb: *x\n", "the tag `!t` has no place in a recipe", 1),
        ("\u00a0rank: 1\n", "this key holds a no-break space (U+00A0)", 1),
        ("a: 1\n\ufeffb: 1\n", "this key holds a byte order mark (U+FEFF)", 2),
        ('a: "\\q"\n', "found unknown escape character", 1),
    ],
)
def test_mistakes_with_anchors_and_characters_are_located(
    tmp_path: Path, text: str, message: str, line: int
) -> None:
    try:
        found = read(tmp_path, text).problems
    except RecipeError as error:
        found = error.problems
    assert len(found) == 1, "what an alias repeats is wrong once"
    assert message in found[0].message
    assert found[0].location is not None
    assert found[0].location.line == line
    assert found[0].hint


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_explained(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, "version: 1\n".encode(encoding))
    assert "UTF-8" in caught.value.problems[0].hint


def test_latin_1_is_explained_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, "version: 1\nname: \xfc\n".encode("latin-1"))
    problem = caught.value.problems[0]
    assert problem.message == "line 2 is not UTF-8 text"
    assert "Latin-1" in problem.hint
    assert problem.location is not None
    assert (problem.location.line, problem.location.column) == (2, 7)


def test_second_document_is_refused(tmp_path: Path) -> None:
    assert "single document" in refusal(tmp_path, "a: 1\n---\nb: 1\n")


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    source = read(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert source.data == {"a": 1, "b": 2}
    assert source.marks.keys[("b",)].text == "b: 2"


def test_missing_file_and_directory_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no recipe"):
        read_source(tmp_path / "no.yaml")
    with pytest.raises(UsageError, match="is a directory"):
        read_source(tmp_path)
