"""`mergebench task-vector`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import byte_bar, note, say, say_left
from mergebench.errors import RecipeError

DTYPES = ("float32", "float16", "bfloat16")


def task_vector(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned model.")],
    base: Annotated[str, typer.Option(help="The model it was fine-tuned from.")],
    out: Annotated[Path, typer.Option(help="Output directory.")],
    dtype: Annotated[str, typer.Option(help="Stored type: float32, float16 or bfloat16.")] = "float32",
    overwrite: opt.Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes.")] = False,
) -> None:
    """Write MODEL minus its base as a checkpoint; recipes name it with `task_vector:`.

    Example: mergebench task-vector TUNED --base BASE --out vector
    """
    from mergebench import api
    from mergebench.engine.run import run_plan

    if dtype not in DTYPES:
        raise RecipeError(f"--dtype: '{dtype}' is not a stored type", ", ".join(DTYPES))
    plan = api.plan_task_vector(model, base, dtype=dtype)
    with byte_bar("subtracting", plan.bytes_read, quiet) as progress:
        result = run_plan(plan, out, overwrite=overwrite, progress=progress)
    say_left(result.provenance, quiet)
    note(f"wrote {result.provenance['merged_tensors']} tensors in {result.provenance['seconds']:.1f} s", quiet)
    say(str(result.out))
