"""How many elements a chunk has, and the bytes that each of them takes."""

from __future__ import annotations

import torch

from mergebench.engine.job import Merge
from mergebench.engine.noise import TILE

TEMPORARIES = 8  # float32 copies of a chunk that a method may hold at once


def buffer_bytes(models: int) -> int:
    """Bytes of one worker's buffers for each element of a chunk: rows as read and in float32, with the base's."""
    return (models + 1) * (4 + 8)


def temporary_bytes(models: int) -> int:
    """Bytes that a method may hold for each element of a chunk."""
    return (models + 2) * 4 * TEMPORARIES


def least_chunk(merge: Merge) -> int:
    """Elements of the longest row, if the method needs whole rows."""
    infos = merge.reference.tensors
    shapes = [info.shape for name, info in infos.items() if info.is_float and merge.wanted(name)]
    return max(shape[-1] if shape else 1 for shape in shapes) if merge.cut == "row" else 1


def chunk_size(merge: Merge, device: torch.device, memory: int) -> int:
    """Elements of a chunk, in whole tiles: few enough for a core's cache, or enough to keep a GPU busy.

    memory: bytes for one worker.
    """
    most = 64 if device.type == "cuda" else 1 if merge.method.workspace else 2
    each = buffer_bytes(len(merge.models)) + temporary_bytes(len(merge.models))
    fitting = memory // (2 * each * TILE)  # the other half is for statistics
    return max(min(most, fitting), 1) * TILE
