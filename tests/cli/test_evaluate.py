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
    assert not (place / "results").exists()


VIEWS = ("evaluation.md", "README.md", "statistics.json", "report.html")


@pytest.mark.parametrize("there", range(len(VIEWS)))
def test_views_come_after_a_kill(place: Path, cli: Cli, there: int) -> None:
    """A run killed after `evaluation.json` and the first of its views goes on to the others."""
    assert cli("merge", "recipe.yaml", "--out", "merged", "-q").code == 0
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
    assert cli("merge", "recipe.yaml", "--out", "merged", "--resume", "-q").code == 0
    assert (merged / "report.html").stat().st_mtime_ns == before


def test_baselines_lie_beside_the_output(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while, and not in a place for small files."""
    seen: list[Path] = []

    def measured(candidate: object, *_: object) -> None:
        seen.extend(place.glob(".merged.scratch.partial/*/model.safetensors"))

    from mergebench.evaluation.run import Batch

    whole = Batch._measure

    def spied(self: Batch, *args: object) -> object:
        measured(*args)
        return whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "_measure", spied)
    assert cli("merge", "recipe.yaml", "--out", "merged", "-q").code == 0
    assert seen
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
