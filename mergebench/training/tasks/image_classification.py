"""Image classification: an encoder of patches and a linear head on its pooled last states."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.evaluation.labelled import read_images
from mergebench.networks.features import POOLINGS, Pooling
from mergebench.parameters import param
from mergebench.training.classification import Classification
from mergebench.training.task import PARTS, Common, TrainingTask, training_task


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    """Images with labels."""

    image: str = param("image", "the column with the image's path, from the data file's folder")
    label: str = param("label", "the column with the label")
    pooling: str = param("cls+mean", "of the last states", choices=POOLINGS)
    normalize: bool = param(False, "features scaled to length one")


@training_task
def image_classification(p: Params) -> TrainingTask:
    """Images with labels, as a suite's image-classification measures them."""
    files = {part: file for part in PARTS if (file := getattr(p, part)) is not None}
    data = {
        part: read_images(file, p.id, p.image, p.label, p.limit if part == "train" else None, 0)
        for part, file in files.items()
    }
    return Classification(data, list(files.values()), Pooling(p.pooling, p.normalize), None)
