"""`mergebench inspect` and `mergebench methods`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import adapter_tables, complete
from mergebench.cli import options as opt
from mergebench.cli.output import counted, note, print_table, say, say_json, say_prose, say_text
from mergebench.cli.patch import show
from mergebench.errors import RecipeError, did_you_mean, human

if TYPE_CHECKING:
    from mergebench.checkpoint.delta import Delta
    from mergebench.editing.edit import Edit
    from mergebench.engine.method import Method


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
        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "file": t.file.name, "bytes": t.nbytes}
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

    elements = sum(t.numel for t in found.tensors.values())
    size = sum(t.nbytes for t in found.tensors.values())
    files = counted(len({t.file for t in found.tensors.values()}), "file")
    kind = _architecture(found.config) or "no config"
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
    """Name, type and shape; of tensors that are the same in several layers one row, `layers.[0-5].weight`."""
    from mergebench.checkpoint.names import layer_of

    rows: dict[tuple[str, ...], list[int]] = {}
    for tensor in tensors:
        changes = "".join(f"  + {delta}" for delta in tensor.get("deltas", ()))
        shape = " x ".join(map(str, tensor["shape"])) + changes
        before, number, after = (None if every else layer_of(tensor["name"])) or (tensor["name"], -1, "")
        rows.setdefault((before, after, tensor["dtype"], shape), []).append(number)
    return [(_named(before, numbers, after), dtype, shape) for (before, after, dtype, shape), numbers in rows.items()]


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


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One of them, with its parameters.", autocompletion=complete.methods_and_edits
        ),
    ] = None,
    json_: opt.Json = False,
) -> None:
    """List the merge methods and edits, or show one: formula, paper, parameters, defaults.

    Example: mergebench methods ties
    """
    from mergebench import methods as registry
    from mergebench.editing import edits

    own = name is not None and name in edits.names()
    if name is not None and not own and name not in registry.names():
        close = did_you_mean(name, [*registry.names(), *edits.names()])
        hint = close if close and close.startswith("did") else "`mergebench methods` lists them"
        raise RecipeError(f"no merge method or edit is called '{name}'", hint)
    listed = [edits.get(one) for one in edits.names() if name in (None, one)]
    found = [_method(registry.get(one)) for one in ([name] if name else registry.names()) if not own]
    found += [_edit(one) for one in listed]
    for entry in found:
        entry["package"] = (edits if entry["kind"] == "edit" else registry).origin(entry["name"])
    if json_:
        say_json(found if name is None else found[0])
        return
    from rich.table import Column, Table

    if name is None:
        for kind in ("method", "edit"):
            table = Table(kind, Column("what", ratio=1), "paper", box=None, header_style="bold")
            for entry in found:
                if entry["kind"] == kind:
                    table.add_row(entry["name"], entry["summary"], entry["paper"])
            print_table(table, optional=("paper",))
        return
    import inspect as python

    (entry,) = found
    say(f"{name}  ({entry['paper']}; from {entry['package']})")
    say()
    say_prose(python.getdoc((listed[0] if own else registry.get(name)).function) or "")
    takes = f"takes {entry['takes'].replace('_', ' ')}; statistics over the {entry['scope']}\n" if not own else ""
    say_text(takes)
    table = Table("parameter", "default", "range", Column("meaning", ratio=1), box=None, header_style="bold")
    for parameter in entry["parameters"]:
        default = "required" if parameter["required"] else str(parameter["default"])
        each = " (for each model)" if parameter["per_model"] else ""
        table.add_row(parameter["name"], default, parameter["range"], parameter["help"] + each)
    print_table(table)


def _method(method: Method) -> dict[str, Any]:
    cut = "by its parameters" if callable(method.cut) else method.cut
    more = {"takes": method.takes, "scope": method.scope, "cut": cut}
    return {"kind": "method", **_about(method), **more}


def _edit(edit: Edit) -> dict[str, Any]:
    """An edit's description, with the parameters that every edit has."""
    from mergebench.editing.spec import COMMON, Wanted

    common = [
        {
            "name": key,
            "default": getattr(Wanted(edit.name, ""), key),
            "required": key == "probe",
            "range": "",
            "per_model": False,
            "help": text,
        }
        for key, text in COMMON.items()
    ]
    about = _about(edit)
    return {"kind": "edit", **about, "parameters": [*common, *about["parameters"]]}


def _about(one: Method | Edit) -> dict[str, Any]:
    parameters = [
        {
            "name": p.name,
            "default": None if p.required else p.default,
            "required": p.required,
            "range": p.range_text(),
            "per_model": p.per_model,
            "help": p.help,
        }
        for p in one.parameters.values()
    ]
    return {"name": one.name, "summary": one.summary, "paper": one.paper, "parameters": parameters}


def _architecture(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type") or ""])[0])
