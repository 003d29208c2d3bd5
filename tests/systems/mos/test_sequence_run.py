"""A run on a small encoder: what it writes, resumed after any task to the same bytes, and the mistakes it meets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hashes

from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.systems.mos.bank import read_bank
from mergebench.systems.mos.config import load_config
from mergebench.systems.mos.evaluate import evaluate_banks
from mergebench.systems.mos.metrics import NAMES
from mergebench.systems.mos.run import Outcome, run_sequence
from mergebench.systems.mos.split import read_data, split
from tests.evaluation.conftest import write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("ant", "bee", "cat", "dog", "eel")
SMALL = {"tasks": 3, "epochs": 2, "batch": 4, "bottleneck": 6, "align_epochs": 2, "lr": 0.1}


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder, and texts of five classes, each with words of its own."""
    folder = tmp_path_factory.mktemp("run")
    write_encoder(folder / "base")
    for name, each, first in (("train", 6, 0), ("test", 3, 6)):
        rows = [
            {"id": f"{label}-{number}", "text": f"w{10 * kind} w{10 * kind + 1 + number}", "label": label}
            for kind, label in enumerate(CLASSES)
            for number in range(first, first + each)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(here: Path, **changes: Any) -> dict[str, Any]:
    given = {"backbone": str(here / "base"), "train": str(here / "train.jsonl"), "test": str(here / "test.jsonl"),
             "text": "text", "seeds": [0, 7], **SMALL, **changes}  # fmt: skip
    return {key: value for key, value in given.items() if value is not None}


def run(here: Path, out: Path, resume: bool = False, say: Callable[[str], None] = print, **changes: Any) -> Outcome:
    return run_sequence(load_config(config(here, **changes)), out, device="cpu", resume=resume, say=say)


def contents(out: Path) -> dict[str, str]:
    """Every file but the one with times in it."""
    return {name: digest for name, digest in hashes(out).items() if name != "mergebench.json"}


@pytest.fixture(scope="module")
def whole(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("whole") / "run"
    run(here, out)
    return out


def test_what_it_writes(here: Path, whole: Path) -> None:
    found = json.loads((whole / "results.json").read_text())
    assert {record["method"] for record in found["records"]} == set(NAMES)
    assert len(found["records"]) == len(NAMES) * 3 * 2
    assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "| MOS |" in (whole / "results.md").read_text()
    loaded = load_config(config(here))
    for seed in (0, 7):
        merged, unmerged = (read_bank(whole / f"seed-{seed}" / name) for name in ("merged", "unmerged"))
        sequence = split(loaded, read_data(loaded), seed)
        assert [task.classes for task in merged.tasks] == [task.classes for task in unmerged.tasks] == sequence
        assert sorted(merged.classes) == sorted(CLASSES)
        assert [len(task) for task in sequence] == [2, 2, 1]
        assert (merged.about.alpha, unmerged.about.alpha) == (0.1, 0.0)
        first, second = (
            [torch.cat([t.flatten() for t in bank.adapter(task).values()]) for bank in (merged, unmerged)]
            for task in (0, 1)
        )
        assert torch.equal(*first)
        assert not torch.equal(*second)
        frozen = read_bank(whole / f"seed-{seed}" / "frozen")
        assert not any(
            frozen.adapter(task)[name].any() for task in range(3) for name in frozen.adapter(0) if ".up." in name
        )
    assert json.loads((whole / "mergebench.json").read_text())["command"] == "cil run"


def test_scored_anew(here: Path, whole: Path) -> None:
    """`cil eval` of the run gives the run's records, and touches nothing."""
    before = hashes(whole)
    records = evaluate_banks([whole], device="cpu")

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["seed"], record["method"], record["stage"]

    kept = json.loads((whole / "results.json").read_text())["records"]
    assert sorted(records, key=key) == sorted(kept, key=key)
    assert hashes(whole) == before


class Stop(Exception):
    pass


def stopped(here: Path, out: Path, after: int, **changes: Any) -> None:
    """A run that ended before the `after`-th task learnt was kept."""
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == after:
            raise Stop

    with pytest.raises(Stop):
        run(here, out, say=stop, **changes)
    assert not out.exists()


@pytest.mark.parametrize("after", [1, 2, 5, 12])
def test_resumed_after_a_task(after: int, here: Path, whole: Path, tmp_path: Path) -> None:
    stopped(here, tmp_path / "run", after)
    said: list[str] = []
    run(here, tmp_path / "run", resume=True, say=said.append)
    assert contents(tmp_path / "run") == contents(whole)
    assert len(said) == 16 - (after - 1)  # 2 seeds, 8 times learnt each
    again = run(here, tmp_path / "run", resume=True, say=said.append)
    assert again.already_done
    with pytest.raises(RecipeError, match="it holds a finished result"):
        run(here, tmp_path / "run", resume=True, epochs=1)


def test_a_manifest_ahead_of_the_journal(here: Path, whole: Path, tmp_path: Path) -> None:
    """Killed between a task's manifest and the journal: the task is learnt again."""
    stopped(here, tmp_path / "run", 5)
    journal = tmp_path / ".run.partial/.journal.json"
    state = json.loads(journal.read_text())
    last = [name for name in state["shards"] if "/02." in name]
    assert last
    state["shards"] = [name for name in state["shards"] if name not in last]
    journal.write_text(json.dumps(state))
    run(here, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(whole)


def test_as_published(here: Path, tmp_path: Path) -> None:
    """The published semantics run through, resume to the same bytes, and are another thing than the paper's."""
    run(here, tmp_path / "whole", semantics="reference", seeds=[0])
    stopped(here, tmp_path / "run", 6, semantics="reference", seeds=[0])
    run(here, tmp_path / "run", resume=True, semantics="reference", seeds=[0])
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    run(here, tmp_path / "paper", seeds=[0])
    one, other = (read_bank(tmp_path / name / "seed-0/merged").adapter(1) for name in ("whole", "paper"))
    assert not torch.equal(one["encoder.layer.0.up.weight"], other["encoder.layer.0.up.weight"])


MISTAKES: list[tuple[dict[str, Any], type[MergebenchError], str]] = [
    ({"tasks": 6}, RecipeError, "tasks: 6 of 5 classes"),
    ({"tasks": [["ant", "bee"], ["bee", "cat", "dog", "eel"]]}, RecipeError, "'bee' is claimed by task 1 and again by"),
    ({"tasks": [["ant", "bee"], ["cat"], ["dog"]]}, RecipeError, "class 'eel' is in no task"),
    ({"tasks": [["ant", "bee"], ["cat", "dog", "eel"], ["fox"]]}, RecipeError, "class 'fox' of task 3 is empty"),
    ({"tasks": [["ant", "bee", "cat", "dog", "eel"], []]}, RecipeError, "task 2 has no classes"),
    ({"tasks": "five"}, RecipeError, "tasks: must be a number of tasks or the classes of each, got 'five'"),
    ({"tasks": 0}, RecipeError, "tasks: must be a number of tasks or the classes of each, got 0"),
    ({"tasks": None}, RecipeError, "tasks: missing"),
    ({"epoch": 3}, RecipeError, "epoch: no such key"),
    ({"lr": -1}, RecipeError, "lr: must be above 0, got -1"),
    ({"alpha": 2.0}, RecipeError, "alpha: must be above 0, at most 1, got 2.0"),
    ({"seeds": []}, RecipeError, "seeds: an empty list"),
    ({"seeds": [1, 1]}, RecipeError, "seeds: a seed is given twice"),
    ({"seeds": [1, -1]}, RecipeError, "seeds: each must be at least 0, below 4,294,967,296, got [1, -1]"),
    ({"seeds": 3}, RecipeError, "seeds: must be a list of whole numbers"),
    ({"dropout": 1}, RecipeError, "dropout: must be at least 0, below 1, got 1"),
    ({"epochs": 1.5}, RecipeError, "epochs: must be a whole number, at least 1, got 1.5"),
    ({"label": 3}, RecipeError, "label: must be a word, got 3"),
    ({"statistics": "median"}, RecipeError, "statistics: must be one of covariance, variance, centroids, got 'median'"),
    ({"text": None}, RecipeError, "text or image: one of them says what the items are"),
    ({"train": "nowhere.jsonl"}, RecipeError, "train: no such file: nowhere.jsonl"),
    ({"backbone": "nowhere"}, ModelError, "nowhere"),
    ({"lr": 1e15, "seeds": [0]}, RunError, "loss is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_mistakes(
    changes: dict[str, Any], kind: type[MergebenchError], message: str, here: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        run(here, tmp_path / "run", **changes)
    assert message in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint
    assert not (tmp_path / "run").exists()


def test_items_that_do_not_fit(here: Path, tmp_path: Path) -> None:
    train = (here / "train.jsonl").read_text().splitlines()
    for lines, kind, message in (
        ([*train, (here / "test.jsonl").read_text().splitlines()[0]], RunError, "the same item is in"),
        (train[:-5], RunError, "class 'eel' has 1 item"),
        (train[:-6], RunError, "label 'eel' is none of the labels of"),
    ):
        (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(kind, match=message):
            run(here, tmp_path / "run", train=str(tmp_path / "train.jsonl"))
        assert not (tmp_path / "run").exists()


def test_a_task_that_is_not_tested(here: Path, tmp_path: Path) -> None:
    """Said before hours of training."""
    test = (here / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(test[:-3]) + "\n")
    with pytest.raises(RunError, match=r"no item to test is of task 3 of seed 0 \(eel\)"):
        run(here, tmp_path / "run", test=str(tmp_path / "test.jsonl"), tasks=[["ant"], ["bee", "cat", "dog"], ["eel"]])
    assert not (tmp_path / "run").exists()


def test_a_task_of_one_class_learns_nothing_but_works(here: Path, tmp_path: Path) -> None:
    """Five tasks of one class: cross-entropy over one logit is zero."""
    found = run(here, tmp_path / "run", tasks=5, seeds=[0])
    assert max(record["stage"] for record in found.results["records"]) == 5


def test_files_in_the_folder_of_the_config(here: Path, tmp_path: Path) -> None:
    """Paths from the config's own folder, and where in it a mistake stands."""
    text = "backbone: base\ntrain: train.jsonl\ntest: test.jsonl\ntext: text\ntasks: 2\n"
    (here / "config.yaml").write_text(text)
    loaded = load_config(here / "config.yaml")
    assert (loaded.train, loaded.backbone) == (str(here / "train.jsonl"), str(here / "base"))
    assert len(read_data(loaded).train.rows) == 30
    (here / "config.yaml").write_text(text + "epohcs: 3\n")
    with pytest.raises(RecipeError) as caught:
        load_config(here / "config.yaml")
    assert caught.value.message == f"{here}/config.yaml:6:1: epohcs: no such key"
    assert caught.value.hint == "did you mean 'epochs'?"
