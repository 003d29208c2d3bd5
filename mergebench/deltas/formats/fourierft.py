"""FourierFT as PEFT saves it: the coefficients of a module, [k]; their places are drawn from the config's seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench.deltas.fourier import fourier
from mergebench.deltas.peft.directory import CONFIG
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.errors import ModelError


def check_seed(directory: Path, config: Mapping[str, Any]) -> None:
    """Check that the config has the numbers that the places and the change are made with."""
    if type(config.get("random_loc_seed")) is not int or type(config.get("scaling")) not in (int, float):
        raise ModelError(f"{directory / CONFIG}: random_loc_seed and scaling must be numbers")


@peft_type("FOURIERFT", spectrum="fourierft_spectrum", check=check_seed)
def fourierft(module: Module) -> Iterator[Change]:
    """The frequencies of a module's change."""
    settings = {
        "seed": module.config["random_loc_seed"],
        "scale": module.config["scaling"],
        "turned": module.in_out,
    }
    yield Change(fourier, {"coefficients": module.part("spectrum", None)}, settings)
