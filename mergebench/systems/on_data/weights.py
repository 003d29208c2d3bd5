"""The tensors of a merge in the network that runs them, and the memory that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.checkpoint.model import Model
from mergebench.engine.machine import available_memory
from mergebench.engine.plan import Plan
from mergebench.errors import RunError
from mergebench.networks.network import Network


class Weights:
    """The merged tensors that a network of the base has a place for; what is not merged stays the base's."""

    def __init__(self, plan: Plan, files: Files, network: Network) -> None:
        self._plan, self._network = plan, network
        self._values = [model.values(files) for model in plan.merge.models]
        self._base = plan.merge.reference.values(files)
        self.names = [name for name in plan.alignment.merged if network.places.get(name)]

    def base(self, name: str) -> Tensor:
        """The base's tensor, float32 [elements]."""
        return self._base.whole(name).float().reshape(-1)

    def rows(self, name: str) -> Tensor:
        """The models' tensors, float32 [models, elements]."""
        sources = self._plan.alignment.sources[name]
        rows = [values.whole(info.name) for values, info in zip(self._values, sources, strict=True)]
        return torch.stack([row.float().reshape(-1) for row in rows])

    def place(self, name: str) -> Tensor:
        """The network's own tensor."""
        return torch.as_tensor(getattr(*self._network.places[name][0]))

    def put(self, name: str, values: Tensor) -> None:
        """Put values into the network, wherever it has the tensor."""
        with torch.no_grad():
            for place in self._network.places[name]:
                tensor = getattr(*place)
                tensor.copy_(values.view(tensor.shape))

    def inside(self, block: torch.nn.Module) -> list[str]:
        """The tensors that a block holds."""
        modules = {id(module) for module in block.modules()}
        return [name for name in self.names if id(self._network.places[name][0][0]) in modules]


def check_memory(model: Model, need: int) -> None:
    """`RunError` if this many bytes, beside the model itself, are more than there are."""
    free = available_memory()
    if free is not None and need > free:
        what = f"what it does on texts takes {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise RunError(f"model '{model.reference}': {what}", "merge where there is more, or another way")
