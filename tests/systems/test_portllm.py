"""A port against tensor algebra, transformers and PEFT; its check against NumPy; what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import fine_tuned, hashes, names, read_model, tiny_tensors, write_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint.content import identity
from mergebench.deltas.formats.native import Writing, read_file, write_file
from mergebench.deltas.open import open_model
from mergebench.systems.portllm import plan_port
from tests.adapters.test_combine import GPT2
from tests.adapters.test_merge import BERT, KINDS, LLAMA, save

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "b", "c", "d", "e"]


def updated(base: Path, out: Path, seed: int = 5, scale: float = 0.05) -> Path:
    """The base, trained on a little."""
    shutil.copytree(base, out)
    save_file(
        fine_tuned(load_file(base / "model.safetensors"), seed, scale), out / "model.safetensors", {"format": "pt"}
    )
    return out


def merged(place: Path, adapter: Path) -> dict[str, Tensor]:
    """The base with an adapter folded in, by PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return dict(PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict())


def logits(place: Path) -> Tensor:
    with torch.no_grad():
        out: Tensor = (
            transformers.AutoModelForCausalLM.from_pretrained(place).eval()(torch.arange(10).view(2, 5)).logits
        )
    return out


@pytest.fixture
def three(tmp_path: Path) -> tuple[str, str, str]:
    """old, new, and a fine-tune whose numbers are of other sizes and signs."""
    old = tiny_tensors(0)
    for name, tensors in (("old", old), ("new", fine_tuned(old, 1)), ("tuned", fine_tuned(old, 2, 1.0))):
        write_model(tmp_path / name, tensors)
    return str(tmp_path / "old"), str(tmp_path / "new"), str(tmp_path / "tuned")


# -- fine-tunes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_old_base_is_the_fine_tune(tmp_path: Path, dtype: torch.dtype) -> None:
    old = tiny_tensors(0, dtype)
    tuned = fine_tuned(old, 1, 3.0)
    tuned["layers.0.weight"][0] = old["layers.0.weight"][0] * 1e-9  # in float32, (t - o) + o is not t
    for name, tensors in (("old", old), ("tuned", tuned)):
        write_model(tmp_path / name, tensors)
    mergebench.port(str(tmp_path / "old"), str(tmp_path / "old"), tmp_path / "tuned", tmp_path / "out")
    found = read_model(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in tuned.items())


def test_every_element_is_rounded_once(three: tuple[str, str, str], tmp_path: Path) -> None:
    old, new, tuned = three
    before = hashes(tmp_path)
    made = mergebench.port(*three, tmp_path / "out").provenance
    found, o, n, t = (read_model(Path(place)) for place in (tmp_path / "out", old, new, tuned))
    for name, values in found.items():
        numbers = (one[name].flatten().tolist() for one in (n, t, o))
        exact = [float(Fraction(a) + Fraction(b) - Fraction(c)) for a, b, c in zip(*numbers, strict=True)]
        expected = np.array(exact) if values.is_floating_point() else n[name].numpy()
        assert np.array_equal(values.numpy().ravel(), expected.astype(values.numpy().dtype)), name
        wide = n[name].double() + (t[name].double() - o[name].double())
        assert torch.equal(wide - n[name].double(), t[name].double() - o[name].double())
    assert made["recipe"] == {"port": tuned, "old": old, "new": new} and made["sweeps"] == 1
    assert before.items() <= hashes(tmp_path).items()


def test_the_order_of_patches_does_not_matter(three: tuple[str, str, str], tmp_path: Path) -> None:
    old, new, first = three
    second = str(write_model(tmp_path / "second", fine_tuned(read_model(Path(old)), 7)))
    for name, (one, other) in {"ab": (first, second), "ba": (second, first)}.items():
        mergebench.port(old, new, one, tmp_path / f"{name}1")
        mergebench.port(old, str(tmp_path / f"{name}1"), other, tmp_path / name)
    found, again = read_model(tmp_path / "ab"), read_model(tmp_path / "ba")
    assert all(torch.allclose(found[name].double(), again[name].double(), atol=1e-6, rtol=0) for name in found)


def test_as_transformers_computes(tmp_path: Path) -> None:
    """The state dicts added in PyTorch, and the ported file, answer alike."""
    save(tmp_path, "lora", KINDS["LoRA"][1])
    old = tmp_path / "base"
    new, tuned = updated(old, tmp_path / "new"), updated(old, tmp_path / "tuned", 6)
    mergebench.port(str(old), str(new), tuned, tmp_path / "out")
    mergebench.port(str(old), str(old), tuned, tmp_path / "same")
    torch.testing.assert_close(logits(tmp_path / "same"), logits(tuned), rtol=0, atol=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(new).eval()
    o, t = load_file(old / "model.safetensors"), load_file(tuned / "model.safetensors")
    model.load_state_dict({name: value + (t[name] - o[name]) for name, value in model.state_dict().items()})
    with torch.no_grad():
        expected = model(torch.arange(10).view(2, 5)).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-5)
    assert "(arXiv:2410.10870)" in (tmp_path / "out" / "README.md").read_text()


# -- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, kind", [(LLAMA, "LoRA"), (LLAMA, "rsLoRA"), (GPT2, "Conv1D"), (LLAMA, "DoRA")])
def test_an_adapter_keeps_its_parameters(tmp_path: Path, config: Any, kind: str) -> None:
    """PEFT loads the ported adapter on the new base; folding gives what PEFT gives."""
    settings = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = save(tmp_path, "lora", settings if kind == "Conv1D" else KINDS[kind][1], config)
    new = updated(tmp_path / "base", tmp_path / "new")
    made = mergebench.port(str(tmp_path / "base"), str(new), adapter, tmp_path / "out").provenance
    before, after = hashes(adapter), hashes(tmp_path / "out")
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    about = [json.loads((place / "adapter_config.json").read_text()) for place in (adapter, tmp_path / "out")]
    assert about[1] == about[0] | {"base_model_name_or_path": str(new)} and about[0] != about[1]
    assert any("dora is a function" in line for line in made["notes"]) == (kind == "DoRA")
    assert made["identities"] == {
        "old": identity(open_model(str(tmp_path / "base"))),
        "new": identity(open_model(str(new))),
    }
    expected = merged(new, tmp_path / "out")
    for name, value in open_model(f"{new}+{tmp_path / 'out'}").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_the_difference_of_an_adapter(tmp_path: Path, kind: str) -> None:
    """new + (f(old) - old): of a LoRA the folded port within roundings, of DoRA another model."""
    adapter = save(tmp_path, "lora", KINDS[kind][1])
    old, new = tmp_path / "base", updated(tmp_path / "base", tmp_path / "new")
    mergebench.port(str(old), str(new), adapter, tmp_path / "out", difference=True)
    found, n = read_model(tmp_path / "out"), load_file(new / "model.safetensors")
    o, folded = load_file(old / "model.safetensors"), merged(old, adapter)
    kept = open_model(f"{new}+{adapter}").state_dict()
    far = 0.0
    for name, value in found.items():
        torch.testing.assert_close(value, n[name] + (folded[name] - o[name]), rtol=1e-5, atol=1e-6)
        # W' is rounded in old's fold, in new's fold and in the port's end: three halves of a unit in the last place
        largest = torch.stack([value, kept[name], folded[name]]).abs().amax(0).double()
        unit = torch.finfo(torch.float32).eps * largest
        far = max(far, float(((value.double() - kept[name].double()).abs() / unit).max()))
    assert far <= 1.5 if kind == "LoRA" else far > 1000


def test_tensors_saved_whole_are_told(tmp_path: Path) -> None:
    adapter = save(tmp_path, "lora", KINDS["saved whole"][1], BERT)
    new = updated(tmp_path / "base", tmp_path / "new")
    made = mergebench.port(str(tmp_path / "base"), str(new), adapter, tmp_path / "out").provenance
    assert any("2 tensors saved whole (pooler" in line and "--difference" in line for line in made["notes"])


def test_a_delta_file_gets_the_new_identity(three: tuple[str, str, str], tmp_path: Path) -> None:
    old, new, _ = three
    factors = {"b": torch.randn(8, 2), "a": torch.randn(2, 8)}
    orig = read_model(Path(old))["layers.0.weight"]
    writing = {"layers.0.weight": Writing("low_rank", {"scale": 0.5}, factors, orig=orig)}
    write_file(tmp_path / "patch.safetensors", writing, base=identity(open_model(old)))
    made = mergebench.port(old, new, tmp_path / "patch.safetensors", tmp_path / "out").provenance
    moved = read_file(tmp_path / "out" / "patch.safetensors")
    assert moved.base == made["identities"]["new"] == identity(open_model(new))
    assert any("cannot be reverted" in line for line in made["notes"])
    assert open_model(f"{new}+{tmp_path / 'patch.safetensors'}").remarks
    found = open_model(f"{new}+{tmp_path / 'out' / 'patch.safetensors'}")
    expected = read_model(Path(new))["layers.0.weight"] + 0.5 * factors["b"] @ factors["a"]
    assert not found.remarks
    torch.testing.assert_close(found.state_dict()["layers.0.weight"], expected)


def test_bits_do_not_depend_on_shards(three: tuple[str, str, str], tmp_path: Path) -> None:
    mergebench.port(*three, tmp_path / "out")
    again = mergebench.run(plan_port(*three, workers=1, shard_size=200), tmp_path / "small")
    found, expected = read_model(tmp_path / "small"), read_model(tmp_path / "out")
    assert len(names(again.out)) > len(names(tmp_path / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert mergebench.port(*three, tmp_path / "out", resume=True).already_done
