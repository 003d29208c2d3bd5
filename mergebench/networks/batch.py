"""Cut items into batches, and run batches on every core.

On a CPU each batch runs on one thread and several run at once: small batches stay in the cache, no
thread waits for another at every layer (which, on a machine busy with other work, costs several times
the work itself), and the bits do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from mergebench.engine.machine import one_thread
from mergebench.networks.loadable import Tick

T = TypeVar("T")

CPU_TOKENS, GPU_TOKENS = 512, 32_768  # in a batch, padding included


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Batches of positions of items of similar length, at most `tokens` each with padding; the longest items first.

    The order is by length, then by position. An item longer than `tokens` is a batch of its own.
    """
    out: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # the batch's first item is its longest
        if not out or lengths[out[-1][0]] * (len(out[-1]) + 1) > tokens:
            out.append([])
        out[-1].append(position)
    return out


def run_batches(
    work: Callable[[list[int]], T], groups: list[list[int]], device: torch.device, tick: Tick, in_turn: bool = False
) -> list[T]:
    """The results of `work` on every batch, in order; `tick` gets the number of items of each finished batch.

    in_turn: run batches one after the other.
    """

    def collect(results: Iterable[T]) -> list[T]:
        done = []
        for group, result in zip(groups, results, strict=True):
            done.append(result)
            tick(len(group))
        return done

    if device.type != "cpu":
        return collect(map(work, groups))
    cores = 1 if in_turn else torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return collect(pool.map(work, groups))
        finally:
            pool.shutdown(cancel_futures=True)
