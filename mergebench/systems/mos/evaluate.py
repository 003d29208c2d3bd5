"""Score finished banks again: a single bank, or all banks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mergebench.errors import ModelError
from mergebench.networks.device import device_of
from mergebench.networks.loadable import ticking
from mergebench.systems.mos.bank import Bank, read_bank
from mergebench.systems.mos.inference import open_encoder, read_items
from mergebench.systems.mos.manifest import MANIFEST
from mergebench.systems.mos.scoring import score


def evaluate_banks(
    places: Sequence[Path],
    *,
    test: Path | None = None,
    backbone: str | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Records (metrics.py) of banks, or of all banks in directories; the banks are only read.

    test: items in place of those that the banks name. backbone: where it is now. Raises `ModelError` where a bank or
    the backbone is missing or does not fit, `RunError` where files are damaged or the items are not the banks'.
    """
    banks = [read_bank(found) for place in places for found in _banks(place)]
    records = []
    for bank in banks:
        records += _score(bank, test, backbone, device, progress)
    return records


def _banks(place: Path) -> list[Path]:
    """The bank that a directory is, or those that lie in it."""
    if (place / MANIFEST).is_file() or not place.is_dir():
        return [place]
    return sorted(file.parent for file in place.glob(f"*/**/{MANIFEST}")) or [place]


def _score(
    bank: Bank, test: Path | None, backbone: str | None, device: str, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    file = test or (None if bank.about.items.test is None else Path(bank.about.items.test))
    if file is None or not file.is_file():
        what = "it does not say what it is tested on" if file is None else f"no such file: {file}"
        raise ModelError(f"{bank.directory}: {what}", "name the items with --test FILE")
    data = read_items(bank, file, labelled=True)
    encoder = open_encoder(bank, device_of(device), backbone)
    total = len(data.rows) * (len(bank.tasks) + 1)
    tick = ticking(partial(progress, f"scoring {bank.directory}"), total)
    return score(bank, encoder, data.inputs.held(encoder.network), data.labels, tick)
