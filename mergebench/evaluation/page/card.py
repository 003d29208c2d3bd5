"""The model card of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint.card import card, code, escape, fence, linked, listed
from mergebench.checkpoint.lineage import as_from, library_of, pipeline_of, place_of
from mergebench.errors import counted
from mergebench.recipe.open import models_of


def text(out: Path, provenance: Mapping[str, Any], evaluation: str = "", directory: Path | None = None) -> str:
    """README.md of a merged model: what was merged, how, with what result, and how to do it again.

    directory: where the result lies while it is not at `out` yet.
    """
    from mergebench.editing.summary import UNDO, facts, only, sentence

    recipe, method = provenance["recipe"], provenance["method"]
    folders = [Path(folder) for folder in provenance.get("folders", ())]
    edits = provenance.get("edits") or []
    models = models_of(recipe)
    what = f"{counted(len(models), 'model')} merged with `{method['name']}` ({method['paper']})"
    what = "One model edited" if only(provenance) is not None else what + ", then edited," * bool(edits)
    base = recipe.get("base_model")
    inputs = [("base", base)] * bool(base) + [("model", model) for model in models]
    parts = [f"{what} by mergebench {provenance['mergebench']}."]
    parts.append(listed(f"{role}: {linked(one, out, folders)}" for role, one in inputs))
    if provenance.get("notes"):
        parts += ["## Notes", listed(map(escape, provenance["notes"]))]
    if provenance.get("statistics"):
        told = (f"{one['kind']} of model {n}: {_texts(one)}" for n, one in enumerate(provenance["statistics"], 1))
        parts += ["## What the models do on data", listed(map(escape, told))]
    if provenance.get("tasks"):
        parts.append("The tensors are a difference to the base, for all tasks. The model of a task, for mergebench:")
        parts.append(listed(code(f"{as_from(base, out)}+{out.name}/tasks/{task}") for task in provenance["tasks"]))
    if edits:
        parts.append(f"## Edit{'s' * (len(edits) > 1)}")
        for edit in edits:
            known = [(term, as_from(fact, out) if fact.startswith("/") else fact) for term, fact in facts(edit)]
            told = (f"{term}: {(code if term in ('patch', UNDO) else escape)(fact)}" for term, fact in known)
            parts += [f"{escape(sentence(edit))}:", listed(told)]
        parts += ["The last edit is taken back first."] * (len(edits) > 1)
    if evaluation:
        parts += ["## Evaluation", evaluation.strip()]
    parts += ["## Recipe", fence(as_yaml(_from_here(recipe, out, folders)), "yaml")]
    parts.append("Paths in it are as from this directory. Input files, time and memory: `mergebench.json`.")
    made = "edit" if only(provenance) is not None else f"{method['name']} merge of {len(models)} model"
    return card(
        out.name,
        parts,
        tags=["merge", "mergebench"],
        library=None if provenance.get("tasks") else library_of(directory or out),
        relation="finetune" if only(provenance) is not None else "merge",
        models=[base, *models],
        pipeline=pipeline_of(directory or out),
        folders=folders,
        title=f"{out.name}: {made}{'s' * (made[0] != 'e' and len(models) != 1)}",
    )


def _from_here(recipe: Any, out: Path, folders: Sequence[Path]) -> Any:
    """The recipe with every path that there is written as from the result."""
    if isinstance(recipe, dict):
        return {key: _from_here(value, out, folders) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [_from_here(value, out, folders) for value in recipe]
    if not isinstance(recipe, str) or not recipe:
        return recipe
    parts = recipe.split("+")
    places = [place_of(part, folders) if "/" in part else None for part in parts]
    found = [part if at is None else str(at.absolute()) for part, at in zip(parts, places, strict=True)]
    return as_from("+".join(found), out)


def as_yaml(document: Any) -> str:
    """A document as YAML; a list of plain values, such as a gradient, on one line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.compat import StringIO

    yaml, stream = YAML(typ="rt"), StringIO()
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.dump(_flowing(json.loads(json.dumps(document))), stream)
    return stream.getvalue().strip()


def ported(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a fine-tune that was carried to another base."""
    about = provenance["recipe"]
    what = "A fine-tune carried to an updated base, new + (tuned - old) (arXiv:2410.10870),"
    named = (("new", "new"), ("tuned", "port"), ("old", "old"))
    parts = [
        f"{what} by mergebench {provenance['mergebench']}.",
        listed(f"{name}: {linked(about[key], out)}" for name, key in named),
        "Input files, bytes, time and memory: `mergebench.json`.",
    ]
    tuned = [about["new"], about["port"]]
    return card(out.name, parts, tags=["port", "mergebench"], library="transformers", relation="finetune", models=tuned)


def _flowing(value: Any) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, dict):
        return {key: _flowing(one) for key, one in value.items()}
    if not isinstance(value, list):
        return value
    found = CommentedSeq(map(_flowing, value))
    if not any(isinstance(one, (dict, list)) for one in value):
        found.fa.set_flow_style()
    return found


def _texts(statistics: Mapping[str, Any]) -> str:
    """Which texts a model's statistics are of."""
    file = Path(str(statistics.get("data", {}).get("file", "")))
    return f"{counted(int(statistics.get('items', 0)), 'text')} of {file.name}"
