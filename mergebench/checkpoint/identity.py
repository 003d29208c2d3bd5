"""Which model this is, told from a little of every tensor: so that what was made for one is not used on another."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, Files
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.model import Model

PIECES, ELEMENTS = 8, 256  # read of a tensor: 4 KiB of one in 16 bits


def identity(model: Model) -> str:
    """16 hex digits, equal for equal models however they are cut into shards: a hash of every tensor's name, type,
    shape and some of its elements, the adapter's too.

    The elements are eight pieces at even distances, because an edit of single rows need not reach the first ones.
    Tells fine-tunes and edits apart, in a second; it is no proof that two models are equal.
    """
    found = []
    with Files() as files:
        for header in model.headers:
            for tensor in header.tensors:
                digest = hashlib.sha256(_some(files, tensor).view(torch.uint8).numpy().data).hexdigest()
                found.append((tensor.name, tensor.dtype, tensor.shape, digest))
    if model.delta_digest is not None:
        found.append(("deltas", "", (), model.delta_digest))
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def _some(files: Files, tensor: TensorInfo) -> Tensor:
    """Elements of a tensor: all of a small one, else pieces from its first to its last."""
    size = min(tensor.numel, PIECES * ELEMENTS)
    out = torch.empty(size, dtype=TORCH_DTYPE[tensor.dtype])
    pieces = 1 if size == tensor.numel else PIECES
    length = size // pieces
    for number in range(pieces if size else 0):
        start = number * (tensor.numel - length) // max(pieces - 1, 1)
        files.read_elements(tensor, start, out[number * length : (number + 1) * length])
    return out
