"""The model card of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    sources = [source for one in recipe.get("slices", []) for source in one["sources"]]
    listed = [entry.get("model") or entry.get("task_vector") for entry in [*recipe.get("models", []), *sources]]
    models = list(dict.fromkeys(listed) if sources else listed)
    what = f"{len(models)} model{'s' * (len(models) != 1)} merged with `{method['name']}` ({method['paper']})"
    what = "One model edited" if only(provenance) is not None else what + ", then edited," * bool(edits)
    lines = [
        "---",
        *([] if provenance.get("tasks") else ["library_name: transformers"]),
        "tags:",
        "- merge",
        "- mergebench",
        "---",
        f"# {out.name}",
        "",
        f"{what} by mergebench {provenance['mergebench']}.",
        "",
    ]
    if recipe.get("base_model"):
        lines += [f"- base: `{recipe['base_model']}`"]
    lines += [f"- model: `{model}`" for model in models]
    if provenance.get("notes"):
        lines += ["", "## Notes", "", *(f"- {note}" for note in provenance["notes"])]
    if provenance.get("tasks"):
        lines += [
            "",
            "The tensors are a difference to the base, for all tasks. The model of a task, for mergebench:",
            "",
        ]
        lines += [f"- `{recipe['base_model']}+{out}/tasks/{task}`" for task in provenance["tasks"]]
    if edits:
        lines += ["", f"## Edit{'s' * (len(edits) > 1)}"]
        for edit in edits:
            code = ("patch", UNDO)
            told = [f"- {term}: `{fact}`" if term in code else f"- {term}: {fact}" for term, fact in facts(edit)]
            lines += ["", f"{sentence(edit)}:", "", *told]
        lines += ["", "The last edit is taken back first."] * (len(edits) > 1)
    if evaluation:
        lines += ["", "## Evaluation", "", evaluation.strip()]
    lines += ["", "## Recipe", "", "```yaml", written.getvalue().strip(), "```", ""]
    lines += ["Input files, answers of every statistic, bytes, time and memory: `mergebench.json`.", ""]
    return "\n".join(lines)


def ported(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a fine-tune that was carried to another base."""
    about = provenance["recipe"]
    lines = ["---", "library_name: transformers", "tags:", "- port", "- mergebench", "---", f"# {out.name}", ""]
    what = "A fine-tune carried to an updated base, new + (tuned - old) (arXiv:2410.10870),"
    lines += [f"{what} by mergebench {provenance['mergebench']}.", ""]
    lines += [f"- {name}: `{about[key]}`" for name, key in (("new", "new"), ("tuned", "port"), ("old", "old"))]
    return "\n".join([*lines, "", "Input files, bytes, time and memory: `mergebench.json`.", ""])
