"""`mergebench report`: the report page of a directory or of several, its plots as files, its tables for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_json, say_text
from mergebench.errors import RecipeError

if TYPE_CHECKING:
    from mergebench.evaluation.page.figures import Figure


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="What any command of mergebench wrote; several: side by side."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the page goes. Default: report.html in DIR; of several, side-by-side.html here.",
            dir_okay=False,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each plot into this folder too, as PDF and PNG.", file_okay=False),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write one HTML page of all that DIR holds: tables, plots, flips, statistics, provenance.

    Example: mergebench report merged/mine --open

    Several that were evaluated stand side by side on one page: recipes, scores, and differences from the first.
    --format prints the tables instead.
    """
    from mergebench.evaluation import page

    form = opt.check_format(format_, json_)
    if form is not None:
        if out is not None or open_ or figures is not None:
            raise RecipeError("--format prints tables and writes no page", "leave out --out, --figures and --open")
        say_text(page.written(directories, form, _plots))
        return
    written = page.write(directories, out, _plots)
    files = [] if figures is None else page.write_figures(directories, figures, _plots)
    if json_:
        more = page.document(directories) if len(directories) > 1 else {}
        say_json({"out": str(written), "figures": [str(file) for file in files], **more})
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
