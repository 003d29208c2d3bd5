"""Reading files and mappings: what is no recipe at all, and what YAML makes of values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.errors import RecipeError
from mergebench.recipe import load
from mergebench.recipe.positions import Places
from mergebench.recipe.yaml import parse, read

Write = Callable[[str], str]

MORE = "read them with mergebench.load_stages, or write one document a file"
NO_RECIPE = [
    ("", "recipe.yaml: empty", "a recipe names at least a merge_method and models"),
    ("# only a comment\n", "recipe.yaml: empty", "a recipe names at least a merge_method and models"),
    ("{}", "recipe.yaml:1:1: empty", "a recipe names at least a merge_method and models"),
    ("- linear\n", "recipe.yaml:1:1: a recipe is a mapping, got a list", "begin with merge_method: and models:"),
    ("linear", "recipe.yaml:1:1: a recipe is a mapping, got 'linear'", "begin with merge_method: and models:"),
    ("---\n", "recipe.yaml:2:1: empty", "a recipe names at least a merge_method and models"),
    ("[]", "recipe.yaml:1:1: a recipe is a mapping, got a list", "begin with merge_method: and models:"),
    ("a: 1\nb: c: 2\n", "recipe.yaml:2:5: not valid YAML: mapping values are not allowed here", None),
    ("a:\n\t- b\n", "recipe.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token", None),
    ("a: 'b\n", "recipe.yaml:2:1: not valid YAML: found unexpected end of stream", None),
    ("a: [1, 2\n", "recipe.yaml:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'", None),
    (
        "exclude: [*.bias]\n",
        "recipe.yaml:1:11: not valid YAML: found undefined alias '.bias'",
        "quote a glob that starts with *, a bare one is a YAML alias",
    ),
    ("a: 1\nb: \x07\n", "recipe.yaml:2:4: not valid YAML: control character", None),
    ("a: 1\n---\nb: 2\n", "recipe.yaml:3:1: several documents, load reads one", MORE),
    ("a: 1\nb: 2\na: 3\n", "recipe.yaml:3:1: a: given twice", "it is in line 1 already"),
    ("a:\n  - x: 1\n    x: 2\n", "recipe.yaml:3:5: a.0.x: given twice", "it is in line 2 already"),
    ("a: 1\n2: b\n", "recipe.yaml:2:1: a key must be text, got '2'", "quote it"),
    ("? [a]\n: 1\n", "recipe.yaml:1:3: a key must be text, got a list", "quote it"),
    ("a: 2026-01-31\n", "recipe.yaml:1:4: no place for a YAML timestamp here", "quote it if it is text"),
    ("a: !!set {b}\n", "recipe.yaml:1:4: no place for a YAML set here", "quote it if it is text"),
    ("a: !thing b\n", "recipe.yaml:1:4: no place for a YAML !thing here", "quote it if it is text"),
    ("a: !!int b\n", "recipe.yaml:1:4: not valid YAML: 'b' is no int", None),
    ("a: !!map [b]\n", "recipe.yaml:1:4: no place for a YAML map here", "quote it if it is text"),
    ("<<: 1\na: 2\n", "recipe.yaml:1:1: not valid YAML: << takes a mapping", None),
    ("a:\n  b: .nan\n", "recipe.yaml:2:3: a.b: must be finite, got nan", None),
    ("a: -.inf\n", "recipe.yaml:1:1: a: must be finite, got -inf", None),
    (f"a: {2**63}\n", "recipe.yaml:1:1: a: too large a number", None),
    (f"a: {'9' * 5000}\n", f"recipe.yaml:1:4: not valid YAML: '{'9' * 56}... is no int", None),
    ("a: &x [*x]\n", "recipe.yaml: too large or nested too deep", None),
    ("[" * 5000, "recipe.yaml: too large or nested too deep", None),
    (
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "recipe.yaml: too large or nested too deep",
        None,
    ),
]


@pytest.mark.parametrize(("text", "message", "hint"), NO_RECIPE)
def test_what_is_no_recipe(write: Write, text: str, message: str, hint: str | None) -> None:
    Path(write("")).write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load("recipe.yaml")
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert caught.value.exit_code == 2


def test_missing_file_directory_and_text(write: Write) -> None:
    write("")
    Path("folder.yaml").mkdir()
    Path("utf8.yaml").write_bytes(b"a: 1\nb: \xc3\xa9\xff\n")
    cases = {
        "nowhere/recipe.yaml": "nowhere/recipe.yaml: no such file",
        "folder.yaml": "folder.yaml: a directory, not a YAML file",
        "recipe.yaml/x": "recipe.yaml/x: Not a directory",
        "a\0b": r"a\x00b: its path has a NUL character: give it another name",
        "utf8.yaml": "utf8.yaml:2:5: not UTF-8 text",
        "merge_method: linear\n": "a recipe is given as a path or a mapping, got text",
    }
    for source, message in cases.items():
        with pytest.raises(RecipeError) as caught:
            load(source)
        assert caught.value.message == message
    with pytest.raises(RecipeError) as caught:
        load("recipe.yml")
    assert caught.value.hint == "did you mean 'recipe.yaml'?"


class Odd:
    """Nothing a recipe can hold."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "recipe: empty"),
        ({"seed": Odd()}, "recipe: seed: no place for a Python Odd here"),
        ({"parameters": {1: 2}}, "recipe: parameters: a key must be text, got 1"),
        ({"parameters": {"t": float("nan")}}, "recipe: parameters.t: must be finite, got nan"),
        ({"seed": 10**5000}, "recipe: seed: too large a number"),
    ],
)
def test_mapping_that_is_no_recipe(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(data)
    assert caught.value.message == message


def test_mapping_that_holds_itself() -> None:
    data: dict[str, Any] = {}
    data["parameters"] = data
    with pytest.raises(RecipeError, match="recipe: too large or nested too deep"):
        load(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5", 5),
        ("010", 10),
        ("true", True),
        ("yes", "yes"),
        ("on", "on"),
        ("~", None),
        ("12:30", "12:30"),
        ("'1'", "1"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse(f"key: {text}", "recipe.yaml", Places()) == {"key": value}
    assert type(parse(text, "recipe.yaml", Places())) is type(value)


def test_positions(write: Write) -> None:
    ((data, places, path, *_),) = read(
        write(
            """
            # a comment first
            merge_method: linear
            models:
              - model: a
                parameters: &shared {weight: 1}
              - {model: b, parameters: *shared}
              - <<: {model: unseen, task_vector: unseen}
                model: c
            """
        )
    )
    assert path == Path("recipe.yaml")
    assert data["models"][1] == {"model": "b", "parameters": {"weight": 1}}
    assert data["models"][2] == {"model": "c", "task_vector": "unseen"}
    assert places.where(()) == "recipe.yaml:2:1"
    assert places.where(("models",)) == "recipe.yaml:3:1"
    assert places.where(("models", 0)) == "recipe.yaml:4:5"
    assert places.where(("models", 1)) == "recipe.yaml:6:5"
    assert places.where(("models", 1, "model")) == "recipe.yaml:6:6"
    assert places.where(("models", 1, "parameters")) == "recipe.yaml:6:16"
    assert places.where(("models", 1, "parameters", "weight")) == "recipe.yaml:5:26"  # where the anchor stands
    assert places.where(("models", 2, "task_vector")) == "recipe.yaml:7:5"  # the nearest parent
    assert places.where(("models", 5, "model")) == "recipe.yaml:3:1"


def test_byte_order_mark_is_no_column(write: Write) -> None:
    Path(write("")).write_bytes(b"\xef\xbb\xbfa: 1\n")
    ((data, places, *_),) = read("recipe.yaml")
    assert data == {"a": 1}
    assert places.where(("a",)) == "recipe.yaml:1:1"


def test_an_anchor_may_be_defined_twice(recwarn: pytest.WarningsRecorder) -> None:
    assert parse("a: &x 1\nb: &x 2\nc: *x", "recipe.yaml", Places()) == {"a": 1, "b": 2, "c": 2}
    assert not recwarn.list


@given(st.text() | st.text("abc:-[]{}&*!#'\"?|>%@, \n\t0", max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text, "recipe.yaml", Places())
    except RecipeError as error:
        assert "\n" not in error.message and error.message.startswith("recipe.yaml")
