"""Counter-based randomness: an element's draw is a hash of where it stands, nothing else.

Each tile of 65,536 elements has a key from (seed, model, tensor, tile); within it, the element's
position is mixed with the key by a 32-bit finaliser with low bias (two multiplications and
the xor-shifts before them; constants found by C. Wellons' hash prospector, public domain). Only
comparisons with a threshold are made, so the last xor-shift, which mends the low bits, is left out.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mergebench.engine.context import Span

TILE = 65_536
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # as signed 32-bit integers
_ONE = 0x3F800000  # the bits of 1.0


@cache
def _counter(device: torch.device) -> Tensor:
    return (torch.arange(TILE, dtype=torch.int32, device=device) * (0x9E3779B9 - 2**32)).contiguous()


def _key(seed: int, model: int, tensor: str, tile: int) -> tuple[int, int]:
    text = f"{seed}\0{model}\0{tensor}\0{tile}".encode()
    return struct.unpack("<ii", hashlib.blake2b(text, digest_size=8).digest())


def _bits(key: tuple[int, int], device: torch.device) -> Tensor:
    """31 random bits for each element of a tile, int32; the high bits are the good ones."""
    x = _counter(device) ^ key[0]
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST).bitwise_xor_(key[1])
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    return x.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)


def bernoulli(seed: int, spans: Sequence[Span], shares: Sequence[float], device: torch.device) -> Tensor:
    """0/1 as float32 [models, elements of the spans], 1 with probability `shares[i]` in row i."""
    out = torch.empty(len(shares), sum(span.numel for span in spans), dtype=torch.float32, device=device)
    for model, share in enumerate(shares):
        limit, at = min(round(share * 2**31), 2**31 - 1), 0
        for span in spans:
            for tile in range(span.start // TILE, -(-span.stop // TILE)):
                low, high = max(span.start, tile * TILE), min(span.stop, (tile + 1) * TILE)
                row = out[model, at : at + high - low]
                at += high - low
                if share >= 1:
                    row.fill_(1.0)
                    continue
                draw = _bits(_key(seed, model, span.tensor, tile), device)
                # (draw - limit) >> 31 is all ones where draw < limit: the mask without a slow comparison
                mask = draw.sub_(limit).bitwise_right_shift_(31).bitwise_and_(_ONE)
                row.copy_(mask.view(torch.float32)[low - tile * TILE : high - tile * TILE])
    return out
