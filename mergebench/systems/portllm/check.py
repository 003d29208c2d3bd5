"""What can be known before a port: what fits, how far the base moved, and how that lies to the patch.

For a tensor: U = new - old, the base's own update, and D, what the patch adds to old. Where D = B A is of low rank, the
share of |U|^2 in its column space is |Q Q' U|^2 / |U|^2 with an orthonormal basis Q, and likewise for its row space; of
a random U about rank / rows and rank / columns would lie there. None of this says how well a ported model answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.content import identity, tokenizer_hash
from mergebench.checkpoint.delta import Delta, matrix_shape
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.names import layer_of, module_kind
from mergebench.checkpoint.side_files import tokenizer_files
from mergebench.checkpoint.values import chain
from mergebench.deltas.open import open_model
from mergebench.deltas.verbs import exact_factors
from mergebench.engine.machine import one_thread
from mergebench.errors import ModelError
from mergebench.recipe import tokenizers
from mergebench.systems.portllm.adapter import notes_of
from mergebench.systems.portllm.opened import Opened, open_port, text_of

_TINY = 1e-7  # singular values below this share of the largest are zero


@dataclass
class Sums:
    """Float64 sums over some tensors; the last five over those with a patch of low rank."""

    old: float = 0.0  # |W|^2
    update: float = 0.0  # |U|^2
    patch: float = 0.0  # |D|^2
    dot: float = 0.0  # <U, D>
    spanned: float = 0.0  # |U|^2
    in_columns: float = 0.0  # |Q Q' U|^2
    in_rows: float = 0.0
    chance_columns: float = 0.0  # what of a random U of that size would be there
    chance_rows: float = 0.0

    def __iadd__(self, other: Sums) -> Sums:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        return self

    def to_plain(self) -> dict[str, float | None]:
        """Ratios of norms, shares of squared norms; None where they are not defined."""

        def ratio(a: float, b: float) -> float | None:
            return a / b if b else None

        old, update, patch = math.sqrt(self.old), math.sqrt(self.update), math.sqrt(self.patch)
        return {
            "update": ratio(update, old),
            "patch": ratio(patch, old),
            "update_to_patch": ratio(update, patch),
            "cosine": ratio(self.dot, update * patch),
            "in_columns": ratio(self.in_columns, self.spanned),
            "in_rows": ratio(self.in_rows, self.spanned),
            "chance_columns": ratio(self.chance_columns, self.spanned),
            "chance_rows": ratio(self.chance_rows, self.spanned),
        }


@dataclass(frozen=True)
class Check:
    """The report of `check_port`. The numbers are over the tensors that the patch changes; `whole` over all."""

    old: str
    new: str
    patch: str
    identities: dict[str, str]
    problems: list[str]  # tensors that do not fit: a port would be refused
    tokens: str
    notes: list[str]
    tensors: int  # that the patch changes
    whole: float | None  # |new - old| / |old| of all tensors that fit
    total: Sums
    layers: dict[str, Sums] = field(default_factory=dict)
    changes: float | None = None  # |D on new - D on old| / |D on old|, where D depends on the base's weights

    def to_plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        about = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("total", "layers")}
        layers = {layer: sums.to_plain() for layer, sums in self.layers.items()}
        return {**about, "total": self.total.to_plain(), "layers": layers}


def check_port(
    old: str,
    new: str,
    patch: str | Path,
    *,
    exclude: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Check:
    """Look at a port without writing anything, one matrix at a time.

    progress: called with the tensors done and the total. Raises `ModelError` if a model is missing, or the patch does
    not belong to `old`.
    """
    opened = open_port(old, new, patch, exclude)
    found = opened.problems
    problems = [text_of(problem, opened.new) for problem in found]
    on_new = None
    if opened.adapter is not None:
        try:
            on_new = open_model(f"{new}+{patch}")
        except ModelError as error:
            problems.append(error.message)
    odd = {problem.name for problem in found}
    names = [n for n, i in opened.new.tensors.items() if _compared(opened, n) and i.is_float and n not in odd]
    total, everything, layers, moved = Sums(), Sums(), dict[str, Sums](), [0.0, 0.0]
    changed = 0
    with Files() as files, one_thread(), torch.inference_mode():
        for number, name in enumerate(names):
            sums, patch_values = _tensor(files, opened, name)
            everything += sums
            if patch_values is not None:
                changed += 1
                total += sums
                layers.setdefault(_layer(name), Sums()).__iadd__(sums)
                if on_new is not None and any(delta.needs_base for delta in opened.added(name)):
                    after = _added(files, on_new, name, len(opened.new.deltas.get(name, ())))
                    moved[0] += float((after.double() - patch_values.double()).square().sum())
                    moved[1] += float(patch_values.double().square().sum())
            progress(number + 1, len(names))
    return Check(
        old=old,
        new=new,
        patch=str(patch),
        identities={"old": identity(opened.old), "new": identity(opened.new)},
        problems=problems,
        tokens=_tokens(opened),
        notes=[*opened.notes, *notes_of(opened)],
        tensors=changed,
        whole=math.sqrt(everything.update / everything.old) if everything.old else None,
        total=total,
        layers=dict(sorted(layers.items(), key=_depth)),
        changes=math.sqrt(moved[0] / moved[1]) if moved[1] else None,
    )


def _compared(opened: Opened, name: str) -> bool:
    return opened.wanted(name) and name in opened.old.tensors and name in opened.tuned.tensors


def _tensor(files: Files, opened: Opened, name: str) -> tuple[Sums, Tensor | None]:
    """The sums of a tensor, and what the patch adds to it; None if nothing."""
    old = opened.old.values(files).whole(name)
    update = opened.new.values(files).whole(name).double() - old.double()
    sums = Sums(old=float(old.double().square().sum()), update=float(update.square().sum()))
    deltas = opened.added(name)
    if opened.adapter is not None and not deltas:
        return sums, None
    if opened.adapter is not None:
        patch = _added(files, opened.tuned, name, len(opened.old.deltas.get(name, ())))
    else:
        patch = opened.tuned.values(files).whole(name).sub_(old)
    del old
    sums.patch = float(patch.double().square().sum())
    if not sums.patch and not deltas:
        return sums, None
    sums.dot = float((update * patch).sum())
    span = _span(files, opened.old, name, deltas)
    if span is not None:
        matrix = update.view(matrix_shape(patch.shape))
        columns, rows = span
        sums.spanned = sums.update
        sums.in_columns = float((columns.T @ matrix).square().sum())
        sums.in_rows = float((matrix @ rows).square().sum())
        sums.chance_columns = sums.update * columns.shape[1] / len(columns)
        sums.chance_rows = sums.update * rows.shape[1] / len(rows)
    return sums, patch


def _added(files: Files, model: Model, name: str, skip: int) -> Tensor:
    """What the deltas of a tensor after the first `skip` add to it, float32."""
    info = model.tensors[name]
    out = torch.zeros(info.numel)
    chain(files, Scales(files), info, model.deltas[name], skip=skip).add_into(0, out)
    return out.view(info.shape)


def _span(files: Files, old: Model, name: str, deltas: Sequence[Delta]) -> tuple[Tensor, Tensor] | None:
    """Orthonormal bases of column and row space of low-rank deltas' sum, float64; None if one is of another sort."""
    below, info = old.deltas.get(name, ()), old.tensors[name]
    pairs = [
        exact_factors(files, delta, chain(files, Scales(files), info, (*below, *deltas[:number])).top)
        for number, delta in enumerate(deltas)
    ]
    if not pairs or any(pair is None for pair in pairs):
        return None
    b = torch.cat([pair[0].double() for pair in pairs if pair is not None], 1)
    a = torch.cat([pair[1].double() for pair in pairs if pair is not None], 0)
    left, small = torch.linalg.qr(b)
    right, other = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(small @ other.T, full_matrices=False)
    rank = int((s > _TINY * s[:1]).sum()) if len(s) and s[0] > 0 else 0
    return left @ u[:, :rank], right @ vh[:rank].T


def _layer(name: str) -> str:
    found = layer_of(name)
    return f"{found[0]}.{found[1]}".lstrip(".") if found is not None else module_kind(name)


def _depth(item: tuple[str, Sums]) -> tuple[bool, str, int]:
    head, _, number = item[0].rpartition(".")
    return (not number.isdecimal(), head, int(number)) if number.isdecimal() else (True, item[0], 0)


def _tokens(opened: Opened) -> str:
    """How the tokenizers compare, in a line."""
    new, old = opened.new.config_directory, opened.old.config_directory
    if new is None or old is None:
        return "no tokenizers: bare files"
    if not tokenizer_files(new) and not tokenizer_files(old):
        return "no tokenizer files"
    if tokenizer_hash(new) == tokenizer_hash(old):
        return "the same tokenizer files"
    try:
        before, after = (tokenizers.tokens_of(tokenizers.load(place, str(place))[0]) for place in (old, new))
    except ModelError as error:
        return f"not compared: {error.message}"
    same = sum(after.get(token) == row for token, row in before.items())
    moved = sum(token in after and after[token] != row for token, row in before.items())
    return (
        f"{len(before)} tokens before, {len(after)} now: {same} with the same id, {moved} with another, "
        f"{len(before) - same - moved} gone, {len(after.keys() - before.keys())} new"
    )
