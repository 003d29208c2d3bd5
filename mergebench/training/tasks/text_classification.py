"""Text classification: an encoder and a linear head on its pooled last states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergebench.evaluation.labelled import Labelled, read_texts
from mergebench.networks.features import POOLINGS, Pooling
from mergebench.parameters import param
from mergebench.training import classification
from mergebench.training.task import TrainingTask, training_task


@dataclass(frozen=True, kw_only=True)
class Params(classification.Params):
    """Texts with labels."""

    text: str = param("text", "the column with the text")
    max_length: int = param(64, "tokens a text is cut to", low=2)
    pooling: str = param("mean", "of the last states", choices=POOLINGS)


@training_task
def text_classification(p: Params) -> TrainingTask:
    """Texts with labels, as a suite's text-classification measures them."""

    def read(file: Path, label: str | None) -> Labelled:
        return read_texts(file, p.id, p.text, label, p.max_length)

    return classification.Classification(p, read, Pooling(p.pooling, p.normalize), p.max_length)
