"""Single elements of the difference: chosen by the base's magnitudes (PaFi, arXiv:2305.16742: the smallest;
PEFT's default for Super-Tuning, arXiv:2607.09287: the largest), by the difference's, at random, or by a mask file.

A share of each linear layer is a Super-Tuning directory that PEFT loads. No PEFT type holds one ranking over the whole
model, which has another number in each tensor: it is a delta file. On a mask file, only the values are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.adapters import peft_directory
from mergebench.adapters.fine_tune import Reading, tiles
from mergebench.adapters.smallest import Keys, Ranking, check_length, magnitude_keys, smallest
from mergebench.adapters.target import Answers, Fit, Settings, Shapes, Target
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import Files, whole
from mergebench.deltas.formats import masked, native
from mergebench.deltas.formats.native import DELTAS
from mergebench.deltas.peft.directory import PREFIX, WEIGHTS
from mergebench.engine import noise
from mergebench.engine.span import Span
from mergebench.errors import ModelError, RecipeError

MASKS = "smallest", "largest", "topdelta", "random"
SCOPES = "tensor", "model"
SHARE = 0.005  # PaFi's


def _keys(reading: Reading, settings: Settings) -> Callable[[str], Iterator[Keys]]:
    """The keys of a tensor by which its elements are chosen, the smallest first."""
    mask, seed = settings["mask"], settings["seed"]

    def keys(name: str) -> Iterator[Keys]:
        if mask == "random":
            for start, stop in tiles(reading.found.base.tensors[name].numel):
                yield noise.keys(seed, Span(name, start, stop))
        else:
            pieces = reading.pieces(name) if mask == "topdelta" else reading.base_pieces(name)
            for piece in pieces:
                yield magnitude_keys(piece, largest=mask != "smallest")

    return keys


class _Fitting:
    """What all scopes share: the values at the chosen positions."""

    file = DELTAS
    held: Mapping[str, str]
    beside: tuple[Path, ...] = ()

    def __init__(self, reading: Reading, settings: Settings) -> None:
        self._reading, self._settings, self._found = reading, settings, reading.found
        self._shapes = reading.found.shapes
        for name in self._shapes:
            check_length(name, self._found.base.tensors[name].numel)

    def fit(self, name: str) -> Fit:
        flat = self._reading.difference(name).flatten()
        total = self._reading.squared_norm(name)
        positions = self._positions(name) if total or self._keeps_zeros else flat.new_empty(0, dtype=torch.int32)
        values = flat[positions.long()]
        tensors = self._tensors(name, values, positions) if len(positions) else {}
        return Fit(tensors, total, float(values.double().square().sum()), {"count": len(values)})

    _keeps_zeros = False  # whether values are stored where nothing has changed

    def _positions(self, name: str) -> Tensor:
        raise NotImplementedError

    def _tensors(self, name: str, values: Tensor, positions: Tensor) -> Mapping[str, Tensor]:
        return {f"{name}.values": values, f"{name}.indices": positions}

    def shapes(self, stored: Shapes, answers: Answers) -> Shapes:
        return stored

    def config(self, answers: Answers) -> dict[str, Any] | None:
        return None

    def metadata(self, answers: Answers) -> Mapping[str, str]:
        return {}

    def summary(self, answers: Answers) -> Mapping[str, Any]:
        return {"count": sum(answer["about"]["count"] for answer in answers.values())}

    def at_most(self) -> int:
        return 0


class _ByTensor(_Fitting):
    """A share of each linear layer, as PEFT's SUPERTUNING."""

    file = WEIGHTS

    def __init__(self, reading: Reading, settings: Settings) -> None:
        super().__init__(reading, settings)
        if self._found.transposed:
            text = f"{self._found.base.reference} stores its linear layers [in, out], where PEFT puts no Super-Tuning"
            raise ModelError(text, "--scope model writes a delta file")
        self._keys, self.held = _keys(reading, settings), self._found.linear

    def _positions(self, name: str) -> Tensor:
        keys = torch.cat([torch.from_numpy(piece) for piece in self._keys(name)]).numpy()
        return smallest(keys, peft_count(len(keys), self._settings["share"]))

    def _tensors(self, name: str, values: Tensor, positions: Tensor) -> Mapping[str, Tensor]:
        module = f"{PREFIX}{self.held[name]}"
        return {f"{module}.supertuning_values": values, f"{module}.supertuning_indices": positions}

    def config(self, answers: Answers) -> dict[str, Any]:
        how = {"sparsity": 1 - self._settings["share"], "select_top": self._settings["mask"] == "largest"}
        modules = [self.held[name] for name in answers]
        return peft_directory.plain_config(
            "SUPERTUNING", self._found.base, modules, **how, save_precomputed_indices=True
        )


class _OverModel(_Fitting):
    """A share of all tensors together, in one ranking, as a delta file."""

    _keeps_zeros = True  # the number of elements is what was asked for

    def __init__(self, reading: Reading, settings: Settings) -> None:
        super().__init__(reading, settings)
        self.held = {name: name for name in self._shapes if reading.included(name)}
        numel = sum(self._found.base.tensors[name].numel for name in self.held)
        self._ranking = Ranking(self.held, _keys(reading, settings), max(round(settings["share"] * numel), 1))

    def _positions(self, name: str) -> Tensor:
        return self._ranking.positions(name)

    def metadata(self, answers: Answers) -> Mapping[str, str]:
        listed = {name: native.Listed("scattered", ("values", "indices")) for name in answers}
        made = {key: self._settings[key] for key in ("mask", "share", "seed")}
        return native.metadata_of(listed, made=made, base=identity(self._found.base))


class _OnMask(_Fitting):
    """The values at the positions of a mask file, which stays where it is."""

    file = masked.VALUES
    _keeps_zeros = True  # so that all tasks have the same positions

    def __init__(self, reading: Reading, settings: Settings) -> None:
        super().__init__(reading, settings)
        self._mask = Path(settings["mask"])
        self.beside = (self._mask,)
        mask = masked.read_mask_of(self._mask, self._found.base)
        lost = [name for name in mask.positions if name not in self._shapes]
        if lost:
            raise ModelError(f"{self._mask}: {lost[0]}: the fine-tune has no change of this tensor")
        self._infos, self.held = mask.positions, {name: name for name in mask.positions}

    def _positions(self, name: str) -> Tensor:
        with Files() as files:
            return whole(files, self._infos[name])

    def _tensors(self, name: str, values: Tensor, positions: Tensor) -> Mapping[str, Tensor]:
        return {name: values}

    def metadata(self, answers: Answers) -> Mapping[str, str]:
        return masked.metadata_of(self._mask, identity(self._found.base), {"model": self._found.model})


def peft_count(numel: int, share: float) -> int:
    """How many elements PEFT's SUPERTUNING keeps of a matrix at `sparsity` 1 - share, with its rounding."""
    return int(numel * (1 - (1 - share)))


def _begin(reading: Reading, settings: Settings) -> _Fitting:
    if settings["mask"] not in MASKS:
        return _OnMask(reading, settings)
    return (_OverModel if settings["scope"] == "model" else _ByTensor)(reading, settings)


def _check(settings: Settings) -> Settings:
    if settings["mask"] not in MASKS:
        if not Path(settings["mask"]).is_file():
            raise RecipeError(f"--mask: '{settings['mask']}' is no mask and no file", ", ".join(MASKS))
        for option in ("share", "scope"):
            if settings[option] is not None:
                raise RecipeError(f"--{option}: the mask file says it")
        return settings
    share = SHARE if settings["share"] is None else settings["share"]
    settings = {**settings, "share": share, "scope": settings["scope"] or "tensor"}
    if settings["scope"] not in SCOPES:
        raise RecipeError(f"--scope: '{settings['scope']}' is not possible", " or ".join(SCOPES))
    if not 0 < settings["share"] < 1:
        raise RecipeError(f"--share: must be above 0 and below 1, got {settings['share']:g}", "such as 0.5%")
    return settings


def _within(reading: Reading, budget: int) -> list[Settings]:
    """Every way to choose, in each linear layer, and the largest changes of all tensors: 8 bytes per element."""
    tensors = reading.found.base.tensors
    linear = sum(tensors[name].numel for name in reading.changed_layers)
    everything = sum(tensors[name].numel for name in reading.found.shapes if reading.included(name))
    layers = (
        [] if reading.found.transposed or not linear else [{"mask": m, "share": _share(budget, linear)} for m in MASKS]
    )
    return [*layers, {"mask": "topdelta", "share": _share(budget, everything), "scope": "model"}]


def _share(budget: int, numel: int) -> float:
    return min(budget / 8 / numel, 0.999)


sparse = Target(
    stores="values and positions",
    takes={"mask": "topdelta", "share": None, "scope": None, "seed": 0},
    begin=_begin,
    within=_within,
    check=_check,
)
