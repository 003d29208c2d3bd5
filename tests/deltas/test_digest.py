"""What is kept of a model, and what --resume compares, change with all that its deltas depend on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.errors import RecipeError
from tests.deltas.kinds import SQUARE, assert_equal, base_tensors, write_adapter
from tests.evaluation.conftest import write_data, write_encoder, write_head
from tests.models import fine_tuned, hashes, read_model, write_model

# Square matrices, so that an adapter fits either way round; a rank of 4, so that its root is another scale.
RANK = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "lora_alpha": {"lora_alpha": 40},
    "use_rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {".*": 40}},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}


def change_adapter(place: str, setting: str) -> None:
    """Other numbers out of the same weights: only the config is written, which keeps the weights' time."""
    file = Path(place) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SETTINGS[setting]))


def change_factor(place: str) -> None:
    """A task's factor, six times as large."""
    file = Path(place) / "task.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"scale": 6 * about["scale"]}))


# -- what was measured --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, the tasks of two fine-tunes of it, an adapter of its square matrices, and a suite. Read only."""
    folder = tmp_path_factory.mktemp("encoders")
    base = read_model(write_encoder(folder / "base"))
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(folder / "base", folder / name)
        write_model(folder / name, fine_tuned(base, seed, 0.3), config=None)
    modules = [f"encoder.layer.{n}.attention.self.{part}" for n in range(2) for part in ("query", "value")]
    write_adapter(folder / "lora", base, modules, rank=RANK)
    recipe = {"merge_method": "emr", "base_model": str(folder / "base")}
    models = [{"model": str(folder / name)} for name in ("one", "two")]
    mergebench.run(mergebench.plan(mergebench.load(recipe | {"models": models})), folder / "emr")
    write_data(folder / "data.jsonl")
    write_head(folder / "head")
    task = {"name": "task", "kind": "text-classification", "data": "data.jsonl", "head": "head/head.safetensors"}
    (folder / "suite.yaml").write_text(json.dumps({"tasks": [task]}))
    return folder


@pytest.fixture
def suite(encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.copytree(encoders, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return "suite.yaml"


def measured(suite: str, model: str, results: str | None) -> list[Any]:
    (record,) = mergebench.measure(suite, [model], results=results, device="cpu").records
    return [record.value, {item: (one.output, one.score) for item, one in record.predictions.items()}]


def check_measured_anew(suite: str, model: str, change: Callable[[], None]) -> None:
    """The oracle is the same measurement with nothing kept."""
    before = measured(suite, model, "results")
    assert measured(suite, model, "results") == before
    change()
    wanted = measured(suite, model, None)
    assert wanted != before
    assert measured(suite, model, "results") == wanted


def test_another_factor_is_another_model(suite: str) -> None:
    check_measured_anew(suite, "base+emr/tasks/one", lambda: change_factor("emr/tasks/one"))


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "fan_in_fan_out"])  # the base tells
def test_another_setting_is_another_model(suite: str, setting: str) -> None:
    check_measured_anew(suite, "base+lora", lambda: change_adapter("lora", setting))


@pytest.mark.parametrize("place", ["lora", "emr/tasks/one"])
def test_each_of_a_stack_counts(suite: str, place: str) -> None:
    def change() -> None:
        change_adapter(place, "lora_alpha") if place == "lora" else change_factor(place)

    check_measured_anew(suite, "base+lora+emr/tasks/one", change)


def test_the_same_numbers_elsewhere_are_known(suite: str) -> None:
    """Where an adapter lies does not count."""
    before = measured(suite, "base+lora", "results")
    shutil.move("lora", "moved")
    results = mergebench.measure(suite, ["base+moved"], results="results", device="cpu")
    assert results.made["known"] == 1 and results.records[0].value == before[0]


# -- what was begun -------------------------------------------------------------------------------------------


@pytest.fixture
def begun(world: Path) -> Path:
    """Beside the others, an adapter of square matrices alone."""
    write_adapter(Path("square"), base_tensors(), SQUARE, rank=RANK)
    return world


class Stopped(Exception):
    """In the middle of a run."""


def stop_half_way(plan: Any, out: str) -> None:
    """Leave some complete shards of the plan's result."""
    read = 0

    def progress(size: int) -> None:
        nonlocal read
        read += size
        if read > plan.bytes_read // 2:
            raise Stopped

    with pytest.raises(Stopped):
        mergebench.run(plan, out, progress=progress)
    assert json.loads((Path(f".{out}.partial") / ".journal.json").read_text())["shards"]


def plan_of(models: list[str], base: str | None) -> Any:
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": [{"model": model} for model in models]}
    return mergebench.plan(mergebench.load(recipe), shard_size=1600, workers=1, device="cpu")


def check_not_resumed(models: list[str], base: str, change: Callable[[], None]) -> None:
    """Neither a run that was stopped, nor a finished one, is taken for that of another model."""
    mergebench.run(plan_of(models, base), "finished")
    stop_half_way(plan_of(models, base), "stopped")
    shutil.copytree(".stopped.partial", ".again.partial")
    whole = read_model(mergebench.run(plan_of(models, base), "again", resume=True).out)
    assert_equal(whole, read_model(Path("finished")))
    change()
    changed = plan_of(models, base)
    before = hashes(Path(".stopped.partial"))
    with pytest.raises(RecipeError, match="begun with another recipe or other inputs"):
        mergebench.run(changed, "stopped", resume=True)
    assert hashes(Path(".stopped.partial")) == before
    with pytest.raises(RecipeError):
        mergebench.run(changed, "finished", resume=True)


@pytest.mark.parametrize("setting", ["lora_alpha", "use_rslora", "alpha_pattern"])
def test_another_scale_is_not_resumed(begun: Path, setting: str) -> None:
    check_not_resumed(["base+square", "ft1"], "base", lambda: change_adapter("square", setting))


def test_another_orientation_is_not_resumed(begun: Path) -> None:
    check_not_resumed(["base+square", "ft1"], "base", lambda: change_adapter("square", "fan_in_fan_out"))


def test_another_factor_is_not_resumed(begun: Path) -> None:
    check_not_resumed(["base+emr/tasks/ft1"], "base", lambda: change_factor("emr/tasks/ft1"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_setting_on_the_base_is_not_resumed(begun: Path, setting: str) -> None:
    check_not_resumed(["ft1"], "base+square", lambda: change_adapter("square", setting))


def test_another_factor_on_the_base_is_not_resumed(begun: Path) -> None:
    check_not_resumed(["ft1"], "base+emr/tasks/ft1", lambda: change_factor("emr/tasks/ft1"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_setting_below_another_is_not_resumed(begun: Path, setting: str) -> None:
    check_not_resumed(["base+square+dora", "ft1"], "base", lambda: change_adapter("square", setting))
