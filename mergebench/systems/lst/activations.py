"""Hidden states of a frozen backbone on disk: computed once, read in every epoch.

An item is known by its tokens. What its blocks wrote lies in one piece, [blocks, tokens, width] in float32, in a file
that is read by the piece: a mapped file would be counted as memory of the process.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergebench.checkpoint.files import put, write_error
from mergebench.errors import RunError

ITEM = 4  # bytes of a number


class Activations:
    """The states that the kept blocks write, by item."""

    def __init__(self, file: Path, blocks: int, width: int) -> None:
        self.file, self._blocks, self._width = file, blocks, width
        self._places: dict[bytes, tuple[int, int]] = {}  # of each item, where it begins and its tokens
        self._end, self._lock = 0, threading.Lock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._open = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
        except OSError as error:
            raise write_error(file, error) from None
        weakref.finalize(self, os.close, self._open)

    def keep(self, keys: Sequence[bytes], states: Sequence[Tensor], lengths: Sequence[int]) -> None:
        """Write the items that are not there yet; states: of each block [items, tokens, width]."""
        for number, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            values = torch.stack([one[number, :length] for one in states]).float().cpu().contiguous()
            with self._lock:
                if key in self._places:
                    continue
                self._places[key] = self._end, length
                place, self._end = self._end, self._end + values.nbytes
            try:
                put(self._open, values.view(-1).view(torch.uint8).numpy().data, place)
            except OSError as error:
                raise write_error(self.file, error) from None

    def find(self, keys: Sequence[bytes], length: int) -> Tensor | None:
        """[blocks, items, length, width], zero where an item is shorter; None if one of the items is not there."""
        if any(key not in self._places for key in keys):
            return None
        out = torch.zeros(self._blocks, len(keys), length, self._width)
        for number, key in enumerate(keys):
            place, tokens = self._places[key]
            held = torch.empty(self._blocks, tokens, self._width)
            if os.preadv(self._open, [held.view(-1).view(torch.uint8).numpy().data], place) != held.nbytes:
                raise RunError(f"{self.file}: it is shorter than it was", "run it again")
            out[:, number, :tokens] = held
        return out


def bytes_of(tokens: int, blocks: int, width: int) -> int:
    """What the states of so many tokens take on disk."""
    return tokens * blocks * width * ITEM
