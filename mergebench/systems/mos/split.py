"""Split a labelled data set into a sequence of tasks with disjoint classes."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergebench.errors import RecipeError, RunError, did_you_mean
from mergebench.evaluation.labelled import Labelled, read_images, read_texts
from mergebench.systems.mos.config import Config

LEAST = 2  # items of a class: a single item has no spread


@dataclass(frozen=True)
class Data:
    """Items to learn from and to be tested on."""

    train: Labelled
    test: Labelled


def read_data(config: Config) -> Data:
    """Read both files; `RunError` where an item stands in both, a class is too small or only tested."""
    train, test = (read(config, Path(file)) for file in (config.train, config.test))
    for item, where in test.items.items():
        if item in train.items:
            raise RunError(f"{where}: the same item is in {train.items[item]}", "what is learnt is not tested on")
    test.known(set(train.labels), config.train)
    return Data(train, test)


def read(config: Config, file: Path) -> Labelled:
    """One file of items."""
    if config.image is not None:
        return read_images(file, config.id, config.image, config.label)
    assert config.text is not None
    return read_texts(file, config.id, config.text, config.label, config.max_length)


def split(config: Config, data: Data, seed: int) -> list[tuple[str, ...]]:
    """The classes of each task: as the config lists them, or in an order drawn by the seed, in parts of equal size.

    Where they do not divide, the first tasks have one more. `RecipeError` where a listed class is claimed twice, left
    out or unknown; `RunError` where one has too few items, or none of a task is tested.
    """
    counts = Counter(data.train.labels)
    if isinstance(config.tasks, int):
        if config.tasks > len(counts):
            raise RecipeError(f"tasks: {config.tasks} of {len(counts)} classes", "a task has at least one class")
        names = sorted(counts)
        random.Random(seed).shuffle(names)
        size, more = divmod(len(names), config.tasks)
        ends = [size * n + min(n, more) for n in range(config.tasks + 1)]
        tasks = [tuple(names[a:b]) for a, b in itertools.pairwise(ends)]
    else:
        tasks = [tuple(task) for task in config.tasks]
        _check(tasks, counts, config.train)
    if config.statistics != "centroids":
        for name, count in counts.items():
            if count < LEAST:
                what = f"{config.train}: class '{name}' has 1 item, its {config.statistics} takes at least {LEAST}"
                raise RunError(what, "add one, leave the class out, or choose statistics: centroids, which take one")
    for number, task in enumerate(tasks, 1):
        if not set(task) & set(data.test.labels):
            what = f"{config.test}: no item to test is of task {number} of seed {seed} ({', '.join(task)})"
            raise RunError(what, "a task is scored on items of its own")
    return tasks


def _check(tasks: Sequence[tuple[str, ...]], counts: Counter[str], file: str) -> None:
    home: dict[str, int] = {}
    for number, task in enumerate(tasks, 1):
        if not task:
            raise RecipeError(f"tasks: task {number} has no classes", "a task has at least one")
        for name in task:
            if name in home:
                where = f"task {home[name]} and again by task {number}"
                raise RecipeError(f"tasks: class '{name}' is claimed by {where}", "a class belongs to one task")
            if name not in counts:
                what = f"tasks: class '{name}' of task {number} is empty: {file} has no item of it"
                raise RecipeError(what, did_you_mean(name, counts))
            home[name] = number
    missing = sorted(counts.keys() - home.keys())
    if missing:
        raise RecipeError(f"tasks: class '{missing[0]}' is in no task", "list every class, or say how many tasks")
