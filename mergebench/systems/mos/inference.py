"""Answer the items of a file with a bank, and report each item's path: adapters are retrieved without the task's
label."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.content import Contents
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError, RunError
from mergebench.evaluation.labelled import Labelled, read_images, read_texts
from mergebench.networks.device import device_of
from mergebench.networks.features import Pooling
from mergebench.networks.items import COLUMN_HINT, records
from mergebench.networks.network import Network
from mergebench.systems.mos.bank import Bank, read_bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.manifest import name_of
from mergebench.systems.mos.retrieval import Retrieval, share
from mergebench.systems.mos.variants import Answers, mos


@dataclass(frozen=True)
class Inferred:
    """A bank's answers to items, at a stage."""

    bank: Bank
    stage: int
    data: Labelled
    answers: Answers
    retrieval: Retrieval
    encodings: int  # runs of the encoder over one item
    notes: list[str]  # for the user, about the tokenizer

    def items(self) -> list[dict[str, Any]]:
        """For each: id, the label answered, the adapter it was answered with, and the path there.

        The path names the tasks whose adapters were evaluated, and at its end the task that the last one predicted.
        """
        found, names = self.retrieval, self.bank.classes
        paths = [[first, *(task for task in later if task >= 0)] for first, later in self._paths()]
        columns = zip(
            self.data.rows,
            self.answers.classes.tolist(),
            self.answers.adapter.tolist(),
            paths,
            found.evaluations.tolist(),
            found.cycle.tolist(),
            found.agreement.tolist(),
            strict=True,
        )
        return [
            {
                "id": row.id,
                "label": names[answer],
                "adapter": name_of(adapter),
                "path": [name_of(task) for task in path],
                "evaluations": evaluations,
                "cycle": cycle,
                "agreement": agreement,
            }
            for row, answer, adapter, path, evaluations, cycle, agreement in columns
        ]

    def _paths(self) -> list[tuple[int, list[int]]]:
        return list(zip(self.retrieval.visited[:, 0].tolist(), self.retrieval.predicted.tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """Of all items; where the file has labels, accuracy and retrieval of those whose class is known by then."""
        about = {
            "stage": name_of(self.stage),
            "n": len(self.data.rows),
            "encodings": self.encodings,
            **self.retrieval.summary(None),
        }
        if not self.data.labels:
            return about
        truth = self.bank.numbers(self.data.labels)
        tasks = self.bank.task_of[truth]
        known = tasks <= self.stage
        if not known.any():
            return about | {"labelled": 0}
        part = Retrieval(self.retrieval.visited[known], self.retrieval.predicted[known])
        accuracy, n = share((self.answers.classes == truth)[known]), int(known.sum())
        about |= {"labelled": n, "accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / n)}
        return about | {"steps": part.summary(tasks[known])["steps"]}


def infer(
    bank: str | Path,
    file: Path,
    *,
    stage: int | None = None,
    backbone: str | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inferred:
    """Answer the items of a file by MOS, as the bank did after `stage` tasks (all of them by default).

    JSON lines: an id, a text or an image's path, and a label or none. backbone: where the one that the bank was made
    with is now. progress is told how many runs of the encoder are done, and how many are known to be needed.

    Raises `ModelError` where bank or backbone do not fit, `RunError` where items or files are damaged.
    """
    found = read_bank(bank)
    if stage is not None and not 1 <= stage <= len(found.tasks):
        raise RecipeError(f"stage {stage}: {found.directory} has {len(found.tasks)} tasks", "stages count from 1")
    last = (stage or len(found.tasks)) - 1
    data = read_items(found, file)
    encoder, done = open_encoder(found, device_of(device), backbone), 0

    def tick(items: int) -> None:
        nonlocal done
        done += items
        progress(done, seen.asked)

    seen = Seen(found, encoder, data.inputs, tick)
    answers = mos(found, last, seen, torch.arange(len(data.rows)))
    assert answers.retrieval is not None
    return Inferred(found, last, data, answers, answers.retrieval, seen.asked, encoder.network.remarks)


def open_encoder(bank: Bank, device: torch.device, backbone: str | None = None) -> Encoder:
    """The backbone that a bank was made with, with room for its adapters; `ModelError` where it is another one."""
    about = bank.about
    reference = backbone or about.backbone.model
    try:
        model = open_model(reference)
    except ModelError as error:
        if backbone is not None:
            raise
        raise ModelError(f"{bank.directory}: its backbone is not there: {error.message}", _NAME_IT) from None
    if Contents(None).of_model(model) != about.backbone.sha256:
        what = f"model '{reference}' is not the backbone that {bank.directory} was made with"
        raise ModelError(what, f"adapters fit one model alone, to the bit; {_NAME_IT}")
    return Encoder(Network(model, "AutoModel", device), Pooling(about.features.pooling), about.adapter.scale)


def read_items(bank: Bank, file: Path, labelled: bool | None = None) -> Labelled:
    """The items of a file, as the bank's columns have them; labelled: None for where the file has labels."""
    columns, features = bank.about.items, bank.about.features
    if labelled is None:
        labelled = columns.label in next(records(file), ("", {}))[1]
    label, content = columns.label if labelled else None, columns.content or features.kind
    try:
        if features.max_length is None:
            data = read_images(file, columns.id, content, label)
        else:
            data = read_texts(file, columns.id, content, label, features.max_length)
    except RunError as error:
        names = f"columns are {columns.id}, {content}, and {columns.label} in every line or in none"
        raise RunError(error.message, names if error.hint == COLUMN_HINT else error.hint) from None
    if label is not None:
        data.known(bank.classes, bank.directory)
    return data


_NAME_IT = "name it as it is now with --backbone MODEL"
