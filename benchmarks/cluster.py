"""Merging and measuring on a cluster of this machine, against its processes: what carrying the work costs.

    python benchmarks/make_models.py /tmp/models --params 0.55b
    python benchmarks/cluster.py merge /tmp/models --methods linear ties pcb
    python recipes/quickstart/fetch.py
    python benchmarks/cluster.py evaluate recipes/quickstart
    python benchmarks/cluster.py arithmetic /tmp

`merge`: two processes against two workers of Ray, alternately, on the same files; the seconds are those of the work,
after one run that is not counted, so the start of Ray and of its workers is told apart. `evaluate`: twelve models on
four tasks, in one process on one core, against two workers with a core each. `arithmetic`: what `mergebench plan` says
of eight models of 70 B on 4, 16 and 64 machines; their files are headers, and holes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from make_models import shapes

import mergebench
from mergebench.checkpoint.shards import OutTensor, Shard, write_index
from mergebench.engine.cluster import Machine, join, leave
from mergebench.engine.duration import START, estimate
from mergebench.engine.plan import plan_merge
from mergebench.evaluation import load_suite
from mergebench.recipe.resolve import resolve

WORKERS = 2


def merges(models: Path, method: str, on: str | None, runs: int) -> dict[str, Any]:
    """The seconds of `runs` merges in this process, and of what came before them."""
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(models / f"ft{n}")} for n in (1, 2, 3)]}
    if method != "linear":
        recipe |= {"base_model": str(models / "base"), "scope": "model"}
        recipe["parameters"] = {"density": 0.2} if method == "ties" else {"density": 0.1}
    started = time.perf_counter()
    if on is not None:
        join(on, WORKERS)
    joined = time.perf_counter() - started
    seconds, memory = [], 0
    with tempfile.TemporaryDirectory(dir=models) as folder:
        for _ in range(runs + 1):
            plan = mergebench.plan(recipe, workers=WORKERS, on=on)
            begun = time.perf_counter()
            result = mergebench.run(plan, Path(folder) / "out")
            seconds.append(time.perf_counter() - begun)
            memory = result.provenance["peak_memory"]
            shutil.rmtree(result.out)
    leave()
    first, *rest = seconds
    return {"start": joined + first - statistics.median(rest), "seconds": rest, "memory": memory, "plan": plan.memory}


def evaluations(quickstart: Path, on: str | None) -> dict[str, Any]:
    """The seconds of measuring twelve models on the quickstart's four test tasks, without what is kept."""
    import torch

    torch.set_num_threads(1)
    base = str(quickstart / "cache/base")
    adapters = [str(quickstart / "adapters" / name) for name in ("tweets", "products", "reviews", "nouns")]
    sets = [one for size in (0, 1, 2, 3) for one in itertools.combinations(adapters, size)][:12]
    models = ["+".join([base, *one]) for one in sets]
    suite = load_suite(quickstart / "suite.yaml")
    if on is not None:
        join(on, WORKERS)
    workers = WORKERS if on else None
    mergebench.measure(suite, models[:2], device="cpu", results=None, on=on, workers=workers)  # libraries are imported
    begun = time.perf_counter()
    found = mergebench.measure(suite, models, device="cpu", results=None, on=on, workers=workers)
    seconds = time.perf_counter() - begun
    leave()
    return {"seconds": [seconds], "values": [record.value for record in found.records]}


def write_holes(folder: Path, preset: str) -> None:
    """A bfloat16 model whose files have headers and no data."""
    names = shapes(preset)
    tensors = [OutTensor(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in names.items()]
    shards, size = [[]], 0
    for tensor in tensors:
        if size + tensor.nbytes > 5e9:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    folder.mkdir()
    made = [Shard(f"model-{n:05}-of-{len(shards):05}.safetensors", tuple(one)) for n, one in enumerate(shards, 1)]
    for shard in made:
        with open(folder / shard.file, "wb") as file:
            file.write(shard.header)
            file.truncate(len(shard.header) + shard.nbytes)
    write_index(folder, made)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def arithmetic(place: Path, gbps: float, cores: int) -> None:
    """A table of the plans' figures, for machines of so many cores that read `gbps` GB/s each."""
    print("| method | sweeps | core seconds | read TB | 4 machines | 16 | 64 |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        folder = Path(scratch)
        for name in ("base", *(f"ft{number}" for number in range(1, 9))):
            write_holes(folder / name, "70b")
        for method in ("linear", "ties", "pcb"):
            recipe: dict[str, Any] = {
                "merge_method": method,
                "models": [{"model": str(folder / f"ft{n}")} for n in range(1, 9)],
            }
            if method != "linear":
                recipe |= {"base_model": str(folder / "base"), "parameters": {"density": 0.2}}
            cells = []
            for count in (4, 16, 64):
                machines = tuple(Machine(str(n), "", cores, 0, cores) for n in range(count))
                plan = plan_merge(resolve(mergebench.load(recipe)), memory=64 << 30, cluster=machines)
                time = estimate(plan, gbps * 1e9)
                assert time is not None
                cells.append(f"{max(time):.0f} s")
                work = (time.work - START) * count * cores
            print(f"| {method} | {plan.sweeps} | {work:.0f} | {plan.bytes_read / 1e12:.2f} | {' | '.join(cells)} |")


def child(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, __file__, *arguments, "--child"], stdout=subprocess.PIPE, env=environment, check=True
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["merge", "evaluate", "arithmetic"])
    parser.add_argument("place", type=Path)
    parser.add_argument("--methods", nargs="+", default=["linear", "ties", "pcb"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--gbps", type=float, default=2.0)
    parser.add_argument("--cores", type=int, default=32)
    parser.add_argument("--on", default="")
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    if given.child:
        on = given.on or None
        one = (
            evaluations(given.place, on)
            if given.what == "evaluate"
            else merges(given.place, given.methods[0], on, given.runs)
        )
        print(json.dumps(one))
        return
    if given.what == "arithmetic":
        arithmetic(given.place, given.gbps, given.cores)
        return
    if given.what == "evaluate":
        here, there = (child("evaluate", str(given.place), "--on", on) for on in ("", "ray"))
        assert here["values"] == there["values"], "the values differ"
        seconds = here["seconds"][0], there["seconds"][0]
        print(f"| 12 models, 4 tasks | {seconds[0]:.0f} | {seconds[1]:.0f} | {seconds[0] / seconds[1]:.2f} |")
        return
    print("| method | processes s | Ray s | ratio | start of Ray s | memory MB: processes, Ray |")
    print("|---|---|---|---|---|---|")
    for method in given.methods:
        rounds = [
            [
                child("merge", str(given.place), "--methods", method, "--runs", str(given.runs), "--on", on)
                for on in ("", "ray")
            ]
            for _ in range(2)
        ]
        here, there = ([second for one in rounds for second in one[side]["seconds"]] for side in (0, 1))
        one, other = statistics.median(here), statistics.median(there)
        memory = ", ".join(f"{rounds[-1][side]['memory'] / 1e6:.0f}" for side in (0, 1))
        print(
            f"| {method} | {one:.2f} | {other:.2f} | **{other / one:.2f}** | {rounds[-1][1]['start']:.1f} | {memory} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
