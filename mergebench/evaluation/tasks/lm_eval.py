"""A task of lm-evaluation-harness: one of its own by name, or a task file as it reads them."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import read_bytes
from mergebench.errors import RecipeError, RunError, did_you_mean
from mergebench.evaluation import harness
from mergebench.evaluation.harness_tasks import own_task
from mergebench.evaluation.task import Common, Item, Prediction, Ready, Score, cut, task
from mergebench.evaluation.tasks.multiple_choice import likeliest
from mergebench.evaluation.tasks.perplexity import METRICS, stderr
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param

ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    task: Path | str = param(help="a task's name, such as arc_easy, or a task file in YAML")
    metric: str | None = param(None, "one of the task's; the first one where not given")


@task(network="AutoModelForCausalLM")
def lm_eval(p: Params) -> Ready:
    """Whatever lm-evaluation-harness measures, as it measures it."""
    versions = harness.needed("lm-eval")
    own = own_task(p.task)
    aggregations = own.aggregation()
    metric = p.metric or next(iter(aggregations))
    if metric not in aggregations:
        raise RecipeError(f"{p.task}: the task has no metric '{metric}'", did_you_mean(metric, aggregations))
    documents = own.eval_docs
    numbers: Sequence[int] = range(len(documents))
    if p.limit is not None and p.limit < len(documents):
        chosen = numbers[: p.limit] if p.seed is None else random.Random(p.seed).sample(numbers, p.limit)
        numbers = sorted(chosen)

    def measure(network: Network, tick: Tick) -> Score:
        metrics, samples = harness.ask(network, own, len(numbers), tick, picked=numbers)
        predictions = {}
        for sample in samples:
            score = _score(p, metric, sample[metric], aggregations[metric])
            predictions[str(sample["doc_id"])] = Prediction(_answer(own, sample, metric), score)
        reader = samples[0]["filter"]
        error = metrics[f"{metric}_stderr,{reader}"]
        if metric in METRICS:
            error = stderr([sample[metric] for sample in samples], metric)
        return Score(
            float(metrics[f"{metric},{reader}"]),
            float(error) if isinstance(error, float) and math.isfinite(error) else None,
            len(samples),
            predictions,
            "accuracy" if metric in ACCURACIES else metric,
            "higher" if own.higher_is_better()[metric] else "lower",
        )

    items = {_digest(documents[i]): f"{p.task}: document {i}" for i in numbers}
    data = hashlib.sha256("".join(items).encode()).hexdigest()  # of the hub, they may change under their name
    told = {str(i): Item(cut(text)) for i in numbers if (text := _question(own, documents[i]))}
    return Ready(len(numbers), measure, tuple(_files(own, p.task)), items, told, {**versions, "data": data})


def _question(own: Any, document: Any) -> str:
    """What a document asks, without the examples before it; nothing where the task does not say it."""
    try:
        said = (own.doc_to_text(document), own.doc_to_target(document))
    except Exception:  # a task's own function
        return ""
    return next((text for text in said if isinstance(text, str) and text.strip()), "")  # a number is of a choice


def _answer(own: Any, sample: dict[str, Any], metric: str) -> str:
    """What the model answered: the likeliest choice, or what it wrote; of a text that is only read, nothing."""
    if own.OUTPUT_TYPE == "multiple_choice":
        return likeliest(sample, own.doc_to_choice(sample["doc"]), metric)
    return str(sample["filtered_resps"][0]) if own.OUTPUT_TYPE == "generate_until" else ""


def _score(p: Params, metric: str, value: object, aggregation: Any) -> float:
    """An item's score is the metric of that item alone."""
    pair = isinstance(value, tuple) and metric in METRICS
    if not (pair or isinstance(value, (int, float))):
        raise RunError(f"{p.task}: metric '{metric}' has no value for one item", "choose another: metric: acc")
    return float(aggregation([value]))


def _digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(own: Any, task: Path | str) -> Iterable[Path]:
    """The task file, what it includes and calls, and the data it names, where they are files of this machine."""
    if isinstance(task, Path):
        yield task
        text = read_bytes(task).decode(errors="replace")
        for sign, pattern in (("include:", "*.y*ml"), ("!function", "*.py")):
            yield from sorted(task.parent.glob(pattern)) if sign in text else []
        named = (own.config.dataset_kwargs or {}).get("data_files") or []
        for entry in named.values() if isinstance(named, dict) else [named]:
            for name in [entry] if isinstance(entry, str) else entry:
                places = (Path(name), task.parent / name)
                yield from [place for place in places if place.is_file()][:1]
