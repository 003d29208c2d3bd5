"""Image classification: an encoder of patches and a linear head on its pooled last states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergebench.evaluation.labelled import Labelled, read_images
from mergebench.networks.features import POOLINGS, Pooling
from mergebench.parameters import param
from mergebench.training import classification
from mergebench.training.task import TrainingTask, training_task


@dataclass(frozen=True, kw_only=True)
class Params(classification.Params):
    """Images with labels."""

    image: str = param("image", "the column with the image's path, from the data file's folder")
    pooling: str = param("cls+mean", "of the last states", choices=POOLINGS)


@training_task
def image_classification(p: Params) -> TrainingTask:
    """Images with labels, as a suite's image-classification measures them."""

    def read(file: Path, label: str | None) -> Labelled:
        return read_images(file, p.id, p.image, label)

    return classification.Classification(p, read, Pooling(p.pooling, p.normalize))
