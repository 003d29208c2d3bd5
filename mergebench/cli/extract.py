"""`mergebench adapters extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.output import count_bar, note, say_json, say_out, was_there
from mergebench.errors import RecipeError, counted, human

if TYPE_CHECKING:
    from mergebench.adapters.kinds import Kept, Kinds

ALL, SUBSPACE = "all", "subspace"
DIMENSION = 10_000


def extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned model.")],
    base: opt.Base,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Output directory; of a subspace a .safetensors file. Required without --dry-run."
        ),
    ] = None,
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="KIND",
            help="lora, hira, sparse, bias or subspace; all, with --dry-run.",
            autocompletion=complete.words("lora", "hira", "sparse", "bias", "subspace", "all"),
        ),
    ] = "lora",
    rank: Annotated[int | None, typer.Option(help="lora, hira: rank of every module. Default: 16.")] = None,
    energy: opt.Energy = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="MASK",
            autocompletion=complete.words("smallest", "largest", "topdelta", "random"),
            help="sparse: smallest or largest weights of the base, topdelta (the largest changes), random, or a mask "
            "file of `mergebench mask`. Default: topdelta.",
        ),
    ] = None,
    share: Annotated[
        str | None, typer.Option(metavar="SHARE", help="sparse: share of elements stored. Default: 0.5%.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="sparse: tensor (a PEFT directory) or model (one ranking, a delta file). Default: tensor.",
            autocompletion=complete.words("tensor", "model"),
        ),
    ] = None,
    dimension: Annotated[int | None, typer.Option(help="subspace: how many numbers. Default: 10000.")] = None,
    said: Annotated[bool, typer.Option("--said", help="subspace: a factor for each tensor, among them.")] = False,
    gradient: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="subspace: recorded for further training: exact or fairseq. Default: exact.",
            autocompletion=complete.words("exact", "fairseq"),
        ),
    ] = None,
    include: opt.Include = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the search in large matrices, of the mask, or of the subspace.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="all: size of each adapter, such as 1MB. Default: those of a LoRA of rank 16."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be kept, write nothing.")] = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Take what a fine-tune adds to its base as a LoRA that PEFT loads, or as another kind of adapter.

    Example: mergebench adapters extract TUNED --base BASE --rank 16 --out lora
    """
    from mergebench.adapters import extract_adapter

    quiet = quiet or json_
    given: dict[str, Any] = {"rank": rank, "energy": energy, "mask": mask, "scope": scope, "seed": seed}
    given["share"] = None if share is None else opt.parse_share(share, "--share")
    given |= {"dimension": dimension, "said": said or None, "gradient": gradient}
    given = {key: value for key, value in given.items() if value is not None}
    if as_ == SUBSPACE:
        given = {"dimension": DIMENSION, **given}
        strange = next((key for key in given if key not in ("dimension", "said", "gradient", "seed")), None)
        if strange is not None:
            raise RecipeError(f"--{strange}: '{SUBSPACE}' takes none", "it takes --dimension, --said and --seed")
    if dry_run:
        kinds = _measure(base, model, as_, budget, include or (), given, quiet)
        say_json(_document(kinds)) if json_ else _print(kinds, quiet)
        return
    if as_ == ALL or budget is not None:
        raise RecipeError(f"{'--as all' if as_ == ALL else '--budget'}: it belongs to --dry-run, which writes nothing")
    if out is None:
        raise RecipeError("--out is missing", "a directory to write, or --dry-run to write nothing")
    if as_ == SUBSPACE:
        if resume or include:
            raise RecipeError(f"--{'resume' if resume else 'include'}: '{SUBSPACE}' takes none", "leave it out")
        _pack(base, model, out, given, overwrite, json_, quiet)
        return
    how: dict[str, Any] = {"as_": as_, "include": include or (), "resume": resume, "overwrite": overwrite}
    with count_bar("extracting", quiet) as progress:
        result = extract_adapter(base, model, out, progress=progress, **how, **given)
    made = result.provenance
    if not was_there(result.already_done, result.out, quiet):
        from mergebench.adapters.cards import kept_text

        worst, entry = min(made["modules"].items(), key=lambda item: item[1]["energy_kept"])
        least = f"least {entry['energy_kept']:.2%}: {worst}"
        note(f"extracted: {kept_text(made)} ({least}), {made['seconds']:.1f} s", quiet)
        _say_left_out(made, quiet)
    say_out(result.out, made, json_)


def _pack(base: str, model: str, out: Path, given: dict[str, Any], overwrite: bool, json_: bool, quiet: bool) -> None:
    from mergebench.adapters import pack

    with count_bar("extracting", quiet) as progress:
        result = pack(base, model, out, overwrite=overwrite, progress=progress, **given)
    made = result.provenance
    kept = f"{made['energy_kept']:.3%} of the energy kept, {made['expected']:.3%} is what a random change would"
    packed = f"{counted(made['tensors'], 'tensor')} in {counted(made['dimension'], 'number')}"
    note(f"extracted: {packed}: {kept}, {made['seconds']:.1f} s", quiet)
    say_out(result.out, made, json_)


def _measure(
    base: str, model: str, kind: str, budget: str | None, include: Any, given: dict[str, Any], quiet: bool
) -> Kinds:
    from mergebench.adapters.kinds import measure_kinds

    size = None if budget is None else opt.parse_size(budget, "--budget")
    if kind == ALL:
        strange = next((key for key in given if key != "seed"), None)
        if strange:
            raise RecipeError(f"--{strange}: --as all takes none", "it takes --budget, --include and --seed")
    elif size is not None:
        raise RecipeError("--budget: it belongs to --as all")
    with count_bar("measuring", quiet) as progress:
        name = None if kind == ALL else kind
        return measure_kinds(base, model, kind=name, budget=size, include=include, progress=progress, **given)


def _document(kinds: Kinds) -> dict[str, Any]:
    rows = [row._asdict() for row in kinds.rows]
    return {"budget": kinds.budget, "kinds": rows, "other_tokens": list(kinds.other_tokens)}


def _print(kinds: Kinds, quiet: bool) -> None:
    from rich.table import Column, Table

    from mergebench.cli.output import print_table

    numbers = [Column(head, justify="right") for head in ("bytes", "kept", "LoRA of as many bytes")]
    table = Table("kind", "stores", *numbers, box=None, header_style="bold")
    for row in kinds.rows:
        table.add_row(_title(row), row.stores, human(row.nbytes), f"{row.kept:.2%}", f"{row.lora:.2%}")
    print_table(table, optional=("stores",))
    for row in kinds.rows:
        if "correlation" in row.summary:
            note(f"{row.kind}: |change| and |weight| correlate by {row.summary['correlation']:.3f}", quiet)
    if kinds.other_tokens:
        note(f"not counted: {', '.join(kinds.other_tokens)}: the fine-tune has another number of tokens", quiet)


def _title(row: Kept) -> str:
    """`lora rank 16`, `sparse smallest 0.5% of each tensor`."""
    how, words = row.settings, [row.kind]
    if how.get("rank"):
        words.append(f"rank {how['rank']}")
    elif how.get("energy"):
        words.append(f"energy {how['energy']:g}")
    if "dimension" in how:
        words.append(f"of {how['dimension']}")
    if "mask" in how:
        words.append(str(how["mask"]))
    if how.get("share"):
        words.append(f"{how['share']:.3g} of {'the model' if how['scope'] == 'model' else 'each matrix'}")
    return " ".join(words)


def _say_left_out(made: dict[str, Any], quiet: bool) -> None:
    """Print the part of the fine-tune that the adapter does not hold."""
    tensors = made["left_out_tensors"]
    if tensors:
        most = ", ".join(f"{name} {share:.2%}" for name, share in list(tensors.items())[:3])
        names = most + ", ..." * (len(tensors) > 3)
        count = counted(len(tensors), "tensor")
        beside = " outside the linear layers" if made["as"] == "lora" and "include" not in made else ""
        note(f"left out: {made['left_out']:.2%} of the change, {count}{beside} ({names})", quiet)
    if made["other_tokens"]:
        names = ", ".join(made["other_tokens"])
        note(f"left out: {names}: the fine-tune has another number of tokens, which is not counted", quiet)
