"""What folding an adapter of each PEFT type costs beside folding a LoRA: CPU seconds, and the most memory held.

    python benchmarks/folding_types.py FOLDER [--params 0.55b] [--runs 3] [--types OFT,HRA]

Makes a base (make_models.py), and with PEFT an adapter of each type on the linear layers, all parameters random, in
FOLDER, where they are not there yet. A recipe passes BASE+ADAPTER through with 400 MiB, for LoRA and the type in turn;
user and system time of the process and its workers. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from make_models import PRESETS
from memory import peak
from speed import commit
from transformers import AutoModelForCausalLM

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA": ("LoraConfig", {"r": 16}),
    "LORA, DoRA": ("LoraConfig", {"r": 16, "use_dora": True}),
    "ADALORA": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 9}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "C3A": ("C3AConfig", {"block_size": 256}),
    "DEFT": ("DeftConfig", {"r": 16}),
    "DELORA": ("DeloraConfig", {"r": 16}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 1000}),
    "FROD": ("FrodConfig", {}),
    "GLORA": ("GloraConfig", {}),
    "GRALORA": ("GraloraConfig", {"r": 16}),
    "HIRA": ("HiraConfig", {"r": 16}),
    "HRA": ("HRAConfig", {"r": 16}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "LOHA": ("LoHaConfig", {"r": 16}),
    "LOKR": ("LoKrConfig", {"r": 16}),
    "MISS": ("MissConfig", {"r": 16}),
    "MISS, bat": ("MissConfig", {"r": 16, "init_weights": "bat"}),
    "OFT": ("OFTConfig", {"oft_block_size": 32}),
    "OSF, k and v": ("OSFConfig", {"target_modules": ["k_proj", "v_proj"]}),  # PEFT decomposes each to make one
    "PEANUT": ("PeanutConfig", {"r": 16}),
    "PVERA": ("PveraConfig", {"r": 16}),
    "RANDLORA": ("RandLoraConfig", {"r": 64}),
    "ROAD": ("RoadConfig", {}),
    "SHIRA": ("ShiraConfig", {"r": 16}),
    "SUPERTUNING": ("SupertuningConfig", {"sparsity": 0.99}),
    "TINYLORA": ("TinyLoraConfig", {"r": 2}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": list(range(100))}),
    "UNILORA": ("UniLoraConfig", {"r": 16, "save_indices": True}),
    "VBLORA": ("VBLoRAConfig", {"r": 16, "num_vectors": 256, "vector_length": 256}),
    "VERA": ("VeraConfig", {"r": 64}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 1000}),
}


def make(base: Path, folder: Path, label: str) -> None:
    """An adapter of a type, as PEFT saves it."""
    name, settings = TYPES[label]
    targets = {} if "target_modules" in settings or "token_indices" in settings else {"target_modules": LAYERS}
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, getattr(peft, name)(**targets, **settings))
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.02 * torch.randn_like(value))
        model.save_pretrained(folder)


def seconds(command: list[str]) -> float:
    """User and system time of a command and its children."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", choices=PRESETS, default="0.55b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--types", default=",".join(TYPES), help="such as OFT,HRA; default: all")
    parser.add_argument("--make", action="store_true", help="make the adapters only")
    given = parser.parse_args()
    place = given.folder / given.params
    base, out = place / "base", place / "out"
    if not base.exists():
        script = Path(__file__).with_name("make_models.py")
        command = [sys.executable, str(script), str(place), "--params", given.params, "--models", "0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"commit {commit()}, {given.params}, {given.runs} runs in turn with LoRA\n")
    print(
        "| type | adapter | CPU s | LoRA, CPU s | type / LoRA (least, most) | most memory |\n|---|---|---|---|---|---|"
    )
    commands: dict[str, list[str]] = {}
    labels = [label for label in TYPES if label.partition(",")[0] in given.types.split(",")]
    for label in dict.fromkeys(["LORA", *labels]):
        adapter = place / label.replace(", ", "-").lower()
        if not (adapter / "adapter_model.safetensors").exists():
            command = f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; import folding_types as f; "
            command += f"f.make(f.Path({str(base)!r}), f.Path({str(adapter)!r}), {label!r})"
            if subprocess.run([sys.executable, "-c", command], capture_output=True, check=False).returncode:
                print(f"| {label} | PEFT makes none | | | | |", flush=True)
                continue
        recipe = adapter.with_suffix(".yaml")
        recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}))
        merge = [sys.executable, "-m", "mergebench", "merge", str(recipe), "--out", str(out), "--overwrite", "--quiet"]
        commands[label] = merge
        if given.make:
            continue
        size = (adapter / "adapter_model.safetensors").stat().st_size
        if subprocess.run(merge, capture_output=True, check=False).returncode:  # also warms the page cache
            said = subprocess.run(merge, capture_output=True, text=True, check=False).stderr.splitlines()[0]
            print(f"| {label} | {size / 1e6:.1f} MB | | | {said} | |", flush=True)
            continue
        pairs = [(seconds(merge), seconds(commands["LORA"])) for _ in range(given.runs)]
        ratios = [own / lora for own, lora in pairs]
        own, lora = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        memory = f"{peak(merge) / 1e6:.0f} MB"
        print(f"| {label} | {size / 1e6:.1f} MB | {own:.2f} | {lora:.2f} | {ratio} | {memory} |", flush=True)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
