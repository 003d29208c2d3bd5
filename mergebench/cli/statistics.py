"""`mergebench statistics`: what a model does on texts, for data-driven merge methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.declared import OF, DeclaredCommand, option_of
from mergebench.cli.output import count_bar, note, say_out
from mergebench.errors import counted, human

if TYPE_CHECKING:
    from mergebench.cli.declared import Declared


class StatisticsCommand(DeclaredCommand):
    """The options that the settings declare."""

    def declared(self, args: list[str]) -> Declared:
        from mergebench.parameters import parameters_of
        from mergebench.systems.on_data.settings import Settings

        return {f"{OF}the texts": {option_of(name): p for name, p in parameters_of(Settings).items()}}


def statistics(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, BASE+ADAPTER or org/name.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Texts: JSON lines, a JSON list or CSV.")],
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="gram, for regmean; fisher, for fisher.",
            autocompletion=complete.words("gram", "fisher"),
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write statistics.safetensors into.")],
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run MODEL once over texts, and write what a data-driven merge method reads of it.

    Example: mergebench statistics MODEL --data texts.jsonl --kind gram --out stats/a
    """
    from mergebench.systems.on_data import make_statistics

    device = opt.check_device(device)
    with count_bar("running", quiet or json_) as progress:
        made = make_statistics(
            model, data, out, kind=kind, device=device, overwrite=overwrite, progress=progress, **ctx.obj
        )
    about, size = made.about, human(made.file.stat().st_size)
    done = f"{about['items']} texts, {about['tokens']:,} tokens"
    note(f"{kind} of {counted(len(made.tensors), 'tensor')}: {done}, {size}", quiet or json_)
    doubt = made.doubt()
    if doubt is not None:
        note(f"warning: {doubt}", quiet or json_)
    told = {key: value for key, value in about.items() if key != "texts"}
    say_out(out, {"out": str(out), **told, "warnings": [] if doubt is None else [doubt]}, json_)
