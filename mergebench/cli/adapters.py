"""`mergebench adapters merge`, `fold`, `convert` and `truncate`; the others have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import adapter_tables, complete
from mergebench.cli import options as opt
from mergebench.cli.extract import extract
from mergebench.cli.help import App
from mergebench.cli.merge import say_changes, say_notes
from mergebench.cli.output import byte_bar, count_bar, note, say_left, say_out, was_there
from mergebench.cli.retrieve import retrieve
from mergebench.errors import RecipeError, counted, human

Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A PEFT directory of any type, org/name, or a delta file.")
]
Seed = Annotated[int, typer.Option(help="Seed of the search in large matrices.")]

app = App(help="Merge adapters, compare them, take one out of a fine-tune, fold one in.", no_args_is_help=True)


@app.command("merge")
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="LoRA directories or org/name; for ema of any type, in order."),
    ],
    out: opt.Out,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            autocompletion=complete.adapter_methods,
            help="linear, cat, svd, magnitude_prune, or any merge method on task vectors, such as ties, pcb or knots: "
            "on the differences that the adapters make. ema: the stored tensors of the last, moved toward the mean of "
            "those before it.",
        ),
    ] = "linear",
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="One per adapter. Default: 1/n for linear, cat and svd, else 1."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of elements kept. Default: the method's.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result. Default: the sum of the ranks; svd: the largest.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model they were trained on; needed if one is DoRA.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random masks. Default: 0.")] = None,
    alpha: Annotated[float | None, typer.Option(metavar="SHARE", help="ema: share of the mean. Default: 0.1.")] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="ema: write every adapter, merged toward those before it as they are given.")
    ] = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge adapters into one that PEFT loads: what LoRAs add to weights, or with ema the stored tensors of any type.

    Example: mergebench adapters merge LORA1 LORA2 --method ties --rank 16 --out merged/both
    """
    given = {"--weights": weights, "--density": density, "--rank": rank, "--base": base, "--seed": seed}
    given = given if method == "ema" else {"--alpha": alpha, "--all": all_ or None}
    for option, value in given.items():
        if value is not None:
            takes = "it takes --alpha and --all" if method == "ema" else f"{option} belongs to --method ema"
            raise RecipeError(f"{option}: '{method}' takes none", takes)
    from mergebench import methods

    quiet = quiet or json_
    method = methods.read(method)
    if method == "ema":
        from mergebench.adapters.sequence import ALPHA, merge_sequence

        share = ALPHA if alpha is None else alpha
        with count_bar("merging", quiet) as progress:
            result = merge_sequence(adapters, out, alpha=share, every=all_, overwrite=overwrite, progress=progress)
        said = adapter_tables.sequence_text(result.provenance)
    else:
        from mergebench.adapters import merge_adapters
        from mergebench.adapters.cards import kept_text

        numbers = None if weights is None else _numbers(weights)
        how: dict[str, Any] = {"method": method, "weights": numbers, "density": density, "rank": rank, "base": base}
        with count_bar("merging", quiet) as progress:
            result = merge_adapters(adapters, out, **how, seed=seed or 0, overwrite=overwrite, progress=progress)
        name = result.provenance["method"]["name"]
        said = (
            f"{'copied' if result.provenance['copied'] else f'{name} in delta space'}: {kept_text(result.provenance)}"
        )
    for line in result.provenance["notes"]:
        note(f"warning: {line}", quiet)
    note(f"{said}, {result.provenance['seconds']:.1f} s", quiet)
    say_out(result.out, result.provenance, json_)


app.command("extract", was="--model")(extract)


@app.command("fold")
def fold(
    adapter: Adapter,
    base: opt.Adapted,
    out: opt.Out,
    as_trained: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="nf4: round the base first, as QLoRA's training did. Default: no rounding.",
            autocompletion=complete.words("nf4"),
        ),
    ] = None,
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fold an adapter into its base: a checkpoint that needs no adapter.

    Example: mergebench adapters fold LORA --base BASE --out folded
    """
    from mergebench import api

    quiet = quiet or json_
    if as_trained not in (None, "nf4"):
        raise RecipeError(f"--as-trained: must be nf4, got '{as_trained}'")
    sizes = {"memory": opt.parse_size(memory, "--memory"), "shard_size": opt.parse_size(shard_size, "--shard-size")}
    plan = api.plan_fold(base, adapter, as_trained=as_trained, workers=workers, **sizes)
    say_notes(plan, quiet)
    say_changes(plan, quiet)
    with byte_bar("folding", plan.bytes_read, quiet) as progress:
        result = api.run(plan, out, resume=resume, overwrite=overwrite, progress=progress)
    if not was_there(result.already_done, out, quiet):
        changes = plan.merge.reference.deltas.values()
        adapted = sum(any(delta.kind != "nf4" for delta in deltas) for deltas in changes)
        state = "as it is" if as_trained is None else "rounded to NF4"
        seconds = result.provenance["seconds"]
        say_left(result.provenance, quiet)
        note(
            f"{adapter} folded into {counted(adapted, 'tensor')} of {base}, {state}: wrote {out} in {seconds:.1f} s",
            quiet,
        )
    say_out(result.out, result.provenance, json_)


@app.command("convert")
def convert(
    adapter: Adapter,
    base: opt.Adapted,
    out: Annotated[Path, typer.Option(metavar="PATH", help="Output directory; of delta and dense a file.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            autocompletion=complete.words("lora", "delta", "dense"),
            help="lora, a PEFT directory; delta, a file of the parts that the adapter has; "
            "dense, a file of all that it changes, W' - W.",
        ),
    ] = "lora",
    rank: Annotated[int | None, typer.Option(help="Rank of every module, at most. Default: the exact rank.")] = None,
    energy: opt.Energy = None,
    seed: Seed = 0,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write an adapter of any type as a LoRA that PEFT loads, exactly or truncated; or as a file of deltas.

    Example: mergebench adapters convert OFT --base BASE --rank 32 --out lora
    """
    from mergebench.adapters import convert_adapter, convert_to_file
    from mergebench.adapters.cards import kept_text

    quiet = quiet or json_
    if to not in ("lora", "delta", "dense"):
        raise RecipeError(f"--to: '{to}' is no type to convert to", "lora, delta or dense")
    if to != "lora":
        if rank is not None or energy is not None:
            raise RecipeError("--rank, --energy: they truncate to a LoRA", f"leave them out: {to} loses nothing")
        with count_bar("converting", quiet) as progress:
            result = convert_to_file(base, adapter, out, dense=to == "dense", overwrite=overwrite, progress=progress)
        made = result.provenance
        kinds = ", ".join(made["kinds"])
        note(f"{counted(made['tensors'], 'tensor')} as {kinds}: {human(made['bytes'])}, {made['seconds']:.1f} s", quiet)
        say_out(result.out, made, json_)
        return
    with count_bar("converting", quiet) as progress:
        result = convert_adapter(
            base, adapter, out, rank=rank, energy=energy, seed=seed, overwrite=overwrite, progress=progress
        )
    made = result.provenance
    note(f"converted: {kept_text(made)}, {made['seconds']:.1f} s", quiet)
    say_out(result.out, made, json_)


@app.command("truncate")
def truncate(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A LoRA directory, as PEFT saves it, or org/name.")],
    budget: Annotated[
        str, typer.Option(help="Singular values to keep in all modules: a number, or a share such as 50%.")
    ],
    out: opt.Out,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Cut a LoRA to its largest singular values over all modules, so that each gets the rank that it is worth.

    Example: mergebench adapters truncate LORA --budget 50% --out smaller
    """
    from mergebench.adapters import truncate_adapter
    from mergebench.adapters.cards import kept_text

    quiet = quiet or json_
    share = _budget(budget)
    with count_bar("decomposing", quiet) as progress:
        result = truncate_adapter(adapter, out, budget=share, overwrite=overwrite, progress=progress)
    made = result.provenance
    note(f"truncated to {made['budget']} of {made['of']}: {kept_text(made)}, {made['seconds']:.1f} s", quiet)
    say_out(result.out, made, json_)


app.command("inspect")(adapter_tables.inspect)
app.command("drift")(adapter_tables.drift)
app.command("retrieve")(retrieve)


def _budget(text: str) -> int | float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise RecipeError(f"--budget: '{text}' is neither a number nor a share", "such as 64, or 50%") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights: '{text}' is not a list of numbers", "one each, such as 0.5,0.5") from None
