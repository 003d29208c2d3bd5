"""Apply edits and patches, or revert patches, in the files of a checkpoint that is not yet published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.staging import Staging
from mergebench.deltas.open import open_model
from mergebench.editing.neurons import vectors, write_vectors
from mergebench.editing.patches import Patch, check_finite, open_patch, write_patch
from mergebench.editing.plan import Planned
from mergebench.editing.scan import scan
from mergebench.engine.machine import one_thread
from mergebench.errors import ModelError


@dataclass(frozen=True)
class PutIn:
    """A patch to apply to a model, or with `revert` to revert."""

    patch: Patch
    revert: bool = False

    @cached_property
    def digest(self) -> str:
        """What the result depends on."""
        return f"{sha256_of(self.patch.file)} {self.revert}"

    def check(self, model: Model) -> None:
        """`ModelError` if the model's rows are not, bit for bit, those that the patch expects."""
        patch, held = self.patch, set()
        with Files() as files:
            values = model.values(files)
            for name in patch.names:
                change = patch.change(name)
                rows = vectors(values, patch.neurons(model, name), change.numbers)
                before, after = _equal(rows, change.originals), _equal(rows, change.edited(patch.direction))
                if not (before and after):
                    held.add("before" if before else "after" if after else "neither")
        wrong = held - {"after" if self.revert else "before"}
        if not wrong:
            return
        if len(held) > 1 or "neither" in held:
            what = f"{model.reference} has other rows than the model it was made on"
            raise ModelError(f"{patch.file}: {what}", "patches go into that model, and out of what that gave")
        if self.revert:
            raise ModelError(f"{patch.file}: {model.reference} does not have this edit", "there is nothing to take out")
        what = f"{model.reference} is already edited with this patch"
        raise ModelError(f"{patch.file}: {what}", "mergebench patch revert takes it out")

    def make(self, model: Model) -> None:
        """Write the rows into the model's own files."""
        for name in self.patch.names:
            change = self.patch.change(name)
            edited = change.edited(self.patch.direction)
            check_finite(name, edited)
            rows = change.originals if self.revert else edited
            write_vectors(self.patch.neurons(model, name), change.numbers, rows)


def patch_names(count: int) -> list[str]:
    """The file names of the patches of `count` edits, beside the model."""
    return ["patch.safetensors"] if count == 1 else [f"patch-{number}.safetensors" for number in range(1, count + 1)]


def carry_out(edits: Sequence[Planned | PutIn], staging: Staging, copied: Model | None = None) -> list[dict[str, Any]]:
    """Apply edits to the model in a partial directory, each planned on the result of the previous one; returns reports.

    copied: the model that was copied. A patch is complete before the first of its rows is written, and determines each
    new row: a killed run is resumed by writing all rows again.
    """
    named = zip(edits, patch_names(len(edits)), strict=True)
    with one_thread():  # in many small steps, threads would only wait for one another
        return [_carry_out(edit, name, staging, copied) for edit, name in named]


def _carry_out(edit: Planned | PutIn, name: str, staging: Staging, copied: Model | None) -> dict[str, Any]:
    model = open_model(str(staging.directory))  # as the edit before it left the files
    if isinstance(edit, PutIn):
        edit.make(model)
        return {**edit.patch.about, "patch": str(edit.patch.file), "reverted": edit.revert}
    made: dict[str, dict[str, Any]] = staging.journal.setdefault("edits", {})
    if name not in made:
        doubts = edit.doubts(copied or model)  # about the model before this edit
        first = not made  # no stored model is the base of a later patch
        base = identity(copied) if copied is not None and first else None
        report = write_planned(edit, model, staging.directory / name, base)
        made[name] = {"patch": name, **report, "warnings": doubts + report["warnings"]}
        staging.complete(name)
    PutIn(open_patch(staging.directory / name)).make(model)
    return made[name]


def write_planned(edit: Planned, model: Model, file: Path, base: str | None = None) -> dict[str, Any]:
    """Find an edit's rows in a model and write its patch; returns the report. base: as of `write_patch`."""
    found = scan(edit, model)
    changes = found.changes()
    report = found.report()
    columns = frozenset(target.tensor for target in edit.targets if target.transposed) & changes.keys()
    about = {key: value for key, value in report.items() if key not in ("by_layer", "cosine")}
    write_patch(file, model, edit.direction, changes, columns, about, base)
    return report


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """To the bit: zeros have signs, and NaN is NaN."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
