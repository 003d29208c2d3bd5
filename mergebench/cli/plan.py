"""`mergebench plan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.merge import Recipe, load, say_notes
from mergebench.cli.output import counted, note, say, say_json
from mergebench.errors import human

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mergebench.engine.plan import Plan
    from mergebench.recipe import Stage


def plan(
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the result would go; its disk is checked.")
    ] = None,
    device: opt.Device = "auto",
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    on: opt.On = None,
    read_gbps: Annotated[
        float, typer.Option(metavar="GB", min=0.001, help="What a machine reads in a second, for the time.")
    ] = 0.5,
    set_: opt.Set = None,
    seed: opt.Seed = None,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show what a merge would read, ask, write and need, from headers alone.

    Example: mergebench plan recipes/quickstart.yaml
    """
    from mergebench.checkpoint.target import check_room

    limits: dict[str, Any] = {
        "memory": opt.parse_size(memory, "--memory"),
        "workers": workers,
        "device": opt.check_device(device),
        "shard_size": opt.parse_size(shard_size, "--shard-size"),
        "on": on,
    }

    note(f"joining the cluster: {on}", quiet or json_ or on is None)

    def planned(stage: Stage) -> Plan:
        found = _plan(stage, limits)
        if out is not None:
            check_room(stage.out, found.bytes_written)
        return found

    def facts(stage: Stage) -> dict[str, Any]:
        return _facts(planned(stage), stage.out, read_gbps)

    def show(stage: Stage) -> None:
        found = planned(stage)
        say_notes(found, quiet or json_)
        _show(found, stage.out, read_gbps)

    each_stage(load(recipe, set_, seed, out), json_, facts, show)


def each_stage(
    stages: list[Stage], json_: bool, facts: Callable[[Stage], dict[str, Any]], show: Callable[[Stage], None]
) -> None:
    """Print a command's output for each stage, or that the stage waits for other results."""
    *earlier, last = stages
    if json_:
        document, *before = ({"waits_for": waits} if (waits := s.waits_for) else facts(s) for s in [last, *earlier])
        names = ({"name": stage.name, "out": str(stage.out)} for stage in earlier)
        listed = [name | one for name, one in zip(names, before, strict=True)]
        say_json(document | ({"earlier_stages": listed} if earlier else {}))
        return
    for stage in stages:
        title = f"stage {stage.name}" if stage is not last else stage.name
        if stage.waits_for:
            say(f"{title}: waits for {', '.join(stage.waits_for)}, not merged yet")
            continue
        if earlier:
            say(f"{title}:")
        show(stage)


def _plan(stage: Stage, limits: dict[str, Any]) -> Plan:
    """The plan of a stage; if models do not fit together, every mismatch is printed on stderr."""
    from mergebench import api
    from mergebench.checkpoint.mismatch import Mismatch

    try:
        return api.plan(stage.recipe, **limits)
    except Mismatch as error:
        for line in error.problems:
            note(line)
        count = len(error.problems)
        message = f"{count} mismatch{'es' * (count > 1)}" if count else error.message
        raise Mismatch(message, error.hint) from None


def _show(found: Plan, out: Path, read_gbps: float) -> None:
    facts, merge = _facts(found, out, read_gbps), found.merge
    say(f"{merge.method.name} ({merge.method.paper}), scope {merge.scope}")
    say(f"  base      {facts['base'] or 'none'}")
    if "slices" in facts:
        for line in _slices(facts["slices"]):
            say(f"  slice     {line}")
    else:
        for number, model in enumerate(merge.models):
            zeros = found.zero_share(number)
            extra = f"  {zeros:.1%} of the elements are unchanged" if zeros else ""
            say(f"  model     {model.reference}{extra}")
        if "schedule" in facts:
            say(f"  schedule  {facts['schedule']['name']}")
            say_weights(facts["schedule"]["weights"], "            ")
    say(f"  merged    {counted(facts['merged_tensors'], 'tensor')}, {found.elements / 1e6:.2f} M elements")
    say(f"  copied    {counted(facts['copied_tensors'], 'tensor')} from the base")
    if "tokens" in facts:
        tokens = facts["tokens"]
        have = ", ".join(f"{model} {size}" for model, size in tokens["of"].items())
        say(f"  tokens    {tokens['source']}: {tokens['count']} rows; {have}")
    if "out_dtype" in facts:
        more = "; merged twice, the first time for their scales" if found.measured else ""
        say(f"  rounded   {counted(facts['out_dtype']['tensors'], 'tensor')} to {merge.encoding}{more}")
    if merge.lines is not None:
        alpha = merge.lines.alpha
        asked = "auto (asked about the whole model, last)" if alpha is None else f"{alpha:g}"
        say(f"  lines     alpha {asked}, beta {merge.lines.beta:g}")
    for one in merge.edits:
        say(f"  edit      {one.wanted.edit} of {one.count} rows of {one.wanted.target}, by {one.probe.file}")
    say(f"  passes    {counted(found.passes, 'question')}, {counted(found.sweeps, 'sweep')}")
    say(f"  read      {human(found.bytes_read)}")
    say(f"  write     {human(found.bytes_written)} in {counted(len(facts['files']), 'file')} to {out}")
    if facts["tasks"]:
        say(f"  tasks     {', '.join(facts['tasks'])}: a one-bit mask per element each, and one vector for all")
    say(f"  disk      {human(facts['disk_free'])} free; staged in {facts['staging']}")
    more = ", and for each worker" if "cluster" in facts else ""
    say(f"  memory    {human(found.peak_memory)} of {human(found.memory)}, plus about 300 MB for torch{more}")
    if "largest_matrix" in facts:
        one = facts["largest_matrix"]
        shape, each = " x ".join(map(str, one["shape"])), human(one["memory"])
        say(f"  matrices  {counted(one['count'], 'tensor')} whole, the largest {shape}: {each} per worker")
    if "cluster" in facts:
        share = facts["cluster"]
        say(f"  machines  {counted(len(share['workers']), 'machine')}, each with the memory above")
        say(f"  workers   {sum(share['workers'])} on cpu: {', '.join(map(str, share['workers']))}")
        say(f"  share     {human(share['bytes_read'])} read and {human(share['bytes_written'])} written per machine")
    else:
        say(f"  workers   {found.workers} on {found.device}")
    if facts["seconds"] is not None:
        slow = facts["seconds_from_disk"]
        more = f"; {_time(slow)} where a disk gives {human(read_gbps * 1e9)}/s" if slow > facts["seconds"] else ""
        say(f"  time      about {_time(facts['seconds'])}{more}")


def _facts(plan: Plan, out: Path, read_gbps: float) -> dict[str, Any]:
    import shutil

    from mergebench.checkpoint.target import partial
    from mergebench.engine.duration import estimate
    from mergebench.recipe.open import models_of

    merge = plan.merge
    folder = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    base, models = merge.base and merge.base.reference, [model.reference for model in merge.models]
    slices = merge.recipe.get("slices") or []
    if slices:  # each of these models is composed of several
        base, models = merge.recipe.get("base_model"), models_of(merge.recipe)
    time = estimate(plan, read_gbps * 1e9)
    return {
        "method": merge.method.name,
        "scope": merge.scope,
        "notes": list(merge.notes),
        "out": str(out),
        "base": base,
        "models": models,
        **({"slices": slices} if slices else {}),
        **averaged(merge.recipe),
        **_tokens(plan),
        "dtypes": sorted({part.dtype for shard in plan.shards for part in shard.stored}),
        **({"out_dtype": {"kind": merge.encoding, "tensors": len(plan.encoded.tensors)}} if merge.encoding else {}),
        "merged_tensors": len(plan.alignment.merged),
        "copied_tensors": len(plan.copied),
        "elements": plan.elements,
        **({"lines": merge.recipe["lines"]} if merge.lines else {}),
        "edits": [one.wanted.to_plain() | {"candidates": one.count} for one in merge.edits],
        "passes": plan.passes,
        "sweeps": plan.sweeps,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "files": [file.file for shard in plan.shards for file in shard.files],
        "staging": str(partial(out)),
        "tasks": list(merge.tasks) if merge.method.gives == "deltas" else [],
        "peak_memory": plan.peak_memory,
        **_cluster(plan),
        **_largest_matrix(plan),
        "disk_free": shutil.disk_usage(folder).free,
        "seconds": time and round(time.work, 1),
        "seconds_from_disk": time and round(time.disk, 1),
        "zero_share": [plan.zero_share(number) for number in range(len(merge.models))],
    }


def averaged(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of a recipe that averages checkpoints, and the weights by their steps."""
    from mergebench.recipe import schedules
    from mergebench.recipe.windows import weights_by_step

    weights = weights_by_step(recipe)
    return {"schedule": {"name": schedules.read(recipe["schedule"]).label, "weights": weights}} if weights else {}


def say_weights(weights: Mapping[int, float], indent: str = "  ") -> None:
    """A line for each checkpoint: its step and its weight."""
    width = max(len(str(step)) for step in weights)
    for step, weight in weights.items():
        say(f"{indent}step {step:{width}}  weight {weight:.4f}")


def _cluster(plan: Plan) -> dict[str, Any]:
    """The machines of a cluster: the workers of each, and a machine's share of the bytes."""
    count = len(plan.cluster)
    if not count:
        return {}
    share = {"bytes_read": plan.bytes_read // count, "bytes_written": plan.bytes_written // count}
    return {"cluster": {"workers": [machine.workers for machine in plan.cluster], **share}}


def _slices(slices: list[dict[str, Any]]) -> Iterator[str]:
    """`models/a, layers 0 to 3`: the sources of each slice, one a line."""
    for one in slices:
        for number, source in enumerate(one["sources"]):
            first, stop = source["layer_range"]
            layers = f"layers {first} to {stop - 1}" if stop > first + 1 else f"layer {first}"
            yield f"{'and ' * (number > 0)}{source['model']}, {layers}"


def _tokens(plan: Plan) -> dict[str, Any]:
    """The vocabulary that the recipe asks for: its size, and those of the models."""
    from dataclasses import replace

    from mergebench.recipe.tokenizers import vocab_size

    wanted, merge = plan.merge.recipe.get("tokenizer"), plan.merge
    if not wanted or merge.recipe.get("slices"):
        return {}
    opened = [*([merge.base] if merge.base else []), *merge.models]
    sizes = {one.reference: vocab_size(replace(one, config_changes=None).config) for one in opened}
    return {"tokens": {"source": wanted["source"], "count": vocab_size(merge.reference.config), "of": sizes}}


def _largest_matrix(plan: Plan) -> dict[str, Any]:
    """The largest tensor that must come whole, and the memory that a worker needs for it."""
    if not plan.whole:
        return {}
    largest = max((plan.merge.reference.tensors[name] for name in plan.whole), key=lambda info: info.numel)
    needed = plan.buffer_bytes // plan.workers
    return {"largest_matrix": {"count": len(plan.whole), "shape": list(largest.shape), "memory": needed}}


def _time(seconds: float) -> str:
    """`4 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
