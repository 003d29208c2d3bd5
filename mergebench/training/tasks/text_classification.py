"""Text classification: an encoder and a linear head on its pooled last states."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.evaluation.labelled import read_texts
from mergebench.networks.features import POOLINGS, Pooling
from mergebench.parameters import param
from mergebench.training.classification import Classification
from mergebench.training.task import PARTS, Common, TrainingTask, training_task


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    """Texts with labels."""

    text: str = param("text", "the column with the text")
    label: str = param("label", "the column with the label")
    max_length: int = param(64, "tokens a text is cut to", low=2)
    pooling: str = param("mean", "of the last states", choices=POOLINGS)
    normalize: bool = param(False, "features scaled to length one")


@training_task
def text_classification(p: Params) -> TrainingTask:
    """Texts with labels, as a suite's text-classification measures them."""
    files = {part: file for part in PARTS if (file := getattr(p, part)) is not None}
    data = {
        part: read_texts(file, p.id, p.text, p.label, p.max_length, p.limit if part == "train" else None, 0)
        for part, file in files.items()
    }
    return Classification(data, list(files.values()), Pooling(p.pooling, p.normalize), p.max_length)
