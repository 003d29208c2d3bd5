"""What a search of the intrinsic dimension found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the search found of one row."""

    row: str
    metric: str
    share: float
    full: float  # mean over the seeds
    elements: int  # D
    tested: Mapping[int, Sequence[float]]  # by d, a value a seed

    @property
    def line(self) -> float:
        """What is to be reached."""
        return line_of(self.share, self.full)

    @property
    def dimension(self) -> int | None:
        """The smallest d whose mean reaches the line."""
        return min((d for d, values in self.tested.items() if statistics.fmean(values) >= self.line), default=None)

    @property
    def below(self) -> int | None:
        """The largest smaller d that was tried, which does not."""
        found = self.dimension
        return max((d for d in self.tested if found is None or d < found), default=None)

    @property
    def by_seed(self) -> list[int | None]:
        """The smallest d at which each seed's run reaches the line; None: at none that was tried."""
        seeds = range(len(next(iter(self.tested.values()))))
        return [min((d for d, found in self.tested.items() if found[n] >= self.line), default=None) for n in seeds]

    def sentence(self) -> str:
        """The answer, for a reader."""
        numbers = f"{100 * self.line:.1f} of {100 * self.full:.1f}%"
        what = f"{100 * self.share:g}% of full fine-tuning's {self.metric} ({numbers})"
        if self.dimension is None:
            return f"{self.row}: none of up to {self.below:,} dimensions reaches {what}"
        seeds, known = self.by_seed, [d for d in self.by_seed if d is not None]
        lines = f"{self.row}: {self.dimension:,} of {self.elements:,} dimensions reach {what}"
        if self.below is not None:
            lines += f", {self.below:,} do not"
        if len(seeds) > 1:
            most = f"{max(known):,}" if len(known) == len(seeds) else f"more than {max(self.tested):,}"
            lines += f"; over {len(seeds)} seeds {min(known):,} to {most}"
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Every number, ready for JSON."""
        return {
            **vars(self),
            "tested": {str(d): list(values) for d, values in sorted(self.tested.items())},
            "line": self.line,
            "dimension": self.dimension,
            "below": self.below,
            "by_seed": self.by_seed,
        }


def read(answers: Mapping[str, Mapping[str, Any]]) -> list[Answer]:
    """The answers of a search, from what `to_dict` made of them."""
    names = [field.name for field in fields(Answer)]
    found = [{name: one[name] for name in names} for one in answers.values()]
    return [Answer(**one | {"tested": {int(d): values for d, values in one["tested"].items()}}) for one in found]


def line_of(share: float, full: float) -> float:
    """What is to be reached, but for rounding."""
    return share * full * (1 - 1e-9)
