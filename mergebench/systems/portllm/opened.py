"""What a port is made of: the old base, the same with the patch, the new base."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergebench.checkpoint import Model, adopt
from mergebench.checkpoint.align import Problem, align
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.reference import locate
from mergebench.deltas.formats import format_of
from mergebench.deltas.open import open_model
from mergebench.deltas.peft.directory import holds_no_model, is_adapter
from mergebench.errors import ModelError, RecipeError
from mergebench.systems.portllm.tokens import under_new_tokens

_EXCLUDE = "--exclude GLOB keeps the new base's tensors of that name, and leaves out those of the others"


@dataclass(frozen=True)
class Opened:
    """The models of a port, under the new base's tensor names."""

    new: Model
    tuned: Model  # a fine-tune, or the old base with an adapter on top
    old: Model
    adapter: Path | None  # where the patch is one
    wanted: Callable[[str], bool]  # tensors that are ported
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> list[Problem]:
        """Every tensor that does not fit."""
        return align(self.new, (self.tuned, self.old), self.wanted).problems

    def check(self) -> None:
        """`ModelError` if a tensor does not fit."""
        problems = self.problems
        if problems:
            more = f" (and {len(problems) - 1} more: --check lists them)" * (len(problems) > 1)
            raise ModelError(text_of(problems[0], self.new) + more, _EXCLUDE)

    def added(self, name: str) -> tuple[Delta, ...]:
        """The adapter's deltas on a tensor."""
        return self.tuned.deltas.get(name, ())[len(self.old.deltas.get(name, ())) :]

    @property
    def patched(self) -> tuple[str, ...]:
        """Tensors that the adapter changes."""
        return tuple(name for name in self.tuned.deltas if self.added(name))


def adapter_at(patch: str | Path) -> Path | None:
    """Where an adapter or a delta file lies; None for a model."""
    place, *deltas = locate(str(patch)).parts
    known = format_of(place)
    alone = known.alone(place) if known is not None else is_adapter(place) and holds_no_model(place)
    return place if alone and not deltas else None


def open_port(old: str, new: str, patch: str | Path, exclude: Sequence[str] = ()) -> Opened:
    """Open the models (headers only); tensors that do not fit are in `problems`.

    Raises `ModelError` if a model is missing, or the adapter does not belong to the old base.
    """
    adapter = adapter_at(patch)
    updated, origin = open_model(new), open_model(old)
    tuned = open_model(str(patch) if adapter is None else f"{old}+{patch}")
    for model in (updated, origin, tuned):
        if model.is_task_vector:
            raise RecipeError(
                f"'{model.reference}' holds differences, no model",
                f"a task vector needs no port: {new}+{model.reference} is the new base with it",
            )

    def wanted(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)

    opened = Opened(updated, adopt(updated, tuned), adopt(updated, origin), adapter, wanted)
    remarks = [f"{name}: {said}" for name, model in _named(opened) for said in model.remarks]

    def changed(name: str) -> bool:
        return adapter is None or bool(opened.added(name))

    models, notes = under_new_tokens(opened.new, (opened.tuned, opened.old), wanted, changed)
    return replace(opened, tuned=models[0], old=models[1], notes=(*dict.fromkeys(remarks), *notes))


def text_of(problem: Problem, new: Model) -> str:
    """A mismatch in a line that names the new base."""
    return problem.text.replace(", base ", f", {new.reference} ")


def _named(opened: Opened) -> tuple[tuple[str, Model], ...]:
    return (("new", opened.new), ("tuned", opened.tuned), ("old", opened.old))
