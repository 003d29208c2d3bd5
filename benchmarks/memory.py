"""The most memory a merge holds, all of its processes together, at two model sizes.

    python benchmarks/make_models.py /tmp/small --params 0.55b
    python benchmarks/make_models.py /tmp/large --params 1.1b
    python benchmarks/memory.py /tmp/small /tmp/large

Every 10 ms the proportional set sizes (resident pages, those that several processes share counted once) of
the program and its workers are added up; the largest sum counts. Linux only. What `mergebench.json` says of
itself stands beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from speed import METHODS, commit, recipe


def held(process: int) -> int:
    """Bytes resident in a process and its children."""
    total = 0
    with suppress(OSError, StopIteration):
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
        total = next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
        total += sum(held(int(child)) for child in children)
    return total


def peak(command: list[str]) -> int:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, held(process.pid))
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return most


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders with base, ft1, ft2, ft3")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="scratch folder, removed at the end")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    program = [str(Path(sys.executable).with_name("mergebench")), "merge"]
    print(f"commit {commit()}; MB measured (MB in mergebench.json)\n")
    print("| method |" + "".join(f" {folder.name} |" for folder in options.models))
    print("|---|" + "---|" * len(options.models))
    for method in METHODS:
        row = f"| {method} |"
        for folder in options.models:
            (file, _), out = recipe(work, folder.resolve(), method, "bfloat16"), work / "out"
            shutil.rmtree(out, ignore_errors=True)
            most = peak([*program, str(file), "--out", str(out), "-q"])
            said = json.loads((out / "mergebench.json").read_text(encoding="utf-8"))["peak_memory"]
            row += f" {most / 1e6:.0f} ({said / 1e6:.0f}) |"
        print(row, flush=True)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
