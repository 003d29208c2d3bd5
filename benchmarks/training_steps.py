"""Seconds of a training step: `mergebench train` against a plain loop over PEFT's LoRA, on the same items.

    python recipes/systems/fetch.py
    python benchmarks/training_steps.py [--steps 30] [--runs 5] [--kinds hut bias full]

The plain loop is what a user of PEFT writes: tokens padded to the longest text of a batch, cross-entropy of a linear
head on the mean of the last states, AdamW, gradients clipped. Both train the quickstart's base, MiniLM, with a LoRA of
rank 8 on every linear layer, in the same batches of 32 product reviews. The runs alternate; the figure is the median of
the ratios of CPU seconds, and of wall seconds. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import commit
from torch.nn.functional import cross_entropy

from mergebench.deltas.open import open_model
from mergebench.networks.network import Network
from mergebench.training import load_config
from mergebench.training.config import Config
from mergebench.training.loop import fit
from mergebench.training.objectives.task import task as own_loss
from mergebench.training.once import Once
from mergebench.training.processes import join
from mergebench.training.student import Student

SYSTEMS = Path(__file__).resolve().parent.parent / "recipes" / "systems"
BASE = SYSTEMS.parent / "quickstart" / "cache" / "base"
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
BATCH = 32
CPU = torch.device("cpu")


def config_of(steps: int, **what: Any) -> Config:
    """A config of so many steps; no validation items, so that nothing is measured within."""
    task = {"kind": "text-classification", "train": str(SYSTEMS / "cache" / "products.jsonl")}
    settings = {"max_steps": steps, "batch": BATCH, "lr": 1e-3, "every": steps}
    return load_config({"model": str(BASE), "task": task, **settings, **what})


def ours(config: Config) -> Callable[[], object]:
    """A training by this project, ready to start."""
    row = config.rows[0]
    model = open_model(str(BASE))
    student: Student = Once(row, model, config, CPU, 0, 1e-3).attach()
    loss: Any = own_loss(None, own_loss.params())  # type: ignore[arg-type]

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder:
            return fit(student, loss, row.settings, lr=1e-3, seed=0, directory=Path(folder))

    return run


def plain(config: Config) -> Callable[[], object]:
    """A plain loop over PEFT's LoRA, ready to start; its batches are those of the sampler."""
    import peft
    from transformers.trainer_pt_utils import LengthGroupedSampler

    row = config.rows[0]
    network = Network(open_model(str(BASE)), "AutoModel", CPU, packed=False)
    settings = {key: value for key, value in LORA.items() if key != "peft_type"}
    model = peft.get_peft_model(network.module, peft.LoraConfig(task_type="FEATURE_EXTRACTION", **settings))
    task: Any = row.task
    lengths, targets = task.lengths(network, "train"), task.targets("train")
    tokens = task._data["train"].inputs.tokens(network)
    head = torch.nn.Linear(network.hidden, len(task.labels))
    parameters = [*(one for one in model.parameters() if one.requires_grad), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    order = list(LengthGroupedSampler(BATCH, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def run() -> None:
        model.train()
        for step in range(row.settings.max_steps or 0):
            items = batches[step % len(batches)]
            ids, mask = network.padded([tokens[i] for i in items])
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            rows = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            optimizer.zero_grad()
            cross_entropy(head(rows), targets[items]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return run


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", default=[], help="kinds of deltas to time too")
    args = parser.parse_args()
    join(CPU)
    configs = {"lora": config_of(args.steps, peft=LORA)}
    configs |= {name: config_of(args.steps, delta=name) for name in args.kinds}
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.runs + 1):
        for name, config in (("plain", configs["lora"]), *configs.items()):
            found.setdefault(name, []).append(timed(plain(config) if name == "plain" else ours(config)))
    print(f"commit {commit()}, {torch.get_num_threads()} threads, {args.steps} steps, {args.runs} runs\n")
    print("| | ms a step, wall | CPU, against the plain loop | wall, against the plain loop |\n|---|---:|---:|---:|")
    for name, times in found.items():
        ratios = [[one[i] / base[i] for one, base in zip(times[1:], found["plain"][1:], strict=True)] for i in (0, 1)]
        cpu, wall = (f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios)
        print(
            f"| {name} | {1000 * statistics.median(wall for _, wall in times[1:]) / args.steps:.0f} | {cpu} | {wall} |"
        )


if __name__ == "__main__":
    main()
