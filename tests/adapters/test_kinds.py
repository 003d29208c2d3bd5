"""A fine-tune as each kind of adapter: PEFT makes of the directories what we do, and nothing is counted twice."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import fine_tuned, names, read_model, write_model
from peft import PeftModel
from torch import Tensor

from mergebench.adapters import extract_adapter
from mergebench.adapters.kinds import measure_kinds
from mergebench.adapters.targets import hira, sparse
from mergebench.adapters.targets.bias import is_bias
from mergebench.deltas.open import open_model
from mergebench.deltas.svd import truncate
from mergebench.errors import ModelError, RecipeError
from tests.conftest import Cli
from tests.deltas.peft_types import BIASED, CLOSE
from tests.deltas.test_lora import GPT2

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 5


def trained(folder: Path, config: Any, wanted: str = "") -> Path:
    """A base and a fine-tune of the tensors that have `wanted` in their names."""
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.02 * torch.randn_like(value) * (wanted in name))
    model.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("kinds"), BIASED)


def extracted(place: Path, out: Path, **how: Any) -> dict[str, Any]:
    return extract_adapter(str(place / "base"), str(place / "tuned"), out, **how).provenance


def as_peft_merges(place: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT makes of base and directory; any warning but its own of deprecation is an error."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = PeftModel.from_pretrained(base, adapter)
    state = model.merge_and_unload().state_dict()
    return {name: value for name, value in state.items() if name in open_model(str(place / "base")).tensors}


def check_like_peft(place: Path, out: Path) -> dict[str, Tensor]:
    """Our fold, which PEFT's must equal; tensors that are not adapted are the base's to the bit."""
    ours, base = open_model(f"{place / 'base'}+{out}"), read_model(place / "base")
    folded = ours.state_dict()
    for name, value in as_peft_merges(place, out).items():
        if name not in ours.deltas:
            assert torch.equal(folded[name], base[name]), name
        assert float((folded[name] - value).abs().max()) <= CLOSE * float(value.abs().max()), name
    return folded


def squares(place: Path, folded: dict[str, Tensor]) -> tuple[float, float]:
    """|D|^2 - |D - D'|^2 and |D|^2 over all tensors, in float64, from the checkpoints alone."""
    base, tuned = read_model(place / "base"), read_model(place / "tuned")
    total = kept = 0.0
    for name, value in base.items():
        change = tuned[name].double() - value.double()
        total += float(change.square().sum())
        kept += float(change.square().sum() - (folded[name].double() - tuned[name].double()).square().sum())
    return kept, total


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"as_": "lora", "rank": 3},
    "hira": {"as_": "hira", "rank": 3},
    **{mask: {"as_": "sparse", "mask": mask, "share": 0.07} for mask in sparse.MASKS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_it_as_we_do(place: Path, tmp_path: Path, kind: str) -> None:
    made = extracted(place, tmp_path / "out", **KINDS[kind])
    kept, total = squares(place, check_like_peft(place, tmp_path / "out"))
    assert made["energy_of_all"] == pytest.approx(kept / total, rel=1e-4)
    assert len(made["modules"]) == 14 and made["left_out"] > 0
    stored = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert made["bytes"] <= stored <= made["bytes"] + 10_000


def test_the_table_has_what_is_written(place: Path, tmp_path: Path) -> None:
    """The same energies and bytes; a LoRA of as many bytes is a LoRA of that rank."""
    for kind, how in KINDS.items():
        made = extracted(place, tmp_path / kind, **how)
        settings = {key: value for key, value in how.items() if key != "as_"}
        (row,) = measure_kinds(str(place / "base"), str(place / "tuned"), kind=how["as_"], **settings).rows
        assert row.kept == pytest.approx(made["energy_of_all"], rel=1e-9) and row.nbytes == made["bytes"]
        if kind == "lora":
            assert row.lora == pytest.approx(row.kept, rel=1e-6)
        if kind == "hira":
            inside = 1 - made["left_out"]
            assert row.lora == pytest.approx(made["energy_of_lora"] * inside, rel=1e-6)
            assert row.summary["correlation"] == made["correlation"]


def test_between_two_ranks(place: Path) -> None:
    base, tuned = str(place / "base"), str(place / "tuned")
    two, three = (measure_kinds(base, tuned, kind="lora", rank=rank).rows[0] for rank in (2, 3))
    rows = measure_kinds(base, tuned, budget=(two.nbytes + three.nbytes) // 2).rows
    sized = [row for row in rows if row.kind == "sparse"]
    assert len(sized) == 5
    for row in sized:
        assert row.nbytes <= (two.nbytes + three.nbytes) // 2
        part = (row.nbytes - two.nbytes) / (three.nbytes - two.nbytes)
        assert row.lora == pytest.approx((1 - part) * two.kept + part * three.kept, rel=1e-5)
    assert next(row for row in rows if row.kind == "lora").nbytes == two.nbytes


# -- HUT ----------------------------------------------------------------------------------------------------


def test_the_correlation_is_numpys(place: Path, tmp_path: Path) -> None:
    made = extracted(place, tmp_path / "out", as_="hira", rank=2)
    base, tuned = read_model(place / "base"), read_model(place / "tuned")
    parts = []
    for module, entry in made["modules"].items():
        weight = base[f"{module}.weight"]
        pair = torch.stack([(tuned[f"{module}.weight"] - weight).abs().flatten(), weight.abs().flatten()]).double()
        assert entry["correlation"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-9)
        parts.append(pair)
    assert made["correlation"] == pytest.approx(float(torch.corrcoef(torch.cat(parts, 1))[0, 1]), abs=1e-9)


@pytest.mark.parametrize("rows, columns", [(40, 60), (60, 40)])
def test_a_change_that_is_w_times_a_product(rows: int, columns: int) -> None:
    """HUT's fit finds it, where a LoRA of that rank does not; zeros of W stay zero."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=random)
    weight[torch.rand(rows, columns, generator=random) < 0.1] = 0
    product = torch.randn(rows, 3, generator=random) @ torch.randn(3, columns, generator=random)
    difference = weight * product
    found = hira.fit_hadamard(weight, difference, 3)
    made = weight * (found.b @ found.a)
    error = float((made - difference).square().sum() / difference.square().sum())
    assert error < 1e-8 and found.kept == pytest.approx(1, abs=1e-8)
    assert bool((made[weight == 0] == 0).all())
    lora = truncate(difference, 3)
    assert lora.kept < 0.7 * lora.total


def test_no_sweep_loses_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(2)
    weight, difference = torch.randn(30, 50, generator=random), torch.randn(30, 50, generator=random)
    weight[3] = 0  # a row without an equation
    before = 0.0
    for sweeps in (0, 1, 2, 5, 40):
        monkeypatch.setattr(hira, "SWEEPS", sweeps)
        found = hira.fit_hadamard(weight, difference, 4)
        left = float((weight * (found.b @ found.a) - difference).double().square().sum())
        assert found.kept == pytest.approx(1 - left / float(difference.double().square().sum()), abs=1e-6)
        assert found.kept >= found.start and found.kept >= before - 1e-9
        before = found.kept
    assert found.kept > found.start + 0.01


def test_each_half_of_a_sweep_is_least_squares() -> None:
    """Row by row, against a dense solver."""
    random = torch.Generator().manual_seed(3)
    weight, difference = torch.randn(7, 20, generator=random), torch.randn(7, 20, generator=random)
    factor = torch.randn(20, 3, generator=random).double()
    found, kept = hira._solve(weight, difference, factor)
    total = 0.0
    for w, d, x in zip(weight.double(), difference.double(), found, strict=True):
        expected = torch.linalg.lstsq(w[:, None] * factor, d[:, None]).solution.flatten()
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
        total += float(d.square().sum() - (d - w * (factor @ expected)).square().sum())
    assert kept == pytest.approx(total, rel=1e-9)


def test_weights_stored_in_out(tmp_path: Path) -> None:
    """GPT-2's: HiRA fits the same elements, PEFT loads it; no Super-Tuning is possible."""
    trained(tmp_path, GPT2)
    made = extracted(tmp_path, tmp_path / "hira", as_="hira", rank=4)
    kept, total = squares(tmp_path, check_like_peft(tmp_path, tmp_path / "hira"))
    assert made["energy_of_all"] == pytest.approx(kept / total, rel=1e-4)
    with pytest.raises(ModelError, match=r"\[in, out\], where PEFT puts no Super-Tuning"):
        extracted(tmp_path, tmp_path / "out", as_="sparse")
    assert extracted(tmp_path, tmp_path / "model", as_="sparse", scope="model")["count"] > 0
    rows = measure_kinds(str(tmp_path / "base"), str(tmp_path / "tuned")).rows
    assert [row.settings["scope"] for row in rows if row.kind == "sparse"] == ["model"]


# -- single elements -----------------------------------------------------------------------------------------


def chosen(scores: Tensor, count: int) -> list[int]:
    """By a sort of (score, position)."""
    return sorted(sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))[:count])


@pytest.mark.parametrize("mask", ["smallest", "largest", "topdelta"])
def test_the_elements_of_each_matrix(place: Path, tmp_path: Path, mask: str) -> None:
    share = 0.03
    extracted(place, tmp_path / "out", as_="sparse", mask=mask, share=share)
    base, tuned, model = (
        read_model(place / "base"),
        read_model(place / "tuned"),
        open_model(f"{place / 'base'}+{tmp_path / 'out'}"),
    )
    assert len(model.deltas) == 14
    folded = model.state_dict()
    for name in model.deltas:
        weight, change = base[name].flatten(), (tuned[name] - base[name]).flatten()
        scores = {"smallest": weight.abs(), "largest": -weight.abs(), "topdelta": -change.abs()}[mask]
        expected = chosen(scores, int(len(weight) * (1 - (1 - share))))
        moved = (folded[name].flatten() != weight).nonzero().flatten().tolist()
        assert moved == expected, name


def test_one_ranking_over_the_model(place: Path, tmp_path: Path) -> None:
    share = 0.013
    made = extracted(place, tmp_path / "out", as_="sparse", scope="model", share=share)
    base, tuned = read_model(place / "base"), read_model(place / "tuned")
    numel = sum(value.numel() for value in base.values())
    assert made["count"] == round(share * numel) and made["file"] == "delta.safetensors"
    assert names(tmp_path / "out") == ["README.md", "delta.safetensors", "mergebench.json"]
    model = open_model(f"{place / 'base'}+{tmp_path / 'out' / 'delta.safetensors'}")
    assert not model.remarks  # it belongs to this base
    folded = model.state_dict()
    changes = torch.cat([(tuned[name] - base[name]).flatten() for name in model.tensors])
    moved = torch.cat([(folded[name] != base[name]).flatten() for name in model.tensors])
    assert moved.nonzero().flatten().tolist() == chosen(-changes.abs(), made["count"])
    kept, total = squares(place, folded)
    assert made["energy_of_all"] == pytest.approx(kept / total, rel=1e-5)


def test_the_count_is_exact_where_little_has_changed(tmp_path: Path) -> None:
    """Only some biases have: the ranking's other elements are zeros, and stored."""
    trained(tmp_path, BIASED, "bias")
    numel = sum(value.numel() for value in read_model(tmp_path / "base").values())
    for mask in ("smallest", "topdelta"):
        made = extracted(tmp_path, tmp_path / mask, as_="sparse", scope="model", mask=mask, share=0.2)
        assert made["count"] == round(0.2 * numel)
        how = {"mask": mask, "scope": "model", "share": 0.2}
        (row,) = measure_kinds(str(tmp_path / "base"), str(tmp_path / "tuned"), kind="sparse", **how).rows
        assert row.nbytes == 8 * made["count"] == made["bytes"]
    assert made["energy_of_all"] == pytest.approx(1)


def test_globs(place: Path, tmp_path: Path) -> None:
    made = extracted(place, tmp_path / "out", as_="sparse", scope="model", share=0.1, include=["*mlp*", "*norm*"])
    base = read_model(place / "base")
    included = sum(value.numel() for name, value in base.items() if "mlp" in name or "norm" in name)
    assert made["count"] == round(0.1 * included)
    assert all("mlp" in name or "norm" in name for name in made["modules"])
    made = extracted(place, tmp_path / "lora", include=["*q_proj*"])
    assert len(made["modules"]) == 2 and all("q_proj" in name for name in made["modules"])


def test_random_elements_depend_on_the_seed_alone(place: Path, tmp_path: Path) -> None:
    how = {"as_": "sparse", "mask": "random", "share": 0.1}
    one, same, other = (extracted(place, tmp_path / str(n), **how, seed=seed) for n, seed in enumerate((0, 0, 1)))
    folded = [open_model(f"{place / 'base'}+{tmp_path / str(n)}").state_dict() for n in range(3)]
    assert all(torch.equal(folded[0][name], folded[1][name]) for name in folded[0])
    assert any(not torch.equal(folded[0][name], folded[2][name]) for name in folded[0])
    assert one["energy_kept"] == same["energy_kept"] != other["energy_kept"]
    assert one["energy_kept"] == pytest.approx(0.1, abs=0.02)  # as a random tenth does


# -- biases --------------------------------------------------------------------------------------------------


def test_biases_of_linear_layers_are_a_beft_directory(tmp_path: Path) -> None:
    trained(tmp_path, BIASED, "bias")
    made = extracted(tmp_path, tmp_path / "out", as_="bias")
    assert made["energy_of_all"] == 1 and made["file"] == "adapter_model.safetensors"
    folded, tuned = check_like_peft(tmp_path, tmp_path / "out"), read_model(tmp_path / "tuned")
    for name, value in tuned.items():
        torch.testing.assert_close(folded[name], value, rtol=1e-6, atol=1e-7)
    assert made["count"] == sum(value.numel() for name, value in tuned.items() if name.endswith("bias"))


def test_biases_of_norms_are_a_delta_file(tmp_path: Path) -> None:
    trained(tmp_path, GPT2)
    made = extracted(tmp_path, tmp_path / "out", as_="bias")
    assert made["file"] == "delta.safetensors"
    model = open_model(f"{tmp_path / 'base'}+{tmp_path / 'out' / 'delta.safetensors'}")
    base, tuned, folded = read_model(tmp_path / "base"), read_model(tmp_path / "tuned"), model.state_dict()
    assert model.deltas.keys() == {name for name in base if name.endswith("bias")}
    for name, value in folded.items():
        torch.testing.assert_close(value, (tuned if name in model.deltas else base)[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(ModelError, match="has the biases of"):
        extract_adapter(str(tmp_path / "base"), str(tmp_path / "base"), tmp_path / "none", as_="bias")


def test_the_biases_of_the_feed_forward_layers_of_roberta() -> None:
    """12 (3072 + 768): HiWi's storage."""
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig())
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    feed = [name for name in shapes if is_bias(name, shapes[name]) and ".LayerNorm." not in name]
    feed = [name for name in feed if ".attention." not in name and "pooler" not in name]
    assert sum(math.prod(shapes[name]) for name in feed) == 46_080
    assert not any(is_bias(name, shape) for name, shape in shapes.items() if name.endswith("LayerNorm.weight"))


# -- the command ---------------------------------------------------------------------------------------------


def test_the_table(cli: Cli, place: Path) -> None:
    command = ["adapters", "extract", "--base", place / "base", "--model", place / "tuned", "--dry-run"]
    code, out, err = cli(*command, "--as", "all")
    assert code == 0 and "|change| and |weight| correlate by" in err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["kind", "bias", "hira", "lora", *["sparse"] * 5, "subspace"]
    code, out, err = cli(*command, "--as", "all", "--budget", "20kB", "--json")
    document = json.loads(out)
    assert (code, err, document["budget"]) == (0, "", 20_000)
    assert all(row["nbytes"] <= 20_000 for row in document["kinds"])
    code, out, err = cli(*command, "--as", "sparse", "--mask", "largest", "--share", "1%", "--quiet")
    assert (code, err) == (0, "") and "sparse largest 0.01 of each matrix" in out


def test_mistakes(cli: Cli, place: Path, tmp_path: Path) -> None:
    table: list[tuple[list[Any], int, str]] = [
        (["--as", "lorra"], 2, "no kind of adapter to extract is called 'lorra'"),
        (["--as", "all"], 2, "--as all: it belongs to --dry-run"),
        (["--as", "all", "--dry-run", "--rank", "3"], 2, "--rank: --as all takes none"),
        (["--budget", "1MB"], 2, "--budget: it belongs to --dry-run"),
        (["--budget", "1MB", "--dry-run"], 2, "--budget: it belongs to --as all"),
        (["--as", "bias", "--rank", "3"], 2, "--rank: 'bias' takes none"),
        (["--as", "hira", "--rank", "0"], 2, "--rank: must be at least 1"),
        (["--as", "hira", "--energy", ".5"], 2, "--energy: 'hira' takes none"),
        (["--as", "sparse", "--mask", "smalest"], 2, "--mask: 'smalest' is no mask and no file"),
        (["--as", "sparse", "--share", "2"], 2, "--share: must be above 0 and below 1, got 2"),
        (["--as", "sparse", "--share", "x"], 2, "--share: 'x' is not a share"),
        (["--as", "sparse", "--include", "q"], 2, "--include: 'q' names no tensor"),
        (["--as", "sparse", "--scope", "layer"], 2, "--scope: 'layer' is not possible"),
    ]
    command = ["adapters", "extract", "--base", place / "base", "--model", place / "tuned"]
    for args, expected, what in table:
        code, out, err = cli(*command, "--out", tmp_path / "out", *args)
        assert (code, out) == (expected, "") and what in err, (args, err)
        assert names(tmp_path) == []
    assert "--out is missing" in cli(*command).err
    with pytest.raises(RecipeError, match="density"):
        extracted(place, tmp_path / "out", density=0.2)


def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.randn(8), "norm.bias": torch.randn(8)}
    write_model(tmp_path / "base", tensors), write_model(tmp_path / "tuned", fine_tuned(tensors, 1))
    rows = measure_kinds(str(tmp_path / "base"), str(tmp_path / "tuned"), budget=32).rows
    assert {row.kind for row in rows if row.nbytes} == {"bias", "sparse", "subspace"}
