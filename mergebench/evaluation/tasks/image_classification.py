"""Image classification: a shared encoder of image patches, each task with a linear head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergebench.evaluation.head import read_head
from mergebench.evaluation.labelled import read_images
from mergebench.evaluation.task import Common, Ready, task
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="JSON lines: an id, an image's path from here and a label each")
    head: Path = param(help="the task's head.safetensors, beside the fine-tune it belongs to")
    id: str = param("id", "the column with the item's id")
    image: str = param("image", "the column with the image's path")
    label: str = param("label", "the column with the label")


@task(network="AutoModel")
def image_classification(p: Params) -> Ready:
    """Accuracy of a linear head on an image encoder's pooled last states."""
    head = read_head(p.head)
    return head.task(read_images(p.data, p.id, p.image, p.label, p.limit, p.seed), p.data)
