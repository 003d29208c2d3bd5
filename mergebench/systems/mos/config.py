"""The config of `mergebench cil run`: a YAML file, read strictly.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mergebench.errors import did_you_mean
from mergebench.parameters import make_params, param, parameters_of
from mergebench.recipe.positions import Places, show
from mergebench.recipe.yaml import find, parse, plain, text_of

SHAPE = "a run needs backbone, train, test and tasks"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every key with its default; those of training are the paper's for CIFAR-100 (arXiv:2412.09441)."""

    backbone: str = param(help="the encoder, a directory, BASE+ADAPTER or org/name; its weights stay as they are")
    train: str = param(help="the items to learn from, JSON lines: an id, a text or an image's path, a label each")
    test: str = param(help="the items to be tested on, in the same form")
    id: str = param("id", "the column with the item's id")
    text: str | None = param(None, "the column with the text, where the items are texts")
    image: str | None = param(None, "the column with the image's path, where the items are images")
    label: str = param("label", "the column with the label")
    tasks: int | list[list[str]] = param(
        help="tasks: 5, their classes drawn by the seed, or tasks: [[cat, dog], [car, bus]]; numbers need quotes"
    )
    seeds: list[int] = param([0, 1, 2], "one run each: seeds: [0, 1, 2]", low=0, below=2**32)
    pooling: Literal["mean", "cls", "cls+mean"] | None = param(
        None, "of the last states; cls for images and mean for texts, where not given"
    )
    max_length: int = param(128, "tokens a text is cut to", low=2)
    bottleneck: int = param(16, "the width of an adapter's inner layer", low=1)
    scale: float = param(0.1, "what an adapter's output is multiplied by", above=0)
    dropout: float = param(0.1, "the share of an adapter's inner layer that training leaves out", low=0, below=1)
    epochs: int = param(20, "of a task's training", low=1)
    batch: int = param(48, "items of a training step", low=2)
    lr: float = param(0.03, "the learning rate of the adapters, ten times the head's", above=0)
    weight_decay: float = param(5e-4, "of SGD", low=0)
    orthogonality: float = param(0.1, "the weight of the loss that keeps features of different items apart", low=0)
    alpha: float = param(0.1, "how far each merge goes toward the mean of the adapters before", above=0, high=1)
    statistics: Literal["covariance", "variance", "centroids"] = param(
        "covariance", "what is kept of a class's features"
    )
    align_epochs: int = param(30, "of the head's alignment", low=1)
    align_lr: float = param(0.005, "its learning rate", above=0)
    semantics: Literal["paper", "reference"] = param("paper", "reference: as the published code merges")

    @property
    def kind(self) -> Literal["image", "text"]:
        return "text" if self.image is None else "image"

    @property
    def pools(self) -> Literal["mean", "cls", "cls+mean"]:
        return self.pooling or ("mean" if self.image is None else "cls")


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """Read and check a YAML file or a mapping; `RecipeError` with the place of the error."""
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
    config: Config = make_params(Config, _checked(data, places))
    if (config.text is None) == (config.image is None):
        what = "text or image: one of them says what the items are"
        raise places.error((), what, "image: COLUMN with their paths, or text: COLUMN")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        what = "a seed is given twice" if config.seeds else "an empty list"
        raise places.error(("seeds",), what, "one run each: seeds: [0, 1, 2]")
    files: dict[str, Any] = {}
    for key in ("train", "test"):
        file = find(getattr(config, key), folders)
        if file is None:
            there = "".join(f", then in {folder}" for folder in folders if folder != Path())
            what = f"no such file: {getattr(config, key)}"
            raise places.error((key,), what, f"looked for in the working directory{there}")
        files[key] = str(file)
    base = find(config.backbone, folders, folder=True)
    return replace(config, **files, backbone=config.backbone if base is None else str(base))


def _checked(data: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Each key's value, as its type."""
    parameters = parameters_of(Config)
    values = {}
    for key, value in data.items():
        if key not in parameters:
            raise places.error((key,), "no such key", did_you_mean(key, parameters))
        parameter = parameters[key]
        if value is None and parameter.default is None:
            continue
        complaint = _tasks(value) if key == "tasks" else parameter.complaint(value)
        if complaint is not None:
            raise places.error((key,), f"{complaint}, got {show(value)}", parameter.help)
        values[key] = parameter.plain(value)
    for parameter in parameters.values():
        if parameter.required and parameter.name not in values:
            raise places.error((parameter.name,), "missing", f"{SHAPE}: {parameter.help}")
    return values


def _tasks(value: object) -> str | None:
    """What `tasks` must be and is not."""
    if isinstance(value, list):
        fits = all(isinstance(task, list) and all(isinstance(c, str) and c for c in task) for task in value)
    else:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if fits else "must be a number of tasks or the classes of each"
