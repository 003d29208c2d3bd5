"""The interface of a model that can be run, and of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Tick = Callable[[int], None]  # called with the number of items just done


def ticking(progress: Callable[[int, int], None], total: int) -> Tick:
    """Tells `progress` the items done so far, at most the total, and the total."""
    done = 0

    def tick(items: int) -> None:
        nonlocal done
        done += items
        progress(min(done, total), total)

    return tick


class LoadableModel(Protocol):
    """The interface of a model that can be measured; implemented by `mergebench.checkpoint.Model`."""

    @property
    def reference(self) -> str:
        """As the user wrote it."""

    @property
    def side_directory(self) -> Path:
        """Where config.json and the tokenizer are."""

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors by their names in the files."""


def network_tensors(model: LoadableModel) -> dict[str, Tensor]:
    """Its tensors without those of modules in folders (`2_Dense/linear.weight`), which transformers does not run."""
    return {name: value for name, value in model.state_dict().items() if "/" not in name}
