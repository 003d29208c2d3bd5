"""`mergebench compress` and `compress expand`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.help import App, Command
from mergebench.cli.output import count_bar, note, print_table, say_json, say_left, say_out, was_there
from mergebench.errors import counted, human


def expand(
    compressed: Annotated[Path, typer.Argument(metavar="DIR", help="What `mergebench compress` wrote.")],
    out: opt.Out,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Multiply the factors back: a dense checkpoint with the names of the model that was compressed.

    Example: mergebench compress expand smaller --out dense
    """
    from mergebench.systems import pela

    quiet = quiet or json_
    with count_bar("expanding", quiet) as progress:
        result = pela.expand(compressed, out, resume=resume, overwrite=overwrite, progress=progress)
    made = result.provenance
    if not was_there(result.already_done, out, quiet):
        what = f"{counted(made['multiplied'], 'layer')} multiplied back, {counted(made['copied'], 'tensor')} copied"
        say_left(made, quiet)
        note(f"{what}: wrote {out} in {made['seconds']:.1f} s", quiet)
    say_out(result.out, made, json_)


_alone = App(add_completion=False)
_alone.command("expand")(expand)


class Compress(Command):
    """A command that takes a model, with a command below it: a group cannot have an argument of its own."""

    @property
    def commands(self) -> dict[str, Any]:
        return {"expand": typer.main.get_command(_alone)}

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        below = self.commands.get(args[0]) if args else None
        if below is None:
            return super().make_context(info_name, args, parent, **extra)
        return below.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model, or task vector: a directory, BASE+DELTA or org/name.")
    ],
    out: opt.Out,
    ratio: Annotated[
        float | None,
        typer.Option(metavar="TIMES", help="How many times fewer parameters a linear layer has: 2 for half."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Instead: the smallest ranks that keep this share of the squared norm, where that saves.",
        ),
    ] = None,
    omit: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Weights that stay dense, by name. Repeatable.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Stored type: float32, float16 or bfloat16. Default: the model's.",
            autocompletion=complete.words("float32", "float16", "bfloat16"),
        ),
    ] = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write MODEL's linear layers as products of two (PELA); `mergebench compress expand DIR` makes it dense again.

    Example: mergebench compress MODEL --ratio 2 --out smaller
    """
    from mergebench.systems import pela

    quiet = quiet or json_
    with count_bar("compressing", quiet) as progress:
        result = pela.compress(
            model,
            out,
            ratio=ratio,
            energy=energy,
            omit=omit or (),
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    made = result.provenance
    if not was_there(result.already_done, out, quiet):
        say_left(made, quiet)
        note(f"wrote {out} in {made['seconds']:.1f} s; each tensor's errors: {out / 'compress.json'}", quiet)
    if json_:
        say_json({"out": str(result.out), **made})
        return
    _print(made["kinds"])
    say_out(result.out, {}, json_)


def _print(kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each kind of module, the whole model last."""
    from rich.table import Column, Table

    titles = ("tensors", "factored", "ranks", "energy kept", "relative error", "before", "after")
    table = Table("", *[Column(title, justify="right") for title in titles], box=None, header_style="bold")
    for kind in [*[kind for kind in kinds if kind != "all"], "all"]:
        one = kinds[kind]
        ranks = " to ".join(map(str, dict.fromkeys(one["ranks"])))
        errors = [f"{one['energy_kept']:.2%}", f"{one['relative_error']:.4f}"] if one["factored"] else ["", ""]
        sizes = [human(size) for size in one["bytes"]]
        table.add_row(kind, str(one["tensors"]), str(one["factored"] or ""), ranks, *errors, *sizes)
    print_table(table)
