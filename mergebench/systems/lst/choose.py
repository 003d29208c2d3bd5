"""Which rows and columns of a model's tensors a side network keeps: structural pruning, as LST makes its side network.

    chain     arXiv:2206.06522: each layer reads what the layer before it wrote, and keeps the rows of its own that
              matter most. The residual stream has another set of dimensions after every sublayer.
    shared    one set of dimensions of the residual stream, in every layer: sums add what belongs together

The importance of an element is its magnitude, or its Fisher value. Rows of query, key and value that are multiplied in
one head, and rows of an MLP's gate and up, are kept by the product of their importances, element by element. In
float64: a product of three Fisher values is below what float32 can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergebench.systems.lst.layout import Attend, Feed, Follow, Heads, Layout, Read, config_of, left_of, smaller

Importance = Callable[[str], Iterator[Tensor]]  # of a tensor of the files: its importances in blocks of rows
BASES = ("chain", "shared")


@dataclass(frozen=True)
class Cut:
    """What is kept of a tensor; None: all."""

    source: str  # its name in the base's files
    rows: Tensor | None = None
    columns: Tensor | None = None  # of a matrix


@dataclass
class Choice:
    """What is kept of a model."""

    layers: list[int]
    width: int
    heads: Heads
    config: dict[str, object] = field(default_factory=dict)  # changes to config.json
    cuts: dict[str, Cut] = field(default_factory=dict)  # by names in the side network's files
    residual: list[Tensor] = field(default_factory=list)  # the set at each block's input, and after the last


def top(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest scores, in order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def choose(layout: Layout, reduction: float, layers: Sequence[int], importance: Importance, basis: str) -> Choice:
    """What a side network keeps of a base; `RecipeError` if no heads fit the width."""
    width, heads = smaller(layout, reduction)
    return _Walk(layout, reduction, importance, Choice(list(layers), width, heads), basis).walk()


class _Walk:
    """Through the model, in the order in which it is computed; `kept` is the residual's set."""

    def __init__(self, layout: Layout, reduction: float, importance: Importance, choice: Choice, basis: str) -> None:
        self._layout, self._reduction, self._importance = layout, reduction, importance
        self._choice, self._basis = choice, basis
        self._feed = 0

    def walk(self) -> Choice:
        layout, choice = self._layout, self._choice
        embeddings = [f"{stem}.weight" for stem in layout.family.embeddings]
        if self._basis == "shared":
            scores = self._votes(embeddings)
        else:
            scores = torch.stack([self._sums(name, 1) for name in embeddings]).sum(0)
        self._kept = top(scores, choice.width)
        for name in embeddings:
            self._cut(name, None, self._kept)
        for step in layout.family.first:
            self._take(step)
        for part in layout.parts(choice.layers):
            choice.residual.append(self._kept)
            for step in part.steps:
                self._take(step)
        choice.residual.append(self._kept)
        for step in layout.family.last:
            if layout.tensors_of(step):
                self._take(step)
        choice.cuts |= {name: Cut(name) for name in layout.copied}
        choice.config |= config_of(layout, choice.width, choice.heads, self._feed, choice.layers)
        choice.cuts = {new: choice.cuts[new] for new in self._in_order()}
        return choice

    def _in_order(self) -> Iterator[str]:
        """The new names in the order of the base's files."""
        by_source = {cut.source: new for new, cut in self._choice.cuts.items()}
        return (by_source[name] for name in self._layout.model.tensors if name in by_source)

    def _take(self, step: object) -> None:
        if isinstance(step, Follow):
            self._layer(step.stem, self._kept, None)
        elif isinstance(step, Attend):
            self._attend(step)
        elif isinstance(step, Feed):
            self._feed_forward(step)
        elif isinstance(step, Read):
            self._layer(step.stem, self._written(step.stem, self._kept) if step.square else None, self._kept)

    def _attend(self, step: Attend) -> None:
        layout, old, new = self._layout, self._layout.heads, self._choice.heads
        group = old.queries // old.keys
        query, key, value = (self._whole(f"{stem}.weight")[:, self._kept] for stem in step[:3])
        shared = (key * value).view(old.keys, 1, old.size, -1)
        rows = (query.view(old.keys, group, old.size, -1) * shared).sum(-1)  # [keys, group, size]
        keys = top(rows.sum((1, 2)), new.keys)
        every = torch.arange(old.queries * old.size).view(old.keys, group, old.size)
        read, asked = [], []
        for one in keys.tolist():
            heads = top(rows[one].sum(1), new.queries // new.keys)
            dims = top(rows[one].sum(0), new.size)  # keys have the dimensions of all their queries
            asked += [every[one, head, dims] for head in heads.tolist()]
            read.append(one * old.size + dims)
        queried, kept = torch.cat(asked), torch.cat(read)
        for stem, chosen in zip(step[:3], (queried, kept, kept), strict=True):
            self._layer(stem, chosen, self._kept)
        for stem in step.norms:
            if f"{stem}.weight" in layout.names:
                self._layer(stem, None, None)
        self._write(step.out, queried)

    def _feed_forward(self, step: Feed) -> None:
        product = torch.ones((), dtype=torch.float64)
        for stem in step.ups:
            product = product * self._whole(f"{stem}.weight")[:, self._kept]
        self._feed = left_of(len(product), self._reduction)
        rows = top(product.sum(1), self._feed)
        for stem in step.ups:
            self._layer(stem, rows, self._kept)
        self._write(step.down, rows)

    def _write(self, stem: str, columns: Tensor) -> None:
        """A layer that writes the residual."""
        self._kept = self._written(stem, columns)
        self._layer(stem, self._kept, columns)

    def _written(self, stem: str, columns: Tensor) -> Tensor:
        if self._basis == "shared":
            return self._kept
        return top(self._whole(f"{stem}.weight")[:, columns].sum(1), self._choice.width)

    def _votes(self, embeddings: Sequence[str]) -> Tensor:
        """Of each dimension of the residual: every tensor that reads or writes it has one vote to share out."""
        pairs = [(name, 1) for name in embeddings]
        for step in self._layout.steps(self._choice.layers):
            if isinstance(step, Attend):
                pairs += [(f"{stem}.weight", 1) for stem in step[:3]] + [(f"{step.out}.weight", 0)]
            elif isinstance(step, Feed):
                pairs += [(f"{stem}.weight", 1) for stem in step.ups] + [(f"{step.down}.weight", 0)]
        sums = [self._sums(name, axis) for name, axis in pairs]
        return torch.stack([one / one.sum().clamp(min=1e-300) for one in sums]).sum(0)

    def _sums(self, name: str, axis: int) -> Tensor:
        """Importances added up, for each column (1) or row (0)."""
        blocks = [block.sum(1 - axis) for block in self._importance(self._layout.names[name])]
        return torch.stack(blocks).sum(0) if axis else torch.cat(blocks)

    def _whole(self, name: str) -> Tensor:
        return torch.cat(list(self._importance(self._layout.names[name])))

    def _layer(self, stem: str, rows: Tensor | None, columns: Tensor | None) -> None:
        """A layer's weight, and its bias if it has one."""
        for name, across in ((f"{stem}.weight", columns), (f"{stem}.bias", None)):
            if name in self._layout.names:
                self._cut(name, rows, across)

    def _cut(self, name: str, rows: Tensor | None, columns: Tensor | None) -> None:
        source = self._layout.names[name]
        inside = f"{self._layout.family.blocks}."
        new = source
        if name.startswith(inside):
            number, _, rest = name.removeprefix(inside).partition(".")
            before = source.removesuffix(name)
            new = f"{before}{inside}{self._choice.layers.index(int(number))}.{rest}"
        self._choice.cuts[new] = Cut(source, rows, columns)
