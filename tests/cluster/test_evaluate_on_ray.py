"""Models measured, and parameters searched, on a cluster: what one process finds, and who dies stops no other.

Always on three workers, one on each machine: those of the test before are there.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.deltas.open import open_model
from mergebench.engine import pool
from mergebench.engine.cluster import join
from mergebench.evaluation import Candidate, Results, Step, evaluate_models, load_suite, run
from mergebench.evaluation.search.search import Found, search
from tests.cluster.conftest import kept

pytestmark = pytest.mark.ray
MODELS = ["base", "one", "two"]


def records(found: Results) -> list[Any]:
    return [replace(record, seconds=0.0) for record in found.records]


def measured(**more: Any) -> Results:
    return mergebench.measure("suite.yaml", MODELS, device="cpu", **more)


def test_the_records_of_one_process(place: Path, cluster: Any) -> None:
    here = measured(results=None)
    steps: list[Step] = []
    there = measured(results="kept", on="ray", workers=3, progress=steps.append)
    assert records(there) == records(here)
    assert there.made["known"] == 0 and there.made["device"] == "cpu"
    assert steps[-1].done == steps[-1].total == sum(record.n for record in here.records)
    before = kept("kept")
    assert len(before) == len(here.records)
    again = measured(results="kept", on="ray", workers=3)
    assert records(again) == records(here) and again.made["known"] == len(here.records)
    assert kept("kept") == before


@pytest.mark.slow
def test_a_merge_with_its_baselines(place: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = mergebench.load("recipe.yaml")
    for out in ("here", "there"):
        mergebench.merge(recipe, out, workers=1)
    here = mergebench.evaluate(recipe, "here", results=None)
    monkeypatch.setattr(run, "Batch", None)  # nothing is measured in this process
    there = mergebench.evaluate(recipe, "there", results=None, cluster=join("ray", 3, models=True))
    assert records(there) == records(here)
    assert not any(path.name.startswith(".there") for path in place.iterdir())


def test_a_machine_dies(place: Path, cluster: Any, lose: Callable[[], None]) -> None:
    here, lost = measured(results=None), False

    def progress(step: Step) -> None:
        nonlocal lost
        if not lost:
            lost = True
            lose()

    there = measured(results="kept", on="ray", workers=3, progress=progress)
    assert lost and records(there) == records(here)
    assert len(kept("kept")) == len(here.records)


def test_a_model_that_kills_its_workers_stops_no_other(
    place: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "DEATHS", 2)

    def killing() -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    suite = load_suite("suite.yaml").only("test")
    models = [Candidate(name, "input", open_model(name)) for name in MODELS]
    candidates = [models[0], Candidate("killing", "input", killing), *models[1:]]
    found = evaluate_models(candidates, suite, device="cpu", cluster=join("ray", 3, models=True))
    assert [(record.model, record.task) for record in found.records] == [
        (model, task.name) for model in MODELS for task in suite.tasks
    ]
    (failed,) = found.made["failed"]
    assert failed["model"] == "killing" and failed["tasks"] == ["one", "two"]
    assert failed["error"].startswith("model 'killing': the workers that measure it die: its process was killed")


def test_results_that_cannot_be_kept_are_said_to_be(
    place: Path, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Path("kept").write_text("a file")
    there = measured(results="kept", on="ray", workers=3)
    assert "kept: no result is kept there" in caplog.text
    assert records(there) == records(measured(results=None))


def history(found: Found) -> dict[str, Any]:
    """What a search wrote, without what no two runs share."""
    document: dict[str, Any] = json.loads((found.out / "search.json").read_text())
    del document["made"]["date"]
    for point in document["points"]:
        del point["seconds"]
    return document


def searched(out: str, **more: Any) -> Found:
    over = ["lambda=0.2:2", "density=0.2:0.9"]
    return search("recipe.yaml", None, over, 8, strategy="cmaes", out=out, device="cpu", results=None, **more)


def test_the_history_does_not_depend_on_the_workers(place: Path, cluster: Any) -> None:
    here = searched("here")
    assert len(history(here)["points"]) == 8
    order: list[int] = []
    there = searched("there", on="ray", workers=3, searched=lambda point, _: order.append(point.number))
    assert history(there) == history(here)
    assert order == list(range(8))
    assert there.results is not None and here.results is not None
    assert records(there.results) == records(here.results)
    assert not (there.out / ".candidate").exists()


def test_a_machine_dies_in_a_search(place: Path, cluster: Any, lose: Callable[[], None]) -> None:
    here = searched("here")
    there = searched("there", on="ray", workers=3, searched=lambda point, _: lose() if point.number == 2 else None)
    assert history(there) == history(here)


def test_a_search_goes_on_with_another_executor(place: Path, cluster: Any) -> None:
    here = searched("here")

    def stop(point: Any, _: Any) -> None:
        if point.number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched("there", on="ray", workers=3, searched=stop)
    there = searched("there", resume=True)
    assert history(there) == history(here) and there.resumed == 5
