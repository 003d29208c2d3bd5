"""compress.json: what became of every matrix; the summary by kind of module, and the card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint import card as markdown
from mergebench.checkpoint.card import code, linked, listed
from mergebench.checkpoint.names import module_kind
from mergebench.checkpoint.shards import Shard
from mergebench.deltas.formats.compressed import RECORD
from mergebench.errors import human
from mergebench.systems.pela.layers import written_as

Entries = Mapping[str, Mapping[str, Any]]  # by tensor: rank and errors, or under `left` why it is dense


def summary(tensors: Mapping[str, int], entries: Entries, shards: Iterable[Shard]) -> dict[str, dict[str, Any]]:
    """By kind of module, and of `all`: tensors, layers factored and their ranks, energy kept, relative error, and bytes
    before and after. tensors: the bytes of every tensor before, by name."""
    after = {tensor.name: tensor.nbytes for shard in shards for tensor in shard.tensors}
    factored = {name: entry for name, entry in entries.items() if "rank" in entry}
    groups: dict[str, list[str]] = {"all": list(tensors)}
    for name in tensors:
        groups.setdefault(module_kind(name), []).append(name)
    found = {}
    for kind, members in groups.items():
        written = sum(after[part] for name in members for part in written_as(name, factored))
        errors = _errors([factored[name] for name in members if name in factored])
        found[kind] = {"tensors": len(members), **errors, "bytes": [sum(tensors[name] for name in members), written]}
    return found


def _errors(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total = sum(entry["squared_norm"] for entry in entries)
    kept = sum(entry["energy_kept"] * entry["squared_norm"] for entry in entries)
    lost = sum(entry["relative_error"] ** 2 * entry["squared_norm"] for entry in entries)
    ranks = [entry["rank"] for entry in entries]
    return {
        "factored": len(entries),
        "ranks": [min(ranks), max(ranks)] if ranks else [],
        "energy_kept": kept / total if total else 1.0,
        "relative_error": math.sqrt(lost / total) if total else 0.0,
    }


def card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a compressed model."""
    every = provenance["kinds"]["all"]
    how = f"ratio {provenance['ratio']:g}" if provenance["ratio"] else f"energy {provenance['energy']:g}"
    what = "task vector" if provenance["task_vector"] else "model"
    ranks = " to ".join(map(str, dict.fromkeys(every["ranks"])))
    made = (
        f"The linear layers of a {what} as products of two (PELA's start, arXiv:2310.10700, {how}), by mergebench "
        f"{provenance['mergebench']}: {every['factored']} layers, ranks {ranks}, {every['energy_kept']:.2%} of the "
        f"energy kept, {human(every['bytes'][0])} before, {human(every['bytes'][1])} after. `NAME.0.weight` [r, in] "
        "and `NAME.1.weight` [out, r] stand for `NAME.weight`. Nothing was trained."
    )
    back = f"Dense again: {code(f'mergebench compress expand {out.name} --out DIR')}. Every tensor's error: `{RECORD}`."
    return _card(out, made, f"{what}: {linked(provenance['model'], out)}", back, [provenance["model"]])


def expanded_card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a compressed model made dense."""
    made = (
        f"{provenance['multiplied']} linear layers of a compressed checkpoint multiplied back by mergebench "
        f"{provenance['mergebench']}."
    )
    return _card(out, made, f"compressed: {linked(provenance['compressed'], out)}", "Input files: `mergebench.json`.")


def _card(out: Path, made: str, source: str, end: str, models: Iterable[str] = ()) -> str:
    return markdown.card(
        out.name,
        [made, listed([source]), end],
        tags=["compression", "low-rank", "mergebench"],
        relation="finetune",
        models=models,
    )
