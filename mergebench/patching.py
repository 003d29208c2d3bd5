"""Edits of a model and patches of it planned, as the command line and Python users call it; `mergebench.run` does them.

plan = plan_edit("org/model", "probe.safetensors", rows="4.65%", alpha=1.08)
mergebench.run(plan, "edited")                                        # beside the model, edited/patch.safetensors
mergebench.run(plan_patch("edited", "edited/patch.safetensors", revert=True), "as-it-was")
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergebench import api
from mergebench.checkpoint.patch import open_patch
from mergebench.editing.carry_out import PutIn
from mergebench.editing.planned import Planned
from mergebench.editing.scan import scan
from mergebench.engine.plan import DEFAULT_MEMORY, SHARD_SIZE, Plan, plan_merge
from mergebench.errors import RecipeError
from mergebench.recipe import Recipe, load
from mergebench.recipe.resolve import resolve


def plan_edit(
    model: str,
    probe: str | Path,
    *,
    edit: str = "surgery",
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
    **how: Any,
) -> Plan:
    """A copy of a model and the edit of it, checked by headers alone.

    how: direction, target, layers, and the edit's own parameters (of surgery: rows, alpha, alpha_relative, select, op,
    seed), as in a recipe's `edits:`; None is not given.
    """
    given = {key: value for key, value in how.items() if value is not None}
    try:
        recipe = load(_copy(model) | {"edits": [{"edit": edit, "probe": str(probe), **given}]})
    except RecipeError as error:  # there is no recipe that a user could look into
        raise RecipeError(error.message.removeprefix("recipe: edits.0."), error.hint) from None
    return api.with_edits(_plan_copy(recipe, memory, workers, shard_size), recipe)


def plan_patch(
    model: str,
    patch: str | Path,
    *,
    revert: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """A copy of a model with a patch put in, or with `revert` taken out, bit for bit.

    `ModelError` where the model's rows are not those that the patch was made on (with `revert`: those it made).
    """
    put_in = PutIn(open_patch(patch), revert)
    plan = _plan_copy(load(_copy(model)), memory, workers, shard_size)
    put_in.check(plan.merge.reference)
    return replace(plan, merge=replace(plan.merge, edits=(put_in,)))


def dry_run(plan: Plan, progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """What the edit of a plan by `plan_edit` would do to how many rows, from one read of the candidates; nothing is
    written. As `edits` in mergebench.json tells it of one that was made."""
    (planned,) = plan.merge.edits
    assert isinstance(planned, Planned)
    report = scan(planned, plan.merge.reference, progress).report()
    return report | {"warnings": planned.doubts(plan.merge.reference) + report["warnings"]}


def _copy(model: str) -> dict[str, Any]:
    """The recipe of a copy."""
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def _plan_copy(recipe: Recipe, memory: int, workers: int | None, shard_size: int) -> Plan:
    """The plan of a copy: bytes are moved as they are, but for what an adapter changes."""
    merge = resolve(recipe)
    changed = tuple(glob.escape(name) for name in merge.reference.deltas)
    merge = replace(merge, include=changed, exclude=() if changed else ("*",), copies=True)
    return plan_merge(merge, memory=memory, workers=workers, shard_size=shard_size, device="cpu")
