"""Features of texts at every layer of a model, cached on disk, so that the model runs once for all layers.

One `.npy` file a layer, [texts, width] float32, in a folder named by a hash of everything they depend on: the model,
the texts' tokens, the pooling, the sort of device, the versions of the libraries. The folder gets its name when all
files are complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint import Model
from mergebench.checkpoint.content import Contents
from mergebench.checkpoint.files import write_error
from mergebench.checkpoint.staging import Staging
from mergebench.editing.probes.layers import PRE, Reading, State, every_state, pooling, stream
from mergebench.networks import tokenizer
from mergebench.networks.device import versions
from mergebench.networks.features import scatter
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network


@dataclass(frozen=True)
class Features:
    """The features in one folder."""

    folder: Path

    @property
    def depth(self) -> int:
        """The number of blocks of the model."""
        return len(list(self.folder.glob("[0-9]*.npy"))) - 1

    def rows(self, state: State) -> np.ndarray[Any, Any]:
        """[texts, width] float32, mapped from the disk."""
        found: np.ndarray[Any, Any] = np.load(self.folder / f"{state}.npy", mmap_mode="r")
        return found

    def whole(self, texts: int) -> bool:
        """Whether every layer is present."""
        try:
            shapes = {self.rows(state).shape for state in [*range(self.depth + 1), PRE]}
            return len(shapes) == 1 and shapes.pop()[0] == texts
        except (OSError, ValueError):
            return False


class Keeper:
    """Reads texts with one model, which is loaded only if the features are not cached."""

    def __init__(self, model: Model, reading: Reading, device: torch.device, results: Path) -> None:
        self.model, self.reading, self.device, self.results = model, reading, device, results
        self._tokenizer, self.remark = tokenizer.load(model.side_directory, model.reference)

    def features(self, texts: list[str], tick: Tick) -> Features:
        """The features of these texts; `RecipeError` if the model has no such layer."""
        content = Contents(self.results).of_model(self.model)
        tokens = tokenizer.tokenize(self._tokenizer, self.model.reference, texts, self.reading.max_length)
        made_of = [content, tokens, self.reading.pool, self.device.type, versions()]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:40]
        found = Features(self.results / "features" / key)
        if found.whole(len(texts)):
            with suppress(OSError):
                os.utime(found.folder)  # used now
            tick(len(texts))
        else:
            self._make(tokens, found.folder, tick)
        self.reading.state(found.depth)
        return found

    def _make(self, tokens: list[list[int]], folder: Path, tick: Tick) -> None:
        network = Network(self.model, "AutoModel", self.device)
        self.reading.state(len(network.blocks))  # fails before hours of work
        states = every_state(network)
        with Staging(folder, "", resume=False) as staging:
            shape = (len(tokens), network.hidden)
            arrays = [_create(staging.directory / f"{state}.npy", shape) for state in states]

            def keep(group: list[int], part: Tensor) -> None:
                for array, rows in zip(arrays, part.unbind(1), strict=True):
                    array[group] = rows.numpy()

            with stream(network, pooling(self.reading.pool), states) as read:

                def rows(group: list[int]) -> Tensor:
                    return torch.stack(read([tokens[i] for i in group]), 1)

                scatter(network, rows, [len(one) for one in tokens], keep, tick)
            for array in arrays:
                array.flush()
            staging.publish(overwrite=True, sync=False)


def _create(path: Path, shape: Sequence[int]) -> np.memmap[Any, Any]:
    """A memory-mapped file of float32; its space is allocated now, so that a full disk is an error here."""
    try:
        array = np.lib.format.open_memmap(path, "w+", np.float32, tuple(shape))
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise write_error(path, error) from None
    return array
