"""Perplexity: how well a causal language model foretells texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergebench.evaluation import harness
from mergebench.evaluation.task import Common, Prediction, Ready, Score, asked, task
from mergebench.networks.items import contents, read_rows, texts
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param

METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="JSON: an id and a text each")
    id: str = param("id", "the column with the item's id")
    text: str = param("text", "the column with the text")
    metric: str = param("bits_per_byte", "over the bytes or the words of all texts", choices=METRICS)


@task(network="AutoModelForCausalLM")
def perplexity(p: Params) -> Ready:
    """Perplexity of whole texts, each after the model's first token; by byte or word, so that tokenizers compare."""
    versions = harness.needed("perplexity")
    rows = read_rows(p.data, p.id, (p.text,), p.limit, p.seed)
    written = texts(rows, p.text)
    documents = [{"text": text} for text in written]

    def measure(network: Network, tick: Tick) -> Score:
        local = harness.local_task(
            "loglikelihood_rolling",
            documents,
            doc_to_text=lambda document: "",
            doc_to_target=lambda document: document["text"],
            metric_list=[
                {"metric": name, "aggregation": _aggregation(name), "higher_is_better": False}
                for name in dict.fromkeys((p.metric, "bits_per_byte"))
            ],
        )
        metrics, samples = harness.ask(network, local, len(rows), tick)
        predictions = {
            row.id: Prediction("", -likelihood / count / math.log(2))
            for row, sample in zip(rows, samples, strict=True)
            for likelihood, count in (sample["bits_per_byte"],)
        }
        value = metrics[f"{p.metric},none"]
        return Score(
            value, stderr([sample[p.metric] for sample in samples], p.metric), len(rows), predictions, p.metric, "lower"
        )

    return Ready(
        len(rows), measure, files=(p.data,), items=contents(rows), asked=asked(rows, written), versions=versions
    )


def _aggregation(metric: str) -> str:
    return "bits_per_byte" if metric == "bits_per_byte" else "weighted_perplexity"


def stderr(pairs: Sequence[tuple[float, float]], metric: str) -> float | None:
    """Of r = -sum(l) / sum(c), texts of log-likelihoods l and counts c drawn together: linearized (the delta method),
    s(r)^2 = sum((l + r c)^2) / (n (n - 1) mean(c)^2); s(exp r) = exp(r) s(r), in bits s(r) / ln 2. None of one text."""
    n = len(pairs)
    if n < 2:
        return None
    total = sum(count for _, count in pairs)
    r = -sum(likelihood for likelihood, _ in pairs) / total
    spread = sum((likelihood + r * count) ** 2 for likelihood, count in pairs)
    s = math.sqrt(spread / (n * (n - 1))) / (total / n)
    return s / math.log(2) if metric == "bits_per_byte" else s * math.exp(r)
