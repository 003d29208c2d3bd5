"""Classification by a linear head on an encoder's pooled features, as suites measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mergebench.checkpoint.files import write_atomically
from mergebench.errors import RunError
from mergebench.evaluation.head import Head as SavedHead
from mergebench.evaluation.labelled import Labelled
from mergebench.networks.features import Inputs, Pooling, features
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.training.task import Head, Measured, Rows, keep_apart


class Classification:
    """Labelled texts or images. The head starts at zero, so that no seed takes part in it."""

    auto_class, metric, choose_by = "AutoModel", "accuracy", "score"

    def __init__(
        self, data: Mapping[str, Labelled], files: Sequence[Path], pooling: Pooling, max_length: int | None
    ) -> None:
        self._data, self._pooling, self._max_length = dict(data), pooling, max_length
        self.files = tuple(files)
        self._held: dict[str, Inputs] = {}
        train = data["train"]
        if len(self.labels) < 2:
            raise RunError(
                f"{files[0]}: all items have the label '{train.labels[0]}'", "a classifier tells labels apart"
            )
        for part, labelled in data.items():
            if part != "train":
                labelled.known(self.labels, files[0])
        keep_apart({part: labelled.items for part, labelled in data.items()})

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The classes, in their order."""
        return tuple(sorted(set(self._data["train"].labels)))

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The ids of each part's items."""
        return {part: [row.id for row in labelled.rows] for part, labelled in self._data.items()}

    def gold(self, part: str) -> Sequence[str]:
        """The items' labels."""
        return self._data[part].labels

    def head(self, network: Network) -> Head:
        """Weight [classes, width] and bias [classes]."""
        width, classes = self._pooling.width(network.hidden), len(self.labels)
        return {"weight": nn.Parameter(torch.zeros(classes, width)), "bias": nn.Parameter(torch.zeros(classes))}

    def lengths(self, network: Network, part: str) -> Sequence[int]:
        """Tokens or patches of each item."""
        return self._data[part].inputs.lengths(network)

    def features(self, network: Network, part: str, items: Sequence[int]) -> Tensor:
        """[items, width], with gradients."""
        return self._pooling.scaled(self._inputs(network, part).rows(network, items, self._pooling))

    def rows(self, network: Network, head: Head, part: str, items: Sequence[int]) -> Rows:
        """A row an item."""
        logits = linear(self.features(network, part, items), head["weight"], head["bias"])
        return Rows(logits, self.targets(part)[list(items)].to(logits.device), torch.arange(len(items)))

    def targets(self, part: str) -> Tensor:
        """The number of each item's class."""
        return torch.tensor([self.labels.index(label) for label in self._data[part].labels])

    def measure(self, network: Network, head: Head, part: str, tick: Tick) -> Measured:
        """The accuracy, as `mergebench eval` measures it."""
        data = self._data[part]
        network.kept.clear()  # features of other parameters
        found = features(data.inputs, network, self._pooling, tick)
        logits = linear(found, *(head[name].detach().cpu() for name in ("weight", "bias")))
        answers = [self.labels[i] for i in logits.argmax(1).tolist()]
        return Measured(float(cross_entropy(logits, self.targets(part))), data.score(answers))

    def save(self, head: Head, directory: Path) -> None:
        """head.safetensors, which suites name."""
        weight, bias = head["weight"].detach(), head["bias"].detach()
        saved = SavedHead(directory / "head.safetensors", weight, bias, self.labels, self._pooling, self._max_length)
        write_atomically(saved.file, saved.dump())

    def _inputs(self, network: Network, part: str) -> Inputs:
        """The items prepared for repeated reading, images decoded once."""
        if part not in self._held:
            self._held[part] = self._data[part].inputs.held(network)
        return self._held[part]
