"""AdaLoRA (arXiv:2303.10512): the rank that its training left to each module, and how orthogonal the factors are."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mergebench.adapters.stored import Stored
from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.header import damaged
from mergebench.deltas.peft.directory import PREFIX

_FACTOR = re.compile(r"(?P<module>.*)\.lora_(?P<factor>[ABE])(\.default)?(\.weight)?")


@dataclass(frozen=True)
class Allocation:
    """The triplets that each module was left with, and the mean over all factors of |A A' - I| and |B' B - I|.

    The factors are meant to be orthogonal, like singular vectors; the norms, which training adds to the loss (eq. 4),
    say whether they are.
    """

    ranks: dict[str, int]
    initial: int
    ever: bool  # whether training ever took a triplet away
    orthogonality: float

    @property
    def variant(self) -> str:
        if not self.ever:
            return f"never allocated: a LoRA of rank {self.initial}"
        return f"{sum(self.ranks.values())} of {self.initial * len(self.ranks)} triplets left"


def allocation(read: Stored) -> Allocation:
    """What an AdaLoRA's files say of its allocation; `RunError` if a module has not all factors."""
    modules: dict[str, dict[str, Tensor]] = {}
    with Files() as files:
        for name, info in read.tensors.items():
            found = _FACTOR.fullmatch(name.removeprefix(PREFIX))
            if found is not None:
                modules.setdefault(found["module"], {})[found["factor"]] = whole(files, info).double()
    for module, factors in modules.items():
        if factors.keys() != {"A", "B", "E"}:
            raise damaged(read.header.file, f"{module} has not all of lora_A, lora_B and lora_E")
    ranks = {module: int(torch.count_nonzero(factors["E"])) for module, factors in modules.items()}
    stored = {module: factors["E"].numel() for module, factors in modules.items()}
    initial = int(read.settings.get("init_r") or max(stored.values(), default=0))
    # values that are all zero were never trained, not taken away
    taken = any(ranks[module] not in (0, initial) or stored[module] != initial for module in modules)
    sides = [side.flatten(1) for factors in modules.values() for side in (factors["A"], factors["B"].flatten(1).T)]
    norms = [float(torch.linalg.norm(side @ side.T - torch.eye(len(side)))) for side in sides]
    ever = taken or bool(read.settings.get("rank_pattern"))
    return Allocation(ranks, initial, ever, sum(norms) / max(len(norms), 1))
