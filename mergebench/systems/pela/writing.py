"""Tensors of a model written shard by shard, each complete shard kept for a run that is resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE
from mergebench.checkpoint.shards import Shard, ShardFiles, create, write_index
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.values import Values
from mergebench.errors import RunError

CHUNK = 1 << 22  # elements copied at a time


def write_shards(staging: Staging, shards: Sequence[Shard], put: Callable[[ShardFiles, str], None]) -> None:
    """Write the shards that are not complete, `put` every tensor of them, and the index."""
    for shard in shards:
        if shard.file in staging.journal["shards"]:
            continue
        create(staging.directory / shard.file, shard)
        with closing(ShardFiles(staging.directory, [shard])) as written:
            for tensor in shard.tensors:
                put(written, tensor.name)
        staging.complete(shard.file)
    write_index(staging.directory, list(shards))


def copy(values: Values, name: str, written: ShardFiles, target: str, dtype: str | None) -> None:
    """Copy a tensor in pieces: its stored bits, or a float as `dtype`."""
    info = values.tensors[name]
    for start in range(0, info.numel, CHUNK):
        count = min(CHUNK, info.numel - start)
        if dtype is None or not info.is_float:
            written.write(target, start, values.elements(name, start, count))
        else:
            wide = torch.empty(count)
            values.read(name, start, wide)
            written.write(target, start, cast(name, wide, dtype))


def cast(name: str, values: Tensor, dtype: str) -> Tensor:
    """Flat values in a stored type; `RunError` if one does not fit."""
    stored = values.to(TORCH_DTYPE[dtype])
    if not torch.equal(torch.isfinite(stored), torch.isfinite(values)):
        raise RunError(f"{name}: a value is too large for {dtype}", "choose another --dtype")
    return stored
