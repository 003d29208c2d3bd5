"""A range of a tensor's elements."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Elements `start` to `stop` of one tensor, flattened."""

    tensor: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start
