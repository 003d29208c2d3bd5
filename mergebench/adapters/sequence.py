"""Merge the adapters of a sequence of tasks, each toward the mean of the earlier adapters.

    A_b' = (1 - alpha) A_b + alpha / (b - 1) (A_1 + .. + A_b-1)

Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning" (arXiv:2412.09441), merges after
every step of training; this file merges once, after training. It works on the stored tensors of adapters of any type,
if their numbers mean the same. For LoRA, the averages of A and of B do not multiply to the average of B A.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.adapters import cards, peft_directory
from mergebench.adapters.stored import Stored, check_alike, read_stored, together
from mergebench.checkpoint.files import TORCH_DTYPE, Files, copy_file, write_error
from mergebench.checkpoint.reference import reference_of
from mergebench.checkpoint.shards import OutTensor, Shard, ShardFiles, create
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target
from mergebench.engine.machine import keep_freed_memory, one_thread
from mergebench.engine.run import Result
from mergebench.errors import RecipeError, RunError

ALPHA = 0.1  # the paper's


def merge_sequence(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    alpha: float = ALPHA,
    every: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the last adapter, merged toward the mean of the earlier adapters, into the directory `out`.

    adapters: PEFT directories of one type, `org/name[@revision]`, or single .safetensors files, in the order of their
    tasks; settings and tensors must be alike. alpha: the share of the mean, 0 to 1. every: write all adapters instead,
    the b-th merged toward the mean of the first b - 1 inputs; names are kept. The first adapter is copied byte for
    byte, and so is every adapter at alpha 0. Computed in float32, stored in each adapter's own type. progress: called
    with the elements done and the total.

    Raises `RecipeError` if the settings are invalid, `ModelError` if the adapters do not fit together, `RunError` if
    the work fails.
    """
    started = time.perf_counter()
    out = Path(out)
    if not adapters:
        raise RecipeError("no adapter to merge")
    if not 0 <= alpha <= 1:
        raise RecipeError(f"--alpha: must be from 0 to 1, got {alpha:g}", "the share of the mean; 0.1 is the paper's")
    read = [read_stored(adapter) for adapter in adapters]
    check_alike(read)
    written = range(len(read)) if every else range(len(read) - 1, len(read))
    _check_names([read[at] for at in written])
    check_target(out, [adapter.path for adapter in read], overwrite)
    check_room(out, sum(read[at].header.stamp.size for at in written))
    keep_freed_memory()
    with Staging(out, "", resume=False) as staging, one_thread(), ExitStack() as stack:
        opened: dict[int, ShardFiles] = {}
        for at in written:
            place = staging.directory / read[at].name if every and read[at].is_directory else staging.directory
            shard = _begin(read[at], place, copied=not at or not alpha)
            if shard is not None:
                opened[at] = stack.enter_context(closing(ShardFiles(place, [shard])))
        with Files() as files:
            _merge(files, read, alpha, opened, progress)
        provenance = _provenance(read, alpha, every, [read[at].name for at in written if at not in opened])
        provenance = staging.finish(provenance, started, overwrite, cards.sequence_card(out, provenance))
    return Result(out, provenance)


def merged(sequence: Iterable[Tensor], alpha: float) -> Iterator[Tensor]:
    """Merge each of a sequence of tensors toward the mean of the earlier ones; the first stays unchanged.

    The result lies between its two inputs, so equal adapters stay unchanged, bit for bit.
    """
    mean = None
    for count, value in enumerate(sequence, 1):
        yield value if mean is None else torch.lerp(value, mean, alpha)
        mean = value if mean is None else torch.lerp(mean, value, 1 / count)


def _merge(
    opened: Files,
    read: Sequence[Stored],
    alpha: float,
    written: dict[int, ShardFiles],
    progress: Callable[[int, int], None],
) -> None:
    done, total = 0, sum(info.numel for info in read[-1].tensors.values())
    for name, info in read[-1].tensors.items():
        for start, rows in together(opened, read, name):
            for at, value in enumerate(merged(rows, alpha) if info.is_float else rows):
                if at in written:
                    if info.is_float and not torch.isfinite(value).all():
                        raise RunError(f"{name}: the adapters are too far apart for float32")
                    written[at].write(name, start, value.to(TORCH_DTYPE[read[at].tensors[name].dtype]))
            done += rows[-1].numel()
            progress(done, total)


def _check_names(read: Sequence[Stored]) -> None:
    """Check that names are unique, because each output gets its adapter's name."""
    name, count = Counter(adapter.name for adapter in read).most_common(1)[0]
    if count > 1:
        paths = " and ".join(str(adapter.path) for adapter in read if adapter.name == name)
        raise RecipeError(f"--all: {paths} would both be written as '{name}'", "link or copy them under other names")


def _begin(adapter: Stored, place: Path, copied: bool) -> Shard | None:
    """Create the files of an adapter: copied, or with room for new values in its tensors."""
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(place, error) from None
    for file in adapter.files[: None if copied else -1]:
        copy_file(file, place / file.name)
    if copied:
        return None
    tensors = tuple(OutTensor(info.name, info.dtype, info.shape, info.nbytes) for info in adapter.header.tensors)
    shard = Shard(adapter.header.file.name, tensors, adapter.header.metadata)
    create(place / shard.file, shard)
    return shard


def _provenance(read: Sequence[Stored], alpha: float, every: bool, copied: Sequence[str]) -> dict[str, Any]:
    last = read[-1]
    notes = peft_directory.different_bases([adapter.base for adapter in read])
    if last.kind == "LORA" and len(read) > 1:
        notes.append("A and B are averaged apart, which is not averaging what they do, B A: --method linear does that")
    return {
        "mergebench": __version__,
        "command": "adapters merge",
        "method": {"name": "ema", "alpha": alpha, "all": every},
        "space": "stored",
        "kind": last.kind,
        "copied": list(copied),
        "adapters": [{"adapter": reference_of(adapter.path), "base_model": adapter.base} for adapter in read],
        "notes": notes,
        "tensors": len(last.tensors),
        "parameters": last.parameters,
        "inputs": [entry for adapter in read for entry in peft_directory.inputs(adapter.files)],
    }
