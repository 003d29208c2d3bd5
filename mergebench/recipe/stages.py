"""A merge in several stages: documents of one YAML file that name each other's results.

    name: coder                     # merged into <out>.stages/coder
    merge_method: linear
    models: [{model: org/a}, {model: org/b}]
    ---
    merge_method: ties              # the result, merged into <out>
    base_model: org/base
    models: [{model: coder}, {model: org/c}]

Every document but the result has a name; if all have names, the last is the result. Documents may be in any order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from mergebench.errors import RecipeError
from mergebench.recipe.positions import Loc
from mergebench.recipe.recipe import Recipe, check
from mergebench.recipe.yaml import PROVENANCE, Document, read

UNNAMED = "every document but the result needs a name that the others call it by: name: NAME"


@dataclass(frozen=True)
class Stage:
    """One recipe of several, and the directory of its result."""

    recipe: Recipe  # with directories of results in place of the names of other stages
    out: Path
    needs: tuple[Path, ...] = ()  # directories of other stages that it reads

    @property
    def name(self) -> str:
        return self.recipe.name or "the result"

    @property
    def waits_for(self) -> list[str]:
        """The stages that must be merged before this one can be planned."""
        from mergebench.checkpoint.target import finished  # torch comes with it

        return [place.name for place in self.needs if finished(place) is None]


def load_stages(
    source: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
) -> list[Stage]:
    """Read and check the recipes of a file with one or more documents, in the order to merge them.

    The last recipe's result goes to `out` (None: `merged/<recipe stem>`), the others' to `<out>.stages/NAME`.
    `overrides` change the last recipe; `seed` overrides every recipe's own.
    """
    documents = read(source)
    last = _result(documents)
    recipes = [check(one, overrides if i == last else (), seed) for i, one in enumerate(documents)]
    target = Path(out) if out is not None else default_out(recipes[last])
    if len(recipes) == 1:
        return [Stage(recipes[0], target)]
    numbers = _numbers(recipes, last)
    needs = {i: _needed(recipe, numbers) for i, recipe in enumerate(recipes)}
    order = _order(recipes, needs, last)
    folder = _folder(target)
    stages = []
    for number in order:
        recipe, inputs = recipes[number], [folder / str(recipes[one].name) for one in needs[number]]
        moved = _moved(recipe, {place.name: str(place) for place in inputs})
        stages.append(Stage(moved, target if number == last else folder / str(recipe.name), tuple(inputs)))
    return stages


def default_out(recipe: Recipe) -> Path:
    """`merged/<recipe stem>`; for what we or mergekit wrote, `merged/<its directory>`."""
    if recipe.path is None:
        return Path("merged") / recipe.method.name
    if recipe.path.is_dir():
        return Path("merged") / recipe.path.resolve().name
    return Path("merged") / (recipe.path.resolve().parent.name if recipe.path.name == PROVENANCE else recipe.path.stem)


def references(recipe: Recipe) -> Iterator[tuple[Loc, str]]:
    """Every model that the recipe names, and where."""
    if recipe.base_model is not None:
        yield ("base_model",), recipe.base_model
    if not recipe.slices:
        yield from ((("models", i, "model"), one.model) for i, one in enumerate(recipe.models) if one.model is not None)
    for i, part in enumerate(recipe.slices):
        yield from ((("slices", i, "sources", k, "model"), one.model) for k, one in enumerate(part.sources))


def _result(documents: Sequence[Document]) -> int:
    """Which document is the result: the one without a name, else the last."""
    unnamed = [i for i, one in enumerate(documents) if one.data.get("name") is None]
    if len(unnamed) > 1:
        raise documents[unnamed[1]].places.error((), "a second document without a name", UNNAMED)
    return unnamed[0] if unnamed else len(documents) - 1


def _numbers(recipes: Sequence[Recipe], last: int) -> dict[str, int]:
    """The documents by name; ambiguous names are refused."""
    found: dict[str, int] = {}
    for number, recipe in enumerate(recipes):
        if recipe.name is None:
            continue
        if recipe.name in found:
            first = recipes[found[recipe.name]].where("name")
            raise recipe.places.error(("name",), f"'{recipe.name}' is given twice", f"it stands at {first} already")
        found[recipe.name] = number
        if number == last:
            continue
        places = [Path(recipe.name), *(folder / recipe.name for folder in recipe.folders)]
        path = next((place for place in places if place.exists()), None)
        if path is not None:
            what = f"'{recipe.name}' is the path of something that exists too"
            raise recipe.places.error(("name",), what, f"choose another name; as a path, write {path.absolute()}")
        if recipe.evaluate is not None:
            what = f"'{recipe.name}' is a stage, only the result is evaluated"
            raise recipe.places.error(("evaluate",), what, "move it to the document without a name")
    return found


def _needed(recipe: Recipe, numbers: Mapping[str, int]) -> dict[int, Loc]:
    """The documents whose results a recipe names, and the place of the first mention."""
    found: dict[int, Loc] = {}
    for loc, text in references(recipe):
        name = _stage_of(text, numbers)
        if name is not None:
            found.setdefault(numbers[name], loc)
    return found


def _stage_of(text: str, names: Mapping[str, Any]) -> str | None:
    """The stage that a reference names: NAME or NAME+ADAPTER."""
    return next((one for one in (text, text.partition("+")[0]) if one in names), None)


def _order(recipes: Sequence[Recipe], needs: Mapping[int, Mapping[int, Loc]], last: int) -> list[int]:
    """The documents in an order in which each finds its inputs."""
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = error.args[1]  # each stage is needed by the next
        names = " needs ".join(recipes[one].name or "the result" for one in reversed(circle))
        first = recipes[circle[1]]
        loc = needs[circle[1]][circle[0]]
        raise first.places.error(loc, f"stages in a circle: {names}", "name a model instead") from None
    used, ahead = {last}, [last]
    while ahead:
        new = needs[ahead.pop()].keys() - used
        used |= new
        ahead += new
    for number, recipe in enumerate(recipes):
        if number not in used:
            hint = "name it under base_model, models or slices of another, or leave it out"
            if recipes[last].name is not None:
                hint = f"the result is the document without a name, or the last: '{recipes[last].name}' here"
            raise recipe.places.error(("name",), f"the result does not use stage '{recipe.name}'", hint)
    return order


def _folder(out: Path) -> Path:
    """The directory of the stages' results, beside the final result, or in it where it is a mounted volume."""
    from mergebench.checkpoint.target import STAGES, stays  # torch comes with it

    if stays(Path(os.path.realpath(out))):
        return out / STAGES
    place = out if out.name not in ("", "..") else Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.stages")


def _moved(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
    """The recipe with the directories of stages in place of their names."""

    def placed(text: str) -> str:
        name = _stage_of(text, places)
        return text if name is None else places[name] + text.removeprefix(name)

    def moved(one: Any) -> Any:
        return one if one.model is None else replace(one, model=placed(one.model))

    return replace(
        recipe,
        base_model=None if recipe.base_model is None else placed(recipe.base_model),
        models=tuple(moved(entry) for entry in recipe.models),
        slices=tuple(replace(part, sources=tuple(moved(source) for source in part.sources)) for part in recipe.slices),
    )


def check_stages(stages: Sequence[Stage], *, resume: bool = False, overwrite: bool = False) -> None:
    """Check before hours of merging that every input model exists and no target is taken."""
    from mergebench.checkpoint.target import check_target, finished  # torch comes with them
    from mergebench.recipe.open import find_file, folders, open_named

    for stage in stages:
        if stage is not stages[-1] and finished(stage.out) is not None and not (resume or overwrite):
            hint = "use it with --resume, replace it with --overwrite, or choose another --out"
            raise RecipeError(f"{stage.out}: it holds a finished stage", hint)
        check_target(stage.out, [], overwrite or resume)
        for loc, text in references(stage.recipe):
            if not any(text == str(place) or text.startswith(f"{place}+") for place in stage.needs):
                open_named(stage.recipe, text, loc)
        for one in stage.recipe.edits:
            find_file(one.probe, folders(stage.recipe))
        for i, entry in enumerate(stage.recipe.models):
            if entry.task_vector is not None:
                open_named(stage.recipe, entry.task_vector, ("models", i, "task_vector"), task_vector=True)
