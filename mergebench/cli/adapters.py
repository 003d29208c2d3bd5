"""`mergebench adapters merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.progress import note
from mergebench.errors import RecipeError

app = typer.Typer(help="Work on LoRA directories without their base.", no_args_is_help=True)


@app.command("merge")
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="LoRA directories, as PEFT saves them.")],
    out: Annotated[Path, typer.Option(help="Output directory.")],
    method: Annotated[
        str,
        typer.Option(
            help="linear, cat, svd, ties, dare_linear, dare_ties, pcb, magnitude_prune, knots, tsv_m, iso_c or iso_cts."
        ),
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One each. Default: 1/n for linear, cat and svd, else 1.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of elements kept. Default: the method's.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result. Default: the sum of the ranks; svd: the largest.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model the adapters belong to; needed where one is DoRA.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random masks.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge LoRA directories into one that PEFT loads: what they do is merged, not their factors."""
    from mergebench.adapters import merge_adapters

    quiet = quiet or json_
    result = merge_adapters(
        adapters,
        out,
        method=method,
        weights=None if weights is None else _numbers(weights),
        density=density,
        rank=rank,
        base=base,
        seed=seed,
        overwrite=overwrite,
    )
    made = result.provenance
    for line in made["notes"]:
        note(f"warning: {line}", quiet)
    ranks = sorted({module["rank"] for module in made["modules"].values()})
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    what = "copied" if made["copied"] else f"{method} in delta space"
    count = f"{len(made['modules'])} module{'s' * (len(made['modules']) > 1)}"
    note(f"{what}: {count}, {rank_text}, {made['energy_kept']:.2%} of the energy kept, {made['seconds']:.1f} s", quiet)
    typer.echo(json.dumps({"out": str(result.out), **made}) if json_ else str(result.out))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights: '{text}' is not a list of numbers", "one each, such as 0.5,0.5") from None
