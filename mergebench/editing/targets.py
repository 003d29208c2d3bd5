"""Find the matrices of a model whose neurons an edit may change.

A neuron is one vector as wide as the residual stream, which a unit of an MLP or a head reads (gate, up, q, k, v) or
writes (down, o). In torch's Linear [out, in], reading vectors are rows and writing vectors are columns; in GPT-2's
Conv1D [in, out] it is the other way round. The width shows whether neurons are rows or columns; for a square matrix,
its role and the model's type do. The role of a matrix follows from its name and its neighbours' names:

    gate_proj  up_proj  down_proj     down(act(gate x) * up x); also called wi_0 wi_1 wo, w1 w3 w2, ...
    gate_up_proj        down_proj     gate and up in one: as many elements as two of down; under any name
    fc1                 fc2           no gate: fc1 is up, and what goes into the activation function

The role residual is of all matrices that write to the residual stream: down, o, and the embeddings, whose rows are what
tokens and positions write.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergebench.checkpoint.header import FLOATS, TensorInfo
from mergebench.errors import ModelError, RecipeError, did_you_mean

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_HEADS = {
    "q_proj": ("q_proj", "query", "q", "q_lin", "query_proj", "wq"),
    "k_proj": ("k_proj", "key", "k", "k_lin", "key_proj", "wk"),
    "v_proj": ("v_proj", "value", "v", "v_lin", "value_proj", "wv"),
    "o_proj": ("o_proj", "out_proj", "o", "out_lin", "dense", "c_proj", "wo", "Wo"),
}
RESIDUAL = "residual"  # all that writes to the residual stream: the next two, and the embeddings
ROLES = (GATE, UP, DOWN, *_HEADS, RESIDUAL)
_WRITE = (DOWN, "o_proj")
EMBEDDINGS = -1  # in the place of a layer
_GATED = (
    (GATE, UP, DOWN), ("wi_0", "wi_1", "wo"), ("w1", "w3", "w2"), ("w1", "v1", "w2"), ("fc1", "fc3", "fc2"),
)  # fmt: skip
_PAIRS = (
    ("gate_up_proj", DOWN), (UP, DOWN), ("w1", "w2"), ("fc1", "fc2"), ("c_fc", "c_proj"), ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"), ("intermediate.dense", "output.dense"), ("wi", "wo"), ("Wi", "Wo"),
    ("lin1", "lin2"), ("linear1", "linear2"), ("linear_1", "linear_2"), ("linear_fc1", "linear_fc2"),
    ("layer_1", "layer_2"), ("dense1", "dense2"), ("ffn", "ffn_output"), ("ff_proj", "ff_out"),
    ("intermediate_dense", "output_dense"), ("input_linear", "output_linear"),
    ("weights_in", "weights_out"),
)  # fmt: skip
_STEMS = sorted({stem for row in (*_GATED, *_PAIRS) for stem in row}, key=len, reverse=True)
_STEM = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _STEMS))})(?:\.weight)?")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NO_MLP = re.compile(r"attn|attention|norm", re.IGNORECASE)
# If gate and up share a matrix, the gate comes first, except in OLMo, Moonshine and Phi-4's audio encoder.
_GATE_LAST = re.compile(r"\.(ff_proj|decoder\.layers\.\d+\.mlp\.fc1|feed_forward_(in|out)\.gate_up_proj)\.weight$")
_INTERLEAVED = frozenset({"gpt_oss"})  # gate and up rows alternate
_CONV1D = frozenset({"gpt2", "imagegpt", "openai-gpt", "decision_transformer"})  # c_fc, c_proj
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"})
_TEXT = re.compile(r"(^|\.)(language_model|text_model)\.")
_OTHERS = re.compile(r"(^|[._])(vision|visual|image|video|audio|speech|projector)")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDING = re.compile(r"(^|[._])(embed|embed_(in|tokens|positions)|(\w+_)?embeddings?|wte|wpe|shared)(\.weight)?$")
_EXPERT = re.compile(r"expert[s_.]*(\d+)")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embed_dim")
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")


@dataclass(frozen=True)
class Target:
    """Neurons `first`, `first + step`, ... below `stop` of one tensor; those of a tensor with experts in front,
    [E, neurons, d], are numbered e * neurons + n."""

    tensor: str
    layer: int
    first: int
    stop: int
    step: int
    transposed: bool  # each is a column, [d, neurons]
    role: str  # up_proj if a gate was asked for and the MLP has none; for a glob, the glob

    @property
    def numbers(self) -> range:
        return range(self.first, self.stop, self.step)


class _Part(NamedTuple):
    """A matrix, or one of two matrices that share a tensor."""

    role: str
    activated: bool = False  # its output goes into the MLP's activation function
    half: int | None = None


def find_targets(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], role: str, width: int | None, layers: str | None
) -> list[Target]:
    """The neurons of `role` (one of `ROLES`, or a glob of tensor names), ordered by layer, expert and name.

    width: the residual stream's, None: from the config; layers: as in `choose_layers`. Raises `RecipeError` if role or
    layers cannot be read or match nothing, `ModelError` if the model has no such neurons.
    """
    known = _roles(tensors)
    parts = _of_role(known, role) if role in ROLES else _of_glob(tensors, role)
    if role == RESIDUAL and parts:
        parts |= {name: [_Part(RESIDUAL)] for name in _embeddings(tensors)}
    if not parts:
        raise _nothing(tensors, role)
    width = width or _width(config)
    types = set(_types(config))
    found: list[tuple[tuple[int, int, str, int], Target]] = []
    for name, shared in parts.items():
        info = tensors[name]
        transposed = _transposed(info, width, known.get(name, [None])[0], types)
        if transposed is None:
            continue
        if info.dtype not in FLOATS and info.scale is None:
            hint = "edit the model in a float type: a passthrough merge with dtype: bfloat16 writes one"
            raise ModelError(f"{name}: its type {info.dtype} cannot be edited", hint)
        for part in shared:
            found += _targets(info, part, transposed, bool(types & _INTERLEAVED))
    if not found:
        sizes = list(tensors[next(iter(parts))].shape)
        raise ModelError(
            f"{next(iter(parts))} is {sizes}: it has no neurons of width {width}",
            "a probe fits a model whose residual stream is as wide as it",
        )
    targets = _of_text([target for _, target in sorted(found, key=lambda one: one[0])])
    chosen = choose_layers(layers, {target.layer for target in targets})
    return [target for target in targets if target.layer in chosen]


def choose_layers(written: str | None, existing: set[int]) -> set[int]:
    """The layers named by `all`, `0-15`, `3,5,7`, `-4--1` (from the end) or `!0-7` (all but these).

    `RecipeError` if the text is invalid or names a missing layer.
    """
    if written is None or written.strip() == "all":
        return existing
    existing = existing - {EMBEDDINGS}
    text, last = written.replace(" ", ""), max(existing)
    chosen: set[int] = set()
    for item in text.removeprefix("!").split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", item)
        if match is None:
            raise RecipeError(f"layers: '{written}' cannot be read", "write all, 0-15, 3,5,7, -4--1 or !0-7")
        first, stop = (int(end) + (last + 1 if int(end) < 0 else 0) for end in (match[1], match[2] or match[1]))
        some = existing & set(range(first, stop + 1))
        if not some or first < 0 or stop > last:
            raise RecipeError(f"layers: {item}: no such layers", f"the candidates are in layers {_ranges(existing)}")
        chosen |= some
    if text.startswith("!"):
        chosen = existing - chosen
        if not chosen:
            raise RecipeError(f"layers: {written} leaves none", f"the candidates are in layers {_ranges(existing)}")
    return chosen


def describe(role: str, targets: Iterable[Target]) -> list[str]:
    """The tensors of a role, a line for each kind of tensor: `h.N.mlp.c_fc.weight: 36,864 columns in 12 layers`."""
    kinds: dict[tuple[str, str, bool], list[Target]] = {}
    for target in targets:
        name = re.sub(r"(?<=[._])\d+(?=\.)", "N", target.tensor)
        kinds.setdefault((name, target.role, target.transposed), []).append(target)
    lines = []
    for (name, found, transposed), ones in kinds.items():
        count, layers = sum(len(one.numbers) for one in ones), len({one.layer for one in ones} - {EMBEDDINGS})
        line = f"{name}: {count:,} {'columns' if transposed else 'rows'}"
        line += f" in {layers} layer{'s' * (layers > 1)}" if layers else ""
        other = role == GATE and found != role
        lines.append(line + (" (no gate there: what the activation function takes)" if other else ""))
    return lines


def _roles(tensors: Mapping[str, TensorInfo]) -> dict[str, list[_Part]]:
    """The role of each matrix in the layers' MLPs and attention, as far as the rules apply."""
    mlps: dict[str, dict[str, TensorInfo]] = {}
    found: dict[str, list[_Part]] = {}
    for name, info in tensors.items():
        stem = _STEM.fullmatch(name)
        if len(info.shape) not in (2, 3) or not _LAYER.search(name):
            continue
        if stem is not None and not _NO_MLP.search(stem[1]):
            mlps.setdefault(stem[1], {})[stem[2]] = info
        elif len(info.shape) == 2:
            module, _, leaf = name.removesuffix(".weight").rpartition(".")
            role = next((role for role, leaves in _HEADS.items() if leaf in leaves), None)
            if role is not None and _ATTENTION.search(module):
                found[name] = [_Part(role)]
    for mlp in mlps.values():
        row = next((row for row in (*_GATED, *_PAIRS) if all(stem in mlp for stem in row)), ())
        if len(row) == 3:
            gate, up, down = (mlp[stem] for stem in row)
            found |= {gate.name: [_Part(GATE, True)], up.name: [_Part(UP)], down.name: [_Part(DOWN)]}
        elif row:
            up, down = (mlp[stem] for stem in row)
            half = int(bool(_GATE_LAST.search(up.name)))
            both = [_Part(GATE, True, half), _Part(UP, False, 1 - half)]
            fused = row[0] == "gate_up_proj" or up.numel == 2 * down.numel
            found |= {up.name: both if fused else [_Part(UP, True)], down.name: [_Part(DOWN)]}
    return found


def _of_role(known: Mapping[str, list[_Part]], role: str) -> dict[str, list[_Part]]:
    """Parts of that role; for the gate of an MLP without one, the part that goes into its activation function."""
    wanted = _WRITE if role == RESIDUAL else (role,)
    chosen = {
        name: [part for part in parts if part.role in wanted or (role == GATE and part.activated)]
        for name, parts in known.items()
    }
    return {name: parts for name, parts in chosen.items() if parts}


def _embeddings(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Matrices outside the layers with a vector for each token or position; the heads are none."""
    plain = (name for name, info in tensors.items() if len(info.shape) == 2 and not _LAYER.search(name))
    return [name for name in plain if _EMBEDDING.search(name)]


def _of_glob(tensors: Mapping[str, TensorInfo], glob: str) -> dict[str, list[_Part]]:
    """Matrices of the layers whose names fit, whole."""
    return {
        name: [_Part(glob)]
        for name, info in tensors.items()
        if fnmatch.fnmatchcase(name, glob) and len(info.shape) in (2, 3) and _LAYER.search(name)
    }


def _nothing(tensors: Mapping[str, TensorInfo], role: str) -> ModelError | RecipeError:
    matrices = dict.fromkeys(
        _LAYER.sub(lambda found: found[0].replace(found[1], "*"), name, count=1)
        for name, info in tensors.items()
        if len(info.shape) in (2, 3) and _LAYER.search(name)
    )
    some = ", ".join([*list(matrices)[:6], *(["..."] if len(matrices) > 6 else [])])
    ways = f"a target is {', '.join(ROLES)} or a glob of tensor names; here are {some or 'no layers'}"
    if role in ROLES:
        return ModelError(f"target: no {role} is told by its name in this model", ways)
    near = did_you_mean(role, ROLES) or ""
    return RecipeError(f"target: '{role}' matches no matrix", near if near.startswith("did") else ways)


def _transposed(info: TensorInfo, width: int, known: _Part | None, types: set[str]) -> bool | None:
    """Whether the neurons are columns; None if neither side has the width."""
    rows, columns = info.shape[-2:]
    leaf = info.name.removesuffix(".weight").rpartition(".")[2]
    linear = len(info.shape) == 2 and leaf != info.name.rpartition(".")[2] and not leaf.startswith("c_")
    if (known is not None and linear) or rows == columns:
        in_out = not linear and bool(types & (_CONV1D if len(info.shape) == 2 else _EXPERTS_IN_OUT))
        transposed = (known is not None and known.role in _WRITE) != in_out
        return transposed if (rows if transposed else columns) == width else None
    return False if columns == width else True if rows == width else None


def _of_text(targets: list[Target]) -> list[Target]:
    """Only the targets of the text model, if another part of the model has the same width."""
    text = [target for target in targets if _TEXT.search(target.tensor)]
    return text or [target for target in targets if not _OTHERS.search(target.tensor)] or targets


def _targets(
    info: TensorInfo, part: _Part, transposed: bool, interleaved: bool
) -> Iterator[tuple[tuple[int, int, str, int], Target]]:
    """A tensor's part as one target per expert, with sort keys."""
    match, expert = _LAYER.search(info.name), _EXPERT.search(info.name)
    layer, side = EMBEDDINGS if match is None else int(match[1]), info.shape[-1 if transposed else -2]
    for number in range(info.shape[0] if len(info.shape) == 3 else 1):
        first, stop, step = number * side, (number + 1) * side, 1
        if part.half is not None and interleaved:
            first, step = first + part.half, 2
        elif part.half is not None:
            first, stop = first + part.half * side // 2, first + (part.half + 1) * side // 2
        key = int(expert[1]) if expert else number if len(info.shape) == 3 else -1
        yield (layer, key, info.name, first), Target(info.name, layer, first, stop, step, transposed, part.role)


def _types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model types that a config names, nested ones too."""
    for value in (config, *(config.get(key) for key in _NESTED)):
        if isinstance(value, Mapping) and isinstance(value.get("model_type"), str):
            yield value["model_type"]


def _width(config: Mapping[str, Any]) -> int:
    for part in (*(config.get(key) for key in _NESTED), config):
        if isinstance(part, Mapping):
            for key in _WIDTHS:
                if isinstance(part.get(key), int):
                    return int(part[key])
    raise ModelError("config.json does not say how wide the model is", "give a probe: it says so")


def _ranges(layers: set[int]) -> str:
    """`0-3, 5`."""
    text: list[list[int]] = []
    for layer in sorted(layers):
        if text and text[-1][-1] == layer - 1:
            text[-1][1:] = [layer]
        else:
            text.append([layer])
    return ", ".join("-".join(map(str, run)) for run in text)
