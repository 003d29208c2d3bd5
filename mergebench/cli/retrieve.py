"""`mergebench adapters retrieve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import count_bar, note, say_json, say_text
from mergebench.errors import counted, escaped


def retrieve(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="A directory that cil run wrote.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSON lines: an id, a text or image, perhaps a label.")],
    trace: Annotated[bool, typer.Option("--trace", help="Show the path of each item.")] = False,
    stage: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Answer as after task N. Default: the last.")
    ] = None,
    backbone: opt.Backbone = None,
    device: opt.Device = "auto",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Answer items with a bank, finding the adapter for each (MOS): id, label and adapter per line.

    Example: mergebench adapters retrieve banks/mine/seed-0/merged items.jsonl

    With --trace also the path (02>04>04: under adapter 02 the head named task 04, under 04 again), how many adapters
    were evaluated, and how it ended: settled, cycle (it would repeat forever) or stopped (after four).
    """
    from mergebench.systems.mos.inference import infer

    quiet = quiet or json_
    with count_bar("encoding", quiet) as progress:
        found = infer(bank, data, stage=stage, backbone=backbone, device=opt.check_device(device), progress=progress)
    if found.bank.about.semantics == "reference":
        note("the bank was learnt as the published code does it; its adapters are used as stored, and stay so", quiet)
    for line in found.notes:
        note(f"note: {line}", quiet)
    items, about = found.items(), found.summary()
    if json_:
        say_json({"bank": str(bank), **about, "items": items})
        return
    for item in items:
        columns = [item["id"], item["label"], item["adapter"]]
        if trace:
            columns += [">".join(item["path"]), str(item["evaluations"]), _end(item)]
        say_text("\t".join(map(escaped, columns)))
    _say(about, quiet)


def _end(item: dict[str, Any]) -> str:
    return "settled" if item["agreement"] else "cycle" if item["cycle"] else "stopped"


def _say(about: dict[str, Any], quiet: bool) -> None:
    """Print the summary."""
    from mergebench.evaluation.tables.results import share_of

    count = about["n"]
    each = f"{about['evaluations']:.2f} evaluations and {about['encodings'] / count:.2f} runs of the encoder per item"
    ends = f"{_percent(about['agreement'])}% settled, {_percent(about['cycles'])}% in cycles"
    note(f"{counted(count, 'item')} at stage {about['stage']}: {each}; {ends}", quiet)
    labelled = about.get("labelled")
    if labelled is None:
        return
    if labelled < count:
        note(f"{count - labelled} of later tasks are not counted", quiet)
    if labelled:
        right = f"accuracy {share_of(about['accuracy'], labelled)}%"
        steps = ", ".join(map(_percent, about["steps"]))
        note(f"{right}; their own task's adapter at step 0 to {len(about['steps']) - 1}: {steps}%", quiet)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
