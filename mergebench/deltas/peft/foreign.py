"""Adapters without a config in the place of a model, recognised by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from mergebench.checkpoint.header import read_header
from mergebench.errors import MergebenchError, ModelError

_PEFT = "PEFT's tensors without their config"
_FORMATS = (
    (_PEFT, re.compile(r"^base_model\.model\.|\.lora_(embedding_)?[AB](\.|$)|\.lora_magnitude_vector(\.|$)")),
    ("LoRA factors as kohya's scripts save them", re.compile(r"\.lora_(down|up|mid)(\.weight)?$")),
    ("LoRA factors of an older diffusers", re.compile(r"[._]lora(_linear_layer)?\.(down|up)\.weight$")),
    ("LyCORIS factors", re.compile(r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_(w[12](_[ab])?|t2)|oft_(blocks|diag)|glora)")),
)
_WORDS = ("base_model.model.", "lora", "hada_", "lokr_", "oft_")  # one of them is in whatever a pattern finds
_BESIDE = re.compile(r"\.(alpha|dora_scale|diff|diff_b|scale|rescale|bias)$")  # in such files, but of any


def foreign_format(names: Collection[str]) -> str | None:
    """What a file with tensors of these names holds, if it is an adapter: most of them are an adapter's."""
    listed = "\n".join(names)
    if not any(word in listed for word in _WORDS):
        return None
    for what, pattern in _FORMATS:
        own = sum(bool(pattern.search(name)) for name in names)
        if own and 2 * (own + sum(bool(_BESIDE.search(name)) for name in names)) > len(names):
            return what
    return None


def refuse_foreign(where: str, names: Iterable[str], place: object) -> None:
    """`ModelError` if tensors of these names are an adapter; place: what stands after the '+' then."""
    what = foreign_format(list(names))
    if what == _PEFT:
        raise ModelError(f"{where}: it is an adapter, not a model: {what}", "name its base: BASE+DIRECTORY")
    if what is not None:
        raise ModelError(f"{where}: it is an adapter, not a model: {what}", f"name its base: BASE+{place}")


def refuse_foreign_file(place: Path) -> None:
    """The same for a file at a path; nothing if it is none."""
    if place.suffix == ".safetensors" and place.is_file():
        try:
            names = [tensor.name for tensor in read_header(place).tensors]
        except MergebenchError:  # damaged: whoever reads it says so
            return
        refuse_foreign(str(place), names, place)
