"""Searches over an edit, and fronts of two objectives: each point is what merge and eval give, the front by brute
force."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import mergebench
from mergebench.editing.probes.probe import Probe
from mergebench.errors import RecipeError
from mergebench.evaluation.search.history import FAILED, History, Point, knee, pareto
from mergebench.evaluation.search.objective import read as read_names
from mergebench.evaluation.search.strategies import STRATEGIES, choose
from tests.conftest import Cli
from tests.language import some_text, write_decoder, write_rows, write_texts

READING = {"layer": 1, "norm": "post", "pool": "last", "max_length": 30}
OVER = ["strength=0:1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, a probe of it, a recipe that ablates its direction, tasks for both splits; read only."""
    place = tmp_path_factory.mktemp("made")
    write_decoder(place / "base")
    generator = torch.Generator().manual_seed(0)
    probe = Probe(torch.randn(2, 16, generator=generator), torch.zeros(2), about=READING)
    probe.save(place / "probe.safetensors")
    tasks: list[dict[str, Any]] = []
    for seed, split in enumerate(("validation", "test")):
        source = random.Random(seed)
        rows = [{"id": f"{split}{n}", "text": f"{n} {some_text(source, 12)}", "label": n % 2} for n in range(14)]
        write_rows(place / f"{split}.jsonl", rows)
        write_texts(place / f"plain-{split}.jsonl", count=5, seed=seed + 7, longest=9)
        behaviour = {"kind": "probe", "probe": "probe.safetensors", "data": f"{split}.jsonl", "metric": "score"}
        damage = {"kind": "divergence", "reference": "base", "data": f"plain-{split}.jsonl"}
        tasks += [{"name": "be,haviour", "split": split, **behaviour, "of": "undesired"}]
        tasks += [{"name": "damage", "split": split, **damage}]
    (place / "suite.yaml").write_text(json.dumps({"tasks": tasks}))
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": "base"}],
        "edits": [{"edit": "ablate", "probe": "probe.safetensors", "strength": 0.8}],
        "dtype": "bfloat16",
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "search.json").read_text())
    del found["made"]["date"]
    for point in found["points"]:
        del point["seconds"]
    return found


def search(out: str, **more: Any) -> Any:
    how = {"over": OVER, "budget": 5, "objective": "be,haviour,damage", "out": out, "results": None, **more}
    return mergebench.search("recipe.yaml", "suite.yaml", **how)


def test_each_point_is_what_merge_and_eval_give(place: Path, cli: Cli) -> None:
    ran = cli("search", "recipe.yaml", "--suite", "suite.yaml", "--over", OVER[0], "--budget", "4",
              "--objective", "be,haviour,damage", "--out", "found", "-q")  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    found = document("found")
    assert [point["values"]["strength"] for point in found["points"]] == [0.8, 0.0, 0.5, 1.0]
    assert found["points"][1]["tasks"]["damage"] < 1e-3 < found["points"][3]["tasks"]["damage"]  # rounding
    last = found["points"][-1]
    assert cli("merge", "recipe.yaml", "--set", "edits.0.strength=1", "--out", "merged").code == 0
    ran = cli("eval", "suite.yaml", "merged", "--split", "validation", "--json")
    assert {record["task"]: record["value"] for record in json.loads(ran.out)["records"]} == last["tasks"]
    assert last["objectives"] == last["tasks"] and set(last["stderrs"]) == set(last["tasks"])
    assert found["made"]["directions"] == {"be,haviour": "lower", "damage": "lower"}


def test_the_front_is_shown_and_written(place: Path, cli: Cli) -> None:
    ran = cli("search", "recipe.yaml", "--suite", "suite.yaml", "--over", OVER[0], "--budget", "4",
              "--objective", "be,haviour,damage", "--out", "found")  # fmt: skip
    found = document("found")
    assert "the front of be,haviour (lower is better), damage (lower is better):" in ran.out
    chosen = next(point for point in found["points"] if point["number"] == found["best"])
    for number in found["front"]:
        value = found["points"][number]["values"]["strength"]
        assert mergebench.load(f"found/point-{number}.yaml").edits[0].values["strength"] == value
    assert mergebench.load("found/best.yaml").edits[0].values["strength"] == chosen["values"]["strength"]
    page = Path("found/report.html").read_text()
    assert "front of be,haviour and damage" in page and f"{len(found['front'])} of 4 points" in page


def test_an_interrupted_front_goes_on_to_the_same(place: Path) -> None:
    class Enough(Exception):
        pass

    def stop(point: Point, history: History) -> None:
        if point.number == 1:
            raise Enough

    how = {"over": ["strength=0:1", "layers=all/0/1", "direction=row1/diff"], "budget": 4}
    search("whole", **how)
    with pytest.raises(Enough):
        search("parts", **how, searched=stop)
    assert search("parts", **how, resume=True).resumed == 2
    assert document("parts") == document("whole")
    assert document("whole")["made"]["strategy"] == "cmaes"


def test_a_front_by_brute_force() -> None:
    source = random.Random(0)
    for _ in range(200):
        costs = [(float(source.randint(0, 4)), float(source.randint(0, 4))) for _ in range(source.randint(1, 9))]
        front = [costs[place] for place in pareto(costs)]
        assert front == sorted({a for a in costs if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in costs)})
        assert 0 <= knee(front) < len(front)
    assert knee([(0.0, 10.0), (1.0, 2.0), (4.0, 0.0)]) == 1 and knee([(3.0, 3.0)]) == 0


def test_evolution_finds_a_front() -> None:
    """Of x^2 and (x - 1)^2 it is where y is 0, from x = 0 to 1; deterministic, and on where points fail."""

    def run() -> list[tuple[float, float]]:
        from mergebench.evaluation.search.space import parse

        recipe = mergebench.load(
            {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}, {"model": "c"}]}
        )
        steps, asked = STRATEGIES["front"](parse(["lambda=0:2", "density=0.1:1"], recipe), [0.5, 0.5], 300, 3), []
        generation = next(steps)
        while len(asked) < 300:
            points = [(2 * x, y) for x, y in generation]
            asked += points
            generation = steps.send([(FAILED,) * 2 if x > 1.9 else (x**2 + y, (x - 1) ** 2 + y) for x, y in points])
        return asked

    first = run()
    assert first == run()
    kept = pareto([(x**2 + y, (x - 1) ** 2 + y) for x, y in first])
    near = [first[place] for place in kept if first[place][1] < 0.05]
    assert len(near) >= 5 and min(x for x, _ in near) < 0.25 and max(x for x, _ in near) > 0.75


@pytest.mark.parametrize(
    ("how", "says", "hint"),
    [
        ({"objective": "damge"}, "--objective: 'damge' is none", "did you mean 'damage'?"),
        ({"objective": "damage,damage"}, "damage is named twice", "name two different ones for a front"),
        ({"over": ["strenght=0:1"]}, "has no parameter 'strenght', nor has an edit", "did you mean 'strength'?"),
        ({"over": ["strength=0:2"]}, "must be at least 0, at most 1, got 2", None),
    ],
)
def test_mistakes(how: dict[str, Any], says: str, hint: str | None, place: Path) -> None:
    with pytest.raises(RecipeError) as error:
        search("found", **how)
    assert says in error.value.message and (hint is None or error.value.hint == hint)
    assert not Path("found").exists()


def test_an_edit_among_several_is_named(place: Path) -> None:
    step = json.loads(Path("recipe.yaml").read_text())
    step["edits"] *= 2
    with pytest.raises(RecipeError, match="several edits have it") as error:
        mergebench.search(mergebench.load(step), "suite.yaml", OVER, 3)
    assert error.value.hint == "say which: edits.0.strength or edits.1.strength"


def test_three_objectives_have_no_evolution(place: Path) -> None:
    with pytest.raises(RecipeError, match="it follows two objectives, not 3"):
        choose("cmaes", (), 3)
    suite = mergebench.evaluation.load_suite("suite.yaml").only("validation")
    assert read_names("mean,be,haviour, damage", suite) == ("mean", "be,haviour", "damage")
