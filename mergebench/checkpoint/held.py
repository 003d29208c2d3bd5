"""What a thread keeps of the tensor that it reads: a piece that is needed for many chunks, of each model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Held(threading.local):
    """The last piece of every source, as long as tensors of one name are read."""

    def __init__(self) -> None:
        self._name, self._pieces = "", dict[Any, tuple[Any, Any]]()

    def get(self, name: str, source: Any, key: Any, make: Callable[[], T]) -> T:
        """A source's piece `key`, made if another one was the last."""
        if self._name != name:
            self._name, self._pieces = name, {}
        if source not in self._pieces or self._pieces[source][0] != key:
            self._pieces.pop(source, None)  # free before the next is made
            self._pieces[source] = key, make()
        piece: T = self._pieces[source][1]
        return piece
