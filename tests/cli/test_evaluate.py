"""`mergebench eval` on the command line: tables, roles, choices, and one document on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mergebench
from mergebench.evaluation import Results, document_of
from tests.conftest import Cli
from tests.evaluation.conftest import write_data, write_encoder, write_head


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, x and y, a task of each of x and y in both splits, and a recipe."""
    monkeypatch.chdir(tmp_path)
    tasks = []
    for number, name in enumerate("xy"):
        write_encoder(tmp_path / name, seed=number + 1)
        write_head(tmp_path / name, seed=number + 5)
        for split in ("test", "validation"):
            file = f"{name}-{split}.jsonl"
            write_data(tmp_path / file, count=12, seed=number * 2 + (split == "test"))
            head = f"{name}/head.safetensors"
            tasks.append({"name": name, "kind": "text-classification", "data": file, "head": head, "split": split})
    write_encoder(tmp_path / "base", seed=0)
    Path("suite.yaml").write_text(json.dumps({"tasks": tasks}))
    recipe = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": "x"}, {"model": "y"}],
        "evaluate": {"suite": "suite.yaml", "baselines": [{"task_arithmetic": {"lambda": 0.5}}]},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_a_table_of_models(place: Path, cli: Cli) -> None:
    done = cli("eval", "suite.yaml", "base", "x", "y")
    assert done.code == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines() if line[1:2].isalpha()][1:4] == [
        ["base", "input"], ["x", "input"], ["y", "input"],
    ]  # fmt: skip
    assert "12 test items per task" in done.out
    assert done.err.splitlines() == [
        "evaluating: base",
        "evaluating: x",
        "evaluating: y",
        "wrote evaluations/suite/evaluation.json, evaluation.md and report.html",
    ]
    results = Results.load(place / "evaluations/suite")
    assert [(r.model, r.task, r.split, r.n) for r in results.records] == [
        (model, task, "test", 12) for model in ("base", "x", "y") for task in "xy"
    ]
    assert results.of("x")["x"].relative == results.of("y")["y"].relative == 1.0


def test_what_a_merge_measured_is_known(place: Path, cli: Cli) -> None:
    """The merge's rows and eval's are the same measurements, and the roles follow from the files."""
    assert cli("merge", "recipe.yaml", "--out", "merged", "-q").code == 0
    done = cli("eval", "suite.yaml", "base", "x", "y", "merged", "--out", "there", "--against", "merged", "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert document["made"]["known"] == 8
    assert document["made"]["baseline"] == "merged"
    before, after = Results.load(place / "merged"), Results.load(place / "there")
    assert document["records"] == json.loads(json.dumps(document_of(after)))["records"]
    for old, new in {"base": "base", "x": "x", "y": "y", "linear": "merged"}.items():
        assert {k: (r.value, r.role, r.predictions) for k, r in before.of(old).items()} == {
            k: (r.value, r.role, r.predictions) for k, r in after.of(new).items()
        }


def test_a_split_of_its_own(place: Path, cli: Cli) -> None:
    assert cli("eval", "suite.yaml", "x", "--split", "validation", "-q").code == 0
    assert {record.split for record in Results.load(place / "evaluations/suite").records} == {"validation"}
    wrong = cli("eval", "suite.yaml", "x", "--split", "train")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err == "error: --split: 'train' is not possible\nhint: test or validation\n"
    wrong = cli("eval", "suite.yaml", "x", "y", "--against", "z")
    assert wrong.err.splitlines()[0] == "error: --against: 'z' is none of the models"
    assert wrong.code == 2


def test_one_that_fails(place: Path, cli: Cli) -> None:
    done = cli("eval", "suite.yaml", "gone", "x", "--json")
    assert done.code == 1
    assert {record["model"] for record in json.loads(done.out)["records"]} == {"x"}
    assert done.err.splitlines()[0] == "failed: gone on x, y: model 'gone': no such file or directory"
    alone = cli("eval", "suite.yaml", "gone")
    assert (alone.code, alone.out) == (3, "")
    assert alone.err.splitlines()[-2] == "error: model 'gone': no such file or directory"


def test_from_python(place: Path) -> None:
    results = mergebench.measure("suite.yaml", ["x", "y"], against="x")
    assert results.models == ["x", "y"]
    assert results.made["baseline"] == "x"
    assert mergebench.measure("suite.yaml", ["x", "y"]).made["known"] == 4  # kept as the command line keeps them
    assert mergebench.measure("suite.yaml", ["x"], results=None).made["known"] == 0


def test_suites_of_one_name_keep_apart(place: Path, cli: Cli) -> None:
    """By their folders; and where --out is one place, nothing of another suite or command is replaced unasked."""
    tasks = json.loads(Path("suite.yaml").read_text())["tasks"]
    for folder in ("a", "b"):
        Path(folder).mkdir()
        task = tasks[0] | {name: str(place / tasks[0][name]) for name in ("data", "head")}
        Path(folder, "suite.yaml").write_text(json.dumps({"tasks": [task | {"name": folder}]}))
        assert cli("eval", f"{folder}/suite.yaml", "x", "-q").code == 0
    assert cli("eval", "suite.yaml", "x", "-q").code == 0
    found = {place.name: Results.load(place).tasks for place in Path("evaluations").iterdir()}
    assert found == {"a-suite": ["a"], "b-suite": ["b"], "suite": ["x", "y"]}

    before = Path("evaluations/a-suite/evaluation.json").read_bytes()
    ran = cli("eval", "b/suite.yaml", "x", "--out", "evaluations/a-suite")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines() == [
        "error: evaluations/a-suite: it holds the results of another suite, a/suite.yaml",
        "hint: replace them with --overwrite, or choose another --out",
    ]
    assert Path("evaluations/a-suite/evaluation.json").read_bytes() == before
    assert cli("eval", "a/suite.yaml", "x", "y", "-q").code == 0  # the same suite again
    Path("c.yaml").write_text(Path("a/suite.yaml").read_text())
    assert cli("eval", "c.yaml", "x", "--out", "evaluations/a-suite", "-q").code == 0  # the same under another name
    assert cli("eval", "b/suite.yaml", "x", "--out", "evaluations/a-suite", "--overwrite", "-q").code == 0
    assert Results.load(Path("evaluations/a-suite")).tasks == ["b"]

    for name in ("mergebench.json", "search.json"):
        Path("other").mkdir(exist_ok=True)
        Path("other", name).write_text("{}")
        ran = cli("eval", "suite.yaml", "x", "--out", "other", "--overwrite")
        assert ran.code == 2 and "it holds the results of a " in ran.err
        Path("other", name).unlink()
    Path("other/evaluation.json").write_text("damaged")
    assert cli("eval", "suite.yaml", "x", "--out", "other").code == 2
    assert cli("eval", "suite.yaml", "x", "--out", "other", "--overwrite", "-q").code == 0


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_other_formats(place: Path, cli: Cli, form: str) -> None:
    ran = cli("eval", "suite.yaml", "base", "x", "--format", form, "-q")
    assert ran.code == 0
    begin = {
        "markdown": "| model |",
        "latex": "% Accuracy",
        "csv": "model,role,x,x ±,y,y ±,mean\nbase,input,50.0,14.4,16.7,",
    }
    assert ran.out.startswith(begin[form])
    if form == "markdown":
        assert ran.out == Path("evaluations/suite/evaluation.md").read_text()
    wrong = cli("eval", "suite.yaml", "x", "--format", form, "--json")
    assert (wrong.code, wrong.err.splitlines()[0]) == (2, "error: --format and --json: two ways to print the results")
    assert cli("eval", "suite.yaml", "x", "--format", "html").code == 2


def test_flipped_items_are_in_the_document(place: Path, cli: Cli) -> None:
    """With text and right answer, of a suite without ids."""
    rows = [json.loads(line) for line in Path("x-test.jsonl").read_text().splitlines()]
    tasks = json.loads(Path("suite.yaml").read_text())["tasks"][:1]
    lines = [",".join(["label", "text"])] + [f"{row['label']},{row['text']}" for row in rows]
    Path("x-test.csv").write_text("\n".join(lines) + "\n")
    Path("table.yaml").write_text(json.dumps({"tasks": [tasks[0] | {"data": "x-test.csv"}]}))
    assert cli("eval", "table.yaml", "base", "x", "-q").code == 0
    results = Results.load(Path("evaluations/table"))
    asked = results.items["x"]
    assert sorted((item.text, item.gold) for item in asked.values()) == sorted((r["text"], r["label"]) for r in rows)
    assert all(record.predictions.keys() == asked.keys() for record in results.records)
    (task,) = json.loads(cli("compare", "base", "x", "--in", "evaluations/table", "--json").out)["tasks"]
    assert task["flipped"] and {one["text"] for one in task["flipped"]} <= {row["text"] for row in rows}


def test_what_is_known_is_not_said_to_be_evaluated(place: Path, cli: Cli) -> None:
    assert cli("eval", "suite.yaml", "base", "-q").code == 0
    ran = cli("eval", "suite.yaml", "base", "x")
    assert [line for line in ran.err.splitlines() if line.startswith("evaluating")] == ["evaluating: x"]


VIEWS = ("evaluation.md", "README.md", "statistics.json", "report.html")


@pytest.mark.parametrize("there", range(len(VIEWS)))
def test_views_come_after_a_kill(place: Path, cli: Cli, there: int) -> None:
    """A run killed after `evaluation.json` and the first of its views goes on to the others."""
    first = cli("merge", "recipe.yaml", "--out", "merged", "-q")
    merged, whole = place / "merged", {name: (place / "merged" / name).read_bytes() for name in VIEWS}
    assert b"| linear" in whole["README.md"]
    for name in VIEWS[there:]:
        (merged / name).unlink()
    if there <= VIEWS.index("README.md"):
        (merged / "README.md").write_text("the card without its table")
    done = cli("merge", "recipe.yaml", "--out", "merged", "--resume", "-q")
    assert done.code == 0
    assert {name: (merged / name).read_bytes() for name in VIEWS} == whole
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    before = (merged / "report.html").stat().st_mtime_ns
    again = cli("merge", "recipe.yaml", "--out", "merged", "--resume", "-q")
    assert again == first == (0, done.out, "")  # the tables, though nothing was measured
    assert "against base" in first.out and (merged / "report.html").stat().st_mtime_ns == before


def test_baselines_lie_beside_the_output(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while, and not in a place for small files."""
    seen: list[Path] = []

    def measured(candidate: object, *_: object) -> None:
        seen.extend(place.glob(".merged.scratch.partial/*/model.safetensors"))

    from mergebench.evaluation.batch import Batch

    whole = Batch._measure

    def spied(self: Batch, *args: object) -> object:
        measured(*args)
        return whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "_measure", spied)
    assert cli("merge", "recipe.yaml", "--out", "merged", "-q").code == 0
    assert seen
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
