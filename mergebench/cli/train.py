"""`mergebench train`: train what is put on a base, and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import note, print_table, say, say_out, was_there, work_bar


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file: docs/training.md.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Default: trained/ and the config's name.")
    ] = None,
    device: opt.Device = "auto",
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a delta, an adapter or all weights on a base, with every seed, and measure the result.

    Example: mergebench train config.yaml --out trained/mine
    """
    from rich.table import Column, Table

    from mergebench.training import load_config, report
    from mergebench.training import train as run

    quiet = quiet or json_
    loaded = load_config(config)
    place = out or Path("trained") / config.stem
    with work_bar(quiet) as progress:
        made = run(
            loaded,
            place,
            device=opt.check_device(device),
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if not was_there(made.already_done, place, quiet):
        note(f"wrote {place} in {made.provenance['seconds']:.0f} s", quiet)
    if json_:
        say_out(place, made.provenance, json_)
        return
    first, *others = report.HEADER
    table = Table(first, *[Column(title, justify="right") for title in others], box=None, header_style="bold")
    for cells in report.lines(made.runs):
        table.add_row(*cells)
    print_table(table)
    note(report.legend(made.runs), quiet)
    for run_ in made.runs:
        say(run_["reference"].replace("OUT", str(place)))
