"""MUSCLE on an old base and its successor: which answers an update loses, and how many of them it need not lose.

    python recipes/systems/fetch.py
    python benchmarks/systems/muscle.py OUT                 # one seed, two masks, half an epoch
    python recipes/systems/fetch.py --all
    python benchmarks/systems/muscle.py OUT --full          # three seeds, all masks: 25 minutes on two cores

The old base is MiniLM. Its successor is MiniLM after training on another task, all weights. Each gets a LoRA for one
task, the old and the new model. The compatibility adapter starts as the new model's LoRA and is trained by MUSCLE's
loss, with each mask. Controls: the new LoRA trained on for as long by the task's own loss, and the mean of the weights
of old and new model, which needs no training. Prints Markdown: accuracy, NFR and PFR against the old model, in percent,
mean over the seeds and standard error; OUT/muscle.png shows them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint import drawing
from mergebench.deltas.open import open_model
from mergebench.evaluation.compare.flips import Answers, Flips, flips
from mergebench.networks.network import Network
from mergebench.systems.muscle import MASKS
from mergebench.training import load_config, train
from mergebench.training.report import mean_and_error

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
SHARES = (0.25, 0.5, 0.75)  # of the new model, where weights are interpolated
MASKED = {f"mask-{mask}": mask for mask in MASKS}
BETWEEN = {f"{share:g} of new": f"{share:g}" for share in SHARES}


def config(task: str, **more: Any) -> dict[str, Any]:
    """A training config on one of the texts."""
    texts = RECIPES / "systems/cache"
    data = RECIPES / ("quickstart/data" if task == "nouns" else "quickstart/cache/data")
    files = {
        "train": texts / f"{task}.jsonl",
        "validation": data / f"{task}-validation.jsonl",
        "test": texts / "nouns-test.jsonl" if task == "nouns" else data / f"{task}.jsonl",
    }
    settings = {"kind": "text-classification", **{part: str(file) for part, file in files.items()}, "limit": 2000}
    return {"task": settings, "bf16": True, "lr": 1e-3, "weight_decay": 0, **more}


def run(written: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Train, or take what an earlier call of this program trained."""
    print(f"<!-- {out} -->", flush=True)
    made = train(load_config(written), out, resume=True)
    return {one["row"]: one for one in made.runs}


def between(old: str, new: str, share: float, task: Any) -> Answers:
    """The answers of weights and heads between two models: (1 - share) old + share new."""
    first, second = (open_model(one) for one in (old, new))
    network = Network(first, task.auto_class, torch.device("cpu"), packed=False)
    heads = [task.head_in(Path(one.rpartition("+")[2])) for one in (old, new)]
    values = first.state_dict(), second.state_dict()
    with torch.no_grad():
        for name, places in network.places.items():
            if places and values[0][name].is_floating_point():
                getattr(*places[0]).copy_(torch.lerp(values[0][name], values[1][name], share))
    head = {name: torch.lerp(one, heads[1][name], share) for name, one in heads[0].items()}
    with torch.inference_mode():
        answers: Answers = task.measure(network, head, "test", lambda items: None).score.predictions
    return answers


def seed_of(out: Path, number: int, task: str, other: str, masks: tuple[str, ...], epochs: float) -> dict[str, Flips]:
    """All of it with one seed; the models against the old one."""
    base, place, seeds = str(RECIPES / "quickstart/cache/base"), out / f"seed-{number}", [number]
    successor = config(other, model=base, delta="full", lr=5e-5, epochs=epochs, seeds=seeds)
    run(successor, place / "successor")
    bases = {"old": base, "new": str(place / f"successor/full/seed-{number}")}
    for name, model in bases.items():
        run(config(task, model=model, peft=LORA, epochs=epochs, seeds=seeds), place / name)
    runs = {name: place / f"{name}/lora/seed-{number}" for name in bases}
    models = {name: f"{bases[name]}+{runs[name]}" for name in bases}
    rows: dict[str, Any] = {f"mask-{mask}": {"objective": {"compatible": {**models, "mask": mask}}} for mask in masks}
    rows["task-alone"] = {"objective": "task"}
    written = config(task, model=bases["new"], peft=LORA, epochs=epochs, lr=5e-4, seeds=seeds, rows=rows)
    trained = run({**written, "from": str(runs["new"])}, place / "compatible")

    loaded = load_config(config(task, model=base, delta="head")).rows[0].task
    answers = {"new": between(models["old"], models["new"], 1, loaded)}
    old = between(models["old"], models["new"], 0, loaded)
    answers |= {
        name: between(models["old"], models["new"], share, loaded) for name, share in zip(BETWEEN, SHARES, strict=True)
    }
    found = {"old": flips(old, old)} | {name: flips(old, one) for name, one in answers.items()}
    for name, one in trained.items():
        reference = f"{bases['new']}+{place / 'compatible' / one['directory']}"
        found[name] = flips(old, between(reference, reference, 0, loaded))
    return found


def cell(values: list[float]) -> str:
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.1f}" + (f" ± {error:.1f}" if error is not None else "")


def plot(found: list[dict[str, Flips]], file: Path) -> None:
    """Accuracy against NFR, means over the seeds with their standard errors: up and to the left is better."""
    drawn: dict[str, int] = {}
    labels: dict[tuple[float, float], list[str]] = {}
    with drawing.plots(drawing.WIDTH, 300, 1, 20) as (canvas, (axes,)):
        for name in found[0]:
            group = "MUSCLE, by mask" if name in MASKED else "between old and new" if name in BETWEEN else name
            place = drawn.setdefault(group, len(drawn))
            label = None if group in axes.get_legend_handles_labels()[1] else group
            x, across = mean_and_error([100 * one[name].nfr for one in found])
            y, along = mean_and_error([100 * one[name].new for one in found])
            colour, mark, _ = drawing.look(place)
            axes.errorbar(x, y, along, across, mark, color=colour, linewidth=1, label=label)
            if group != name:  # one label for what lies in one place
                near = (one for one in labels if abs(one[0] - x) < 0.2 and abs(one[1] - y) < 0.2)
                labels.setdefault(next(near, (x, y)), []).append(MASKED.get(name) or BETWEEN[name])
        for point, names in labels.items():
            axes.annotate("\n".join(names), point, (5, 5), textcoords="offset points", fontsize=10)
        axes.margins(y=0.12)
        axes.set_xlabel("NFR against the old model, % (bars: standard errors)")
        axes.set_title("accuracy, %")
        axes.grid()
        drawing.legend(canvas, drawing.WIDTH)
        drawing.write(canvas, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    seeds, masks, epochs = ((0, 1, 2), MASKS, 2.0) if arguments.full else ((0,), ("muscle", "old"), 0.5)
    task = "nouns" if arguments.full else "products"
    found = [seed_of(arguments.out, one, task, "reviews", masks, epochs) for one in seeds]
    print("| model | accuracy | NFR | NFR if independent | PFR |\n|---|---:|---:|---:|---:|")
    for name in found[0]:
        several = [one[name] for one in found]
        expected = statistics.fmean(one.nfr_expected or 0 for one in several)
        cells = cell([one.new for one in several]), cell([one.nfr for one in several]), f"{100 * expected:.1f}"
        print(f"| {name} | {' | '.join(cells)} | {cell([one.pfr for one in several])} |")
    plot(found, arguments.out / "muscle.png")
    document = [{name: one.to_dict() for name, one in each.items()} for each in found]
    (arguments.out / "muscle.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
