"""WaveFT as PEFT saves it: the coefficients of a module, [k]; their places are drawn from the config's seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench.deltas.formats.fourierft import check_seed
from mergebench.deltas.peft.directory import CONFIG
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.wavelet import WAVELETS, wavelet
from mergebench.errors import ModelError


def _check(directory: Path, config: Mapping[str, Any]) -> None:
    check_seed(directory, config)
    family = config.get("wavelet_family")
    if config.get("use_idwt", True) and family not in WAVELETS:
        raise ModelError(
            f"{directory / CONFIG}: wavelet_family {family!r} is not supported, only db1 to db10 and sym2 to sym10"
        )


@peft_type("WAVEFT", spectrum="waveft_spectrum", check=_check)
def waveft(module: Module) -> Iterator[Change]:
    """The wavelet coefficients of a module's change; without `use_idwt` its elements."""
    settings = {
        "seed": module.config["random_loc_seed"],
        "scale": module.config["scaling"],
        "turned": module.in_out,
        "wavelet": module.config["wavelet_family"] if module.config.get("use_idwt", True) else "",
    }
    yield Change(wavelet, {"coefficients": module.part("spectrum", None)}, settings)
