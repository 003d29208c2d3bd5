"""Small tensors share a chunk: the bits, the answers and the errors of each are those it has alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, read_model, write_model
from torch import Tensor

from mergebench import Context, Passes, TaskVectors, gram, merge_method, methods, norms, total
from mergebench.deltas.open import open_model
from mergebench.engine.items import MOST, SMALL, items_of
from mergebench.engine.job import Merge
from mergebench.engine.lines import Lines
from mergebench.engine.method import Method
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan, plan_merge
from mergebench.engine.run import run_plan
from mergebench.errors import RunError
from mergebench.testing.methods import in_memory

SHAPES = [(64,), (16, 16), (), (7,), (3, 5), (1,), (64,), (2, 3, 4), (40, 50)]
NAMES = ("ft1", "ft2", "ft3")


@dataclass(frozen=True)
class Params:
    pass


@merge_method(takes="task_vectors", paper="none")
def by_size(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Asks nothing, and looks at the size of its tensor."""
    return total(tvs) / ctx.numel


@merge_method(takes="task_vectors", paper="none")
def by_shape(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Asks nothing, and looks at the shape of its tensor."""
    return total(tvs) * len(ctx.shape)


@merge_method(takes="task_vectors", paper="none", scope="model")
def by_lengths(tvs: TaskVectors, p: Params, ctx: Context) -> Any:
    """Asks for dot products and norms, whose sums are over the tiles of each tensor; shows the last bits."""
    dots = yield gram(tvs)
    lengths = yield norms(tvs)
    return total(tvs) + (dots[0, 1] * 2.0**50 % 1 + lengths[0] * 2.0**40 % 1).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("small")
    random = torch.Generator().manual_seed(0)
    base: dict[str, Tensor] = {}
    for number in range(3 * MOST):
        base[f"layers.{number:03}.weight"] = torch.randn(SHAPES[number % len(SHAPES)], generator=random)
    base["layers.100.large"] = torch.randn(3, SMALL, generator=random)
    base["layers.150.steps"] = torch.arange(5)
    write_model(place / "base", base)
    for number, name in enumerate(NAMES, 1):
        write_model(place / name, fine_tuned(base, number))
    return place


def planned(folder: Path, method: Method, chunk: int | None = None, workers: int = 1, **more: Any) -> Plan:
    base, *models = (open_model(str(folder / name)) for name in ("base", *NAMES))
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        value = 0.4 if name == "density" else 0.2 if name == "epsilon" else parameter.default
        values[name] = (value,) * 3 if parameter.per_model else value
    merge = Merge(method, method.make_params(values), base, tuple(models), NAMES, method.scope, **more)
    return plan_merge(merge, workers=workers, chunk=chunk, device="cpu")


METHODS = [
    *map(methods.get, ("linear", "dare_ties", "ties", "pcb", "breadcrumbs", "model_stock", "della", "iso_c")),
    dataclasses.replace(methods.get("pcb"), scope="tensor"),
    dataclasses.replace(methods.get("ties"), scope="model"),
    by_shape,
    *(dataclasses.replace(one, scope=scope) for one in (by_size, by_lengths) for scope in ("tensor", "model")),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{one.name}-{one.scope}")
def test_the_bits_of_tensors_alone(folder: Path, tmp_path: Path, method: Method) -> None:
    base = {name: one for name, one in read_model(folder / "base").items() if one.is_floating_point()}
    tuned = [read_model(folder / name) for name in NAMES]
    for chunk, workers in ((None, 1), (TILE, 3)):
        plan = planned(folder, method, chunk, workers)
        run_plan(plan, tmp_path / "out", overwrite=True)
        order = {name: base[name] for name in plan.alignment.merged}  # sums go in the order of the files
        expected = in_memory(method, order, tuned, plan.merge.params)
        got = read_model(tmp_path / "out")
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert torch.equal(got["layers.150.steps"], torch.arange(5))


def test_each_layer_has_its_factor_in_a_shared_chunk(folder: Path, tmp_path: Path) -> None:
    depth = {f"layers.{number:03}.weight": number / 200 for number in range(3 * MOST)}
    method = methods.get("task_arithmetic")
    run_plan(planned(folder, Lines(0.3, 0.5, depth).around(method)), tmp_path / "scaled")
    base, *tuned = (read_model(folder / name) for name in ("base", *NAMES))
    for name, got in read_model(tmp_path / "scaled").items():
        if name in depth:
            vector = total([one[name] - base[name] for one in tuned])
            assert torch.equal(got, vector * (0.3 + 0.5 * depth[name]) + base[name])


def test_chunks_hold_every_element_once(folder: Path) -> None:
    plan = planned(folder, methods.get("ties"))
    numbers = {name: number for number, name in enumerate(plan.alignment.merged)}
    items = list(items_of(plan, numbers.items()))
    assert len(items) < 12  # of 193 tensors
    found: dict[str, int] = {}
    for item in items:
        assert len(item.spans) <= MOST and sum(span.numel for span in item.spans) <= plan.chunk
        for at, span in enumerate(item.spans):
            assert numbers[span.tensor] == item.unit + at
            assert span.start == found.get(span.tensor, 0)
            found[span.tensor] = span.stop
    assert found == {name: plan.merge.reference.tensors[name].numel for name in numbers}


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_an_error_names_the_tensor(folder: Path, tmp_path: Path, name: str) -> None:
    for model in ("base", *NAMES):
        tensors = read_model(folder / model)
        tensors["layers.031.weight"] = torch.full((3, 5), 60_000.0)
        if model == "ft2":
            tensors["layers.031.weight"][1, 2] = 300_000.0
        write_model(tmp_path / model, tensors)
    with pytest.raises(RunError, match=r"^layers\.031\.weight: the merged values do not fit into F16$"):
        run_plan(planned(tmp_path, methods.get(name), dtype="float16"), tmp_path / "out")
    tensors["layers.031.weight"][2, 4] = torch.nan
    write_model(tmp_path / "ft3", tensors)
    with pytest.raises(RunError, match=r"^layers\.031\.weight: .*ft3 has nan at \[2, 4\]$"):
        run_plan(planned(tmp_path, methods.get(name)), tmp_path / "out")
