"""A LoRA folded into its base: what PEFT's merge_and_unload gives, as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import hashes, names, read_model
from safetensors.torch import save_file

import mergebench
from tests.adapters.test_merge import KINDS, loaded, save
from tests.conftest import Cli


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "patterns", "DoRA"])
def test_as_peft_folds(cli: Cli, tmp_path: Path, kind: str) -> None:
    adapter = save(tmp_path, "lora", KINDS[kind][1])
    before = hashes(tmp_path)
    code, out, err = cli("adapters", "fold", adapter, "--base", tmp_path / "base", "--out", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert f"{adapter} folded into " in err and f" tensors of {tmp_path / 'base'}, as it is: wrote " in err
    assert before.items() <= hashes(tmp_path).items()
    expected = loaded(tmp_path, adapter).merge_and_unload()
    tensors = expected.state_dict()
    for name, value in read_model(tmp_path / "out").items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-5, atol=1e-6)
    folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = torch.arange(10).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs).logits, expected.eval()(inputs).logits, rtol=1e-4, atol=1e-5)


def test_it_is_the_engines_work(cli: Cli, tmp_path: Path) -> None:
    """The bits of the recipe, whatever the memory; the engine's provenance, --resume and --overwrite."""
    adapter = save(tmp_path, "lora", KINDS["LoRA"][1])
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{adapter}"}]}
    mergebench.run(mergebench.plan(mergebench.load(recipe)), tmp_path / "recipe")
    fold = ["adapters", "fold", adapter, "--base", tmp_path / "base", "--out", tmp_path / "out"]
    code, out, err = cli(*fold, "--json", "--memory", "20MiB", "--workers", "1", "--shard-size", "4kB")
    made = json.loads(out)
    assert (code, err) == (0, "") and made["recipe"]["models"] == recipe["models"] and made["sweeps"] == 1
    found, expected = read_model(tmp_path / "out"), read_model(tmp_path / "recipe")
    assert len(names(tmp_path / "out")) > len(names(tmp_path / "recipe"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    code, _, err = cli(*fold, "--shard-size", "4kB", "--resume")
    assert code == 0 and "already finished" in err
    code, _, err = cli(*fold)
    assert code == 2 and "it holds a finished result" in err
    assert cli(*fold, "--overwrite", "-q") == (0, f"{tmp_path / 'out'}\n", "")


def test_errors(cli: Cli, tmp_path: Path) -> None:
    base, lora = tmp_path / "base", save(tmp_path, "lora", KINDS["LoRA"][1])
    other = tmp_path / "other"
    save(other, "lora", {"r": 2, "target_modules": ["query"]}, KINDS["bias of B"][0])
    prompts, later = tmp_path / "prompts", tmp_path / "later"
    for place, kind in ((prompts, "PROMPT_TUNING"), (later, "LATER")):
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        save_file({"prompt_embeddings": torch.ones(3)}, place / "adapter_model.safetensors")
    bottleneck = tmp_path / "01.safetensors"
    save_file({"layers.0.down.weight": torch.ones(2, 4)}, bottleneck, metadata={"kind": "bottleneck", "scale": "0.1"})
    table: list[tuple[list[Any], int, str, str]] = [
        ([bottleneck, "--base", base], 3, "an adapter of type bottleneck is not folded, only", "no weights do"),
        ([prompts, "--base", base], 3, "PROMPT_TUNING is no difference of weights: its tensors are prompts", ""),
        ([later, "--base", base], 3, "an adapter of type LATER is not folded", "merge_and_unload()"),
        ([lora, "--base", other / "base"], 3, "the base has no tensor", "trained on another model"),
        ([lora, "--base", lora], 3, "it is an adapter, not a model", "name its base"),
        ([tmp_path / "none", "--base", base], 3, "no such file or directory", ""),
        ([lora, "--base", tmp_path / "none"], 3, "no such file or directory", ""),
        ([lora, "--base", base, "--memory", "much"], 2, "--memory: 'much' is not a size", ""),
    ]
    before = hashes(tmp_path)
    for args, expected, what, hint in table:
        code, out, err = cli("adapters", "fold", *args, "--out", tmp_path / "out")
        assert (code, out) == (expected, ""), (args, err)
        lines = err.splitlines()
        assert lines[0].startswith("error: ") and what in lines[0] and (hint in lines[1] if hint else True), err
        assert hashes(tmp_path) == before
