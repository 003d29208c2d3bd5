"""LiNeS around a method, held against float64 on whole tensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, hashes, read_model, write_model, write_recipe
from torch import Tensor

from mergebench import TaskVectors, gram, load, merge_method, methods, norms, plan, run, total
from mergebench.engine.lines import Lines
from mergebench.errors import RecipeError
from mergebench.testing import check_method
from tests.conftest import Cli

# by name: l / (L - 1) of its layer; each stack of layers is counted by itself
DEPTH = {
    "shared.weight": 0.0,
    "encoder.block.0.layer.1.w": 0.0,
    "encoder.block.1.layer.0.w": 0.5,
    "encoder.block.2.layer.5.w": 1.0,
    "encoder.final.weight": 0.0,
    "decoder.block.0.layer.0.w": 0.0,
    "decoder.block.1.layer.2.w": 1.0,
    "head.weight": 0.0,
}


@dataclass(frozen=True)
class Params:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(37, 300, generator=random) for name in DEPTH} | {"steps": torch.arange(4)}
    write_model(tmp_path / "base", base, shards=2)
    for number in (1, 2, 3):
        write_model(tmp_path / f"ft{number}", fine_tuned(base, number))
    return tmp_path


def merged(method: str, out: str, lines: Any = None, limits: Any = None, **more: Any) -> dict[str, Tensor]:
    given = more | ({"lines": lines} if lines else {})
    path = write_recipe(Path(f"{out}.yaml"), method, ["ft1", "ft2", "ft3"], "base", **given)
    run(plan(load(path), **(limits or {})), out)
    return read_model(Path(out))


def deltas(out: dict[str, Tensor]) -> dict[str, Tensor]:
    base = read_model(Path("base"))
    return {name: out[name].double() - base[name].double() for name in DEPTH}


CASES = {
    "task_arithmetic": {},
    "ties": {"parameters": {"density": 0.3}},
    "dare_ties": {"parameters": {"density": 0.5}, "seed": 3},
    "iso_c": {},
    "pcb": {"scope": "model"},
    "consensus_ta": {},
}


@pytest.mark.parametrize("alpha", ["auto", 0.4])
@pytest.mark.parametrize("method", CASES)
def test_every_layer_is_scaled_by_its_depth(folder: Path, method: str, alpha: Any) -> None:
    plain = deltas(merged(method, "plain", **CASES[method]))
    got = deltas(merged(method, "lines", {"alpha": alpha, "beta": 0.7}, {"workers": 2}, **CASES[method]))

    tuned = [deltas(read_model(Path(f"ft{number}"))) for number in (1, 2, 3)]
    summed = sum(float(sum(tau[name] for tau in tuned).abs().sum()) for name in DEPTH)  # type: ignore[union-attr]
    length = sum(float(tau.abs().sum()) for tau in plain.values())
    first = summed / (3 * length) if alpha == "auto" else alpha
    for name, depth in DEPTH.items():
        assert torch.allclose(got[name], (first + 0.7 * depth) * plain[name], rtol=1e-5, atol=1e-6), name
    told = json.loads(Path("lines/mergebench.json").read_text())["lines"]
    assert told == {"alpha": pytest.approx(first, rel=1e-5), "beta": 0.7}


def test_of_a_plain_sum_alpha_is_one_over_the_number_of_models(folder: Path) -> None:
    merged("task_arithmetic", "out", {"alpha": "auto", "beta": 0})

    assert json.loads(Path("out/mergebench.json").read_text())["lines"]["alpha"] == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize("method", CASES)
def test_one_and_nothing_change_no_byte(folder: Path, method: str) -> None:
    for out, lines in (("plain", None), ("lines", {"alpha": 1, "beta": 0})):
        merged(method, out, lines, **CASES[method])

    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert hashes(Path("plain"))[file] == hashes(Path("lines"))[file]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_bits_depend_on_no_chunk_worker_or_memory(folder: Path, scope: str) -> None:
    lines = {"alpha": "auto", "beta": 0.7}
    more = {"parameters": {"density": 0.3}, "scope": scope}
    limits = [{"workers": 1}, {"workers": 3, "memory": 60 << 20}, {"workers": 2, "shard_size": 50_000}]
    first, *others = (merged("ties", f"out{i}", lines, limit, **more) for i, limit in enumerate(limits))

    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["ties", "pcb", "iso_c"])
@pytest.mark.parametrize("alpha", [None, 0.4])
def test_it_streams_to_the_bits_it_has_in_memory(method: str, alpha: float | None) -> None:
    check_method(Lines(alpha, 0.6, {"matrix": 0.5, "bias": 1.0}).around(methods.get(method)))


def test_the_last_question_is_the_last() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def early(tvs: TaskVectors, p: Params, ctx: Any) -> Any:
        """Asks about all tensors before it asks about one."""
        yield norms(tvs)
        yield gram(tvs)
        return total(tvs)

    with pytest.raises(RecipeError, match="TypeError: early: norms reach over all tensors, they can only be"):
        check_method(early)


def test_plan_and_explain_show_it(folder: Path, cli: Cli) -> None:
    path = write_recipe(Path("r.yaml"), "ties", ["ft1", "ft2"], "base", lines={"alpha": "auto", "beta": 0.5})
    plain = write_recipe(Path("p.yaml"), "ties", ["ft1", "ft2"], "base")
    shown, before = (cli("plan", one).out for one in (path, plain))
    assert "  lines     alpha auto (asked about the whole model, last), beta 0.5\n" in shown
    assert ("1 question, 2 sweeps" in shown, "0 questions, 1 sweep\n" in before) == (True, True)

    rows = dict(line.split(None, 1) for line in cli("explain", path).out.splitlines()[2:])
    assert (rows["shared.weight"], rows["encoder.block.1.layer.0.w"]) == ("lines auto + 0", "lines auto + 0.25")
    fixed = cli("explain", path, "--set", "lines.alpha=0.2", "--json").out
    values = {one["tensor"]: one.get("parameters", {}).get("lines") for one in json.loads(fixed)["tensors"]}
    assert values["decoder.block.1.layer.2.w"] == pytest.approx(0.7)
    assert (
        "lines: layers scaled by 0.2 (the first, and outside) to 0.7 (the last)"
        in cli("merge", path, "--set", "lines.alpha=0.2").err
    )


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"lines": 3}, "lines: must be a mapping, got 3", "write lines: {alpha: auto, beta: 0.5}"),
        ({"lines": {"alpha": 1}}, "lines.beta: missing", "write lines: {alpha: auto, beta: 0.5}"),
        ({"lines": {"alpha": "much", "beta": 1}}, "lines.alpha: must be a number or auto, got 'much'", None),
        ({"lines": {"alfa": 1, "beta": 1}}, "lines.alfa: no such key", "did you mean 'alpha'?"),
        (
            {"merge_method": "linear"},
            "lines: 'linear' merges weights, there is no task vector to scale",
            "take a method on task vectors, such as task_arithmetic",
        ),
        (
            {"merge_method": "sce", "base_model": None},
            "base_model: missing, 'sce' merges task vectors",
            "name the model the others were fine-tuned from: base_model: PATH",
        ),
        (
            {"merge_method": "nuslerp", "base_model": None},
            "lines: without a base_model there is no task vector to scale",
            "name the model the others were fine-tuned from: base_model: PATH",
        ),
        (
            {"merge_method": "della", "parameters": {"density": 0.5}},
            "lines.alpha: auto needs sums over the model, 'della' is cut into rows",
            "give it a number",
        ),
    ],
)
def test_what_cannot_be(folder: Path, change: dict[str, Any], message: str, hint: str | None) -> None:
    data = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "ft1"}, {"model": "ft2"}],
        "lines": {"alpha": "auto", "beta": 0.5},
    } | change
    Path("r.yaml").write_text(json.dumps({k: v for k, v in data.items() if v is not None}, indent=1))

    with pytest.raises(RecipeError) as caught:
        plan(load("r.yaml"))

    assert re.fullmatch(rf"r\.yaml:\d+:\d+: {re.escape(message)}", caught.value.message)
    assert caught.value.hint == hint
