"""What a training config can name: kinds of deltas and modules, and objectives.

    @dataclass(frozen=True, kw_only=True)
    class Params(Targets):
        rank: int = param(8, "of the factors", low=1)

    @trained(paper="arXiv:2409.13501")
    def hut(base: Base, p: Params) -> Attached:
        ...

A kind puts something on a network and says which parameters of it are trained. An objective gives the loss of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergebench.parameters import Parameter, param, parameters_of, params_of
from mergebench.plugins import Scanned

if TYPE_CHECKING:
    from mergebench.training.attached import Attached, Base
    from mergebench.training.objective import Loss, Procedure, Setup


@dataclass(frozen=True)
class Nothing:
    """No parameters."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The parameter of kinds that change chosen tensors."""

    targets: list[str] = param([], "globs of the tensors to change; every linear layer in the blocks where not given")


@dataclass(frozen=True)
class Declared:
    """A declared function and its parameters."""

    name: str
    function: Callable[..., Any]
    paper: str
    params: type
    parameters: Mapping[str, Parameter]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


class Kind(Declared):
    """A kind of delta or module that can be trained."""

    def __call__(self, base: Base, params: Any) -> Attached:
        attached: Attached = self.function(base, params)
        return attached


class Objective(Declared):
    """What training minimises: a loss, or a procedure of several trainings."""

    def __call__(self, setup: Setup, params: Any) -> Loss | Procedure:
        begun: Loss | Procedure = self.function(setup, params)
        return begun


def trained(*, paper: str, name: str | None = None) -> Callable[[Callable[..., Attached]], Kind]:
    """Declare a function `(base, params) -> Attached` as a kind that `delta: {kind: NAME}` trains."""
    return lambda function: Kind(*_declared(function, paper, name))


def objective(*, paper: str, name: str | None = None) -> Callable[[Callable[..., Any]], Objective]:
    """Declare a function `(setup, params) -> Loss` as an objective; it may return a `Procedure` instead."""
    return lambda function: Objective(*_declared(function, paper, name))


def _declared(function: Callable[..., Any], paper: str, name: str | None) -> tuple[Any, ...]:
    params = params_of(function, 2, "it takes (what it works on, params: a dataclass)")
    return name or function.__name__.strip("_").replace("_", "-"), function, paper, params, parameters_of(params)


_ROOMS = ("mergebench.training.kinds", "mergebench.training.objectives", "mergebench.systems")
kinds = Scanned(_ROOMS, "mergebench.trained", "kind of delta to train", Kind, "@trained")
objectives = Scanned(_ROOMS, "mergebench.objectives", "objective", Objective, "@objective")
