"""`mergebench inspect`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import adapter_tables
from mergebench.cli import options as opt
from mergebench.cli.output import counted, note, print_table, say, say_json
from mergebench.cli.patch import show
from mergebench.errors import human

if TYPE_CHECKING:
    from mergebench.checkpoint.delta import Delta


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A directory, a .safetensors file, org/name, any +ADAPTER, a patch."),
    ],
    tensors_: Annotated[
        bool, typer.Option("--tensors", help="A row for every tensor, not one for all layers.")
    ] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show what a model is, from its headers: architecture, sizes, types, tensors; and how much adapters change.

    Example: mergebench inspect BASE+LORA
    """
    from mergebench.checkpoint.fp4 import kind_of
    from mergebench.checkpoint.model import module_at
    from mergebench.checkpoint.reference import locate
    from mergebench.deltas.formats.native import is_delta_file
    from mergebench.deltas.open import open_model
    from mergebench.deltas.peft.directory import holds_no_model, is_adapter
    from mergebench.editing.patches import is_patch

    place, *on_top = locate(model).parts
    if not on_top:
        deltas = is_delta_file(place)
        if deltas and is_patch(place):
            show(place, json_)
            return
        if deltas or module_at(place) is not None or (is_adapter(place) and holds_no_model(place)):
            adapter_tables.inspect([model], json_=json_)
            return
    found = open_model(model)
    tensors: list[dict[str, Any]] = [
        {"name": t.name, "dtype": kind_of(t), "shape": list(t.shape), "file": t.file.name, "bytes": t.nbytes}
        | _changed(found.deltas.get(t.name, ()))
        for t in found.tensors.values()
    ]
    for remark in found.remarks:
        note(remark, quiet or json_)
    shares = {}
    if found.deltas:
        from mergebench.adapters import share

        shares = share.changed_share(found)
    if json_:
        about = {
            "model": model,
            "architecture": _architecture(found.config),
            **_sizes(found.config),
            "tensors": tensors,
        }
        changed = {"changed": {group: one._asdict() for group, one in shares.items()}} if shares else {}
        say_json(about | changed)
        return
    from rich.table import Table

    from mergebench.checkpoint.distributed import SHARD

    elements = sum(t.numel for t in found.tensors.values())
    size = sum(t.nbytes for t in found.tensors.values())
    shards = {header.file for header in found.headers if header.file.suffix == SHARD}
    files = counted(len({t.file for t in found.tensors.values()} | shards), "file")
    parts = ", ".join(found.naming.folders)
    kind = f"pipeline of {parts}" if found.naming.pipeline else _architecture(found.config) or "no config"
    places = ", ".join(map(str, found.adapters))
    adapted = f", {len(found.deltas)} changed by {places}" if found.deltas else ""
    say(
        f"{kind}: {counted(len(tensors), 'tensor')}, {elements / 1e6:.2f} M elements, {human(size)} in {files}{adapted}"
    )
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in _sizes(found.config).items())
    if sizes:
        say(sizes)
    say()
    table = Table("tensor", "dtype", "shape", box=None, header_style="bold")
    for name, dtype, shape in _rows(tensors, every=tensors_):
        table.add_row(name, dtype, shape)
    print_table(table)
    if shares:
        say(share.say(shares))
        doubt = share.warning(shares)
        note(f"warning: {model} {doubt}", quiet or doubt is None)


SIZES = {  # by what people call them, the config's names for them
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "key_value_heads": ("num_key_value_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "vocabulary": ("vocab_size",),
}


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    """The sizes that a config gives, of its language model where it has several parts."""
    from mergebench.recipe.layers import COUNTS

    inner = config | (config.get("text_config") or {})
    found = {
        what: next((inner[key] for key in keys if isinstance(inner.get(key), int)), None)
        for what, keys in {"layers": COUNTS, **SIZES}.items()
    }
    return {what: value for what, value in found.items() if value is not None}


def _rows(tensors: list[dict[str, Any]], every: bool) -> list[tuple[str, str, str]]:
    """Name, type and shape; of tensors that are alike in several experts or layers one row, `layers.[0-5].weight`."""
    from mergebench.checkpoint.names import layer_of

    rows = []
    for tensor in tensors:
        changes = "".join(f"  + {delta}" for delta in tensor.get("deltas", ()))
        rows.append((tensor["name"], tensor["dtype"], " x ".join(map(str, tensor["shape"])) + changes))
    return rows if every else _alike(_alike(rows, _expert_of), layer_of)


def _expert_of(name: str) -> tuple[str, int, str] | None:
    found = re.fullmatch(r"(.*\bexperts)\.(\d+)\.(.*)", name)
    return found and (found[1], int(found[2]), found[3])


def _alike(
    rows: list[tuple[str, str, str]], split: Callable[[str], tuple[str, int, str] | None]
) -> list[tuple[str, str, str]]:
    """The rows with those as one that differ in a number of their names alone."""
    found: dict[tuple[str, ...], list[int]] = {}
    for name, *rest in rows:
        before, number, after = split(name) or (name, -1, "")
        found.setdefault((before, after, *rest), []).append(number)
    return [(_named(before, numbers, after), dtype, shape) for (before, after, dtype, shape), numbers in found.items()]


def _named(before: str, numbers: list[int], after: str) -> str:
    if numbers == [-1]:
        return before
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return ".".join(filter(None, [before, text if len(numbers) == 1 else f"[{text}]", after]))


def _changed(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The deltas on a tensor, in words."""
    return {"deltas": [delta.describe() for delta in deltas]} if deltas else {}


def _architecture(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type") or ""])[0])
