"""All architectures that transformers builds at a tiny size, in both layouts of their files: merges and folded LoRAs.

Every outcome is right to the bit (to rounding for LoRAs), or refused in a sentence. `-m slow -s` prints the counts.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError

pytestmark = pytest.mark.slow
HUB, MEMORY = "hub", "memory"


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return model


def loaded(kind: Any, place: Path) -> dict[str, Tensor]:
    try:
        model, info = kind.from_pretrained(place, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"not loaded: {error}") from None
    problems = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
    if problems:
        raise ValueError(f"not loaded: {problems}")
    return {name: value.clone() for name, value in model.state_dict().items()}


def differs(found: dict[str, Tensor], wanted: dict[str, Tensor], exactly: bool) -> str | None:
    for name, value in wanted.items():
        other = found.get(name)
        near = other is not None and other.shape == value.shape and torch.equal(other, value)
        if not exactly and other is not None and value.is_floating_point():
            near = torch.allclose(other, value, rtol=1e-4, atol=1e-5)
        if not near:
            return name
    return None


def merged(out: Path, *models: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
    }
    mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu", workers=1), out, overwrite=True)


def fold(out: Path, base: Path, adapter: Path) -> None:
    mergebench.run(mergebench.plan_fold(str(base), adapter, workers=1), out, overwrite=True)


def outcome(
    make: Callable[[], None], kind: Any, out: Path, wanted: dict[str, Tensor], what: str, exactly: bool
) -> str | None:
    """How a result that `make` writes into `out` is refused, or wrong; None if it has the wanted tensors."""
    try:
        make()
    except MergebenchError as error:
        return f"refused: {what}: {error.message} / {error.hint}"
    except Exception as error:
        return f"WRONG, {type(error).__name__}: {error}"
    try:
        wrong = differs(loaded(kind, out), wanted, exactly)
    except ValueError as error:
        wrong = str(error)
    return None if wrong is None else f"WRONG, {what}: {wrong}"


def judged(model: Any, folder: Path) -> str:
    """What becomes of an average of two models, each in one of the layouts."""
    kind = type(model)
    model.save_pretrained(folder / "a" / HUB)
    perturbed(model).save_pretrained(folder / "b" / HUB)
    model.save_pretrained(folder / "b" / MEMORY, save_original_format=False)
    try:
        one, two, same = (loaded(kind, folder / place) for place in (f"a/{HUB}", f"b/{MEMORY}", f"b/{HUB}"))
    except ValueError as error:
        return f"transformers does not load its own files: {error}"
    if (name := differs(two, same, exactly=True)) is not None:
        return f"transformers loads its own files otherwise: {name}"
    average = {n: (value + two[n]) / 2 if value.is_floating_point() else value for n, value in one.items()}
    names = [{*open_model(str(folder / "b" / which)).tensors} for which in (HUB, MEMORY)]
    for first, second in ((f"a/{HUB}", f"b/{MEMORY}"), (f"b/{MEMORY}", f"a/{HUB}")):
        make = partial(merged, folder / "out", folder / first, folder / second)
        if (wrong := outcome(make, kind, folder / "out", average, f"{first} first", exactly=True)) is not None:
            return wrong
    return "right, two layouts" if names[0] != names[1] else "right, one layout"


def swept(judge: Any, tmp_path: Path, names: list[str] | None = None) -> dict[str, str]:
    found = {}
    for name in names or architectures.names():
        try:
            model = architectures.build(name)
        except Exception as error:
            found[name] = f"not built: {str(error)[:80]}"
            continue
        try:
            found[name] = judge(model, tmp_path / "work")
        except Exception as error:
            found[name] = f"not judged, {type(error).__name__}: {error}"
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
    counts = Counter(outcome.partition(":")[0] for outcome in found.values())
    print()
    print("\n".join(f"{count:5} {outcome}" for outcome, count in counts.most_common()))
    return found


def test_the_average_of_two_layouts(tmp_path: Path) -> None:
    found = swept(judged, tmp_path)
    assert not {name: outcome for name, outcome in found.items() if outcome.startswith("WRONG")}


def folded(model: Any, folder: Path, **settings: Any) -> str:
    """What becomes of a LoRA on all linear layers, folded into files of either layout."""
    from peft import LoraConfig, get_peft_model

    kind = type(model)
    model.save_pretrained(folder / HUB)
    model.save_pretrained(folder / MEMORY, save_original_format=False)
    try:
        before = [loaded(kind, folder / place) for place in (HUB, MEMORY)]
        if differs(*before, exactly=True) is not None:
            return "transformers loads its own files otherwise"
    except ValueError as error:
        return f"transformers does not load its own files: {error}"
    try:
        model = kind.from_pretrained(folder / HUB)
        torch.manual_seed(0)
        how = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings
        # a tied head: PEFT's merge changes the embedding too; conv1d, out_proj: PEFT refuses those of Mamba
        tied = [name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", {})]
        mamba = ["conv1d", "out_proj"] if any("conv1d" in name for name, _ in model.named_parameters()) else []
        how.setdefault("exclude_modules", [*tied, *mamba])
        tuned = get_peft_model(model, LoraConfig(**how))
        tuned.save_pretrained(folder / "lora")
        wanted = {name: value.clone() for name, value in tuned.merge_and_unload().state_dict().items()}
    except Exception as error:
        return f"PEFT does not adapt it: {type(error).__name__}: {error}"
    names = [{*open_model(str(folder / which)).tensors} for which in (HUB, MEMORY)]
    for which in (HUB, MEMORY):
        make = partial(fold, folder / "out", folder / which, folder / "lora")
        if (wrong := outcome(make, kind, folder / "out", wanted, which, exactly=False)) is not None:
            return wrong
    return "right, two layouts" if names[0] != names[1] else "right, one layout"


def test_a_lora_on_all_linear_layers(tmp_path: Path) -> None:
    found = swept(folded, tmp_path)
    assert not {name: outcome for name, outcome in found.items() if outcome.startswith("WRONG")}
