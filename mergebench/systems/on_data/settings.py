"""Which texts a model runs over, and how it answers them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergebench.parameters import param

Labels = Literal["model", "true"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `mergebench statistics`, and of `data:` in a recipe."""

    text: str = param("text", "the column with the text")
    label: str = param("label", "the column with the label, read for true labels only")
    labels: str = param(
        "model", "fisher: expected over what the model itself answers, or the true ones", choices=("model", "true")
    )
    head: Path | None = param(None, "the task's head.safetensors; that in the model's own directory by itself")
    max_length: int | None = param(None, "tokens a text is cut to; the head's own by itself, else 512", low=2)
    limit: int | None = param(None, "how many texts are used: the first ones, or drawn with the seed", low=1)
    seed: int | None = param(None, "draws the texts, and the answers of a language model", low=0)
