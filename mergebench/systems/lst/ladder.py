"""The ladder: a small network beside a frozen backbone, fed by its hidden states (arXiv:2206.06522).

    s <- Down_0(h_0)                                     h_0: the embeddings
    for each kept block i:
        s <- mu_i s + (1 - mu_i) Down_i(h_i)             h_i: what block i writes;  mu_i = sigmoid(a_i / T)
        s <- SideBlock_i(s)
    the output is Up(norm(s))

The output stands in the place of the backbone's last states, of the same width: pooled for a head of classes, or read
by the frozen head of a language model. The backbone's own blocks run without a graph, because neither their parameters
nor their input ask for gradients. A side block gets the arguments that the backbone's block gets, mask and rotations.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mergebench.checkpoint.documents import NotJSON, parse_json
from mergebench.checkpoint.files import read_tensors, write_atomically
from mergebench.checkpoint.header import read_header
from mergebench.checkpoint.layouts import quiet
from mergebench.checkpoint.model import MODULE, MODULE_FILE
from mergebench.checkpoint.shards import as_file
from mergebench.errors import ModelError
from mergebench.networks.beside import network_module
from mergebench.networks.network import Network
from mergebench.systems.lst.layout import FAMILIES

Key = bytes


class States(Protocol):
    """Hidden states of items that were computed before."""

    def find(self, keys: Sequence[Key], length: int) -> Tensor | None:
        """[blocks, items, length, width], zero where an item is shorter; None if one of the items is not there."""

    def keep(self, keys: Sequence[Key], states: Sequence[Tensor], lengths: Sequence[int]) -> None:
        """Take in what the kept blocks wrote, [items, tokens, width] each."""


class Ladder(nn.Module):
    """Samplers, gates, side blocks, a norm and Up, as parts of a network's module."""

    def __init__(
        self, width: int, config: Mapping[str, Any], layers: Sequence[int], temperature: float, dropout: float = 0.0
    ) -> None:
        """config: of the side network, a config.json of the backbone's architecture."""
        super().__init__()
        self.config, self.layers, self.temperature = dict(config), tuple(layers), temperature
        self.blocks, self.norm = _side_parts(config)
        small = int(config["hidden_size"])
        self.dropout = nn.Dropout(dropout)  # of the embeddings; the blocks have theirs from the config
        self.first = nn.Linear(width, small)
        self.down = nn.ModuleList(nn.Linear(width, small) for _ in layers)
        self.gates = nn.Parameter(torch.zeros(len(layers)))
        self.up = nn.Linear(small, width)
        self.states: States | None = None  # where hidden states are found
        self.recorder: States | None = None  # where they are kept
        self._here = threading.local()  # batches run on several threads at once

    def put_on(self, network: Network) -> None:
        """Run beside this network from now on."""
        backbone = network.backbone
        if getattr(network.module, "ladder", None) is not None:
            raise ModelError(f"model '{network.name}': it has a ladder already")
        for number, block in enumerate(network.blocks.values()):
            block.forward = _Rung(self, number, block.forward)
        network.module.add_module("ladder", self.to(network.device))
        backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        backbone.register_forward_hook(self._end)

    def _begin(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        here = self._here
        here.side, here.found, here.written, here.keys = None, None, [], []
        if self.states is None and self.recorder is None:
            return
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        here.lengths = mask.sum(1).tolist()
        here.keys = [row[:n].cpu().numpy().tobytes() for row, n in zip(ids, here.lengths, strict=True)]
        if self.states is not None:
            here.found = self.states.find(here.keys, ids.shape[1])
            if here.found is not None:
                here.found = here.found.to(ids.device)

    def _end(self, module: Any, args: Any, output: Any) -> Any:
        here = self._here
        if self.recorder is not None and here.found is None:
            self.recorder.keep(here.keys, here.written, here.lengths)
        output["last_hidden_state"] = self.up(self.norm(here.side))
        here.side, here.found, here.written = None, None, []
        return output

    def step(
        self, number: int, block: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A block of the backbone, and the side block beside it; returns what the backbone's block does."""
        here = self._here
        if here.side is None:
            here.side = self.first(self.dropout(hidden))
        if here.found is None:
            out = block(hidden, *args, **kwargs)
            state = out[0] if isinstance(out, tuple) else out
        else:
            out = hidden  # what the backbone hands on is not used again
        if number not in self.layers:
            return out
        place = self.layers.index(number)
        if here.found is not None:
            state = here.found[place]
        elif self.recorder is not None:
            here.written.append(state)
        mu = torch.sigmoid(self.gates[place] / self.temperature)
        mixed = mu * here.side + (1 - mu) * self.down[place](state)
        made = self.blocks[place](mixed, *args, **_own_cache(kwargs))
        here.side = made[0] if isinstance(made, tuple) else made
        return out

    def save(self, directory: Path, base: str) -> None:
        """One file, all that is needed beside the base; base: the base's identity."""
        about = {"config": self.config, "layers": self.layers, "temperature": self.temperature}
        tensors = {name: one.detach().cpu() for name, one in self.state_dict().items()}
        metadata = {**MODULE, "module": "ladder", "base": base, "about": json.dumps(about)}
        write_atomically(directory / MODULE_FILE, as_file(tensors, metadata))


class _Rung:
    """In the place of a block's `forward`."""

    def __init__(self, ladder: Ladder, number: int, block: Callable[..., Any]) -> None:
        self._ladder, self._number, self._block = ladder, number, block

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._ladder.step(self._number, self._block, hidden_states, args, kwargs)


def _own_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments, with the side network's own cache of keys and values beside the backbone's."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return kwargs
    if not hasattr(cache, "ladder"):
        from transformers import DynamicCache

        cache.ladder = DynamicCache()
    return {**kwargs, "past_key_values": cache.ladder}


def _side_parts(config: Mapping[str, Any]) -> tuple[nn.ModuleList, nn.Module]:
    """The blocks, and the norm after them, of a new model of this config; the norm does nothing where there is none."""
    import transformers

    with quiet():
        settings = transformers.AutoConfig.for_model(**config)
        model: Any = transformers.AutoModel.from_config(settings, trust_remote_code=False)  # type: ignore[no-untyped-call]
    family = next(one for one in FAMILIES if config["model_type"] in one.model_types)
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks, model.get_submodule(family.norm) if family.norm else nn.Identity()


@network_module
def ladder(network: Network, file: Path) -> None:
    """A trained ladder."""
    header = read_header(file)
    try:
        about = parse_json(header.metadata["about"], dict[str, Any])
        width = next(tensor.shape[1] for tensor in header.tensors if tensor.name == "first.weight")
        made = Ladder(width, about["config"], about["layers"], float(about["temperature"]))
        made.load_state_dict(read_tensors(header))
    except (NotJSON, KeyError, StopIteration, TypeError, ValueError, RuntimeError):
        raise ModelError(f"{file}: it is no ladder, or a damaged one", "train it again") from None
    deepest, blocks = max(about["layers"], default=0), len(network.blocks)
    if width != network.hidden or deepest >= blocks:
        raise ModelError(
            f"{file}: it was made beside a model of width {width} with more than {deepest} blocks, "
            f"'{network.name}' is {network.hidden} wide and has {blocks}",
            "name the base that it was trained on",
        )
    made.requires_grad_(False).eval().put_on(network)
