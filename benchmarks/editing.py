"""An edit of a large model against copying it: time, memory, bytes read and written.

    python benchmarks/make_models.py /tmp/models --params 0.55b
    python benchmarks/editing.py /tmp/models/base --runs 5

Whole processes, ours and `cp -r` in turn, medians. Before each run what was written is synced, and the model's pages
are dropped from the cache (`cold`: both read the disk) or read in (`warm`); memory is kept warm (warm_memory.py). Until
`on disk`, each ends when what it wrote is there (`--sync`; `cp` and `sync`). Bytes are what one process (`--workers 1`)
asked the kernel for (/proc/self/io).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import peak
from speed import KEEPER, WARM_MIB, commit

from mergebench.editing.probes.probe import Probe

COUNTING = """
import os, sys
from pathlib import Path
from mergebench.cli import main
try:
    main()
except SystemExit as end:
    print(Path("/proc/self/io").read_text())
    sys.exit(end.code)
"""


def pages(folder: Path, wanted: bool) -> None:
    """Put the files of a folder into the page cache, or out of it."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        if wanted:
            while os.read(file, 1 << 24):
                pass
        else:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def seconds(command: list[str], then: list[str] | None = None) -> float:
    """A whole process, and what follows it, with memory to take."""
    keeper = subprocess.Popen([sys.executable, KEEPER, str(WARM_MIB)], stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    keeper.stdout.readline()
    try:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if then:
            subprocess.run(then, check=True)
        return time.perf_counter() - start
    finally:
        keeper.kill()
        keeper.communicate()


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="scratch folder, removed at the end")
    options = parser.parse_args()
    model, work = options.model.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    width = json.loads((model / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    weight = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    probe = Probe(weight, torch.zeros(2)).save(work / "probe.safetensors").file
    out = work / "out"
    edit = ["edit", "--model", str(model), "--probe", str(probe), "--out", str(out), "--overwrite", "-q"]
    program = [str(Path(sys.executable).with_name("mergebench")), *edit]
    copy = ["cp", "-r", str(model), str(out)]
    print(f"commit {commit()}; {options.runs} runs, medians (least to most)\n")
    print("| cache | until | cp s | edit s | ratio |\n|---|---|---|---|---|")
    for cold in (True, False):
        for synced in (False, True):
            times: tuple[list[float], list[float]] = [], []
            for _ in range(options.runs):
                for found, command in zip(times, (copy, [*program, *(["--sync"] if synced else [])]), strict=True):
                    shutil.rmtree(out, ignore_errors=True)
                    pages(model, not cold)
                    found.append(seconds(command, ["sync", str(out)] if synced and command is copy else None))
            ours, theirs = statistics.median(times[1]), statistics.median(times[0])
            row = [f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in times]
            where = "cold" if cold else "warm"
            print(
                f"| {where} | {'on disk' if synced else 'written'} | {' | '.join(row)} | **{ours / theirs:.2f}** |",
                flush=True,
            )
    dry = [option for option in edit if option not in ("--overwrite",)] + ["--dry-run"]
    start = statistics.median(seconds([program[0], *dry]) for _ in range(options.runs))
    print(f"\n{start:.2f} s of each edit are the start and the read of the candidate rows (--dry-run, warm)")
    most = peak(program)
    said = json.loads((out / "mergebench.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    patch = (out / said["edits"][0]["patch"]).stat().st_size
    shutil.rmtree(out)
    counted = subprocess.run(
        [sys.executable, "-c", COUNTING, *edit, "--workers", "1"], check=True, capture_output=True, text=True
    ).stdout
    io = {
        key: int(value) for key, _, value in (line.partition(": ") for line in counted.splitlines()) if value.isdigit()
    }
    print(f"peak memory {most / 1e6:.0f} MB (mergebench.json: {said['peak_memory'] / 1e6:.0f})")
    print(
        f"checkpoint {size / 1e6:.0f} MB; read {io['rchar'] / size:.2f} times, written {io['wchar'] / size:.2f} times"
    )
    print(f"patch {patch / 1e6:.1f} MB for {said['edits'][0]['rows']} of {said['edits'][0]['of']} rows")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
