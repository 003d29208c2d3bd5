"""Values that vary over a model: gradients and filters, by hand; whole merges are held against mergekit's elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, read_model, write_model, write_recipe
from typer.testing import CliRunner

import mergebench
from mergebench.cli.app import app
from mergebench.errors import RecipeError
from mergebench.recipe.gradients import depths, fits, layer_of, value_at


@pytest.mark.parametrize(
    ("value", "name", "depth", "expected"),
    [
        (0.3, "x", 0.7, 0.3),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.5, 0.3),
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.625, 0.5),
        ([2, 4], "x", 1.0, 4.0),
        ([7], "x", 0.4, 7),
        (["a", "b", "c"], "x", 0.5, "b"),
        ([False, True], "x", 0.99, False),
        ([{"filter": "mlp", "value": 1}, {"value": 2}], "layers.0.mlp.up", 0, 1),
        ([{"filter": "mlp", "value": 1}, {"value": 2}], "layers.0.attn.q", 0, 2),
        ([{"filter": "mlp", "value": 1}], "layers.0.attn.q", 0, None),
        ([{"filter": "mlp", "value": [0, 1]}], "layers.0.mlp.up", 0.5, 0.5),
        ([{"filter": "*", "value": 3}, {"value": 2}], "anything", 0, 3),
        ([{"filter": "*.bias", "value": 3}, {"value": 2}], "a.bias", 0, 3),
        ([{"filter": r"/layers\.1\d\./", "value": 3}, {"value": 2}], "layers.12.mlp", 0, 3),
        ([{"filter": r"/layers\.1\d\./", "value": 3}, {"value": 2}], "layers.1.mlp", 0, 2),
    ],
)
def test_values(value: Any, name: str, depth: float, expected: Any) -> None:
    assert expected == value_at(value, name, depth)


def test_a_filter_is_a_part_of_the_name_unless_it_says_otherwise() -> None:
    assert fits("up_proj", "layers.0.mlp.up_proj.weight")
    assert not fits("up_proj?", "layers.0.mlp.up_proj.weight")
    assert fits("*up_proj?weight", "layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj.weight")),
        ("h.11.attn.bias", ("h", 11, "attn.bias")),
        ("model.layers.2.experts.7.w1.weight", ("model.layers", 2, "experts.7.w1.weight")),
        ("0.weight", ("", 0, "weight")),
        ("model.norm.weight", None),
        ("model.layers2.weight", None),
    ],
)
def test_layers_by_name(name: str, expected: Any) -> None:
    assert expected == layer_of(name)


def test_depths_are_counted_stack_by_stack() -> None:
    names = ["encoder.0.w", "encoder.1.w", "encoder.2.w", "decoder.0.w", "norm.w"]
    assert depths(names) == {"encoder.0.w": 0.0, "encoder.1.w": 0.5, "encoder.2.w": 1.0, "decoder.0.w": 1.0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    names = ["emb.weight", *(f"layers.{layer}.mlp.weight" for layer in range(3)), "norm.weight"]
    base = {name: torch.randn(5, 7, generator=torch.Generator().manual_seed(place)) for place, name in enumerate(names)}
    write_model(tmp_path / "base", base)
    for number in (1, 2):
        write_model(tmp_path / f"ft{number}", fine_tuned(base, number))
    return tmp_path


def test_a_density_may_vary_also_to_one_and_nothing(folder: Path) -> None:
    """Some tensors are asked about, others (density 1) are not; each is what a merge of its own would give."""
    density = [{"filter": "layers.1.", "value": 1.0}, {"filter": "layers", "value": [0.2, 0.6]}, {"value": 0.5}]
    write_recipe(Path("recipe.yaml"), "ties", ["ft1", "ft2"], base="base", parameters={"density": density})
    plan = mergebench.plan(mergebench.load("recipe.yaml"))
    mergebench.run(plan, "out")

    merged = read_model(folder / "out")
    there = {"emb.weight": 0.5, "layers.0.mlp.weight": 0.2, "layers.1.mlp.weight": 1.0, "layers.2.mlp.weight": 0.6}
    for name, one in there.items():
        mergebench.run(mergebench.plan(mergebench.load("recipe.yaml", [f"parameters.density={one}"])), f"one{one}")
        assert torch.equal(read_model(folder / f"one{one}")[name], merged[name])
    assert plan.asked == {name: 0 if "layers.1." in name else 1 for name in merged}


def test_what_the_model_is_asked_as_a_whole_may_not_vary(folder: Path) -> None:
    parameters = {"density": [{"filter": "mlp", "value": 0.2}, {"value": 0.5}]}
    write_recipe(Path("recipe.yaml"), "ties", ["ft1", "ft2"], base="base", parameters=parameters, scope="model")
    with pytest.raises(RecipeError, match="scope: model: 'ties' asks about the whole model at once"):
        mergebench.plan(mergebench.load("recipe.yaml"))


def test_at_model_scope_a_weight_may_vary(folder: Path) -> None:
    """Samples before a sweep go through many tensors, each with its own weight."""
    weight = [{"filter": "layers", "value": [0.5, 2]}, {"value": 1.0}]
    write_recipe(Path("recipe.yaml"), "pcb", ["ft1", "ft2"], base="base", parameters={"density": 0.5, "weight": weight})
    plan = mergebench.plan(mergebench.load("recipe.yaml"))
    mergebench.run(plan, "out")
    merged, base = read_model(folder / "out"), read_model(folder / "base")
    mergebench.run(mergebench.plan(mergebench.load("recipe.yaml", ["parameters.weight=1"])), "plain")
    plain = read_model(folder / "plain")
    for name, weight_there in {"layers.0.mlp.weight": 0.5, "layers.1.mlp.weight": 1.25, "emb.weight": 1.0}.items():
        torch.testing.assert_close(
            merged[name] - base[name], weight_there * (plain[name] - base[name]), atol=1e-6, rtol=1e-4
        )


def test_a_filter_that_fits_nothing_is_said_with_the_tensor(folder: Path) -> None:
    write_recipe(
        Path("recipe.yaml"), "slerp", ["ft1"], base="base", parameters={"t": [{"filter": "mlp", "value": 0.2}]}
    )
    with pytest.raises(RecipeError, match=r"parameters.t: no filter fits 'emb.weight'"):
        mergebench.plan(mergebench.load("recipe.yaml"))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_a_density_of_zero_at_a_gradients_end_keeps_nothing(folder: Path, method: str) -> None:
    write_recipe(Path("recipe.yaml"), method, ["ft1", "ft2"], base="base", parameters={"density": [0, 1]})
    mergebench.run(mergebench.plan(mergebench.load("recipe.yaml")), "out")
    merged, base = read_model(folder / "out"), read_model(folder / "base")
    for name, value in merged.items():
        assert torch.equal(base[name], value) == ("layers.1" not in name and "layers.2" not in name)


def test_an_excluded_tensor_needs_no_value(folder: Path) -> None:
    parameters = {"t": [{"filter": "layers", "value": 0.2}]}
    write_recipe(Path("recipe.yaml"), "slerp", ["ft1"], base="base", parameters=parameters, include=["layers.*"])
    assert set(mergebench.plan(mergebench.load("recipe.yaml")).alignment.copied) == {"emb.weight", "norm.weight"}


def test_whole_numbers_of_a_gradient_are_rounded(folder: Path) -> None:
    write_recipe(Path("recipe.yaml"), "karcher", ["ft1", "ft2"], parameters={"max_iter": [0, 7]})
    merge = mergebench.plan(mergebench.load("recipe.yaml")).merge
    assert [merge.params_for(f"layers.{layer}.mlp.weight").max_iter for layer in range(3)] == [0, 4, 7]


def test_explain_says_what_holds_where(folder: Path) -> None:
    weight = [{"filter": "layers", "value": [0.25, 1]}, {"value": 0.5}]
    write_recipe(Path("recipe.yaml"), "linear", ["ft1", "ft2"], parameters={"weight": weight}, exclude=["emb*"])
    assert CliRunner().invoke(app, ["explain", "recipe.yaml"]).stdout.splitlines() == [
        "linear, scope tensor; models: ft1, ft2",
        "everywhere: normalize True",
        "emb.weight           copied from the base",
        "layers.0.mlp.weight  weight [0.25, 0.25]",
        "layers.1.mlp.weight  weight [0.625, 0.625]",
        "layers.2.mlp.weight  weight [1, 1]",
        "norm.weight          weight [0.5, 0.5]",
    ]


def test_explain_names_the_sources_of_slices(folder: Path) -> None:
    slices = [
        {"sources": [{"model": "ft1", "layer_range": [0, 2]}]},
        {"sources": [{"model": "ft2", "layer_range": [1, 3]}]},
    ]
    Path("recipe.yaml").write_text(json.dumps({"merge_method": "linear", "slices": slices}))
    found = json.loads(CliRunner().invoke(app, ["explain", "recipe.yaml", "--json"]).stdout)["tensors"]
    assert {one["tensor"]: one["sources"] for one in found} == {
        "emb.weight": ["ft1:emb.weight"],
        "layers.0.mlp.weight": ["ft1:layers.0.mlp.weight"],
        "layers.1.mlp.weight": ["ft1:layers.1.mlp.weight"],
        "layers.2.mlp.weight": ["ft2:layers.1.mlp.weight"],
        "layers.3.mlp.weight": ["ft2:layers.2.mlp.weight"],
        "norm.weight": ["ft2:norm.weight"],
    }
    head, _, *lines = CliRunner().invoke(app, ["explain", "recipe.yaml"]).stdout.splitlines()
    assert head == "linear, scope tensor; models: ft1 or ft2"
    assert [" ".join(line.split()) for line in lines] == [
        "emb.weight from ft1",
        "layers.0.mlp.weight from ft1",
        "layers.1.mlp.weight from ft1",
        "layers.2.mlp.weight from ft2:layers.1.mlp.weight",
        "layers.3.mlp.weight from ft2:layers.2.mlp.weight",
        "norm.weight from ft2",
    ]


def test_slices_of_models_of_one_name_and_one_file(folder: Path) -> None:
    """`a/same` and `b/same`, and one with a task vector on it: each by what tells it apart."""
    for place in ("a", "b"):
        Path(place).mkdir()
        shutil.copytree("ft1", f"{place}/same")
    mergebench.task_vector("ft2", "ft1", "tv")
    names = ["a/same", "b/same", "a/same+tv"]
    slices = [{"sources": [{"model": name, "layer_range": [n, n + 1]}]} for n, name in enumerate(names)]
    Path("recipe.yaml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    _, _, *lines = CliRunner().invoke(app, ["explain", "recipe.yaml"]).stdout.splitlines()
    places = [line.split()[-1] for line in lines if line.startswith("layers.")]
    assert places == ["a/same", "b/same", "same/tv"]
    result = CliRunner().invoke(app, ["merge", "recipe.yaml", "--out", "out", "--no-eval"])
    assert "passthrough: 3 models, " in result.stderr
