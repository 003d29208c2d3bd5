"""Options that several commands share, and their units."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import complete
from mergebench.errors import RecipeError

_UNITS = {
    "": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
    "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
}  # fmt: skip


def parse_size(text: str, option: str) -> int:
    """`400MB`, `400MiB`, `1.5g`, `4096` in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    unit = match[2].lower() if match else "?"
    if match is None or unit not in _UNITS or float(match[1]) == 0:
        raise RecipeError(f"{option}: '{text}' is not a size", "write it like 400MB or 4GB")
    return int(float(match[1]) * _UNITS[unit])


def parse_share(text: str, option: str) -> float:
    """`.5%` or `0.005` as a share."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise RecipeError(f"{option}: '{text}' is not a share", "such as 0.5%, or 0.005") from None


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe: --set parameters.density=0.2. Repeatable.",
        autocompletion=complete.settings,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of random masks; overrides the recipe's.")]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Most memory for buffers and statistics.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that share the work, or threads; with --on, on all machines. Default: one per core.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="auto (a GPU where there is one), cpu, cuda or cuda:N.",
        autocompletion=complete.words("auto", "cpu", "cuda", "cuda:0"),
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="CLUSTER",
        help="ray, or ray://HOST:PORT: on the machines of a Ray cluster; --workers counts theirs.",
        autocompletion=complete.words("ray", "ray://"),
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest output file.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Output directory.")]
Base = Annotated[str, typer.Option(metavar="MODEL", help="The model it was fine-tuned from.")]
Adapted = Annotated[str, typer.Option("--base", metavar="MODEL", help="The model it was trained on.")]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="validation or test. Default: test where the suite has it.",
        autocompletion=complete.words("validation", "test"),
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
Results = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Where results are kept, so that nothing is measured twice.", file_okay=False),
]
Backbone = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Where the bank's backbone is now. Default: where it was.")
]
Energy = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Instead: the smallest ranks that keep this share of the squared norm."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Only tensors whose names it matches. Repeatable. Default: all."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Print the tables as markdown, latex or csv.",
        autocompletion=complete.words("markdown", "latex", "csv"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]


def check_device(device: str) -> str:
    """The device's name, if it can be one; whether the machine has it is seen when it is used."""
    if device == "mps":
        raise RecipeError("--device mps: not supported", "it lacks the float64 in which sums are taken; choose cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise wrong("--device", device, "auto, cpu, cuda or cuda:N")
    return device


def check_format(form: str | None, json_: bool) -> str | None:
    if form not in (None, "markdown", "latex", "csv"):
        raise wrong("--format", form or "", "markdown, latex or csv")
    if form is not None and json_:
        raise RecipeError("--format and --json: two ways to print the results", "leave one out")
    return form


def check_split(split: str | None) -> str | None:
    if split not in (None, "test", "validation"):
        raise wrong("--split", split, "test or validation")
    return split


def wrong(option: str, value: str, allowed: str) -> RecipeError:
    return RecipeError(f"{option}: '{value}' is not possible", allowed)
