"""`mergebench search` from end to end, on a small encoder with two tasks."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model
from processes import Server

import mergebench
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation import Results
from mergebench.evaluation.search.candidates import Candidates
from tests.conftest import Cli
from tests.evaluation.conftest import write_data
from tests.evaluation.search.conftest import write_suite

OVER = ("--over", "lambda=0.2:2,density=0.2/0.5/0.9")


def document(folder: Path) -> dict[str, Any]:
    """What a search wrote, without what no two runs share."""
    found: dict[str, Any] = json.loads((folder / "search.json").read_text())
    del found["made"]["date"]
    for point in found["points"]:
        del point["seconds"]
    return found


def test_each_point_is_what_merge_and_eval_give(place: Path, cli: Cli) -> None:
    ran = cli("search", "recipe.yaml", *OVER, "--budget", "7", "--out", "found", "-q")
    assert (ran.code, ran.err) == (0, "")
    found = document(place / "found")
    assert len(found["points"]) == 7 and found["points"][0]["values"] == {"lambda": 1.0, "density": 0.5}
    for point in (found["points"][0], found["points"][3], found["points"][found["best"]]):
        given = [f"--set=parameters.{name}={value}" for name, value in point["values"].items()]
        assert cli("merge", "recipe.yaml", *given, "--out", "merged", "--no-eval", "--overwrite").code == 0
        ran = cli("eval", "suite.yaml", "merged", "--split", "validation", "--json")
        records = json.loads(ran.out)["records"]
        assert {record["task"]: record["value"] for record in records} == point["tasks"]
        assert point["objective"] == pytest.approx(sum(point["tasks"].values()) / 2)
    assert found["points"][found["best"]]["objective"] == max(point["objective"] for point in found["points"])


def test_the_winner_is_a_recipe_from_anywhere(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("search", "recipe.yaml", *OVER, "--budget", "5", "--out", "deep/found")
    best = document(place / "deep/found")["points"][document(place / "deep/found")["best"]]
    monkeypatch.chdir(place.parent)
    (place.parent / "base").mkdir()  # not what the recipe means
    recipe = mergebench.load("work/deep/found/best.yaml")
    assert {name: recipe.parameters[name] for name in best["values"]} == best["values"]
    ran = cli("merge", "work/deep/found/best.yaml", "--out", "out", "--json")
    assert ran.code == 0
    merges = Candidates(place / "tmp", "cpu")
    tensors = merges.merge(merges.plan(recipe), "best").state_dict()
    for name, value in read_model(place.parent / "out").items():
        assert torch.equal(tensors[name], value)
    shown = {record["model"]: record for record in json.loads(ran.out)["evaluation"]["records"]}
    test = Results.load(place / "deep/found").of("ties chosen" if best["number"] else "ties as given")
    assert shown["ties"]["value"] == test["two"].value


def test_only_validation_tasks_choose(place: Path, cli: Cli) -> None:
    cli("search", "recipe.yaml", *OVER, "--budget", "5", "--out", "first")
    for name in ("one", "two"):
        write_data(place / f"{name}-test.jsonl", count=33, seed=99)
    cli("search", "recipe.yaml", *OVER, "--budget", "5", "--out", "second")
    first, second = (document(place / name) for name in ("first", "second"))
    assert first == second
    assert Results.load(place / "first").records != Results.load(place / "second").records
    assert {record.split for record in Results.load(place / "first").records} == {"test"}


def test_merges_too_large_for_memory_go_through_files(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for share in (8, 10**12):
        monkeypatch.setattr("mergebench.evaluation.search.candidates.SHARE", share)
        assert cli("search", "recipe.yaml", *OVER, "--budget", "3", "--results", str(share), "--overwrite").code == 0
        found.append((document(place / "searches/recipe"), Results.load(place / "searches/recipe").records))
    assert found[0][0] == found[1][0]
    assert [record.predictions for record in found[0][1]] == [record.predictions for record in found[1][1]]
    assert not (place / "searches/recipe/.candidate").exists()


def test_without_validation_tasks_there_is_nothing_to_choose_by(place: Path, cli: Cli) -> None:
    write_suite(place, "test")
    ran = cli("search", "recipe.yaml", *OVER)
    assert ran.code == 2
    assert "no task has split: validation" in ran.err and "hint: " in ran.err
    assert not (place / "searches").exists()


def test_without_test_tasks_it_says_what_is_not_known(place: Path, cli: Cli) -> None:
    write_suite(place, "validation")
    ran = cli("search", "recipe.yaml", *OVER, "--budget", "4")
    assert ran.code == 0
    known = document(place / "searches/recipe")["best"] == 0
    assert ("Nothing was better" if known else "The suite has no test tasks") in ran.out
    assert not (place / "searches/recipe/evaluation.json").exists()


def test_the_test_table_has_everything_and_says_who_wins(place: Path, cli: Cli) -> None:
    ran = cli("search", "recipe.yaml", *OVER, "--budget", "6", "--json")
    found = json.loads(ran.out)
    results = Results.load(place / "searches/recipe")
    names = ["base", "one", "two", "ties as given"] + (["ties chosen"] if found["best"] else [])
    assert results.models == names and results.made["baseline"] == "ties as given"
    given, chosen = (results.of(f"ties {word}") for word in ("as given", "chosen" if found["best"] else "as given"))
    changed = sum(chosen[task].value - given[task].value for task in given) / 2
    if found["best"]:
        said = f"{100 * changed:+.1f}".replace("-", "−")
        assert f"{said} percentage points over all 122 test items" in found["verdict"]
    assert {point["number"] for point in found["points"]} == set(range(5))  # 2 x 2, and as given


def test_a_point_has_one_number_and_one_unit(place: Path, cli: Cli) -> None:
    """On the terminal, in search.json, best.yaml and the page: from 0, the recipe as given; percent, with an error."""
    ran = cli("search", "recipe.yaml", *OVER, "--budget", "3")
    found = document(place / "searches/recipe")
    number, best = found["best"], found["points"][found["best"]]
    assert best["number"] == number
    errors = [entry["stderr"] for entry in json.loads(Path("searches/recipe/evaluation.json").read_text())["records"]]
    assert all(errors)
    tasks = best["tasks"].values()
    assert best["stderr"] == pytest.approx(sum(p * (1 - p) / 61 for p in tasks) ** 0.5 / 2)  # of independent items
    said = f"{100 * best['objective']:.1f} ± {100 * best['stderr']:.1f}"
    first = (place / "searches/recipe/best.yaml").read_text()
    assert f"(mean {said} on validation, point {number} of 0 to 2)" in first
    rows = [line.split() for line in ran.out.splitlines() if line.endswith(said)]
    assert rows and rows[0][0] == str(number)
    assert f": point {number} ({number + 1} of 3): " in ran.err
    assert f"(best {said}, point {number})" in ran.err
    assert not any(re.search(r"\b0\.", line.rpartition(": ")[2]) for line in ran.err.splitlines())
    assert f"<strong>{number}<span> ★<" in (place / "searches/recipe/report.html").read_text()
    ran = cli("search", "recipe.yaml", *OVER, "--budget", "3", "--resume", "--format", "csv", "-q")
    table = list(csv.DictReader(io.StringIO(ran.out)))
    assert {row["point"]: float(row["mean"]) for row in table} == {
        str(point["number"]): pytest.approx(100 * point["objective"], abs=0.05) for point in found["points"]
    }
    assert all(float(row["mean ±"]) > 0 for row in table)


def test_killed_and_resumed_is_the_same_search(made: Path, tmp_path: Path, server: Server) -> None:
    args = ["search", "recipe.yaml", "--over", "lambda,weight.*", "--strategy", "cmaes", "--budget", "9", "-q"]
    whole, folder = tmp_path / "whole/work", tmp_path / "killed/work"
    for copy in (whole, folder):
        shutil.copytree(made, copy)
    counter = tmp_path / "count"
    code, out, err = server.run(*args, "--results", tmp_path / "r", folder=whole, count=str(counter))
    assert (code, err) == (0, "")
    third = int(counter.read_text()) // 3
    kept = [0]
    for more in ((), ("--resume",)):
        code, _, err = server.run(*args, *more, "--results", tmp_path / "k", folder=folder, die_at=third)
        assert (code, err) == (-9, "")
        kept.append(len(json.loads((folder / "searches/recipe/search.json").read_text())["points"]))
    assert kept[0] < kept[1] < kept[2] < 9
    code, again, err = server.run(*args, "--resume", "--results", tmp_path / "k", folder=folder)
    assert (code, err, again) == (0, "", out)
    assert document(folder / "searches/recipe") == document(whole / "searches/recipe")
    assert (folder / "searches/recipe/best.yaml").read_text() == (whole / "searches/recipe/best.yaml").read_text()
    assert sorted(path.name for path in (folder / "searches/recipe").iterdir()) == [
        "best.yaml", "evaluation.json", "evaluation.md", "report.html", "search.json",
    ]  # fmt: skip


def test_another_search_in_the_same_place_is_refused(place: Path, cli: Cli) -> None:
    before = ("search", "recipe.yaml", "--budget", "3")
    assert cli(*before, *OVER).code == 0
    kept = (place / "searches/recipe/search.json").read_text()
    for change, said in (
        ([*OVER, "--seed", "1"], "with another --seed"),
        ([*OVER, "--budget", "4"], "with another --budget"),
        (["--over", "density=0.1/0.2"], "with another --over"),
        ([*OVER, "--strategy", "random"], "with another --strategy"),
        ([*OVER, "--objective", "worst"], "with another --objective"),
        ([*OVER, "--set", "models.0.parameters.weight=0.5"], "with another recipe"),
    ):
        ran = cli(*before, *change, "--resume")
        assert ran.code == 2 and said in ran.err and "--overwrite" in ran.err, ran.err
    assert "3 of 3 points were measured before" in cli(*before, *OVER, "--resume").err
    write_data(place / "two-validation.jsonl", count=20, seed=99)
    assert "with another suite, or other data" in cli(*before, *OVER, "--resume").err
    assert cli(*before, *OVER).code == 2
    assert (place / "searches/recipe/search.json").read_text() == kept
    assert cli(*before, *OVER, "--overwrite").code == 0
    assert (place / "searches/recipe/search.json").read_text() != kept


def test_what_no_search_made_is_left_alone(place: Path, cli: Cli) -> None:
    ran = cli("search", "recipe.yaml", *OVER, "--out", "base", "--overwrite")
    assert ran.code == 2 and "base: it exists and holds no search" in ran.err
    (place / "base/search.json").write_text("[]")
    ran = cli("search", "recipe.yaml", *OVER, "--out", "base", "--overwrite")
    assert ran.code == 1 and "not a search" in ran.err


def test_a_point_that_fails_is_passed_over(place: Path, cli: Cli) -> None:
    over = ("--over", "lambda=0.5/1e38")
    ran = cli("search", "recipe.yaml", *over, "--budget", "3")
    assert ran.code == 0 and "1 of 3 points failed" in ran.err
    good, fine, bad = document(place / "searches/recipe")["points"]
    assert good["error"] is None and fine["error"] is None and good["objective"] is not None
    assert bad["objective"] is None and bad["error"] and bad["tasks"] == {}
    with pytest.raises(RunError, match="no point could be measured"):
        mergebench.search(
            mergebench.load("recipe.yaml", ["parameters.lambda=2e38"]), over=["lambda=1e38/3e38"], budget=3, out="none"
        )


def test_a_full_disk_is_no_point_that_failed(made: Path, tmp_path: Path, server: Server) -> None:
    """It names the file that could not be written, and the search goes on from there."""
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    folder = tmp_path / "work"
    args = ["search", "recipe.yaml", "--over", "lambda", "--budget", "2", "-q"]
    code, out, err = server.run(*args, folder=folder, largest_file=250)
    assert (code, out) == (1, "") and err.startswith("error: searches/recipe/"), err
    assert "File too large" in err and "continue with --resume" in err
    assert not (folder / "searches/recipe/search.json").exists()
    assert server.run(*args, "--resume", folder=folder)[0] == 0
    assert document(folder / "searches/recipe")["points"][0]["error"] is None


def test_objectives_against_the_tasks_own_fine_tunes(place: Path, cli: Cli) -> None:
    own = json.loads(cli("eval", "suite.yaml", "one", "two", "--split", "validation", "--json").out)["records"]
    best = {record["task"]: record["value"] for record in own if record["model"] == record["task"]}
    for objective in ("relative", "worst"):
        assert cli("search", "recipe.yaml", *OVER, "--budget", "4", "--objective", objective, "--overwrite").code == 0
        for point in document(place / "searches/recipe")["points"]:
            shares = [value / best[task] for task, value in point["tasks"].items()]
            expected = min(shares) if objective == "worst" else sum(shares) / len(shares)
            assert point["objective"] == pytest.approx(expected)


def test_where_no_head_says_whose_a_task_is_the_best_model_counts(place: Path, cli: Cli) -> None:
    suite = json.loads((place / "suite.yaml").read_text())
    for task in suite["tasks"]:
        (place / f"head-{task['name']}").mkdir(exist_ok=True)
        shutil.copy(place / task["head"], place / f"head-{task['name']}/head.safetensors")
        task["head"] = f"head-{task['name']}/head.safetensors"
    (place / "suite.yaml").write_text(json.dumps(suite))
    own = json.loads(cli("eval", "suite.yaml", "one", "two", "--split", "validation", "--json").out)["records"]
    best = {task: max(one["value"] for one in own if one["task"] == task) for task in ("one", "two")}
    assert cli("search", "recipe.yaml", *OVER, "--budget", "3", "--objective", "worst").code == 0
    for point in document(place / "searches/recipe")["points"]:
        expected = min(value / best[task] for task, value in point["tasks"].items())
        assert point["objective"] == pytest.approx(expected)


def test_results_that_are_there_are_not_measured_again(place: Path, cli: Cli) -> None:
    args = ("search", "recipe.yaml", *OVER, "--budget", "4", "--json")
    first = json.loads(cli(*args).out)
    files = sorted(path.name for path in (place / "results").iterdir())
    again = json.loads(cli(*args, "--overwrite").out)
    assert again["evaluation"]["made"]["known"] == len(again["evaluation"]["records"])
    assert sorted(path.name for path in (place / "results").iterdir()) == files
    assert [one["tasks"] for one in again["points"]] == [one["tasks"] for one in first["points"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--over", "lambdda"], "'ties' has no parameter 'lambdda'\nhint: did you mean 'lambda'?"),
        (["--over", "lambda.one"], "takes lambda once for all models\nhint: --over lambda"),
        (["--over", "weight.onne"], "no model is called 'onne'\nhint: did you mean 'one'?"),
        (["--over", "density=0:1"], "must be above 0, at most 1, got 0\n"),
        (["--over", "lambda=2:1"], "a range is LOW:HIGH, the lower end first"),
        (["--over", "lambda=0.4"], "hint: a fixed value is set in the recipe: --set parameters.lambda=0.4"),
        (["--over", "lambda=x:1"], "'x' is no number"),
        (["--over", ","], "--over: it names no parameter"),
        (["--over", "lambda,lambda"], "lambda is named twice"),
        (["--over", "weight,weight.one"], "weight is searched for all models already"),
        (["--over", "lambda", "--strategy", "gird"], "--strategy: 'gird' is none\nhint: did you mean 'grid'?"),
        (["--over", "lambda", "--objective", "man"], "--objective: 'man' is none\nhint: did you mean 'mean'?"),
        (["--over", "lambda", "--budget", "1"], "--budget 1: the recipe as given is the first point"),
        (["--over", "density", "--set", "parameters.density=[0.1,0.5]"], "in the recipe density varies"),
        (["--over", "weight", "--set", "models.0.parameters.weight=2"], "one has its own weight in the recipe"),
        (["--over", "lambda", "--set", "merge_method=emr", "--set", "parameters={}"], "a model for each task"),
        (["--over", "lambda", "--suite", "nope.yaml"], "no such suite file: nope.yaml"),
        (["--over", "lambda", "--set", "evaluate=null"], "the recipe has no evaluate:"),
    ],
)
def test_mistakes(arguments: list[str], said: str, place: Path, cli: Cli) -> None:
    ran = cli("search", "recipe.yaml", *arguments)
    assert ran.code == 2 and said in ran.err, ran.err
    assert ran.out == "" and not (place / "searches").exists()


def test_from_python(place: Path) -> None:
    points: list[int] = []
    found = mergebench.search(
        "recipe.yaml", None, ["weight.*"], 4, strategy="random", seed=5,
        searched=lambda point, history: points.append(point.number),
    )  # fmt: skip
    assert points == [0, 1, 2, 3]
    assert found.best == found.history.best and set(found.best.values) == {"weight.one", "weight.two"}
    assert found.out == Path("searches/recipe")
    with pytest.raises(RecipeError, match="holds a search"):
        mergebench.search("recipe.yaml", None, ["weight.*"], 4)
