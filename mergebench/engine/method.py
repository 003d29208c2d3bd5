"""Merge methods: one function of one chunk, its parameters, and its requirements.

    @dataclass(frozen=True)
    class Params:
        weight: PerModel = param(1.0, "weight of the model", per_model=True)

    @merge_method(takes="weights", paper="arXiv:2203.05482")
    def linear(weights: Weights, p: Params, ctx: Context) -> Passes:
        ...

A method that needs a number about the whole tensor or the whole model is a generator: it `yield`s a
statistic and receives the answer (`mergebench.engine.statistics`).
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from mergebench.checkpoint.measured import MeasuredKind
from mergebench.parameters import Parameter, make_params, parameters_of, params_of
from mergebench.plugins import named

if TYPE_CHECKING:
    from torch import Tensor as Tensor

    from mergebench.engine.statistics import Statistic
else:
    Tensor = Any  # the methods import torch; listing their parameters must not


class Tasks(NamedTuple):
    """The result of a method that makes one model per task: theta_0 + scales[i] * masks[i] * vector."""

    vector: Tensor  # float32 [elements]
    masks: Tensor  # bool [models, elements]
    scales: tuple[float, ...]  # the same for every chunk


if TYPE_CHECKING:
    TaskVectors = Annotated[Tensor, "models elements"]  # float32, model minus base
    Weights = Annotated[Tensor, "models elements"]  # float32, the models themselves
    # the merged chunk, or the questions on the way to it
    Passes = Tensor | Tasks | Generator[Statistic, Any, Tensor | Tasks]
else:
    TaskVectors = Weights = Passes = Any

Cut = Literal["element", "row", "tensor"]
Whole = Callable[[str, tuple[int, ...]], bool]  # of a tensor's name and shape
Workspace = Callable[[tuple[int, ...], int, Any], int]  # bytes, by shape, number of models and parameters
Effort = Callable[[int, Any], float]


class Bases(NamedTuple):
    """A method on matrices that gives Q_u M(X_i) Q_v' for Q_u X_i Q_v', whatever the orthonormal bases Q.

    Low-rank differences are merged in their own small space. room: the small matrices need this many times (number of
    models * largest rank) rows and columns, or full size, so that the method truncates nothing that it keeps at full
    size. keeps_columns: it works element by element along the rows, so only the left basis may be chosen.
    """

    room: int = 1
    keeps_columns: bool = False


GROUPS = {  # of methods, as lists and docs show them
    "Averages of weights": "of any number of models, without a base",
    "Two models": "from one model towards another",
    "Task vectors": "differences to base_model",
    "Whole matrices": "one weight matrix at a time; other tensors are averaged",
    "With data": "weights, and what the models do on texts",
}
Identity = Literal["one model", "equal models", "order"]  # what `mergebench doctor` expects of any method


@dataclass(frozen=True)
class Method:
    """A merge method and what the engine must know about it."""

    name: str
    function: Callable[..., Any]
    takes: Literal["task_vectors", "weights"]
    gives: Literal["model", "deltas"]
    paper: str
    cut: Cut | Callable[[Any], Cut]  # the smallest piece a tensor may be cut into, or a function of the parameters
    whole: Whole  # with cut "tensor", which tensors must come whole; the others may be cut at any element
    decompositions: Effort  # of a whole matrix's size, by number of models and parameters: for the estimate of time
    workspace: Workspace | None  # bytes the method needs for a whole tensor; None: `TEMPORARIES`
    scope: Literal["tensor", "model"]  # default reach of a statistic
    models: int | None  # exact number of models (base not counted unless it is listed), None for any
    optional_base: bool  # without a base, the weights themselves are the task vectors
    base_counts: bool  # a base counts as a model even if it is not listed
    keeps_base: bool  # what no model changed stays the base's
    params: type
    parameters: Mapping[str, Parameter]
    bases: Bases | None  # for a method on matrices that may run in the models' own bases
    statistics: MeasuredKind | None  # what it reads of each model beside the weights
    exempt: Mapping[Identity, str]  # identities that do not hold by its definition, and why

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name, with the fields that differ from the method of that name."""
        function = self.written
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        try:
            declared = named(function.__module__, function.__qualname__)
            changed = {name: value for name, value in fields.items() if value is not getattr(declared, name)}
        except AttributeError:  # no module has it by name: it is copied, and pickles if its function does
            return _made, (fields,)
        return _varied, (function.__module__, function.__qualname__, changed)

    @property
    def written(self) -> Callable[..., Any]:
        """The function that was declared, without wrappers such as `Lines`."""
        function: Any = self.function
        while not inspect.isfunction(function):
            function = function.method.function
        return function

    @property
    def group(self) -> str:
        """Which of `GROUPS` it belongs to, by what it takes."""
        if self.statistics is not None:
            return "With data"
        if self.cut == "tensor":
            return "Whole matrices"
        if self.models == 2 or (self.models == 1 and self.needs_base):
            return "Two models"
        return "Task vectors" if self.needs_base else "Averages of weights"

    @property
    def needs_base(self) -> bool:
        return self.takes == "task_vectors" and not self.optional_base

    def cut_with(self, params: Any) -> Cut:
        """The smallest piece a tensor may be cut into with these parameters."""
        return self.cut(params) if callable(self.cut) else self.cut

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def make_params(self, values: Mapping[str, Any]) -> Any:
        """The method's `Params` from recipe names to values."""
        return make_params(self.params, values)


def _made(fields: Mapping[str, Any]) -> Method:
    return Method(**fields)


def _varied(module: str, name: str, changed: Mapping[str, Any]) -> Any:
    """A method by its name; if fields differ, a copy."""
    declared = named(module, name)
    return dataclasses.replace(declared, **changed) if changed else declared


def merge_method(
    *,
    takes: Literal["task_vectors", "weights"],
    paper: str,
    gives: Literal["model", "deltas"] = "model",
    cut: Cut | Callable[[Any], Cut] = "element",
    whole: Whole = lambda name, shape: True,
    decompositions: Effort = lambda models, params: 0,
    workspace: Workspace | None = None,
    scope: Literal["tensor", "model"] = "tensor",
    models: int | None = None,
    optional_base: bool = False,
    base_counts: bool = False,
    keeps_base: bool = False,
    bases: Bases | None = None,
    statistics: MeasuredKind | None = None,
    exempt: Mapping[Identity, str] | None = None,
) -> Callable[[Callable[..., Any]], Method]:
    """Declare a function `(chunk, params, ctx)` as a merge method.

    `takes`: whether the chunk holds task vectors (the result is one too, and the engine adds the base) or weights.
    `paper`: the source of the formula. `gives`: a model, or `Tasks`, of which the engine writes the vector and the
    masks. `cut`: the smallest piece a tensor may be cut into, or a function of the parameters. `whole`: with cut
    "tensor", whether the tensor of that name and shape must come whole; other tensors are cut anywhere and merged
    element by element. `decompositions`: with cut "tensor", about how many singular value decompositions of a matrix
    its work equals, by number of models and parameters, for the estimate of time. `workspace`: the most bytes the
    method needs beside a whole chunk, by shape, number of models and parameters. `scope`: the default scope of its
    statistics. `models`: the number of models it takes.
    `optional_base`: without a base, the weights themselves are merged. `base_counts`: a base that is not listed counts
    as one more model. `keeps_base`: a chunk of zero task vectors gives zeros, of either sign, whatever the parameters
    and the answers; so the engine copies what no model changed. `bases`: with cut "tensor", the method may run in the
    models' own bases. `statistics`: the kind of statistics that it reads of each model, in `ctx.on_data`. `exempt`:
    identities that do not hold by definition, and why: `one model` (a single model comes
    out unchanged), `equal models` (so do equal models with weights that add up to one), `order` (of the models, with
    their weights).
    """

    def declare(function: Callable[..., Any]) -> Method:
        for identity in exempt or ():
            if identity not in typing.get_args(Identity):
                raise TypeError(f"{function.__name__}: exempt: '{identity}' is none of {typing.get_args(Identity)}")
        params = params_of(function, 3, "a merge method takes (chunk, params: a dataclass, ctx)")
        return Method(
            name=function.__name__.rstrip("_"),
            function=function,
            takes=takes,
            gives=gives,
            paper=paper,
            cut=cut,
            whole=whole,
            decompositions=decompositions,
            workspace=workspace,
            scope=scope,
            models=models,
            optional_base=optional_base,
            base_counts=base_counts,
            keeps_base=keeps_base,
            params=params,
            parameters=parameters_of(params),
            bases=bases,
            statistics=statistics,
            exempt=dict(exempt or {}),
        )

    return declare
