"""The model card of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.card import card, code, escape, fence, listed
from mergebench.evaluation.page.sources import models_of


def text(out: Path, provenance: Mapping[str, Any], evaluation: str = "") -> str:
    """README.md of a merged model: what was merged, how, with what result, and how to do it again."""
    from ruamel.yaml import YAML
    from ruamel.yaml.compat import StringIO

    from mergebench.editing.summary import UNDO, facts, only, sentence

    recipe, method = provenance["recipe"], provenance["method"]
    written = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(json.loads(json.dumps(recipe)), written)
    edits = provenance.get("edits") or []
    models = models_of(recipe)
    what = f"{len(models)} model{'s' * (len(models) != 1)} merged with `{method['name']}` ({method['paper']})"
    what = "One model edited" if only(provenance) is not None else what + ", then edited," * bool(edits)
    base = recipe.get("base_model")
    inputs = [f"base: {code(base)}"] * bool(base) + [f"model: {code(model)}" for model in models]
    parts = [f"{what} by mergebench {provenance['mergebench']}.", listed(inputs)]
    if provenance.get("notes"):
        parts += ["## Notes", listed(map(escape, provenance["notes"]))]
    if provenance.get("tasks"):
        parts.append("The tensors are a difference to the base, for all tasks. The model of a task, for mergebench:")
        parts.append(listed(code(f"{base}+{out}/tasks/{task}") for task in provenance["tasks"]))
    if edits:
        parts.append(f"## Edit{'s' * (len(edits) > 1)}")
        for edit in edits:
            told = (f"{term}: {(code if term in ('patch', UNDO) else escape)(fact)}" for term, fact in facts(edit))
            parts += [f"{escape(sentence(edit))}:", listed(told)]
        parts += ["The last edit is taken back first."] * (len(edits) > 1)
    if evaluation:
        parts += ["## Evaluation", evaluation.strip()]
    parts += ["## Recipe", fence(written.getvalue(), "yaml")]
    parts.append("Input files, answers of every statistic, bytes, time and memory: `mergebench.json`.")
    library = None if provenance.get("tasks") else "transformers"
    return card(out.name, parts, tags=["merge", "mergebench"], library=library)


def ported(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a fine-tune that was carried to another base."""
    about = provenance["recipe"]
    what = "A fine-tune carried to an updated base, new + (tuned - old) (arXiv:2410.10870),"
    named = (("new", "new"), ("tuned", "port"), ("old", "old"))
    parts = [
        f"{what} by mergebench {provenance['mergebench']}.",
        listed(f"{name}: {code(about[key])}" for name, key in named),
        "Input files, bytes, time and memory: `mergebench.json`.",
    ]
    return card(out.name, parts, tags=["port", "mergebench"], library="transformers")
