"""Linear layers run by oneDNN: float32 as before, and on AMD's processors twice as fast as MKL.

The weights are frozen; gradients pass through to the input, because training an adapter below needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PackedLinear(torch.nn.Module):
    """y = x W^T + b, W [out, in] and b [out] packed; on the CPU."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        self.register_buffer("weight", linear.weight.detach().to_mkldnn())
        self.register_buffer("bias", bias.detach().to_mkldnn())
        self._back: tuple[Tensor, Tensor] | None = None  # a weight and its transpose, after the first gradient

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]"""
        if torch.is_grad_enabled() and x.requires_grad:
            through: Tensor = _Through.apply(x, self)  # type: ignore[no-untyped-call]
            return through
        return _product(x, self.weight, self.bias)

    def back(self, gradient: Tensor) -> Tensor:
        """[..., in]: the gradient of the input from that of the output."""
        known = self._back
        if known is None or known[0] is not self.weight:  # the weights may have been replaced
            self._back = known = self.weight, self.weight.to_dense().T.contiguous().to_mkldnn()
        return _product(gradient.contiguous(), known[1], None)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return _product(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.back(gradient), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch._C._nn.mkldnn_linear(x.to_mkldnn(), weight, bias).to_dense()
    return out
