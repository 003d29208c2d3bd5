"""Text classification: a shared encoder, each task with a linear head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergebench.errors import ModelError, RecipeError, RunError, did_you_mean
from mergebench.evaluation.batch import CPU_TOKENS, GPU_TOKENS, batches, run_batches
from mergebench.evaluation.head import read_head
from mergebench.evaluation.items import contents, read_rows
from mergebench.evaluation.network import Network
from mergebench.evaluation.task import Common, Prediction, Ready, Score, Tick, accuracy, key, task


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = key("JSON lines: an id, a text and a label each")
    head: Path = key("the task's head.safetensors, beside the fine-tune it belongs to")
    id: str = key("the column with the item's id", "id")
    text: str = key("the column with the text", "text")
    label: str = key("the column with the label", "label")
    max_length: int | None = key("tokens a text is cut to; the head's own where not given", None, low=2)


@task(network="AutoModel")
def text_classification(p: Params) -> Ready:
    """Accuracy of a linear head on an encoder's pooled last states."""
    head = read_head(p.head)
    max_length = p.max_length or head.max_length
    if max_length is None:
        raise RecipeError(f"{p.head}: the head does not say its max_length", "give the task one: max_length: 64")
    ids: list[str] = []
    texts: list[str] = []
    labels: list[str] = []
    rows = read_rows(p.data, p.id, (p.text, p.label), p.limit, p.seed)
    for row in rows:
        text, label = row.values
        if not isinstance(text, str):
            raise RunError(f"{row.where}: {p.text} must be text, got {text!r:.60}")
        label = str(label) if type(label) is int else label
        if label not in head.labels:
            close = did_you_mean(label, head.labels) if isinstance(label, str) else None
            raise RunError(f"{row.where}: {p.label} {label!r:.60} is none of the labels of {p.head}", close)
        ids.append(row.id)
        texts.append(text)
        labels.append(label)
    tokenized: dict[str, list[list[int]]] = {}  # by tokenizer: candidates mostly share one

    def measure(network: Network, tick: Tick) -> Score:
        if network.hidden != head.hidden:
            raise ModelError(
                f"{head.file}: it takes {head.hidden} features, model '{network.name}' gives {network.hidden}",
                "a head fits the base it was trained on",
            )
        if network.tokenizer_key not in tokenized:
            tokenized[network.tokenizer_key] = network.tokenize(texts, max_length)
        tokens = tokenized[network.tokenizer_key]

        def classify(group: list[int]) -> Tensor:
            with torch.inference_mode():
                states, mask = network.encode([tokens[i] for i in group])
                return head.logits(states, mask).cpu()

        size = CPU_TOKENS if network.device.type == "cpu" else GPU_TOKENS
        groups = batches([len(one) for one in tokens], size)
        logits = torch.empty(len(texts), len(head.labels))
        for group, result in zip(groups, run_batches(classify, groups, network.device, tick), strict=True):
            logits[group] = result
        if not logits.isfinite().all():
            raise RunError(f"model '{network.name}': its outputs are not finite", "look for NaN or Inf in its weights")
        outputs = [head.labels[i] for i in logits.argmax(1).tolist()]
        return accuracy(
            {i: Prediction(out, float(out == label)) for i, out, label in zip(ids, outputs, labels, strict=True)}
        )

    return Ready(len(texts), measure, files=(p.data, p.head), items=contents(rows), home=p.head.parent)
