"""Chunks that no model changed are copied: the bytes are those of the computed merge, and so are the errors.

That a method may be treated so is checked by `check_method` (tests/methods/test_check.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model, write_model

from mergebench import methods
from mergebench.checkpoint.files import Files
from mergebench.deltas.open import open_model
from mergebench.engine.items import Item, items_of
from mergebench.engine.job import Merge
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan, plan_merge
from mergebench.engine.read import ChunkReader
from mergebench.engine.run import run_plan
from mergebench.errors import RunError
from mergebench.testing.methods import in_memory

NAMES = ("ft1", "ft2", "base")  # the base as a model changes nothing
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
KEPT = {"same", "late", "small.1", "small.2"}  # whole tensors, or their first tile
SUBTRACTED = {"lambda": -0.7, "weight": (-0.5, 0.7, -0.9)}  # zeros times these are -0, and -0 + -0 stays -0
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}),
    ("task_arithmetic", SUBTRACTED),
    ("ties", {"density": (0.2,) * 3}),
    ("localize_stitch", {"density": (0.2,) * 3}),  # it asks about the whole model
    ("magmax", SUBTRACTED),
]


def write(folder: Path, dtype: torch.dtype) -> None:
    """Tensors of which no model changes anything, with -0 or without; or the last element; or a -0 into +0."""
    random = torch.Generator().manual_seed(0)
    sizes = {"same": TILE + 77, "zeros": TILE, "late": TILE + 9, "turned": TILE, "tuned": TILE}
    sizes |= {"small.1": 40, "small.2": 30}
    base = {name: torch.randn(size, generator=random).to(dtype) for name, size in sizes.items()}
    base["zeros"][::5000] = base["turned"][7] = -0.0
    write_model(folder / "base", base)
    for name in NAMES[:2]:
        tuned = {key: value.clone() for key, value in base.items()}
        tuned["tuned"] += 0.01 * torch.randn(TILE, generator=random).to(dtype)
        tuned["late"][-1] += 1
        tuned["turned"][7] = 0.0
        write_model(folder / name, tuned)


def planned(folder: Path, name: str, given: dict[str, Any], **more: Any) -> Plan:
    base, *models = (open_model(str(folder / one)) for one in ("base", *NAMES))
    method, values = methods.get(name), {}
    for key, parameter in method.parameters.items():
        values[key] = given.get(key, (parameter.default,) * 3 if parameter.per_model else parameter.default)
    merge = Merge(method, method.make_params(values), base, tuple(models), NAMES, method.scope, **more)
    return plan_merge(merge, workers=1, chunk=TILE, device="cpu")


def copied(plan: Plan) -> set[str]:
    """The tensors of chunks that are copied."""
    with Files() as files:
        reader = ChunkReader(plan, files)

        def is_copied(item: Item) -> bool:
            return plan.keeps(item.spans[0].tensor) and reader.unchanged(item.spans) is not None

        items = list(items_of(plan, ((name, number) for number, name in enumerate(plan.alignment.merged))))
        return {span.tensor for item in items if is_copied(item) for span in item.spans}


@pytest.mark.parametrize(("name", "given"), METHODS)
@pytest.mark.parametrize("stored", FLOATS)
def test_the_bytes_are_those_of_the_computed_merge(
    tmp_path: Path, stored: str, name: str, given: dict[str, Any]
) -> None:
    write(tmp_path, FLOATS[stored])
    for dtype in (None, "float16", "float32"):
        plan = planned(tmp_path, name, given, dtype=dtype)
        run_plan(plan, tmp_path / "out", overwrite=True)
        base, *tuned = (read_model(tmp_path / one) for one in ("base", *NAMES))
        order = {key: base[key] for key in plan.alignment.merged}  # sums go in the order of the files
        expected = in_memory(plan.merge.method, order, tuned, plan.merge.params, plan.merge.scope)
        got = read_model(tmp_path / "out")
        for key, value in expected.items():
            assert torch.equal(got[key].view(torch.uint8), value.to(got[key].dtype).view(torch.uint8)), key
        small = {"small.1", "small.2"} if name == "ties" else set()  # TIES asks about them where it merges them
        assert copied(plan) == (set() if stored == "F64" else KEPT - small)


def test_answers_about_unchanged_tensors_are_recorded(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    run_plan(planned(tmp_path, "ties", {"density": (0.2,) * 3}), tmp_path / "out")
    answers = json.loads((tmp_path / "out" / "mergebench.json").read_text())["answers"]
    assert answers.keys() == read_model(tmp_path / "base").keys()


@pytest.mark.parametrize(
    ("value", "what"), [(1e5, "same: the merged values do not fit into F16"), (torch.inf, r"base has inf at \[65536\]")]
)
def test_what_is_no_number_or_does_not_fit_is_refused(tmp_path: Path, value: float, what: str) -> None:
    write(tmp_path, torch.float32)
    for name in set(NAMES):
        tensors = read_model(tmp_path / name)
        tensors["same"][TILE] = value
        write_model(tmp_path / name, tensors)
    with pytest.raises(RunError, match=what):
        run_plan(planned(tmp_path, "task_arithmetic", {}, dtype="float16"), tmp_path / "out")


def test_bytes_of_another_type_or_of_a_difference_are_not_compared(tmp_path: Path) -> None:
    """Zeros in float32, half of them, have the bytes of zeros in float16; a task vector may equal its base."""
    half = torch.cat([torch.zeros(TILE), torch.ones(TILE)])
    write_model(tmp_path / "base", {"zeros": torch.zeros(2 * TILE).half(), "ones": torch.ones(TILE).half()})
    for name in NAMES[:2]:
        write_model(tmp_path / name, {"zeros": half, "ones": torch.ones(TILE).half()})
    plan = planned(tmp_path, "task_arithmetic", {})
    assert copied(plan) == {"ones"}
    run_plan(plan, tmp_path / "out")
    assert torch.equal(read_model(tmp_path / "out")["zeros"], 2 * half.half())
    vectors = [dataclasses.replace(model, is_task_vector=True) for model in plan.merge.models]
    assert not copied(plan_merge(dataclasses.replace(plan.merge, models=(*vectors[:2], plan.merge.models[2]))))
