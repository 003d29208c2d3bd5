"""`mergebench adapters merge` and `extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.progress import count_bar, note
from mergebench.cli.retrieve import retrieve
from mergebench.errors import RecipeError

app = typer.Typer(help="Merge LoRA directories; take one out of a fine-tune.", no_args_is_help=True)
app.command("retrieve")(retrieve)


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
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge LoRA directories into one that PEFT loads: what they do is merged, not their factors."""
    from mergebench.adapters import merge_adapters
    from mergebench.adapters.files import kept_text

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
    what = "copied" if made["copied"] else f"{made['method']['name']} in delta space"
    note(f"{what}: {kept_text(made)}, {made['seconds']:.1f} s", quiet)
    typer.echo(json.dumps({"out": str(result.out), **made}) if json_ else str(result.out))


@app.command("extract")
def extract(
    base: Annotated[str, typer.Option(help="The model it was fine-tuned from.")],
    model: Annotated[str, typer.Option(help="The fine-tuned model.")],
    out: Annotated[Path, typer.Option(help="Output directory.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every module. Default: 16.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the smallest ranks that keep this share of the squared norm.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search in large matrices.")] = 0,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Take what a fine-tune adds to its base's linear layers as a LoRA directory that PEFT loads."""
    from mergebench.adapters import extract_adapter
    from mergebench.adapters.files import kept_text

    quiet = quiet or json_
    with count_bar("extracting", quiet) as progress:
        result = extract_adapter(
            base,
            model,
            out,
            rank=rank,
            energy=energy,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    made = result.provenance
    if result.already_done:
        note(f"{result.out}: already finished, nothing to resume", quiet)
    else:
        worst, entry = min(made["modules"].items(), key=lambda item: item[1]["energy_kept"])
        least = f"least {entry['energy_kept']:.2%}: {worst}"
        note(f"extracted: {kept_text(made)} ({least}), {made['seconds']:.1f} s", quiet)
        _say_left_out(made, quiet)
    typer.echo(json.dumps({"out": str(result.out), **made}) if json_ else str(result.out))


def _say_left_out(made: dict[str, Any], quiet: bool) -> None:
    """What of the fine-tune the adapter does not hold."""
    tensors = made["left_out_tensors"]
    if tensors:
        most = ", ".join(f"{name} {share:.2%}" for name, share in list(tensors.items())[:3])
        names = most + ", ..." * (len(tensors) > 3)
        count = f"{len(tensors)} tensor{'s' * (len(tensors) > 1)}"
        note(f"left out: {made['left_out']:.2%} of the change, {count} beside the linear layers ({names})", quiet)
    if made["other_tokens"]:
        names = ", ".join(made["other_tokens"])
        note(f"left out: {names}: the fine-tune has another number of tokens, which is not counted", quiet)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights: '{text}' is not a list of numbers", "one each, such as 0.5,0.5") from None
