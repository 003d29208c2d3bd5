"""Several documents in one file: their order, their names, and what may not stand there."""

# ruff: noqa: E501  (a table reads best with a case a line)
from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mergebench.errors import RecipeError
from mergebench.recipe import load, load_stages

Write = Callable[[str], str]

LAST = "merge_method: linear\nmodels: [{model: one}, {model: two+lora}]\nbase_model: one\n"
ONE = "name: one\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n"
TWO = "name: two\nmerge_method: linear\nmodels: [{model: one}, {model: c}]\n"


def joined(*documents: str) -> str:
    return "---\n".join(map(textwrap.dedent, documents))


@pytest.mark.parametrize("documents", [(ONE, TWO, LAST), (LAST, TWO, ONE), (TWO, LAST, ONE)])
def test_order_and_places(write: Write, documents: tuple[str, ...]) -> None:
    one, two, last = load_stages(write(joined(*documents)))
    assert [stage.name for stage in (one, two, last)] == ["one", "two", "the result"]
    assert [str(stage.out) for stage in (one, two, last)] == [
        "merged/recipe.stages/one",
        "merged/recipe.stages/two",
        "merged/recipe",
    ]
    assert [entry.model for entry in two.recipe.models] == ["merged/recipe.stages/one", "c"]
    assert last.recipe.base_model == "merged/recipe.stages/one"
    assert [entry.model for entry in last.recipe.models] == [
        "merged/recipe.stages/one",
        "merged/recipe.stages/two+lora",
    ]
    assert (one.needs, two.needs, set(last.needs)) == ((), (one.out,), {one.out, two.out})
    assert (one.waits_for, two.waits_for) == ([], ["one"])


def test_slices_name_stages(write: Write) -> None:
    slices = "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [0, 2]}]}]\n"
    _, last = load_stages(write(joined(ONE, slices)), "x/out")
    assert last.recipe.slices[0].sources[0].model == "x/out.stages/one" == last.recipe.models[0].model


def test_the_last_is_the_result_where_all_have_names(write: Write) -> None:
    one, two = load_stages(write(joined(ONE, TWO)))
    assert (one.name, two.name, str(two.out)) == ("one", "two", "merged/recipe")


def test_set_changes_the_result_and_seed_all(write: Write) -> None:
    one, last = load_stages(
        write(joined(LAST.replace("two+lora", "c"), ONE)), overrides=["parameters.weight=0.5"], seed=3
    )
    assert (one.recipe.parameters["weight"], last.recipe.parameters["weight"]) == (1.0, 0.5)
    assert (one.recipe.seed, last.recipe.seed) == (3, 3)


@pytest.mark.parametrize("text", [ONE, f"---\n{ONE}", f"{ONE}---\n", f"{ONE}...\n---\n---\n"])
def test_one_document(write: Write, text: str) -> None:
    (only,) = load_stages(write(text), "out")
    assert (only.recipe, only.out, only.needs) == (load("recipe.yaml"), Path("out"), ())


@pytest.mark.parametrize("out", [".", "sub/..", "merged/"])
def test_the_stages_stand_beside_the_result(write: Write, out: str) -> None:
    Path(write(joined(ONE, TWO))).with_name("sub").mkdir()
    one, _ = load_stages("recipe.yaml", out)
    place = Path.cwd() / out
    assert one.out.resolve() == (place.resolve().parent / f"{place.resolve().name}.stages" / "one")


SELF = "name: two\nmerge_method: linear\nmodels: [{model: two}, {model: one}]\n"
BACK = "name: one\nmerge_method: linear\nmodels:\n  - model: two\n  - model: b\n"
NAME = "every document but the result needs a name that the others call it by: name: NAME"


@pytest.mark.parametrize(
    ("documents", "message", "hint"),
    [
        ((ONE, ONE, LAST), "recipe.yaml:5:1: name: 'one' is given twice", "it stands at recipe.yaml:1:1 already"),
        ((LAST, ONE, LAST), "recipe.yaml:9:1: a second document without a name", NAME),
        ((ONE, TWO, "merge_method: linear\nmodels: [{model: one}]\n"), "recipe.yaml:5:1: name: the result does not use stage 'two'", "name it under"),
        ((TWO, ONE), "recipe.yaml:1:1: name: the result does not use stage 'two'", "the document without a name, or the last: 'one' here"),
        ((BACK, TWO, LAST), "recipe.yaml:9:11: models.0.model: stages in a circle: one needs two needs one", "name a model instead"),
        ((ONE, SELF), "recipe.yaml:7:11: models.0.model: stages in a circle: two needs two", "name a model instead"),
        ((ONE + "evaluate: {suite: s.yaml}\n", TWO), "recipe.yaml:4:1: evaluate: 'one' is a stage, only the result is evaluated", "without a name"),
        ((ONE, TWO.replace("name: two", "name: a/b")), "recipe.yaml:5:1: name: must be a plain name", None),
        ((ONE, TWO.replace("linear", "tise")), "recipe.yaml:6:1: merge_method: no method is called 'tise'", "did you mean 'ties'?"),
        ((ONE, "- a\n"), "recipe.yaml:5:1: a recipe is a mapping, got a list", "begin with"),
        ((ONE, "b: c: d\n"), "recipe.yaml:5:5: not valid YAML", None),
    ],
)  # fmt: skip
def test_mistakes(write: Write, documents: tuple[str, ...], message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        load_stages(write(joined(*documents)))
    assert caught.value.message.startswith(message) and "\n" not in caught.value.message
    assert (hint or "") in (caught.value.hint or "")


@pytest.mark.parametrize("place", ["one", "recipes/one"])
def test_a_name_that_is_a_path(write: Write, place: str) -> None:
    write("")
    Path("recipes").mkdir()
    Path("recipes/r.yaml").write_text(joined(ONE, TWO), encoding="utf-8")
    Path(place).mkdir()
    with pytest.raises(RecipeError) as caught:
        load_stages("recipes/r.yaml")
    assert caught.value.message == "recipes/r.yaml:1:1: name: 'one' is the path of something that exists too"
    assert caught.value.hint == f"choose another name; as a path, write {Path(place).absolute()}"


def test_load_names_the_function_to_use(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(joined(ONE, TWO)))
    assert caught.value.message == "recipe.yaml:5:1: several documents, load reads one"
    assert "mergebench.load_stages" in str(caught.value.hint)
