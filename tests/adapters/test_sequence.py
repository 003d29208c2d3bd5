"""Adapters in sequence: merged on their stored tensors by the paper's formula, compared, and loaded by PEFT."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import hashes, names
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.adapters import adapter_drift, merge_adapters, merge_sequence
from mergebench.adapters.sequence import merged
from mergebench.engine.noise import TILE
from mergebench.errors import ModelError, RecipeError, RunError
from tests.adapters.test_merge import PROJECTIONS, loaded, save
from tests.conftest import Cli

WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")
Tensors = dict[str, Tensor]


def bottleneck(path: Path, seed: int, width: int = 3, scale: str = "0.1", **more: Tensor) -> Path:
    """A bank's adapter: two layers, and one tensor larger than what is read at once."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in ("layers.0", "layers.1"):
        tensors[f"{layer}.down.weight"] = torch.randn(width, 8, generator=random)
        tensors[f"{layer}.up.weight"] = torch.randn(8, width, generator=random).half()
    tensors["layers.1.up.bias"] = torch.randn(2 * TILE + 5, generator=random).bfloat16()
    save_file(tensors | more, path, metadata={"kind": "bottleneck", "scale": scale})
    return path


@pytest.fixture
def sequence(tmp_path: Path) -> list[Path]:
    return [bottleneck(tmp_path / f"{number:02d}.safetensors", number) for number in range(1, 5)]


def formula(adapters: list[Tensors], alpha: float) -> Tensors:
    """(1 - alpha) A_b + alpha / (b - 1) sum of those before, in float64, as the last one stores it."""
    *before, last = adapters
    return {
        name: (
            (1 - alpha) * value.double() + alpha / len(before) * torch.stack([a[name].double() for a in before]).sum(0)
        ).to(value.dtype)
        for name, value in last.items()
    }


def assert_near(found: Tensors, expected: Tensors) -> None:
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


# -- the formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, expected", [([0.0, 1.0], 0.9), ([0.0, 0.5, 1.0], 0.925)])
def test_golden(values: list[float], expected: float) -> None:
    *_, last = merged([torch.tensor([value]) for value in values], 0.1)
    assert float(last) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_last_toward_the_mean(sequence: list[Path], tmp_path: Path, alpha: float, count: int) -> None:
    before = hashes(tmp_path)
    merge_sequence(sequence[:count], tmp_path / "out", alpha=alpha)
    given = [load_file(path) for path in sequence[:count]]
    assert names(tmp_path / "out") == sorted([sequence[count - 1].name, "README.md", "mergebench.json"])
    assert_near(load_file(tmp_path / "out" / sequence[count - 1].name), formula(given, alpha))
    assert before.items() <= hashes(tmp_path).items()


def test_all_of_them_by_what_was_given(sequence: list[Path], tmp_path: Path) -> None:
    """Every prefix is of the adapters as they are, not of merged ones."""
    seen: list[tuple[int, int]] = []
    merge_sequence(sequence, tmp_path / "out", alpha=0.4, every=True, progress=lambda *told: seen.append(told))
    size = 4 * 3 * 8 + 2 * TILE + 5
    assert len(seen) == 4 + 3 and seen == sorted(seen) and seen[-1] == (size, size)
    given = [load_file(path) for path in sequence]
    assert (tmp_path / "out" / "01.safetensors").read_bytes() == sequence[0].read_bytes()
    for at in range(1, 4):
        assert_near(load_file(tmp_path / "out" / sequence[at].name), formula(given[: at + 1], 0.4))
        merge_sequence(sequence[: at + 1], tmp_path / f"last{at}", alpha=0.4)
        alone = (tmp_path / f"last{at}" / sequence[at].name).read_bytes()
        assert alone == (tmp_path / "out" / sequence[at].name).read_bytes()


def test_settings_are_kept(sequence: list[Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    merge_sequence(sequence, tmp_path / "out")
    with safe_open(tmp_path / "out" / "04.safetensors", "pt") as file:
        assert file.metadata().items() >= {"kind": "bottleneck", "scale": "0.1"}.items()
    # so the result goes on in a sequence
    merge_sequence([*sequence[:3], tmp_path / "out" / "04.safetensors"], tmp_path / "again")


def test_each_keeps_its_type(sequence: list[Path], tmp_path: Path) -> None:
    kinds, given = (torch.float32, torch.bfloat16, torch.float16, torch.float64), []
    for path, kind in zip(sequence, kinds, strict=True):
        given.append({name: value.to(kind) for name, value in load_file(path).items()})
        save_file(given[-1], path, metadata={"kind": "bottleneck", "scale": "0.1"})
    merge_sequence(sequence, tmp_path / "out", alpha=0.4, every=True)
    for at in range(1, 4):
        found = load_file(tmp_path / "out" / sequence[at].name)
        assert {value.dtype for value in found.values()} == {kinds[at]}
        for name, value in formula(given[: at + 1], 0.4).items():  # float32 inside, also where more is stored
            tolerance = max(torch.finfo(kind).eps for kind in (kinds[at], torch.float32))
            torch.testing.assert_close(found[name].double(), value.double(), rtol=2 * tolerance, atol=1e-6)


@pytest.mark.parametrize("every", [False, True])
def test_alpha_zero_and_one_adapter_are_copies(sequence: list[Path], tmp_path: Path, every: bool) -> None:
    sequence[3] = bottleneck(tmp_path / "04.safetensors", 4, zero=torch.tensor([-0.0, 0.0]))
    merge_sequence(sequence[3:], tmp_path / "one", every=every)
    assert (tmp_path / "one" / "04.safetensors").read_bytes() == sequence[3].read_bytes()
    made = merge_sequence(sequence[:3], tmp_path / "out", alpha=0, every=every).provenance
    assert made["copied"] == (["01", "02", "03"] if every else ["03"])
    for name in made["copied"]:
        path = tmp_path / "out" / f"{name}.safetensors"
        assert path.read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 0.9, 1.0])
def test_equal_adapters_stay(tmp_path: Path, alpha: float) -> None:
    """Bit for bit: a fixed point."""
    same = [bottleneck(tmp_path / f"{number}.safetensors", 7) for number in range(7)]
    merge_sequence(same, tmp_path / "out", alpha=alpha)
    before, after = load_file(same[0]), load_file(tmp_path / "out" / "6.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_affine() -> None:
    torch.manual_seed(0)
    sequence = [torch.randn(50) for _ in range(5)]
    for plain, moved in zip(merged(sequence, 0.3), merged([3 * one - 2 for one in sequence], 0.3), strict=True):
        torch.testing.assert_close(moved, 3 * plain - 2)


def test_too_far_apart(tmp_path: Path) -> None:
    for name, value in (("1", 3e38), ("2", -3e38)):
        save_file({"x": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    with pytest.raises(RunError, match="x: the adapters are too far apart for float32"):
        merge_sequence([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path / "out")
    assert names(tmp_path) == ["1.safetensors", "2.safetensors"]


def test_numbers_that_are_no_floats(tmp_path: Path) -> None:
    one, two = (bottleneck(tmp_path / f"{n}.safetensors", n, places=torch.tensor([3, 1, 4])) for n in (1, 2))
    merge_sequence([one, two], tmp_path / "out", alpha=0.5)
    assert load_file(tmp_path / "out" / "2.safetensors")["places"].tolist() == [3, 1, 4]
    other = bottleneck(tmp_path / "3.safetensors", 3, places=torch.tensor([3, 1, 5]))
    with pytest.raises(ModelError, match=r"places: .*1.safetensors and .*3.safetensors hold other I64 numbers"):
        merge_sequence([one, other], tmp_path / "no")


# -- PEFT ----------------------------------------------------------------------------------------------

TYPES: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=PROJECTIONS, use_rslora=True),
    "dora": peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["v_proj"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save(folder, "lora", {"r": 2, "target_modules": PROJECTIONS})
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_peft_loads_what_is_merged(base: Path, tmp_path: Path, kind: str) -> None:
    import transformers

    paths, states = [], []
    for seed in range(3):
        network = transformers.AutoModelForCausalLM.from_pretrained(base / "base")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = peft.get_peft_model(network, TYPES[kind], f"a{seed}")
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.copy_(value + 0.3 * torch.randn_like(value))
        model.save_pretrained(tmp_path / "run")
        paths.append(tmp_path / "run" / f"a{seed}")
        states.append(peft.get_peft_model_state_dict(model, adapter_name=f"a{seed}"))
    merge_sequence(paths, tmp_path / "out", alpha=0.25)
    for config in (paths[-1], tmp_path / "out"):
        assert (config / "adapter_config.json").read_bytes() == (paths[-1] / "adapter_config.json").read_bytes()
    expected = loaded(base, paths[-1])
    peft.set_peft_model_state_dict(expected, formula(states, 0.25))
    inputs = torch.arange(10).view(2, 5)
    with torch.no_grad():
        found, right, unmerged = (
            model.eval()(inputs).logits for model in (loaded(base, tmp_path / "out"), expected, loaded(base, paths[-1]))
        )
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert float((found - unmerged).abs().max()) > 3e-4
    # all of them: one directory each
    merge_sequence(paths, tmp_path / "all", alpha=0.25, every=True)
    assert names(tmp_path / "all") == ["README.md", "a0", "a1", "a2", "mergebench.json"]
    assert names(tmp_path / "all" / "a1") == ["adapter_config.json", WEIGHTS]
    assert hashes(tmp_path / "all" / "a0").items() <= hashes(paths[0]).items()
    assert (tmp_path / "all" / "a2" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_settings_that_say_nothing_of_the_tensors(base: Path, tmp_path: Path) -> None:
    """Where it was trained and how; lists in another order; what a newer version writes."""
    one, two = changed(base / "lora", tmp_path / "one", a_list=["q", "k"]), tmp_path / "two"
    shutil.copytree(one, two)
    config = json.loads((two / "adapter_config.json").read_text())
    config |= {"lora_dropout": 0.5, "inference_mode": False, "init_lora_weights": "gaussian", "task_type": None}
    config |= {
        "target_modules": config["target_modules"][::-1],
        "a_list": ["k", "q"],
        "peft_version": "0",
        "rank_pattern": None,
    }
    config |= {"a_number_of_tomorrow": 16, "a_switch_of_tomorrow": False, "a_word_of_tomorrow": "none"}
    (two / "adapter_config.json").write_text(json.dumps(config))
    merge_sequence([one, two], tmp_path / "out")


# -- the command ---------------------------------------------------------------------------------------


def changed(adapter: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text()) | settings
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def test_what_the_command_says(cli: Cli, base: Path, sequence: list[Path], tmp_path: Path) -> None:
    ema = ["adapters", "merge", "--method", "ema", "--out", tmp_path / "out"]
    code, out, err = cli(*ema, *sequence)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert err.startswith("ema on the stored tensors: 4 bottleneck adapters, 5 tensors, alpha 0.1, ")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv:2412.09441" in card and "peft" not in card
    code, out, err = cli(*ema, base / "lora", base / "lora", "--alpha", "0.2", "--json", "--overwrite")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["space"] == "stored" and made["method"] == {"name": "ema", "alpha": 0.2, "all": False}
    assert made["inputs"][1]["sha256"] == hashes(base / "lora")[WEIGHTS]
    code, _, err = cli(*ema, base / "lora", changed(base / "lora", tmp_path / "b"), "--all", "--overwrite")
    assert code == 0 and "warning: A and B are averaged apart" in err and "all written (lora is a copy)" in err
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    code, _, err = cli("adapters", "merge", base / "lora", base / "lora", "--out", tmp_path / "delta")
    assert code == 0 and "linear in delta space: " in err
    code, _, err = cli(*ema, base / "lora", "--overwrite")
    assert code == 0 and err.startswith("copied: lora, ")


def test_errors(cli: Cli, base: Path, sequence: list[Path], tmp_path: Path) -> None:
    one, two = sequence[:2]
    lora = base / "lora"
    wide = bottleneck(tmp_path / "wide.safetensors", 9, width=4)
    scaled = bottleneck(tmp_path / "scaled.safetensors", 9, scale="0.2")
    more = bottleneck(tmp_path / "more.safetensors", 9, extra=torch.ones(2))
    broken = bottleneck(tmp_path / "broken.safetensors", 9, **{"layers.1.up.bias": torch.full((2 * TILE + 5,), -1.0)})
    values = load_file(broken)["layers.1.up.bias"]
    values[-1] = math.nan
    broken = bottleneck(tmp_path / "broken.safetensors", 9, **{"layers.1.up.bias": values})
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(one.read_bytes()[:-4])
    (tmp_path / "other").mkdir()
    same_name = Path(shutil.copy(one, tmp_path / "other" / one.name))
    rank = changed(lora, tmp_path / "rank", r=4)
    alpha = changed(lora, tmp_path / "alpha", lora_alpha=3)
    scaling = changed(lora, tmp_path / "scaling", use_rslora=True)
    pissa = changed(lora, tmp_path / "pissa", init_lora_weights="pissa_niter_4")
    ia3 = changed(lora, tmp_path / "ia3", peft_type="IA3")
    fewer = save(base, "fewer", {"r": 2, "target_modules": ["q_proj"]})
    table: list[tuple[list[Any], int, str, str]] = [
        ([one, wide], 3, f"layers.0.down.weight: {one} has [3, 8], {wide} has [4, 8]", "of one type"),
        ([one, scaled], 3, f'scale: {one} has "0.1", {scaled} has "0.2"', "equal settings"),
        ([one, more], 3, f"{one}: it has no tensor 'extra', {more} has", "equal settings and tensors"),
        ([more, one], 3, f"{one}: it has no tensor 'extra', {more} has", "equal settings and tensors"),
        ([one, broken], 1, f"{broken}: 'layers.1.up.bias' holds NaN or infinity", "use another adapter"),
        ([broken, one, "--all"], 1, f"{broken}: 'layers.1.up.bias' holds NaN or infinity", "use another adapter"),
        ([one, torn], 1, "torn.safetensors: ", "damaged or incomplete"),
        ([one, lora], 3, f"{one} is of type bottleneck, {lora} of type LORA", "of one type"),
        ([one, tmp_path / "none"], 3, f"adapter '{tmp_path / 'none'}': no such file or directory", ""),
        ([one, lora / WEIGHTS], 3, "its settings are in adapter_config.json beside it", f"the directory: {lora}"),
        ([one, tmp_path / "other"], 3, "not an adapter: no adapter_config.json", f"such as {same_name}"),
        ([one, base / "base"], 3, "not an adapter: it is a model", "name it alone"),
        ([lora, rank], 3, f"r: {lora} has 2, {rank} has 4", "LoRAs of any rank: --method linear"),
        ([lora, alpha], 3, f"lora_alpha: {lora} has 8, {alpha} has 3", ""),
        ([lora, scaling], 3, f"use_rslora: {lora} has false, {scaling} has true", ""),
        ([lora, pissa], 3, f"init_lora_weights: {lora} has true, {pissa} has", ""),
        ([lora, ia3], 3, f"{lora} is of type LORA, {ia3} of type IA3", ""),
        ([lora, fewer], 3, f"target_modules: {lora} has [", ""),
        ([one, two, "--alpha", "1.5"], 2, "--alpha: must be from 0 to 1, got 1.5", "0.1 is the paper's"),
        ([one, two, "--alpha", "nan"], 2, "--alpha: must be from 0 to 1, got nan", ""),
        ([one, two, "--seed", "0"], 2, "--seed: 'ema' takes none", "it takes --alpha and --all"),
        ([one, two, "--weights", "1,1"], 2, "--weights: 'ema' takes none", "it takes --alpha and --all"),
        ([one, two, "--rank", "1"], 2, "--rank: 'ema' takes none", "it takes --alpha and --all"),
        ([one, two, "--density", "1"], 2, "--density: 'ema' takes none", "it takes --alpha and --all"),
        ([one, two, "--base", "x"], 2, "--base: 'ema' takes none", "it takes --alpha and --all"),
        ([one, same_name, "--all"], 2, f"--all: {one} and {same_name} would both be written as '01'", "other names"),
        ([lora, lora, "--method", "svd", "--alpha", "0.1"], 2, "--alpha: 'svd' takes none", "belongs to --method ema"),
        ([lora, lora, "--method", "svd", "--all"], 2, "--all: 'svd' takes none", "belongs to --method ema"),
        ([lora, lora, "--method", "emma"], 2, "--method: no method 'emma'", "did you mean 'ema'?"),
        ([lora, ia3, "--method", "linear"], 3, "of type IA3 is no low-rank difference", "--method ema"),
        ([one, two, "--method", "linear"], 3, "of type bottleneck is no low-rank difference", "--method ema"),
    ]
    before = hashes(tmp_path)
    for args, expected, what, hint in table:
        code, out, err = cli("adapters", "merge", "--method", "ema", *args, "--out", tmp_path / "out")
        assert (code, out) == (expected, ""), (args, err)
        lines = err.splitlines()
        assert lines[0].startswith("error: ") and what in lines[0] and (hint in lines[1] if hint else True), err
        assert hashes(tmp_path) == before
    with pytest.raises(RecipeError) as error:
        merge_adapters([lora, lora], tmp_path / "out", method="ema")
    assert error.value.hint == "mergebench.merge_sequence does it"
    code, _, err = cli("adapters", "merge", "--method", "ema", one, two, "--out", one.parent)
    assert code == 2 and "overlaps the input" in err


# -- drift ---------------------------------------------------------------------------------------------


def test_drift_by_hand(sequence: list[Path]) -> None:
    found = adapter_drift(sequence)
    given = [load_file(path) for path in sequence]
    layers = {"layers.0": [n for n in given[0] if "s.0" in n], "layers.1": [n for n in given[0] if "s.1" in n]}
    assert list(found.layers) == list(layers) and found.names == ["01", "02", "03", "04"]
    for apart, inside in [(found.total, [*given[0]]), *((found.layers[layer], layers[layer]) for layer in layers)]:
        flat = torch.stack([torch.cat([one[name].double().flatten() for name in inside]) for one in given])
        assert apart.norms == pytest.approx(flat.norm(dim=1).tolist())
        cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=2)
        torch.testing.assert_close(torch.tensor(apart.cosines, dtype=torch.float64), cosines)
        assert apart.drift[0] is None
        for at in range(1, 4):
            expected = (flat[at] - flat[:at].mean(0)).norm() / flat[at].norm()
            assert apart.drift[at] == pytest.approx(float(expected))


def test_equal_adapters_do_not_drift(cli: Cli, tmp_path: Path) -> None:
    same = [bottleneck(tmp_path / f"{number}.safetensors", 7) for number in range(3)]
    assert adapter_drift(same).total.drift == [None, 0.0, 0.0]
    # and all of a merged sequence's is (1 - alpha) of what it was
    other = [bottleneck(tmp_path / "8.safetensors", 8), bottleneck(tmp_path / "9.safetensors", 9)]
    merge_sequence(other, tmp_path / "out", alpha=0.25)
    moved = [
        float(adapter_drift([other[0], last]).total.moved[1]) for last in (other[1], tmp_path / "out/9.safetensors")
    ]
    assert moved[1] == pytest.approx(0.75**2 * moved[0], rel=1e-4)


def test_drift_on_the_command_line(cli: Cli, base: Path, sequence: list[Path], tmp_path: Path) -> None:
    zero = tmp_path / "zero.safetensors"
    metadata = {"kind": "bottleneck", "scale": "0.1"}
    save_file({name: torch.zeros_like(value) for name, value in load_file(sequence[0]).items()}, zero, metadata)
    code, out, err = cli("adapters", "drift", *sequence[:2], zero)
    assert (code, err) == (0, "")
    found = adapter_drift([*sequence[:2], zero])
    first, second, third, *_, last = (line.split() for line in out.splitlines()[1:] if line)
    assert first == ["1", "01", f"{found.total.norms[0]:.4f}"] and third == ["3", "zero", "0.0000"]
    assert second[-1] == f"{found.total.cosines[1][0]:.4f}"
    assert ("5 tensors as they are stored (bottleneck)." in out and last[0] == "Drift:") or last[0] == "5"
    # of many, what fits on a terminal
    many = [*sequence, zero, *sequence, sequence[1]]
    total = adapter_drift(many).total
    out = cli("adapters", "drift", *many).out
    assert "All of them: --json." in out
    assert out.splitlines()[0].split() == ["adapter", "norm", "drift", "cos", "1", "cos", "before"]
    assert f"drift in {' '.join(map(str, range(3, 11)))} layers.0" in " ".join(out.split())
    assert f" {total.cosines[9][0]:.4f} {total.cosines[9][8]:.4f}" in " ".join(out.split())
    code, out, _ = cli("adapters", "drift", *sequence[:2], zero, "--json")
    document = json.loads(out)
    assert code == 0 and document["layers"]["layers.1"] == found.layers["layers.1"].to_plain()
    assert document["drift"][2] is None and document["names"] == ["01", "02", "zero"]
    for args, code, what in (
        ([sequence[0]], 2, "drift compares the adapters of a sequence"),
        ([sequence[0], base / "lora"], 3, "of type LORA"),
        ([base / "lora", save(base, "bert-like", {"r": 1, "target_modules": PROJECTIONS})], 3, "r: "),
    ):
        ran = cli("adapters", "drift", *args)
        assert (ran.code, ran.out) == (code, "") and what in ran.err
