"""Adam (arXiv:1412.6980) in place: torch's keeps more copies of a matrix than there is memory for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mergebench.engine.method import Tensor


def adam(values: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, lr: float) -> Tensor:
    """`values` after `steps` steps; `gradient` returns a new tensor."""
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, steps + 1):
        slope = gradient(values)
        first.lerp_(slope, 1 - 0.9)
        second.mul_(0.999).addcmul_(slope, slope, value=1 - 0.999)
        spread = torch.div(second, 1 - 0.999**step, out=slope).sqrt_().add_(1e-8)
        values.addcdiv_(first, spread, value=-lr / (1 - 0.9**step))
    return values
