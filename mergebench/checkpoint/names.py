"""Read a model under the base's tensor names when files of one architecture name tensors differently.

Some classes add a prefix (`model.`, `bert.`); other versions move a part (`language_model.model.` to
`model.language_model.`) or fuse experts. The rules below apply only to names that the base does not have. A name that
fits two of the base's tensors is not renamed, and the merge is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from mergebench.checkpoint.header import TensorInfo

# Prefixes that may stand for the same part of a model.
_BEGINNINGS = (
    (
        "", "model.", "transformer.", "gpt_neox.", "bert.", "roberta.", "distilbert.", "electra.", "deberta.",
        "albert.", "vit.", "dinov2.", "clip.", "vision_model.", "text_model.", "language_model.model.",
        "model.language_model.", "language_model.", "model.text_model.",
    ),
    ("lm_head.", "language_model.lm_head.", "embed_out."),
    ("visual.", "model.visual."),
    (
        "", "vision_model.", "vision_tower.", "vision_tower.vision_model.", "model.vision_tower.",
        "model.vision_tower.vision_model.",
    ),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("audio_tower.", "model.audio_tower."),
)  # fmt: skip

# Parts of names in older and in newer files; of two that overlap, the longer comes first.
_PARTS = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
    (".block_sparse_moe.", ".mlp."),
    # ViT in transformers 5
    ("encoder.layer.", "layers."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)

# What wraps a model, or a part of it, that was saved while it was trained in parallel (DDP, FSDP) or compiled.
_WRAPPERS = re.compile(r"^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|embed_out|lm_head|shared|tok_embeddings|lm_head\.decoder"
    r"|predictions\.decoder)\.(weight|bias)$|(^|\.)(predictions|lm_head)\.bias$"
)
_LAYER = re.compile(r"(?:(.*?)\.)??(\d+)\.(.+)")

Shape = tuple[int, ...]


def match(theirs: Mapping[str, Shape | None], base: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Map each name that the base does not have to a tensor of the base; one to one, of the same shape.

    An embedding or head may have another number of rows; vocabularies are checked elsewhere.
    """
    strangers = _in_the_bases_words([name for name in theirs if name not in base], base)
    targets: dict[str, set[str]] = {}
    rules: dict[tuple[str, str], dict[str, str]] = {}  # the new names by each rule
    heads = {".".join([*name.split(".")[:depth], ""]) for name in base for depth in range(4)} if strangers else set()
    for family in _BEGINNINGS:
        ours = [one for one in family if one in heads]
        for name, newer in strangers.items():
            for old in (one for one in family if newer.startswith(one)):
                for new in ours:
                    target = new + newer[len(old) :]
                    if target not in theirs and _fits(target, theirs[name], base):
                        targets.setdefault(name, set()).add(target)
                        rules.setdefault((old, new), {})[name] = target
    if any(len(found) > 1 for found in targets.values()):
        # a rule that fits every name with its prefix goes before rules that fit some
        whole = [
            made
            for (old, _), made in rules.items()
            if all(name in made for name, newer in strangers.items() if newer.startswith(old))
        ]
        for name, found in targets.items():
            if len(found) > 1:
                targets[name] = {made[name] for made in whole if name in made}
    chosen = {name: next(iter(found)) for name, found in targets.items() if len(found) == 1}
    taken = Counter(chosen.values())
    return {name: target for name, target in chosen.items() if taken[target] == 1}


def describe(renamed: Mapping[str, str]) -> str:
    """`vision_model.* as *`: the two most frequent changes of names."""
    changes: Counter[str] = Counter()
    for name, target in sorted(renamed.items()):
        left, right = name.split("."), target.split(".")
        while left and right and left[-1] == right[-1]:
            left.pop()
            right.pop()
        ending = len(left) < name.count(".") + 1
        if not ending:  # the ends differ: show these, not the place
            left, right = ["*", left[-1]], ["*", right[-1]]
        both = [".".join([*parts, *(["*"] if ending else [])]) for parts in (left, right)]
        changes[" as ".join(re.sub(r"\b\d+\b", "N", text) for text in both)] += 1
    listed = [text for text, _ in changes.most_common(2)]
    return ", ".join([*listed, *(["..."] if len(changes) > 2 else [])])


def layer_of(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up_proj.weight` as (`model.layers`, 3, `mlp.up_proj.weight`); None outside the layers.

    The first number in a name counts: experts and the like are numbered within a layer.
    """
    found = _LAYER.fullmatch(name)
    return (found[1] or "", int(found[2]), found[3]) if found else None


def is_vocabulary(name: str) -> bool:
    """An embedding or head by its name: a row for each token."""
    return bool(_VOCABULARY.search(name))


def unwrapped(name: str) -> str:
    """A name without what training wrapped around the model: `module.`, `_orig_mod.`, FSDP's."""
    while (bare := _WRAPPERS.sub("", name)) != name:
        name = bare
    return name


def _fits(name: str, shape: Shape | None, base: Mapping[str, TensorInfo]) -> bool:
    info = base.get(name)
    if info is None or shape is None:
        return info is not None
    other_tokens = is_vocabulary(name) and len(shape) == len(info.shape) and shape[1:] == info.shape[1:]
    return info.shape == shape or other_tokens


def _in_the_bases_words(names: Iterable[str], base: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Each name without wrappers, and with parts that the base does not use replaced by the base's words."""
    wrapped = any(map(_WRAPPERS.search, base))
    found = {name: name if wrapped else unwrapped(name) for name in names}
    if found:
        ours, theirs = "\n".join(base), "\n".join(found)
        for pair in _PARTS:
            for old, new in (pair, pair[::-1]):
                if old in theirs and old not in ours and new in ours:
                    found = {name: newer.replace(old, new) for name, newer in found.items()}
    return found


def module_kind(name: str) -> str:
    """The kind of module that a tensor belongs to, by its name: attention, MLP, experts, embeddings, norms, head."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "other")


_KINDS = {
    "experts": re.compile(r"experts?\."),
    "head": re.compile(r"(^|\.)(lm_head|embed_out|output_layer|score|classifier|qa_outputs|cls)\."),
    "norms": re.compile(r"norm|(^|\.)ln_|\.ln\d", re.IGNORECASE),
    "embeddings": re.compile(r"embed|(^|\.)(wte|wpe|shared)\."),
    "attention": re.compile(r"attn|attention|mixer", re.IGNORECASE),
    "MLP": re.compile(r"mlp|ffn|feed_forward|fc\d|intermediate|output\.dense|DenseReluDense"),
}
