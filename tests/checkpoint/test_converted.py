"""Files in transformers' two layouts, where its rules differ most: fused, split, interleaved, permuted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import architectures
import pytest
import torch
import transformers
from models import read_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import mergebench
from tests.checkpoint.test_architectures import HUB, MEMORY, differs, folded, judged, loaded, merged, perturbed

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
TWO = "right, two layouts"


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("name", ["granitemoe", "inkling_mm_model", "mistral_large4"])
def test_merges(tmp_path: Path, name: str) -> None:
    assert judged(architectures.build(name), tmp_path) == TWO


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["mistral_large4", "nomic_bert"])
def test_folds(tmp_path: Path, name: str, dora: bool) -> None:
    """Rows that the hub's files permute, or join; DoRA's norms are of the rows of memory."""
    model = architectures.build(name)
    assert folded(model, tmp_path, target_modules=["q_proj", "k_proj"], exclude_modules=None, use_dora=dora) == TWO


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the same with noise, in both layouts; a LoRA on the base."""
    folder = tmp_path_factory.mktemp("mistral")
    model = architectures.build("mistral_large4")
    for which in ("base", "tuned"):
        model.save_pretrained(folder / which / HUB)
        model.save_pretrained(folder / which / MEMORY, save_original_format=False)
        perturbed(model)
    base = type(model).from_pretrained(folder / "base" / HUB)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder / "lora")
    tuned.merge_and_unload().save_pretrained(folder / "folded", save_original_format=False)
    return folder


@pytest.mark.parametrize("chunk", [37, 4096])
def test_pieces_are_cut_anywhere(mistral: Path, tmp_path: Path, chunk: int) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": str(mistral / "tuned" / MEMORY)}]}
    recipe["base_model"] = str(mistral / "base" / HUB)
    mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu", workers=2, chunk=chunk), tmp_path / "out")
    assert differs(read_model(tmp_path / "out"), read_model(mistral / "tuned" / HUB), exactly=True) is None


@pytest.mark.parametrize(("base", "other"), [(HUB, MEMORY), (MEMORY, HUB)])
def test_an_adapter_on_a_model_of_another_layout(mistral: Path, tmp_path: Path, base: str, other: str) -> None:
    """A merge whose base is stored otherwise than the model that the adapter is on."""
    merged(tmp_path / "out", mistral / "tuned" / base, Path(f"{mistral / 'base' / other}+{mistral / 'lora'}"))
    kind = type(architectures.build("mistral_large4"))
    one, two = (loaded(kind, mistral / place) for place in (f"tuned/{HUB}", "folded"))
    average = {name: (value + two[name]) / 2 for name, value in one.items()}
    assert differs(loaded(kind, tmp_path / "out"), average, exactly=False) is None


def test_an_adapter_with_the_hubs_names(tmp_path: Path) -> None:
    """Trained where experts are apart, on files that hold them fused under other names."""
    model = architectures.build("minimax")
    model.save_pretrained(tmp_path / HUB)
    model.save_pretrained(tmp_path / MEMORY, save_original_format=False)
    files = read_model(tmp_path / HUB)
    names = [name.removesuffix(".weight") for name in files if ".experts.1.w" in name or "q_proj" in name]
    factors = {}
    for module in names:
        rows, columns = files[f"{module}.weight"].shape
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    results = []
    for which in (HUB, MEMORY):
        mergebench.run(mergebench.plan_fold(str(tmp_path / which), tmp_path / "adapter"), tmp_path / f"of {which}")
        results.append(loaded(type(model), tmp_path / f"of {which}"))
    assert differs(*results, exactly=False) is None
    assert differs(results[0], loaded(type(model), tmp_path / HUB), exactly=False) is not None
