"""Counter-based randomness: an element's draw is a hash of the seed and the element's position alone.

Each tile of 65,536 elements has a key from (seed, model, tensor, tile); within it, the element's position is mixed with
the key by a 32-bit finaliser with low bias (two multiplications and the xor-shifts before them; constants found by C.
Wellons' hash prospector, public domain). Draws are only compared with a threshold, so the last xor-shift, which
improves the low bits, is left out.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:  # listing the methods must not wait for torch
    from torch import Tensor

if TYPE_CHECKING:
    from mergebench.engine.span import Span

TILE = 65_536
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # as signed 32-bit integers
_STEP = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: neighbours start far apart

Ints = Any  # an int32 array of NumPy, which is faster on a CPU, or of torch: they share operators and bits


@cache
def _counter(device: torch.device) -> Ints:
    count = torch.arange(TILE, dtype=torch.int32, device=device) * _STEP
    if device.type == "cpu":
        return count.numpy()
    torch.cuda.current_stream(device).synchronize()  # workers on other streams use the counter too
    return count


def _key(seed: int, model: int, tensor: str, tile: int) -> tuple[int, int]:
    text = f"{seed}\0{model}\0{tensor}\0{tile}".encode()
    return struct.unpack("<ii", hashlib.blake2b(text, digest_size=8).digest())


def _draws(seed: int, model: int, span: Span, device: torch.device) -> Iterator[tuple[int, int, Ints]]:
    """(start, stop, a random int32 for each element there) over a span; the high bits are the good ones."""
    first, last = span.start // TILE, -(-span.stop // TILE)
    keys = [_key(seed, model, span.tensor, tile) for tile in range(first, last)]
    if device.type == "cpu":  # tile by tile, in the cache
        for tile, (one, two) in enumerate(keys, first):
            start, stop = max(span.start - tile * TILE, 0), min(span.stop - tile * TILE, TILE)
            at = tile * TILE - span.start
            yield at + start, at + stop, _mixed(_counter(device)[start:stop], one, two)
    else:
        one, two = torch.tensor(keys, dtype=torch.int32, device=device).T.unsqueeze(2)
        drawn = _mixed(_counter(device), one, two).reshape(-1)  # [tiles, TILE]
        yield 0, span.numel, drawn[span.start - first * TILE : span.stop - first * TILE]


def _mixed(counter: Ints, one: Any, two: Any) -> Ints:
    x = counter ^ one
    x ^= _shifted(x, 16)
    x *= _FIRST
    x ^= two
    x ^= _shifted(x, 15)
    x *= _SECOND
    return x


def _shifted(x: Ints, bits: int) -> Ints:
    """x >> bits, as if x had no sign."""
    if isinstance(x, np.ndarray):
        return (x.view(np.uint32) >> np.uint32(bits)).view(np.int32)
    return (x >> bits) & (0xFFFFFFFF >> bits)


def bernoulli(seed: int, spans: Sequence[Span], shares: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Bool [models, elements of the spans], true with probability `shares[i]` in row i, or each element's own."""
    out = torch.empty(len(shares), sum(span.numel for span in spans), dtype=torch.bool, device=device)
    for model, share in enumerate(shares):
        each = isinstance(share, torch.Tensor)
        if not each and share >= 1:
            out[model] = True
            continue
        # shares of single elements are compared with 24 bits, the precision of float32
        limits = share * 2**24 - 2**23 if each else min(round(share * 2**32), 2**32 - 1) - 2**31
        at = 0
        for span in spans:
            for start, stop, drawn in _draws(seed, model, span, device):
                here = slice(at + start, at + stop)
                if each:
                    drawn >>= 8
                    out[model, here] = _below(torch.as_tensor(drawn).float(), limits[here])
                else:
                    out[model, here] = torch.as_tensor(drawn < limits)
            at += span.numel
    return out


def keys(seed: int, span: Span) -> Ints:
    """A random int32 that is not negative for each element of a span: sorted by them, the elements are shuffled."""
    drawn = [_shifted(piece, 1) for _, _, piece in _draws(seed, 0, span, torch.device("cpu"))]
    return np.concatenate(drawn)


def _below(values: Tensor, limits: Tensor) -> Tensor:
    if values.device.type == "cpu":  # by NumPy: torch takes ten times as long to compare
        return torch.from_numpy(values.numpy() < limits.numpy())
    return values < limits
