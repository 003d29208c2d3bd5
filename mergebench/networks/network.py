"""One candidate in memory as a transformers model in float32, with its tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.content import tokenizer_hash
from mergebench.engine.machine import one_thread
from mergebench.errors import ModelError
from mergebench.networks.beside import put_beside
from mergebench.networks.loadable import LoadableModel, network_tensors
from mergebench.networks.module import build, config_of
from mergebench.networks.tokenizer import load as load_tokenizer
from mergebench.networks.tokenizer import tokenize


class Network:
    """A candidate's model, ready to run."""

    def __init__(self, model: LoadableModel, auto_class: str, device: torch.device, *, packed: bool = True) -> None:
        """packed: linear layers run by oneDNN; False where weights are trained or changed."""
        self.auto_class, self.device = auto_class, device
        self._first, self._ran = threading.Lock(), False
        self.remarks: list[str] = []  # notes for the user, about the tokenizer
        self._config = config_of(model)
        with one_thread():  # in many small steps, threads would only wait for one another
            self.module, self._weights = build(model, auto_class, device, packed)
        self.modules: tuple[Path, ...] = getattr(model, "modules", ())
        for file in self.modules:
            put_beside(self, file)
        self._take_name(model)

    def take(self, model: LoadableModel) -> bool:
        """Replace the weights by those of another model of this architecture; returns whether that was possible."""
        if config_of(model) != self._config or self.modules or getattr(model, "modules", ()):
            return False
        with one_thread():
            if not self._weights.put(network_tensors(model)):
                return False
        key = self.tokenizer_key
        del self.tokenizer_key
        self._take_name(model)
        if self.tokenizer_key != key:
            self.__dict__.pop("tokenizer", None)
            self.remarks = []
        return True

    def _take_name(self, model: LoadableModel) -> None:
        self.name, self.directory = model.reference, model.side_directory
        self.kept: dict[object, Tensor] = {}  # values computed with these weights that another task may reuse
        self.image_processor: Any = None  # read only for images

    @property
    def hidden(self) -> int:
        """Width of the last states."""
        width = getattr(self.module.config, "hidden_size", None)
        if width is None:
            what = f"model '{self.name}': its config.json has no hidden_size"
            raise ModelError(what, "features are read from a model that is an encoder, not one made of several")
        return int(width)

    def holder(self, name: str) -> Any:
        """The module whose `weight` is this tensor of the model's files; `ModelError` if there is none."""
        if name not in self._weights.shapes:
            raise ModelError(f"model '{self.name}': it has no tensor '{name}'")
        for module, attribute in self.places[name]:
            if attribute == "weight":
                return module
        raise ModelError(f"model '{self.name}': '{name}' is no module's weight")

    @property
    def places(self) -> Mapping[str, list[tuple[Any, str]]]:
        """The modules and attributes that hold each tensor of the model's files; `ModelError` if transformers
        converts them."""
        if self._weights.places is None:
            what = f"model '{self.name}': its tensors are not in memory as they are in the files"
            raise ModelError(what, "transformers converts those of this architecture, such as experts it fuses")
        return self._weights.places

    def encode(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last states [batch, tokens, hidden] and mask [batch, tokens] of texts padded to the longest of them."""
        ids, mask = self.padded(tokens)
        return self.last_states(ids, mask), mask

    def last_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, hidden] of token ids [batch, tokens]; several threads may ask."""
        with nullcontext() if self._ran else self._first:  # RWKV scales its weights when it first runs, once
            states: Tensor = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            self._ran = True
        return states

    @property
    def backbone(self) -> Any:
        """The module without its head."""
        return self.module.base_model

    @property
    def blocks(self) -> dict[str, torch.nn.Module]:
        """The blocks from first to last, by their names in the backbone.

        The blocks are the outermost list of as many modules as the config says; `ModelError` if there is none.
        """
        config = self.module.config
        if getattr(config, "is_encoder_decoder", False):
            what = f"model '{self.name}': it is an encoder with a decoder"
            raise ModelError(what, "only a model that is one stack of blocks is looked into")
        depth = getattr(config, "num_hidden_layers", None)
        for path, module in sorted(self.backbone.named_modules(), key=lambda found: found[0].count(".")):
            if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
                return {f"{path}.{number}": block for number, block in enumerate(module)}
        raise ModelError(
            f"model '{self.name}': its blocks are not to be found",
            "its config must have num_hidden_layers, and its blocks be a list of as many modules",
        )

    def padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [batch, tokens], padded on the right."""
        width = max(1, *map(len, tokens)) if tokens else 1
        pad = getattr(self.module.config, "pad_token_id", None) or 0  # not every config has one
        ids = torch.tensor([[*one, *[pad] * (width - len(one))] for one in tokens], device=self.device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in tokens], device=self.device)
        return ids, mask

    def tokenize(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Token ids of each text, as `networks.tokenizer.tokenize` gives them."""
        return tokenize(self.tokenizer, self.name, texts, max_length)

    @cached_property
    def tokenizer_key(self) -> str:
        """Equal for tokenizers that give equal tokens, in any directory."""
        return f"{self.module.config.model_type} {tokenizer_hash(self.directory)}"

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model."""
        tokenizer, remark = load_tokenizer(self.directory, self.name)
        if remark is not None:
            self.remarks.append(remark)
        return tokenizer
