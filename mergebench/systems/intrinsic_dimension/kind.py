"""Training in a random subspace: theta is trained, and in SAID a lambda for each tensor.

    W_i' = W_i + lambda_i P_i theta         theta [d] starts at zero, lambda at one; P_i: `deltas/subspace.py`

One theta serves every float tensor, and, where asked, the task's head: the paper's code wraps all that its models have.
In SAID the d numbers are m lambdas and d - m of theta. The paper counts a lambda a layer, its code a lambda a tensor:
so it is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergebench.deltas.subspace import GRADIENTS, LARGEST, Subspace, prepared
from mergebench.errors import RecipeError
from mergebench.parameters import param
from mergebench.systems.intrinsic_dimension.fastfood import Fastfood
from mergebench.training.attached import Attached, Base, OnTensors, Put
from mergebench.training.declared import Targets, trained


@dataclass(frozen=True, kw_only=True)
class Params(Targets):
    """The settings of the subspace."""

    d: int = param(1000, "trained numbers in all", low=1)
    said: bool = param(False, "SAID: a lambda for each tensor is trained, and counted; else DID")
    head: bool = param(False, "the task's head is in the subspace too; else trained by itself")
    gradient: str = param("exact", "of theta; fairseq: 1 / n of it, as in the authors' code", choices=GRADIENTS)
    seed: int | None = param(None, "of the subspace; the run's own where not given", low=0)


@trained(paper="arXiv:2012.13255")
def subspace(base: Base, p: Params) -> Attached:
    """All tensors move in one random subspace of d dimensions: DID, SAID."""
    weights = {name: one.values for name, one in base.chosen(p.targets, lambda weight: True).items()}
    weights = {name: one for name, one in weights.items() if 0 < one.numel() <= LARGEST}
    head = dict(base.head) if p.head else {}
    tensors = [*weights.values(), *head.values()]
    lambdas = nn.Parameter(torch.ones(len(tensors)), requires_grad=p.said)
    if p.said and p.d <= len(tensors):
        raise RecipeError(
            f"d: {p.d}: SAID has a lambda for each of {len(tensors)} tensors, and theta nothing",
            f"more than {len(tensors)}, or said: false",
        )
    theta = nn.Parameter(torch.zeros(p.d - len(tensors) * p.said))
    seed = base.generator.initial_seed() if p.seed is None else p.seed
    names = [*weights, *(f"head/{name}" for name in head)]
    drawn = [
        prepared(Subspace(theta.detach(), name, seed), tuple(one.shape))
        for name, one in zip(names, tensors, strict=True)
    ]
    changes = _Changes(theta, lambdas, drawn, [tuple(one.shape) for one in tensors], p.gradient)
    return _InSubspace(base, p, seed, changes, names, head)


class _InSubspace(OnTensors):
    def __init__(
        self, base: Base, p: Params, seed: int, changes: _Changes, names: Sequence[str], head: Mapping[str, Tensor]
    ) -> None:
        self._changes = changes
        trained = {"theta": changes.theta} | ({"scale": changes.lambdas} if p.said else {})

        def of(place: int) -> Put:
            def settings() -> dict[str, object]:
                return {
                    "name": names[place],
                    "seed": seed,
                    "scale": float(changes.lambdas.detach()[place]),
                    "gradient": p.gradient,
                }

            return Put(lambda weight: changes()[place], trained, "subspace", settings)

        super().__init__(base, {name: of(place) for place, name in enumerate(names[: len(names) - len(head)])})
        self._elements = changes.elements
        if head:
            first = len(names) - len(head)
            start = {name: one.detach() for name, one in head.items()}
            self.head = lambda: {
                name: one.to(changes.theta.device) + changes()[first + place]
                for place, (name, one) in enumerate(start.items())
            }

    def about(self) -> Mapping[str, object]:
        """D: how many numbers move."""
        return {"elements": self._elements}


class _Changes:
    """lambda_i P_i theta of all tensors, computed once for each theta."""

    def __init__(
        self,
        theta: nn.Parameter,
        lambdas: nn.Parameter,
        drawn: Sequence[Subspace],
        shapes: Sequence[tuple[int, ...]],
        gradient: str,
    ) -> None:
        self.theta, self.lambdas, self._shapes = theta, lambdas, shapes
        groups: dict[int, list[int]] = {}
        for place, one in enumerate(drawn):
            assert one.gains is not None
            groups.setdefault(len(one.gains), []).append(place)
        self._groups = [
            (Fastfood([drawn[place] for place in places], len(theta), places), 1 / n if gradient == "fairseq" else 1.0)
            for n, places in groups.items()
        ]
        self.elements = sum(math.prod(shape) for shape in shapes)
        self._key: tuple[object, ...] = ()
        self._made_of: tuple[Tensor, Tensor] | None = None
        self._found: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        """In the tensors' shapes."""
        theta, lambdas = self.theta, self.lambdas.to(self.theta.device)
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), theta.device
        was = self._made_of
        if was is None or key != self._key or not (torch.equal(was[0], theta) and torch.equal(was[1], lambdas)):
            found: dict[int, Tensor] = {}
            for fastfood, share in self._groups:
                fastfood.to(theta.device)
                made = zip(fastfood.places.tolist(), fastfood(theta, lambdas, share), strict=True)
                found |= {place: one.view(self._shapes[place]) for place, one in made}
            self._found = [found[place] for place in range(len(found))]
            self._key, self._made_of = key, (theta.detach().clone(), lambdas.detach().clone())
        return self._found
