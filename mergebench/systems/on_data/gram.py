"""Gram matrices of the inputs of a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mergebench.errors import ModelError
from mergebench.methods._matrices import is_matrix
from mergebench.networks.batch import CPU_TOKENS, GPU_TOKENS
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.systems.on_data.texts import equal_batches


class Linears:
    """The linear layers of a network that a merge treats as matrices, by the names of their weights in the files."""

    def __init__(self, network: Network) -> None:
        from transformers.pytorch_utils import Conv1D

        self.modules: dict[str, Any] = {}
        self.inputs_first: list[str] = []  # stored as [inputs, outputs], as GPT-2 does
        for name, places in network.places.items():
            for module, attribute in places:
                if attribute == "weight" and isinstance(module, (torch.nn.Linear, Conv1D)):
                    if is_matrix(name, tuple(module.weight.shape)):
                        self.modules[name] = module
                        if isinstance(module, Conv1D):
                            self.inputs_first.append(name)
                    break
        if not self.modules:
            raise ModelError(f"model '{network.name}': it has no linear layer", "regmean merges those by their inputs")

    def width(self, name: str) -> int:
        """The number of a layer's inputs."""
        weight = self.modules[name].weight
        return int(weight.shape[0 if name in self.inputs_first else 1])


def grams(
    network: Network,
    linears: Linears,
    names: Iterable[str],
    tokens: Sequence[Sequence[int]],
    tick: Tick,
    run: Callable[[Tensor, Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """The mean of x x^T over all tokens, float32 [inputs, inputs], of the named layers' inputs x.

    A batch holds texts of one length, so no input is padding. run(ids, mask): what is done with a batch in place of
    running the whole network.
    """
    count = sum(map(len, tokens))
    sums = {name: torch.zeros(linears.width(name), linears.width(name), device=network.device) for name in names}

    def watch(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def add(module: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums[name].addmm_(x.T, x, alpha=1 / count)

        return add

    limit = CPU_TOKENS if network.device.type == "cpu" else GPU_TOKENS
    with ExitStack() as hooks, torch.inference_mode():
        for name in sums:
            hooks.callback(linears.modules[name].register_forward_pre_hook(watch(name)).remove)
        for group in equal_batches([len(one) for one in tokens], limit):
            ids, mask = network.padded([tokens[position] for position in group])
            (run or network.last_states)(ids, mask)
            tick(len(group))
    return {name: one.cpu() for name, one in sums.items()}
