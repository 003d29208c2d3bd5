"""A fine-tune packed into d numbers: least squares by matrices, and changes made in the subspace, are the oracles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergebench
from mergebench.adapters.intrinsic_dimension import captured, pack
from mergebench.deltas.formats.native import read_file
from mergebench.deltas.open import open_model
from mergebench.deltas.subspace import Subspace, prepared, subspace
from mergebench.errors import ModelError, RecipeError
from tests.conftest import Cli
from tests.models import fine_tuned, read_model, write_model

SHAPES = {"a.weight": (40, 50), "b.weight": (33, 30), "b.bias": (33,), "norm.weight": (5,)}


def base_tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()} | {"steps": torch.arange(3)}


def projected(theta: Tensor, name: str, seed: int = 0) -> Tensor:
    p = prepared(Subspace(theta, name, seed), SHAPES[name])
    return subspace(p, slice(None), None).view(SHAPES[name])


def stacked(d: int, seed: int = 0) -> Tensor:
    """P of all tensors [D, d], float64."""
    return torch.stack(
        [torch.cat([projected(one, name, seed).reshape(-1) for name in SHAPES]) for one in torch.eye(d).double()]
    ).T


@pytest.fixture
def random_change(tmp_path: Path) -> tuple[str, str]:
    base = base_tensors()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", fine_tuned(base, 1))
    return str(tmp_path / "base"), str(tmp_path / "tuned")


def difference(base: str, tuned: str) -> Tensor:
    one, other = read_model(Path(base)), read_model(Path(tuned))
    return torch.cat([(other[name].double() - one[name].double()).reshape(-1) for name in SHAPES])


@pytest.mark.parametrize("said", [False, True])
def test_a_change_made_in_the_subspace_is_found_again(tmp_path: Path, said: bool) -> None:
    base, theta = base_tensors(), torch.randn(60, generator=torch.Generator().manual_seed(5))
    lambdas = dict(zip(SHAPES, (1.0, 0.5, -2.0, 0.1) if said else (1.0,) * 4, strict=True))
    tuned = {name: base[name] + lambdas[name] * projected(theta, name, 7) for name in SHAPES}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned | {"steps": base["steps"]})
    file = tmp_path / "packed.safetensors"
    packed = pack(
        str(tmp_path / "base"), str(tmp_path / "tuned"), file, dimension=64 if said else 60, seed=7, said=said
    )
    assert packed.provenance["energy_kept"] == pytest.approx(1, abs=1e-3 if said else 1e-6)
    found, again = load_file(file)["theta"], open_model(f"{tmp_path / 'base'}+{file}").state_dict()
    assert found.shape == theta.shape and found.dtype == torch.float32
    if not said:  # else theta times any number will do
        assert float((found - theta).norm() / theta.norm()) < 1e-5
    for name in SHAPES:
        missed = (again[name] - tuned[name]).norm() / (tuned[name] - base[name]).norm()
        assert float(missed) < (0.3 if said else 1e-5), name  # SAID's rounds end before the last digit


def test_the_fit_is_that_of_least_squares(random_change: tuple[str, str], tmp_path: Path) -> None:
    change, full = difference(*random_change), stacked(90)
    file = tmp_path / "packed.safetensors"
    packed = pack(*random_change, file, dimension=90)
    expected = torch.linalg.lstsq(full, change[:, None]).solution[:, 0]
    assert torch.allclose(load_file(file)["theta"].double(), expected, atol=1e-5)
    kept = float((full @ expected).square().sum() / change.square().sum())
    assert packed.provenance["energy_kept"] == pytest.approx(kept, rel=1e-5)
    again = difference(random_change[0], random_change[1])
    model = open_model(f"{random_change[0]}+{file}").state_dict()
    base = read_model(Path(random_change[0]))
    left = again - torch.cat([(model[name].double() - base[name].double()).reshape(-1) for name in SHAPES])
    assert float(left.square().sum() / again.square().sum()) == pytest.approx(1 - kept, rel=1e-4)


def test_of_a_random_change_d_of_all_dimensions_are_kept(random_change: tuple[str, str]) -> None:
    curve = captured(*random_change, [20, 100, 1000])
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for one in curve:
        assert one.expected == one.dimension / elements
        deviation = (2 * one.expected * (1 - one.expected) / elements) ** 0.5
        assert abs(one.energy - one.expected) < 4 * deviation
    assert curve == sorted(curve, key=lambda one: one.energy)


def test_said_keeps_no_less(random_change: tuple[str, str]) -> None:
    # d = 104 in SAID are 100 numbers and 4 lambdas
    (did,), (said,) = captured(*random_change, [100]), captured(*random_change, [104], said=True)
    assert said.energy > did.energy


def test_the_curve_is_what_is_packed(random_change: tuple[str, str], tmp_path: Path) -> None:
    for said in (False, True):
        few, many = captured(*random_change, [30, 80], seed=3, said=said)
        for one in (few, many):
            file = tmp_path / f"{one.dimension}{said}.safetensors"
            packed = pack(*random_change, file, dimension=one.dimension, seed=3, said=said)
            assert packed.provenance["energy_kept"] == pytest.approx(one.energy, rel=1e-4)
            read = read_file(file)
            numbers = load_file(file)["theta"].numel() + (len(read.entries) if said else 0)
            assert numbers == one.dimension and read.made["dimension"] == one.dimension


def test_a_folded_file_is_the_model(random_change: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    pack(*random_change, file, dimension=50)
    recipe = mergebench.load({"merge_method": "passthrough", "models": [{"model": f"{random_change[0]}+{file}"}]})
    mergebench.run(mergebench.plan(recipe), tmp_path / "folded")
    expected = open_model(f"{random_change[0]}+{file}").state_dict()
    folded, base, theta = read_model(tmp_path / "folded"), read_model(Path(random_change[0])), load_file(file)["theta"]
    for name in SHAPES:
        assert torch.equal(folded[name], expected[name])
        assert torch.equal(folded[name], base[name] + projected(theta, name))
    assert torch.equal(folded["steps"], base["steps"])


def test_only_what_changes_has_a_delta(tmp_path: Path) -> None:
    base = base_tensors()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", base | {"a.weight": base["a.weight"] + 0.1})
    file = tmp_path / "packed.safetensors"
    packed = pack(str(tmp_path / "base"), str(tmp_path / "tuned"), file, dimension=10)
    assert list(read_file(file).entries) == ["a.weight"] and packed.provenance["elements"] == 2000
    with pytest.raises(ModelError, match="nothing to pack"):
        pack(str(tmp_path / "base"), str(tmp_path / "base"), tmp_path / "none.safetensors", dimension=10)


def test_a_tied_tensor_stored_twice_changes_twice(tmp_path: Path) -> None:
    tied = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    config = {"model_type": "llama", "tie_word_embeddings": True}
    write_model(tmp_path / "base", {name: tied.clone() for name in names}, config=config)
    write_model(tmp_path / "tuned", dict.fromkeys(names, tied + 0.1), config=config)
    file = tmp_path / "packed.safetensors"
    packed = pack(str(tmp_path / "base"), str(tmp_path / "tuned"), file, dimension=10)
    model = open_model(f"{tmp_path / 'base'}+{file}").state_dict()
    assert torch.equal(model[names[0]], model[names[1]]) and not torch.equal(model[names[0]], tied)
    assert packed.provenance["elements"] == 88


def test_refused(random_change: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    with pytest.raises(RecipeError, match="one dimension at least"):
        pack(*random_change, file, dimension=0)
    with pytest.raises(RecipeError, match="exact or fairseq"):
        pack(*random_change, file, dimension=5, gradient="right")
    with pytest.raises(RecipeError, match="SAID has a lambda for each"):
        pack(*random_change, file, dimension=4, said=True)
    with pytest.raises(RecipeError, match="a file of deltas ends in"):
        pack(*random_change, tmp_path / "packed", dimension=5)
    with pytest.raises(RecipeError, match="lies in an input"):
        pack(*random_change, Path(random_change[0]) / "packed.safetensors", dimension=5)
    assert not file.exists()
    pack(*random_change, file, dimension=5)
    with pytest.raises(RecipeError, match="it exists"):
        pack(*random_change, file, dimension=5)
    pack(*random_change, file, dimension=6, overwrite=True)
    assert load_file(file)["theta"].numel() == 6


def test_a_base_of_another_model_is_remarked(random_change: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    pack(*random_change, file, dimension=5)
    assert not open_model(f"{random_change[0]}+{file}").remarks
    assert "made on another model" in open_model(f"{random_change[1]}+{file}").remarks[0]


def test_from_the_command_line(random_change: tuple[str, str], tmp_path: Path, cli: Cli) -> None:
    base, tuned = random_change
    extract = ("adapters", "extract", "--base", base, "--model", tuned, "--as", "subspace")
    out = tmp_path / "packed.safetensors"
    code, told, err = cli(*extract, "--dimension", "50", "--seed", "3", "--out", out)
    assert (code, told) == (0, f"{out}\n") and "4 tensors in 50 numbers" in err
    assert read_file(out).made["energy_kept"] == captured(base, tuned, [50], seed=3)[0].energy
    (row,) = json.loads(cli(*extract, "--dimension", "50", "--seed", "3", "--dry-run", "--json").out)["kinds"]
    assert row["kept"] == pytest.approx(read_file(out).made["energy_kept"]) and row["nbytes"] == 200
    table = cli(*extract[:-1], "all", "--dry-run", "--budget", "400").out
    assert "subspace of 100" in table and "lora rank 1" in table
    for wrong in (["--rank", "2"], ["--resume"], ["--include", "a*"], ["--mask", "random"]):
        refused = cli(*extract, "--out", out, "--overwrite", *wrong)
        assert refused.code == 2 and "'subspace' takes none" in refused.err, wrong
    assert cli(*extract, "--out", tmp_path / "packed").code == 2
