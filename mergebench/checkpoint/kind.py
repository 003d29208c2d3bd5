"""Delta kinds: one function of one row tile that reads like its paper, and a dataclass of its parts.

    @dataclass(frozen=True)
    class Factors:
        b: Tensor                 # read whole, as float32
        a: Tensor
        scale: float = 1.0        # a setting

    @delta_kind(paper="arXiv:2106.09685")
    def low_rank(p: Factors, tile: slice, base: Tensor | None) -> Tensor:
        return p.scale * p.b[tile] @ p.a

Rows are those of the stored tensor, [..., columns] taken as a matrix. The same function folds, streams and trains: `p`
holds tensors read from files, or parameters with gradients.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mergebench.checkpoint.delta import Opened, OpenedParts, Source, matrix_shape, tile_rows
from mergebench.checkpoint.header import FLOATS, Reader, TensorInfo, damaged
from mergebench.plugins import named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Tile = Callable[[Any, slice, Tensor | None], Tensor]
    Fold = Callable[[Any, slice, Tensor], Tensor]
    Exact = Callable[[Any, Source, tuple[int, ...]], tuple[Tensor, Tensor] | None]  # takes what `Prepare` takes

StoredAs = Literal["replacement", "difference"] | None
Check = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any], tuple[int, ...]], None]  # see `delta_kind`
Made = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any], tuple[int, ...]], int]  # takes what `Check` takes
Prepare = Callable[[Any, Source, tuple[int, ...]], Any]  # the parts, W and its shape
DTYPES = {
    "tensor": FLOATS, "tensors": FLOATS, "rows": FLOATS, "indices": {"I64", "I32", "I16", "U8"}, "mask": {"U8"},
}  # fmt: skip


class Part(NamedTuple):
    """One part of a delta: where it is stored, and whether it is read transposed."""

    info: TensorInfo
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape[:: -1 if self.transposed else 1]


class FieldOf(NamedTuple):
    """One field of a kind's dataclass."""

    name: str
    sort: str  # tensor, tensors (parts NAME.0, NAME.1, ...), rows, indices, mask or setting
    default: Any  # dataclasses.MISSING if there is none


@dataclass(frozen=True, eq=False)
class DeltaKind:
    """A kind of delta and its properties."""

    name: str
    function: Tile
    paper: str
    parts: type  # the dataclass the function takes first
    needs_base: Callable[[Any], bool]  # from the settings: whether it is a function of W itself
    folds: Fold | None  # computes W', if W plus a tile is slower or not exact to the bit
    prepare: Prepare | None  # run once when a delta is opened; may read all of W; may raise as `check` does
    whole: bool  # it cannot be cut: one tile has all rows
    energy: Callable[[Any, tuple[int, ...]], float] | None  # |W' - W|^2 in closed form, of parts and shape
    factors: Exact | None  # B and A with W' - W = B A, if that is exact
    made: Made | None  # bytes of what `prepare` makes
    check: Check | None
    validate: Callable[[Any, tuple[int, ...]], None] | None  # raises as `check` does, for the values of the parts
    label: Callable[[Mapping[str, TensorInfo], Mapping[str, Any]], str] | None
    example: Callable[[tuple[int, ...], torch.Generator], Mapping[str, Any] | None] | None
    stored_as: Callable[[Mapping[str, Any]], StoredAs] | None  # from the settings: what its only part is, as stored

    def __call__(self, p: Any, tile: slice, base: Tensor | None) -> Tensor:
        return self.function(p, tile, base)

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.function.__module__, self.function.__qualname__)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def rows(self, shape: tuple[int, ...]) -> int:
        """Rows of a tile of a tensor of this shape, at least one."""
        return max(matrix_shape(shape)[0] if self.whole else tile_rows(shape), 1)

    @cached_property
    def fields(self) -> dict[str, FieldOf]:
        """The fields of its dataclass by name."""
        from mergebench.checkpoint.parts import sort_of  # torch comes with it

        hints = typing.get_type_hints(self.parts, include_extras=True)
        return {f.name: FieldOf(f.name, sort_of(hints[f.name]), f.default) for f in dataclasses.fields(self.parts)}

    def field_of(self, part: str) -> FieldOf | None:
        """The field of a part; one of several tensors is called NAME.0, NAME.1, ..."""
        about, (name, _, number) = self.fields.get(part), part.partition(".")
        if about is None and number.isdecimal():
            about = self.fields.get(name)
            return about if about is not None and about.sort == "tensors" else None
        return about

    def on(self, shape: tuple[int, ...], parts: Mapping[str, Part | TensorInfo | None], **settings: Any) -> StoredDelta:
        """A delta of this kind on a tensor of `shape`, from its stored parts and settings.

        Raises `Misfit` if they belong to another tensor, `ValueError` if they are invalid.
        """
        stored = {
            name: part if isinstance(part, Part) else Part(part) for name, part in parts.items() if part is not None
        }
        for name, about in self.fields.items():
            given = stored if about.sort != "setting" else settings
            if about.default is dataclasses.MISSING and name not in given:
                raise ValueError(f"{self.name} needs '{name}'")
        strange = [n for n in (*stored, *settings) if self.field_of(n) is None]
        if strange:
            raise ValueError(f"{self.name} has no '{strange[0]}'")
        for name, part in stored.items():
            about_part = self.field_of(name)
            if about_part is None or part.info.dtype not in DTYPES.get(about_part.sort, ()):
                raise ValueError(f"'{name}' is {part.info.dtype}")
        everything = {n: f.default for n, f in self.fields.items() if f.sort == "setting"} | settings
        if self.check is not None:
            self.check({name: part.shape for name, part in stored.items()}, everything, shape)
        return StoredDelta(self, shape, tuple(stored.items()), tuple(everything.items()))


class Misfit(ValueError):
    """A delta that is valid, but not for this tensor."""


@dataclass(frozen=True)
class StoredDelta:
    """A delta of any kind as files hold it: a `Delta`."""

    of: DeltaKind
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Part], ...]
    settings: tuple[tuple[str, Any], ...]

    @property
    def kind(self) -> str:
        return self.of.name

    @property
    def needs_base(self) -> bool:
        return self.of.needs_base(self.setting)

    @property
    def folds(self) -> bool:
        return self.of.folds is not None or self.needs_base

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return tuple(part.info for _, part in self.parts)

    @cached_property
    def part(self) -> dict[str, TensorInfo]:
        """The stored parts by name."""
        return {name: part.info for name, part in self.parts}

    @property
    def read(self) -> dict[str, TensorInfo]:
        """The parts by name as the kind gets them: transposed where they are read so."""
        return {name: part.info._replace(shape=part.shape) for name, part in self.parts}

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The settings by name, defaults included."""
        return dict(self.settings)

    @cached_property
    def digest(self) -> str:
        """16 hex digits: a hash of everything outside the stored bytes."""
        parts = [(name, part.info.name, part.info.file.name, part.transposed) for name, part in self.parts]
        text = json.dumps([self.kind, self.shape, parts, sorted(self.setting.items())], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def replacement(self) -> TensorInfo | None:
        return self.parts[0][1].info if self._is == "replacement" else None

    @property
    def difference(self) -> TensorInfo | None:
        return self.parts[0][1].info if self._is == "difference" else None

    @cached_property
    def _is(self) -> StoredAs:
        return None if self.of.stored_as is None else self.of.stored_as(self.setting)

    def resident(self) -> int:
        """Bytes that an opened delta holds: parts that are read whole, what is made of them, tiles and temporaries."""
        rows, columns = matrix_shape(self.shape)
        parts = sum(
            (4 if info.is_float else 8) * info.numel + (info.made.own.nbytes if info.made else 0)
            for name, info in self.part.items()
            if (about := self.of.field_of(name)) is not None and about.sort in ("tensor", "tensors", "indices")
        )
        if self.of.made is not None:
            parts += self.of.made({name: info.shape for name, info in self.read.items()}, self.setting, self.shape)
        return parts + 3 * 4 * min(self.of.rows(self.shape), rows) * columns

    def describe(self) -> str:
        """A few words, such as `low_rank rank 16`."""
        words = "" if self.of.label is None else self.of.label(self.read, self.setting)
        return f"{self.kind} {words}".rstrip()

    def load(self, files: Reader, device: torch.device) -> Any:
        """The kind's dataclass; its parts are in memory, or read row by row on request."""
        from mergebench.checkpoint.parts import load

        values: dict[str, Any] = dict(self.setting)
        stored = dict(self.parts)
        for name, about in self.of.fields.items():
            if about.sort == "tensors":
                several = (stored[f"{name}.{i}"] for i in range(len(stored)) if f"{name}.{i}" in stored)
                values[name] = tuple(load(files, device, *part, "tensor", self.shape) for part in several)
            elif about.sort != "setting":
                part = stored.get(name)
                values[name] = None if part is None else load(files, device, *part, about.sort, self.shape)
        return self.of.parts(**values)

    def open(self, files: Reader, device: torch.device, base: Source) -> Opened:
        """Open the delta for tiles on this device; `base` is W, read once by kinds that need all of it."""
        p = self.load(files, device)
        try:
            if self.of.validate is not None:
                self.of.validate(p, self.shape)
            if self.of.prepare is not None:
                p = self.of.prepare(p, base, self.shape)
        except ValueError as error:
            raise damaged(self.stored[0].file, f"{self.stored[0].name}: {error}") from None
        return OpenedParts(self.of.function, self.of.folds, p, self.of.rows(self.shape), matrix_shape(self.shape)[0])


def delta_kind(
    *,
    paper: str,
    needs_base: bool | Callable[[Any], bool] = False,
    folds: Fold | None = None,
    prepare: Prepare | None = None,
    whole: bool = False,
    energy: Callable[[Any, tuple[int, ...]], float] | None = None,
    factors: Exact | None = None,
    made: Made | None = None,
    check: Check | None = None,
    validate: Callable[[Any, tuple[int, ...]], None] | None = None,
    label: Callable[[Mapping[str, TensorInfo], Mapping[str, Any]], str] | None = None,
    example: Callable[[tuple[int, ...], torch.Generator], Mapping[str, Any] | None] | None = None,
    stored_as: Callable[[Mapping[str, Any]], StoredAs] | None = None,
) -> Callable[[Tile], DeltaKind]:
    """Declare a function `(parts: a dataclass, tile: slice, base) -> W' - W` as a kind of delta.

    The function returns float32 [rows of the tile, columns]; `base` holds these rows of W if the kind needs them, else
    None.

    paper: the source of the formula.
    needs_base: whether it is a function of W; may depend on the settings.
    folds: computes W' itself, if W plus the tile is slower or not exact to the bit; may overwrite `base`.
    prepare: computes what is needed before the first tile; may read all of W, and raise as `check` does.
    made: bytes of what that makes and needs, from shapes and settings as `check` gets them.
    whole: it cannot be cut into tiles.
    energy: |W' - W|^2 in closed form.
    factors: B and A with W' - W = B A, if that is exact; gets what `prepare` gets.
    check: takes the parts' shapes by name, the settings and the tensor's shape; raises `ValueError` if they are
        invalid, `Misfit` if they belong to another tensor.
    validate: the same for parts in memory, if they are small enough to check.
    label: a few words for tables, from stored parts and settings.
    example: parts and settings of a delta on a tensor of a given shape, for `mergebench.testing.check_delta`; None if
        no tensor of this shape can have one.
    stored_as: whether its only part is W' or W' - W as stored, and may be read without tiles.
    """

    def declare(function: Tile) -> DeltaKind:
        names = list(inspect.signature(function).parameters)
        parts = typing.get_type_hints(function).get(names[0]) if len(names) == 3 else None
        if not isinstance(parts, type) or not dataclasses.is_dataclass(parts):
            raise TypeError(f"{function.__name__}: a delta kind takes (parts: a dataclass, tile: slice, base)")
        asks = needs_base if callable(needs_base) else lambda settings, answer=needs_base: answer
        return DeltaKind(
            name=function.__name__,
            function=function,
            paper=paper,
            parts=parts,
            needs_base=asks,
            folds=folds,
            prepare=prepare,
            whole=whole,
            energy=energy,
            factors=factors,
            made=made,
            check=check,
            validate=validate,
            label=label,
            example=example,
            stored_as=stored_as,
        )

    return declare
