"""`mergebench probe fit`: fit a linear probe of a behaviour on labelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.declared import OF, DeclaredCommand, option_of
from mergebench.cli.help import App
from mergebench.cli.output import note, say, say_json, work_bar

if TYPE_CHECKING:
    from mergebench.cli.declared import Declared
    from mergebench.editing.probes.probe import Probe

app = App(help="Fit a linear probe of a behaviour, for an edit to use.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


class FitCommand(DeclaredCommand):
    """The options that a probe's settings declare."""

    def declared(self, args: list[str]) -> Declared:
        from mergebench.editing.probes.settings import Settings
        from mergebench.parameters import parameters_of

        return {f"{OF}the fit": {option_of(name): p for name, p in parameters_of(Settings).items()}}


@app.command("fit", cls=FitCommand, was="--model")
def fit(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, BASE+ADAPTER or org/name.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: a text and a label each.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The probe: NAME.safetensors.")],
    device: opt.Device = "auto",
    results: opt.Results = Path("results"),
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fit a probe on MODEL's features of labelled texts, and report how well it separates them.

    Example: mergebench probe fit MODEL --data texts.jsonl --layer all --out probe.safetensors
    """
    from mergebench.editing.probes.fit import fit_probe, plot_of

    quiet = quiet or json_
    device = opt.check_device(device)
    with work_bar(quiet) as progress:
        probe = fit_probe(
            model, data, out, device=device, results=results, overwrite=overwrite, progress=progress, **ctx.obj
        )
    plot = plot_of(out) if "layers" in probe.about else None
    for line in probe.about["notes"]:
        note(f"note: {line}", quiet)
    doubt = probe.doubt()
    if doubt is not None:
        note(f"warning: {doubt}", quiet)
    note(f"wrote {out}" + (f" and {plot}" if plot else ""), quiet)
    if json_:
        more = {"plot": None if plot is None else str(plot), "warnings": [] if doubt is None else [doubt]}
        say_json({"out": str(out), "sha256": probe.sha256, **probe.about, **more})
    else:
        for line in _said(probe):
            say(line)


def _said(probe: Probe) -> list[str]:
    """The table of layers, if all were tried, then the probe's scores."""
    from mergebench.evaluation.tables.results import share_of

    about = probe.about
    lines = []
    if "layers" in about:
        lines.append(" layer      accuracy    AUC")
        for one in about["layers"]:
            mark = "  <" if one["layer"] == about["layer"] else ""
            accuracy = f"{share_of(one['cv_accuracy'], about['n_train'])}%"
            lines.append(f" {one['layer']:5}  {accuracy:>12}  {one['auc']:.3f}{mark}")
        lines += ["", f" Cross-validated on {about['n_train']} texts, {_share(about['cv_majority'])} of one class.", ""]
    desired, undesired = about["classes"]
    lines += [
        f"'{undesired}' (undesired) against '{desired}', layer {about['layer']} of {about['depth']}",
        f"  train            {_share(about['train_accuracy'])} of {about['n_train']} texts right",
        f"  cross-validated  {share_of(about['cv_accuracy'], about['n_train'])}%, C = {about['C']:g}",
        f"  test             {_share(about['test_accuracy'])} of {about['n_test']} texts, AUC {about['auc']:.3f}",
        f"  larger class     {_share(about['majority'])} of the test texts",
    ]
    return lines


def _share(value: Any) -> str:
    return f"{100 * value:.1f}%"
