"""LoRA (arXiv:2106.09685): the best product B A of each linear layer's difference (Eckart-Young)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from mergebench.adapters import peft_directory
from mergebench.adapters.fine_tune import Reading
from mergebench.adapters.peft_names import without_layer
from mergebench.adapters.target import Answers, Fit, Settings, Shapes, Target
from mergebench.deltas.peft.directory import WEIGHTS
from mergebench.deltas.svd import Product, keep_energy, truncate

RANK = 16


class _Fitting:
    file, beside = WEIGHTS, ()

    def __init__(self, reading: Reading, settings: Settings) -> None:
        self._reading, self._settings, self._found = reading, settings, reading.found
        self.held: Mapping[str, str] = self._found.linear

    def fit(self, name: str) -> Fit:
        product, module = self._product(name), self.held[name]
        rank = product.a.shape[0]
        factors = {peft_directory.key(module, "A"): product.a, peft_directory.key(module, "B"): product.b}
        return Fit(factors if rank else {}, product.total, product.kept, {"rank": rank})

    def _product(self, name: str) -> Product:
        matrix, how = self._reading.out_in(self._reading.difference(name)), self._settings
        if not matrix.any():  # the fine-tune did not change this layer
            return Product(matrix[:, :0], matrix[:0], 0.0, 0.0)
        if how["energy"]:
            return keep_energy(matrix, how["energy"], how["seed"])
        return truncate(matrix, min(how["rank"], *matrix.shape), how["seed"])

    def shapes(self, stored: Shapes, answers: Answers) -> Shapes:
        """Those of experts and routers have one rank; unchanged experts of a layer are zeros."""
        layers = {name: self._found.shape(name) for name in self.held}
        factors: dict[str, tuple[int, ...]] = {}
        for module, rank in self._ranks(answers).items():
            out, inputs = next(layers[name] for name, held in self.held.items() if held == module)
            factors |= {
                peft_directory.key(module, "A"): (rank, inputs), peft_directory.key(module, "B"): (out, rank),
            }  # fmt: skip
        return factors

    def _ranks(self, answers: Answers) -> dict[str, int]:
        ranks = {self.held[name]: answer["about"]["rank"] for name, answer in answers.items()}
        return peft_directory.one_rank(ranks, self._without_layer)

    @cached_property
    def _without_layer(self) -> set[str]:
        return without_layer(self._found.base, self.held.values())

    def config(self, answers: Answers) -> dict[str, Any]:
        base, ranks = self._found.base, self._ranks(answers)
        usual = next((ranks[module] for module in ranks if module in self._without_layer), None)
        return peft_directory.config(ranks, self._found.transposed, base, usual)

    def metadata(self, answers: Answers) -> Mapping[str, str]:
        return {}

    def summary(self, answers: Answers) -> Mapping[str, Any]:
        return {}

    def at_most(self) -> int:
        shapes, rank = map(self._found.shape, self.held), self._settings["rank"]
        return 0 if rank is None else sum(4 * min(rank, *shape) * sum(shape) for shape in shapes)


def _check(settings: Settings) -> Settings:
    peft_directory.check_kept(settings["rank"], settings["energy"])
    return {**settings, "rank": settings["rank"] or (None if settings["energy"] else RANK)}


def rank_bytes(reading: Reading) -> int:
    """Bytes of one rank of every linear layer that changed."""
    return sum(4 * sum(reading.found.shape(name)) for name in reading.changed_layers)


def ranks_within(reading: Reading, budget: int) -> list[Settings]:
    """The largest rank that a budget holds, at least 1."""
    return [{"rank": max(budget // max(rank_bytes(reading), 1), 1)}]


lora = Target(
    stores="B A, of linear layers",
    takes={"rank": None, "energy": None, "seed": 0},
    begin=_Fitting,
    within=ranks_within,
    check=_check,
)
