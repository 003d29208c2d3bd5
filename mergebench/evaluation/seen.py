"""Whether a merge was made with what models do on the very texts that it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergebench.checkpoint.model import Model
from mergebench.evaluation.task import cut

if TYPE_CHECKING:
    from mergebench.evaluation.batch import Candidate
    from mergebench.evaluation.suite import Suite


def mark(text: str) -> str:
    """12 hex digits that know a text again, whatever its id and its file."""
    return hashlib.sha256(cut(text).encode()).hexdigest()[:12]


def seen(candidates: Sequence[Candidate], suite: Suite) -> list[str]:
    """A note for each merge that was made with texts of the suite."""
    from mergebench.checkpoint.target import finished  # torch comes with it

    notes = []
    for candidate in candidates:
        place = candidate.model.own_directory() if isinstance(candidate.model, Model) else candidate.directory
        provenance = None if place is None else finished(place)
        statistics = (provenance or {}).get("statistics") or []
        marks = {one for of_model in statistics for one in str(of_model.get("texts", "")).split()}
        texts = [item.text for task in suite.tasks for item in task.ready.asked.values()] if marks else []
        both = sum(mark(text) in marks for text in texts)
        if both:
            what = f"{candidate.name} was merged by what models do on {both} of these {len(texts)} items"
            notes.append(f"{what}, on which it is better than on new ones")
    return notes
