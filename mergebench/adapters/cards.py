"""The cards of adapters: README.md of what each command makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint import card as markdown
from mergebench.checkpoint.card import code, linked, listed
from mergebench.deltas.peft.directory import CONFIG


def card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a merged adapter."""
    adapters, method = provenance["adapters"], provenance["method"]
    how = "" if method["density"] is None else f", density {method['density']:g}"
    if provenance["copied"]:
        made = "A copy of one LoRA adapter."
    else:
        count = f"{len(adapters)} LoRA adapter{'s' * (len(adapters) > 1)}"
        made = (
            f"{count} merged with `{method['name']}`{how} in delta space by mergebench {provenance['mergebench']}: "
            f"{kept_text(provenance)}."
        )
    bases = [f"base: {linked(base, out)}" for base in dict.fromkeys(entry["base_model"] for entry in adapters) if base]
    inside = [f"adapter: {linked(entry['adapter'], out)}, weight {entry['weight']:g}" for entry in adapters]
    models, inputs = ([entry[key] for entry in adapters] for key in ("base_model", "adapter"))
    return _card(out, made, [*bases, *inside], "merge", models=models, inputs=inputs)


def sequence_card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of adapters of a sequence of tasks."""
    adapters, method, kind = provenance["adapters"], provenance["method"], provenance["kind"]
    which = f"{len(adapters)} {kind} adapters"
    which = f"{which}, each" if method["all"] else f"The last of {which},"
    made = (
        f"{which} merged on the stored tensors toward the mean of those before it, by {method['alpha']:g} of the way "
        f"(MOS, arXiv:2412.09441), by mergebench {provenance['mergebench']}."
    )
    if len(adapters) == 1 or not method["alpha"]:
        made = f"A copy of {', '.join(linked(one, out) for one in provenance['copied'])}."
    peft = any(entry["file"].endswith(CONFIG) for entry in provenance["inputs"])
    bases = [f"base: {linked(base, out)}" for base in dict.fromkeys(entry["base_model"] for entry in adapters) if base]
    inside = [f"adapter: {linked(entry['adapter'], out)}" for entry in adapters]
    models, inputs = ([entry[key] for entry in adapters] for key in ("base_model", "adapter"))
    end = "Input files: `mergebench.json`."
    return _card(out, made, [*bases, *inside], "merge", end, kind.lower(), peft, models, inputs)


def extracted_card(out: Path, provenance: Mapping[str, Any], peft: bool) -> str:
    """README.md of an adapter extracted from a fine-tune; peft: whether PEFT loads it."""
    kind, file = provenance["as"], provenance["file"]
    where = "the linear layers of its base" if kind == "lora" else "its base"
    rest = "Embeddings, heads, norms and biases, left out, hold" if kind == "lora" else "The tensors left out hold"
    made = (
        f"What a fine-tune adds to {where}, extracted by mergebench {provenance['mergebench']}: "
        f"{kept_text(provenance)}. {rest} {provenance['left_out']:.2%} of all that it changed."
    )
    lines = [f"base: {linked(provenance['base'], out)}", f"fine-tune: {linked(provenance['model'], out)}"]
    lines += [] if peft else [f"{code(f'BASE+{out.name}/{file}')} is a model wherever mergebench takes one"]
    models, inputs = [provenance["base"]], [provenance["model"]]
    return _card(out, made, lines, "extract", kind=kind, peft=peft, models=models, inputs=inputs)


def converted_card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of an adapter converted from another type."""
    made = f"An adapter of another type as a LoRA, by mergebench {provenance['mergebench']}: {kept_text(provenance)}."
    lines = [f"base: {linked(provenance['base'], out)}", f"adapter: {linked(provenance['adapter'], out)}"]
    end = "The energy kept in each module: `mergebench.json`."
    models, inputs = [provenance["base"]], [provenance["adapter"]]
    return _card(out, made, lines, "convert", end, models=models, inputs=inputs)


def truncated_card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a truncated adapter."""
    made = (
        f"A LoRA cut to {provenance['budget']} of {provenance['of']} singular values by mergebench "
        f"{provenance['mergebench']}: {kept_text(provenance)}."
    )
    bases = [f"base: {linked(provenance['base'], out)}"] if provenance["base"] else []
    lines = [*bases, f"adapter: {linked(provenance['adapter'], out)}"]
    return _card(out, made, lines, "truncate", models=[provenance["base"]], inputs=[provenance["adapter"]])


def patch_card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of an adapter made from a patch."""
    made = (
        f"A patch of a model as a LoRA of rank 1, made by mergebench {provenance['mergebench']}: switched on, the base "
        "is the edited model."
    )
    lines = [f"base: {linked(provenance['base'], out)}", f"patch: {linked(provenance['patch'], out)}"]
    return _card(out, made, lines, "edit", "How the patch was made: `mergebench.json`.", models=[provenance["base"]])


def ported_card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of an adapter for another base than it was made on."""
    old, new = (linked(provenance[name], out) for name in ("old", "new"))
    made = (
        f"An adapter made on {old}, its parameters unchanged, for {new}: "
        f"ported by mergebench {provenance['mergebench']} (arXiv:2410.10870), not trained on it."
    )
    lines = [f"base: {linked(provenance['new'], out)}", f"adapter: {linked(provenance['adapter'], out)}"]
    end = "Both bases' identities: `mergebench.json`."
    models, inputs = [provenance["new"]], [provenance["adapter"]]
    return _card(out, made, lines, "port", end, "adapter", models=models, inputs=inputs)


def kept_text(provenance: Mapping[str, Any]) -> str:
    """`6 modules, rank 4, 99.81% of the energy kept`."""
    modules = provenance["modules"]
    ranks = sorted({module["rank"] for module in modules.values() if "rank" in module})
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    size = size or f"{provenance['count']:,} values"
    kept = f"{provenance['energy_kept']:.2%} of the energy kept"
    what = "module" if ranks else "tensor"
    return f"{len(modules)} {what}{'s' * (len(modules) > 1)}, {size}, {kept}"


_ENERGY = "Input files, and the energy kept in each module: `mergebench.json`."


def _card(
    out: Path,
    made: str,
    lines: Sequence[str],
    tag: str,
    end: str = _ENERGY,
    kind: str = "lora",
    peft: bool = True,
    models: Iterable[object] = (),
    inputs: Iterable[object] = (),
) -> str:
    return markdown.card(
        out.name,
        [made, listed(lines), end],
        tags=[kind, tag, "mergebench"],
        library="peft" if peft else None,
        relation="adapter",
        models=models,
        inputs=inputs,
    )
