"""What is trained on a network: changes to its tensors, made by the formulas of `deltas/`.

A `Put` is one tensor's change, with the parameters that it is made of. `on_tensors` puts them on a network: each time a
layer reads its weight W it gets W + change(W), with gradients to the parameters alone. The same function folds the
saved delta into a checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from mergebench.checkpoint.content import identity
from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.kind import DeltaKind
from mergebench.checkpoint.model import Model
from mergebench.deltas.formats.native import DELTAS, Writing, is_delta_file, read_file, write_file
from mergebench.errors import ModelError, RecipeError
from mergebench.networks.network import Network
from mergebench.training.task import Head, TrainingTask

SAME = "continue with the kind and settings that the run was trained with"


class Weight(NamedTuple):
    """A tensor of a network that can be changed."""

    name: str  # in the model's files
    values: Tensor  # as stored, float32
    linear: bool  # the weight of a linear layer in the blocks
    in_out: bool  # stored [in, out], as GPT-2's layers are
    bias: bool  # a bias of a linear layer in the blocks


@dataclass(frozen=True)
class Base:
    """The model that something is put on."""

    model: Model
    network: Network
    generator: Generator  # for what starts at random
    steps: int = 0  # of the optimiser, in all
    head: Mapping[str, Tensor] = field(default_factory=dict)  # of the task, as it starts

    @property
    def weights(self) -> dict[str, Weight]:
        """Every float tensor that is in memory, by its name in the files; of tied ones the first."""
        places, inside = self.network.places, _inside_blocks(self.network)
        seen: set[int] = set()
        found = {}
        for name, several in places.items():
            if not several or not (values := getattr(*several[0])).is_floating_point() or id(values) in seen:
                continue
            module, attribute = several[0]
            seen.add(id(values))
            in_out = _is_conv1d(module)
            layer = (isinstance(module, nn.Linear) or in_out) and id(module) in inside
            found[name] = Weight(
                name, values.detach(), layer and attribute == "weight", in_out, layer and attribute == "bias"
            )
        return found

    def chosen(self, targets: Sequence[str], default: Callable[[Weight], bool]) -> dict[str, Weight]:
        """The weights that globs name; without globs those of `default`. `RecipeError` if a glob names none."""
        weights = self.weights
        for glob in targets:
            if not any(fnmatchcase(name, glob) for name in weights):
                some = ", ".join(list(weights)[:3])
                raise RecipeError(
                    f"targets: '{glob}' names no tensor of {self.model.reference}",
                    f"its tensors are called {some}, ...",
                )
        if targets:
            found = {n: one for n, one in weights.items() if any(fnmatchcase(n, glob) for glob in targets)}
        else:
            found = {name: one for name, one in weights.items() if default(one)}
        if not found:
            raise ModelError(
                f"{self.model.reference}: it has no tensor that this kind changes", "name them: targets: [GLOB]"
            )
        return found

    def matrices(self, targets: Sequence[str], rank: int | None = None) -> dict[str, Weight]:
        """The weights that globs name, by default of linear layers; `RecipeError` if one is no matrix, or if a rank is
        above its smaller side."""
        found = self.chosen(targets, lambda weight: weight.linear)
        for name, one in found.items():
            if one.values.dim() != 2:
                raise RecipeError(f"targets: {name}: {list(one.values.shape)} is no matrix", "name matrices alone")
            if rank is not None and rank > min(one.values.shape):
                shape = list(one.values.shape)
                raise RecipeError(f"rank: {rank}: {name} is {shape}", f"at most {min(shape)}")
        return found


def _inside_blocks(network: Network) -> set[int]:
    """The modules in the network's blocks."""
    return {id(module) for block in network.blocks.values() for module in block.modules()}


@dataclass(frozen=True)
class Put:
    """A change to one tensor: change(W) of its shape, the parameters it is made of, and how it is saved."""

    change: Callable[[Tensor], Tensor]
    parameters: Mapping[str, nn.Parameter]  # by the names of the kind's parts; under that of a setting: saved as one
    kind: str
    settings: Callable[[], Mapping[str, Any]] = dict  # of the saved delta
    fixed: Mapping[str, Tensor] = field(default_factory=dict)  # parts that are saved and not trained
    saved: Callable[[], Mapping[str, Tensor]] | None = None  # parts saved in place of the parameters
    folds: bool = False  # change(W) is W' itself
    layer: Layer | None = None  # how a linear layer runs with it, where that is cheaper than by W'


Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # from inputs [..., in], W as it was, and the bias


def put(kind: DeltaKind, parts: Any, *fixed: str, **settings: Any) -> Put:
    """A change by a kind of delta: the parts that are `nn.Parameter` are trained.

    parts: the kind's dataclass, as its function takes it. fixed: names of other parts to save.
    """
    values = {one.name: getattr(parts, one.name) for one in fields(parts)}
    parameters = {name: value for name, value in values.items() if isinstance(value, nn.Parameter)}

    def change(weight: Tensor) -> Tensor:
        rows, columns = matrix_shape(weight.shape)
        return kind(parts, slice(0, rows), weight.view(rows, columns)).view(weight.shape)

    return Put(change, parameters, kind.name, lambda: settings, {name: values[name] for name in fixed})


class Attached:
    """What is on a network, and its trained parameters by name."""

    head: Callable[[], Mapping[str, Tensor]] | None = None  # the task's head, where it is made of these parameters
    one_training = False  # whether it is made for the steps of one training, so that it cannot be trained in sessions

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    @property
    def count(self) -> int:
        """Trained numbers."""
        return sum(one.numel() for one in {id(one): one for one in self.parameters.values()}.values())

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What else a checkpoint holds, changed in place alone; asked for once, when all is on its device."""
        return {}

    def settled(self, step: int) -> bool:
        """Whether it has its last form after this step: validation chooses among these."""
        return True

    def save(self, directory: Path) -> None:
        """Write what is trained, so that `BASE+directory` is the model."""
        raise NotImplementedError

    def reference(self, base: str, directory: Path) -> str:
        """The model that it makes of `base`, saved in `directory`."""
        return f"{base}+{directory}"

    def load(self, directory: Path) -> None:
        """Start as what an earlier run saved; `RecipeError` if it trained something else."""
        raise RecipeError("from: this kind starts as its base is", "name what the run made as the model")

    def scratch(self, task: TrainingTask) -> int:
        """Bytes on disk that training needs for a while."""
        return 0

    def begin(self, task: TrainingTask, head: Head, directory: Path, progress: Callable[[str, int, int], None]) -> None:
        """Called before the first step; directory: of what training needs for a while."""

    def set_mode(self, network: Network, training: bool) -> None:
        """Dropout on or off."""
        network.module.train(training)

    def penalty(self) -> Tensor | None:
        """A term whose gradient is added to that of every step's loss."""
        return None

    def after_step(self, step: int) -> None:
        """Called after each step of the optimiser, with its number from 1, while the gradients are there."""

    def about(self) -> Mapping[str, Any]:
        """What results say of it when training is over."""
        return {}

    def held(self) -> AbstractContextManager[Any]:
        """A context in which the parameters do not change, for measuring."""
        return nullcontext()


class OnTensors(Attached):
    """Changes to tensors."""

    def __init__(self, base: Base, puts: Mapping[str, Put]) -> None:
        named = {f"{name}.{part}": one for name, put in puts.items() for part, one in put.parameters.items()}
        first = {id(one): name for name, one in reversed(named.items())}
        super().__init__({name: one for name, one in named.items() if first[id(one)] == name})
        for one in self.parameters.values():
            one.data = one.data.to(base.network.device)
        self._puts, self._base = dict(puts), base
        for name, put in puts.items():
            change = _Changed(put)
            for module, attribute in base.network.places[name]:
                parametrize.register_parametrization(module, attribute, change, unsafe=True)
                if put.layer is not None and (isinstance(module, nn.Linear) or _is_conv1d(module)):
                    module.forward = partial(_run, module, put.layer)

    def save(self, directory: Path) -> None:
        """One file of deltas; parameters that several tensors use are in it once."""
        uses = Counter(id(one) for put in self._puts.values() for one in put.parameters.values())
        names: dict[int, str] = {}
        shared: dict[str, Tensor] = {}
        writings = {}
        for name, put in self._puts.items():
            own: dict[str, Tensor] = {part: value.cpu() for part, value in put.fixed.items()}
            common = {}
            trained = put.parameters
            if put.saved is not None:
                with torch.no_grad():
                    own |= {part: value.cpu().contiguous() for part, value in put.saved().items()}
                trained = {}
            settings = put.settings()
            for part, value in trained.items():
                if part in settings:
                    continue
                if uses[id(value)] == 1:
                    own[part] = value.detach().cpu().contiguous()
                    continue
                if id(value) not in names:
                    names[id(value)] = f"shared.{len(names)}"
                    shared[names[id(value)]] = value.detach().cpu().contiguous()
                common[part] = names[id(value)]
            writings[name] = Writing(put.kind, settings, own, common)
        made = {"command": "train", "base": self._base.model.reference}
        write_file(directory / DELTAS, writings, shared, made, identity(self._base.model))

    def load(self, directory: Path) -> None:
        """The values of the same parts of the same tensors."""
        if not is_delta_file(directory):
            raise RecipeError(f"from: {directory}: what was trained there is no file of deltas", SAME)
        entries = read_file(directory).entries
        other = next((name for name in (entries.keys() ^ self._puts.keys())), None)
        if other is not None:
            raise RecipeError(f"from: {directory}: {other} is changed there or here, not in both", SAME)
        with Files() as files, torch.no_grad():
            for name, put in self._puts.items():
                for part, value in put.parameters.items():
                    info = entries[name].parts.get(part)
                    if entries[name].kind != put.kind or info is None or info.shape != tuple(value.shape):
                        raise RecipeError(f"from: {directory}: {name}: it holds no such {put.kind}.{part}", SAME)
                    value.copy_(whole(files, info))

    def held(self) -> AbstractContextManager[Any]:
        """Changes are computed once."""
        return parametrize.cached()


class _Changed(nn.Module):
    """W' of W, whenever the module's weight is read."""

    def __init__(self, put: Put) -> None:
        super().__init__()
        self._change, self._folds = put.change, put.folds

    def forward(self, weight: Tensor) -> Tensor:
        changed = self._change(weight)
        return changed if self._folds else weight + changed


def _run(module: Any, layer: Layer, x: Tensor) -> Tensor:
    """The forward pass of a linear layer whose weight is not made; its bias may be changed too."""
    return layer(x, module.parametrizations.weight.original, module.bias)


def _is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' linear layer whose weight is stored [in, out]."""
    return type(module).__name__.removeprefix("Parametrized") == "Conv1D"


def start(shape: Sequence[int], generator: Generator, deviation: float) -> nn.Parameter:
    """A parameter of normal numbers; of zeros for a deviation of 0."""
    if deviation == 0:
        return nn.Parameter(torch.zeros(*shape))
    return nn.Parameter(torch.randn(*shape, generator=generator) * deviation)


def uniform(shape: tuple[int, int], generator: Generator) -> nn.Parameter:
    """A factor A [r, in] as PEFT starts it: uniform within 1 / sqrt(in), which is Kaiming's bound with a = sqrt 5."""
    bound = 1 / math.sqrt(shape[1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def each(weights: Mapping[str, Weight], make: Callable[[Weight], Put]) -> Iterator[tuple[str, Put]]:
    """A put of every weight."""
    return ((name, make(weight)) for name, weight in weights.items())
