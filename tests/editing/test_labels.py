"""Which texts are undesired: by themselves or as told, each text once, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergebench.editing.probes.labels import read_labelled
from mergebench.errors import MergebenchError, RecipeError, RunError

Pairs = list[tuple[str, Any]]


def write(path: Path, pairs: Pairs) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return path


@pytest.mark.parametrize(
    ("labels", "undesired", "wanted", "classes"),
    [
        ([0, 1, 1], None, [False, True, True], ("0", "1")),
        ([True, False, True], None, [True, False, True], ("false", "true")),
        (["fine", "undesired", "fine"], None, [False, True, False], ("fine", "undesired")),
        (["1", "0", "0"], None, [True, False, False], ("0", "1")),
        ([0, 1, 2], None, [False, True, False], ("not 1", "1")),
        ([0, 1, 1], "0", [True, False, False], ("1", "0")),
        ([True, False, False], "false", [False, True, True], ("true", "false")),
        (["rude", "kind", "dull"], "rude", [True, False, False], ("not rude", "rude")),
    ],
)
def test_classes(
    labels: list[Any], undesired: str | None, wanted: list[bool], classes: tuple[str, str], tmp_path: Path
) -> None:
    found = read_labelled(write(tmp_path / "d.jsonl", list(zip("abc", labels, strict=True))), undesired=undesired)
    assert (found.texts, found.undesired, found.classes) == (["a", "b", "c"], wanted, classes)
    assert found.places["b"] == f"{tmp_path}/d.jsonl:2"


def test_a_list_other_columns_and_doubles(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"said": text, "bad": bad, "more": 1} for text, bad in [("x", 1), ("y", 0), ("x", 1)]]))
    found = read_labelled(file, "said", "bad")
    assert (found.texts, found.undesired) == (["x", "y"], [True, False])


@pytest.mark.parametrize(
    ("pairs", "undesired", "kind", "message", "hint"),
    [
        ([("a", 1), ("b", 1)], None, RecipeError, "all texts are of one class, '1'", "a probe tells two classes apart"),
        ([("a", "x"), ("b", "x")], None, RecipeError, "all texts are of one class, 'x'", "a probe tells"),
        ([("a", "x"), ("b", "y")], None, RecipeError, "its labels are 'x', 'y': which is undesired?", "--undesired"),
        ([("a", "rude"), ("b", "y")], "rud", RecipeError, "no label is 'rud'", "did you mean 'rude'?"),
        ([("a", "x")], "x", RecipeError, "all texts are of one class, 'x'", "a probe tells two classes apart"),
        ([("a", 0.5), ("b", 1)], None, RunError, ":1: label must be a word, a whole number, true or false", ""),
        ([("a", 0), ("b", None)], None, RunError, ":2: label must be a word", ""),
        ([("a", 0), (" ", 1)], None, RunError, ":2: text must be text, got ' '", ""),
        ([("a", 0), (3, 1)], None, RunError, ":2: text must be text, got 3", ""),
        ([("a", 0), ("b", 1), ("a", 1)], None, RunError, ":3: the same text has another label in d.jsonl:1", "keep"),
        ([], None, RunError, ": it holds no items", "write one JSON object a line"),
    ],
)  # fmt: skip
def test_what_is_wrong(
    pairs: Pairs, undesired: str | None, kind: type[MergebenchError], message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(MergebenchError) as caught:
        read_labelled(write(tmp_path / "d.jsonl", pairs), undesired=undesired)
    assert type(caught.value) is kind
    assert caught.value.message.startswith(f"{tmp_path}/d.jsonl")
    assert message in caught.value.message
    assert (caught.value.hint or "").startswith(hint)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [("a", 1)])
    for text, label, hint in (("said", "label", "--text"), ("text", "bad", "--label")):
        with pytest.raises(RunError, match=r"d.jsonl:1: no column '(said|bad)', it has text, label") as caught:
            read_labelled(file, text, label)
        assert caught.value.hint == f"name it: {hint} COLUMN"
