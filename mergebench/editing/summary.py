"""Summaries of a model's edits, from its provenance, for tables, cards and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

UNDO = "undone, in this directory, by"
Entry = Mapping[str, Any]  # an `Edit`


class Fitted(TypedDict, total=False):
    """The probe of an edit."""

    file: str
    sha256: str
    layer: int | None
    test_accuracy: float | None


class Cosine(TypedDict, total=False):
    least: float
    most: float


class Edit(TypedDict, total=False):
    """One edit, as mergebench.json has it, and a patch without what is only known of the model."""

    edit: str
    probe: Fitted | None
    parameters: dict[str, Any]
    direction: str
    layers: Any
    target: str
    rows: int
    of: int
    by_layer: dict[str, int]
    share: float | None
    alpha: float | None
    relative_step: float | None
    cosine: Cosine
    z: float | None
    warnings: list[str]
    patch: str
    reverted: bool


def sentence(edit: Entry) -> str:
    """`surgery with probe.safetensors of 1,229 of 26,460 rows of gate_proj, step 0.75`."""
    by = f" with {Path(edit['probe']['file']).name}" if edit.get("probe") else ""
    of = f" of {_rows(edit)}" if "rows" in edit else ""
    step = f", step {edit['relative_step']:.3g}" if edit.get("relative_step") is not None else ""
    return f"{edit.get('edit', 'a patch')}{by}{of}{step}" + ", taken back" * bool(edit.get("reverted"))


def _rows(edit: Entry) -> str:
    return f"{edit['rows']:,} of {edit['of']:,} rows of {edit['target']}"


def facts(edit: Entry) -> list[tuple[str, str]]:
    """Terms and values that are known; an applied or reverted patch has fewer than a new edit."""
    given = {name: edit[name] for name in ("direction", "layers") if name in edit} | edit.get("parameters", {})
    found = [
        ("rows", f"{_rows(edit)}{_where(edit)}" if "rows" in edit else ""),
        ("parameters", ", ".join(f"{name} {_value(value)}" for name, value in given.items())),
    ]
    if edit.get("share") is not None:
        found.append(("share", f"{edit['share']:.2%} of the model's parameters"))
    if edit.get("relative_step") is not None:
        found.append(("step", f"{edit['relative_step']:.3g} times the median norm of the candidate rows"))
    if "least" in edit.get("cosine", {}):
        found.append(("cosine", f"{edit['cosine']['least']:+.3f} to {edit['cosine']['most']:+.3f} with the direction"))
    if edit.get("z") is not None:
        found.append(("z", f"{edit['z']:+.1f} at its weakest row; of random vectors standard normal"))
    if edit.get("probe"):
        found.append(("probe", _probe(edit["probe"])))
    found += [("warning", str(warning)) for warning in edit.get("warnings", ())]
    found.append(("patch", str(edit["patch"])))
    if "reverted" not in edit:  # an edit leaves its patch beside the model
        found.append((UNDO, f"mergebench patch revert {edit['patch']} --model . --out ../DIR"))
    return [(term, fact) for term, fact in found if fact]


def _where(edit: Entry) -> str:
    layers = sum(count > 0 for count in edit.get("by_layer", {}).values())
    return f", in {layers} layer{'s' * (layers != 1)}" if layers else ""


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _probe(probe: Entry) -> str:
    about = []
    if probe.get("layer") is not None:
        about.append(f"layer {probe['layer']}")
    if probe.get("test_accuracy") is not None:
        about.append(f"test accuracy {100 * probe['test_accuracy']:.1f}%")
    about.append(f"SHA-256 {str(probe.get('sha256', ''))[:12]}…")
    return f"{probe.get('file')} ({', '.join(about)})"


def only(provenance: Mapping[str, Any]) -> str | None:
    """The name of a model that was only edited; None if models were merged."""
    recipe = provenance.get("recipe", {})
    models = recipe.get("models", [])
    if provenance.get("edits") and recipe.get("merge_method") == "passthrough" and len(models) == 1:
        return str(models[0].get("model"))
    return None


def layers_of(edit: Entry) -> Sequence[tuple[str, int]]:
    """Edited rows by layer, first to last, including layers between with none."""
    counts = {str(layer): int(count) for layer, count in edit.get("by_layer", {}).items()}
    if not all(layer.isdecimal() for layer in counts):
        return list(counts.items())
    return [(str(layer), counts.get(str(layer), 0)) for layer in range(max(map(int, counts), default=-1) + 1)]
