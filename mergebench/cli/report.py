"""`mergebench report`: the report page of a directory, and its plots as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_json

if TYPE_CHECKING:
    from mergebench.evaluation.page.figures import Figure


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What any command of mergebench wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the page goes. Default: report.html in DIR.", dir_okay=False),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each plot into this folder too, as PDF and PNG.", file_okay=False),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write one HTML page of all that DIR holds: tables, plots, flips, statistics, provenance.

    Example: mergebench report merged/mine --open
    """
    from mergebench.evaluation import page

    written = page.write(directory, out, _plots)
    files = [] if figures is None else page.write_figures(directory, figures, _plots)
    if json_:
        say_json({"out": str(written), "figures": [str(file) for file in files]})
    else:
        for file in [written, *files]:
            say(str(file))
    if open_:
        import webbrowser

        if not webbrowser.open(written.resolve().as_uri()):
            note(f"no browser to be found here: open {written}", quiet or json_)


def _plots(provenance: Mapping[str, Any], directory: Path) -> Sequence[Figure]:
    """Of what the rooms above the page made."""
    command = provenance.get("command")
    if command == "train":
        from mergebench.training import plot

        return plot.figures(provenance["runs"])
    if command == "dimension":
        from mergebench.systems.intrinsic_dimension import plot as dimension

        return dimension.figures(provenance)
    if command == "cil run":
        from mergebench.checkpoint.documents import document
        from mergebench.systems.mos import plot as sequence

        return sequence.figures(document(directory / "results.json", hint="make it again")["records"])
    return ()
