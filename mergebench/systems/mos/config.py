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
from mergebench.recipe.positions import Places, show
from mergebench.recipe.yaml import find, parse, plain, text_of

Word = Annotated[str, Field(min_length=1)]
SHAPE = "a run needs backbone, train, test and tasks"


def _key(default: Any, help: str, **limits: Any) -> Any:
    return Field(default, description=help, **limits)


class Config(BaseModel):
    """Every key with its default; those of training are the paper's for CIFAR-100 (arXiv:2412.09441)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    backbone: Word = _key(..., "the encoder, a directory, BASE+ADAPTER or org/name; its weights stay as they are")
    train: Word = _key(..., "the items to learn from, JSON lines: an id, a text or an image's path, a label each")
    test: Word = _key(..., "the items to be tested on, in the same form")
    id: Word = _key("id", "the column with the item's id")
    text: Word | None = _key(None, "the column with the text, where the items are texts")
    image: Word | None = _key(None, "the column with the image's path, where the items are images")
    label: Word = _key("label", "the column with the label")
    tasks: Annotated[int, Field(ge=1)] | list[list[Word]] = _key(
        ..., "tasks: 5, their classes drawn by the seed, or tasks: [[cat, dog], [car, bus]]; numbers need quotes"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = _key([0, 1, 2], "one run each: seeds: [0, 1, 2]", min_length=1)
    pooling: Literal["mean", "cls", "cls+mean"] | None = _key(
        None, "of the last states; cls for images and mean for texts, where not given"
    )
    max_length: int = _key(128, "tokens a text is cut to", ge=2)
    bottleneck: int = _key(16, "the width of an adapter's inner layer", ge=1)
    scale: float = _key(0.1, "what an adapter's output is multiplied by", gt=0)
    dropout: float = _key(0.1, "the share of an adapter's inner layer that training leaves out", ge=0, lt=1)
    epochs: int = _key(20, "of a task's training", ge=1)
    batch: int = _key(48, "items of a training step", ge=2)
    lr: float = _key(0.03, "the learning rate of the adapters, ten times the head's", gt=0)
    weight_decay: float = _key(5e-4, "of SGD", ge=0)
    orthogonality: float = _key(0.1, "the weight of the loss that keeps features of different items apart", ge=0)
    alpha: float = _key(0.1, "how far each merge goes toward the mean of the adapters before", gt=0, le=1)
    statistics: Literal["covariance", "variance", "centroids"] = _key(
        "covariance", "what is kept of a class's features"
    )
    align_epochs: int = _key(30, "of the head's alignment", ge=1)
    align_lr: float = _key(0.005, "its learning rate", gt=0)
    semantics: Literal["paper", "reference"] = _key("paper", "reference: as the published code merges")

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
        raise places.error((), f"must be a mapping, got {show(data)}", SHAPE)
    try:
        config = Config.model_validate(data, strict=True)
    except ValidationError as error:
        raise _said(error, data, places) from None
    if (config.text is None) == (config.image is None):
        what = "text or image: one of them says what the items are"
        raise places.error((), what, "image: COLUMN with their paths, or text: COLUMN")
    if len(set(config.seeds)) < len(config.seeds):
        raise places.error(("seeds",), "a seed is given twice", "one run each")
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
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return places.error((key,), "no such key", did_you_mean(key, Config.model_fields))
    help = Config.model_fields[key].description
    if first["type"] == "missing":
        return places.error((key,), "missing", f"{SHAPE}: {help}")
    if key == "tasks":
        what = f"must be a number of tasks or the classes of each, got {show(data[key])}"
    else:
        what = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {show(first['input'])}"
    return places.error((key,), what, help)
