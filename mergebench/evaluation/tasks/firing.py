"""Firing: how often the neurons that an edit changed let something through."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.deltas.formats.native import ANOTHER
from mergebench.editing.patches import Patch, open_patch
from mergebench.errors import ModelError, RunError
from mergebench.evaluation.task import Common, Prediction, Ready, Score, asked, mean, task
from mergebench.networks.features import gather
from mergebench.networks.items import contents, read_rows, texts
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="JSON: an id and a text each")
    patch: Path | None = param(None, "the patch whose neurons are watched; by itself, in a recipe, those of its edits")
    id: str = param("id", "the column with the item's id")
    text: str = param("text", "the column with the text")
    max_length: int = param(128, "tokens a text is cut to", low=2)


@task(network="AutoModel")
def firing(p: Params) -> Ready:
    """How often the neurons of a patch fire: a gate's pre-activation is above zero, mean over tokens and texts.

    What is above zero passes SiLU, GELU and ReLU, what is below hardly or not. On the texts of a behaviour the edit of
    Wang et al. makes the selected neurons fire (arXiv:2407.08770, section 3.3).
    """
    rows = read_rows(p.data, p.id, (p.text,), p.limit, p.seed)
    written = texts(rows, p.text)

    def on(files: Sequence[Path]) -> Ready:
        patches = [open_patch(file) for file in files]

        def measure(network: Network, tick: Tick) -> Score:
            tokens = network.tokenize(written, p.max_length)
            with _watched(network, patches) as shares:
                found = gather(network, lambda group: shares([tokens[i] for i in group]), [*map(len, tokens)], tick)
            predictions = {row.id: Prediction("", share) for row, share in zip(rows, found.tolist(), strict=True)}
            return mean(predictions, "firing", "higher")

        return Ready(len(rows), measure, files=(p.data, *files), items=contents(rows), asked=asked(rows, written))

    if p.patch is not None:
        return on([p.patch])
    return Ready(len(rows), _none, files=(p.data,), items=contents(rows), asked=asked(rows, written), on_patches=on)


def _none(network: Network, tick: Tick) -> Score:
    raise RunError("a task that waits for patches was measured without them", "Suite.on(patches) gives it some")


@contextmanager
def _watched(network: Network, patches: Sequence[Patch]) -> Iterator[Callable[[list[list[int]]], Tensor]]:
    """What gives for texts, as tokens, the share [texts] of all pairs of a token and a neuron whose gate is open."""
    seen = threading.local()  # batches run on several threads at once

    def watch(numbers: Tensor) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            gates = out.reshape(*seen.open.shape, -1)[..., numbers]  # some models take the tokens of all texts in a row
            seen.open += (gates > 0).sum(-1)
            seen.gates += len(numbers)

        return hook

    def shares(tokens: list[list[int]]) -> Tensor:
        seen.open, seen.gates = torch.zeros(len(tokens), max(1, *map(len, tokens)), device=network.device), 0
        states, mask = network.encode(tokens)
        found = (seen.open * mask).sum(1) / (mask.sum(1) * seen.gates).clamp(min=1)
        return torch.where(states.flatten(1).isfinite().all(1), found, math.nan)  # a NaN is not above zero

    with ExitStack() as hooks:
        for name, numbers in _neurons(network, patches).items():
            handle = network.holder(name).register_forward_hook(watch(numbers.to(network.device)))
            hooks.callback(handle.remove)
        yield shares


def _neurons(network: Network, patches: Sequence[Patch]) -> dict[str, Tensor]:
    """Each neuron once, by the tensor it is in; `ModelError` where the model has no gates of these numbers."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, list[Tensor]] = {}
    for patch in patches:
        for name in patch.names:
            numbers, module = patch.numbers(name), _holder(network, patch, name)
            columns, linear = isinstance(module, Conv1D), isinstance(module, torch.nn.Linear)
            sides = (module.out_features, module.in_features) if linear else tuple(module.weight.shape)
            if not (columns or linear) or columns != patch.columns(name):
                what = f"{patch.file}: the rows of '{name}' are no gates: what they hold goes to the residual stream"
                raise ModelError(what, "firing is of neurons that read it, such as those of gate_proj")
            width, gates = sides if columns else sides[::-1]
            if width != len(patch.direction) or gates <= int(numbers[-1]):
                what = f"{patch.file}: {network.name} has {list(sides)} for '{name}'"
                raise ModelError(what, ANOTHER)
            found.setdefault(name, []).append(numbers)
    if not found:
        raise ModelError(
            f"{', '.join(str(patch.file) for patch in patches)}: no row is changed, so none can be watched"
        )
    return {name: torch.unique(torch.cat(parts)) for name, parts in found.items()}


def _holder(network: Network, patch: Patch, name: str) -> Any:
    try:
        return network.holder(name)
    except ModelError as error:
        raise ModelError(f"{patch.file}: {error.message}", error.hint or ANOTHER) from None
