"""The plan of a recipe's edits, on the model that its merge gives."""

from __future__ import annotations

from dataclasses import replace

from mergebench.editing import edits
from mergebench.engine.plan import Plan
from mergebench.errors import MergebenchError
from mergebench.recipe.open import find_file, folders
from mergebench.recipe.recipe import Recipe


def with_edits(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with the recipe's edits of the merged model, checked against that model."""
    if not recipe.edits:
        return plan
    from mergebench.editing.plan import plan_edit

    reference = plan.merge.reference
    tensors = {
        info.name: info._replace(dtype=plan.dtypes[info.name], scale=None) for info in reference.tensors.values()
    }
    planned = []
    for number, wanted in enumerate(recipe.edits):
        try:
            probe = find_file(wanted.probe, folders(recipe))
            planned.append(plan_edit(wanted, edits.get(wanted.edit), probe, tensors, reference.config))
        except MergebenchError as error:
            where = recipe.where("edits", number)
            place = "" if recipe.path is None else f"{where}: edits.{number}: "
            raise type(error)(f"{place}{error.message}", error.hint) from None
    return replace(plan, merge=replace(plan.merge, edits=tuple(planned)))
