"""PELA's low-rank model, trained (arXiv:2310.10700): every linear layer is a product of two, from the first step on.

    W' = B A,  r = in out // (ratio (in + out))

The factors start at the truncated singular value decomposition, sqrt(S) on either side, or as the control at random as
new layers do. They are trained with all other weights, in factored form: the product is never made, a step takes
1 / ratio of the products of a dense layer. What is saved is what `mergebench compress` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear

from mergebench import __version__
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import DTYPE_NAME, Files, write_atomically
from mergebench.checkpoint.model import FACTORS
from mergebench.checkpoint.shards import lay_out, write_index, write_shard
from mergebench.checkpoint.side_files import copy_side_files
from mergebench.deltas.formats.compressed import RECORD
from mergebench.deltas.svd import truncate
from mergebench.engine.plan import SHARD_SIZE
from mergebench.errors import RecipeError
from mergebench.parameters import param
from mergebench.systems.pela.layers import Layers, find, rank_of, written_as
from mergebench.training.attached import Attached, Base, OnTensors, Put, Weight, uniform
from mergebench.training.declared import trained


@dataclass(frozen=True, kw_only=True)
class Params:
    """The settings of PELA's model."""

    ratio: float = param(2.0, "how many times fewer parameters each linear layer has", low=1)
    start: str = param("svd", "of the factors: the base's singular values, or random", choices=("svd", "random"))
    omit: list[str] = param([], "globs of weights that stay dense")


class Factors(NamedTuple):
    """A layer's factors, and the base's weight."""

    outer: nn.Parameter  # [out, r]
    inner: nn.Parameter  # [r, in]
    dense: Tensor  # [out, in]


@trained(paper="arXiv:2310.10700")
def pela(base: Base, p: Params) -> Attached:
    """Linear layers as products of two, and all other weights: PELA."""
    try:
        layers = find(base.model, p.ratio, p.omit)
    except RecipeError as error:
        raise RecipeError(error.message.removeprefix("--"), error.hint) from None
    weights = base.weights
    names = [name for name in layers.factored if name in weights]
    if not names:
        raise RecipeError(
            f"ratio: {p.ratio:g}: no linear layer of {base.model.reference} has a rank", "a smaller ratio"
        )
    return Factored(base, p, layers, {name: _factors(weights[name], base, p) for name in names})


def _factors(weight: Weight, base: Base, p: Params) -> Factors:
    dense = weight.values.T if weight.in_out else weight.values
    rows, columns = dense.shape
    rank = rank_of((rows, columns), p.ratio)
    if p.start == "random":
        inner, outer = uniform((rank, columns), base.generator), uniform((rows, rank), base.generator)
        return Factors(outer, inner, dense)
    found = truncate(dense.contiguous(), rank, full=True)
    return Factors(nn.Parameter(found.b.contiguous()), nn.Parameter(found.a.contiguous()), dense)


def _put(one: Factors, in_out: bool) -> Put:
    def product(weight: Tensor) -> Tensor:
        made = one.outer @ one.inner
        return made.T if in_out else made

    named = {"b": one.outer, "a": one.inner}
    return Put(product, named, "factored", folds=True, layer=partial(_layer, one))


def _layer(one: Factors, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(linear(x, one.inner), one.outer, bias)


class Factored(OnTensors):
    """A network whose linear layers are products of two; all its parameters are trained."""

    def __init__(self, base: Base, p: Params, layers: Layers, factors: Mapping[str, Factors]) -> None:
        super().__init__(base, {name: _put(one, layers.in_out) for name, one in factors.items()})
        self.factors, self._settings, self._layers = dict(factors), p, layers
        whole = {name: one for name, one in self._in_memory().items() if isinstance(one, nn.Parameter)}
        for one in whole.values():
            one.requires_grad_()
        seen: set[int] = set()
        self.parameters |= {n: one for n, one in whole.items() if not (id(one) in seen or seen.add(id(one)))}  # type: ignore[func-returns-value]

    def about(self) -> Mapping[str, Any]:
        """How many layers are products."""
        return {"factored": len(self.factors)}

    def save(self, directory: Path) -> None:
        """A compressed checkpoint in float32, as `mergebench compress` writes it."""
        model, whole = self._base.model, self._in_memory()
        infos, tensors = [], {}
        with Files() as files:
            values = model.values(files)
            for name, info in model.tensors.items():
                if name in self.factors:
                    parts: tuple[Tensor, ...] = (self.factors[name].inner, self.factors[name].outer)
                else:
                    parts = (whole[name] if name in whole else values.whole(name),)
                for key, part in zip(written_as(name, self.factors), parts, strict=True):
                    tensors[key] = part.detach().cpu().contiguous()
                    infos.append(info._replace(name=key, shape=tuple(part.shape), scale=None))
        dtypes = {key: DTYPE_NAME[one.dtype] for key, one in tensors.items()}
        shards = lay_out(infos, dtypes, SHARD_SIZE, naming=model.naming)
        shards = [replace(shard, metadata=FACTORS) for shard in shards]
        for shard in shards:
            write_shard(directory, shard, tensors.__getitem__)
        write_index(directory, shards)
        copy_side_files(model, directory, "F32")
        write_atomically(directory / RECORD, json.dumps(self._record(), indent=1) + "\n")

    def _record(self) -> dict[str, Any]:
        model = self._base.model
        entries: dict[str, Any] = {
            name: {"shape": list(model.tensors[name].shape), "left": why} for name, why in self._layers.left.items()
        }
        for name, one in self.factors.items():
            entries[name] = {"shape": list(model.tensors[name].shape), "rank": len(one.inner)}
        return {
            "mergebench": __version__,
            "command": "train",
            "model": model.reference,
            "identity": identity(model),
            "task_vector": False,
            "ratio": self._settings.ratio,
            "start": self._settings.start,
            "omit": self._settings.omit,
            "stored": "[in, out]" if self._layers.in_out else "[out, in]",
            "tensors": entries,
        }

    def _in_memory(self) -> dict[str, Tensor]:
        """The tensors of the files that are in the network and no products."""
        places = self._base.network.places
        return {name: getattr(*several[0]) for name, several in places.items() if several and name not in self.factors}
