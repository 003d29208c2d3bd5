"""What `mergebench cil run` is told: a YAML file, read strictly.

    backbone: cache/base
    train: cache/digits/train.jsonl
    test: cache/digits/test.jsonl
    image: image
    tasks: 5

Relative paths are looked up in the working directory, then in the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergebench.errors import did_you_mean
from mergebench.recipe.places import Places, show
from mergebench.recipe.source import find, parse, plain, text_of

Word = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Every key with its default; those of training are the paper's for CIFAR-100 (arXiv:2412.09441)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: Word  # a directory, BASE+ADAPTER or org/name; its weights stay as they are
    train: Word  # JSON lines: an id, a text or an image's path, a label each
    test: Word  # the same, of other items
    id: Word = "id"  # columns
    text: Word | None = None
    image: Word | None = None
    label: Word = "label"
    tasks: Count | list[list[Word]]  # how many, their classes drawn by the seed; or the classes of each
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0, 1, 2]
    pooling: Literal["mean", "cls", "cls+mean"] | None = None  # of the last states; cls for images, mean for texts
    max_length: Annotated[int, Field(ge=2)] = 128  # tokens a text is cut to
    bottleneck: Count = 16  # width of the adapters' inner layer
    scale: Positive = 0.1
    dropout: Share = 0.1
    epochs: Annotated[int, Field(ge=0)] = 20  # of a task; 0 leaves the encoder as it is
    batch: Annotated[int, Field(ge=2)] = 48
    lr: Positive = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    orthogonality: Annotated[float, Field(ge=0)] = 0.1
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1  # how far each merge goes toward the mean of the adapters before
    statistics: Literal["covariance", "variance", "centroids"] = "covariance"
    align_epochs: Count = 30
    align_lr: Positive = 0.005
    semantics: Literal["paper", "reference"] = "paper"

    @property
    def kind(self) -> Literal["image", "text"]:
        return "text" if self.image is None else "image"

    @property
    def pools(self) -> Literal["mean", "cls", "cls+mean"]:
        return self.pooling or ("mean" if self.image is None else "cls")


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """Read and check a YAML file or a mapping; `RecipeError` with the place of what is wrong."""
    folders: list[Path] = []
    if isinstance(source, Mapping):
        places = Places({(): "config"})
        data = plain(source, (), places)
    else:
        path = Path(source)
        places = Places({(): str(path)})
        data, folders = parse(text_of(path), str(path), places), [path.parent]
    if not isinstance(data, dict):
        hint = "begin with backbone:, train:, test: and tasks:"
        raise places.error((), f"must be a mapping, got {show(data)}", hint)
    try:
        config = Config.model_validate(data, strict=True)
    except ValidationError as error:
        raise _said(error, data, places) from None
    if (config.text is None) == (config.image is None):
        what = "text or image: one of them says what the items are"
        raise places.error((), what, "image: COLUMN with their paths, or text: COLUMN")
    if len(set(config.seeds)) < len(config.seeds):
        raise places.error(("seeds",), "a seed is given twice")
    found = {}
    for key in ("train", "test"):
        file = find(getattr(config, key), folders)
        if file is None:
            there = "".join(f", then in {folder}" for folder in folders if folder != Path())
            what = f"no such file: {getattr(config, key)}"
            raise places.error((key,), what, f"looked for in the working directory{there}")
        found[key] = str(file)
    base = find(config.backbone, folders, folder=True)
    found["backbone"] = config.backbone if base is None else str(base)
    return config.model_copy(update=found)


def _said(error: ValidationError, data: Mapping[str, Any], places: Places) -> Exception:
    """The first complaint, at its place."""
    first = error.errors()[0]
    loc = tuple(part for part in first["loc"] if part in data or isinstance(part, int) or len(first["loc"]) == 1)
    if first["type"] == "extra_forbidden":
        return places.error(loc, "no such key", did_you_mean(str(loc[-1]), Config.model_fields))
    if first["type"] == "missing":
        return places.error(loc, "missing", "a run needs backbone, train, test and tasks")
    if loc[:1] == ("tasks",):
        what = f"must be a number of tasks or the classes of each, got {show(data['tasks'])}"
        return places.error(
            loc[:1], what, "tasks: 5, or tasks: [[cat, dog], [car, bus]]; quote classes that are numbers"
        )
    message = first["msg"][0].lower() + first["msg"][1:]
    return places.error(loc, f"{message}, got {show(first['input'])}")
