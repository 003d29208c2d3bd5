"""PEANuT (arXiv:2410.01870): a low-rank difference that a small network makes of the weight itself.

    W' = W + s B h,  h = f(A W);  with hidden layers E_1 .. E_n, D_1 .. D_n:
    h_0 = f(A W),  h_i = f(E_i h_i-1),  then  h <- f(D_i h) + h_n-i  for i = 1 .. n, from h = h_n

A [r, out], E_i and D_i [r, r], B [out, r], f an activation, element by element. Given W it is the LoRA of s B and h.

Without hidden layers and with f = relu it is HiWi (arXiv:2305.16742) on a weight or, with W the vector of biases, on a
bias. With f = linear it is LiST's adapter (arXiv:2110.06274) behind a linear layer: h + A2 A1 h of h = W x + b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, each_tile, matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Network:
    """B [rows, r], A [r, rows], E_i and D_i [r, r], an activation of transformers by its name."""

    b: Tensor
    a: Tensor | None  # None after `prepare`
    encoders: tuple[Tensor, ...] = ()
    decoders: tuple[Tensor, ...] = ()
    scale: float = 1.0
    activation: str = "relu"
    columns: bool = False  # outputs are columns of the stored tensor, as those of a bias are
    hidden: Tensor | None = None  # h [r, columns]; computed, not stored


def _hidden(p: Network, product: Tensor) -> Tensor:
    """h of A W."""
    from transformers.activations import ACT2FN

    f = ACT2FN[p.activation]
    layers = [f(product)]
    for encoder in p.encoders:
        layers.append(f(encoder @ layers[-1]))
    h: Tensor = layers.pop()
    for decoder in p.decoders:
        h = f(decoder @ h) + layers.pop()
    return h


def _prepare(p: Network, base: Source, shape: tuple[int, ...]) -> Network:
    """Read W once, for A W, unless a tile has all outputs."""
    if p.columns:
        return p
    assert p.a is not None
    product = torch.zeros(len(p.a), matrix_shape(shape)[1], dtype=torch.float64, device=p.a.device)
    for tile, values in each_tile(base, shape, p.a.device):
        product += p.a[:, tile] @ values
    return Network(p.scale * p.b, None, hidden=_hidden(p, product.float()))


def _exact(p: Network, base: Source, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """s B and h; if columns, both are turned."""
    if not p.columns:
        built = _prepare(p, base, shape)
        assert built.hidden is not None
        return built.b, built.hidden
    assert p.a is not None
    hidden = [_hidden(p, p.a @ values.T) for _, values in each_tile(base, shape, p.a.device)]
    return torch.cat(hidden, 1).T, p.scale * p.b.T


def _fold(p: Network, tile: slice, base: Tensor) -> Tensor:
    if p.columns:
        return base + peanut(p, tile, base)
    assert p.hidden is not None
    return base.addmm_(p.b[tile], p.hidden)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    from transformers.activations import ACT2FN

    b, a, out = shapes["b"], shapes["a"], matrix_shape(shape)[settings["columns"]]
    if settings["activation"] not in ACT2FN:
        raise ValueError(f"activation '{settings['activation']}' is not known")
    if len(b) != 2 or a != b[::-1]:
        raise ValueError(f"{list(b)} and {list(a)} are not of one rank")
    names = {name for name in shapes if name.partition(".")[0] in ("encoders", "decoders")}
    layers = len(names) // 2
    if names != {f"{side}.{i}" for side in ("encoders", "decoders") for i in range(layers)}:
        raise ValueError(f"encoders and decoders are {', '.join(sorted(names))}")
    strange = next((name for name in sorted(names) if shapes[name] != (b[1], b[1])), None)
    if strange is not None:
        raise ValueError(f"'{strange}' is {list(shapes[strange])}, the rank is {b[1]}")
    if b[0] != out:
        raise Misfit(f"a network of {b[0]} outputs")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    turned = rows in (1, 31)
    out = columns if turned else rows
    parts = {"b": torch.randn(out, 3, generator=random), "a": torch.randn(3, out, generator=random)}
    for i in range(2 if rows == 23 else 0):
        parts |= {f"{side}.{i}": torch.randn(3, 3, generator=random) for side in ("encoders", "decoders")}
    return {**parts, "scale": 0.5, "activation": "gelu" if rows == 24 else "relu", "columns": turned}


@delta_kind(
    paper="arXiv:2410.01870",
    needs_base=True,
    prepare=_prepare,
    factors=_exact,
    made=lambda shapes, settings, shape: 24 * shapes["a"][0] * matrix_shape(shape)[1],
    folds=_fold,
    check=_check,
    example=_example,
    label=low_rank.label,
)
def peanut(p: Network, tile: slice, base: Tensor | None) -> Tensor:
    """s B h with h = f(A W), or of more layers: PEANuT, HiWi on weights; unprepared, the tile must be all of W."""
    if p.hidden is not None:
        return p.b[tile] @ p.hidden
    assert p.a is not None and base is not None
    if p.columns:
        return (p.scale * p.b @ _hidden(p, p.a @ base.T)).T
    return p.scale * p.b[tile] @ _hidden(p, p.a @ base)
