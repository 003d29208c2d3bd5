"""Methods on matrices run on small factors, and DoRA: what they give is what they give on differences written out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import names
from peft import PeftModel
from peft.utils.merge_utils import magnitude_prune, ties
from safetensors.torch import load_file
from torch import Tensor

from mergebench.adapters import combine, merge_adapters
from tests.adapters.test_merge import LLAMA, PROJECTIONS, SETTINGS, best, effect, save, write
from tests.conftest import Cli
from tests.methods.whole import whole

GPT2 = transformers.GPT2Config(
    vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)


pytestmark = pytest.mark.usefixtures("one_thread")


def product(directory: Path, module: str) -> Tensor:
    factors = load_file(directory / "adapter_model.safetensors")
    key = f"base_model.model.{module}.lora_{{}}.weight"
    return factors[key.format("B")] @ factors[key.format("A")]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal, measured by the norm of the expected matrix."""
    assert float((found - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-12)


# -- methods on matrices -----------------------------------------------------------------------------

ON_BASES = ("knots", "tsv_m", "iso_c", "iso_cts")
SHAPES = [(40, 64), (90, 31), (12, 9), (70, 70)]
RANKS = [(3, 3), (1, 4, 2), (8, 0, 5, 3), (6,)]  # 0: the adapter does not have the module


@pytest.mark.parametrize("method", ON_BASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_on_factors_as_on_matrices(tmp_path: Path, method: str, shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    """Room for all, room for the sum of the ranks but not for the method's cuts, room for neither."""
    torch.manual_seed(sum(shape))
    adapters, deltas = [], []
    for number, rank in enumerate(ranks):
        b, a = 0.1 * torch.randn(shape[0], max(rank, 1)), torch.randn(max(rank, 1), shape[1])
        adapters.append(write(tmp_path / str(number), {"layer" if rank else "other": (b, a)}))
        deltas.append(b @ a if rank else torch.zeros(shape))

    made = merge_adapters(adapters, tmp_path / "out", method=method).provenance

    expected = whole(method, torch.stack(deltas).flatten(1), shape=shape, name="layer.weight").view(shape)
    if not made["copied"]:
        assert_close(product(tmp_path / "out", "layer"), expected)
        assert made["modules"]["layer"]["energy_kept"] == pytest.approx(1, abs=1e-6)
    else:
        assert method == "tsv_m" and len(ranks) == 1


@pytest.mark.parametrize("method", ON_BASES)
def test_a_rank_cuts_what_the_method_gives(tmp_path: Path, method: str) -> None:
    torch.manual_seed(1)
    factors = [(torch.randn(30, 4), torch.randn(4, 50)) for _ in range(3)]
    adapters = [write(tmp_path / str(number), {"layer": pair}) for number, pair in enumerate(factors)]

    made = merge_adapters(adapters, tmp_path / "out", method=method, rank=5).provenance

    full = whole(method, torch.stack([b @ a for b, a in factors]).flatten(1), shape=(30, 50)).view(30, 50)
    found = product(tmp_path / "out", "layer")
    if not method.startswith("iso"):  # whose singular values are all equal: any five are the best
        assert_close(found, best(full, 5), 1e-4)
    assert float((found - full).norm()) == pytest.approx(float((best(full, 5) - full).norm()), rel=1e-4)
    share = float(best(full, 5).square().sum() / full.square().sum())
    assert made["energy_kept"] == pytest.approx(share, rel=1e-4)


def test_factors_are_not_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method is given is no larger than the ranks make it, but for the columns of knots."""
    given: list[tuple[int, ...]] = []
    run = combine._run
    monkeypatch.setattr(
        combine, "_run", lambda job, module, rows: given.append(tuple(rows.shape)) or run(job, module, rows)
    )
    adapters = [
        write(tmp_path / name, {"layer": (torch.randn(300, 2), torch.randn(2, 400))}) for name in ("one", "two")
    ]
    for method in ON_BASES:
        merge_adapters(adapters, tmp_path / method, method=method)
    assert given == [(2, 4, 400), (2, 4, 4), (2, 4, 4), (2, 20, 20)]


@pytest.mark.parametrize("method", ["task_arithmetic", "sce", "della_linear", "wudi", "consensus_ta", "magmax"])
def test_any_merge_method_on_task_vectors(tmp_path: Path, method: str) -> None:
    """Nothing names them here: what a method needs is said on the method."""
    torch.manual_seed(3)
    factors = [(torch.randn(20, 3), torch.randn(3, 30)) for _ in range(3)]
    adapters = [write(tmp_path / str(number), {"layer": pair}) for number, pair in enumerate(factors)]

    merge_adapters(adapters, tmp_path / "out", method=method, rank=20)

    expected = whole(method, torch.stack([b @ a for b, a in factors]).flatten(1), shape=(20, 30), name="layer.weight")
    assert_close(product(tmp_path / "out", "layer"), expected.view(20, 30), 1e-4)


def test_heads_are_averaged(tmp_path: Path) -> None:
    """As the same methods do with a checkpoint's."""
    factors = [(torch.randn(30, 2), torch.randn(2, 9)) for _ in range(2)]
    adapters = [write(tmp_path / str(number), {"lm_head": pair}) for number, pair in enumerate(factors)]
    for method in ON_BASES:
        merge_adapters(adapters, tmp_path / method, method=method)
        assert_close(product(tmp_path / method, "lm_head"), sum(b @ a for b, a in factors) / 2)


# -- PEFT's names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("suffix", ["", "_svd"])
def test_every_name_of_peft_runs(tmp_path: Path, name: str, suffix: str) -> None:
    if suffix and name in ("linear", "cat", "svd"):
        pytest.skip("PEFT has no such name")
    torch.manual_seed(0)
    factors = [(torch.randn(9, 2), torch.randn(2, 7)) for _ in range(2)]
    adapters = [write(tmp_path / str(number), {"layer": pair}) for number, pair in enumerate(factors)]
    density = None if name in ("linear", "cat", "svd") else 1.0 if name.startswith("dare") else 0.4
    merge_adapters(adapters, tmp_path / "out", method=name + suffix, weights=[1, 1], density=density, rank=None)
    deltas = [b @ a for b, a in factors]
    with warnings.catch_warnings(action="ignore"):
        expected = {
            "ties": lambda: ties(deltas, torch.ones(2), 0.4),
            # PEFT divides here too, by how many agree; mergekit and the paper's sum do not
            "dare_ties": lambda: sum((delta * sum(deltas).sign()).relu() for delta in deltas) * sum(deltas).sign(),
            "magnitude_prune": lambda: magnitude_prune(deltas, torch.ones(2), 0.4),
        }.get(name, lambda: sum(deltas))()
    rank = 2 if name == "svd" else 4
    assert_close(product(tmp_path / "out", "layer"), best(expected, rank), 1e-4)


def test_names_that_do_not_run(cli: Cli, tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"layer": (torch.ones(4, 1), torch.ones(1, 4))})
    table = [
        (["--method", "dare"], "'dare' alone does not say", "dare_linear or dare_ties"),
        (["--method", "magnitude_prune"], "--density: 'magnitude_prune' needs it", "such as 0.5"),
        (
            ["--method", "knots", "--weights", "1,1"],
            "--weights: 'knots' takes none",
            "linear, cat, svd, magnitude_prune",
        ),
        (["--method", "iso_c", "--density", "0.5"], "--density: 'iso_c' drops nothing", "magnitude_prune, breadcrumbs"),
    ]
    for args, what, hint in table:
        code, out, err = cli("adapters", "merge", one, one, "--out", tmp_path / "out", *args)
        assert (code, out) == (2, "") and what in err and hint in err, err


# -- DoRA --------------------------------------------------------------------------------------------

DORA = {"r": 3, "lora_alpha": 5, "target_modules": PROJECTIONS, "use_dora": True}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def dora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two DoRA adapters and a plain one, on linear layers and on GPT-2's transposed ones."""
    folder = tmp_path_factory.mktemp(request.param)
    targets = PROJECTIONS if request.param == "llama" else ["c_attn", "mlp.c_proj"]
    config: Any = LLAMA if request.param == "llama" else GPT2
    for seed, (name, more) in enumerate({"a": DORA, "b": DORA | {"use_rslora": True}, "c": SETTINGS["a"]}.items()):
        more = more | {"target_modules": targets, "fan_in_fan_out": request.param == "gpt2"}
        save(folder, name, more, config, seed)
    return folder


def folded(place: Path, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to the base's weights [out, in], by PEFT's merge_and_unload."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        after = PeftModel.from_pretrained(base, place / adapter).merge_and_unload().state_dict()
    changed = {name.removesuffix(".weight"): after[name] - before[name] for name in before}
    turned = "gpt2" in type(base).__name__.lower()
    return {name: delta.T if turned else delta for name, delta in changed.items() if delta.any()}


@pytest.mark.parametrize("adapters", ["ab", "ac"])
@pytest.mark.parametrize("method", ["linear", "svd", "ties", "knots", "iso_c"])
def test_dora_merges_with_its_base(dora: Path, tmp_path: Path, adapters: str, method: str) -> None:
    paths = [dora / name for name in adapters]
    made = merge_adapters(paths, tmp_path / "out", method=method, base=str(dora / "base"), rank=16).provenance

    one, two = (folded(dora, name) for name in adapters)
    assert made["modules"].keys() == one.keys() == two.keys() and made["energy_kept"] == pytest.approx(1, abs=1e-6)
    for module in one:
        stack, shape = torch.stack([one[module], two[module]]), one[module].shape
        summed = method in ("linear", "svd")
        expected = stack.mean(0) if summed else whole(method, stack.flatten(1), shape=shape).view(shape)
        assert_close(product(tmp_path / "out", module), expected, 1e-4)
    found = effect(dora, tmp_path / "out")  # PEFT reads an ordinary LoRA
    for module, delta in found.items():
        stored = product(tmp_path / "out", module)
        assert_close(delta.T if delta.shape != stored.shape else delta, stored) if len(set(stored.shape)) > 1 else None


def test_dora_is_cut_to_the_ranks(dora: Path, tmp_path: Path) -> None:
    """The sum of two has full rank: what the default rank keeps of it is told."""
    made = merge_adapters([dora / "a", dora / "b"], tmp_path / "out", base=str(dora / "base")).provenance
    one, two = folded(dora, "a"), folded(dora, "b")
    kept = total = 0.0
    for module, entry in made["modules"].items():
        mean = (one[module] + two[module]) / 2
        assert entry["rank"] == 6
        assert_close(product(tmp_path / "out", module), best(mean, 6), 1e-4)
        kept, total = kept + float(best(mean, 6).square().sum()), total + float(mean.square().sum())
    assert made["energy_kept"] == pytest.approx(kept / total, rel=1e-4) and made["energy_kept"] < 0.999


def test_one_dora(dora: Path, tmp_path: Path) -> None:
    """At weight 1 it is a copy, with the base or without; at another, a difference."""
    for number, base in enumerate((None, str(dora / "base"))):
        out = tmp_path / str(number)
        assert merge_adapters([dora / "a"], out, base=base).provenance["copied"]
        file = "adapter_model.safetensors"
        assert (out / file).read_bytes() == (dora / "a" / file).read_bytes()
    merge_adapters([dora / "a"], tmp_path / "half", base=str(dora / "base"), weights=[0.5], rank=16)
    for module, delta in folded(dora, "a").items():
        assert_close(product(tmp_path / "half", module), delta / 2, 1e-4)


def test_dora_errors(cli: Cli, dora: Path, tmp_path: Path) -> None:
    both, base = [dora / "a", dora / "b"], dora / "base"
    table: list[tuple[list[Any], int, str, str]] = [
        ([*both], 3, f"{dora / 'a'}: DoRA is no low-rank difference", "--base"),
        ([*both, "--base", base, "--method", "cat"], 2, "has no factors to put side by side", "linear or svd"),
        ([*both, "--base", tmp_path / "none"], 3, "no such file or directory", ""),
        ([*both, "--base", f"{base}+{dora / 'c'}"], 2, "has an adapter on top", "trained on"),
    ]
    if "llama" in dora.name:
        wide = transformers.LlamaConfig(**LLAMA.to_dict() | {"hidden_size": 32})
        transformers.AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
        table.append(([*both, "--base", tmp_path / "wide"], 3, "the adapter changes", "trained on another model"))
    for args, expected, what, hint in table:
        code, out, err = cli("adapters", "merge", *args, "--out", tmp_path / "out")
        assert (code, out) == (expected, "") and what in err and hint in err, err
        assert names(tmp_path) == (["wide"] if "llama" in dora.name else [])
