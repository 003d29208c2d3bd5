"""What folding a LoRA costs beside a plain copy of its base: CPU seconds, and the most memory held.

    python benchmarks/folding.py FOLDER [--params 0.55b] [--rank 16] [--runs 5]

Makes a base (make_models.py) and a LoRA on all its linear layers in FOLDER, where they are not there yet. The same
recipe passes BASE and BASE+LORA through in turn; user and system time of the process and its workers, and the ratio.
`--params wide` has rows of 14,336 columns. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from make_models import PRESETS, shapes
from memory import peak
from safetensors.torch import save_file
from speed import commit


def write_lora(base: str, folder: Path, rank: int) -> None:
    """A LoRA as PEFT saves it, on every linear layer but the head."""
    torch.manual_seed(0)
    factors = {}
    for name, shape in shapes(base).items():
        if len(shape) == 2 and ".layers." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = 0.02 * torch.randn(rank, shape[1])
            factors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(shape[0], rank)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", choices=PRESETS, default="0.55b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    place = given.folder / given.params
    base, lora, out = place / "base", place / f"lora{given.rank}", place / "out"
    if not base.exists():
        script = Path(__file__).with_name("make_models.py")
        command = [sys.executable, script, place, "--params", given.params, "--models", "0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if not lora.exists():
        write_lora(given.params, lora, given.rank)
    commands = {}
    for name, model in {"copy": str(base), "fold": f"{base}+{lora}"}.items():
        recipe = place / f"{name}.yaml"
        recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]}))
        merge = [sys.executable, "-m", "mergebench", "merge", str(recipe), "--out", str(out), "--overwrite", "--quiet"]
        commands[name] = merge
    seconds: dict[str, list[float]] = {"copy": [], "fold": []}
    for run in range(given.runs + 1):  # the first warms the page cache
        for name, command in commands.items():
            before = os.times()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            if run:
                seconds[name].append(used)
    ratios = [fold / copy for copy, fold in zip(seconds["copy"], seconds["fold"], strict=True)]
    memory = peak(commands["fold"])
    shutil.rmtree(out)
    print(f"commit {commit()}, {given.params}, rank {given.rank}, {given.runs} runs in turn\n")
    print("| | copy | fold | fold / copy (least, most) | most memory, fold |\n| --- | --- | --- | --- | --- |")
    medians = [statistics.median(seconds[name]) for name in commands]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
    print(f"| CPU seconds | {medians[0]:.2f} | {medians[1]:.2f} | {ratio} | {memory / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
