"""Merge one module of several adapters: on the factors where that is exact, else on the full differences.

Sums are products of the factors side by side. A method on matrices that gives Q_u M(X_i) Q_v' for Q_u X_i Q_v',
whatever the orthonormal bases, is run on the small X_i: with Q_u R_u = [B_1 .. B_N] and Q_v R_v = [A_1' .. A_N'], every
difference is such a product. Every other method takes the full differences; so does DoRA, whose difference has full
rank. The method declares which applies.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench import methods
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.values import chain
from mergebench.deltas.formats.lora import Adapter
from mergebench.deltas.peft.factors import Factors
from mergebench.deltas.svd import Product, compress, truncate
from mergebench.engine.context import Context
from mergebench.engine.method import Method
from mergebench.engine.replay import CHUNK, run_at_once, run_in_chunks
from mergebench.engine.span import Span
from mergebench.errors import RecipeError, RunError

SUMS = ("linear", "cat", "svd")  # only for adapters: weighted sums of their products
# PEFT's other names: the method, and its fixed parameters
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"magnitude_prune": ("breadcrumbs", {"gamma": 0.0})}


class OnBase(NamedTuple):
    """A delta that depends on the base's weights, and these weights."""

    info: TensorInfo
    delta: Delta


class Part(NamedTuple):
    """One adapter's change to a module."""

    factors: Factors
    dora: OnBase | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Job:
    """A merge of adapters: adapters opened, settings checked."""

    adapters: list[Adapter]
    parts: list[dict[str, Part]]  # by module, for each adapter
    method: str
    weights: tuple[float, ...]
    density: float | None
    rank: int | None
    seed: int

    def at(self, module: str) -> list[Part | None]:
        return [parts.get(module) for parts in self.parts]

    def on_factors(self, module: str) -> bool:
        """Whether a module is merged without computing its full differences."""
        own = self.method in SUMS or built_in(self.method)[0].bases is not None
        return own and not any(part and part.dora for part in self.at(module))


def built_in(name: str) -> tuple[Method, dict[str, Any]]:
    """The merge method behind an adapter method, and its fixed parameters."""
    method, given = ALIASES.get(name, (name, {}))
    return methods.get(method), given


def known() -> list[str]:
    """Every method that merges adapters: sums, and all merge methods, also of other packages, that make one model of
    any number of task vectors."""
    able = [name for name in methods.names() if name not in SUMS and merges(methods.get(name))]
    return [*SUMS, *ALIASES, *able]


def is_known(name: str) -> bool:
    """Whether a method of that name merges adapters."""
    if name in SUMS or name in ALIASES:
        return True
    with suppress(RecipeError):
        return merges(methods.get(name))
    return False


def merges(method: Method) -> bool:
    """Whether a merge method makes one task vector of any number of them."""
    one = method.gives == "model" and method.models is None and method.statistics is None
    return method.takes == "task_vectors" and one


def merged(files: Files, job: Job, module: str, shape: tuple[int, int], rank: int) -> Product:
    """The module's merged difference [out, in] as a product of `rank`."""
    if not job.on_factors(module):
        product = truncate(_written_out(files, job, module, shape), rank)
    elif job.method in SUMS:
        product = _sum(files, job, module, rank)
    else:
        product = _in_small(files, job, module, shape, rank)
    if not (torch.isfinite(product.a).all() and torch.isfinite(product.b).all()):
        raise RunError(f"{module}: the merged factors do not fit into float32", "use smaller weights")
    return product


def _sum(files: Files, job: Job, module: str, rank: int) -> Product:
    left, right = [], []
    for weight, part in zip(job.weights, job.at(module), strict=True):
        if part is not None:
            left.append(finite(files, part.factors.b) * (weight * part.factors.scale))  # the sign on one factor only
            right.append(finite(files, part.factors.a))
    b, a = torch.cat(left, dim=1), torch.cat(right)
    return Product(b, a, 1.0, 1.0) if job.method == "cat" else compress(b, a, rank)


def _in_small(files: Files, job: Job, module: str, shape: tuple[int, int], rank: int) -> Product:
    """Q_u M(X_i) Q_v', with the X_i padded by zeros, so that the method truncates nothing that it keeps at full
    size."""
    parts, bases = job.at(module), built_in(job.method)[0].bases
    assert bases is not None
    b = {at: finite(files, part.factors.b).double() * part.factors.scale for at, part in enumerate(parts) if part}
    a = {at: finite(files, part.factors.a).double() for at, part in enumerate(parts) if part}
    left = torch.linalg.qr(torch.cat([*b.values()], dim=1)).Q
    right = None if bases.keeps_columns else torch.linalg.qr(torch.cat([*a.values()]).T).Q
    room = bases.room * len(parts) * max(len(one) for one in a.values())
    rows = torch.zeros(len(parts), min(room, shape[0]), shape[1] if right is None else min(room, shape[1]))
    for at in b:
        x = (left.T @ b[at]) @ (a[at] if right is None else a[at] @ right)
        rows[at, : x.shape[0], : x.shape[1]] = x
    found = _run(job, module, rows).double()[: left.shape[1]]
    return compress(left, found, rank) if right is None else compress(left @ found[:, : right.shape[1]], right.T, rank)


def _written_out(files: Files, job: Job, module: str, shape: tuple[int, int]) -> Tensor:
    """The merge method on the module's full differences, with the module as the whole model."""
    parts = job.at(module)
    if job.method in SUMS:
        summed = torch.zeros(shape)
        for weight, part in zip(job.weights, parts, strict=True):
            if part is not None:
                summed.add_(_difference(files, part, shape), alpha=weight)
        return summed
    rows = torch.zeros(len(parts), *shape)
    for row, part in zip(rows, parts, strict=True):
        if part is not None:
            row.copy_(_difference(files, part, shape))
    return _run(job, module, rows)


def _difference(files: Files, part: Part, shape: tuple[int, int]) -> Tensor:
    """An adapter's difference [out, in]."""
    b, a = finite(files, part.factors.b), finite(files, part.factors.a)
    if part.dora is None:
        return (b * part.factors.scale) @ a
    stored = torch.zeros(shape[::-1] if part.transposed else shape)
    chain(files, Scales(files), part.dora.info, [part.dora.delta]).add_into(0, stored.view(-1))
    if not torch.isfinite(stored).all():  # a row of length zero has no direction
        raise RunError(
            f"{part.factors.b.file}: {part.factors.b.name}: DoRA's difference is not finite",
            "is --base the model it was trained on?",
        )
    return stored.T if part.transposed else stored


def _run(job: Job, module: str, rows: Tensor) -> Tensor:
    """The merge method on rows [models, out, in]."""
    method, given = built_in(job.method)
    given = given | {"weight": job.weights} | ({} if job.density is None else {"density": job.density})
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        value = given.get(name, parameter.default)
        values[name] = (value,) * len(rows) if parameter.per_model and not isinstance(value, tuple) else value
    flat, shape = rows.flatten(1), tuple(rows.shape[1:])
    names = tuple(adapter.directory.name for adapter in job.adapters)
    span, params = Span(f"{module}.weight", 0, flat.shape[1]), method.make_params(values)
    context = Context(flat.shape[1], names, (span,), shape, "tensor", job.seed, torch.device("cpu"))
    if method.cut_with(params) == "tensor":
        return run_at_once(method, flat, params, context, _no_questions).view(shape)
    chunk = max(CHUNK // shape[1], 1) * shape[1] if method.cut_with(params) == "row" else CHUNK
    return run_in_chunks(method, flat, params, context, chunk).view(shape)


def _no_questions(question: object) -> Any:
    raise AssertionError("a method on matrices asks nothing")


def finite(files: Files, tensor: TensorInfo) -> Tensor:
    """An adapter's tensor in float32; `RunError` if a value is not finite."""
    values = whole(files, tensor).float()
    if not torch.isfinite(values).all():
        raise RunError(f"{tensor.file}: '{tensor.name}' holds NaN or infinity", "use another adapter")
    return values
