"""The files of a merged adapter beside its factors: PEFT's config, the card, hashes of what went in."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint.adapter import CONFIG, WEIGHTS, Adapter
from mergebench.checkpoint.write import write_error

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SHARED = ("task_type", "auto_mapping", "revision")


def config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json of factors with these ranks, whose product is the difference itself (alpha = r)."""
    first = adapters[0].config
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = _pattern(ranks, rank)
    shared = {
        key: first.get(key) for key in _SHARED if all(adapter.config.get(key) == first.get(key) for adapter in adapters)
    }
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        **shared,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        **_selection(adapters, ranks),
        "fan_in_fan_out": adapters[0].transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """rank_pattern: PEFT takes the first key that a module's name is or, after a dot, ends with."""
    names = {module for module, rank in ranks.items() if rank != usual}
    names |= {module for module in ranks if any(module.endswith(f".{name}") for name in names)}
    # keys are regular expressions; a dot is left as it is, as everybody writes it
    return {
        re.escape(name).replace(r"\.", "."): ranks[name] for name in sorted(names, key=lambda name: (-len(name), name))
    }


def _selection(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """What the inputs target where they all say the same; else every module by its full name."""

    def said(adapter: Adapter) -> list[Any]:
        values = [adapter.config.get(key) for key in _SELECTION]
        return [sorted(map(str, value)) if isinstance(value, list) else value for value in values]

    first = adapters[0]
    alike = all(said(a) == said(first) and a.modules.keys() == first.modules.keys() for a in adapters)
    if alike and first.config.get("target_modules"):
        return {key: first.config[key] for key in _SELECTION if first.config.get(key) is not None}
    return {"target_modules": sorted(ranks)}


def copy(adapter: Adapter, directory: Path) -> None:
    """The adapter's own two files, byte for byte."""
    try:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter.directory / name, directory / name)
    except OSError as error:
        raise write_error(directory, error) from None


def inputs(adapter: Adapter) -> list[dict[str, Any]]:
    found = []
    for name in (CONFIG, WEIGHTS):
        path = adapter.directory / name
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found.append({"file": str(path), "size": path.stat().st_size, "sha256": digest})
    return found


def card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a merged adapter."""
    adapters, method = provenance["adapters"], provenance["method"]
    ranks = sorted({module["rank"] for module in provenance["modules"].values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    how = "".join(f", {key} {method[key]:g}" for key in ("density",) if method[key] is not None)
    if provenance["copied"]:
        made = "A copy of one LoRA adapter."
    else:
        count = f"{len(adapters)} LoRA adapter{'s' * (len(adapters) > 1)}"
        made = (
            f"{count} merged with `{method['name']}`{how} in delta space by mergebench {provenance['mergebench']}: "
            f"{len(provenance['modules'])} modules, {rank}, {provenance['energy_kept']:.2%} of the energy kept."
        )
    lines = [
        "---",
        "library_name: peft",
        "tags:",
        "- lora",
        "- merge",
        "- mergebench",
        "---",
        f"# {out.name}",
        "",
        made,
    ]
    lines += ["", *(f"- base: `{base}`" for base in dict.fromkeys(entry["base_model"] for entry in adapters) if base)]
    lines += [f"- adapter: `{entry['adapter']}`, weight {entry['weight']:g}" for entry in adapters]
    return "\n".join([*lines, "", "Input files, and the energy kept in each module: `mergebench.json`.", ""])
