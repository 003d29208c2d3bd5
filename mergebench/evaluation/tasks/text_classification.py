"""Text classification: a shared encoder, each task with a linear head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergebench.errors import RecipeError
from mergebench.evaluation.head import read_head
from mergebench.evaluation.labelled import read_texts
from mergebench.evaluation.task import Common, Ready, task
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="JSON lines: an id, a text and a label each")
    head: Path = param(help="the task's head.safetensors, beside the fine-tune it belongs to")
    id: str = param("id", "the column with the item's id")
    text: str = param("text", "the column with the text")
    label: str = param("label", "the column with the label")
    max_length: int | None = param(None, "tokens a text is cut to; the head's own where not given", low=2)


@task(network="AutoModel")
def text_classification(p: Params) -> Ready:
    """Accuracy of a linear head on an encoder's pooled last states."""
    head = read_head(p.head)
    max_length = p.max_length or head.max_length
    if max_length is None:
        raise RecipeError(f"{p.head}: the head does not say its max_length", "give the task one: max_length: 64")
    data = read_texts(p.data, p.id, p.text, p.label, max_length, p.limit, p.seed)
    return head.task(data, p.data)
