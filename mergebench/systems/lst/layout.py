"""How two families of models are built: which tensors read their residual stream, which write it, and in what order.

BERT's: norms follow the sums, positions are learnt, keys are as many as queries. Llama's: norms go first, positions are
rotations of each head's pairs of dimensions, several heads may share keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError, RecipeError


class Follow(NamedTuple):
    """A norm: a weight, and perhaps a bias, of the residual's width."""

    stem: str


class Attend(NamedTuple):
    """Attention: query, key and value read the residual, out writes it."""

    query: str
    key: str
    value: str
    out: str
    norms: tuple[str, ...] = ()  # of a head's width


class Feed(NamedTuple):
    """The MLP: its first layers, whose rows belong together, read the residual, `down` writes it."""

    ups: tuple[str, ...]
    down: str


class Read(NamedTuple):
    """A layer of a head: it reads the residual; a square one gives states of the same width."""

    stem: str
    square: bool = False


Step = Follow | Attend | Feed | Read


class Part(NamedTuple):
    """The steps of one block."""

    number: int  # in the base
    steps: Sequence[Step]


@dataclass(frozen=True)
class Heads:
    """The attention heads of one width: of queries, of keys and values, and their size."""

    queries: int
    keys: int
    size: int


@dataclass(frozen=True)
class Family:
    """A way of building models."""

    name: str
    model_types: tuple[str, ...]
    prefix: str  # that names may have in the files
    embeddings: tuple[str, ...]
    first: tuple[Step, ...]
    blocks: str
    block: tuple[Step, ...]
    last: tuple[Step, ...]
    norm: str | None  # the norm after the last block
    left: str  # names of what is not carried: heads for pre-training
    rotary: bool
    causal: bool


BERT = Family(
    "BERT's",
    ("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    r"(?:bert|roberta|electra)\.",
    tuple(f"embeddings.{one}_embeddings" for one in ("word", "position", "token_type")),
    (Follow("embeddings.LayerNorm"),),
    "encoder.layer",
    (
        Attend("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        Follow("attention.output.LayerNorm"),
        Feed(("intermediate.dense",), "output.dense"),
        Follow("output.LayerNorm"),
    ),
    (Read("pooler.dense", square=True),),
    None,
    r"(cls|lm_head|classifier|discriminator_predictions|generator_\w+)\..*",
    rotary=False,
    causal=False,
)
LLAMA = Family(
    "Llama's",
    ("llama", "mistral", "qwen2", "qwen3"),
    r"model\.",
    ("embed_tokens",),
    (),
    "layers",
    (
        Follow("input_layernorm"),
        Attend(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            ("self_attn.q_norm", "self_attn.k_norm"),
        ),
        Follow("post_attention_layernorm"),
        Feed(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    ),
    (Follow("norm"), Read("lm_head")),
    "norm",
    r"score\..*",
    rotary=True,
    causal=True,
)
FAMILIES = (BERT, LLAMA)
_DERIVED = r".*\.(position_ids|inv_freq)"  # what follows from the config, copied as it is


class Layout:
    """A model's tensors by the family's names."""

    def __init__(self, model: Model) -> None:
        """`ModelError` if the model is of no known family, or has a tensor that has no place in it."""
        kind = model.config.get("model_type")
        family = next((one for one in FAMILIES if kind in one.model_types), None)
        if family is None:
            known = ", ".join(name for one in FAMILIES for name in one.model_types)
            raise ModelError(f"model '{model.reference}': it is of type {kind}", f"a side network is made of {known}")
        self.family, self.model = family, model
        self.names = {re.sub(f"^{family.prefix}", "", name): name for name in model.tensors}
        count = model.config.get("num_hidden_layers")
        self.depth = count if isinstance(count, int) else 0
        known_names = {part for step in self.steps(range(self.depth)) for part in self.tensors_of(step)}
        known_names |= {f"{stem}.weight" for stem in family.embeddings}
        self.left = [name for own, name in self.names.items() if re.fullmatch(family.left, own)]
        self.copied = [name for name in model.tensors if re.fullmatch(_DERIVED, name)]
        for own, name in self.names.items():
            if own not in known_names and name not in [*self.left, *self.copied]:
                what = f"model '{model.reference}': '{name}' has no place in a model of {family.name} kind"
                raise ModelError(what, "a side network is made of plain models of this kind")
        self.width = int(model.config["hidden_size"])
        queries = int(model.config["num_attention_heads"])
        self.heads = Heads(
            queries,
            int(model.config.get("num_key_value_heads") or queries) if family.rotary else queries,
            int(model.config.get("head_dim") or self.width // queries) if family.rotary else self.width // queries,
        )
        for stem in self.stems:
            if f"{stem}.weight" not in self.names:
                raise ModelError(f"model '{model.reference}': it has no tensor {stem}.weight", "it is incomplete")

    @property
    def stems(self) -> list[str]:
        """The layers that every model of the family has."""
        found = list(self.family.embeddings)
        for step in (step for part in self.parts(range(self.depth)) for step in part.steps):
            found += [step.stem] if isinstance(step, Follow | Read) else []
            found += [*step[:4]] if isinstance(step, Attend) else []
            found += [*step.ups, step.down] if isinstance(step, Feed) else []
        return found

    def parts(self, layers: Sequence[int]) -> list[Part]:
        """The blocks, with the base's names of their layers."""
        return [
            Part(number, [_inside(step, f"{self.family.blocks}.{number}.") for step in self.family.block])
            for number in layers
        ]

    def steps(self, layers: Sequence[int]) -> list[Step]:
        """Every step, in the order in which it is computed."""
        blocks = [step for part in self.parts(layers) for step in part.steps]
        return [*self.family.first, *blocks, *self.family.last]

    def tensors_of(self, step: Step) -> list[str]:
        """The names of a step's tensors that the model has."""
        stems = [step.stem] if isinstance(step, Follow | Read) else []
        stems += [*step[:4], *step.norms] if isinstance(step, Attend) else []
        stems += [*step.ups, step.down] if isinstance(step, Feed) else []
        return [name for stem in stems for name in (f"{stem}.weight", f"{stem}.bias") if name in self.names]

    def layers(self, kept: Sequence[int]) -> list[int]:
        """The blocks to keep: those asked for, or all; `RecipeError` if one does not exist."""
        for number in kept:
            if not 0 <= number < self.depth:
                raise RecipeError(
                    f"keep_layers: {number}: there is no such layer", f"the base's are 0 to {self.depth - 1}"
                )
        if len(set(kept)) < len(kept):
            raise RecipeError("keep_layers: the same layer twice", "name each once")
        return sorted(kept) or list(range(self.depth))


def _inside(step: Step, prefix: str) -> Step:
    """A block's step with the block's name before every layer's."""

    def named(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(named, value))
        return f"{prefix}{value}" if isinstance(value, str) else value

    return type(step)(*map(named, step))


def left_of(size: int, reduction: float) -> int:
    """How many of `size` remain: all but round((1 - 1 / reduction) size)."""
    return size - round((1 - 1 / reduction) * size)


def smaller(layout: Layout, reduction: float) -> tuple[int, Heads]:
    """The width and the heads of a side network.

    Where positions are rotations, a head's dimensions have their frequencies by their places: whole heads remain, and
    heads of a group that shares keys go evenly. Elsewhere the heads stay and become narrower; heads go too where their
    number does not divide the width. `RecipeError` if no heads fit the width.
    """
    width, heads = left_of(layout.width, reduction), layout.heads
    if width < 1:
        raise RecipeError(
            f"reduction: {reduction:g}: nothing is left of a width of {layout.width}", "take a smaller one"
        )
    if reduction == 1:
        return width, heads
    if layout.family.rotary:
        group = heads.queries // heads.keys
        for keys in range(max(round(heads.keys / reduction), 1), 0, -1):
            for each in range(min(max(round(heads.queries / reduction / keys), 1), group), 0, -1):
                if width % (keys * each) == 0:
                    return width, Heads(keys * each, keys, heads.size)
    for queries in range(heads.queries, 0, -1):
        if width % queries == 0 and width // queries <= heads.size:
            return width, Heads(queries, queries, width // queries)
    raise RecipeError(
        f"reduction: {reduction:g}: a width of {width} is no number of heads of at most {heads.size}",
        "take another one, such as one that divides the base's head size",
    )


def config_of(layout: Layout, width: int, heads: Heads, feed: int, layers: Sequence[int]) -> Mapping[str, Any]:
    """The changes to config.json."""
    config = layout.model.config
    found: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": heads.queries,
        "intermediate_size": feed,
        "num_hidden_layers": len(layers),
    }
    if layout.family.rotary:
        found["num_key_value_heads"] = heads.keys
        if "head_dim" in config or heads.size * heads.queries != width:
            found["head_dim"] = heads.size
    if isinstance(config.get("layer_types"), list):
        found["layer_types"] = [config["layer_types"][number] for number in layers]
    if "embedding_size" in config:  # ELECTRA's, equal to the width here
        found["embedding_size"] = width
    return {key: value for key, value in found.items() if config.get(key) != value}
