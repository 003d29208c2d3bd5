"""LoRA of bare parameters (`target_parameters`), such as the experts of a mixture in one tensor.

    W'[e] = W[e] + s B_e A_e,  B_e = B.view(out, r, E)[:, :, e],  A_e = A.view(E, r, in)[e]

A [E r, in] and B [out, r E] hold the factors of all E experts of a tensor [E, out, in]. PEFT before 0.19 took every
tensor as [E, in, out], so that its product is the transpose; so it still does for models that store experts that way.
The shapes tell which; of square experts, other parameters of the adapter, or the version of PEFT. A model that stores
experts apart takes each expert's part (`checkpoint/experts.py` has the names).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.experts import layout
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import Part
from mergebench.checkpoint.laid_out import columns, rows
from mergebench.checkpoint.stacked import stacked
from mergebench.deltas.low_rank import low_rank
from mergebench.deltas.peft.directory import OTHER_MODEL
from mergebench.deltas.peft.factors import read_factors
from mergebench.deltas.peft.names import Placing
from mergebench.errors import ModelError

_ORDER = ("gate_up_proj", "down_proj")  # as modules define them: PEFT wraps the first first
_IN_OUT = ("gpt_oss", "aria", "openai_privacy_filter")  # models whose experts PEFT knows to be [E, in, out]


@dataclass(frozen=True)
class Wrapped:
    """The factors of the bare parameters of one module, the innermost wrapper first."""

    module: str
    parameters: tuple[str, ...]  # names that `target_parameters` may mean
    factors: tuple[Mapping[str, TensorInfo], ...]


class Target(NamedTuple):
    """A parameter as the base stores it."""

    parameter: str
    shape: tuple[int, int, int]  # experts, rows, columns
    tensor: str | None  # None: its experts are stored apart
    prefix: str = ""  # of experts stored apart
    words: tuple[str, ...] = ()  # of experts stored apart: their weights, one below the other in the parameter


def take_wrapped(
    parts: dict[str, dict[str, TensorInfo]], config: Mapping[str, Any]
) -> tuple[dict[str, Wrapped], dict[str, dict[str, TensorInfo]]]:
    """The modules whose bare parameters are adapted, and the other parts."""
    wanted = [str(name) for name in config.get("target_parameters") or []]
    groups: dict[str, list[str]] = {}
    for name in parts:
        groups.setdefault(re.sub(r"(\.base_layer)+$", "", name), []).append(name)
    wrapped: dict[str, Wrapped] = {}
    others: dict[str, dict[str, TensorInfo]] = {}
    for module, names in groups.items():
        found = tuple(dict.fromkeys(_parameters(module, wanted, nested=len(names) > 1)))
        if found and any({"A", "B"} & parts[name].keys() for name in names):
            inside = sorted(names, key=len, reverse=True)
            wrapped[module] = Wrapped(module, found, tuple(parts[name] for name in inside))
        else:
            others |= {name: parts[name] for name in names}
    return wrapped, others


def _parameters(module: str, wanted: list[str], nested: bool) -> Iterator[str]:
    """The parameters of a module that `target_parameters` may mean."""
    for target in wanted:
        owner, _, parameter = target.rpartition(".")
        if f".{module}".endswith(f".{owner}") if owner else nested or module.endswith("experts"):
            yield parameter


def names_of(wrapped: Mapping[str, Wrapped], base: Base) -> dict[str, None]:
    """The names by which the base's tensors are looked for."""
    found = layout(base.tensors)
    words = None if found is None else found.words
    return {
        f"{one.module}.0.{words[0]}.weight" if words and parameter in _ORDER else f"{one.module}.{parameter}": None
        for one in wrapped.values()
        for parameter in one.parameters
    }


def put_wrapped(
    directory: Path, wrapped: Mapping[str, Wrapped], config: Mapping[str, Any], placing: Placing, base: Base
) -> None:
    """Put the factors of bare parameters on the base's tensors."""
    chosen = [
        (one, target, factors)
        for one in wrapped.values()
        for target, factors in _assigned(directory, one, _targets(one, placing, base))
    ]
    ways = {_turned(target, factors) for _, target, factors in chosen} - {None}
    for one, target, factors in chosen:
        turned = _turned(target, factors)
        if turned is None:
            turned = ways == {True} if len(ways) == 1 else _turned_by_version(directory, one.module, config, base)
        _put(directory, one, target, factors, turned, config, placing)


def _targets(one: Wrapped, placing: Placing, base: Base) -> list[Target]:
    """The parameters that the base has."""
    known = layout(base.tensors)
    words = None if known is None else known.words
    found = []
    for parameter in one.parameters:
        if words and parameter in _ORDER:
            first = placing.known(f"{one.module}.0.{words[0]}.weight")
            if first is None:
                continue
            prefix = first.removesuffix(f".0.{words[0]}.weight")
            numbers = itertools.count()
            count = next(n for n in numbers if f"{prefix}.{n}.{words[0]}.weight" not in base.tensors)
            inner, outer = base.tensors[first].shape
            shape = (count, 2 * inner, outer) if parameter == _ORDER[0] else (count, outer, inner)
            theirs = words[:2] if parameter == _ORDER[0] else words[2:]
            found.append(Target(parameter, shape, None, prefix, theirs))
        else:
            name = placing.known(f"{one.module}.{parameter}")
            sizes = () if name is None else base.tensors[name].shape
            if len(sizes) in (2, 3):
                found.append(Target(parameter, (1, *sizes)[-3:], name))  # type: ignore[arg-type]
    return found


def _assigned(directory: Path, one: Wrapped, targets: list[Target]) -> list[tuple[Target, Mapping[str, TensorInfo]]]:
    """Which factors are which parameter's, by shapes; of equal ones, the inner is the one that comes first."""
    names = ", ".join(f"'{one.module}.{name}'" for name in one.parameters)
    if len(targets) != len(one.factors):
        raise ModelError(
            f"{directory}: {one.module}: {len(one.factors)} pairs of factors, the base has {len(targets)} of {names}",
            OTHER_MODEL,
        )
    for factors in one.factors:
        read_factors(directory, one.module, factors, {"lora_alpha": 1})  # that they multiply
    fitting = [
        order
        for order in itertools.permutations(targets)
        if all(_fits(target, factors) for target, factors in zip(order, one.factors, strict=True))
    ]
    if not fitting:
        shapes = ", ".join(f"{list(factors['A'].shape)} and {list(factors['B'].shape)}" for factors in one.factors)
        theirs = ", ".join(str(list(target.shape)) for target in targets)
        raise ModelError(f"{directory}: {one.module}: factors {shapes} do not fit {names}: {theirs}", OTHER_MODEL)
    if len(fitting) > 1:
        known = [order for order in fitting if [target.parameter for target in order] == list(_ORDER)]
        if not known:
            raise ModelError(f"{directory}: {one.module}: the factors fit each of {names}: nothing says which is whose")
        fitting = known
    return list(zip(fitting[0], one.factors, strict=True))


def _fits(target: Target, factors: Mapping[str, TensorInfo]) -> bool:
    count, height, width = target.shape
    a, b = factors["A"].shape, factors["B"].shape
    return a[0] % count == 0 and (b[0], a[1]) in ((height, width), (width, height) if count > 1 else (height, width))


def _turned(target: Target, factors: Mapping[str, TensorInfo]) -> bool | None:
    """Whether the product is the transpose of the parameter; None if the shapes do not say."""
    count, height, width = target.shape
    if height == width and count > 1:
        return None
    return (factors["B"].shape[0], factors["A"].shape[1]) != (height, width)


def _turned_by_version(directory: Path, module: str, config: Mapping[str, Any], base: Base) -> bool:
    """Whether PEFT took square experts as [in, out]."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version is None:
        raise ModelError(
            f"{directory}: {module}: its experts are square, and no peft_version says which way round the factors are",
            "add the version of PEFT that wrote it to adapter_config.json",
        )
    text = base.config.get("text_config")
    kinds = {base.config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None}
    return (int(version[1]), int(version[2])) < (0, 19) or any(str(kind).startswith(_IN_OUT) for kind in kinds)


def _put(
    directory: Path,
    one: Wrapped,
    target: Target,
    found: Mapping[str, TensorInfo],
    turned: bool,
    config: Mapping[str, Any],
    placing: Placing,
) -> None:
    count, height, width = target.shape
    key = f"{one.module}.{target.parameter}"
    a, b = found["A"], found["B"]
    rank = a.shape[0] // count
    single = {**found, "A": rows(a, 0, rank), "B": columns(b, 0, b.shape[1], count)}
    scale = read_factors(directory, one.module, single, config, key).scale

    def parts(expert: int, first: int, stop: int) -> dict[str, Part | TensorInfo | None]:
        """The factors of some rows of an expert."""
        if turned:
            left = rows(a, expert * rank, rank)
            left = left if stop - first == height else columns(left, first, stop)
            return {"b": Part(left, transposed=True), "a": Part(columns(b, expert, b.shape[1], count), transposed=True)}
        left = columns(rows(b, first, stop - first), expert, b.shape[1], count)
        return {"b": left, "a": rows(a, expert * rank, rank)}

    if target.tensor is None:
        step = height // len(target.words)
        for expert in range(count):
            for number, word in enumerate(target.words):
                name = f"{target.prefix}.{expert}.{word}.weight"
                placing.put_on(name, key, low_rank, parts(expert, number * step, (number + 1) * step), scale=scale)
    elif count == 1:
        placing.put_on(target.tensor, key, low_rank, parts(0, 0, height), scale=scale)
    else:
        deltas: dict[int, Delta] = {
            expert: low_rank.on((height, width), parts(expert, 0, height), scale=scale) for expert in range(count)
        }
        placing.put_delta(target.tensor, key, stacked(target.shape, height, deltas))
