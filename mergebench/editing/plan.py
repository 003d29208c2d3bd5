"""Plan an edit from headers and the probe, with all checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mergebench.checkpoint.content import identity
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.model import Model
from mergebench.editing.edit import Edit, Rows
from mergebench.editing.probes.probe import Direction, Probe, read_probe
from mergebench.editing.spec import Wanted
from mergebench.editing.targets import Target, find_targets


@dataclass(frozen=True)
class Planned:
    """A planned edit of a model."""

    wanted: Wanted
    edit: Edit
    params: Any
    probe: Probe
    targets: Sequence[Target]
    elements: int  # of the whole model

    @cached_property
    def direction(self) -> Tensor:
        """[width] float32: the direction that is added, times each row's amount."""
        return self.probe.direction(cast(Direction, self.wanted.direction)).contiguous()

    @property
    def count(self) -> int:
        """Candidate rows."""
        return sum(len(target.numbers) for target in self.targets)

    @property
    def nbytes(self) -> int:
        """Bytes of the candidate rows, counted as two bytes per element."""
        return 2 * self.count * self.probe.width

    @property
    def digest(self) -> str:
        """What the result depends on."""
        plain = {**self.wanted.to_plain(), **vars(self.params), "probe": self.probe.sha256}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def doubts(self, model: Model) -> list[str]:
        """Reasons why the probe may not apply to this model."""
        doubt, found = self.probe.doubt(), []
        if doubt is not None:
            found.append(f"{self.probe.file}: {doubt}")
        fitted, own = (self.probe.about.get("model") or {}).get("identity"), identity(model)
        if fitted not in (None, own):
            found.append(f"{self.probe.file}: fitted on another model ({fitted}) than this one ({own})")
        return found


def plan_edit(
    wanted: Wanted, edit: Edit, probe: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Planned:
    """Find an edit's rows among a model's tensors, and try the edit on rows of zeros.

    Raises if the probe, its width, the target or the number of rows do not fit.
    """
    read = read_probe(probe)
    read.direction(cast(Direction, wanted.direction))  # a missing direction fails here
    targets = find_targets(tensors, config, wanted.target, read.width, wanted.layers)
    elements = sum(info.numel for info in tensors.values())
    planned = Planned(wanted, edit, edit.make_params(wanted.values), read, targets, elements)
    nothing = torch.zeros(planned.count)
    edit(Rows(nothing, nothing, nothing.long(), 1.0), planned.params)
    return planned
