"""Edits: functions from the candidate rows to how much of a direction is added to each row.

    @edit(paper="arXiv:2407.08770")
    def surgery(rows: Rows, p: Params) -> Tensor:
        ...

A row is the vector of one neuron, as wide as the residual stream; the direction comes from a probe. The model is read
once for the rows' cosines and norms, and only changed rows are written.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergebench.errors import RecipeError
from mergebench.parameters import Parameter, make_params, parameters_of, params_of
from mergebench.plugins import named

if TYPE_CHECKING:  # editing rows imports torch; listing an edit's parameters must not
    from torch import Tensor


GATE = "gate_proj"


@dataclass(frozen=True)
class Rows:
    """The properties of the N candidate rows of a model, in the order of layers, experts and rows."""

    cosine: Tensor  # float32 [N], with the direction; 0 for a row of zeros
    norm: Tensor  # float32 [N]
    layer: Tensor  # int64 [N]
    length: float  # the direction's norm

    def __len__(self) -> int:
        return len(self.norm)

    def lowest(self, score: Tensor, count: int) -> Tensor:
        """bool [N]: the `count` rows of lowest score; of equal scores, the first rows."""
        import torch

        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.argsort(score, stable=True)[:count]] = True
        return chosen

    def count(self, written: str) -> int:
        """The number of rows for `16384`, or `4.65%` of the candidates; `RecipeError` if there are fewer candidates."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", written.replace("_", "").strip())
        if match is None:
            raise RecipeError(f"rows: '{written}' is no number of rows", "write it like 16384, or 4.65%")
        wanted = round(float(match[1]) / 100 * len(self)) if match[1] else int(match[2])
        if wanted > len(self):
            raise RecipeError(f"rows: {written} asks for {wanted}, there are {len(self)} candidates", "ask for fewer")
        return wanted

    def random(self, seed: int) -> Tensor:
        """Numbers in [0, 1), one a row, that depend on the seed and the row's place alone."""
        import torch

        return torch.rand(len(self), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Edit:
    """An edit and its parameters."""

    name: str
    function: Callable[..., Tensor]
    paper: str
    params: type
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    target: str = GATE  # whose rows it is about, where nobody says

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.function.__module__, self.function.__qualname__)

    def __call__(self, rows: Rows, params: Any) -> Tensor:
        """How much of the direction is added to each row: float32 [N]."""
        import torch

        amounts = self.function(rows, params)
        if amounts.dtype != torch.float32 or amounts.shape != rows.norm.shape:
            got = f"{amounts.dtype} {list(amounts.shape)}"
            raise TypeError(f"edit '{self.name}' gave {got} for {len(rows)} rows, float32 [{len(rows)}] was expected")
        return amounts

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def make_params(self, values: Mapping[str, Any]) -> Any:
        """The edit's `Params` from recipe names to values."""
        return make_params(self.params, values)


def edit(*, paper: str, target: str = GATE) -> Callable[[Callable[..., Tensor]], Edit]:
    """Declare a function `(rows, params: a dataclass) -> amounts` as an edit; `paper`: its source, `target`: whose rows
    it is about, where nobody says."""

    def declare(function: Callable[..., Tensor]) -> Edit:
        params = params_of(function, 2, "an edit takes (rows, params: a dataclass)")
        return Edit(function.__name__, function, paper, params, parameters_of(params), target)

    return declare
