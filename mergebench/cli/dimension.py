"""`mergebench dimension`: search the intrinsic dimension of a fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_out, was_there, work_bar


def dimension(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file with delta: {kind: subspace}.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Default: trained/ and the config's name.")
    ] = None,
    share: Annotated[float, typer.Option(metavar="SHARE", help="Share of full fine-tuning's metric to reach.")] = 0.9,
    device: opt.Device = "auto",
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Search for the smallest random subspace in which training reaches 90% of full fine-tuning's metric.

    Example: mergebench dimension config.yaml --out dimension
    """
    from mergebench.systems.intrinsic_dimension.search import search
    from mergebench.training import load_config

    quiet = quiet or json_
    loaded = load_config(config)
    place = out or Path("trained") / config.stem
    with work_bar(quiet) as progress:
        found = search(
            loaded,
            place,
            share=share,
            device=opt.check_device(device),
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if not was_there(found.already_done, place, quiet):
        note(f"wrote {place} in {found.provenance['seconds']:.0f} s", quiet)
    if json_:
        say_out(place, found.provenance, json_)
        return
    for answer in found.answers:
        say(answer.sentence())
