"""What a model must be to be run, and who is told how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Tick = Callable[[int], None]  # called with the number of items just done


class LoadableModel(Protocol):
    """What a model must be to be measured; `mergebench.checkpoint.Model` is one."""

    @property
    def reference(self) -> str:
        """As the user wrote it."""

    @property
    def side_directory(self) -> Path:
        """Where config.json and the tokenizer are."""

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors by their names in the files."""
