"""A PEFT type, module by module: `peft_type` makes a format of a function that says what one module's tensors do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import regex

from mergebench.checkpoint.format import Base, Deltas, Format, delta_format
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import DeltaKind, Part
from mergebench.deltas.peft.directory import CONFIG, by_module, holds_no_model, of_type, read_directory
from mergebench.deltas.peft.heads import new_head, with_head
from mergebench.deltas.peft.names import Placing, on_stored, put_whole
from mergebench.deltas.peft.orientation import Orientation
from mergebench.deltas.peft.tokens import untie, with_aliases
from mergebench.errors import ModelError

LONGEST = 2.0  # seconds that a config's regular expression may take: some take as many steps as there are atoms


class Change(NamedTuple):
    """A delta on one tensor of a module."""

    kind: DeltaKind
    parts: Mapping[str, Part | TensorInfo | None]
    settings: Mapping[str, Any] = {}
    tensor: str = "weight"  # of the module: weight or bias
    shape: tuple[int, ...] | None = None  # the tensor seen as another shape, as a convolution's is as a matrix


@dataclass(frozen=True)
class Module:
    """One adapted module: the adapter's tensors, the config, and the base's tensors that it changes."""

    directory: Path
    name: str  # without PEFT's prefix
    parts: Mapping[str, TensorInfo]  # by the names given to `peft_type`, this module's and those of all modules
    config: Mapping[str, Any]
    weight: TensorInfo  # the base's
    bias: TensorInfo | None
    in_out: bool = False  # whether the base stores the weight [in, out] (GPT-2's Conv1D)
    changed: bool = False  # deltas before this one change the weight
    all: Sequence[Module] = field(default=(), repr=False, compare=False)  # the directory's, in the file's order

    @property
    def as_matrix(self) -> tuple[int, int] | None:
        """For `Change.shape`: the shape as a matrix of a weight that is none, as a convolution's."""
        return None if len(self.weight.shape) == 2 else self.out_in

    @property
    def out_in(self) -> tuple[int, int]:
        """[out, in] of the weight as a matrix, whichever way the base stores it; a convolution's is [out, the rest]."""
        shape = self.weight.shape
        rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
        return (columns, rows) if self.in_out else (rows, columns)

    def part(self, name: str, *shape: int | None, floats: bool = True) -> TensorInfo:
        """A part that must be there, of floats or integers, of this shape (None: any size); `ModelError` otherwise."""
        info = self.parts.get(name)
        if info is None:
            raise self.error(f"{name} is missing")
        fits = len(info.shape) == len(shape) and all(w in (None, h) for w, h in zip(shape, info.shape, strict=True))
        if info.is_float != floats or (shape and not fits):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"{name} is {info.dtype} {list(info.shape)}, [{wanted}] was expected")
        return info

    def factors(self, b: str, a: str) -> dict[str, Part | None]:
        """The parts B [out, r] and A [r, in] as `b` and `a` of the weight as it is stored."""
        left = self.part(b, None, None)
        return on_stored(left, self.part(a, left.shape[1], None), self.in_out)

    def setting(self, key: str, pattern: str) -> Any:
        """A value of the config, or the module's own from a pattern such as `alpha_pattern`."""
        return patterned(self.directory, self.name, self.config, pattern, self.config.get(key))

    def error(self, text: str, hint: str | None = None) -> ModelError:
        """A `ModelError` that names the adapter and the module."""
        return ModelError(f"{self.directory}: {self.name}: {text}", hint)


def patterned(directory: Path, module: str, config: Mapping[str, Any], pattern: str, default: Any) -> Any:
    """The value of the first key in `config[pattern]` that matches the end of a module's name, else `default`."""
    keys = config.get(pattern) or {}
    if not isinstance(keys, dict):
        raise ModelError(f"{directory / CONFIG}: {pattern} must map modules to values")
    for key, value in keys.items():
        try:
            if _compiled(key).fullmatch(module, timeout=LONGEST):
                return value
        except regex.error as error:
            raise ModelError(f"{directory / CONFIG}: {pattern}: {key!r} is no regular expression: {error}") from None
        except TimeoutError:
            raise ModelError(f"{directory / CONFIG}: {pattern}: {key!r} takes too long to match") from None
    return default


@cache
def _compiled(key: str) -> Any:
    return regex.compile(rf"(.*\.)?({key})")


def _told(
    shape: Callable[[Mapping[str, TensorInfo]], tuple[int, int]] | None, parts: Mapping[str, TensorInfo]
) -> tuple[int, int] | None:
    try:
        return None if shape is None else shape(parts)
    except (KeyError, IndexError):
        return None  # a part is missing or misshapen: the format's function says which


def peft_type(
    name: str,
    *,
    shared: Iterable[str] = (),
    check: Callable[[Path, Mapping[str, Any]], None] | None = None,
    shape: Callable[[Mapping[str, TensorInfo]], tuple[int, int]] | None = None,
    select: Callable[[Path, dict[str, dict[str, TensorInfo]], Base], dict[str, dict[str, TensorInfo]]] | None = None,
    **suffixes: str,
) -> Callable[[Callable[[Module], Iterable[Change]]], Format]:
    r"""Declare a function `(module) -> changes` as the format of PEFT directories of the type `name`.

    Every tensor of the directory must be a part of a module, shared by all, or saved whole; others are refused by name.

    suffixes: how the names of a module's parts end, as regular expressions, such as `A="hira_A"`; `.default` and
        `.weight` may follow. A group that captures makes several parts: with
        `E="e[.]([0-9]+)"` they are `E.0`, `E.1`, ...
    shared: those of `suffixes` that one tensor holds for all modules.
    check: raises `ModelError` for configs that cannot be folded.
    shape: [out, in] of a module's weight, told by its parts: helps to find it in a base with other names.
    select: takes the parts of all modules and the base, returns those to be read: without copies for tied modules.
    """
    patterns = {part: re.compile(rf"(.+)\.{suffix}(?:\.default)?(?:\.weight)?") for part, suffix in suffixes.items()}
    for part in shared:
        patterns[part] = re.compile(rf"()(?:base_model\.)?{suffixes[part]}(?:\.default)?(?:\.weight)?")

    def declare(function: Callable[[Module], Iterable[Change]]) -> Format:
        def read(directory: Path, base: Base) -> Deltas:
            config, header = read_directory(directory)
            if check is not None:
                check(directory, config)
            modules, whole = by_module(directory, header, config, patterns)
            common = modules.pop("", {})
            if select is not None:
                modules = select(directory, modules, base)
            said = bool(config.get("fan_in_fan_out"))
            shapes: dict[str, tuple[int, ...] | None] = {stored: info.shape for stored, info in whole.items()}
            for module, parts in modules.items():
                out_in = _told(shape, parts)
                shapes[f"{module}.weight"] = out_in[::-1] if out_in is not None and said else out_in
            own, base = base, with_aliases(base, shapes)
            placing, below = Placing(directory, base, shapes), Placing(directory, base, shapes)
            orientation = Orientation(base, said)
            found: list[Module] = []
            names: list[str] = []
            for module, parts in modules.items():
                weight = placing.find(f"{module}.weight")
                bias = base.tensors.get(f"{weight.removesuffix('weight')}bias")
                parts, in_out, changed = {**common, **parts}, orientation.in_out(weight), weight in base.changed
                adapted = Module(directory, module, parts, config, base.tensors[weight], bias, in_out, changed, found)
                found.append(adapted)
                names.append(weight)
            for one, weight in zip(found, names, strict=True):
                for change in function(one):
                    target = weight if change.tensor == "weight" else f"{weight.removesuffix('weight')}{change.tensor}"
                    placing.put_on(target, one.name, change.kind, change.parts, change.shape, **change.settings)
            head = new_head(directory, put_whole(whole, placing, below), config, own)
            if not placing.deltas:
                raise ModelError(f"{directory}: the adapter holds no tensors")
            added, changes = untie(directory, own, base, placing.deltas, keep=False)
            return with_head(Deltas(placing.deltas, [header], first=below.deltas, added=added, config=changes), head)

        read.__name__, read.__doc__ = function.__name__, function.__doc__
        read.__module__, read.__qualname__ = function.__module__, function.__qualname__
        return delta_format(what="an adapter", claims=of_type(name), alone=holds_no_model)(read)

    return declare
