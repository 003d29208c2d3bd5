"""Several results on one page: columns, differences of recipes, curves; and what has no place there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation import Results, page, save
from mergebench.evaluation.page import curves, searched, side_by_side
from mergebench.evaluation.page.figures import FULL, WIDTH
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.search.candidates import Merged
from mergebench.evaluation.size import bytes_of
from mergebench.evaluation.task import Item
from tests.conftest import Cli
from tests.evaluation.page import documents
from tests.models import tiny_tensors, write_model

MERGES = {"a": ("linear", 0.3), "b": ("pcb", 0.6), "c": ("linear", 0.9)}  # whose answers they have, and their lambda


def run(place: Path, name: str, answers: str, lambda_: float | None, **more: Any) -> Path:
    """A merge as it was measured: the base, and `merged` with the answers of one of the documents' models."""
    found = documents.results({"base": "base", answers: "merged"}, **more)
    records = tuple(replace(r, model="merged") if r.model == answers else r for r in found.records)
    directory = place / name
    directory.mkdir()
    save(replace(found, records=records), directory)
    if lambda_ is not None:
        recipe = documents.provenance()["recipe"] | {"parameters": {"lambda": lambda_, "density": 0.1}}
        (directory / "mergebench.json").write_text(json.dumps(documents.provenance(recipe=recipe)))
    return directory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    sizes = {"base": 4_000_000, "merged": 4_000_000}
    return [run(tmp_path, name, answers, lambda_, bytes=sizes) for name, (answers, lambda_) in MERGES.items()]


def test_columns_are_runs(runs: list[Path]) -> None:
    joined = page.read_all(runs)
    assert joined.results is not None
    assert joined.results.models == ["base", "a", "b", "c"]  # the base once: it gave the same answers in all
    scores, about, differences = side_by_side.tables(joined)
    measured = documents.results()
    for row, task in zip(scores.rows, documents.TASKS, strict=False):
        models = ["base", *(answers for answers, _ in MERGES.values())]
        wanted = [measured.of(model)[task] for model in models]
        assert [cell.text for cell in row][1:] == [f"{100 * r.value:.1f} ± {100 * (r.stderr or 0):.1f}" for r in wanted]
    rows = {row[0].text: [cell.text for cell in row][1:] for row in about.rows}
    assert rows["lambda"] == ["–", "0.3", "0.6", "0.9"] and "density" not in rows and "scope" not in rows
    assert rows["size"] == ["4 MB"] * 4
    pooled = mergebench.compare("linear", "pcb", measured).pooled
    assert pooled is not None
    lost_and_won = next([cell.parts for cell in row][-2:] for row in differences.rows if row[0].text == "b")
    assert lost_and_won == [(str(len(pooled.lost)),), (str(len(pooled.won)),)]
    assert page.document(runs)["recipes"] == {"parameters.lambda": {"a": 0.3, "b": 0.6, "c": 0.9}}


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (answers, lambda_) in MERGES.items():
        run(tmp_path, name, answers, lambda_, tasks=("tweets",), n=9)
    document = json.loads(cli("report", *MERGES, "--json").out)
    assert document["out"] == "side-by-side.html" and [one["name"] for one in document["runs"]] == ["a", "b", "c"]
    text = Path("side-by-side.html").read_text(encoding="utf-8")
    assert "Against lambda" in text and "Flips against a" in text and "Not drawn" not in text


def test_the_curve_is_the_scores_over_the_parameter(runs: list[Path]) -> None:
    joined = page.read_all(runs)
    assert joined.results is not None
    assert side_by_side.varied(joined) == ("lambda", {"a": 0.3, "b": 0.6, "c": 0.9})
    (figure,) = curves.by_parameter(joined.results, "lambda", {"c": 0.9, "a": 0.3, "b": 0.6})
    (axes,) = figure.draw(FULL).axes
    lines = {container.get_label(): container.lines for container in axes.containers}
    assert [*lines] == [*documents.TASKS, "mean"]
    for task in documents.TASKS:
        values = [100 * joined.results.of(model)[task].value for model in "abc"]
        assert list(lines[task][0].get_ydata()) == pytest.approx(values)
    line, _, (bars,) = lines["mean"]
    assert list(line.get_xdata()) == [0.3, 0.6, 0.9]
    halves = [(segment[1][1] - segment[0][1]) / 2 for segment in bars.get_segments()]
    errors = [[record.stderr or 0 for record in joined.results.of(model).values()] for model in "abc"]
    assert halves == pytest.approx([100 * math.hypot(*of) / len(of) for of in errors])
    means = {model: sum(r.value for r in joined.results.of(model).values()) / 3 for model in ("base", "b")}
    assert list(line.get_ydata())[1] == pytest.approx(100 * means["b"])
    assert any(list(one.get_ydata()) == pytest.approx([100 * means["base"]] * 2) for one in axes.lines)


def test_one_parameter_or_none(tmp_path: Path, runs: list[Path]) -> None:
    assert side_by_side.varied(page.read_all(runs[:2])) is None  # two points are no curve
    more = run(tmp_path, "d", "linear", 0.7)
    about = json.loads((more / "mergebench.json").read_text())
    about["recipe"]["parameters"]["density"] = 0.7
    (more / "mergebench.json").write_text(json.dumps(about))
    assert side_by_side.varied(page.read_all([*runs, more])) is None
    for place, value in zip(runs, (1, 2, 3), strict=True):  # two keys that always are alike
        about["recipe"]["models"] = [{"model": "x", "parameters": {"weight": value}} for _ in range(2)]
        (place / "mergebench.json").write_text(json.dumps(about))
    assert side_by_side.varied(page.read_all(runs)) == ("weight", {"a": 1, "b": 2, "c": 3})


def test_a_search_over_one_parameter_shows_the_tasks() -> None:
    found = searched.read(documents.search(words=False))
    (figure,) = [searched._against(found, "lambda", found.tasks)]
    (axes,) = figure.draw(WIDTH).axes
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in documents.TASKS}
    at = sorted(found.points, key=lambda point: point["values"]["lambda"])
    for task, line in lines.items():
        assert list(line.get_xdata()) == [point["values"]["lambda"] for point in at]
        assert list(line.get_ydata()) == pytest.approx([100 * point["tasks"][task] for point in at])
    assert lines.keys() == set(documents.TASKS)
    (bare,) = searched._against(found, "lambda", []).draw(WIDTH).axes
    assert not {line.get_label() for line in bare.lines} & {*documents.TASKS}


def test_bytes_across(runs: list[Path]) -> None:
    results = documents.results(bytes={"base": 90_000_000, "base+a/tweets": 600_000, "pcb": 90_000_000})
    looks = Sources(Path(), results, None, None, None).looks
    (figure,) = curves.by_size(results, looks)
    (axes,) = figure.draw(FULL).axes
    dots = {container.get_label(): container.lines[0] for container in axes.containers}
    assert {name: list(dot.get_xdata()) for name, dot in dots.items()} == {
        "base": [90_000_000], "tweets": [600_000], "pcb": [90_000_000],
    }  # fmt: skip
    mean = sum(record.value for record in results.of("pcb").values()) / 3
    assert list(dots["pcb"].get_ydata()) == pytest.approx([100 * mean]) and axes.get_xscale() == "log"
    assert "tweets 600 kB" in figure.alt
    assert not curves.by_size(replace(results, made={"bytes": {"base": 900_000, "pcb": 900_100}}), looks)


def test_bytes_of_models_and_of_what_is_added(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tiny_tensors(), shards=2)
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    (tmp_path / "adapter").mkdir()
    stored = {f"base_model.model.layers.0.{name}.weight": value for name, value in factors.items()}
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"], "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    assert bytes_of(open_model(str(base))) == sum(value.nbytes for value in tiny_tensors().values())
    assert bytes_of(open_model(f"{base}+{tmp_path / 'adapter'}")) == 4 * 32
    assert bytes_of(Merged("m", base, {"w": torch.ones(3, dtype=torch.bfloat16)})) == 6


def test_what_cannot_stand_side_by_side(tmp_path: Path, runs: list[Path], cli: Cli) -> None:
    other = run(tmp_path, "other", "pcb", None, tasks=("sums",))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "mergebench.json").write_text(json.dumps(documents.provenance()))
    for places, says in [
        ([runs[0], other], r"no task that all have, of one metric and split: .*a has nouns, .*other has sums"),
        ([runs[0], runs[0]], "it is named twice"),
        ([runs[0], bare], "bare: it was not evaluated"),
    ]:
        with pytest.raises(RecipeError, match=says):
            page.write(places)
    for name, text in (("one", "q"), ("two", "Q")):
        found = Results.load(runs[0])
        (tmp_path / name).mkdir()
        save(replace(found, items={"tweets": {"tweets-0": Item(text, None)}}), tmp_path / name)
    with pytest.raises(RunError, match=r"item 'tweets-0' is another one in .*two than"):
        page.write([tmp_path / "one", tmp_path / "two"])
    ran = cli("report", *runs, "--format", "csv", "--out", "x.html")
    assert ran.code == 2 and "--format prints tables" in ran.err and not Path("x.html").exists()


def test_tasks_that_not_all_have_and_other_items(tmp_path: Path, runs: list[Path]) -> None:
    fewer = run(tmp_path, "fewer", "pcb", None, tasks=("tweets", "nouns"), n=30)
    joined = page.read_all([runs[0], fewer])
    scores, *more = side_by_side.tables(joined)
    assert "Left out, as not all have them: reviews." in scores.legend
    assert "Measured on other items, so not compared one by one: nouns, tweets" in scores.legend.replace(
        "tweets, nouns", "nouns, tweets"
    )
    assert [sheet.legend[:10] for sheet in more] == ["What the r"]  # no differences of answers
    assert "base" not in scores.heads  # it answered other items


def test_a_search_has_its_recipe_with_what_it_chose(runs: list[Path]) -> None:
    about = json.loads((runs[0] / "mergebench.json").read_text())["recipe"]
    (runs[0] / "mergebench.json").unlink()
    made = {"recipe": about | {"parameters": {"lambda": 1.0, "density": 0.1}}, "objective": "mean"}
    points = [{"number": n, "values": {"lambda": 1 - 0.1 * n}, "tasks": {}, "objective": 0.5} for n in range(3)]
    (runs[0] / "search.json").write_text(json.dumps({"made": made, "points": points, "best": 2}))
    assert page.document(runs)["recipes"] == {"parameters.lambda": {"a": 0.8, "b": 0.6, "c": 0.9}}


def test_models_of_an_evaluation_are_columns(tmp_path: Path, runs: list[Path]) -> None:
    place = tmp_path / "evaluation"
    place.mkdir()
    save(documents.results({"base": "base", "base+a/tweets": "input", "base+a/nouns": "input"}), place)
    joined = page.read_all([place, runs[1]])
    assert joined.results is not None
    assert joined.results.models == ["base", "evaluation: tweets", "evaluation: nouns", "b"]


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_tables_for_a_paper(runs: list[Path], cli: Cli, form: str) -> None:
    """Of several results, of one, and of a search."""
    several, one = cli("report", *runs, "--format", form), cli("report", runs[0], "--format", form)
    (runs[0] / "search.json").write_text(json.dumps(documents.search()))
    searched = cli("report", runs[0], "--format", form)
    if form == "csv":
        assert several.out.splitlines()[0] == ",base,base ±,a,a ±,b,b ±,c,c ±"
        assert one.out.splitlines()[0].startswith("model,role,tweets,tweets ±")
        assert searched.out.splitlines()[0] == "point,lambda,variant,mean,tweets,nouns,reviews"
    elif form == "latex":
        assert several.out.count(r"\begin{tabular}") == several.out.count(r"\end{tabular}") == 3
        assert "±" not in "".join(line for line in several.out.splitlines() if not line.startswith("%"))
    else:
        assert one.out.startswith("| model |") and searched.out.startswith("| point |")
