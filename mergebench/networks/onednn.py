"""Linear layers run by oneDNN: float32 as before, and on AMD's processors twice as fast as MKL.

The weights are frozen; gradients pass through to the input, because training an adapter below needs them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_UNPACKING = threading.Lock()


class PackedLinear(torch.nn.Linear):
    """y = x W^T + b, W [out, in] and b [out] packed; on the CPU.

    Code that reads the weights themselves, as state space models do, gets them as they were: they are unpacked for
    good when they are first read, and the layer is an ordinary one from then on.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)  # makes no weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.has_bias = linear.bias is not None
        bias = linear.bias if self.has_bias else torch.zeros(linear.out_features)
        self.packed: tuple[Tensor, Tensor] | None = linear.weight.detach().to_mkldnn(), bias.detach().to_mkldnn()
        self._back: tuple[Tensor, Tensor] | None = None  # a weight and its transpose, after the first gradient

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and self.__dict__.get("packed") is not None:
            self._unpack()
            return getattr(self, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and self.packed is not None:
            self._unpack()
        super().__setattr__(name, value)

    def _unpack(self) -> None:
        with _UNPACKING, torch.inference_mode(False):  # the weights may be replaced later
            if self.packed is None:  # another thread was faster
                return
            weight, bias = (torch.nn.Parameter(one.to_dense(), requires_grad=False) for one in self.packed)
            self._parameters.update(weight=weight, bias=bias if self.has_bias else None)  # registering would read them
            self.packed = self._back = None

    def put(self, name: str, value: Tensor) -> None:
        """Replace the packed weight or bias."""
        assert self.packed is not None, "an unpacked layer has parameters to copy to"
        weight, bias = self.packed
        self.packed = (value.to_mkldnn(), bias) if name == "weight" else (weight, value.to_mkldnn())

    def forward(self, input: Tensor) -> Tensor:
        """[..., out] from [..., in]"""
        packed = self.packed
        if packed is None:
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            through: Tensor = _Through.apply(input, self)  # type: ignore[no-untyped-call]
            return through
        return _product(input, *packed)

    def back(self, gradient: Tensor) -> Tensor:
        """[..., in]: the gradient of the input from that of the output."""
        weight = self.packed[0] if self.packed is not None else self.weight.to_mkldnn()
        known = self._back
        if known is None or known[0] is not weight:  # the weights may have been replaced
            self._back = known = weight, weight.to_dense().T.contiguous().to_mkldnn()
        return _product(gradient.contiguous(), known[1], None)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return _product(x, *layer.packed)  # type: ignore[misc]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.back(gradient), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch._C._nn.mkldnn_linear(x.to_mkldnn(), weight, bias).to_dense()
    return out
