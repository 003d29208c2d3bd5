"""Recipes: what to merge and how, read strictly from YAML or a mapping.

`load` checks everything that can be known without opening a model: a loaded recipe names an existing method and
parameters that the method takes.
"""

from mergebench.recipe.averaging import Entry
from mergebench.recipe.measured import Baseline, Evaluation
from mergebench.recipe.recipe import Recipe, load
from mergebench.recipe.stages import Stage, load_stages

__all__ = ["Baseline", "Entry", "Evaluation", "Recipe", "Stage", "load", "load_stages"]
