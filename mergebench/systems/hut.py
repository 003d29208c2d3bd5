"""HUT (arXiv:2409.13501): an update that multiplies the weights, element by element, by a low-rank matrix.

    residual    W' = W + W * (B A)         B starts at zero: HiRA (Huang et al., ICLR 2025) is this form
    pure        W' = W * (B A)             B = [1, 0 ...] and A = [1; random]: the product starts as ones

No code was published, and the paper's equations could not be read; both forms follow from its abstract. The pure form
of rank r + 1 contains the residual one of rank r. W' is made once a step, in 2 d k r products whatever the number n of
tokens, where a LoRA takes 2 n r (d + k): forward, HUT's own products are fewer from n = d k / (d + k) on. Backward it
needs the gradient of all of W', 2 n d k products, which a LoRA never makes: a whole step costs what one of full
fine-tuning does, and 6 d k r more. benchmarks/hut_steps.py counts both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergebench.deltas.multiplicative import Factors, multiplicative
from mergebench.parameters import param
from mergebench.training.attached import Attached, Base, OnTensors, Put, Weight, each, put, start, uniform
from mergebench.training.declared import Targets, trained


@dataclass(frozen=True, kw_only=True)
class Params(Targets):
    """The settings of HUT."""

    rank: int = param(8, "of the two factors", low=1)
    form: str = param("residual", "W + W * (B A), or W * (B A)", choices=("residual", "pure"))


@trained(paper="arXiv:2409.13501")
def hut(base: Base, p: Params) -> Attached:
    """W times a low-rank matrix, element by element: HUT, HiRA."""

    def residual(weight: Weight) -> Put:
        rows, columns = weight.values.shape
        b, a = start((rows, p.rank), base.generator, 0), uniform((p.rank, columns), base.generator)
        return put(multiplicative, Factors(b, a))

    def pure(weight: Weight) -> Put:
        """W * (B A) is W + W * ([B, -1] [A; 1]), as which it is saved."""
        rows, columns = weight.values.shape
        b, a = torch.zeros(rows, p.rank), uniform((p.rank, columns), base.generator)
        b[:, 0] = 1
        with torch.no_grad():
            a[0] = 1
        return _Pure(nn.Parameter(b), a).put()

    return OnTensors(base, dict(each(base.matrices(p.targets, p.rank), residual if p.form == "residual" else pure)))


@dataclass(frozen=True)
class _Pure:
    b: nn.Parameter
    a: nn.Parameter

    def put(self) -> Put:
        return Put(self._change, {"b": self.b, "a": self.a}, "multiplicative", saved=self._saved)

    def _change(self, weight: Tensor) -> Tensor:
        return weight * (self.b @ self.a - 1)

    def _saved(self) -> dict[str, Tensor]:
        ones = torch.ones(len(self.b), 1), torch.ones(1, self.a.shape[1])
        return {"b": torch.cat([self.b, -ones[0]], 1), "a": torch.cat([self.a, ones[1]])}
