"""Hooks that run a function beside the MLP in each block of a network.

The function gets the MLP's input, before the MLP's norm; its result is added to the MLP's output:

    x <- x + MLP(norm(x)) + beside(x)

In a block whose norm comes after the sum, as in BERT, the norm is of this sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergebench.errors import ModelError
from mergebench.networks.network import Network

Beside = Callable[[str, Tensor], Tensor]  # from a block's name and x [..., width] to a tensor of x's shape

# The modules that receive the MLP's input, and the modules where the MLP's output is added; `` is the block.
PLACES = (
    ("norm2", ""),  # DINOv2, DINOv3
    ("layernorm_after", ""),  # ViT, DeiT, BEiT
    ("layer_norm2", ""),  # CLIP, SigLIP
    ("intermediate", "output.dense"),  # BERT and its family
    ("ffn", "ffn"),  # DistilBERT
)


class Hooks:
    """Hooks in every block of a network; while nothing is attached, they change nothing."""

    def __init__(self, network: Network) -> None:
        """Raises `ModelError` if the structure of the blocks is not known."""
        self._here = threading.local()  # batches run on several threads at once
        self.blocks = tuple(network.blocks)  # by name, in the order of depth
        for name, block in network.blocks.items():
            self._hook(network.name, name, block)

    @contextmanager
    def attached(self, beside: Beside | None) -> Iterator[None]:
        """Inside the context, forward passes of this thread run `beside`, once per block and pass, in order of
        depth."""
        self._here.beside = beside
        try:
            yield
        finally:
            self._here.beside = None

    def _hook(self, model: str, name: str, block: torch.nn.Module) -> None:
        inside = dict(block.named_modules())
        places = next(((r, w) for r, w in PLACES if r in inside and w in inside), None)
        if places is None:
            what = f"model '{model}': no place for an adapter is known in its blocks ({type(block).__name__})"
            raise ModelError(what, "encoders built like ViT, DINOv2, CLIP, BERT or DistilBERT have one")
        reads, writes = places

        def read(module: Any, args: Any) -> None:
            beside = getattr(self._here, "beside", None)
            self._here.term = None if beside is None else beside(name, args[0])

        def write(module: Any, args: Any, out: Any) -> Any:
            term = self._here.term
            if term is None:
                return out
            return (out[0] + term, *out[1:]) if isinstance(out, tuple) else out + term

        inside[reads].register_forward_pre_hook(read)
        inside[writes].register_forward_hook(write)
