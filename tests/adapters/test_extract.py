"""A LoRA taken out of a fine-tune: PEFT makes of it the base plus the best products, and a kill costs one module."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import fine_tuned, hashes, names, read_model, write_model
from peft import PeftModel
from processes import Server
from safetensors.torch import load_file
from torch import Tensor

import mergebench.checkpoint
from mergebench import extract_adapter
from mergebench.deltas import svd
from mergebench.deltas.svd import SMALL, keep_energy
from tests.adapters.test_combine import DORA, GPT2, assert_close, folded, product
from tests.adapters.test_merge import BERT, LLAMA, PROJECTIONS, best, save
from tests.conftest import Cli

CONFIGS: dict[str, Any] = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}
LINEAR = {"llam": 14, "gpt2": 8, "bert": 7}


pytestmark = pytest.mark.usefixtures("one_thread")


def load(place: Path) -> Any:
    bert = json.loads((place / "config.json").read_text())["model_type"] == "bert"
    return (transformers.AutoModel if bert else transformers.AutoModelForCausalLM).from_pretrained(place).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a fine-tune of all its weights, whose changes have a spectrum that falls off."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    auto = transformers.AutoModel if request.param == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    model.save_pretrained(folder / "base")
    for value in model.parameters():
        noise = 0.1 * torch.randn_like(value)
        value.data += noise if value.ndim < 2 else noise @ torch.diag(0.8 ** torch.arange(value.shape[1]))
    model.save_pretrained(folder / "tuned", max_shard_size="20KB")
    return folder


def loaded(place: Path, adapter: Path) -> Any:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # any other warning is an error here
        return PeftModel.from_pretrained(load(place / "base"), adapter).eval()


def differences(place: Path) -> dict[str, Tensor]:
    base, tuned = (load(place / name).state_dict() for name in ("base", "tuned"))
    return {name: tuned[name] - value for name, value in base.items()}


def outputs(model: Any) -> Tensor:
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found = model(input_ids=tokens)
    return found[0]


# -- what PEFT makes of it ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_best_products(place: Path, tmp_path: Path, rank: int) -> None:
    """The model with the adapter is the base plus, in every linear layer, the best of that rank."""
    made = extract_adapter(str(place / "base"), str(place / "tuned"), tmp_path / "out", rank=rank).provenance

    expected, changes = load(place / "base"), differences(place)
    weights, kept, total = expected.state_dict(), 0.0, 0.0
    assert len(made["modules"]) == LINEAR[place.name[:4]]
    for module, entry in made["modules"].items():
        delta = changes.pop(f"{module}.weight")
        share = float(best(delta, rank).square().sum() / delta.square().sum())
        assert entry["energy_kept"] == pytest.approx(share, rel=1e-5) and entry["rank"] == min(rank, *delta.shape)
        kept, total = kept + share * float(delta.square().sum()), total + float(delta.square().sum())
        weights[f"{module}.weight"] += best(delta, rank)
    assert made["energy_kept"] == pytest.approx(kept / total, rel=1e-5)
    found = loaded(place, tmp_path / "out")
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=1e-4, atol=1e-5)
    # what is left out is everything else, counted once
    if place.name.startswith("gpt2"):
        del changes["lm_head.weight"]  # tied to the embedding
    other = {name: float(delta.square().sum()) for name, delta in changes.items()}
    everything = total + sum(other.values())
    assert made["left_out"] == pytest.approx(sum(other.values()) / everything, rel=1e-5)
    assert made["left_out_tensors"] == pytest.approx({name: one / everything for name, one in other.items()}, rel=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_the_smallest_rank_that_keeps_the_energy(place: Path, tmp_path: Path, energy: float) -> None:
    made = extract_adapter(str(place / "base"), str(place / "tuned"), tmp_path / "out", energy=energy).provenance

    changes, model = differences(place), loaded(place, tmp_path / "out")
    for module, entry in made["modules"].items():
        delta = changes[f"{module}.weight"]
        squares = torch.linalg.svdvals(delta.double()).square()
        shares = (squares.cumsum(0) / squares.sum()).tolist()
        smallest = next((r for r, share in enumerate(shares, 1) if share >= energy * (1 - 1e-12)), len(shares))
        assert entry["rank"] == smallest if energy < 1 else entry["rank"] >= smallest
        assert entry["energy_kept"] == pytest.approx(shares[entry["rank"] - 1], rel=1e-5)
        loaded_module = model.base_model.model.get_submodule(module)
        assert (loaded_module.r["default"], loaded_module.scaling["default"]) == (entry["rank"], 1.0)
        assert_close(loaded_module.get_delta_weight("default").detach(), best(delta, entry["rank"]), 1e-4)
    assert energy < 1 or made["energy_kept"] == pytest.approx(1)
    assert energy != 0.95 or len({entry["rank"] for entry in made["modules"].values()}) > 1


def test_a_fine_tune_that_is_a_lora(tmp_path: Path) -> None:
    """What PEFT folded into the base comes out again, only where it was; so does it where it is not folded."""
    adapter = save(tmp_path, "lora", {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS})
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(load(tmp_path / "base"), adapter)
    deltas = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "lora_A")}
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    base = str(tmp_path / "base")
    for number, tuned in enumerate((str(tmp_path / "tuned"), f"{base}+{adapter}")):
        made = extract_adapter(base, tuned, tmp_path / f"out{number}", rank=4).provenance
        assert made["left_out"] == 0 and made["energy_kept"] == pytest.approx(1, abs=1e-9)
        found = loaded(tmp_path, tmp_path / f"out{number}")
        for name, module in found.named_modules():
            assert (name in deltas) == hasattr(module, "lora_A")
            if name in deltas:
                assert_close(module.get_delta_weight("default").detach(), deltas[name], 1e-5)


def test_dora_becomes_a_lora(tmp_path: Path) -> None:
    adapter = save(tmp_path, "dora", DORA)
    base = str(tmp_path / "base")
    made = extract_adapter(base, f"{base}+{adapter}", tmp_path / "out", energy=1).provenance
    expected = folded(tmp_path, "dora")
    assert made["modules"].keys() == expected.keys()
    for module, delta in expected.items():
        assert_close(product(tmp_path / "out", module), delta, 1e-5)


def test_fp8(tmp_path: Path) -> None:
    """Differences of the values that the stored ones stand for."""
    values = []
    for name, scale in (("base", 0.5), ("tuned", 0.75)):
        stored = torch.randn(20, 30).to(torch.float8_e4m3fn)
        tensors = {"layer.weight": stored, "layer.weight_scale_inv": torch.full((1, 1), scale)}
        config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
        write_model(tmp_path / name, tensors, config=config)
        values.append(stored.float() * scale)
    extract_adapter(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", rank=20)
    assert_close(product(tmp_path / "out", "layer"), values[1] - values[0], 1e-5)


def test_names_without_the_prefix_of_the_class(tmp_path: Path) -> None:
    """Files as the GPT-2 on the hub has them: PEFT finds every module by the class's names."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(GPT2)
    model.save_pretrained(tmp_path / "base")
    tensors = read_model(tmp_path / "base")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    base = write_model(tmp_path / "base", short, config=config, metadata={"format": "pt"})
    tuned = write_model(tmp_path / "tuned", fine_tuned(short, 1), config=config, metadata={"format": "pt"})

    made = extract_adapter(str(base), str(tuned), tmp_path / "out", energy=1).provenance

    assert "transformer.h.0.attn.c_attn" in made["modules"]
    found = loaded(tmp_path, tmp_path / "out").merge_and_unload().state_dict()
    expected = load(tuned).state_dict()
    for module in made["modules"]:
        torch.testing.assert_close(found[f"{module}.weight"], expected[f"{module}.weight"], rtol=1e-5, atol=1e-6)
    folded = mergebench.deltas.open.open_model(f"{base}+{tmp_path / 'out'}").state_dict()  # and so do we
    torch.testing.assert_close(folded["h.0.attn.c_attn.weight"], expected["transformer.h.0.attn.c_attn.weight"])


# -- large matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(SMALL + 90, SMALL + 200), (SMALL + 200, SMALL + 40)])
@pytest.mark.parametrize("decay, share", [(0.1, 0.2), (0.5, 0.6), (1.5, 0.99), (0.1, 0.9), (3.0, 0.9999)])
def test_energy_of_large_matrices(rows: int, columns: int, decay: float, share: float) -> None:
    """By search and by the full decomposition: the rank and the energy of an exact one."""
    torch.manual_seed(rows)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    s = torch.arange(1, min(rows, columns) + 1) ** -decay
    matrix = (u * s) @ v
    product = keep_energy(matrix, share)
    shares = s.double().square().cumsum(0) / s.double().square().sum()
    rank = int((shares < share).sum()) + 1
    assert abs(product.a.shape[0] - rank) <= 1 + rank // 50  # a flat spectrum's directions settle slowly
    assert share * product.total <= product.kept <= (float(shares[product.a.shape[0] - 1]) + 1e-5) * product.total
    distance = float((matrix - product.b @ product.a).double().square().sum())
    assert distance == pytest.approx(product.total - product.kept, rel=1e-3, abs=1e-5 * product.total)


@pytest.mark.parametrize("rows, columns", [(30, 70), (70, 30)])
def test_full_decompositions(rows: int, columns: int) -> None:
    """By the Gram matrix, of matrices with less than full rank too: as by an SVD, and finite."""
    torch.manual_seed(0)
    for inner in (30, 3):
        matrix = torch.randn(rows, inner) @ torch.randn(inner, columns)
        for rank in (2, 30):
            product = svd.truncate(matrix, rank)
            assert torch.isfinite(product.a).all() and torch.isfinite(product.b).all()
            assert_close(product.b @ product.a, best(matrix, rank), 1e-5)
            assert product.kept == pytest.approx(float(best(matrix, rank).double().square().sum()), rel=1e-5)


def test_a_seed_changes_rounding_alone() -> None:
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(SMALL + 20, SMALL + 30)
    matrix = torch.randn(SMALL + 20, 8) @ torch.randn(8, SMALL + 30) + noise
    one, two, same = (svd.truncate(matrix, 8, seed) for seed in (0, 1, 0))
    assert torch.equal(one.b, same.b) and not torch.equal(one.b, two.b)
    assert_close(one.b @ one.a, two.b @ two.a, 1e-4)


# -- the command -------------------------------------------------------------------------------------


def test_what_the_command_says(cli: Cli, place: Path, tmp_path: Path) -> None:
    args = ["adapters", "extract", "--base", place / "base", "--model", place / "tuned", "--out", tmp_path / "out"]
    before = hashes(place)
    code, out, err = cli(*args, "--rank", "3")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    first, second = err.splitlines()
    count = LINEAR[place.name[:4]]
    assert first.startswith(f"extracted: {count} modules, rank 3, ") and "of the energy kept (least " in first
    made = json.loads((tmp_path / "out" / "mergebench.json").read_text())
    worst = min(made["modules"], key=lambda module: made["modules"][module]["energy_kept"])
    assert f"least {made['modules'][worst]['energy_kept']:.2%}: {worst})" in first
    name, share = next(iter(made["left_out_tensors"].items()))
    assert second.startswith(f"left out: {made['left_out']:.2%} of the change, ") and f"({name} {share:.2%}, " in second
    assert names(tmp_path) == ["out"] and hashes(place) == before
    assert names(tmp_path / "out") == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "mergebench.json",
    ]  # fmt: skip
    assert cli(*args)[0] == 2 and "it holds a finished result" in cli(*args).err
    again = cli(*args, "--rank", "3", "--resume")
    assert (again.code, again.out) == (0, f"{tmp_path / 'out'}\n") and "already finished" in again.err
    code, out, err = cli(*args, "--energy", "0.9", "--overwrite", "--json")
    assert (code, err) == (0, "") and json.loads(out)["energy_kept"] >= 0.9


def test_errors(cli: Cli, tmp_path: Path) -> None:
    tensors = {
        "layer.weight": torch.randn(6, 4),
        "layer.bias": torch.randn(6),
        "embed_tokens.weight": torch.randn(5, 4),
    }
    base, same = write_model(tmp_path / "base", tensors), write_model(tmp_path / "same", tensors)
    tuned = write_model(tmp_path / "tuned", fine_tuned(tensors, 1))
    wide = write_model(tmp_path / "wide", tensors | {"layer.weight": torch.randn(6, 5)})
    bad = write_model(tmp_path / "bad", tensors | {"layer.weight": torch.full((6, 4), torch.nan)})
    norms = write_model(tmp_path / "norms", tensors | {"layer.bias": torch.randn(6)})
    mixed = {"up.weight": torch.randn(6, 4), "up.bias": torch.randn(6), "down.weight": torch.randn(6, 4)}
    mixed |= {"down.bias": torch.randn(4)}
    write_model(tmp_path / "mixed", mixed), write_model(tmp_path / "mixed2", fine_tuned(mixed, 1))
    table: list[tuple[Any, Any, list[str], int, str, str]] = [
        (base, tuned, ["--rank", "2", "--energy", "0.5"], 2, "--rank and --energy", ""),
        (base, tuned, ["--rank", "0"], 2, "--rank: must be at least 1", ""),
        (base, tuned, ["--energy", "0"], 2, "--energy: must be above 0, at most 1, got 0", ""),
        (base, tuned, ["--energy", "95"], 2, "--energy: must be above 0", "95% is 0.95"),
        (base, same, [], 3, f"{same} has the linear layers of {base}", ""),
        (base, norms, [], 3, f"{norms} has the linear layers of {base}", ""),
        (base, wide, [], 3, f"layer.weight: {wide} has [6, 5], base has [6, 4]", "a fine-tune of the base"),
        (base, bad, [], 1, "layer.weight: the models or their difference hold NaN", ""),
        (base, tmp_path / "none", [], 3, "no such file", ""),
        (tmp_path / "mixed", tmp_path / "mixed2", [], 3, "stored [in, out], others [out, in]", ""),
    ]
    for one, other, args, expected, what, hint in table:
        before = hashes(tmp_path)
        code, out, err = cli("adapters", "extract", "--base", one, "--model", other, "--out", tmp_path / "out", *args)
        assert (code, out) == (expected, "") and what in err and hint in err, (args, err)
        assert expected == 1 or hashes(tmp_path) == before


def test_another_number_of_tokens(cli: Cli, tmp_path: Path) -> None:
    """No LoRA holds it; the linear layers are extracted, and it is told."""
    tensors = {"layer.weight": torch.randn(6, 4), "embed_tokens.weight": torch.randn(5, 4)}
    base = write_model(tmp_path / "base", tensors)
    longer = fine_tuned(tensors, 1) | {"embed_tokens.weight": torch.randn(7, 4)}
    tuned = write_model(tmp_path / "tuned", longer)
    code, _, err = cli("adapters", "extract", "--base", base, "--model", tuned, "--out", tmp_path / "out")
    assert code == 0 and "left out: embed_tokens.weight: the fine-tune has another number of tokens" in err
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".lora")[0] for name in factors} == {"base_model.model.layer"}


def test_tied_heads_count_once(tmp_path: Path) -> None:
    """Stored twice by the base, once by the fine-tune."""
    tensors = {"layer.weight": torch.randn(6, 4), "model.embed_tokens.weight": torch.randn(5, 4)}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    base, tuned = write_model(tmp_path / "base", twice, config=config), fine_tuned(tensors, 1)
    write_model(tmp_path / "tuned", tuned, config=config)
    made = extract_adapter(str(base), str(tmp_path / "tuned"), tmp_path / "out").provenance
    inside, other = (float((tuned[name] - tensors[name]).square().sum()) for name in tensors)
    assert made["left_out"] == pytest.approx(other / (inside + other), rel=1e-5)


# -- interrupted -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extract") / "work"
    base = {f"layers.{i}.weight": torch.randn(12, 16) for i in range(4)} | {"norm.weight": torch.randn(7)}
    write_model(folder / "base", base, config=None)
    write_model(folder / "tuned", fine_tuned(base, 1), shards=2, config=None)
    return folder


ARGS = ["adapters", "extract", "--base", "base", "--model", "tuned", "--out", "out", "-q", "--energy", "0.8"]


def contents(out: Path) -> dict[str, Any]:
    made = json.loads((out / "mergebench.json").read_text())
    return hashes(out) | {"mergebench.json": {key: value for key, value in made.items() if key != "seconds"}}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_every_step(server: Server, work: Path, tmp_path: Path, every: int) -> None:
    """Killed at each change to the file system in turn, or each other one, then resumed: the same bytes, and no module
    done twice."""
    count = tmp_path / "count"
    assert server.run(*ARGS, folder=work, count=str(count)) == (0, "out\n", "")
    whole, steps = contents(work / "out"), int(count.read_text())
    shutil.rmtree(work / "out")
    kept: set[int] = set()
    for moment in range(steps, 0, -every):
        assert server.run(*ARGS, folder=work, die_at=moment)[0] == -signal.SIGKILL
        if not (work / "out").exists():
            journal = work / ".out.partial" / ".journal.json"
            done = json.loads(journal.read_text())["shards"] if journal.exists() else []
            before = {name: (work / ".out.partial" / name).stat().st_mtime_ns for name in done if _has(work, name)}
            kept.add(len(before))
            if moment % 3 == steps % 3:  # stopped again: what was complete is still the same file
                server.run(*ARGS, "--resume", folder=work, die_at=4 if moment == steps else 8)
                after = {name: (work / ".out.partial" / name).stat().st_mtime_ns for name in before if _has(work, name)}
                assert after == before or len(before) > 2  # when all are there, they become one
            assert server.run(*ARGS, "--resume", folder=work) == (0, "out\n", "")
        assert contents(work / "out") == whole
        shutil.rmtree(work / "out")
        assert names(work) == ["base", "tuned"]
    assert kept == {0, 1, 2, 3, 4}


def _has(work: Path, name: str) -> bool:
    return (work / ".out.partial" / name).exists()


def test_other_settings_are_not_resumed(server: Server, work: Path) -> None:
    assert server.run(*ARGS, folder=work, die_at=12)[0] == -signal.SIGKILL
    code, out, err = server.run(*ARGS[:-1], "0.5", "--resume", folder=work)
    assert (code, out) == (2, "") and "begun with another recipe or other inputs" in err
    assert server.run(*ARGS[:-1], "0.5", folder=work)[0] == 0
    shutil.rmtree(work / "out")


def test_messages_promise_what_holds(server: Server, work: Path, tmp_path: Path) -> None:
    """`extract` goes on with --resume; `merge` has nothing to go on from, and leaves nothing."""
    assert server.run(*ARGS, folder=work)[0] == 0
    adapter = shutil.move(work / "out", tmp_path / "lora")
    merge = ["adapters", "merge", adapter, adapter, "--out", "out", "-q"]
    for args, keeps, said in (
        (ARGS, True, "what is complete is kept; continue with --resume"),
        (merge, False, "no result was written"),
    ):
        ran = server.run(*args, folder=work, die_at=5, by=signal.SIGINT)
        assert ran == (130, "", f"interrupted: {said}\n")
        code, out, err = server.run(*args, folder=work, largest_file=400)
        assert (code, out) == (1, "") and "File too large" in err
        hint = "free some space, then " + ("continue with --resume" if keeps else "run it again")
        assert err.splitlines()[1] == f"hint: {hint}"
        shutil.rmtree(work / ".out.partial", ignore_errors=True)
        assert names(work) == ["base", "tuned"]


def test_public_names() -> None:
    assert mergebench.extract_adapter is extract_adapter
    assert {"merge_adapters", "extract_adapter"} <= set(mergebench.__all__)
