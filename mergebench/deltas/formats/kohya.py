"""An adapter without a config, as kohya, LyCORIS and diffusers write it: one file, whose names tell all.

    delta W = alpha / r B A,    with a core between the factors of a convolution, as LoHa, as LoKr, or whole;
    W' = m (W + delta W) / |W + delta W|    with DoRA's norms

`kohya/names.py` says what names mean, `kohya/targets.py` where their layers are in the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.documents import parse_json
from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.checkpoint.kind import DeltaKind, Part
from mergebench.checkpoint.naming import find_other_weights, find_weights
from mergebench.checkpoint.stacked import stacked
from mergebench.deltas.dense import dense
from mergebench.deltas.hadamard import hadamard
from mergebench.deltas.kohya.names import Layer, holds_factors, layer, split
from mergebench.deltas.kohya.targets import Target, Targets
from mergebench.deltas.kronecker import kronecker
from mergebench.deltas.low_rank import low_rank
from mergebench.deltas.peft.directory import OTHER_MODEL, is_adapter
from mergebench.deltas.peft.lycoris import hadamard_parts, kronecker_parts
from mergebench.deltas.peft.module import Module, patterned
from mergebench.deltas.peft.names import Placing
from mergebench.deltas.renormed import renormed
from mergebench.deltas.tucker import tucker
from mergebench.errors import MergebenchError, ModelError

_SHOWN = 3
_UNREAD = "a part that is not read (read are LoRA, LoCon, LoHa, LoKr, DoRA's norms and whole differences)"
_SETTINGS = "lora_adapter_metadata"  # in a header of diffusers: the config, its keys after the component's name


def _file(place: Path) -> Path | None:
    """The file of such an adapter."""
    if place.is_dir() and not is_adapter(place) and find_weights(place) is None:
        files = find_other_weights(place)
        place = files[0] if len(files) == 1 else place
    return place if place.suffix == ".safetensors" and place.is_file() else None


def _claims(place: Path) -> bool:
    file = _file(place)
    try:
        return file is not None and holds_factors(tensor.name for tensor in read_header(file).tensors)
    except MergebenchError:
        return False


@delta_format(what="an adapter of kohya, LyCORIS or diffusers", claims=_claims)
def kohya(place: Path, base: Base) -> Deltas:
    """What such a file changes; `ModelError` where a tensor of it has no place in the base, or is not read."""
    file = _file(place)
    assert file is not None
    header = read_header(file)
    layers = _by_layer(file, header)
    found = _targets(file, layers, base)
    config = _config(header)
    placing, after = Placing(file, base, {}), Placing(file, base, {})
    blocks: dict[str, dict[int, Delta]] = {}
    with Files() as files:
        numbers: dict[str, dict[str, float]] = {
            name: {part: float(whole(files, parts[part])) for part in ("alpha", "scalar") if part in parts}
            for name, parts in layers.items()
        }
    for name, parts in layers.items():
        target = found[name]
        weight = base.tensors[target.tensor]._replace(shape=target.shape)
        bias = f"{target.tensor.removesuffix('weight')}bias"
        inner = {part.partition(" ")[2] or part: info for part, info in parts.items()}
        module = Module(file, name, inner, {}, weight, base.tensors.get(bias))
        if "bias" in parts:
            _put(module, placing, bias, (dense, {"values": Part(parts["bias"])}, {}))
        if parts.keys() <= {"bias"}:
            continue
        change = _change(module, parts, _scales(file, name, numbers[name], config))
        if target.block is not None:
            delta = _on_block(module, change, "norms" in parts)
            if target.block in blocks.setdefault(target.tensor, {}):
                raise module.error(f"'{target.tensor}' is changed twice")
            blocks[target.tensor][target.block] = delta
            continue
        _put(module, placing, target.tensor, change, module.as_matrix)
        if "norms" in parts:
            _put(module, after, target.tensor, _norms(module), module.as_matrix)
    for tensor, several in blocks.items():
        shape = base.tensors[tensor].shape
        placing.put_delta(tensor, tensor, stacked(shape, shape[0] // 3, several))
    first = {name: delta for name, delta in placing.deltas.items() if name in after.deltas}
    return Deltas({**placing.deltas, **after.deltas}, [header], first=first)


_Of = tuple[DeltaKind, dict[str, Part | None], dict[str, Any]]


def _put(module: Module, placing: Placing, tensor: str, change: _Of, shape: tuple[int, ...] | None = None) -> None:
    kind, parts, settings = change
    placing.put_on(tensor, module.name, kind, parts, shape, **settings)


def _on_block(module: Module, change: _Of, normed: bool) -> Delta:
    kind, parts, settings = change
    if normed:
        raise module.error("DoRA's norms of a part of a tensor are not read")
    try:
        return kind.on(module.out_in, parts, **settings)
    except ValueError as error:
        raise module.error(str(error)) from None


def _by_layer(file: Path, header: Header) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each layer, by what they are."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        found = split(tensor.name)
        if found is None:
            raise ModelError(f"{file}: {tensor.name}: {_UNREAD}")
        name, part = found
        if part in layers.setdefault(name, {}):
            raise ModelError(f"{file}: {name}: a second {part}: '{tensor.name}'")
        if not tensor.is_float and not (part == "alpha" and tensor.numel == 1):
            raise ModelError(f"{file}: {tensor.name}: {tensor.dtype} instead of floats")
        if part in ("alpha", "scalar") and tensor.numel != 1:
            raise ModelError(f"{file}: {tensor.name}: {list(tensor.shape)} instead of one number")
        layers[name][part] = tensor
    return layers


def _targets(file: Path, layers: Mapping[str, Mapping[str, TensorInfo]], base: Base) -> dict[str, Target]:
    """The base's tensor of each layer; `ModelError` with all that have none."""
    targets, found, lost = Targets(base.tensors), dict[str, Target](), list[Layer]()
    for name, parts in layers.items():
        about = layer(name)
        known = targets.find(about)
        if not known:
            lost.append(about)
            continue
        wanted = _shape(parts)
        fitting = [one for one in known if wanted in (None, one.matrix)]
        if not fitting:
            theirs = " or ".join(f"'{one.tensor}' {list(one.shape)}" for one in known)
            raise ModelError(f"{file}: {name}: it changes {list(wanted or ())}, base has {theirs}", OTHER_MODEL)
        if len(fitting) > 1:
            names = " or ".join(f"'{one.tensor}'" for one in fitting)
            raise ModelError(f"{file}: {name}: it may mean {names}", "rename one of the two: - nothing else tells")
        found[name] = fitting[0]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        what = f"{', '.join(one.name for one in lost[:_SHOWN])}{more}: the base has no such layer"
        elsewhere = {part for one in lost for part in one.components[:1]}
        part = next(iter(elsewhere)) if len(elsewhere) == 1 else None
        way = f"they change the {part}: name the whole pipeline before the '+', or that component"
        hint = way if part is not None and not targets.in_parts and len(lost) < len(layers) else OTHER_MODEL
        raise ModelError(f"{file}: {len(lost)} of {len(layers)} layers fit nothing: {what}", hint)
    return found


def _shape(parts: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """[out, in] of the matrix that a layer's parts change; None where parts are missing or misshapen."""
    shapes = {part: info.shape for part, info in parts.items()}
    try:
        if "A" in parts:
            kernel = math.prod(shapes["core"][2:]) if "core" in parts else 1
            return shapes["B"][0], math.prod(shapes["A"][1:]) * kernel
        if "loha w1_a" in parts:
            core = shapes.get("loha t1")
            rows = shapes["loha w1_a"][0 if core is None else 1]
            return rows, shapes["loha w1_b"][1] * (1 if core is None else math.prod(core[2:]))
        if any(part.startswith("lokr") for part in parts):
            pairs = []
            for number in "12":
                one, left, right = (shapes.get(f"lokr w{number}{end}") for end in ("", "_a", "_b"))
                core = shapes.get("lokr t2") if number == "2" else None
                if one is not None:
                    pairs.append((one[0], math.prod(one[1:])))
                elif left is not None and right is not None:
                    kernel = 1 if core is None else math.prod(core[2:])
                    pairs.append((left[0 if core is None else 1], math.prod(right[1:]) * kernel))
            (a, b), (c, d) = pairs
            return a * c, b * d
    except (KeyError, IndexError, ValueError):
        return None
    whole_one = parts.get("difference")
    if whole_one is None or not whole_one.shape:
        return None
    return whole_one.shape[0], math.prod(whole_one.shape[1:])


def _change(module: Module, parts: Iterable[str], scale_of: Any) -> _Of:
    """The kind of change that a layer's parts are, with its parts and settings."""
    own = set(parts) - {"alpha", "scalar", "norms", "bias"}
    families = {name.split()[0] if " " in name else "difference" if name == "difference" else "lora" for name in own}
    if len(families) != 1:
        raise module.error(f"its parts are {' and '.join(sorted(parts))}: no change of one kind")
    if "difference" in own:
        values = module.part("difference")
        return dense, {"values": Part(values._replace(shape=module.as_matrix or module.weight.shape))}, {}
    if "lora" in families:
        b, a = (_flat(module.part(name)) for name in "BA")
        settings = {"scale": scale_of(a.shape[0] if a.shape else 0)}
        if "core" not in own:
            return low_rank, {"b": Part(b), "a": Part(a)}, settings
        core = module.part("core", None, None, None, None)
        core = core._replace(shape=(*core.shape[:2], math.prod(core.shape[2:])))
        return tucker, {"b": Part(b), "a": Part(a), "t": Part(core)}, settings
    if "loha" in families:
        found, rank = hadamard_parts(module)
        return hadamard, found, {"scale": scale_of(rank)}
    found, of = kronecker_parts(module)
    return kronecker, found, {"scale": scale_of(of)}


def _flat(info: TensorInfo) -> TensorInfo:
    """A factor as a matrix: the kernel of a convolution is among its columns."""
    return info._replace(shape=(info.shape[0], math.prod(info.shape[1:]))) if len(info.shape) > 2 else info


def _scales(file: Path, name: str, numbers: Mapping[str, float], config: Mapping[str, Any]) -> Any:
    """The scale for a rank (None: of whole matrices): alpha / rank, 1 without alpha."""

    def scale(rank: int | None) -> float:
        alpha, scalar = numbers.get("alpha"), numbers.get("scalar", 1.0)
        found = scalar
        if alpha is not None:
            found *= alpha / rank if rank else 1.0
        elif rank:
            component, _, inner = name.partition(".")
            own = {key.removeprefix(f"{component}."): value for key, value in config.items()}
            wide = math.sqrt(rank) if own.get("use_rslora") else rank
            wanted = patterned(file, inner, own, "alpha_pattern", own.get("lora_alpha", wide))
            if not isinstance(wanted, int | float):
                raise ModelError(f"{file}: {name}: lora_alpha is {wanted!r}")
            found *= wanted / wide
        if not math.isfinite(found):
            raise ModelError(f"{file}: {name}: its scale is {found}")
        return found

    return scale


def _norms(module: Module) -> _Of:
    """DoRA's norms: of rows [out, 1, ...], or of inputs [1, in, 1, ...]."""
    info, shape = module.part("norms"), module.weight.shape
    values = Part(info._replace(shape=(info.numel,)))
    if info.shape[:1] == shape[:1] and info.numel == shape[0]:
        return renormed, {"magnitude": values}, {}
    if info.shape[:1] == (1,) and len(shape) > 1 and info.numel == shape[1]:
        return renormed, {"magnitude": values}, {"columns": math.prod(shape[2:])}
    raise module.error(f"norms {list(info.shape)} do not fit {list(shape)}", OTHER_MODEL)


def _config(header: Header) -> dict[str, Any]:
    """The settings of an adapter of diffusers, where its header has them: each key after its component's name."""
    try:
        listed = parse_json(header.metadata.get(_SETTINGS, "{}").encode())
    except ValueError:
        return {}
    return listed if isinstance(listed, dict) else {}
