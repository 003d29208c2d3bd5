"""Documents a page is made of, made up: four models on three tasks, a search, statistics, provenance."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mergebench.engine.profile import Counts
from mergebench.evaluation import Record, Results, save
from mergebench.evaluation.page.profile import Profile
from mergebench.evaluation.task import Prediction, accuracy

ROLES = {"base": "base", "base+a/tweets": "input", "base+a/nouns": "input", "linear": "baseline", "pcb": "merged"}
TASKS = ("tweets", "nouns", "reviews")
SHARE = {"base": 0.5, "base+a/tweets": 0.7, "base+a/nouns": 0.7, "linear": 0.65, "pcb": 0.75}


def results(roles: dict[str, Any] = ROLES, tasks: tuple[str, ...] = TASKS, n: int = 40, **made: Any) -> Results:
    """Right and wrong answers by a fixed draw; a task's own fine-tune is the input that ends like it."""
    values = {}
    for model in roles:
        for task in tasks:
            draw = random.Random(f"{model} {task}")
            answers = {f"{task}-{i}": draw.random() < SHARE.get(model, 0.6) for i in range(n)}
            values[model, task] = accuracy(
                {i: Prediction("good" if r else "bad", float(r)) for i, r in answers.items()}
            )
    own = {task: next((model for model in roles if model.endswith(f"/{task}")), None) for task in tasks}
    records = []
    for (model, task), score in values.items():
        home = own[task]
        relative = None if home is None else score.value / values[home, task].value
        records.append(
            Record(
                model, roles[model], task, "test", "accuracy", "higher", score.value, score.stderr, n, relative, 0.1,
                score.predictions,
            )
        )  # fmt: skip
    return Results({"date": "2026-01-02T03:04:05+00:00", "seconds": 1.5, "device": "cpu", **made}, tuple(records))


def search(points: int = 12, words: bool = True) -> dict[str, Any]:
    """As `mergebench search` writes it; the last point failed."""
    draw = random.Random(0)
    found: list[dict[str, Any]] = []
    for number in range(points):
        values: dict[str, Any] = {"lambda": draw.uniform(0.2, 1.2)} | ({"variant": draw.choice("xy")} if words else {})
        tasks = {"tweets": draw.uniform(0.8, 0.9), "nouns": draw.uniform(0.6, 0.7), "reviews": 0.5}
        objective = sum(tasks.values()) / 3
        found.append(
            {"number": number, "values": values, "tasks": tasks, "objective": objective, "error": None, "seconds": 1.0}
        )
    best = max(found[:-1], key=lambda point: point["objective"])["number"] if points > 1 else None
    found[-1] |= {"tasks": {}, "objective": None, "error": "it makes nan of finite values"}
    made = {
        "objective": "mean",
        "direction": "higher",
        "metrics": dict.fromkeys(("tweets", "nouns", "reviews"), "accuracy"),
    }
    return {"made": made, "points": found, "best": best}


def profile(layers: int = 3) -> Profile:
    """Two kinds of tensors in each layer, and an embedding that nobody changed."""
    counts = {"embed.weight": Counts(80, (0.0, 0.0), 0, 0, 0.0, (0, 0))}
    for layer in range(layers):
        counts[f"layers.{layer}.mlp.up.weight"] = Counts(50, (4.0, 9.0), 40, 10, 6.25, (5, 10 + layer))
        counts[f"layers.{layer}.mlp.down.weight"] = Counts(50, (12.0, 0.0), 0, 0, 2.75, (15, 0))
    return Profile("pcb", ("tweets", "nouns"), 1, True, {name: one.elements for name, one in counts.items()}, counts)


def edit(**more: Any) -> dict[str, Any]:
    """One entry of a provenance's `edits`."""
    probe = {"file": "probe.safetensors", "sha256": "cd" * 32, "layer": 25, "test_accuracy": 0.8125}
    parameters = {"rows": "4.65%", "alpha": 1.08, "select": "min-cos", "op": "add"}
    whole = {"edit": "surgery", "patch": "patch.safetensors", "probe": probe, "parameters": parameters}
    whole |= {"target": "gate_proj", "rows": 1229, "of": 26460, "by_layer": {"0": 12, "3": 1000, "10": 217}}
    whole |= {
        "share": 0.0065,
        "alpha": 1.08,
        "relative_step": 3.2,
        "cosine": {"candidates": {"50": 0.001}, "least": -0.21, "most": -0.0512},
    }
    return whole | {"z": -2.31, "warnings": [], **more}


def provenance(**more: Any) -> dict[str, Any]:
    recipe = {"merge_method": "pcb", "base_model": "base", "models": [{"model": "a/tweets"}, {"model": "a/nouns"}]}
    about = {"name": "pcb", "paper": "arXiv:2410.02396", "scope": "model"}
    inputs = [{"file": "base/model.safetensors", "size": 1234567, "header_sha256": "ab" * 32}]
    whole = {"recipe": recipe, "method": about, "inputs": inputs, "sweeps": 3, "bytes_read": 90_856_960, "seconds": 1.3}
    return whole | {"merged_tensors": 6, "copied_tensors": 1, "peak_memory": 409_280_512, **more}


def write_all(directory: Path) -> Path:
    """A directory that has everything."""
    directory.mkdir(parents=True, exist_ok=True)
    save(results(), directory)
    (directory / "search.json").write_text(json.dumps(search()))
    (directory / "mergebench.json").write_text(json.dumps(provenance()))
    profile().save(directory)
    return directory
