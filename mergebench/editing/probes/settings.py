"""How a probe is fitted: the settings that `fit_probe` and `mergebench probe fit` take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergebench.parameters import param

Norm = Literal["post", "pre"]
Pool = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which features of the texts, and which texts."""

    layer: int | Literal["all"] = param(
        -1, "0 (embeddings) to the number of blocks, negative from the end, or all: the best"
    )
    norm: Norm = param("post", "the last layer, after the final norm or before")
    pool: Pool = param("mean", "the mean over a text's tokens, or the last one")
    max_length: int = param(100, "tokens a text is cut to", low=1)
    text: str = param("text", "the column with the text")
    label: str = param("label", "the column with the label")
    undesired: str | None = param(None, "the label of the undesired class; 1, true and undesired are by themselves")
    test: Path | None = param(None, "a file of texts to test on, in place of a fifth of the data")
    seed: int = param(0, "of the split and the folds", low=0)
