"""The memory of training: bytes that autograd keeps for the backward pass, and the process's peak."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class Count:
    """Bytes of the storages that the graph keeps, each once, without the network's own parameters."""

    bytes: int = 0


@contextmanager
def saved_by_autograd(student: nn.Module) -> Iterator[Count]:
    """Count what forward passes inside the context keep for the backward pass."""
    network = getattr(student, "network", None)
    module = student if network is None else network.module
    known = {one.untyped_storage().data_ptr() for owner in (module, student) for one in owner.parameters()}
    known |= {one.untyped_storage().data_ptr() for one in module.buffers()}
    count, seen = Count(), dict[int, Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        # Without its node: one that keeps its own output (tanh) would hold itself, and all before it, for ever, where
        # no backward pass frees it, such as a pooler's.
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        if place not in known and place not in seen:
            seen[place] = tensor  # held, so that no other gets its place
            count.bytes += tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def reset_peak() -> None:
    """Begin a new measurement of the peak, where the system allows it; what earlier runs left goes first.

    glibc keeps what is freed between blocks in use: half a gigabyte a run, if it is not told to give it back.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """The largest resident set since `reset_peak`, in bytes; since the process began, where it cannot be reset."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
