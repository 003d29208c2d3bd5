"""PaFi's masks (arXiv:2305.16742): the golden positions, exact counts, and tasks that share one mask file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, names, read_model, tiny_tensors, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.adapters import extract_adapter
from mergebench.adapters.smallest import Ranking, magnitude_keys, smallest
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, ModelError
from mergebench.systems.pafi import make_mask, overlap
from tests.conftest import Cli

THETA = torch.tensor([0.5, -0.1, 0.02, -0.03, 0.3, 0.02])
GOLDEN = {0.5: [2, 3, 5], 1 / 6: [2]}  # of equal magnitudes the lower position


def chosen(scores: Tensor, count: int) -> list[int]:
    """By a sort of (score, position)."""
    return sorted(sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))[:count])


@pytest.mark.parametrize("share", GOLDEN)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_golden(tmp_path: Path, share: float, scope: str) -> None:
    base = write_model(tmp_path / "base", {"theta": THETA})
    made = make_mask(str(base), tmp_path / "m.safetensors", share=share, scope=scope)
    mask = load_file(tmp_path / "m.safetensors")
    assert mask["theta"].tolist() == GOLDEN[share] and mask["theta"].dtype == torch.int32
    assert (made.chosen, made.numel) == (len(GOLDEN[share]), 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.37, 1])
def test_one_ranking(tmp_path: Path, share: float, dtype: torch.dtype) -> None:
    """A sort of the whole model, with many equal magnitudes, tensors of several tiles, and a tensor of integers."""
    random = torch.Generator().manual_seed(0)
    tensors = tiny_tensors(dtype=dtype) | {"wide.weight": torch.randn(300, 500, generator=random).to(dtype)}
    base = write_model(tmp_path / "base", tensors)
    order = [name for name in open_model(str(base)).tensors if tensors[name].is_floating_point()]
    seen: list[tuple[int, int]] = []
    made = make_mask(str(base), tmp_path / "m.safetensors", share=share, progress=lambda *told: seen.append(told))
    assert seen == sorted(seen) and len(seen) > 3 * len(order) and {total for _, total in seen} == {4 * made.numel}
    left_out = made.numel - sum(tensors[name].numel() for name in made.counts)
    assert seen[-1][0] == 4 * made.numel - left_out  # whose positions are not asked for
    mask = load_file(tmp_path / "m.safetensors")
    flat = torch.cat([tensors[name].flatten() for name in order]).float().abs()
    found, start = [], 0
    for name in order:
        found += [start + int(i) for i in mask.get(name, ())]
        start += tensors[name].numel()
    _, expected = torch.sort(flat, stable=True)
    assert found == expected[: round(share * len(flat))].sort().values.tolist()


def test_one_in_each_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    base = write_model(tmp_path / "base", tensors)
    make_mask(str(base), tmp_path / "m.safetensors", share=0.2, scope="tensor", include=["layers.*", "norm.*"])
    mask = load_file(tmp_path / "m.safetensors")
    assert mask.keys() == {name for name in tensors if name.startswith(("layers", "norm"))}
    for name, positions in mask.items():
        flat = tensors[name].flatten()
        assert positions.tolist() == chosen(flat.abs(), round(0.2 * len(flat))), name


def test_fisher(tmp_path: Path, cli: Cli) -> None:
    """The same with the values of a file in the place of the magnitudes."""
    tensors = tiny_tensors()
    base = write_model(tmp_path / "base", tensors)
    values = {name: torch.rand_like(value) for name, value in tensors.items() if value.is_floating_point()}
    save_file(values, tmp_path / "fisher.safetensors")
    how = ["--from", tmp_path / "fisher.safetensors", "--smallest", "25%", "--out", tmp_path / "m.safetensors"]
    ran = cli("mask", "fisher", base, *how, "--json")
    assert (ran.code, ran.err) == (0, "") and json.loads(ran.out)["chosen"] == round(0.25 * 235)
    other = write_model(tmp_path / "other", {**values, "steps": tensors["steps"]})
    make_mask(str(other), tmp_path / "n.safetensors", share=0.25)
    one, two = (load_file(tmp_path / name) for name in ("m.safetensors", "n.safetensors"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_ties_over_pieces_and_tensors() -> None:
    """All keys are equal: the first ones, across the pieces of a tensor and across tensors."""
    values = {"a": torch.ones(7), "b": -torch.ones(5)}
    ranking = Ranking(values, lambda name: (magnitude_keys(piece) for piece in values[name].split(3)), 9)
    assert ranking.counts == {"a": 7, "b": 2}
    assert ranking.positions("a").tolist() == list(range(7)) and ranking.positions("b").tolist() == [0, 1]
    assert smallest(magnitude_keys(values["a"]), 4).tolist() == [0, 1, 2, 3]
    assert smallest(magnitude_keys(torch.tensor([1.0, -3, 2, 3]), largest=True), 1).tolist() == [1]
    with pytest.raises(ValueError, match="13 of 12"):
        Ranking(values, lambda name: iter([magnitude_keys(values[name])]), 13)


# -- many tasks, one mask -------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """base, two fine-tunes, pafi/mask.safetensors and the two tasks' values beside it."""
    tensors = tiny_tensors()
    base = write_model(tmp_path / "base", tensors)
    make_mask(str(base), tmp_path / "pafi" / "mask.safetensors", share=0.3)
    for seed, name in enumerate(("one", "two"), 1):
        write_model(tmp_path / name, fine_tuned(tensors, seed))
        mask = str(tmp_path / "pafi" / "mask.safetensors")
        extract_adapter(str(base), str(tmp_path / name), tmp_path / "pafi" / name, as_="sparse", mask=mask)
    return tmp_path


def test_only_the_mask_is_changed(tasks: Path) -> None:
    base, tuned, mask = (
        load_file(tasks / place)
        for place in ("base/model.safetensors", "one/model.safetensors", "pafi/mask.safetensors")
    )
    model = open_model(f"{tasks / 'base'}+{tasks / 'pafi/one/values.safetensors'}")
    assert not model.remarks
    folded = model.state_dict()
    for name, value in base.items():
        outside = torch.ones(value.numel(), dtype=torch.bool)
        outside[mask.get(name, torch.empty(0)).long()] = False
        assert torch.equal(folded[name].flatten()[outside], value.flatten()[outside]), name
        torch.testing.assert_close(folded[name].flatten()[~outside], tuned[name].flatten()[~outside])
    values = load_file(tasks / "pafi/one/values.safetensors")
    assert {name: len(value) for name, value in values.items()} == {name: len(value) for name, value in mask.items()}
    assert names(tasks / "pafi/one") == ["README.md", "mergebench.json", "values.safetensors"]


def merged(out: Path, base: Path, models: list[str]) -> dict[str, Tensor]:
    how = {"merge_method": "ties", "base_model": str(base), "parameters": {"density": 0.1, "weight": 0.7}}
    recipe = {**how, "models": [{"model": model} for model in models]}
    return read_model(mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), out).out)


def test_ties_over_a_shared_mask(tasks: Path) -> None:
    """The task vectors have the same coordinates, and TIES of the files is TIES of the dense models."""
    base = tasks / "base"
    references = [f"{base}+{tasks / 'pafi' / name / 'values.safetensors'}" for name in ("one", "two")]
    plain = read_model(base)
    moved = []
    for number, reference in enumerate(references):
        folded = open_model(reference).state_dict()
        moved.append({name: (folded[name] != plain[name]) for name in plain})
        write_model(tasks / f"dense{number}", folded)
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in plain)
    sparse = merged(tasks / "sparse", base, references)
    dense = merged(tasks / "dense", base, [str(tasks / f"dense{number}") for number in (0, 1)])
    for name in plain:
        torch.testing.assert_close(sparse[name], dense[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(sparse[name], plain[name]) for name in plain)


def test_the_mask_is_needed(tasks: Path, cli: Cli) -> None:
    """Beside the values or above; missing or another one is one clear error."""
    reference = f"{tasks / 'base'}+{tasks / 'pafi/one/values.safetensors'}"
    expected = open_model(reference).state_dict()
    mask = tasks / "pafi/mask.safetensors"
    shutil.move(mask, tasks / "pafi/one/mask.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in open_model(reference).state_dict().items())
    shutil.move(tasks / "pafi/one/mask.safetensors", tasks / "kept.safetensors")
    ran = cli("inspect", reference)
    assert ran.code == 3 and "its mask mask.safetensors is missing" in ran.err and "in the folder above" in ran.err
    make_mask(str(tasks / "base"), mask, share=0.2)
    ran = cli("inspect", reference)
    assert ran.code == 3 and "is another mask than the one that its values belong to" in ran.err


def test_another_base(tasks: Path) -> None:
    mask, one = tasks / "pafi/mask.safetensors", tasks / "one"
    with pytest.raises(ModelError, match="it was made on another model than"):
        extract_adapter(str(one), str(tasks / "two"), tasks / "pafi/new", as_="sparse", mask=str(mask))
    remarks = open_model(f"{one}+{tasks / 'pafi/two/values.safetensors'}").remarks
    assert remarks and "was made on another model" in remarks[0]


# -- overlap --------------------------------------------------------------------------------------------------


def test_overlap_by_hand(tmp_path: Path, cli: Cli) -> None:
    a = write_model(tmp_path / "a", {"x": torch.tensor([1.0, 2, 3, 4]), "y": torch.tensor([0.1, 9.0])})
    b = write_model(tmp_path / "b", {"x": torch.tensor([1.0, 9, 2, 8]), "y": torch.tensor([9.0, 10])})
    make_mask(str(a), tmp_path / "a.safetensors", share=0.5)  # x 0 1, y 0
    make_mask(str(b), tmp_path / "b.safetensors", share=0.5)  # x 0 2 3
    everything, by_tensor = overlap(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert by_tensor["x"] == (2, 3, 1, 2 * 3 / 4) and by_tensor["x"].jaccard == 1 / 4
    assert by_tensor["y"] == (1, 0, 0, 0.0)
    assert everything == (3, 3, 1, 1.5) and everything.jaccard == 1 / 5
    ran = cli("mask", "overlap", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--json")
    document = json.loads(ran.out)
    assert document["all"]["jaccard"] == 1 and document["tensors"]["y"]["both"] == 1
    ran = cli("mask", "overlap", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert ran.code == 0 and ran.out.splitlines()[-1].split() == ["all", "3", "3", "1", "1.5", "0.2000"]


# -- the command ----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    base, out = write_model(tmp_path / "base", tiny_tensors()), tmp_path / "m.safetensors"
    code, printed, err = cli("mask", "magnitude", base, "--smallest", "10%", "--out", out)
    assert (code, printed) == (0, f"{out}\n") and err.startswith("24 of 235 elements in ")
    ran = cli("mask", "magnitude", base, "--smallest", ".1", "--out", out, "--overwrite", "--json")
    assert (ran.code, ran.err) == (0, "") and json.loads(ran.out)["chosen"] == 24
    save_file({"x": torch.zeros(3)}, tmp_path / "f.safetensors")
    nan = write_model(tmp_path / "nan", tiny_tensors() | {"norm.weight": torch.full((3,), torch.nan)})
    table: list[tuple[list[Any], int, str]] = [
        (["magnitude", base, "--smallest", "10%", "--out", out], 2, "replace it with --overwrite"),
        (["magnitude", base, "--smallest", "0", "--out", tmp_path / "n.safetensors"], 2, "--smallest: must be above 0"),
        (["magnitude", base, "--smallest", ".0001%", "--out", tmp_path / "n.safetensors"], 2, "is less than one"),
        (["magnitude", base, "--smallest", "x", "--out", tmp_path / "n.safetensors"], 2, "'x' is not a share"),
        (["magnitude", base, "--smallest", "1%", "--out", tmp_path / "n"], 2, "a mask is a file"),
        (["magnitude", base, "--smallest", "1%", "--out", base / "model.safetensors"], 2, "it is an input"),
        (["magnitude", base, "--smallest", "1%", "--out", tmp_path / "f.safetensors"], 2, "it exists and is no mask"),
        (["magnitude", base, "--smallest", "1%", "--scope", "layer", "--out", out], 2, "--scope: 'layer'"),
        (
            ["magnitude", base, "--smallest", "1%", "--include", "q*", "--out", tmp_path / "n.safetensors"],
            2,
            "'q*' names no",
        ),
        (["magnitude", nan, "--smallest", "1%", "--out", tmp_path / "n.safetensors"], 3, "norm.weight: it holds NaN"),
        (
            [
                "fisher",
                base,
                "--from",
                tmp_path / "f.safetensors",
                "--smallest",
                "1%",
                "--out",
                tmp_path / "n.safetensors",
            ],
            3,
            "no such tensor",
        ),
        (["overlap", out, tmp_path / "f.safetensors"], 3, "not a mask"),
    ]
    for args, expected, what in table:
        code, printed, err = cli("mask", *args)
        assert (code, printed) == (expected, "") and what in err, (args, err)
        assert not (tmp_path / "n.safetensors").exists()
    tuned = write_model(tmp_path / "tuned", fine_tuned(tiny_tensors(), 1))
    args = ["adapters", "extract", "--base", base, "--model", tuned, "--as", "sparse", "--mask", out]
    ran = cli(*args, "--out", tmp_path / "deep/er/out")
    assert ran.code == 2 and "it must lie beside --out" in ran.err
    ran = cli(*args, "--out", tmp_path / "out", "--share", "1%")
    assert ran.code == 2 and "--share: the mask file says it" in ran.err


def test_damaged_files(tasks: Path) -> None:
    """Whatever is cut off or put in: an error of ours, never a traceback."""
    values, mask = tasks / "pafi/one/values.safetensors", tasks / "pafi/mask.safetensors"
    reference, whole = f"{tasks / 'base'}+{values}", load_file(values)
    from safetensors import safe_open

    with safe_open(values, "pt") as opened:
        metadata = opened.metadata()
    for tensors, about in (
        (whole | {"strange": torch.zeros(2)}, metadata),
        (whole, {"masked": "{"}),
        ({name: value[:-1] for name, value in whole.items()}, metadata),
    ):
        save_file({name: value.clone() for name, value in tensors.items()}, values, metadata=about)
        with pytest.raises(MergebenchError):
            open_model(reference)
    assert mask.exists()
