"""An open delta is held whole by every worker: it counts against --memory, before anything is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.errors import RecipeError
from tests.conftest import Cli
from tests.deltas.kinds import write_adapter
from tests.models import write_model, write_recipe

MB, RANK, SIDE = 10**6, 50_000, 64
FACTORS = 4 * RANK * 2 * SIDE  # A and B in float32: 24 MiB, for a tensor of 16 KiB
ROWS, WIDTH = 200_000, 4  # a patch of every row holds its number (8 bytes) and amount (4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; adapters of two tensors stored in half precision; a patch of every row of another. Read only."""
    folder = tmp_path_factory.mktemp("made")
    base = {f"{name}.weight": torch.zeros(SIDE, SIDE) for name in "ab"} | {"rows.weight": torch.zeros(ROWS, WIDTH)}
    write_model(folder / "base", base)
    write_model(folder / "tuned", base)
    for name, config in (("lora", {}), ("dora", {"use_dora": True})):
        file = write_adapter(folder / name, base, "ab", rank=RANK, **config) / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    parts = {
        "direction": torch.ones(WIDTH),
        "rows.weight.rows": torch.arange(ROWS),
        "rows.weight.amount": torch.ones(ROWS),
        "rows.weight.orig": torch.zeros(ROWS, WIDTH),
    }
    save_file(parts, folder / "patch.safetensors", metadata={"patch": '{"columns": []}'})
    return folder


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def recipe(models: list[str], base: str | None = None) -> Any:
    entries = [{"model": model} for model in models]
    method = "task_arithmetic" if base else "linear"
    return mergebench.load({"merge_method": method, "models": entries} | ({"base_model": base} if base else {}))


def peak(models: list[str], base: str | None = None, workers: int = 1) -> int:
    """What a plan with room enough will hold."""
    return mergebench.plan(recipe(models, base), memory=8 << 30, workers=workers, device="cpu").peak_memory


def least(models: list[str], base: str | None = None, workers: int = 1) -> int:
    """MB that the same merge cannot do without, as its refusal says."""
    with pytest.raises(RecipeError) as caught:
        mergebench.plan(recipe(models, base), memory=MB, workers=workers, device="cpu")
    needed = re.search(r"needs at least (\d+)MB here", caught.value.message)
    assert needed is not None, caught.value.message
    return int(needed[1])


CASES: list[Any] = [
    pytest.param("base+lora", FACTORS, id="LoRA"),
    pytest.param("base+dora", FACTORS + 4 * SIDE, id="DoRA"),
    pytest.param("base+patch.safetensors", 12 * ROWS, id="patch"),
]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("model", "held"), CASES)
def test_a_plan_counts_the_largest_delta_of_a_model(model: str, held: int, workers: int) -> None:
    """Each worker has one tensor's open at a time, however many tensors have one."""
    grown = peak([model, "tuned"], workers=workers) - peak(["base", "tuned"], workers=workers)
    assert workers * held <= grown < workers * 2 * held


@pytest.mark.parametrize(("model", "held"), CASES)
def test_models_add_up(model: str, held: int) -> None:
    """Every model's delta of a tensor is open beside the others'."""
    assert peak([model, model]) - peak(["base", "base"]) >= 2 * held


@pytest.mark.parametrize(("model", "held"), CASES)
def test_the_bases_own_counts(model: str, held: int) -> None:
    assert peak(["tuned"], model) - peak(["tuned"], "base") >= held


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("model", "held"), CASES)
def test_the_least_memory_holds_it(model: str, held: int, workers: int) -> None:
    grown = least([model, "tuned"], workers=workers) - least(["base", "tuned"], workers=workers)
    assert grown >= workers * held // MB


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_a_delta_above_the_budget_is_refused(command: str, cli: Cli, tmp_path: Path) -> None:
    """Where the same merge of plain models is not: exit code 2, and one line that says how much it needs."""
    enough, ran = least(["base", "tuned"]), []
    for model in ("base", "base+lora"):
        file = write_recipe(tmp_path / f"{model}.yaml", "linear", [model, "tuned"])
        out = ["--out", tmp_path / f"{model}-out", "-q"] if command == "merge" else []
        ran.append(cli(command, file, "--memory", f"{enough}MB", "--workers", "1", *out))
    assert (ran[0].code, ran[1].code, ran[1].out) == (0, 2, "")
    needed = re.search(rf"--memory {enough}MB: 'linear' needs at least (\d+)MB here", ran[1].err)
    assert needed is not None and int(needed[1]) >= FACTORS // MB, ran[1].err
    assert not (tmp_path / "base+lora-out").exists()
