"""The recipe: what to merge, how, and what to measure, checked and complete."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mergebench import methods
from mergebench.editing.spec import Wanted
from mergebench.engine.method import Method
from mergebench.errors import RecipeError
from mergebench.recipe import averaging, checkpoints, edits, modules, on_data, own, parameters, schema, tokens
from mergebench.recipe import overrides as changes
from mergebench.recipe.averaging import Entry
from mergebench.recipe.chat import chat_template
from mergebench.recipe.gradients import varies
from mergebench.recipe.measured import Baseline, Evaluation, evaluation
from mergebench.recipe.modules import Part
from mergebench.recipe.positions import Loc, Places
from mergebench.recipe.schedules import Schedule
from mergebench.recipe.slices import Slice, Source, check_ranges
from mergebench.recipe.yaml import Document, plain, read

Scope = Literal["tensor", "model"]


@dataclass(frozen=True)
class Scaling:
    """LiNeS: the factors of the merged task vector's layers."""

    alpha: float | None  # None: auto
    beta: float


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; made by `load`. Equal recipes make equal merges, in any file."""

    merge_method: str
    base_model: str | None
    models: tuple[Entry, ...]  # with slices: every model that a slice names
    parameters: dict[str, Any]  # for all models, the method's defaults filled in
    scope: Scope
    slices: tuple[Slice, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dtype: str | None = None
    out_dtype: str | None = None
    vocabulary: tokens.Vocabulary | None = None  # None: all models have the base's tokens
    chat_template: str | None = None  # written out, or "auto"
    lines: Scaling | None = None
    schedule: Schedule | None = None  # the models are checkpoints of one run, and have their weights by it
    edits: tuple[Wanted, ...] = ()  # applied to the merged model, one after another
    evaluate: Evaluation | None = None
    name: str | None = field(default=None, compare=False)  # the name of its result in other documents of the file
    path: Path | None = field(default=None, compare=False)
    folders: tuple[Path, ...] = field(default=(), compare=False)  # of relative paths, after the working directory
    notes: tuple[str, ...] = field(default=(), compare=False)  # on ignored settings, for stderr
    places: Places = field(default_factory=Places, compare=False, repr=False)
    parts: tuple[Part, ...] = field(default=(), compare=False, repr=False)  # of `modules:`, to be found in the model

    @property
    def method(self) -> Method:
        return methods.get(self.merge_method)

    def where(self, *loc: str | int) -> str:
        """`recipe.yaml:7:5` for `where("models", 1, "model")`; the nearest enclosing part if it is not written."""
        return self.places.where(loc)

    def params(self, entries: Sequence[Entry], tensor: str = "", depth: float = 0.0) -> dict[str, Any]:
        """Every parameter of the method for these models, as `Method.make_params` takes them.

        A varying parameter has its value for `tensor`, at `depth` (0 to 1) of the layers.
        """
        own = []
        for entry in entries:
            at = self.models.index(entry) if entry in self.models else len(self.models)
            own.append(parameters.Source(("models", at), entry.parameters))
        return parameters.resolve(self.method, [self.parameters], own, self.places, tensor, depth)

    def slice_params(self, number: int, sources: Mapping[int, str], tensor: str, depth: float) -> dict[str, Any]:
        """As `params`, for slice `number`; sources: places among its sources, and the tensor's name in each."""
        one = self.slices[number]
        own = [
            parameters.Source(("slices", number, "sources", at), one.sources[at].parameters, name)
            for at, name in sources.items()
        ]
        return parameters.resolve(self.method, [one.parameters, self.parameters], own, self.places, tensor, depth)

    @property
    def varies(self) -> bool:
        """Whether any parameter differs from tensor to tensor."""
        given = [self.parameters, *(entry.parameters for entry in self.models)]
        return bool(self.slices) or any(varies(value) for one in given for value in one.values())

    def with_method(self, baseline: Baseline) -> Recipe:
        """The same models merged by another method, with that method's defaults: a baseline to compare with."""
        method, reads = methods.get(baseline.method), self.method.statistics
        if method.needs_base and self.base_model is None:
            raise RecipeError(f"'{method.name}' merges task vectors, and the recipe has no base_model", NEEDS_BASE)
        needed = [p.name for p in method.parameters.values() if p.required and p.name not in baseline.parameters]
        if needed:
            hint = f"give it: {{{baseline.method}: {{{needed[0]}: VALUE}}}}"
            raise RecipeError(f"'{method.name}' has no default for {', '.join(needed)}", hint)
        return replace(
            self,
            merge_method=baseline.method,
            models=tuple(on_data.for_method(method, replace(one, parameters={}), reads) for one in self.models),
            slices=tuple(Slice(tuple(replace(source, parameters={}) for source in one.sources)) for one in self.slices),
            parameters={**parameters.defaults(method), **baseline.parameters},
            scope=method.scope,
            lines=None,
            schedule=None,
            edits=(),
            evaluate=None,
            notes=(),
        )

    @property
    def _written_models(self) -> Sequence[Entry]:
        return self.models if self.schedule is None else averaging.unweighted(self.models)

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default, ready for JSON; `load` makes an equal recipe from it."""
        measured = self.evaluate
        whole = {
            "name": self.name,
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": [] if self.slices else [_given(vars(entry)) for entry in self._written_models],
            "schedule": self.schedule and self.schedule.to_plain(),
            "slices": [one.to_plain() for one in self.slices],
            "parameters": self.parameters,
            "scope": self.scope,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "seed": self.seed,
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "tokenizer": self.vocabulary and self.vocabulary.to_plain(),
            "chat_template": self.chat_template,
            "lines": self.lines
            and {"alpha": "auto" if self.lines.alpha is None else self.lines.alpha, "beta": self.lines.beta},
            "edits": [one.to_plain() for one in self.edits],
            "evaluate": measured
            and _given({"suite": measured.suite, "baselines": [one.to_plain() for one in measured.baselines]}),
        }
        return copy.deepcopy(_given(whole))


NEEDS_BASE = "name the model the others were fine-tuned from: base_model: PATH"


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    seed: int | None = None,
    method: Method | None = None,
) -> Recipe:
    """Read and check a recipe: the path of a YAML file (or of a directory with a result, or mergekit's), or a mapping.

    `overrides` are `--set` strings such as "parameters.density=0.2"; `seed` overrides the recipe's own. `method`: a
    function made with `@merge_method`, in place of the recipe's.
    """
    document, *more = read(source)
    if more:
        hint = "read them with mergebench.load_stages, or write one document a file"
        raise more[0].places.error((), "several documents, load reads one", hint)
    return check(document, overrides, seed, method)


def check(
    document: Document, overrides: Sequence[str] = (), seed: int | None = None, method: Method | None = None
) -> Recipe:
    """Check a document and make its recipe."""
    data, places, path = document.data, document.places, document.path
    changes.apply(data, overrides, places)
    own.read_methods(data, document, method)
    checkpoints.expand(data, places, document.folders)
    if seed is not None:
        places.move(("seed",), f"--seed {seed}")
        data["seed"] = plain(seed, ("seed",), places)
    lifted, parts = modules.lift(data, places)
    habits: list[Loc] = [(key,) for key in ("int8_mask",) if lifted.pop(key, None) is not None]
    found = schema.check(lifted, places)
    method = own.get(found["merge_method"], ("merge_method",), places)
    base = found.get("base_model")
    if method.needs_base and base is None:
        raise places.error(("base_model",), f"missing, '{method.name}' merges task vectors", NEEDS_BASE)
    for key in ("slices", "tokenizer", "tokenizer_source", "chat_template", "edits"):
        if method.gives == "deltas" and found.get(key):
            what = f"'{method.name}' writes differences to the base, which must be the one on disk"
            raise places.error((key,), what, "make that base first, by a merge of its own")
    common, more = parameters.check(method, found.get("parameters", {}), ("parameters",), places)
    on_data.check(method, found, places)
    entries, ignored = [], [*habits, *more]
    for i, entry in enumerate(found.get("models", ())):
        given, more = parameters.check(method, entry.get("parameters", {}), ("models", i, "parameters"), places)
        entries.append(Entry(**{**entry, "parameters": given}))
        ignored += more
    schedule, entries = averaging.schedule(found, method, entries, parts, places)
    slices = []
    for i, one in enumerate(found.get("slices", ())):
        sources = []
        for k, layers in enumerate(one["sources"]):
            loc = ("slices", i, "sources", k, "parameters")
            given, more = parameters.check(method, layers.get("parameters", {}), loc, places)
            first, end = layers["layer_range"]
            sources.append(Source(layers["model"], first, end, given))
            ignored += more
        shared, more = parameters.check(method, one.get("parameters", {}), ("slices", i, "parameters"), places)
        slices.append(Slice(tuple(sources), shared))
        ignored += more
    if slices:
        wrong = check_ranges(slices)
        if wrong is not None:
            raise places.error(*wrong)
        named = dict.fromkeys(source.model for one in slices for source in one.sources)
        entries = [Entry(model) for model in named]
    recipe = Recipe(
        merge_method=found["merge_method"],
        base_model=base,
        models=tuple(entries),
        parameters=averaging.common(schedule, {**parameters.defaults(method), **common}),
        scope=found.get("scope", method.scope),
        slices=tuple(slices),
        include=tuple(found.get("include", ())),
        exclude=tuple(found.get("exclude", ())),
        seed=found.get("seed", 0),
        dtype=found.get("dtype"),
        out_dtype=found.get("out_dtype"),
        vocabulary=tokens.vocabulary(found, places),
        chat_template=chat_template(found.get("chat_template"), places),
        lines=_scaling(found.get("lines"), method, base, places),
        schedule=schedule,
        edits=tuple(edits.check(one, ("edits", i), places) for i, one in enumerate(found.get("edits", ()))),
        evaluate=evaluation(found.get("evaluate"), places),
        name=found.get("name"),
        path=path,
        folders=document.folders,
        notes=parameters.note(method, ignored, places),
        places=places,
        parts=parts,
    )
    if not slices:
        recipe.params([entry for entry in entries if entry.model is None or entry.model != base])
    _check_baselines(recipe)
    return recipe


def _scaling(found: Mapping[str, Any] | None, method: Method, base: str | None, places: Places) -> Scaling | None:
    """The `lines:` key; an error if the method does not support it."""
    if found is None:
        return None
    if method.takes != "task_vectors":
        hint = "take a method on task vectors, such as task_arithmetic"
        raise places.error(("lines",), f"'{method.name}' merges weights, there is no task vector to scale", hint)
    if method.gives == "deltas":
        raise places.error(("lines",), f"'{method.name}' gives a model for each task, no merged one", "leave it out")
    if base is None:
        raise places.error(("lines",), "without a base_model there is no task vector to scale", NEEDS_BASE)
    return Scaling(None if found["alpha"] == "auto" else float(found["alpha"]), float(found["beta"]))


def _check_baselines(recipe: Recipe) -> None:
    """Check the baselines before the merge rather than after it."""
    baselines = recipe.evaluate.baselines if recipe.evaluate else ()
    for i, baseline in enumerate(baselines):
        try:
            if baseline in baselines[:i]:
                raise RecipeError(f"'{baseline.label}' is listed twice")
            recipe.with_method(baseline)
        except RecipeError as error:
            raise recipe.places.error(("evaluate", "baselines", i), error.message, error.hint) from None


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value not in (None, [], {})}
