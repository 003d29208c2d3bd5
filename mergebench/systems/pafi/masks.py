"""PaFi's masks (arXiv:2305.16742): which elements a sparse fine-tune may change, told by the base alone.

The mask has the share of all elements whose magnitudes are smallest, in one ranking or in each tensor: what
pre-training made large is left alone. With a file of Fisher values it has those whose Fisher value is smallest. One
mask serves every task, so that tasks keep their values alone (`adapters extract --as sparse --mask FILE`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergebench.adapters.fine_tune import pieces_of
from mergebench.adapters.smallest import Keys, Ranking, check_length, magnitude_keys
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.model import Model
from mergebench.deltas.formats.masked import MaskFile, read_mask, write_mask
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError

SCOPES = "model", "tensor"


class Made(NamedTuple):
    """A mask that was written."""

    out: Path
    chosen: int
    numel: int
    counts: Mapping[str, int]  # of positions by tensor
    seconds: float


def make_mask(
    model: str,
    out: str | Path,
    *,
    share: float,
    fisher: str | None = None,
    scope: str = "model",
    include: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """Write the mask of the `share` of elements with the smallest magnitudes, or Fisher values, as the file `out`.

    fisher: a safetensors file with the model's tensor names and shapes: F = mean of the squared gradients. scope: one
    ranking over the model, or one in each tensor. include: globs of tensor names (none: every float tensor). The mask
    has exactly round(share * elements) positions, in each tensor with that scope; of equal values the first ones.
    progress: called with the elements read and how many will be, each several times.

    Raises `RecipeError` if the settings are invalid, `ModelError` if the files do not fit together.
    """
    started, out = time.perf_counter(), Path(out)
    if scope not in SCOPES:
        raise RecipeError(f"--scope: '{scope}' is not possible", " or ".join(SCOPES))
    if not 0 < share <= 1:
        raise RecipeError(f"--smallest: must be above 0, at most 1, got {share:g}", "such as 0.5%")
    if out.suffix != ".safetensors" or out.is_dir():
        raise RecipeError(f"{out}: a mask is a file, MASK.safetensors")
    base = open_model(model)
    ranked = base if fisher is None else _fisher(fisher, base)
    _check_out(out, [*base.headers, *ranked.headers], overwrite)
    sizes = _sizes(base, include, ranked)
    done, total = 0, Ranking.reads * sum(sizes.values())
    with Files() as files, torch.inference_mode():
        values = ranked.values(files)

        def keys(name: str) -> Iterator[Keys]:
            nonlocal done
            for piece in pieces_of(values, name):
                if not torch.isfinite(piece).all():
                    raise ModelError(f"{name}: it holds NaN or infinity, which has no rank")
                yield magnitude_keys(piece)
                done += len(piece)
                progress(done, total)

        groups = [list(sizes)] if scope == "model" else [[name] for name in sizes]
        counts, positions = ranked_in(groups, sizes, keys, share)
        if not counts:
            raise RecipeError(f"--smallest: {share:g} of the elements is less than one")
        made = {
            "share": share,
            "scope": scope,
            "by": "magnitude" if fisher is None else "fisher",
            "include": list(include),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_mask(
            out, counts, positions, {name: sizes[name] for name in counts}, identity(base), {"model": model, **made}
        )
    seconds = round(time.perf_counter() - started, 3)
    return Made(out, sum(counts.values()), sum(sizes.values()), counts, seconds)


def ranked_in(
    groups: Sequence[Sequence[str]], sizes: Mapping[str, int], keys: Callable[[str], Iterator[Keys]], share: float
) -> tuple[dict[str, int], Callable[[str], Tensor]]:
    """How many positions each tensor has (none: it is left out), and a function that gives them.

    groups: names of tensors that are ranked together; each group gets round(share * its elements) positions.
    """
    rankings: dict[str, Ranking] = {}
    for group in groups:
        count = round(share * sum(sizes[name] for name in group))
        if count:
            ranking = Ranking(group, keys, count)
            rankings |= {name: ranking for name in group if ranking.counts[name]}
    return {name: one.counts[name] for name, one in rankings.items()}, lambda name: rankings[name].positions(name)


def _sizes(base: Model, include: Sequence[str], ranked: Model) -> dict[str, int]:
    """The number of elements of each tensor to be ranked."""
    infos: dict[str, TensorInfo] = {}
    for name, info in base.tensors.items():
        if info.is_float and info.numel and (not include or any(fnmatchcase(name, glob) for glob in include)):
            infos[name] = info
    if not infos:
        globs = ", ".join(include)
        raise RecipeError(f"--include: '{globs}' names no float tensor of {base.reference}", "globs of tensor names")
    for name, info in infos.items():
        other = ranked.tensors.get(name)
        if other is None or other.shape != info.shape or not other.is_float:
            has = "no such tensor" if other is None else f"{other.dtype} {list(other.shape)}"
            raise ModelError(f"{ranked.reference}: {name}: {has}, {base.reference} has {list(info.shape)}")
        check_length(name, info.numel)
    return {name: info.numel for name, info in infos.items()}


def _fisher(file: str, base: Model) -> Model:
    if Path(file).suffix != ".safetensors":
        raise RecipeError(f"--from: {file}: Fisher values are a .safetensors file with the model's names")
    return open_model(file)


def _check_out(out: Path, headers: Sequence[Any], overwrite: bool) -> None:
    if os.path.realpath(out) in {os.path.realpath(header.file) for header in headers}:
        raise RecipeError(f"{out}: it is an input", "choose another --out")
    if out.exists():
        try:
            read_mask(out)
        except ModelError:
            raise RecipeError(f"{out}: it exists and is no mask", "choose another --out") from None
        if not overwrite:
            raise RecipeError(f"{out}: it exists", "replace it with --overwrite, or choose another --out")


class Shared(NamedTuple):
    """What two masks share, in one tensor or in all."""

    a: int
    b: int
    both: int
    expected: float  # positions that two random masks of these sizes share, on average: a b / elements

    @property
    def jaccard(self) -> float:
        """The share of the positions of either that are in both; 1 for two empty masks."""
        either = self.a + self.b - self.both
        return self.both / either if either else 1.0


def overlap(one: str | Path, other: str | Path) -> tuple[Shared, dict[str, Shared]]:
    """What two masks share: in all, and by tensor. A tensor that a mask leaves out has no position there.

    Expected in all is the sum over the tensors: that of random masks with as many positions in each tensor.
    Raises `ModelError` if one is no mask, or they belong to tensors of other sizes.
    """
    a, b = (read_mask(Path(file)) for file in (one, other))
    for name in a.sizes.keys() & b.sizes.keys():
        if a.sizes[name] != b.sizes[name]:
            raise ModelError(
                f"{other}: {name}: {b.sizes[name]} elements, {one} has {a.sizes[name]}", "masks of one model"
            )
    shared: dict[str, Shared] = {}
    with Files() as files:
        for name in dict.fromkeys([*a.sizes, *b.sizes]):
            first, second = (_positions(files, mask, name) for mask in (a, b))
            both = len(np.intersect1d(first.numpy(), second.numpy(), assume_unique=True))
            numel = {**a.sizes, **b.sizes}[name]
            shared[name] = Shared(len(first), len(second), both, len(first) * len(second) / numel)
    sums = (sum(getattr(one, field) for one in shared.values()) for field in Shared._fields)
    return Shared(*sums), shared


def _positions(files: Files, mask: MaskFile, name: str) -> Tensor:
    info = mask.positions.get(name)
    return torch.empty(0, dtype=torch.int32) if info is None else whole(files, info)
