"""What a search measures is, bit for bit, what `mergebench merge` writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, read_model, tiny_tensors, write_model, write_recipe
from torch import Tensor

import mergebench
from mergebench import PerModel, methods, param
from mergebench.engine.context import Context
from mergebench.engine.method import Method, merge_method
from mergebench.engine.run import run_plan
from mergebench.errors import RunError
from mergebench.evaluation.search import candidates as module
from mergebench.evaluation.search.candidates import Candidates
from mergebench.recipe import Recipe

WITH_LAMBDA = [name for name in methods.names() if "lambda" in methods.get(name).parameters]
MORE = {"tall_mask": {"task": 2}, "wudi": {"steps": 3}, "ties": {"density": 0.4}, "pcb": {"density": 0.3}}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = tiny_tensors(dtype=torch.bfloat16)
    write_model(tmp_path / "base", base, shards=2, side_files={"tokenizer.json": "{}"})
    for number in (1, 2, 3):
        write_model(tmp_path / f"ft{number}", fine_tuned(base, number))
    return tmp_path


def recipe(place: Path, method: str, **more: Any) -> Recipe:
    names = [str(place / f"ft{number}") for number in (1, 2, 3)][: methods.get(method).models or 3]
    return mergebench.load(write_recipe(place / "recipe.yaml", method, names, place / "base", **more))


def expected(place: Path, one: Recipe) -> dict[str, Tensor]:
    return read_model(run_plan(mergebench.plan(one), place / "expected", overwrite=True).out)


def check(place: Path, one: Recipe, merges: Candidates) -> None:
    found = merges.merge(merges.plan(one), "point").state_dict()
    wanted = expected(place, one)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.float() if value.is_floating_point() else value), name


@pytest.mark.parametrize("method", WITH_LAMBDA)
@pytest.mark.parametrize("lines", [None, {"alpha": 0.5, "beta": 0.5}, {"alpha": "auto", "beta": 0.5}])
def test_every_lambda_is_what_merge_writes(method: str, lines: Any, models: Path) -> None:
    if lines and lines["alpha"] == "auto" and method in ("della", "della_linear"):
        pytest.skip("cut into rows")
    merges = Candidates(models / "work", "cpu")
    for lambda_ in (0.3, 1.0, 1.7, 0.3):
        parameters = {**MORE.get(method, {}), "lambda": lambda_}
        check(models, recipe(models, method, parameters=parameters, **({"lines": lines} if lines else {})), merges)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("more", [{}, {"exclude": ["norm.*"]}, {"dtype": "float32"}, {"scope": "tensor"}])
def test_other_parameters_between(in_memory: bool, more: dict[str, Any], models: Path) -> None:
    merges = Candidates(models / "work", "cpu", in_memory)
    for density, lambda_ in ((0.3, 1.0), (0.3, 0.4), (0.6, 0.4), (0.3, 0.4)):
        check(models, recipe(models, "pcb", parameters={"density": density, "lambda": lambda_}, **more), merges)


def test_tensors_of_many_chunks(tmp_path: Path) -> None:
    base = {"layers.0.weight": torch.randn(700, 500, generator=torch.Generator().manual_seed(0))}
    write_model(tmp_path / "base", base)
    for number in (1, 2, 3):
        write_model(tmp_path / f"ft{number}", fine_tuned(base, number))
    merges = Candidates(tmp_path / "work", "cpu")
    for lambda_ in (1.0, 0.4):
        check(tmp_path, recipe(tmp_path, "ties", parameters={"density": 0.3, "lambda": lambda_}), merges)


def test_a_gradient_of_lambda(models: Path) -> None:
    merges = Candidates(models / "work", "cpu")
    for density in (0.3, 0.6):
        check(models, recipe(models, "ties", parameters={"density": density, "lambda": [0.2, 1.0]}), merges)


@dataclasses.dataclass(frozen=True)
class Params:
    lambda_: float = param(1.0)
    weight: PerModel = param(1.0, per_model=True)


@pytest.mark.parametrize("last", [True, False])
def test_a_lambda_that_is_no_factor_is_seen(last: bool, models: Path) -> None:
    @merge_method(takes="task_vectors", paper="none")
    def one(tvs: Tensor, p: Params, ctx: Context) -> Any:
        merged = tvs.sum(0)
        return merged * p.lambda_ if last else (merged * p.lambda_).clamp(max=0.005)

    method: Method = one
    merge = mergebench.plan(recipe(models, "task_arithmetic")).merge
    params = method.make_params({"lambda": 1.0, "weight": (1.0,) * 3})
    assert module._ends_with_lambda(dataclasses.replace(merge, method=method, params=params)) is last


def test_a_merge_that_does_not_fit_its_type_says_so(models: Path) -> None:
    merges = Candidates(models / "work", "cpu")
    one = recipe(models, "task_arithmetic", parameters={"lambda": 1e30}, dtype="float16")
    with pytest.raises(RunError, match="the merged values do not fit into F16"):
        merges.merge(merges.plan(one), "point")
    check(models, recipe(models, "task_arithmetic", parameters={"lambda": 0.5}, dtype="float16"), merges)


def test_a_key_is_of_all_that_counts(models: Path) -> None:
    merges = Candidates(models / "work", "cpu")

    def key(lambda_: float) -> str:
        return merges.key(merges.plan(recipe(models, "ties", parameters={"lambda": lambda_})))

    first = key(1.0)
    assert key(1.0) == first != key(0.5)
    (models / "base/README.md").write_text("of no account")
    assert key(1.0) == first
    (models / "base/tokenizer.json").write_text("[]")
    assert key(1.0) != first


def test_the_side_files_are_those_of_the_merge(models: Path) -> None:
    merges = Candidates(models / "work", "cpu")
    model = merges.merge(merges.plan(recipe(models, "pcb")), "point")
    assert sorted(path.name for path in model.side_directory.iterdir()) == ["config.json", "tokenizer.json"]
