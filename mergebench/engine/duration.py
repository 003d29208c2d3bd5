"""About how long a merge takes, from headers: the work of its sweeps, and reading its files from a disk.

The work is measured once, not here: nanoseconds of one core of an AMD EPYC for an element of a model, from the times of
benchmarks/RESULTS.md less the start. Another core differs by a factor of two, or more where a method computes much; a
disk differs by more, so its speed is said.
"""

from __future__ import annotations

from typing import NamedTuple

from mergebench.engine import trace
from mergebench.engine.plan import Plan

DISK = 500_000_000  # bytes a second
START = 1.5  # seconds: torch is imported, the result published
NS = 1e-9
APPLY = 1.6 * NS  # read, merge elementwise, cast, write
RANKS = 3.1 * NS  # a question about the order of the elements
SUMS = 1.5 * NS  # any other question
ROWS = 8 * NS  # a method on rows, which sorts them or sums over them
DELTA = 10 * NS  # computing an adapter's difference, each time it is read
DECOMPOSITION = 0.3 * NS  # of a matrix [m, n]: times m * n * min(m, n)


class Duration(NamedTuple):
    """Estimates in seconds."""

    work: float  # where the files lie in memory, or on a disk that is faster
    disk: float  # reading and writing them at the disk's rate


def estimate(plan: Plan, rate: float = DISK) -> Duration | None:
    """About how long a merge on CPUs takes; None for one on a GPU. rate: bytes a second that a machine reads.

    One machine keeps what it has read, as far as its memory goes. The machines of a cluster read everything in each
    sweep, because a chunk that one has read may be another's in the next.
    """
    if plan.device.type != "cpu":
        return None
    merge, models = plan.merge, len(plan.merge.models)
    known: dict[int, float] = {}
    work = 0.0
    for name in plan.alignment.merged:
        params = merge.params_for(name)
        if id(params) not in known:
            kinds = trace.asked(merge, params)
            known[id(params)] = sum(SUMS if isinstance(kind, type) else RANKS for kind in kinds)
        info = merge.reference.tensors[name]
        each = APPLY + known[id(params)] + (ROWS if merge.method.cut_with(params) == "row" else 0)
        folded = sum(bool(one.deltas) for one in plan.operands[name]) * (plan.asked[name] + 1)
        work += info.numel * (models * each + folded * DELTA)
        if name in plan.whole and len(info.shape) == 2:
            size = info.numel * min(info.shape) * DECOMPOSITION
            work += size * merge.method.decompositions(models, params)
    if plan.cluster:
        workers = sum(machine.workers for machine in plan.cluster)
        moved = (plan.bytes_read + plan.bytes_written) / len(plan.cluster)
        return Duration(START + work / workers, START + moved / rate)
    files = {header.file: header.stamp.size for model in [*merge.models, merge.reference] for header in model.headers}
    return Duration(START + work / plan.workers, START + (sum(files.values()) + plan.bytes_written) / rate)
