"""`mergebench compare`: what goes to stdout and stderr, and the exit code that a CI job sees."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.evaluation.conftest import write_data, write_encoder, write_head

ROWS = [("1", "a", "a"), ("2", "a", "b"), ("3", "b", "b"), ("4", "b", "c"), ("5", "a", "a")]  # id, old, new; gold a


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """old.jsonl and new.jsonl: one item of five lost, none won."""
    monkeypatch.chdir(tmp_path)
    for name, side in (("old", 1), ("new", 2)):
        rows = [{"id": row[0], "pred": row[side], "gold": "a"} for row in ROWS]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(directory: Path) -> Path:
    """The same answers as rows of an evaluation."""
    from mergebench.evaluation import Record, Results, save
    from mergebench.evaluation.compare.predictions import read_predictions
    from mergebench.evaluation.task import accuracy

    records = []
    for name in ("old", "new"):
        score = accuracy(read_predictions(Path(f"{name}.jsonl")).answers)
        whole: Any = {**vars(score), "model": name, "role": "input", "task": "t", "split": "test"}
        records.append(Record(**whole, relative=None, seconds=1.0))
    directory.mkdir()
    save(Results({}, tuple(records)), directory)
    return directory


def test_files_and_rows_say_the_same(cli: Cli, tmp_path: Path) -> None:
    ran = cli("compare", "old.jsonl", "new.jsonl", "--json")
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    (by_file,) = json.loads(ran.out)["tasks"]
    (by_row,) = json.loads(cli("compare", "old", "new", "--in", evaluation(tmp_path / "e"), "--json").out)["tasks"]
    assert (by_file.pop("task"), by_row.pop("task"), by_file.pop("split"), by_row.pop("split")) == (
        "items",
        "t",
        "",
        "test",
    )
    assert (by_file["flipped"][0].pop("gold"), by_row["flipped"][0].pop("gold")) == ("a", None)
    assert by_file == by_row
    assert (by_row["lost_items"], by_row["nfr"], by_row["nfr_mc"], by_row["btc"]) == (["2"], 0.2, 0.4, 2 / 3)


@pytest.mark.parametrize(("bound", "code"), [("0.2", 0), ("0.19", 4), ("1", 0), ("0", 4)])
def test_the_gate(cli: Cli, bound: str, code: int) -> None:
    """The table comes first, then one line says why; at the bound is within it."""
    ran = cli("compare", "old.jsonl", "new.jsonl", "--max-nfr", bound)
    assert ran.code == code
    assert " items  5  60.0  40.0 " in ran.out
    if code:
        why = f"items: NFR 20.0% (1 of 5), at most {100 * float(bound):g}% is allowed"
        assert ran.err.splitlines()[0] == f"error: BLOCK: {why}"
    else:
        assert ran.err == "passed: every task is within its limits\n"
    as_json = cli("compare", "old.jsonl", "new.jsonl", "--max-nfr", bound, "--json")
    document = json.loads(as_json.out)
    assert (as_json.code, document["tasks"][0]["lost"]) == (code, 1)
    assert document["gate"]["passed"] is (not code)
    assert document["gate"]["tasks"][0].items() >= {"task": "items", "max_nfr": float(bound), "max_drop": None}.items()


@pytest.mark.parametrize(("lost", "bound", "code"), [(10, "9.9", 4), (10, "10", 0), (1, "0.5", 0), (0, "0", 0)])
def test_the_gate_of_accuracy(cli: Cli, lost: int, bound: str, code: int) -> None:
    """Of 100 items 10 lost are beyond chance, 1 is not; at the bound is within it."""
    for name, wrong in (("old", 0), ("new", lost)):
        rows = [{"id": i, "pred": "b" if i < wrong else "a", "gold": "a"} for i in range(100)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cli("compare", "old.jsonl", "new.jsonl", "--max-drop", bound)
    assert ran.code == code
    if code:
        assert ran.err.startswith("error: BLOCK: items: −10.0 [−17.4, −5.5], −9.9 is allowed\n")
    elif lost == 10:
        change = "items is worse beyond chance, within its limit: −10.0 [−17.4, −5.5]"
        assert ran.err == f"passed: every task is within its limits\nwarning: {change}\n"
    else:
        told = f"items (100 items show a difference of 4.0, {'−0.5' if lost else '0'} is allowed)"
        assert ran.err == f"passed, but inconclusive: too few items to tell: {told}\n"
    document = json.loads(cli("compare", "old.jsonl", "new.jsonl", "--max-drop", bound, "--max-nfr", "1", "--json").out)
    (row,) = document["gate"]["tasks"]
    assert row["max_drop"] == pytest.approx(float(bound) / 100) and row["max_nfr"] == 1.0
    assert (row["verdict"] == "BLOCK", document["gate"]["passed"]) == (bool(code), not code)


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_other_formats(cli: Cli, form: str) -> None:
    ran = cli("compare", "old.jsonl", "new.jsonl", "--format", form)
    assert (ran.code, ran.err) == (0, "")
    if form == "csv":
        (one,) = csv.DictReader(io.StringIO(ran.out))
        assert [one[name] for name in ("task", "old", "new", "difference", "p")] == [
            "items",
            "60.0",
            "40.0",
            "-20",
            "0.317",
        ]
        assert float(one["low"]) < -20 < float(one["high"]) and one["NFR"] == "20.0"
    else:
        assert "\\pm" not in ran.out and ran.out.count("both right") == 1
        assert ran.out.count("\n| ---" if form == "markdown" else r"\begin{tabular}") == 4  # verdicts, items


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["old.jsonl"], 2, "Missing argument"),
        (["old.jsonl", "new.jsonl", "--max-nfr", "2"], 2, "--max-nfr"),
        (["old.jsonl", "new.jsonl", "--max-nfr", "nan"], 2, "--max-nfr"),
        (["old.jsonl", "new.jsonl", "--max-drop", "-1"], 2, "--max-drop"),
        (["old.jsonl", "new.jsonl", "--flips", "-1"], 2, "--flips"),
        (["old", "new"], 2, "error: old: no file of predictions"),
        (["old", "nwe", "--in", "e"], 2, "error: no model in the evaluation is called 'nwe'"),
        (["old", "new", "--in", "none"], 1, "none: cannot be read"),
        (["old", "new", "--in", "e", "--suite", "s.yaml"], 2, "--in and --suite"),
        (["old", "new", "--split", "test"], 2, "--split goes with --suite"),
    ],
)
def test_mistakes(cli: Cli, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    evaluation(tmp_path / "e")
    ran = cli("compare", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in " ".join(ran.err.split())


def test_a_row_is_named_by_how_it_begins(cli: Cli, tmp_path: Path) -> None:
    place = evaluation(tmp_path / "e")
    whole = cli("compare", "old", "new", "--in", place, "--json").out
    assert cli("compare", "ol", "n", "--in", place, "--json").out == whole


def test_how_many_flips(cli: Cli) -> None:
    shown: Any = [cli("compare", "old.jsonl", "new.jsonl", "--flips", n).out for n in (0, 10)]
    assert [" items, 2: lost: a → b (right: a)" in text for text in shown] == [False, True]


def test_models_are_measured_where_they_were_not(cli: Cli, tmp_path: Path) -> None:
    """The same numbers as two rows of `eval`; what is known is not measured again, and what fails is said."""
    for name, seed in (("x", 0), ("y", 5)):
        write_encoder(tmp_path / name, seed=seed)
    write_data(tmp_path / "data.jsonl")
    write_head(tmp_path / "a")
    task = {"name": "t", "kind": "text-classification", "data": "data.jsonl", "head": "a/head.safetensors"}
    Path("suite.yaml").write_text(json.dumps({"tasks": [task]}))
    models = ("compare", "x", "y", "--suite", "suite.yaml", "--results", "kept")

    assert cli("eval", "suite.yaml", "x", "--results", "kept", "--out", "e1").code == 0
    (found,) = json.loads(cli(*models, "--json").out)["tasks"]
    assert found["n"] == 41 and found["lost"] and found["won"]
    assert cli("eval", "suite.yaml", "x", "y", "--results", "other", "--out", "e2").code == 0
    assert json.loads(cli("compare", "x", "y", "--in", "e2", "--json").out)["tasks"] == [found]
    assert len(list(Path("kept").glob("[0-9a-f]*.json"))) == 2
    written = {file: file.stat().st_ino for file in Path("kept").iterdir()}
    assert cli(*models).code == 0
    assert written == {file: file.stat().st_ino for file in Path("kept").iterdir()}

    ran = cli("compare", "x", "z", "--suite", "suite.yaml", "--results", "kept")
    assert (ran.code, ran.out) == (3, "") and "z" in ran.err
    write_head(tmp_path / "a", hidden=8)
    ran = cli(*models)
    assert (ran.code, ran.out) == (3, "") and "it takes 8 features, model 'x' gives 16" in ran.err
    assert cli(*models, "--split", "tset").code == 2
