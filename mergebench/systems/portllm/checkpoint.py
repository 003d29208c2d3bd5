"""The port itself: new + (tuned - old) as a checkpoint, or an adapter for the new base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.files import write_atomically
from mergebench.engine.context import Context
from mergebench.engine.job import Merge
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.engine.plan import DEFAULT_MEMORY, SHARD_SIZE, Plan, plan_merge
from mergebench.engine.run import Result, run_plan
from mergebench.errors import RecipeError
from mergebench.evaluation.page import card
from mergebench.systems.portllm.adapter import port_adapter
from mergebench.systems.portllm.opened import adapter_at, open_port


@dataclass(frozen=True)
class NoParams:
    """A port has none."""


@merge_method(takes="weights", paper="arXiv:2410.10870", models=3)
def ported(weights: Weights, p: NoParams, ctx: Context) -> Passes:
    """new + (tuned - old), rounded once: in float64, where differences of numbers of like size are exact.

    Where the base did not move, the result is tuned to the bit, of whatever size.
    """
    new, tuned, old = weights.double()
    return torch.where(new == old, tuned, new + (tuned - old)).float()


def plan_port(
    old: str,
    new: str,
    patch: str | Path,
    *,
    exclude: Sequence[str] = (),
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plan the checkpoint new + (tuned - old), in one pass over the three; `mergebench.run` writes it.

    patch: a fine-tune of `old`, or an adapter or delta file on it. exclude: tensors that stay the new base's. Stored
    types, names and side files are the new base's.

    Raises `ModelError` if the models do not fit together.
    """
    opened = open_port(old, new, patch, exclude)
    opened.check()
    merge = Merge(
        method=ported,
        params=ported.make_params({}),
        base=None,
        models=(opened.new, opened.tuned, opened.old),
        names=("new", "tuned", "old"),
        exclude=tuple(exclude),
        recipe={"port": str(patch), "old": old, "new": new, **({"exclude": list(exclude)} if exclude else {})},
        notes=opened.notes,
    )
    return plan_merge(merge, memory=memory, workers=workers, shard_size=shard_size, device="cpu")


def port(
    old: str,
    new: str,
    patch: str | Path,
    out: str | Path,
    *,
    difference: bool = False,
    exclude: Sequence[str] = (),
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Carry a patch from the base `old` to the updated base `new`; no training.

    patch: a fine-tune of `old`: `out` becomes the checkpoint new + (patch - old). An adapter or a delta file: `out`
    becomes the same adapter for `new`, with the adapter's own parameters; with `difference` the checkpoint new +
    (old with the adapter - old). The two differ where the adapter is a function of the base's weights, as DoRA is.

    Raises `RecipeError` if `out` may not be written, `ModelError` if the models or the adapter do not fit together.
    """
    if adapter_at(patch) is not None and not difference:
        if exclude:
            raise RecipeError("exclude is for checkpoints: an adapter is ported whole", "add --difference")
        return port_adapter(old, new, patch, Path(out), overwrite=overwrite)
    plan = plan_port(old, new, patch, exclude=exclude, memory=memory, workers=workers)
    return run_port(plan, Path(out), resume=resume, overwrite=overwrite)


def run_port(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Result:
    """Write what `plan_port` planned."""

    def finish(directory: Path, provenance: dict[str, Any]) -> None:
        write_atomically(directory / "README.md", card.ported(out, provenance))

    return run_plan(plan, out, resume=resume, overwrite=overwrite, finish=finish, progress=progress)
