"""Suites are strict: every mistake is one line that says where, what and the way out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import Suite, load_suite
from mergebench.recipe.positions import Places
from tests.evaluation.conftest import LABELS, write_data, write_head

Entry = Callable[..., dict[str, Any]]
TASK = """\
  - name: a
    kind: text-classification
    data: data.jsonl
    head: a/head.safetensors
"""


def fails(kind: type[MergebenchError], source: Any, *words: str, hint: str | None = None, **more: Any) -> None:
    with pytest.raises(kind) as caught:
        load_suite(source, **more)
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    if hint is not None:
        assert hint in (caught.value.hint or ""), caught.value.hint


def test_a_whole_suite(place: Path) -> None:
    Path("suite.yaml").write_text("tasks:\n" + TASK + TASK.replace("name: a", "name: b") + "    limit: 3\n")
    suite = load_suite("suite.yaml")
    assert [(task.name, task.split, task.ready.n) for task in suite.tasks] == [("a", "test", 41), ("b", "test", 3)]
    assert (suite.items, suite.path) == (44, Path("suite.yaml"))
    assert suite.tasks[0].kind.name == "text-classification"
    assert suite.tasks[0].ready.home == Path("a")


def test_provenance_tells_other_data_apart(place: Path, entry: Entry) -> None:
    def written(suite: Suite) -> dict[str, Any]:
        return json.loads(json.dumps(suite.to_dict()))

    first = written(load_suite({"tasks": [entry(limit=7)]}))
    (task,) = first["tasks"]
    assert {name: task[name] for name in ("name", "kind", "split", "limit", "n")} == {
        "name": "a", "kind": "text-classification", "split": "test", "limit": 7, "n": 7,
    }  # fmt: skip
    assert list(task["sha256"]) == ["data.jsonl", "a/head.safetensors"]
    assert first == written(load_suite({"tasks": [entry(limit=7)]}))
    write_data(place / "data.jsonl", seed=9)
    other = written(load_suite({"tasks": [entry(limit=7)]}))
    assert other["tasks"][0]["sha256"]["data.jsonl"] != task["sha256"]["data.jsonl"]


def test_paths_are_looked_up_here_then_beside_the_suite_then_in_the_folders(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "beside", "third"):
        (place / folder).mkdir()
    write_head(place / "third/a")
    (place / "beside/suite.yaml").write_text("tasks:\n" + TASK)
    (place / "data.jsonl").rename(place / "beside/data.jsonl")
    write_data(place / "third/data.jsonl", count=3)
    (place / "a/head.safetensors").unlink()
    monkeypatch.chdir(place / "here")
    suite = load_suite("suite.yaml", [place / "third", place / "beside"])
    assert suite.tasks[0].ready.files == (place / "beside/data.jsonl", place / "third/a/head.safetensors")
    write_data(place / "here/data.jsonl", count=2)
    assert load_suite(place / "beside/suite.yaml", [place / "third"]).items == 2
    fails(
        RecipeError, "gone.yaml", "no such suite file: gone.yaml", hint=str(place / "third"), folders=[place / "third"]
    )


def test_a_suite_in_a_recipe_is_found_where_it_stands(place: Path, entry: Entry) -> None:
    at = ("evaluate", "suite")
    places = Places({(): "r.yaml", at: "r.yaml:9:3", (*at, "tasks", 0, "lmit"): "r.yaml:12:7"})
    fails(RecipeError, {"tasks": [entry(lmit=3)]}, "r.yaml:12:7: evaluate.suite.tasks.0.lmit", places=places, at=at)
    fails(RecipeError, "gone.yaml", "r.yaml:9:3: evaluate.suite: no such suite file: gone.yaml", places=places, at=at)


SUITES = [
    ("", "suite.yaml: a suite is a mapping, got nothing", "tasks:"),
    ("- a", "suite.yaml:1:1: a suite is a mapping, got a list", "tasks:"),
    ("taks: []", "suite.yaml:1:1: taks: no such key", "did you mean 'tasks'?"),
    ("tasks: []", "suite.yaml:1:1: tasks: names no task", "- name"),
    ("tasks: {name: a}", "tasks: must be a list of tasks, got a mapping", None),
    ("tasks: [a]", "suite.yaml:1:9: tasks.0: must be a mapping, got 'a'", None),
    ("tasks:\n  - name: a\n", "suite.yaml:2:5: tasks.0.kind: missing", "text-classification"),
    ("tasks:\n  - kind: a\n", "suite.yaml:2:5: tasks.0.name: missing", None),
    ("tasks:\n  - {name: 3, kind: a}\n", "tasks.0.name: must be a word, got 3", "quote"),
    (f"tasks:\n{TASK}{TASK}", "suite.yaml:6:5: tasks.1.name: a task before it is called 'a' too", "rename"),
    (
        "tasks:\n" + TASK.replace("text-c", "txt-c"),
        "suite.yaml:3:5: tasks.0.kind: no kind of task",
        "did you mean 'text-",
    ),
    (f"tasks:\n{TASK}    lable: x\n", "suite.yaml:6:5: tasks.0.lable: 'text-classification' has no", "mean 'label'?"),
    ("tasks:\n" + TASK.replace("    head: a/head.safetensors\n", ""), "tasks.0.head: missing", "head.safetensors"),
    (
        "tasks:\n" + TASK.replace("data.jsonl", "gone.jsonl"),
        "suite.yaml:4:5: tasks.0.data: no such file: gone",
        "looked",
    ),
    ("tasks:\n" + TASK.replace("a/head.safetensors", "a"), "tasks.0.head: no such file: a", None),
    ("tasks:\n" + TASK.replace("data.jsonl", "[data.jsonl]"), "tasks.0.data: must be a path, got a list", None),
    (f"tasks:\n{TASK}    limit: 0\n", "suite.yaml:6:5: tasks.0.limit: must be at least 1, got 0", None),
    (f"tasks:\n{TASK}    limit: 1.5\n", "limit: must be a whole number, at least 1, got 1.5", None),
    (f"tasks:\n{TASK}    limit: true\n", "limit: must be a whole number, at least 1, got true", None),
    (f"tasks:\n{TASK}    limit: a\n", "limit: must be a whole number, at least 1, got 'a'", None),
    (f"tasks:\n{TASK}    split: train\n", "split: must be one of test, validation, got 'train'", None),
    (f"tasks:\n{TASK}    split: [test]\n", "split: must be one of test, validation, got a list", None),
    (f"tasks:\n{TASK}    text: ''\n", "text: must be a word, got ''", None),
    (f"tasks:\n{TASK}    text: 3\n", "text: must be a word, got 3", None),
    (f"tasks:\n{TASK}    name: b\n", "suite.yaml:6:5: tasks.0.name: given twice", "line 2"),
    ("tasks: [", "not valid YAML", None),
]


@pytest.mark.parametrize(("text", "message", "hint"), SUITES)
def test_strict(text: str, message: str, hint: str | None, place: Path) -> None:
    Path("suite.yaml").write_text(text)
    fails(RecipeError, "suite.yaml", message, hint=hint)


def test_what_is_no_suite_at_all(place: Path) -> None:
    Path("latin.yaml").write_bytes(b"tasks: \xe9")
    fails(RecipeError, "latin.yaml", "latin.yaml:1:8: not UTF-8", hint="UTF-8")
    fails(RecipeError, "x" * 5000, "no such suite file")
    fails(RecipeError, str(place), "no such suite file")
    fails(RecipeError, {"tasks": [{"name": {1}}]}, "suite: tasks.0.name")


GOOD = '{"id": "1", "text": "w1", "label": "good"}\n'
DATA = [
    ("", "data.jsonl: it holds no items", "one JSON object a line"),
    ("\n \n", "data.jsonl: it holds no items", None),
    (GOOD + "{", "data.jsonl:2:2: not valid JSON", None),
    ('id,text,label\r\n1,"a, ""b""",good\r\n', "data.jsonl:1:1: not valid JSON", "one JSON object a line"),
    ('\ufeff"id","text"\n"1","a\nb"\n', "data.jsonl:1:5: not valid JSON", "one JSON object a line"),
    (
        GOOD + '{"id": "2", "text": "a \\ud83d b", "label": "x"}',
        "data.jsonl:2: not valid JSON: '\\ud83d' is half",
        None,
    ),
    (GOOD + "[" * 10_000, "data.jsonl:2: not valid JSON: nested too deep", None),
    (GOOD + "\n" + '{"id": "2", "text": "w1" "label": 1}\n', "data.jsonl:3:26: not valid JSON", None),
    (GOOD + "[1]\n", "data.jsonl:2: not a JSON object", None),
    (GOOD + GOOD, "data.jsonl:2: id '1' is in data.jsonl:1 already", "flips"),
    (GOOD + '{"id": 1, "text": "w", "label": "bad"}\n', "data.jsonl:2: id '1' is in data.jsonl:1 already", None),
    (GOOD.replace('"text"', '"txt"'), "data.jsonl:1: no column 'text', it has id, txt, label", "text: COLUMN"),
    (GOOD + GOOD.replace('"id"', '"key"'), "data.jsonl:2: no column 'id'", None),
    (GOOD.replace('"id"', '"key"') + GOOD, "data.jsonl:2: it has an id, the rows before it have none", "flips"),
    (GOOD + '{"id": "2", "text": "w"}', "data.jsonl:2: no column 'label'", None),
    (GOOD.replace('"1"', "null"), "data.jsonl:1: id must be text or a whole number, got null", None),
    (GOOD.replace('"1"', "true"), "data.jsonl:1: id must be text or a whole number, got true", None),
    (GOOD.replace('"1"', '""'), 'data.jsonl:1: id must be text or a whole number, got ""', None),
    (GOOD.replace('"w1"', "3"), "data.jsonl:1: text must be text, got 3", None),
    (GOOD.replace("good", "god"), "data.jsonl:1: label 'god' is none of the labels of a/head", "did you mean 'good'?"),
    (GOOD.replace('"good"', "[0]"), "data.jsonl:1: label must be text, got [0]", None),
    (GOOD.replace('"good"', "true"), "data.jsonl:1: label must be text, got True", None),
]


@pytest.mark.parametrize(("text", "message", "hint"), DATA)
def test_strict_data(text: str, message: str, hint: str | None, place: Path, entry: Entry) -> None:
    Path("data.jsonl").write_text(text)
    fails(RunError, {"tasks": [entry()]}, message, hint=hint)


def test_lines_end_at_newlines_alone(place: Path, entry: Entry) -> None:
    """A line separator within a text is a character like any other, and a byte order mark is none."""
    Path("data.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("w1", "w1 \u2028 \x85 w2").encode())
    assert load_suite({"tasks": [entry()]}).items == 1
    Path("data.jsonl").write_bytes(GOOD.replace("\n", "\r\n").encode() + b"\r\n")
    assert load_suite({"tasks": [entry()]}).items == 1
    Path("data.jsonl").write_bytes(GOOD.encode() + b'{"id": "\xff"}\n')
    fails(RunError, {"tasks": [entry()]}, "data.jsonl:2: not valid JSON: not UTF-8 text")


def heads() -> list[Any]:
    weight, bias = torch.zeros(3, 4), torch.zeros(3)
    about = {"labels": json.dumps(LABELS), "pooling": "mean", "max_length": "8"}

    def without(name: str) -> dict[str, str]:
        return {key: value for key, value in about.items() if key != name}

    return [
        ({"weight": weight}, about, ModelError, "not a head: it holds weight F32 [3, 4]"),
        ({"weight": weight, "bias": bias[:2].clone()}, about, ModelError, "not a head"),
        ({"weight": bias, "bias": bias.clone()}, about, ModelError, "not a head"),
        ({"weight": weight, "bias": bias, "more": bias.clone()}, about, ModelError, "not a head"),
        ({"weight": weight.int(), "bias": bias}, about, ModelError, "weight I32"),
        (
            {"weight": weight, "bias": bias},
            without("labels"),
            ModelError,
            "metadata 'labels' must be JSON, it has none",
        ),
        ({"weight": weight, "bias": bias}, {**about, "labels": "bad"}, ModelError, "metadata 'labels' must be JSON"),
        ({"weight": weight, "bias": bias}, {**about, "labels": "[1, true, 3]"}, ModelError, "a JSON list of words"),
        (
            {"weight": weight, "bias": bias},
            {**about, "labels": '["bad", "good"]'},
            ModelError,
            "2 different labels for 3",
        ),
        (
            {"weight": weight, "bias": bias},
            {**about, "labels": '["a", "a", "b"]'},
            ModelError,
            "2 different labels for 3",
        ),
        (
            {"weight": weight, "bias": bias},
            without("pooling"),
            ModelError,
            "'pooling' must be one of mean, cls, cls+mean, it has none",
        ),
        ({"weight": weight, "bias": bias}, {**about, "pooling": "max"}, ModelError, "cls+mean, got 'max'"),
        ({"weight": weight, "bias": bias}, {**about, "normalize": "1"}, ModelError, "true or false, got '1'"),
        ({"weight": weight, "bias": bias}, {**about, "max_length": "0"}, ModelError, "a number of tokens, got 0"),
        ({"weight": weight, "bias": bias}, {**about, "max_length": "x"}, ModelError, "'max_length' must be"),
        ({"weight": weight, "bias": bias}, without("max_length"), RecipeError, "does not say its max_length"),
        ({"weight": weight / 0, "bias": bias}, about, RunError, "weight holds a value that is not finite"),
    ]


@pytest.mark.parametrize(("tensors", "metadata", "kind", "message"), heads())
def test_strict_heads(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    kind: type[MergebenchError],
    message: str,
    place: Path,
    entry: Entry,
) -> None:
    save_file(tensors, "a/head.safetensors", metadata=metadata)
    fails(kind, {"tasks": [entry()]}, "a/head.safetensors: ", message)


def test_a_damaged_head(place: Path, entry: Entry) -> None:
    whole = Path("a/head.safetensors").read_bytes()
    Path("a/head.safetensors").write_bytes(whole[:-4])
    fails(RunError, {"tasks": [entry()]}, "a/head.safetensors: ")


def test_half_precision_heads_and_yaml_anchors(place: Path) -> None:
    """What users write to say less: shared keys by an anchor, a head in the adapter's own type."""
    tensors = {"weight": torch.ones(3, 4).bfloat16(), "bias": torch.zeros(3).half()}
    save_file(tensors, "a/head.safetensors", metadata={"labels": json.dumps(LABELS), "pooling": "cls"})
    text = """\
        tasks:
          - &shared {name: a, kind: text-classification, data: data.jsonl, head: a/head.safetensors, max_length: 9}
          - {<<: *shared, name: b, limit: null}
        """
    Path("suite.yaml").write_text(textwrap.dedent(text))
    assert [task.params.max_length for task in load_suite("suite.yaml").tasks] == [9, 9]


def split_files(place: Path) -> None:
    rows = (place / "data.jsonl").read_text().splitlines(keepends=True)
    (place / "test.jsonl").write_text("".join(rows[:20]))
    (place / "validation.jsonl").write_text("".join(rows[20:]))


def test_a_name_stands_once_in_each_split(place: Path, entry: Entry) -> None:
    split_files(place)
    tasks = [entry(data="test.jsonl"), entry(data="validation.jsonl", split="validation")]
    suite = load_suite({"tasks": tasks})
    assert [(task.name, task.split) for task in suite.tasks] == [("a", "test"), ("a", "validation")]
    assert [task.split for task in suite.only().tasks] == ["test"]
    assert [task.split for task in suite.only("validation").tasks] == ["validation"]
    assert [task.split for task in load_suite({"tasks": tasks[1:]}).only().tasks] == ["validation"]
    with pytest.raises(RecipeError, match="suite: no task has split: validation"):
        load_suite({"tasks": tasks[:1]}).only("validation")
    with pytest.raises(RecipeError, match=r"tasks\.1\.name: a task before it is called 'a' too"):
        load_suite({"tasks": [tasks[0], tasks[0]]})


def test_no_item_in_both_splits(place: Path, entry: Entry) -> None:
    """What chose is not what reports, whatever the tasks and files are called."""
    same = {"tasks": [entry(), entry(name="b", split="validation")]}
    fails(RecipeError, same, "41 of its items are also in the test data of 'a': data.jsonl:1 and data.jsonl:1")
    split_files(place)
    rows = (place / "test.jsonl").read_text().splitlines(keepends=True)
    with open(place / "validation.jsonl", "a") as file:
        file.write(rows[6])
    both = {"tasks": [entry(data="validation.jsonl", split="validation"), entry(name="b", data="test.jsonl")]}
    words = "one of its items is also in the validation data of 'a': test.jsonl:7 and validation.jsonl:22"
    fails(RecipeError, both, words, hint="what is chosen on some items is reported on others")
    both["tasks"][1]["limit"] = 6  # not among those used
    load_suite(both)


def test_a_seed_draws_items(place: Path, entry: Entry) -> None:
    def drawn(**keys: Any) -> list[str]:
        return list(load_suite({"tasks": [entry(**keys)]}).tasks[0].ready.items.values())

    everything = drawn()
    assert drawn(limit=9) == everything[:9]
    first, second = drawn(limit=9, seed=1), drawn(limit=9, seed=2)
    assert first == drawn(limit=9, seed=1)
    assert first != second
    for sample in (first, second):
        assert len(sample) == 9
        assert sample == [where for where in everything if where in sample]  # in the file's order
    assert drawn(limit=99, seed=1) == drawn(seed=1) == everything


def test_a_list_is_as_good_as_lines(place: Path, entry: Entry) -> None:
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    (place / "list.json").write_text(" \n" + json.dumps(rows, indent=1))
    lines, listed = (load_suite({"tasks": [entry(data=name)]}).tasks[0].ready for name in ("data.jsonl", "list.json"))
    assert list(lines.items) == list(listed.items)
    del rows[4]["label"]
    (place / "list.json").write_text(json.dumps(rows))
    fails(RunError, {"tasks": [entry(data="list.json")]}, "list.json: item 5: no column 'label'")
    (place / "list.json").write_text('[\n{"id": 1},\n{"id" 2}]')
    fails(RunError, {"tasks": [entry(data="list.json")]}, "list.json:3:7: not valid JSON")


@pytest.mark.parametrize(
    ("kind", "row", "text", "gold"),
    [
        (
            "multiple-choice",
            {"question": "Rome is in", "choices": ["Italy", "Peru"], "answer": 0},
            "Rome is in",
            "Italy",
        ),
        ("perplexity", {"text": "a  text\n"}, "a text", None),
        ("generation", {"prompt": "Q:", "target": "A"}, "Q:", "A"),
    ],
)
def test_what_an_item_asks(kind: str, row: dict[str, Any], text: str, gold: str | None, place: Path) -> None:
    Path("rows.jsonl").write_text(json.dumps({"id": 7, **row}))
    more = {"scorer": "exact-match"} if kind == "generation" else {}
    suite = load_suite({"tasks": [{"name": "t", "kind": kind, "data": "rows.jsonl", **more}]})
    assert dict(suite.tasks[0].ready.asked) == {"7": (text, gold)}
