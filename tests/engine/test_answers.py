"""Answers kept from one merge to the next, and results in memory, give the bits of a fresh merge into files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergebench import PerModel, methods, param
from mergebench.engine import trace
from mergebench.engine.answers import Known
from mergebench.engine.context import Context
from mergebench.engine.inmemory import InMemory
from mergebench.engine.method import Method, merge_method
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan, plan_merge
from mergebench.engine.run import run_in_memory, run_plan
from mergebench.engine.statistics import gram
from mergebench.testing.methods import Bench
from mergebench.testing.trial import make_base, moved

GIVEN = {"t": 0.3, "task": 1, "density": 0.5, "steps": 3}
OTHER = {"t": 0.6, "task": 2, "steps": 4, "max_iter": 3, "k": 1, "select_topk": 0.4, "clip": 0.2}
ONE_MODEL = [name for name in methods.names() if methods.get(name).gives == "model"]


def bench_of(method: Method, place: Path, **values: Any) -> Bench:
    base = make_base()
    models = [moved(base, seed) for seed in range(method.models or 3)]
    return Bench(method, params_of(method, len(models), **values), base, models, place)


def params_of(method: Method, count: int, **values: Any) -> Any:
    found = {}
    for name, parameter in method.parameters.items():
        value = values.get(name, GIVEN.get(name, parameter.default))
        found[name] = value if not parameter.per_model or isinstance(value, tuple) else (value,) * count
    return method.make_params(found)


def variations(method: Method, count: int) -> Iterator[tuple[str, Any]]:
    """Each parameter with another value; the first comes back at the end."""
    yield "", params_of(method, count)
    for name, parameter in method.parameters.items():
        if name in OTHER:
            value = OTHER[name]
        elif parameter.type is bool:
            value = not parameter.default
        elif parameter.choices:
            value = next(choice for choice in parameter.choices if choice != parameter.default)
        else:
            value = GIVEN.get(name, parameter.default) * 0.7
        yield name, params_of(method, count, **{name: value})
    yield "", params_of(method, count)


def planned(bench: Bench, params: Any) -> Plan:
    merge = dataclasses.replace(bench.merge(bench.opened), params=params)
    return plan_merge(merge, chunk=TILE, workers=2, device="cpu")


def all_known(plan: Plan, known: Known) -> bool:
    found = known.recall(plan)
    return sum(map(len, found.values())) == sum(unit.passes for group in plan.groups for unit in group.units)


@pytest.mark.parametrize("name", ONE_MODEL)
def test_reused_answers_give_the_bits_of_a_fresh_merge(name: str, tmp_path: Path) -> None:
    method = methods.get(name)
    bench = bench_of(method, tmp_path / "bench")
    known, target = Known(), None
    for changed, params in variations(method, len(bench.opened)):
        plan = planned(bench, params)
        target = target or InMemory(plan.shards)
        run_in_memory(plan, target, known)
        bench.params = params
        fresh = bench.streamed(bench.opened, TILE, 1)
        for tensor, value in fresh.items():
            assert torch.equal(value, target.tensors[tensor]), f"{tensor} after another {changed}"
        assert all_known(plan, known)


@pytest.mark.parametrize(
    ("name", "late", "early"),
    [("pcb", ["lambda", "weight"], "density"), ("ties", ["lambda", "weight", "normalize"], "density")],
)
def test_what_is_read_after_the_last_question_asks_nothing_again(
    name: str, late: list[str], early: str, tmp_path: Path
) -> None:
    method = methods.get(name)
    bench = bench_of(method, tmp_path / "bench")
    known = Known()
    first = planned(bench, bench.params)
    run_in_memory(first, InMemory(first.shards), known)
    for changed, params in variations(method, len(bench.opened)):
        if changed in late:
            assert all_known(planned(bench, params), known)
        if changed == early:
            assert not all_known(planned(bench, params), known)


def test_known_answers_go_into_a_run_on_disk(tmp_path: Path) -> None:
    bench = bench_of(methods.get("ties"), tmp_path / "bench")
    known = Known()
    plan = planned(bench, bench.params)
    first, again = (run_plan(plan, tmp_path / name, known=known) for name in ("first", "again"))
    fresh = run_plan(plan, tmp_path / "fresh")
    files = [(one.out / "model.safetensors").read_bytes() for one in (first, again, fresh)]
    assert files[0] == files[1] == files[2]
    assert first.provenance["answers"] == again.provenance["answers"] == fresh.provenance["answers"]
    zero = [[0.0] * len(bench.opened)]
    known.remember(plan, {unit: [{"order_statistics": zero, "kept": [1.0] * 3}] for unit in known.recall(plan)})
    lied = run_plan(plan, tmp_path / "lied", known=known)  # it takes them at their word
    assert lied.provenance["kept"] == dict.fromkeys(fresh.provenance["kept"], 1.0)
    assert (lied.out / "model.safetensors").read_bytes() != files[2]


def test_forked_workers_fill_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(methods.get("ties"), tmp_path / "bench")
    plan = planned(bench, bench.params)
    monkeypatch.setattr("mergebench.engine.executors.FORK_FROM", 0)
    target = InMemory(plan.shards)
    run_in_memory(plan, target, Known())
    for tensor, value in bench.streamed(bench.opened, TILE, 1).items():
        assert torch.equal(value, target.tensors[tensor])


@dataclasses.dataclass(frozen=True)
class Params:
    lambda_: float = param(1.0)
    weight: PerModel = param(1.0, per_model=True)
    power: float = param(1.0)

    @property
    def both(self) -> float:
        return self.lambda_ * self.power


def asks(*reads: str) -> Method:
    """A method that reads these before its question, and everything after it."""

    @merge_method(takes="task_vectors", paper="none")
    def one(tvs: Tensor, p: Params, ctx: Context) -> Any:
        for name in reads:
            vars(p) if name == "vars" else dataclasses.replace(p) if name == "replace" else getattr(p, name)
        yield gram(tvs)
        return tvs.sum(0) * p.lambda_ * p.power * p.weight[0]

    return one


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ([], set()),
        (["power"], {"power"}),
        (["both"], {"lambda_", "power"}),
        (["vars"], {"lambda_", "power", "weight"}),
        (["replace"], {"lambda_", "power", "weight"}),
    ],
)
def test_every_way_of_reading_a_parameter_is_seen(reads: list[str], expected: set[str], tmp_path: Path) -> None:
    bench = bench_of(asks(*reads), tmp_path / "bench")
    (read,) = trace.read_for(bench.merge(bench.opened), bench.params)
    assert read == expected


def test_parameters_that_vary_from_tensor_to_tensor(tmp_path: Path) -> None:
    method = methods.get("ties")
    bench = bench_of(method, tmp_path / "bench")
    names = list(bench.base)
    known = Known()

    def merged(*densities: float) -> Plan:
        params = [params_of(method, 3, density=density) for density in densities]
        by_tensor = {name: params[i % len(params)] for i, name in enumerate(names)}
        merge = dataclasses.replace(bench.merge(bench.opened), params=params[0], by_tensor=by_tensor)
        plan = plan_merge(merge, chunk=TILE, workers=1, device="cpu")
        target = InMemory(plan.shards)
        run_in_memory(plan, target, known)
        fresh = run_plan(plan, tmp_path / "out", overwrite=True)
        for name, value in load_file(fresh.out / "model.safetensors").items():
            assert torch.equal(value, target.tensors[name])
        return plan

    merged(0.5, 0.3)
    merged(0.3, 0.5)
    assert all_known(merged(0.5), known)  # each tensor was asked with each density


def test_what_is_asked_about_the_whole_model_depends_on_the_parameters_of_every_tensor(tmp_path: Path) -> None:
    @merge_method(takes="task_vectors", paper="none", scope="model")
    def one(tvs: Tensor, p: Params, ctx: Context) -> Any:
        dots = yield gram(tvs * p.power)
        return tvs.sum(0) * dots[0, 0].item()

    bench = bench_of(one, tmp_path / "bench")
    known = Known()
    for powers in ((1.0, 2.0, 3.0), (1.0, 2.0, 4.0), (1.0, 3.0, 2.0)):
        params = [params_of(one, 3, power=power) for power in powers]
        by_tensor = {name: params[i % 3] for i, name in enumerate(bench.base)}
        merge = dataclasses.replace(bench.merge(bench.opened), params=params[0], by_tensor=by_tensor)
        plan = plan_merge(merge, chunk=TILE, workers=1, device="cpu")
        target = InMemory(plan.shards)
        run_in_memory(plan, target, known)
        fresh = run_plan(plan, tmp_path / "out", overwrite=True)
        for name, value in load_file(fresh.out / "model.safetensors").items():
            assert torch.equal(value, target.tensors[name])
