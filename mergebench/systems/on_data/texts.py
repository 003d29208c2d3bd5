"""The texts that statistics are made of, read as a suite's tasks read theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.content import sha256_of
from mergebench.evaluation.seen import mark
from mergebench.networks.items import ID, Row, read_rows
from mergebench.networks.items import texts as texts_of
from mergebench.systems.on_data.settings import Settings


@dataclass(frozen=True)
class Data:
    """Texts, and their true labels if they were asked for."""

    file: Path
    settings: Settings
    rows: Sequence[Row]
    texts: list[str]

    @property
    def labels(self) -> list[Any]:
        return [row.values[1] for row in self.rows]

    def about(self) -> dict[str, Any]:
        """What statistics of these texts say of them."""
        given = {key: value for key, value in vars(self.settings).items() if value is not None}
        return {
            "data": {"file": str(self.file), "sha256": sha256_of(self.file)},
            "items": len(self.texts),
            "texts": " ".join(map(mark, self.texts)),
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in given.items()},
        }


def read_data(file: Path, settings: Settings, labelled: bool = False) -> Data:
    """Read and check the texts; labelled: with the column of labels."""
    columns = (settings.text, settings.label) if labelled else (settings.text,)
    rows = read_rows(file, ID, columns, settings.limit, settings.seed)
    return Data(file, settings, rows, texts_of(rows, settings.text))


def equal_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Batches of items of one length each, of at most `tokens` tokens, so that nothing is padded; shortest first."""
    groups: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        groups.setdefault(length, []).append(position)
    found = []
    for length, group in sorted(groups.items()):
        size = max(tokens // length, 1)
        found += [group[start : start + size] for start in range(0, len(group), size)]
    return found
