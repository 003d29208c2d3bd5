"""Mixtures of experts: files hold a layer's experts apart or fused, and either is read as the other.

    apart   experts.N.gate_proj.weight [I, H]   experts.N.up_proj.weight [I, H]   experts.N.down_proj.weight [H, I]
            (Mixtral calls them w1, w3 and w2)
    fused   experts.gate_up_proj [E, 2 I, H]    experts.down_proj [E, H, I]

for E experts, H wide outside and I inside. In a fused tensor an expert's gate comes before its up matrix. Most files
have experts apart; transformers 5 fuses them in memory, and some files store them fused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mergebench.checkpoint.header import ITEM_SIZE, TensorInfo
from mergebench.errors import ModelError

if TYPE_CHECKING:
    from mergebench.checkpoint.delta import Delta
    from mergebench.checkpoint.model import Model

_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_APART = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_WORDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_CONVERT = "save both models in one layout, with save_pretrained(DIR, save_original_format=True)"


class Layout(NamedTuple):
    """How a model stores its experts; without words: fused."""

    words: tuple[str, str, str] | None

    def __str__(self) -> str:
        return "fused" if self.words is None else f"apart ({', '.join(self.words)})"


def layout(tensors: Mapping[str, TensorInfo]) -> Layout | None:
    """How the experts are stored, if there are any."""
    for name in tensors:
        if _FUSED.fullmatch(name):
            return Layout(None)
        apart = _APART.fullmatch(name)
        if apart is not None:
            return Layout(next(words for words in _WORDS if apart[3] in words))
    return None


class Place(NamedTuple):
    """Where an expert's matrix is in a model with fused experts: a block of rows of a tensor."""

    tensor: str
    number: int  # of the block
    blocks: int  # of one expert


def place_in_fused(name: str) -> Place | None:
    """The place of the weight of an expert that is stored apart; None for other tensors."""
    apart = _APART.fullmatch(name)
    if apart is None:
        return None
    which = next(words.index(apart[3]) for words in _WORDS if apart[3] in words)
    blocks = 2 if which < 2 else 1
    tensor = f"{apart[1]}.{'gate_up_proj' if which < 2 else 'down_proj'}"
    return Place(tensor, int(apart[2]) * blocks + which % 2 * (which < 2), blocks)


def fuse_deltas(
    deltas: Mapping[str, tuple[Delta, ...]], tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[Delta, ...]]:
    """The deltas of a model with experts apart, for its tensors read as fused."""
    from mergebench.checkpoint.stacked import stacked

    found: dict[str, tuple[Delta, ...]] = {}
    parts: dict[str, list[dict[int, Delta]]] = {}  # by fused tensor: the first delta of each block, the second, ...
    for name, several in deltas.items():
        place = None if name in tensors else place_in_fused(name)
        if place is None:
            found[name] = several
            continue
        levels = parts.setdefault(place.tensor, [])
        for level, delta in enumerate(several):
            if level == len(levels):
                levels.append({})
            levels[level][place.number] = delta
    for name, levels in parts.items():
        shape = tensors[name].shape
        rows = shape[1] // (2 if name.endswith("gate_up_proj") else 1)
        found[name] = tuple(stacked(shape, rows, blocks) for blocks in levels)
    return found


def read_experts(base: Model, model: Model) -> tuple[dict[str, TensorInfo], str | None]:
    """A model's tensors with its experts in the base's layout, and a note if they were converted.

    `ModelError` if they cannot be converted (transposed, with biases, some missing, an adapter on them).
    """
    theirs, wanted = layout(model.tensors), layout(base.tensors)
    if theirs is None or wanted is None or theirs == wanted:
        return model.tensors, None
    tensors = _read_as(model.reference, model.tensors, wanted)
    fused = wanted.words is None
    lost = [name for name in model.deltas if name not in tensors and not (fused and place_in_fused(name))]
    if lost:
        raise ModelError(
            f"{lost[0]}: {model.reference} has an adapter on it, base stores its experts {wanted}",
            "merge the adapter into its model first",
        )
    return tensors, f"experts stored {theirs}, read {wanted}"


def _read_as(reference: str, tensors: Mapping[str, TensorInfo], wanted: Layout) -> dict[str, TensorInfo]:
    """The tensors with experts in the layout `wanted`."""
    found: dict[str, TensorInfo] = {}
    groups: dict[str, dict[tuple[int, int], TensorInfo]] = {}  # by prefix: (expert, which of the words)
    fused: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        one, apart = _FUSED.fullmatch(name), _APART.fullmatch(name)
        if one is not None:
            fused.setdefault(one[1], {})[one[2]] = info
        elif apart is not None:
            which = next(words.index(apart[3]) for words in _WORDS if apart[3] in words)
            groups.setdefault(apart[1], {})[int(apart[2]), which] = info
        else:
            found[name] = info
    for prefix, parts in fused.items():
        groups[prefix] = _split(reference, prefix, parts, tensors)
    for prefix, experts in groups.items():
        if wanted.words is None:
            found |= _fuse(reference, prefix, experts)
        else:
            for (number, which), info in experts.items():
                name = f"{prefix}.{number}.{wanted.words[which]}.weight"
                found[name] = info._replace(name=name)
    return found


def _split(
    reference: str, prefix: str, parts: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]
) -> dict[tuple[int, int], TensorInfo]:
    """The experts of fused tensors, each as a range of a tensor."""
    both, down = parts.get("gate_up_proj"), parts.get("down_proj")
    biased = [name for name in (f"{prefix}.gate_up_proj_bias", f"{prefix}.down_proj_bias") if name in tensors]
    if both is None or down is None or biased:
        what = f"has {biased[0]}" if biased else f"has only one of {prefix}.gate_up_proj and down_proj"
        raise ModelError(f"{reference} {what}: experts fused in a way that cannot be read one by one", _CONVERT)
    count, rows, columns = both.shape if len(both.shape) == 3 else (0, 0, 0)
    inner = rows // 2
    if rows % 2 or down.shape != (count, columns, inner) or both.made or down.made or both.scale or down.scale:
        what = f"{list(both.shape)}, down_proj {list(down.shape)}"
        raise ModelError(
            f"{both.name}: {reference} has {what}: not [experts, 2 x inner, outer] and [experts, outer, inner], "
            "which can be read one by one",
            _CONVERT,
        )
    size, found = inner * columns, {}
    for number in range(count):
        for which in range(2):
            found[number, which] = _range(both, (2 * number + which) * size, (inner, columns))
        found[number, 2] = _range(down, number * size, (columns, inner))
    return found


def _range(info: TensorInfo, start: int, shape: tuple[int, ...]) -> TensorInfo:
    """Elements `start` onwards of a stored tensor as a tensor of their own."""
    item = ITEM_SIZE[info.dtype]
    piece = info._replace(shape=shape, offset=info.offset + start * item)
    return piece._replace(nbytes=piece.numel * item)


def _fuse(reference: str, prefix: str, experts: Mapping[tuple[int, int], TensorInfo]) -> dict[str, TensorInfo]:
    """The two fused tensors of experts stored apart."""
    from mergebench.checkpoint.stack import stack  # torch comes with it

    count = 1 + max(number for number, _ in experts)
    for number in range(count):
        for which in range(3):
            if (number, which) not in experts:
                word = " or ".join(words[which] for words in _WORDS)
                raise ModelError(f"{prefix}: {reference} has no {word} of expert {number}, of {count}")
    gate = experts[0, 0].shape
    for (number, which), info in experts.items():
        expected = gate if which < 2 else gate[::-1]
        if len(gate) != 2 or info.shape != expected or not info.is_float:
            raise ModelError(
                f"{info.name}: {reference} has {info.dtype} {list(info.shape)}, expert 0's gate is {list(gate)}: "
                f"expert {number} cannot be read as a part of a fused tensor"
            )
    both = [experts[number, which] for number in range(count) for which in range(2)]
    down = [experts[number, 2] for number in range(count)]
    names = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    return {
        names[0]: stack(names[0], both, (count, 2 * gate[0], gate[1])),
        names[1]: stack(names[1], down, (count, gate[1], gate[0])),
    }
