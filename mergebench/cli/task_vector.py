"""`mergebench task-vector`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.output import byte_bar, counted, note, say_left, say_out, was_there
from mergebench.errors import RecipeError

DTYPES = ("float32", "float16", "bfloat16")


def task_vector(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned model.")],
    base: opt.Base,
    out: opt.Out,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Stored type: float32, float16 or bfloat16.",
            autocompletion=complete.words("float32", "float16", "bfloat16"),
        ),
    ] = "float32",
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write MODEL minus its base as a checkpoint; recipes name it with `task_vector:`.

    Example: mergebench task-vector TUNED --base BASE --out vector
    """
    from mergebench import api

    if dtype not in DTYPES:
        raise RecipeError(f"--dtype: '{dtype}' is not a stored type", ", ".join(DTYPES))
    quiet = quiet or json_
    sizes = {"memory": opt.parse_size(memory, "--memory"), "shard_size": opt.parse_size(shard_size, "--shard-size")}
    plan = api.plan_task_vector(model, base, dtype=dtype, workers=workers, **sizes)
    with byte_bar("subtracting", plan.bytes_read, quiet) as progress:
        result = api.run(plan, out, resume=resume, overwrite=overwrite, progress=progress)
    if not was_there(result.already_done, out, quiet):
        say_left(result.provenance, quiet)
        tensors = counted(result.provenance["merged_tensors"], "tensor")
        note(f"wrote {out} in {result.provenance['seconds']:.1f} s: {tensors}", quiet)
    say_out(result.out, result.provenance, json_)
