"""Model surgery: which rows are taken and what becomes of them, against the paper's own steps by brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model, write_model, write_recipe
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mergebench
from mergebench.api import dry_run, plan_edit, plan_patch
from mergebench.editing.patches import open_patch
from tests.conftest import Cli
from tests.editing.conftest import CONFIG, GATE, LAYERS, NEURONS, WIDTH, gated, write_probe

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATCH = "patch.safetensors"


def edit(model: Path, probe: Path, out: Path, **how: Any) -> dict[str, Any]:
    """Edit; what is told of it."""
    report: dict[str, Any] = mergebench.run(plan_edit(str(model), probe, **how), out).provenance["edits"][0]
    return report


def chosen_by_brute_force(tensors: dict[str, Tensor], v: Tensor, count: int) -> list[tuple[int, int]]:
    """The paper's: of the rows of all layers, those with the most negative cosine."""
    rows = torch.cat([tensors[GATE.format(layer)].double() for layer in range(LAYERS)])
    top = torch.topk(-cosine_similarity(rows, v.double()[None], dim=1), count).indices.tolist()
    return sorted(divmod(place, NEURONS) for place in top)


def chosen_in(patch: Path) -> list[tuple[int, int]]:
    """(layer, row) of what a patch changes."""
    opened = open_patch(patch)
    layers = {GATE.format(layer): layer for layer in range(LAYERS)}
    return sorted((layers[name], row) for name in opened.names for row in opened.change(name).numbers.tolist())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """To the bit."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)) for name, tensor in left.items()
    )


def mlps(gates: dict[int, Tensor]) -> dict[str, Tensor]:
    """A whole MLP for each layer, all of the same numbers."""
    return {
        GATE.format(layer).replace("gate", name): gate.T.contiguous() if name == "down" else gate.clone()
        for layer, gate in gates.items()
        for name in ("gate", "up", "down")
    }


# -- the golden selection: two layers of two-dimensional rows ---------------------------------------------------

ROWS = [
    [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]],
    [[-2.0, 0.1], [3.0, 0.0], [-0.1, -3.0], [0.0, -1.0]],
]


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Path, Path]:
    tensors = mlps({layer: torch.tensor(rows) for layer, rows in enumerate(ROWS)})
    model = write_model(tmp_path / "golden", tensors, config=CONFIG | {"hidden_size": 2, "num_hidden_layers": 2})
    return model, write_probe(tmp_path / "v.safetensors", torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))


def test_golden_cosines(golden: tuple[Path, Path]) -> None:
    report = dry_run(plan_edit(str(golden[0]), golden[1], rows="2"))

    assert (report["of"], report["rows"], report["by_layer"]) == (8, 2, {"0": 1, "1": 1})
    assert (report["cosine"]["least"], report["cosine"]["most"]) == (-1, pytest.approx(-0.99875, abs=1e-5))
    assert report["z"] == pytest.approx(-0.99875 * 2**0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("0", []), ("2", [(0, 1), (1, 0)]), ("25%", [(0, 1), (1, 0)]), ("3", [(0, 1), (0, 3), (1, 0)])],
)
def test_golden_edit(rows: str, expected: list[tuple[int, int]], golden: tuple[Path, Path], tmp_path: Path) -> None:
    edit(*golden, tmp_path / "out", rows=rows, alpha=0.5)
    found, new = read_model(tmp_path / "out"), {(0, 1): [0.0, 0.0], (1, 0): [-1.0, 0.1], (0, 3): [0.4, -0.8]}

    assert chosen_in(tmp_path / "out" / PATCH) == expected
    for layer, whole in enumerate(ROWS):
        for row, before in enumerate(whole):
            after = new[layer, row] if (layer, row) in expected else before
            torch.testing.assert_close(torch.tensor(after), found[GATE.format(layer)][row], rtol=0, atol=1e-7)


# -- any model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 4])
def test_selection_and_edit_by_brute_force(dtype: torch.dtype, shards: int, probe: Path, tmp_path: Path) -> None:
    tensors = gated(dtype)
    turned = dict(reversed(tensors.items()))  # the files' order does not count
    model = write_model(tmp_path / "model", turned, shards=shards, config=CONFIG)
    v = load_file(probe)["weight"][1]
    report = edit(model, probe, tmp_path / "out", rows="4.65%", alpha=1.08)
    expected = chosen_by_brute_force(tensors, v, round(0.0465 * LAYERS * NEURONS))

    assert (report["rows"], report["alpha"]) == (22, pytest.approx(1.08))
    assert chosen_in(tmp_path / "out" / PATCH) == expected
    for layer, row in expected:
        tensor = tensors[GATE.format(layer)]
        tensor[row] = (tensor[row].float() + torch.tensor(1.08) * v).to(dtype)
    assert same(tensors, read_model(tmp_path / "out"))


def test_equal_cosines_are_taken_in_order(tmp_path: Path) -> None:
    rows = torch.tensor([[-1.0, 0.5]]) * torch.tensor([1.0, 3.0, 0.7, 5.0, 1.3])[:, None]  # one direction, five lengths
    model = write_model(tmp_path / "model", mlps(dict.fromkeys((10, 9, 2), rows)), config=CONFIG | {"hidden_size": 2})
    edit(model, write_probe(tmp_path / "p.safetensors", torch.tensor([[0.0, 0], [1, 0.3]])), tmp_path / "out", rows="7")

    assert chosen_in(tmp_path / "out" / PATCH) == [(2, row) for row in range(5)] + [(9, 0), (9, 1)]


def test_only_the_effect_depends_on_the_directions_length(model: Path, probe: Path, tmp_path: Path) -> None:
    doubled = write_probe(tmp_path / "2.safetensors", load_file(probe)["weight"] * 2)
    edit(model, probe, tmp_path / "one", alpha=2.0)
    edit(model, doubled, tmp_path / "two", alpha=1.0)

    assert same(read_model(tmp_path / "one"), read_model(tmp_path / "two"))


def test_directions(model: Path, tmp_path: Path) -> None:
    w = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    symmetric = write_probe(tmp_path / "s.safetensors", torch.stack([-w, w]))
    turned = write_probe(tmp_path / "x.safetensors", torch.stack([w, -w]))  # the classes the other way round
    edits = {
        "row1": (symmetric, {"alpha": 2.0}),
        "diff": (symmetric, {"direction": "diff", "alpha": 1.0}),  # W1 - W0 = 2 W1
        "unit-diff": (symmetric, {"direction": "unit-diff", "alpha": 2 * float(w.norm())}),
        "mean-diff": (symmetric, {"direction": "mean-diff", "alpha": 1 / 3}),  # written as 3 (W1 - W0)
        "turned": (turned, {"alpha": 2.0}),
    }
    for name, (file, how) in edits.items():
        edit(model, file, tmp_path / name, **how)
    rows = {name: chosen_in(tmp_path / name / PATCH) for name in edits}
    row1 = read_model(tmp_path / "row1")

    assert same(row1, read_model(tmp_path / "diff"))
    assert rows["row1"] == rows["unit-diff"] == rows["mean-diff"] and not set(rows["row1"]) & set(rows["turned"])
    for name in ("unit-diff", "mean-diff"):
        for key, tensor in read_model(tmp_path / name).items():
            torch.testing.assert_close(tensor.float(), row1[key].float(), rtol=1 / 128, atol=1e-3)


def test_the_mirror(model: Path, probe: Path, tmp_path: Path) -> None:
    """-alpha, and op: subtract, change the same rows by as much the other way."""
    forth = edit(model, probe, tmp_path / "forth", alpha=1.5)
    back = edit(model, probe, tmp_path / "back", alpha=-1.5)
    edit(model, probe, tmp_path / "taken", alpha=1.5, op="subtract")
    one, two = (open_patch(tmp_path / name / PATCH) for name in ("forth", "back"))

    assert forth["rows"] == back["rows"] and forth["alpha"] == -back["alpha"] == 1.5
    assert same(read_model(tmp_path / "back"), read_model(tmp_path / "taken"))
    for name in one.names:
        assert torch.equal(one.change(name).amounts, -two.change(name).amounts)
        assert torch.equal(one.change(name).numbers, two.change(name).numbers)


def test_the_other_selections(model: Path, probe: Path, tmp_path: Path) -> None:
    v, tensors = load_file(probe)["weight"][1], read_model(model)
    edit(model, probe, tmp_path / "max", rows="30", select="max-cos")
    drawn = [edit(model, probe, tmp_path / f"{i}", rows="30", select="random", seed=i // 2) for i in range(3)]
    picks = [chosen_in(tmp_path / f"{i}" / PATCH) for i in range(3)]

    assert chosen_in(tmp_path / "max" / PATCH) == chosen_by_brute_force(tensors, -v, 30)
    assert picks[0] == picks[1] != picks[2] and {one["rows"] for one in drawn} == {30}
    assert not any("noise" in line for one in drawn for line in one["warnings"])  # it is meant to be


@pytest.mark.parametrize("how", [{}, {"step": 1.5}, {"step": -0.2, "op": "subtract"}], ids=str)
def test_a_step_is_a_length_in_median_norms(how: dict[str, Any], model: Path, probe: Path, tmp_path: Path) -> None:
    """Whatever length the probe's direction got in training; 0.75 unless another is asked for."""
    tensors, wanted = read_model(model), abs(how.get("step", 0.75))
    norms = torch.cat([tensors[GATE.format(layer)].float().norm(dim=1) for layer in range(LAYERS)])
    doubled = write_probe(tmp_path / "2.safetensors", load_file(probe)["weight"] * 128)
    for name, file in (("one", probe), ("two", doubled)):
        report = edit(model, file, tmp_path / name, **how)
        direction = load_file(file)["weight"][1]
        assert report["relative_step"] == pytest.approx(wanted)
        assert report["alpha"] * direction.norm() == pytest.approx(wanted * norms.median())
    assert same(read_model(tmp_path / "one"), read_model(tmp_path / "two"))


def test_step_and_alpha_are_one_thing(model: Path, probe: Path, cli: Cli) -> None:
    code, out, err = cli("edit", "--model", model, "--probe", probe, "--step", 1, "--alpha", 1, "--dry-run")
    assert (code, out) == (2, "") and err.startswith("error: step: alpha is given too\nhint: name one of them")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (0.09, "hardly changes the edited rows"),
        (-0.09, "hardly changes the edited rows"),
        (0.1, None),
        (4, None),
        (4.01, "leaves little of the edited rows"),
        (-120, "leaves little of the edited rows"),
    ],
)
def test_a_step_that_destroys_or_does_nothing(
    step: float, said: str | None, model: Path, probe: Path, tmp_path: Path, cli: Cli
) -> None:
    """It is said before the edit and after it, on the terminal, in JSON and beside the model."""
    command = ("edit", "--model", model, "--probe", probe, "--rows", "5", "--step", step)
    planned = cli(*command, "--dry-run", "--json")
    done = cli(*command, "--out", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "mergebench.json").read_text())["edits"][0]
    expected = f"a step of {step:.3g} median row norms {said}: 0.1 to 4 is where an edit can work"
    for warnings in (json.loads(planned.out)["warnings"], made["warnings"]):
        assert (expected in warnings) == any("median row norms" in line for line in warnings) == (said is not None)
    assert (said is not None) == (f"warning: {expected}" in done.err)


def test_the_report_is_what_brute_force_counts(model: Path, probe: Path) -> None:
    report = dry_run(plan_edit(str(model), probe, rows="10%"))
    tensors, v = read_model(model), load_file(probe)["weight"][1]
    rows = torch.cat([tensors[GATE.format(layer)].float() for layer in range(LAYERS)])
    cosines = cosine_similarity(rows, v[None], dim=1).sort().values
    expected = chosen_by_brute_force(tensors, v, 48)

    assert report["by_layer"] == {str(i): sum(layer == i for layer, _ in expected) for i in range(LAYERS)}
    assert report["share"] == 48 * WIDTH / sum(tensor.numel() for tensor in tensors.values())
    assert report["cosine"]["candidates"]["50"] == pytest.approx(float(cosines[240]), abs=1e-5)
    assert report["cosine"]["most"] == pytest.approx(float(cosines[47]), abs=1e-6)
    assert report["z"] == pytest.approx(float(cosines[47]) * WIDTH**0.5, abs=1e-5)
    assert report["relative_step"] == pytest.approx(0.75)
    assert any("noise" in line for line in report["warnings"])  # in 16 dimensions no |z| is large


def test_layers(model: Path, probe: Path, tmp_path: Path) -> None:
    edit(model, probe, tmp_path / "out", rows="20", layers="2-4")

    assert {layer for layer, _ in chosen_in(tmp_path / "out" / PATCH)} == {2, 3, 4}


def test_nothing_to_do_gives_the_same_model(model: Path, probe: Path, tmp_path: Path) -> None:
    for name, how in (("none", {"rows": "0"}), ("still", {"alpha": 0.0})):
        edit(model, probe, tmp_path / name, **how)

        assert same(read_model(model), read_model(tmp_path / name))


# -- patches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_put_in_and_taken_out_bit_for_bit(dtype: torch.dtype, probe: Path, tmp_path: Path) -> None:
    tensors = gated(dtype)
    tensors[GATE.format(3)] *= -0.0  # zeros of both signs
    model = write_model(tmp_path / "model", tensors, shards=2, config=CONFIG)
    edit(model, probe, tmp_path / "edited", rows="200", alpha=0.3)
    patch = tmp_path / "edited" / PATCH
    mergebench.run(plan_patch(str(tmp_path / "edited"), patch, revert=True), tmp_path / "back")
    mergebench.run(plan_patch(str(model), patch), tmp_path / "again")

    assert not same(tensors, read_model(tmp_path / "edited"))
    assert same(tensors, read_model(tmp_path / "back"))
    assert same(read_model(tmp_path / "edited"), read_model(tmp_path / "again"))


def test_a_patch_goes_into_its_own_model_only(model: Path, probe: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", gated(torch.bfloat16, seed=1), config=CONFIG)
    edit(model, probe, tmp_path / "edited")
    for where, revert, said in (
        (tmp_path / "edited", False, "is already edited with this patch"),
        (model, True, "does not have this edit"),
        (other, False, "has other rows than the model it was made on"),
        (other, True, "has other rows than the model it was made on"),
    ):
        with pytest.raises(mergebench.MergebenchError, match=said) as caught:
            plan_patch(str(where), tmp_path / "edited" / PATCH, revert=revert)

        assert caught.value.exit_code == 3


# -- recipes ----------------------------------------------------------------------------------------------------


def test_edits_after_a_merge_one_on_the_other(model: Path, probe: Path, tmp_path: Path) -> None:
    """Merging and editing twice in one run is merging, then editing the result, then editing that."""
    other = write_model(tmp_path / "other", gated(torch.bfloat16, seed=1), config=CONFIG)
    weight = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9))
    second = write_probe(tmp_path / "second.safetensors", weight)
    steps = [
        {"edit": "surgery", "probe": str(probe), "rows": "20%", "alpha": 2.0},
        {"edit": "surgery", "probe": str(second), "rows": 100, "alpha": -1.0, "select": "max-cos"},
    ]
    recipe = {"merge_method": "linear", "models": [{"model": str(model)}, {"model": str(other)}]}
    for name, edits in (("merged", []), ("both", steps)):
        mergebench.run(mergebench.plan(mergebench.load({**recipe, "edits": edits})), tmp_path / name)
    edit(tmp_path / "merged", probe, tmp_path / "once", rows="20%", alpha=2.0)
    edit(tmp_path / "once", second, tmp_path / "twice", rows="100", alpha=-1.0, select="max-cos")
    made = json.loads((tmp_path / "both" / "mergebench.json").read_text())["edits"]
    rows = [chosen_in(tmp_path / "both" / f"patch-{number}.safetensors") for number in (1, 2)]

    assert same(read_model(tmp_path / "both"), read_model(tmp_path / "twice"))
    assert [one["patch"] for one in made] == ["patch-1.safetensors", "patch-2.safetensors"]
    assert rows == [chosen_in(tmp_path / name / PATCH) for name in ("once", "twice")] and set(rows[0]) & set(rows[1])

    place = tmp_path / "both"
    for number in (2, 1):
        mergebench.run(
            plan_patch(str(place), tmp_path / f"both/patch-{number}.safetensors", revert=True), tmp_path / f"{number}"
        )
        place = tmp_path / f"{number}"
    assert same(read_model(tmp_path / "merged"), read_model(place))


def test_a_recipe_says_what_it_edits(model: Path, probe: Path, tmp_path: Path, cli: Cli) -> None:
    step = {"edit": "surgery", "probe": probe.name, "rows": 24}
    recipe = write_recipe(tmp_path / "recipe.yaml", "passthrough", [model], edits=[step])
    loaded = mergebench.load(recipe)
    planned, ran = cli("plan", recipe), cli("merge", recipe, "--out", tmp_path / "out")

    assert mergebench.load(loaded.to_dict()) == loaded
    assert f"edit      surgery of 480 rows of gate_proj, by {probe}" in planned.out
    assert ran.code == 0 and "surgery: 24 of 480 rows of gate_proj" in ran.err
    assert "mergebench patch revert" in ran.err
