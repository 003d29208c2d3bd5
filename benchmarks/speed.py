"""Time whole merges against mergekit and against the floor, on the same files, in one run.

    python benchmarks/make_models.py /tmp/models --params 0.55b
    python benchmarks/speed.py /tmp/models --peer PATH/TO/mergekit-yaml --runs 3

Every figure is a whole process, from start to exit; ours and the peer's runs alternate, and the median
counts. Before each, what was written is synced, the libraries are imported and the inputs are read, so
that they are in the page cache; memory is kept warm (warm_memory.py). The peer lives in an environment of
its own. The floor is a process that imports what a merge imports, reads every input byte once and writes
every output byte once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A recipe for both programs: parameters `shared` and of `each` model, whether there is a base, how many models."""

    shared: Mapping[str, float] = {}
    each: Mapping[str, float] = {}
    base: bool = True
    models: int = 3
    wanted: float | None = None  # times as fast as the peer


WEIGHT = {"weight": 1.0}
TRIM = {"weight": 1.0, "density": 0.2}
METHODS = {
    "passthrough": Case(base=False, models=1, wanted=3),
    "linear": Case(each=WEIGHT, base=False, wanted=3),
    "task_arithmetic": Case(each=WEIGHT, wanted=3),
    "slerp": Case({"t": 0.4}, models=1, wanted=5),
    "nuslerp": Case(each=WEIGHT, base=False, models=2, wanted=6),
    "multislerp": Case(each=WEIGHT, base=False),
    "karcher": Case(base=False),
    "model_stock": Case(),
    "nearswap": Case({"t": 0.001}, models=1),
    "arcee_fusion": Case(models=1),
    "sce": Case({"select_topk": 0.2}, wanted=6),
    "dare_linear": Case(each=TRIM, wanted=8),
    "dare_ties": Case(each=TRIM, wanted=8),
    "ties": Case(each=TRIM, wanted=20),
    "breadcrumbs": Case(each={**TRIM, "gamma": 0.01}, wanted=25),
    "breadcrumbs_ties": Case(each={**TRIM, "gamma": 0.01}, wanted=25),
    "della_linear": Case(each={**TRIM, "epsilon": 0.1}, wanted=25),
    "della": Case(each={**TRIM, "epsilon": 0.1}, wanted=25),
    "ram": Case(),
    "ramplus_tl": Case(),
    "pcb": Case({"density": 0.1}),
}
NOT_IN_PEER = {"pcb"}
LISTS_BASE = {"slerp", "nearswap", "arcee_fusion"}  # among its models, for the peer
KEEPER, WARM_MIB = Path(__file__).with_name("warm_memory.py"), 4096


def recipe(folder: Path, models: Path, method: str, dtype: str) -> tuple[Path, list[Path]]:
    """One YAML file that both programs accept, and the models that it reads."""
    case, base = METHODS[method], models / "base"
    tuned = [models / f"ft{number}" for number in range(1, case.models + 1)]
    listed = [base, *tuned] if method in LISTS_BASE else tuned
    lines = [f"merge_method: {method}", f"dtype: {dtype}", *([f"base_model: {base}"] if case.base else []), "models:"]
    for path in listed:
        lines += [f"  - model: {path}", *([f"    parameters: {json.dumps(case.each)}"] if case.each else [])]
    if case.shared:
        lines.append(f"parameters: {json.dumps(case.shared)}")
    file = folder / f"{method}.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file, [base, *tuned] if case.base else tuned


@contextmanager
def warm(models: Path, interpreter: Path) -> Iterator[None]:
    """The program's libraries and the inputs in the page cache, the disk at rest, and memory to take."""
    os.sync()
    subprocess.run([interpreter, "-c", "import torch, transformers"], check=True)
    block = bytearray(16 << 20)
    for file in sorted(models.glob("*/*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    keeper = subprocess.Popen([sys.executable, KEEPER, str(WARM_MIB)], stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    keeper.stdout.readline()
    try:
        yield
    finally:
        keeper.kill()
        keeper.communicate()


def timed(command: list[str], out: Path, models: Path) -> float:
    """Seconds of a whole process; its output directory is removed before and after."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with warm(models, Path(command[0]).with_name("python")):
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        _, said = process.communicate()
        seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said.decode()[-2000:]}")
    stages = out / "mergebench.json"
    if stages.exists():
        LAST_STAGES.clear()
        LAST_STAGES.update(json.loads(stages.read_text(encoding="utf-8")).get("stages", {}))
    shutil.rmtree(out, ignore_errors=True)
    return seconds


LAST_STAGES: dict[str, float] = {}

FLOOR = """
import os, sys, threading
import torch, mergebench.api, mergebench.recipe.resolve
from mergebench.checkpoint import open_model
out, *models = sys.argv[1:]
files = [header.file for model in models for header in open_model(model).headers]
def read(part):
    buffer = bytearray(1 << 18)
    for file in files:
        number = os.open(file, os.O_RDONLY)
        for at in range(part << 18, os.path.getsize(file), 2 << 18):
            os.preadv(number, [buffer], at)
        os.close(number)
size = os.path.getsize(files[0]) if len(files) == len(models) else sum(os.path.getsize(f) for f in files) // len(models)
os.makedirs(out)
target = os.open(os.path.join(out, "out.bin"), os.O_CREAT | os.O_WRONLY)
os.posix_fallocate(target, 0, size)
def write(part):
    buffer = memoryview(bytes(1 << 17))
    for at in range(part << 17, size, 2 << 17):
        os.pwrite(target, buffer[: min(1 << 17, size - at)], at)
for work in (read, write):
    threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def main() -> None:
    """Measure and print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder with base, ft1, ft2, ft3 (benchmarks/make_models.py)")
    parser.add_argument("--peer", help="path of mergekit-yaml in its own environment")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-runs", type=int, help="runs of the peer, where it is slow (default: --runs)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="scratch folder, removed at the end")
    options = parser.parse_args()
    models, work = options.models.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    ours = [str(Path(sys.executable).with_name("mergebench")), "merge"]
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {commit()}")
    print("\n| method | mergebench s | floor s | times the floor | mergekit s | ratio | wanted |")
    print("|---|---|---|---|---|---|---|")
    stages = {}
    for method in options.methods:
        (file, inputs), out = recipe(work, models, method, options.dtype), work / "out"
        mine, floor, peer = [], [], []
        for run in range(options.runs):
            mine.append(timed([*ours, str(file), "--out", str(out), "-q"], out, models))
            stages[method] = dict(LAST_STAGES)
            floor.append(timed([sys.executable, "-c", FLOOR, str(out), *map(str, inputs)], out, models))
            if options.peer and method not in NOT_IN_PEER and run < (options.peer_runs or options.runs):
                peer.append(timed([options.peer, str(file), str(out), "--no-copy-tokenizer"], out, models))
        seconds, least = statistics.median(mine), statistics.median(floor)
        row = f"| {method} | {seconds:.2f} | {least:.2f} | {seconds / least:.1f} |"
        theirs = statistics.median(peer) if peer else 0.0
        row += f" {theirs:.1f} | **{theirs / seconds:.1f}** |" if peer else " | |"
        print(row + f" {METHODS[method].wanted or ''} |", flush=True)
        print(f"  runs: {rounded(mine)} floor {rounded(floor)} peer {rounded(peer)}", file=sys.stderr, flush=True)
    print("\nWhere the time goes (seconds of the last run):\n\n| method | questions | apply |\n|---|---|---|")
    for method, found in stages.items():
        print(f"| {method} | {found.get('questions', 0):.2f} | {found.get('apply', 0):.2f} |")
    shutil.rmtree(work, ignore_errors=True)


def rounded(runs: list[float]) -> str:
    return " ".join(f"{run:.2f}" for run in runs)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
