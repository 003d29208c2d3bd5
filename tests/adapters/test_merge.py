"""Merged LoRA directories: what PEFT makes of them is what the method makes of the differences."""

from __future__ import annotations

import json
import stat
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import hashes, names
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench import methods
from mergebench.adapters import merge_adapters
from mergebench.adapters.peft_directory import _pattern
from mergebench.deltas.svd import SMALL, compress, truncate
from mergebench.engine.context import Context
from mergebench.engine.span import Span
from mergebench.testing.methods import run_whole
from tests.conftest import Cli

LLAMA = transformers.LlamaConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=24, max_position_embeddings=32,
)  # fmt: skip
BERT = transformers.BertConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
)
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": PROJECTIONS, "use_rslora": True},
    "c": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 7},
    },
}  # fmt: skip
Tensors = dict[str, Tensor]


def train(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.randn_like(value))
            elif "lora_" in name or value.requires_grad:
                value.copy_(0.3 * torch.randn_like(value))


def save(folder: Path, name: str, settings: dict[str, Any], config: Any = LLAMA, seed: int = 1) -> Path:
    """An adapter trained on the base in `folder`."""
    auto = transformers.AutoModel if config is BERT else transformers.AutoModelForCausalLM
    if not (folder / "base").exists():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder / "base")
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(auto.from_pretrained(folder / "base"), LoraConfig(**settings))
        train(model, seed)
        model.save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters on one base: plain, rank-stabilised, and one with patterns, other modules, some layers."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        save(folder, name, settings, seed=seed)
    return folder


def loaded(place: Path, adapter: Path) -> Any:
    """The base with an adapter, by PEFT; a missing or unexpected key is a warning, which is an error here."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return PeftModel.from_pretrained(base, adapter)


def effect(place: Path, adapter: Path) -> Tensors:
    """What an adapter changes, by PEFT: only the modules that it targets."""
    model = loaded(place, adapter)
    deltas = {name: m.get_delta_weight("default").detach() for name, m in model.named_modules() if hasattr(m, "lora_A")}
    before = {name: value.clone() for name, value in model.base_model.model.state_dict().items()}
    after = model.merge_and_unload().state_dict()
    for name, delta in deltas.items():
        module = name.removeprefix("base_model.model.")
        torch.testing.assert_close(after[f"{module}.weight"] - before[f"{module}.base_layer.weight"], delta)
    return {name.removeprefix("base_model.model."): delta for name, delta in deltas.items()}


@cache
def rows(place: Path, adapters: str) -> dict[str, Tensor]:
    """Every module that any adapter changes: [adapters, out, in], zero where it does not."""
    found = [effect(place, place / name) for name in adapters]
    modules = {module: delta for deltas in found for module, delta in deltas.items()}
    return {
        module: torch.stack([deltas.get(module, torch.zeros_like(delta)) for deltas in found])
        for module, delta in modules.items()
    }


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for module, value in expected.items():
        torch.testing.assert_close(found[module], value, rtol=1e-5, atol=1e-5)


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()


# -- sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
@pytest.mark.parametrize("adapters", ["ab", "abc", "ca", "a"])
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (1, -1, 0.3), (-2, 0, 1)])
def test_sums(place: Path, tmp_path: Path, method: str, adapters: str, weights: tuple[float, ...]) -> None:
    weights = weights[: len(adapters)]
    made = merge_adapters([place / a for a in adapters], tmp_path / "out", method=method, weights=weights).provenance
    expected = {m: torch.tensordot(torch.tensor(weights).float(), r, 1) for m, r in rows(place, adapters).items()}
    full = expected
    if method == "svd":
        expected = {module: best(delta, 4) for module, delta in expected.items()}
    else:
        assert made["energy_kept"] == pytest.approx(1)
    assert_equal(effect(place, tmp_path / "out"), expected)
    kept = [sum(float(delta.square().sum()) for delta in deltas.values()) for deltas in (expected, full)]
    assert made["energy_kept"] == pytest.approx(kept[0] / kept[1], rel=1e-4)
    for module, entry in made["modules"].items():
        share = float(expected[module].square().sum() / full[module].square().sum().clamp(min=1e-30))
        assert entry["energy_kept"] == pytest.approx(share, rel=1e-4) or not full[module].any()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -1.0)])
@pytest.mark.parametrize("method, rank", [("cat", None), ("svd", None), ("svd", 3), ("svd", 8)])
def test_as_peft_combines(
    place: Path, tmp_path: Path, method: str, rank: int | None, weights: tuple[float, float]
) -> None:
    model = loaded(place, place / "a")
    model.load_adapter(place / "b", "b")
    with warnings.catch_warnings(action="ignore"):
        model.add_weighted_adapter(["default", "b"], weights, "both", combination_type=method, svd_rank=rank)
    prefix = "base_model.model."
    expected = {
        name.removeprefix(prefix): module.get_delta_weight("both").detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    merge_adapters([place / "a", place / "b"], tmp_path / "out", method=method, weights=weights, rank=rank)
    assert_equal(effect(place, tmp_path / "out"), expected)


def test_linear_is_cut_to_a_rank(place: Path, tmp_path: Path) -> None:
    made = merge_adapters([place / "a", place / "b"], tmp_path / "out", rank=2).provenance
    expected = {module: best(delta.mean(0), 2) for module, delta in rows(place, "ab").items()}
    assert_equal(effect(place, tmp_path / "out"), expected)
    assert {entry["rank"] for entry in made["modules"].values()} == {2}
    assert 0.3 < made["energy_kept"] < 0.95


# -- methods -----------------------------------------------------------------------------------------

DENSE: list[tuple[str, float | None]] = [
    ("ties", 0.3), ("ties", None), ("dare_linear", 0.4), ("dare_ties", 0.4), ("pcb", 0.2), ("pcb", None),
]  # fmt: skip


@pytest.mark.parametrize("rank", [16, 3])
@pytest.mark.parametrize("method, density", DENSE)
def test_methods(place: Path, tmp_path: Path, method: str, density: float | None, rank: int) -> None:
    """By brute force on the differences that PEFT makes, then the best of the rank."""
    weights = (0.7, -1.2, 1.0)
    made = merge_adapters(
        [place / "a", place / "b", place / "c"],
        tmp_path / "out", method=method, weights=weights, density=density, rank=rank, seed=5,
    ).provenance  # fmt: skip
    expected, kept, total = {}, 0.0, 0.0
    for module, deltas in rows(place, "abc").items():
        merged = brute_force(module, deltas, method, weights, density)
        expected[module] = best(merged, rank)
        kept, total = kept + float(expected[module].square().sum()), total + float(merged.square().sum())
    assert_equal(effect(place, tmp_path / "out"), expected)
    assert made["energy_kept"] == pytest.approx(kept / total, rel=1e-4)
    assert made["space"] == "delta" and (rank == 3) == (made["energy_kept"] < 0.999)


def brute_force(module: str, deltas: Tensor, name: str, weights: tuple[float, ...], density: float | None) -> Tensor:
    method = methods.get(name)
    given: dict[str, Any] = {"weight": weights}
    if density is not None:
        given["density"] = (density,) * 3 if method.parameters["density"].per_model else density
    flat = deltas.flatten(1)
    span = Span(f"{module}.weight", 0, flat.shape[1])
    context = Context(flat.shape[1], ("a", "b", "c"), (span,), deltas.shape[1:], "tensor", 5, torch.device("cpu"))
    params = method.params(**given)
    if name == "pcb" or name.startswith("dare"):
        params = method.params(**{"density": (1.0,) * 3} | given if name != "pcb" else given)
    elif density is None:
        params = method.params(**given, density=(1.0,) * 3)
    return run_whole(method, flat, params, context, [flat.shape[1]]).reshape(deltas.shape[1:])


def test_ties_by_hand(tmp_path: Path) -> None:
    """Two rank-one differences: trim half, elect, average what agrees."""
    for name, row in (("one", [4.0, -2.0, 1.0, 0.5]), ("two", [-1.0, -6.0, 3.0, 0.0])):
        write(tmp_path / name, {"layer": (torch.ones(1, 1), torch.tensor([row]))})
    merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out", method="ties", density=0.5)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.layer.lora_{}.weight"
    delta = factors[key.format("B")] @ factors[key.format("A")]
    torch.testing.assert_close(delta, torch.tensor([[4.0, -4.0, 3.0, 0.0]]))


def test_the_default_rank_is_the_sum(place: Path, tmp_path: Path) -> None:
    made = merge_adapters([place / "a", place / "b", place / "c"], tmp_path / "out", method="ties").provenance
    ranks = {module.removeprefix("model.layers."): entry["rank"] for module, entry in made["modules"].items()}
    assert ranks["0.self_attn.q_proj"] == 8 and ranks["1.self_attn.q_proj"] == 11 and ranks["1.self_attn.o_proj"] == 2
    # what PEFT reads back are these ranks
    for name, module in loaded(place, tmp_path / "out").named_modules():
        if hasattr(module, "lora_A"):
            rank = ranks[name.removeprefix("base_model.model.model.layers.")]
            assert (module.r["default"], module.scaling["default"]) == (rank, 1.0)


def test_seeds(place: Path, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        merge_adapters([place / "a", place / "b"], tmp_path / str(number), method="dare_linear", density=0.5, seed=seed)
        files.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


# -- one adapter -------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LLAMA, SETTINGS["a"]),
    "rsLoRA": (LLAMA, SETTINGS["b"]),
    "patterns": (LLAMA, SETTINGS["c"]),
    "DoRA": (LLAMA, {"r": 2, "target_modules": PROJECTIONS, "use_dora": True}),
    "bias of B": (BERT, {"r": 2, "target_modules": ["query"], "lora_bias": True}),
    "biases": (BERT, {"r": 2, "target_modules": ["query"], "bias": "all"}),
    "saved whole": (BERT, {"r": 2, "target_modules": ["query"], "modules_to_save": ["pooler"]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties"])
def test_one_adapter_is_copied(tmp_path: Path, kind: str, method: str) -> None:
    adapter = save(tmp_path, "lora", KINDS[kind][1], KINDS[kind][0])
    before = hashes(adapter)
    made = merge_adapters([adapter], tmp_path / "out", method=method, weights=[1]).provenance
    after = hashes(tmp_path / "out")
    assert made["copied"] and before == hashes(adapter)
    assert {name: after[name] for name in ("adapter_model.safetensors", "adapter_config.json")} == {
        name: before[name] for name in ("adapter_model.safetensors", "adapter_config.json")
    }


@pytest.mark.parametrize("kind", ["DoRA", "bias of B", "biases", "saved whole"])
@pytest.mark.parametrize("count, weight", [(2, 1.0), (1, 0.5)])
def test_what_is_no_low_rank_difference(cli: Cli, tmp_path: Path, kind: str, count: int, weight: float) -> None:
    adapter = save(tmp_path, "lora", KINDS[kind][1], KINDS[kind][0])
    weights = ",".join([str(weight)] * count)
    code, out, err = cli("adapters", "merge", *[adapter] * count, "--weights", weights, "--out", tmp_path / "out")
    assert (code, out) == (3, "")
    lines = err.splitlines()
    assert len(lines) == 2 and "is no low-rank difference" in lines[0] and "BASE+ADAPTER" in lines[1]
    assert names(tmp_path) == ["base", "lora"]


# -- the command -------------------------------------------------------------------------------------


def write(directory: Path, modules: dict[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """An adapter of given factors (B, A), scale 1."""
    directory.mkdir()
    factors = {}
    for module, (b, a) in modules.items():
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(factors, directory / "adapter_model.safetensors")
    rank = next(iter(modules.values()))[1].shape[0]
    text = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank} | config)
    (directory / "adapter_config.json").write_text(text)
    return directory


def test_what_the_command_leaves(cli: Cli, place: Path, tmp_path: Path) -> None:
    args = ["adapters", "merge", place / "a", place / "b", "--out", tmp_path / "out"]
    code, out, err = cli(*args, "--method", "ties", "--density", "0.5", "--rank", "3", "--weights", "1,-0.5")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "ties in delta space: 6 modules, rank 3, " in err and "% of the energy kept" in err
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "mergebench.json",
    ]  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base") and sorted(config["target_modules"]) == sorted(
        PROJECTIONS
    )
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    made = json.loads((tmp_path / "out" / "mergebench.json").read_text())
    assert [entry["weight"] for entry in made["adapters"]] == [1.0, -0.5]
    hashed = {(tmp_path / "out" / entry["file"]).resolve(): entry["sha256"] for entry in made["inputs"]}
    assert hashed[place / "b" / "adapter_model.safetensors"] == hashes(place / "b")["adapter_model.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "`ties`, density 0.5 in delta space" in card
    # finished: kept, unless told otherwise
    code, out, err = cli(*args)
    assert (code, out) == (2, "") and "it holds a finished result" in err
    code, out, err = cli(*args, "--overwrite", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["method"]["name"] == "linear" and json.loads(out)["energy_kept"] == pytest.approx(1)


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_different_bases_are_told(cli: Cli, tmp_path: Path) -> None:
    factors = {"layer": (torch.ones(4, 1), torch.ones(1, 4))}
    one = write(tmp_path / "one", factors, base_model_name_or_path="org/one")
    two = write(tmp_path / "two", factors, base_model_name_or_path="org/two")
    code, _, err = cli("adapters", "merge", one, two, "--out", tmp_path / "out")
    assert code == 0 and "warning: the adapters name different bases: org/one, org/two\n" in err


def test_errors(cli: Cli, tmp_path: Path) -> None:
    ones = {"layer": (torch.ones(4, 1), torch.ones(1, 4))}
    one, other = write(tmp_path / "one", ones), write(tmp_path / "other", ones)
    wide = write(tmp_path / "wide", {"layer": (torch.ones(4, 1), torch.ones(1, 5))})
    conv = write(tmp_path / "conv", ones, fan_in_fan_out=True)
    bad = write(tmp_path / "bad", {"layer": (torch.ones(4, 1), torch.full((1, 4), torch.nan))})
    huge = write(tmp_path / "huge", {"layer": (torch.full((4, 1), 1e30), torch.full((1, 4), 1e30))})
    table: list[tuple[list[Any], int, str, str]] = [
        ([one, wide], 3, f"layer: {wide} changes [4, 5], {one} [4, 4]", "only adapters of one base merge"),
        ([one, conv], 3, "fan_in_fan_out", ""),
        ([one, bad], 1, "'base_model.model.layer.lora_A.weight' holds NaN", "use another adapter"),
        ([bad], 1, "'base_model.model.layer.lora_A.weight' holds NaN", "use another adapter"),
        ([one, huge, "--weights", "1,1e30", "--method", "cat"], 1, "layer: the merged factors do not fit", ""),
        ([one, tmp_path / "none"], 3, "no such file or directory", "did you mean"),
        ([one, other, "--method", "tie"], 2, "--method: no method 'tie'", "did you mean 'ties'?"),
        ([one, other, "--method", "slerp"], 2, "--method: no method 'slerp'", "did you mean 'multislerp'?"),
        ([one, other, "--weights", "1"], 2, "--weights: 1 for 2 adapters", "0.5,0.5"),
        ([one, other, "--weights", "1,x"], 2, "--weights: '1,x' is not a list of numbers", "0.5,0.5"),
        ([one, other, "--weights", "1,nan"], 2, "--weights: must be finite", ""),
        ([one, other, "--density", "0.5"], 2, "--density: 'linear' drops nothing", "magnitude_prune, breadcrumbs"),
        ([one, other, "--method", "ties", "--density", "0"], 2, "--density: must be above 0, at most 1, got 0", ""),
        ([one, other, "--rank", "0"], 2, "--rank: must be at least 1", ""),
        ([one, other, "--method", "cat", "--rank", "2"], 2, "--rank: 'cat' has the sum", "linear and svd"),
    ]
    before = hashes(tmp_path)
    for args, expected, what, hint in table:
        code, out, err = cli("adapters", "merge", *args, "--out", tmp_path / "out")
        assert (code, out) == (expected, ""), (args, err)
        lines = err.splitlines()
        assert lines[0].startswith("error: ") and what in lines[0] and (hint in lines[1] if hint else True), err
        assert not (tmp_path / "out").exists()
        assert hashes(tmp_path / "one") == {n[4:]: h for n, h in before.items() if n.startswith("one/")}
    code, _, err = cli("adapters", "merge", one, other, "--out", one)
    assert code == 2 and "overlaps the input" in err


# -- pieces ------------------------------------------------------------------------------------------


def test_patterns_pick_one_module() -> None:
    """A name that ends another name, by PEFT's own matching."""
    ranks = {"layer": 2, "model.layer": 8, "model.sub.layer": 8, "model.player": 8, "x.model.layer": 4, "other": 8}
    pattern = _pattern(ranks, 8)
    for module, rank in ranks.items():
        assert pattern.get(get_pattern_key(pattern.keys(), module), 8) == rank
    assert "other" not in pattern and _pattern({"a": 4, "b.a": 4}, 4) == {}


@pytest.mark.parametrize("rows, columns", [(SMALL + 90, SMALL + 200), (SMALL + 200, SMALL + 40)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_large_matrices_are_cut_as_well_as_can_be(rows: int, columns: int, decay: float) -> None:
    """Subspace iteration against the full decomposition, from a flat spectrum to a steep one."""
    torch.manual_seed(rows)
    noise = torch.randn(rows, columns)
    u, s, v = torch.linalg.svd(noise, full_matrices=False)
    matrix = (u * s * torch.arange(1, len(s) + 1) ** -decay) @ v
    product = truncate(matrix, 12)
    most = float(torch.linalg.svdvals(matrix.double())[:12].square().sum())
    distance = float((matrix - product.b @ product.a).square().sum())
    assert product.kept == pytest.approx(most, rel=1e-3) and product.kept <= most * (1 + 1e-5)
    assert distance == pytest.approx(product.total - product.kept, rel=1e-3, abs=1e-5 * product.total)


def test_more_rank_than_the_matrix_has() -> None:
    """Stacked factors wider than the module: the space is the module's."""
    torch.manual_seed(0)
    b, a = torch.randn(5, 12), torch.randn(12, 7)
    product = compress(b, a, 5)
    torch.testing.assert_close(product.b @ product.a, b @ a, rtol=1e-5, atol=1e-5)
    assert product.b.shape == (5, 5) and product.kept == pytest.approx(float((b @ a).square().sum()))


def test_nothing_at_all(tmp_path: Path) -> None:
    """Adapters that were never trained, or that cancel: zero, not NaN."""
    zero = {"layer": (torch.zeros(4, 2), torch.randn(2, 6))}
    one, two = write(tmp_path / "one", zero), write(tmp_path / "two", zero)
    for method in ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "pcb"):
        made = merge_adapters([one, two], tmp_path / method, method=method).provenance
        factors = load_file(tmp_path / method / "adapter_model.safetensors")
        assert made["energy_kept"] == 1.0
        key = "base_model.model.layer.lora_{}.weight"
        assert not (factors[key.format("B")] @ factors[key.format("A")]).any()
