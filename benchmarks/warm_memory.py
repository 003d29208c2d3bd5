"""Hand out memory that is really there to the program being timed. Linux only.

A virtual machine may give memory that has been free for a second back to its host. The next program then
waits for the host at every page it touches first, also in the page cache: up to 20 microseconds each, three
seconds for a checkpoint of 1 GB. So this process touches some memory before the start, and frees it bit by
bit, a little ahead of what is taken.

    python benchmarks/warm_memory.py MIB    (prints "ready" when it holds MIB MiB)
"""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

BLOCK, AHEAD = 16 << 20, 256 << 20


def free() -> int:
    """Bytes of free memory."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))


def main() -> None:
    blocks = [mmap.mmap(-1, BLOCK) for _ in range((int(sys.argv[1]) << 20) // BLOCK)]
    for block in blocks:
        block.write(b"\1" * BLOCK)
    print("ready", flush=True)
    start, freed = free(), 0
    while blocks:
        taken = start + freed - free()
        if freed - taken < AHEAD:
            blocks.pop().close()
            freed += BLOCK
        else:
            time.sleep(0.005)


if __name__ == "__main__":
    main()
