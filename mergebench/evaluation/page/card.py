"""The model card of a result, and the check that transformers takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.errors import RunError


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
    models = [entry.get("model") or entry.get("task_vector") for entry in recipe.get("models", [])]
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


def verify(directory: Path) -> None:
    """Load the result on `meta` with transformers: no missing, unexpected or mismatched tensor."""
    from mergebench.networks.module import quiet

    if not (directory / "config.json").is_file():
        raise RunError(f"{directory}: --verify needs a config.json, the base has none")
    try:
        with quiet():
            info = _loading_info(directory)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:  # whatever it has against the config
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise RunError(f"{directory}: transformers cannot load it: {reason}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise RunError(
                f"{directory}: transformers finds {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}"
            )


def _loading_info(directory: Path) -> dict[str, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    loader = getattr(transformers, name, None)
    if loader is None:
        raise ValueError(f"it has no {name}")
    _, info = loader.from_pretrained(
        directory, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    return dict(info)
