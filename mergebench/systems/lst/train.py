"""Train a ladder beside a frozen backbone, on hidden states that are computed once (arXiv:2206.06522)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import Files
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError, first_line
from mergebench.networks.batch import CPU_TOKENS, GPU_TOKENS, batches, run_batches
from mergebench.networks.loadable import ticking
from mergebench.networks.module import NOISE
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.systems.lst.activations import Activations, bytes_of
from mergebench.systems.lst.choose import BASES
from mergebench.systems.lst.init import choose_of, pruned, read_side
from mergebench.systems.lst.ladder import Ladder
from mergebench.systems.lst.layout import FAMILIES, Layout, config_of, left_of, smaller
from mergebench.training import processes
from mergebench.training.attached import Attached, Base
from mergebench.training.declared import trained
from mergebench.training.task import Head, TrainingTask

STARTS = ("magnitude", "random")
PARTS = ("train", "validation")  # what is read more than once
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")


@dataclass(frozen=True, kw_only=True)
class Params:
    """The settings of a ladder."""

    side: Path | None = param(None, "what `mergebench side init` wrote; without it, it is made in memory", folder=True)
    reduction: float | None = param(None, "without `side`: how many times narrower it is; 8 where not given", low=1)
    start: str | None = param(
        None, "without `side`: its blocks by magnitude (where not given), or at random", choices=STARTS
    )
    basis: str | None = param(None, "without `side`, by magnitude: chain (where not given), or shared", choices=BASES)
    keep_layers: list[int] = param(
        [], "without `side`: the blocks of the base that it has, from 0; all where not given"
    )
    temperature: float = param(0.1, "of the gates", above=0)
    dropout: float = param(0.0, "in the side network", low=0, below=1)


@dataclass(frozen=True)
class _Start:
    """What a ladder starts from."""

    config: Mapping[str, Any]
    layers: list[int]
    tensors: Mapping[str, Tensor]  # of the side network's files; none: at random


@trained(paper="arXiv:2206.06522")
def ladder(base: Base, p: Params) -> Attached:
    """A narrow network beside the frozen base, fed by its hidden states: LST."""
    start = _from_side(base, p.side) if p.side is not None else _in_memory(base, p)
    if p.side is not None:
        for name in ("reduction", "start", "basis", "keep_layers"):
            if getattr(p, name):
                raise RecipeError(f"{name}: the side network in {p.side} has its own", "give one of them")
    kept = {key: value for key, value in start.config.items() if key not in NOISE}
    config = kept | dict.fromkeys(_DROPOUTS, p.dropout)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base.generator.initial_seed())  # transformers draws from torch's own generator
            made = Ladder(base.network.hidden, config, start.layers, p.temperature, p.dropout)
        if start.tensors:
            _copy(made, start)
    except (KeyError, StopIteration, TypeError, ValueError, RuntimeError) as error:
        if p.side is None:
            raise
        what = f"side: {p.side}: its files do not belong together: {first_line(error)}"
        raise ModelError(what, "write it again: mergebench side init") from None
    made.put_on(base.network)
    return _Ladder(base, made)


class _Ladder(Attached):
    def __init__(self, base: Base, made: Ladder) -> None:
        super().__init__(dict(made.named_parameters()))
        self._base, self.ladder = base, made

    def save(self, directory: Path) -> None:
        """module.safetensors: the ladder, without its base."""
        self.ladder.save(directory, identity(self._base.model))

    def set_mode(self, network: Network, training: bool) -> None:
        """The backbone never drops anything: its states are on disk."""
        network.module.eval()
        self.ladder.train(training)

    def scratch(self, task: TrainingTask) -> int:
        """The backbone's states."""
        network = self._base.network
        tokens = sum(sum(task.lengths(network, part)) for part in PARTS if part in task.parts)
        return processes.count() * bytes_of(tokens, len(self.ladder.layers), network.hidden)

    def begin(self, task: TrainingTask, head: Head, directory: Path, progress: Callable[[str, int, int], None]) -> None:
        """Run the backbone once on every item that is read more than once.

        In batches that depend on the items' lengths alone: a resumed run finds the same bits.
        """
        if self.ladder.states is not None:
            return
        network, made = self._base.network, self.ladder
        file = directory / f"states-{processes.number()}"
        kept = Activations(file, len(made.layers), network.hidden)
        parts = {part: task.lengths(network, part) for part in PARTS if part in task.parts}
        tick = ticking(partial(progress, "reading the base"), sum(map(len, parts.values())))
        network.module.eval()
        made.recorder = kept
        for part, lengths in parts.items():

            def work(group: list[int], part: str = part) -> None:
                with torch.inference_mode():
                    task.rows(network, head, part, group)

            tokens = CPU_TOKENS if network.device.type == "cpu" else GPU_TOKENS
            run_batches(work, batches(lengths, tokens), network.device, tick)
        made.recorder, made.states = None, kept

    def about(self) -> Mapping[str, Any]:
        """The gates: what share of each block's input is the side network's own state."""
        gates = torch.sigmoid(self.ladder.gates.detach() / self.ladder.temperature)
        return {"gates": [round(one, 4) for one in gates.tolist()], "layers": list(self.ladder.layers)}


def _from_side(base: Base, place: Path) -> _Start:
    """What `mergebench side init` wrote; `ModelError` if it was made from another base."""
    about = read_side(place)
    if about.get("identity") != identity(base.model):
        raise ModelError(
            f"side: {place}: it was made from {about.get('base')}, not from {base.model.reference}",
            f"mergebench side init {base.model.reference} --out DIR",
        )
    side, layers = open_model(str(place)), about.get("layers")
    if side.config.get("model_type") != base.model.config.get("model_type") or not isinstance(layers, list):
        raise ModelError(
            f"side: {place}: its files are not those of a side network", "write it again: mergebench side init"
        )
    return _Start(side.config, layers, side.state_dict())


def _in_memory(base: Base, p: Params) -> _Start:
    """The same without files, by magnitude or at random."""
    layout, reduction = Layout(base.model), p.reduction or 8.0
    layers = layout.layers(p.keep_layers)
    if p.start == "random":
        if p.basis is not None:
            raise RecipeError("basis: a start at random has none", "start: magnitude")
        width, heads = smaller(layout, reduction)
        feed = left_of(int(base.model.config["intermediate_size"]), reduction)
        changes = config_of(layout, width, heads, feed, layers)
        return _Start({**base.model.config, **changes}, layers, {})
    with Files() as files:
        base.model.settle(files)
        choice = choose_of(layout, files, reduction, layers, "magnitude", p.basis or "chain", None)
        values = base.model.values(files)
        tensors = {}
        for new, cut in choice.cuts.items():
            shape = [
                len(chosen) if chosen is not None else size
                for chosen, size in zip((cut.rows, cut.columns), values.tensors[cut.source].shape, strict=False)
            ]
            tensors[new] = torch.cat(list(pruned(values, cut.source, cut))).float().view(shape)
    return _Start({**base.model.config, **choice.config}, layers, tensors)


def _copy(made: Ladder, start: _Start) -> None:
    """Blocks and norm from the side network; samplers and Up begin at random, as published."""
    family = next(one for one in FAMILIES if start.config["model_type"] in one.model_types)
    named = {re.sub(f"^{family.prefix}", "", name): values for name, values in start.tensors.items()}
    inside = f"{family.blocks}."
    made.blocks.load_state_dict({n.removeprefix(inside): one for n, one in named.items() if n.startswith(inside)})
    if family.norm is not None:
        made.norm.load_state_dict(
            {n.removeprefix(f"{family.norm}."): one for n, one in named.items() if n.startswith(f"{family.norm}.")}
        )
