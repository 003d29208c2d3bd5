"""AdaLoRA (arXiv:2303.10512): a budget of rank, shared out over the matrices while they are trained.

    W' = W + s B diag(E) A        s = alpha / (init_rank + 1e-5); A and B start at random, E at zero

A triplet is a row of A, a value of E and a column of B. With T steps, t_i of them before and t_f after the cut, the
budget of the whole model is, from b_0 = init_rank to b_T = target_rank a matrix on average,

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3

Every `delta_t` steps E is set to zero in all but the b(t) most important triplets; what is left at T - t_f stays. An
element's importance is the product of two running means: of I = |p grad p|, and of |I - its mean|; a triplet's is that
of its E plus the means over its row and its column. PEFT's allocator does this (0.21); here it is called when it has
to be, on a schedule that fits the steps there are, and it goes into the checkpoints.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.deltas.peft.directory import PREFIX
from mergebench.errors import ModelError, RecipeError
from mergebench.parameters import param
from mergebench.plugins import need
from mergebench.training.attached import Attached, Base
from mergebench.training.declared import Targets, trained
from mergebench.training.peft_adapters import PeftAdapter


@dataclass(frozen=True, kw_only=True)
class Params(Targets):
    """The settings of AdaLoRA."""

    init_rank: int = param(12, "of every matrix at the start", low=2)
    target_rank: int = param(8, "of a matrix at the end, on average", low=1)
    warmup: float = param(0.1, "share of the steps before the budget falls", low=0, below=1)
    final: float = param(0.5, "share of the steps after it has fallen", low=0, below=1)
    delta_t: int = param(1, "steps between two allocations", low=1)
    beta1: float = param(0.85, "of the running mean of the importance", above=0, below=1)
    beta2: float = param(0.85, "of the running mean of its uncertainty", above=0, below=1)
    orthogonality: float = param(0.5, "weight of the mean of |A A' - I| and |B' B - I| in the loss", low=0)
    alpha: float | None = param(None, "of the scale alpha / init_rank; twice init_rank where not given", above=0)


@dataclass(frozen=True)
class Schedule:
    """When the budget falls: after the steps `before`, to the step `end`, of `steps`."""

    steps: int
    before: int
    end: int

    @classmethod
    def of(cls, p: Params, steps: int) -> Schedule:
        """`RecipeError` if the budget would not fall step by step."""
        if p.target_rank >= p.init_rank:
            raise RecipeError(
                f"target_rank: {p.target_rank}: init_rank is {p.init_rank}, nothing would be taken away",
                f"init_rank: {(3 * p.target_rank + 1) // 2}",
            )
        found = cls(steps, round(p.warmup * steps), steps - round(p.final * steps))
        if not range(p.delta_t * (found.before // p.delta_t + 1), found.end, p.delta_t):
            raise RecipeError(
                f"adalora: the budget would not fall: of {steps} steps {found.before} are before it "
                f"(warmup: {p.warmup:g}), {steps - found.end} after it (final: {p.final:g}), and none of those between "
                f"is a multiple of {p.delta_t} (delta_t)",
                f"delta_t: {found.end - 1}, or less"
                if found.end - 1 > found.before
                else "more epochs, or smaller warmup and final",
            )
        return found


@trained(paper="arXiv:2303.10512")
def adalora(base: Base, p: Params) -> Attached:
    """A LoRA whose rank is shared out over the matrices while it is trained: AdaLoRA."""
    need("peft", "AdaLoRA")
    schedule = Schedule.of(p, base.steps)
    return AdaLora(base, p, schedule)


class AdaLora(PeftAdapter):
    """PEFT's AdaLoRA with its allocator."""

    one_training = True  # its budget falls by the number of the step

    def __init__(self, base: Base, p: Params, schedule: Schedule) -> None:
        names = {id(module): name for name, module in base.network.module.named_modules()}
        weights = base.matrices(p.targets, p.init_rank)
        modules = [names[id(base.network.places[name][0][0])] for name in weights]
        settings = {
            "init_r": p.init_rank,
            "target_r": p.target_rank,
            "tinit": schedule.before,
            "tfinal": schedule.steps - schedule.end,
            "total_step": schedule.steps,
            "deltaT": p.delta_t,
            "beta1": p.beta1,
            "beta2": p.beta2,
            "orth_reg_weight": p.orthogonality,
            "lora_alpha": 2 * p.init_rank if p.alpha is None else p.alpha,
            "target_modules": modules,
        }
        super().__init__(base, "ADALORA", settings)
        self._schedule, self._weight = schedule, p.orthogonality
        self._allocator = self.model.base_model.rankallocator
        self._config = self.model.peft_config["default"]
        # by the allocator's names, MODULE.lora_A.default
        self._named = {name.removeprefix(PREFIX): one for name, one in self.parameters.items()}
        found = {_module(name) for name in self._named}
        if found != set(modules):
            more = ", ".join(sorted(found - set(modules))[:3])
            raise ModelError(f"{base.model.reference}: PEFT takes {more} for a target too", "name other targets")
        self._at_first = _orthogonality(self._sides().values())

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        """The running means of the importance of every element."""
        return {name: torch.zeros_like(one) for name, one in self._named.items()}

    @cached_property
    def _uncertainty(self) -> dict[str, Tensor]:
        """And of the distance of the importance from its mean."""
        return {name: torch.zeros_like(one) for name, one in self._named.items()}

    @cached_property
    def _kept(self) -> dict[str, Tensor]:
        """The triplets that are left at the end, of each E."""
        return {n: torch.ones_like(one[:, 0], dtype=torch.bool) for n, one in self._named.items() if ".lora_E." in n}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The allocator's."""
        parts = {"mean": self._means, "uncertainty": self._uncertainty, "kept": self._kept}
        return {f"{part}.{name}": one for part, several in parts.items() for name, one in several.items()}

    def settled(self, step: int) -> bool:
        """Whether the budget has fallen."""
        return step >= self._schedule.end

    def after_step(self, step: int) -> None:
        """Update the importance, and take triplets away."""
        for one in self._named.values():
            if one.grad is None:  # takes no part in the loss, as an expert that no token was sent to
                one.grad = torch.zeros_like(one)
        # PEFT's allocator holds the means in dictionaries, which it fills anew in each step
        allocator = self._allocator
        allocator.ipt, allocator.exp_avg_ipt = dict(self._means), dict(self._means)
        allocator.exp_avg_unc = dict(self._uncertainty)
        self._config.rank_pattern = self._pattern()
        self.model.base_model.update_and_allocate(step)
        with torch.no_grad():
            if step < self._schedule.end:
                for name, mean in self._means.items():
                    mean.copy_(allocator.exp_avg_ipt[name])
                    self._uncertainty[name].copy_(allocator.exp_avg_unc[name])
            elif step == self._schedule.end:
                for name, kept in self._kept.items():
                    kept.copy_(torch.tensor(self._config.rank_pattern[name]))

    def penalty(self) -> Tensor | None:
        """The weight times the mean of |A A' - I| and |B' B - I|: the norms, as both published codes have them."""
        if not self._weight:
            return None
        return self._weight * torch.stack([_apart(one) for one in self._sides().values()]).mean()

    def save(self, directory: Path) -> None:
        """PEFT's directory; once the budget has fallen, the triplets that are left alone."""
        allocated = not all(one.all() for one in self._kept.values())
        self._config.rank_pattern = self._pattern() if allocated else None
        super().save(directory)

    def about(self) -> Mapping[str, Any]:
        """The rank of each module, and how far from orthogonal the factors that are left are."""
        left = {_module(name): one for name, one in self._kept.items()}
        ranks = {module: int(one.sum()) for module, one in left.items()}
        sides = [one[left[_module(name)]] for name, one in self._sides().items()]
        budget = {"initial": self._allocator.init_bgt, "target": self._allocator.target_bgt}
        return {
            "schedule": asdict(self._schedule),
            "triplets": {**budget, "left": sum(ranks.values())},
            "ranks": ranks,
            "orthogonality": {"at_first": self._at_first, "at_last": _orthogonality(sides)},
        }

    def _pattern(self) -> dict[str, list[bool]]:
        return {name: one.tolist() for name, one in self._kept.items()}

    def _sides(self) -> dict[str, Tensor]:
        """A [r, in] and B' [r, out] of every module."""
        a = {name: one for name, one in self._named.items() if ".lora_A." in name}
        return a | {name: one.T for name, one in self._named.items() if ".lora_B." in name}


def _module(name: str) -> str:
    """The module of one of the allocator's names."""
    return name.rpartition(".lora_")[0]


def _apart(side: Tensor) -> Tensor:
    """|S S' - I| of S [r, n], Frobenius."""
    with torch.autocast(side.device.type, enabled=False):
        norm: Tensor = torch.linalg.matrix_norm(side @ side.T - torch.eye(len(side), device=side.device))
    return norm


@torch.no_grad()
def _orthogonality(sides: Iterable[Tensor]) -> dict[str, float]:
    """The mean and the largest |S S' - I|."""
    found = [float(_apart(side)) for side in sides]
    return {"mean": statistics.fmean(found), "largest": max(found)}
