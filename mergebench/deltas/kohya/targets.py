"""The tensors of a base that the layers of an adapter without a config mean.

An underscore in such a name may be a dot or an underscore: the base's own names decide. Its layers lie in the folders
of a pipeline, below the names of a single file, or are all there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from mergebench.checkpoint.header import TensorInfo
from mergebench.deltas.kohya.names import Layer
from mergebench.deltas.kohya.unet import in_diffusers, layers_of

_IN_ONE_FILE = (  # what the names of a component begin with, where a pipeline is one file
    ("unet", "model.diffusion_model."),
    ("text_encoder", "cond_stage_model.transformer."),
    ("text_encoder", "conditioner.embedders.0.transformer."),
    ("text_encoder", "text_encoders.clip_l.transformer."),
    ("text_encoder_2", "conditioner.embedders.1.model."),
    ("text_encoder_2", "text_encoders.clip_g.transformer."),
    ("text_encoder_3", "text_encoders.t5xxl.transformer."),
)
_FUSED = re.compile(r"(.*)transformer\.resblocks\.(\d+)\.(attn\.in_proj_weight|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)")
_OPEN_CLIP = {"attn.out_proj": "self_attn_out_proj", "mlp.c_fc": "mlp_fc1", "mlp.c_proj": "mlp_fc2"}


class Target(NamedTuple):
    """A tensor of the base, or one of three equal blocks of its rows."""

    tensor: str
    shape: tuple[int, ...]
    block: int | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """[out, in], and the kernel of a convolution with the inputs."""
        return self.shape[0], math.prod(self.shape[1:])


class Targets:
    """The layers of a base, by component and by name with _ for each dot."""

    def __init__(self, base: Mapping[str, TensorInfo]) -> None:
        self._base = base

    @cached_property
    def _layers(self) -> dict[str, dict[str, list[Target]]]:
        layers: dict[str, dict[str, list[Target]]] = {}
        for name, info in self._base.items():
            component, inner = _place(name)
            for key, block in _keys(inner):
                shape = info.shape if block is None else (info.shape[0] // 3, *info.shape[1:])
                layers.setdefault(component, {}).setdefault(key, []).append(Target(name, shape, block))
        for known in layers.values():
            count = layers_of(known)
            for key in list(known):
                other = in_diffusers(key, count)
                if other is not None:
                    known.setdefault(other, []).extend(known[key])
        return layers

    def find(self, layer: Layer) -> list[Target]:
        """The tensors that a layer's name can mean; several where only an underscore tells them apart."""
        for component in (*layer.components, "") if layer.components else self._layers:
            known = self._layers.get(component, {})
            translated = in_diffusers(layer.key, layers_of(known)) if known else None
            short = layer.key.removeprefix("text_model_")  # newer transformers leave that out
            for key in (layer.key, translated, short, f"text_model_{layer.key}"):
                if key in known:
                    return known[key]
        return []

    @property
    def in_parts(self) -> bool:
        """Whether the base has more than one component."""
        return len(self._layers) > 1


def _place(name: str) -> tuple[str, str]:
    """The component of a tensor and its name there."""
    folder, slash, inner = name.partition("/")
    if slash:
        return folder, inner
    return next(((of, name.removeprefix(start)) for of, start in _IN_ONE_FILE if name.startswith(start)), ("", name))


def _keys(name: str) -> Iterator[tuple[str, int | None]]:
    """The keys of a layer by the name of its weight, with the block of rows; none for other tensors."""
    fused = _FUSED.fullmatch(name.removesuffix(".weight"))
    if name.endswith(".weight"):
        yield name.removesuffix(".weight").replace(".", "_"), None
    if fused is not None:
        start = f"text_model_encoder_layers_{fused[2]}_"
        if fused[3] == "attn.in_proj_weight":
            yield from ((f"{start}self_attn_{word}_proj", number) for number, word in enumerate("qkv"))
        elif name.endswith(".weight"):
            yield start + _OPEN_CLIP[fused[3]], None
