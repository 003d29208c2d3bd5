"""The estimate of time against what was measured: benchmarks/RESULTS.md, and single decompositions."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench import methods
from mergebench.engine.duration import DISK, START, estimate

RESULTS = (Path(__file__).parents[2] / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
LAYERS, HIDDEN, INNER, WORDS = 18, 1536, 4096, 32000  # 0.55 B parameters
PARAMETERS = {"slerp": {"t": 0.4}, "nearswap": {"t": 1e-3}, "ties": {"density": 0.2}, "sce": {"select_topk": 0.5}}
HALF = ("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "dare_linear", "dare_ties")


def sparse_model(directory: Path, layers: int = LAYERS) -> None:
    """A checkpoint of 0.55 B parameters of which only the header is on the disk."""
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{block}self_attn.{name}_proj.weight": (HIDDEN // 3, HIDDEN) for name in "kv"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (HIDDEN, INNER)}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    for name in ("base", "ft1", "ft2", "ft3"):
        sparse_model(folder / name)
    return folder


def measured() -> dict[str, float]:
    table = RESULTS.partition("## Speed")[2].partition("The floor")[0]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ \|", table, re.M)
    return {name: float(seconds) for name, seconds in rows}


@pytest.mark.parametrize("name", measured())
def test_within_two_of_what_was_measured(name: str, models: Path) -> None:
    method = methods.get(name)
    tuned = [f"ft{n}" for n in range(1, (method.models or 3) + 1)]
    if method.models == 2:
        tuned = ["ft1"] if method.takes == "weights" else ["ft1", "ft2"]
    parameters = PARAMETERS.get(name, {"density": 0.5} if name in HALF else {})
    recipe: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(models / one)} for one in tuned],
        "parameters": parameters,
    }
    if name not in ("linear", "passthrough", "multislerp", "karcher"):
        recipe["base_model"] = str(models / "base")
    found = estimate(mergebench.plan(recipe, workers=2, device="cpu"))
    assert found is not None and 0.5 < found.work / measured()[name] < 2, (found, measured()[name])


def test_the_work_and_the_disk_are_shared_out(models: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": str(models / f"ft{n}")} for n in (1, 2)]}
    one, four = (estimate(mergebench.plan(recipe, workers=n, device="cpu")) for n in (1, 4))
    assert one is not None and four is not None
    assert one.work - START == pytest.approx(4 * (four.work - START))
    size = (models / "ft1" / "model.safetensors").stat().st_size
    assert one.disk - START == pytest.approx(3 * size / DISK, rel=1e-3)


@pytest.mark.parametrize(("method", "count"), [("iso_c", 1), ("tsv_m", 4), ("iso_cts", 5)])
def test_decompositions_are_counted(models: Path, method: str, count: int) -> None:
    """Golden: 0.3 ns of a core for m * n * min(m, n) of one."""
    tuned = [{"model": str(models / f"ft{n}")} for n in (1, 2)]
    recipe = {"merge_method": method, "base_model": str(models / "base"), "models": tuned}
    found = estimate(mergebench.plan(recipe, workers=1, device="cpu", memory=4 << 30))
    matrices = 2 * HIDDEN**3 + 2 * HIDDEN * (HIDDEN // 3) ** 2 + 3 * INNER * HIDDEN**2
    assert found is not None and found.work == pytest.approx(LAYERS * count * matrices * 0.3e-9, rel=0.1)
