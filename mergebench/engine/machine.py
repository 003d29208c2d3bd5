"""The machine: free memory, keeping freed memory in the C allocator, running torch on one thread.

A chunk's temporaries have a size (0.3 to 4 MB) that glibc maps and unmaps at every use by default. Each time the kernel
must find and clear pages, which costs ten times the arithmetic. With higher thresholds freed blocks are reused, and
methods can be written in plain expressions.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mergebench.errors import RecipeError, RunError

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)'s parameters in glibc's malloc.h


def keep_freed_memory() -> None:
    """Serve blocks up to 32 MB from freed memory. Does nothing if the libc is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 128 << 20)


def available_memory() -> int | None:
    """Bytes this process can still take before the kernel kills it; None if the system does not say."""
    found = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError, KeyError):  # the limit of a container
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        found.append(limit - used + int(stat["active_file"]) + int(stat["inactive_file"]))  # caches can be evicted
    return min(found, default=None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the context; afterwards it has as many threads as before."""
    import torch  # `doctor` asks about a machine on which torch cannot be imported

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_descriptors(files: int) -> None:
    """`RunError` if this process may not open so many files more."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files += 16  # a lock, a journal, what is imported late
    try:
        files += len(list(Path("/proc/self/fd").iterdir()))
    except OSError:
        files += 32
    if allowed != resource.RLIM_INFINITY and files > allowed:
        hint = f"allow more: ulimit -n {files}"
        if most != resource.RLIM_INFINITY and files > most:
            hint = "have an administrator allow more, or merge in stages"
        raise RunError(f"{files} files would be open at a time, {allowed} may be", hint)


def device_of(name: str) -> torch.device:
    """auto (CUDA if there is a device), cpu, cuda or cuda:N; `RecipeError` if this machine has no such device."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):  # sums are float64, which MPS does not have
        raise RecipeError(f"--device {name}: not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise RecipeError(f"--device {name}: this machine has no CUDA device", "use --device auto, or cpu")
        if (device.index or 0) >= count:
            raise RecipeError(f"--device {name}: the last CUDA device is cuda:{count - 1}", "use --device cuda")
    return device


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: the small objects of a hundred thousand tensors all stay alive, and scanning them
    repeatedly takes four fifths of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """No garbage is looked for among the objects that live now: those of a plan."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def unshared_memory() -> int:
    """Bytes that this process shares with no other; 0 where that cannot be read."""
    try:  # some sandboxes hide it
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Private_"))
