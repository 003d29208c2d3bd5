"""Classification by a linear head on an encoder's pooled features, as suites measure it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.naming import HEAD
from mergebench.errors import ModelError, RunError
from mergebench.evaluation.head import Head as SavedHead
from mergebench.evaluation.head import read_head
from mergebench.evaluation.labelled import Labelled
from mergebench.networks.features import Inputs, Pooling, features
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.training.task import PARTS, Common, Head, Measured, Rows, keep_apart


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    """The parameters of every classification."""

    label: str = param("label", "the column with the label")
    per_class: int | None = param(None, "how many items of each label to train on, drawn with the run's seed", low=1)
    normalize: bool = param(False, "features scaled to length one")


class Classification:
    """Labelled texts or images. The head starts at zero, so that no seed takes part in it."""

    auto_class, metric, choose_by = "AutoModel", "accuracy", "score"

    def __init__(
        self, p: Params, read: Callable[[Path, str | None], Labelled], pooling: Pooling, max_length: int | None = None
    ) -> None:
        """read(file, column with the label): the items of a file."""
        files = {part: file for part in PARTS if (file := getattr(p, part)) is not None}
        self._p, self._pooling, self._max_length = p, pooling, max_length
        self._data = {part: read(file, p.label) for part, file in files.items()}
        self.files, self.read = tuple(files.values()), read
        self._held: dict[str, Inputs] = {}
        self._chosen: list[int] | None = None  # of the train items; None: all
        train = self._data["train"]
        if len(self.labels) < 2:
            raise RunError(
                f"{p.train}: all items have the label '{train.labels[0]}'", "a classifier tells labels apart"
            )
        for part, labelled in self._data.items():
            if part != "train":
                labelled.known(self.labels, p.train)
        count, label = min((train.labels.count(label), label) for label in self.labels)
        if p.per_class is not None and count < p.per_class:
            raise RunError(f"{p.train}: it has {count} items of label '{label}'", f"per_class: {count} at most")
        keep_apart({part: labelled.items for part, labelled in self._data.items()})

    def drawn(self, seed: int) -> Classification:
        """With `limit` of the train items, or `per_class` of each label."""
        if self._p.limit is None and self._p.per_class is None:
            return self
        other, labels = copy.copy(self), self._data["train"].labels
        order = random.Random(seed).sample(range(len(labels)), len(labels))
        if self._p.per_class is not None:
            of_label = {label: [at for at in order if labels[at] == label] for label in self.labels}
            order = [at for several in of_label.values() for at in several[: self._p.per_class]]
        other._chosen = sorted(order[: self._p.limit])
        return other

    def _places(self, part: str) -> Sequence[int]:
        """Where a part's items are in its file."""
        if part == "train" and self._chosen is not None:
            return self._chosen
        return range(len(self._data[part].rows))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The classes, in their order."""
        return tuple(sorted(set(self._data["train"].labels)))

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The ids of each part's items."""
        return {part: [data.rows[at].id for at in self._places(part)] for part, data in self._data.items()}

    def gold(self, part: str) -> Sequence[str]:
        """The items' labels."""
        return [self._data[part].labels[at] for at in self._places(part)]

    def head(self, network: Network) -> Head:
        """Weight [classes, width] and bias [classes]."""
        width, classes = self._pooling.width(network.hidden), len(self.labels)
        return {"weight": nn.Parameter(torch.zeros(classes, width)), "bias": nn.Parameter(torch.zeros(classes))}

    def lengths(self, network: Network, part: str) -> Sequence[int]:
        """Tokens or patches of each item."""
        lengths = self._data[part].inputs.lengths(network)
        return [lengths[at] for at in self._places(part)]

    def features(self, network: Network, part: str, items: Sequence[int]) -> Tensor:
        """[items, width], with gradients."""
        places = self._places(part)
        rows = self._inputs(network, part).rows(network, [places[i] for i in items], self._pooling)
        return self._pooling.scaled(rows)

    def rows(self, network: Network, head: Head, part: str, items: Sequence[int]) -> Rows:
        """A row an item."""
        logits = linear(self.features(network, part, items), head["weight"], head["bias"])
        return Rows(logits, self.targets(part)[list(items)].to(logits.device), torch.arange(len(items)))

    def targets(self, part: str) -> Tensor:
        """The number of each item's class."""
        return torch.tensor([self.labels.index(label) for label in self.gold(part)])

    def measure(self, network: Network, head: Head, part: str, tick: Tick) -> Measured:
        """The accuracy on validation or test items, as `mergebench eval` measures it."""
        data = self._data[part]
        network.kept.clear()  # features of other parameters
        found = features(data.inputs, network, self._pooling, tick)
        logits = linear(found, *(head[name].detach().cpu() for name in ("weight", "bias")))
        answers = [self.labels[i] for i in logits.argmax(1).tolist()]
        return Measured(float(cross_entropy(logits, self.targets(part))), data.score(answers))

    def save(self, head: Head, directory: Path) -> None:
        """head.safetensors, which suites name."""
        weight, bias = head["weight"].detach(), head["bias"].detach()
        saved = SavedHead(directory / HEAD, weight, bias, self.labels, self._pooling, self._max_length)
        write_atomically(saved.file, saved.dump())

    def head_in(self, directory: Path) -> Head:
        """The head in a directory; `ModelError` if it has other labels, or reads other features."""
        saved = read_head(directory / HEAD)
        if saved.labels != self.labels:
            theirs, ours = (", ".join(labels) for labels in (saved.labels, self.labels))
            what = f"{saved.file}: its labels are {theirs}; the task's are {ours}"
            raise ModelError(what, "name a model of this task")
        if (saved.pooling, saved.max_length) != (self._pooling, self._max_length):
            raise ModelError(
                f"{saved.file}: it was trained on other features than the task's",
                "give the task the same pooling, normalize and max_length",
            )
        return {"weight": saved.weight, "bias": saved.bias}

    def _inputs(self, network: Network, part: str) -> Inputs:
        """The items prepared for repeated reading, images decoded once."""
        if part not in self._held:
            self._held[part] = self._data[part].inputs.held(network)
        return self._held[part]
