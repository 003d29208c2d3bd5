"""A task of lm-evaluation-harness: one of its own by name, or a task file as it reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.errors import RecipeError, did_you_mean
from mergebench.evaluation import harness
from mergebench.evaluation.network import Network
from mergebench.evaluation.task import Common, Prediction, Ready, Score, Tick, key, task
from mergebench.evaluation.tasks.multiple_choice import likeliest
from mergebench.evaluation.tasks.perplexity import METRICS, stderr

ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    task: Path | str = key("a task's name, such as arc_easy, or a task file in YAML")
    metric: str | None = key("one of the task's; the first one where not given", None)


@task(network="AutoModelForCausalLM")
def lm_eval(p: Params) -> Ready:
    """Whatever lm-evaluation-harness measures, as it measures it."""
    harness.require("lm-eval")
    own = harness.own_task(p.task)
    aggregations = own.aggregation()
    metric = p.metric or next(iter(aggregations))
    if metric not in aggregations:
        raise RecipeError(f"lm-eval's '{p.task}' has no metric '{metric}'", did_you_mean(metric, aggregations))
    numbers = range(len(own.eval_docs))[: p.limit]

    def measure(network: Network, tick: Tick) -> Score:
        metrics, samples = harness.ask(network, own, len(numbers), tick, picked=numbers)
        predictions = {
            str(sample["doc_id"]): Prediction(_answer(own, sample), _score(sample[metric], aggregations[metric], metric))
            for sample in samples
        }
        reader = samples[0]["filter"]
        error = metrics[f"{metric}_stderr,{reader}"]
        if metric in METRICS:
            error = stderr([sample[metric] for sample in samples], metric)
        return Score(
            float(metrics[f"{metric},{reader}"]),
            error if isinstance(error, float) and math.isfinite(error) else None,
            len(samples),
            predictions,
            "accuracy" if metric in ACCURACIES else metric,
            "higher" if own.higher_is_better()[metric] else "lower",
        )

    return Ready(len(numbers), measure, files=tuple(_files(own, p.task)))
