"""The names of tensors in adapters without a config: a layer's name, and which part of its change a tensor is.

kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight: the layer's name with _ for each dot
LyCORIS    the same with .hada_w1_a, .lokr_w1, .lora_mid.weight, .dora_scale, .diff; alone lycoris_NAME
diffusers  unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, formerly .lora.down.weight or _lora.down.weight
ComfyUI    diffusion_model.NAME with the parts of any of these
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_PARTS = {
    "A": r"\.(lora_down|lora_A(\.default)?|lora(_linear_layer)?\.down)\.weight|_lora\.down\.weight",
    "B": r"\.(lora_up|lora_B(\.default)?|lora(_linear_layer)?\.up)\.weight|_lora\.up\.weight",
    "core": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "scalar": r"\.scalar",
    "norms": r"\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)",
    "difference": r"\.(diff|w_norm)",
    "bias": r"\.(diff_b|b_norm)",
    **{f"loha {part}": rf"\.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr {part}": rf"\.lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_SUFFIXES = {part: re.compile(rf"(.+?)({suffix})") for part, suffix in _PARTS.items()}
_FACTORS = re.compile("|".join(f"({suffix})$" for part, suffix in _PARTS.items() if part[:2] in ("A", "B", "lo")))
_FLAT = re.compile(r"(lora|lycoris|oft)_(?:(unet|transformer|prior|te[123]?|prior_unet|prior_te)_)?(.+)")
_DOTTED = re.compile(r"(?:(unet|transformer|prior|text_encoder(?:_[23])?|(?:model\.)?diffusion_model|te[123]?)\.)?(.+)")
PEFT_FACTOR = re.compile(r"\.lora_[AB](\.default)?\.weight$")
_OF = {  # the components that a prefix means, the first that the base has
    "unet": ("unet", "transformer", "prior"),
    "transformer": ("transformer", "unet"),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3", "text_encoder_2"),
    "prior_unet": ("prior", "unet"),
    "prior_te": ("text_encoder",),
    "diffusion_model": ("unet", "transformer"),
    "model.diffusion_model": ("unet", "transformer"),
}


class Layer(NamedTuple):
    """The layer that some tensors change."""

    name: str  # as in the file
    key: str  # its own name with _ for each dot, without the component
    components: tuple[str, ...]  # the folders in which it may lie; () where the name tells none


def split(name: str) -> tuple[str, str] | None:
    """The layer's name and the part that a tensor is; None if the part is unknown."""
    for part, suffix in _SUFFIXES.items():
        found = suffix.fullmatch(name)
        if found is not None:
            return found[1], part
    return None


def layer(name: str) -> Layer:
    """What a layer's name means."""
    flat = _FLAT.fullmatch(name) if "." not in name else None
    if flat is not None:
        prefix, key = flat[2], flat[3]
    else:
        dotted = _DOTTED.fullmatch(name)
        assert dotted is not None
        prefix, key = dotted[1], _as_now(dotted[2])
    components = () if prefix is None else _OF.get(prefix, (prefix,))
    return Layer(name, key.replace(".", "_"), components)


def _as_now(name: str) -> str:
    """A layer's name in older files of diffusers: of the part of its attention that held the factors."""
    name = name.replace(".processor.", ".")
    return name + ".0" if name.endswith(".to_out") else name


def holds_factors(names: Iterable[str]) -> bool:
    """Whether most tensors of a file are parts of such an adapter.

    Factors named as PEFT names them need a component before the layer's name, or an alpha: else a config has theirs.
    """
    names = list(names)
    if 2 * sum(_FLAT.fullmatch(name.partition(".")[0]) is not None for name in names) > len(names):
        return True
    own = [name for name in names if _FACTORS.search(name)]
    beside = sum(split(name) is not None for name in names)
    if not own or 2 * beside <= len(names):
        return False
    if not all(PEFT_FACTOR.search(name) for name in own) or any(name.endswith(".alpha") for name in names):
        return True
    return all(layer(name).components for name in own)
