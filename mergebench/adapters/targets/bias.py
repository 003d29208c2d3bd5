"""The biases alone: exactly, as they are vectors (BitFit, arXiv:2106.10199; HiWi hides its adapter in them,
arXiv:2305.16742).

If only biases of linear layers have changed, they are a BEFT directory (arXiv:2509.15974), which PEFT loads; a norm's
bias fits no PEFT type, and all are a delta file then. Weights of norms are no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.adapters import peft_directory
from mergebench.adapters.fine_tune import Reading
from mergebench.adapters.target import Answers, Fit, Settings, Shapes, Target
from mergebench.checkpoint.content import identity
from mergebench.deltas.formats import native
from mergebench.deltas.formats.native import DELTAS
from mergebench.deltas.peft.directory import PREFIX, WEIGHTS


class _Fitting:
    beside: tuple[Path, ...] = ()

    def __init__(self, reading: Reading, settings: Settings) -> None:
        self._reading, self._found = reading, reading.found
        biases = {name: shape for name, shape in self._found.shapes.items() if is_bias(name, shape)}
        biases = {name: shape for name, shape in biases.items() if reading.included(name)}
        linear = {f"{name.removesuffix('weight')}bias": module for name, module in self._found.linear.items()}
        changed = [name for name in biases if reading.squared_norm(name)]
        self._peft = all(name in linear for name in changed) and not self._found.transposed
        self.held: Mapping[str, str] = {name: linear[name] if self._peft else name for name in changed}
        self.file = WEIGHTS if self._peft else DELTAS

    def fit(self, name: str) -> Fit:
        values, total = self._reading.difference(name), self._reading.squared_norm(name)
        if self._peft:
            stored = {f"{PREFIX}{self.held[name]}.beft_bias": values.view(1, -1)}
        else:
            stored = {f"{name}.values": values}
        return Fit(stored, total, total, {"count": values.numel()})

    def shapes(self, stored: Shapes, answers: Answers) -> Shapes:
        return stored

    def config(self, answers: Answers) -> dict[str, Any] | None:
        modules = [self.held[name] for name in answers]
        return peft_directory.plain_config("BEFT", self._found.base, modules) if self._peft else None

    def metadata(self, answers: Answers) -> Mapping[str, str]:
        if self._peft:
            return {}
        listed = {name: native.Listed("dense", ("values",)) for name in answers}
        return native.metadata_of(listed, base=identity(self._found.base))

    def summary(self, answers: Answers) -> Mapping[str, Any]:
        return {"count": sum(answer["about"]["count"] for answer in answers.values())}

    def at_most(self) -> int:
        return sum(4 * self._found.base.tensors[name].numel for name in self.held)


def is_bias(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a bias: a vector of that name."""
    return len(shape) == 1 and name.rpartition(".")[2] == "bias"


bias = Target(
    stores="biases as they are",
    takes={},
    begin=_Fitting,
    within=lambda reading, budget: [{}],
)
