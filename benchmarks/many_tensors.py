"""What a small tensor costs: user and system time of a merge of thousands of them, and the same for each.

    python benchmarks/many_tensors.py [--counts 5000 10000 20000] [--repeat 3]

A base and three fine-tunes of tensors [64] and [16, 16] in float32, alternately. The least of several runs; CPU time
of all processes, so that other work on the machine hardly shows. The last column is the slope between the smallest
and the largest count: what is left of a merge when its start is taken off. It must not grow with the number.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from speed import commit, recipe

METHODS = ("linear", "ties", "pcb")
MODELS = ("base", "ft1", "ft2", "ft3")


def write(folder: Path, count: int) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i // 20}.part{i % 20}.weight": (64,) if i % 2 else (16, 16) for i in range(count)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    for model in MODELS:
        step = 0.0 if model == "base" else 0.01
        tensors = {name: value + step * torch.randn(value.shape, generator=random) for name, value in base.items()}
        (folder / model).mkdir(parents=True)
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})


def seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 10000, 20000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="scratch folder, removed at the end")
    options = parser.parse_args()
    counts, work = sorted(options.counts), options.work.resolve()
    for count in counts:
        write(work / str(count), count)
    program = [str(Path(sys.executable).with_name("mergebench")), "merge"]
    print(f"commit {commit()}; CPU seconds\n")
    print("| method |" + "".join(f" {count} |" for count in counts) + " µs a tensor |")
    print("|---|" + "---|" * (len(counts) + 1))
    for method in METHODS:
        spent = []
        for count in counts:
            (file, _), out = recipe(work, work / str(count), method, "float32"), work / "out"
            spent.append(
                min(
                    seconds([*program, str(file), "--out", str(out), "--overwrite", "-q"])
                    for _ in range(options.repeat)
                )
            )
        slope = (
            (spent[-1] - spent[0]) / (counts[-1] - counts[0]) * 1e6 if len(counts) > 1 else spent[0] / counts[0] * 1e6
        )
        print(f"| {method} |" + "".join(f" {one:.2f} |" for one in spent) + f" {slope:.0f} |", flush=True)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
