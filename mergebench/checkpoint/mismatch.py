"""The error for models that do not fit together: one sentence, about the models if possible, else about tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergebench.checkpoint.align import Alignment, Problem
from mergebench.checkpoint.configs import alike
from mergebench.checkpoint.experts import read_experts
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.names import layer_of
from mergebench.errors import ModelError

_SIZES = (
    "hidden_size", "d_model", "n_embd", "dim", "num_hidden_layers", "num_layers", "n_layer", "n_layers",
    "intermediate_size", "d_ff", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
    "num_local_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip
_SHOWN = 3


class Mismatch(ModelError):
    """Models that do not fit together: a summary in the message, every mismatch in `problems`.

    problems: empty if whole models differ, because a list of tensors would add nothing.
    """

    def __init__(self, message: str, hint: str | None, problems: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.problems = list(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.hint, self.problems)


def describe(base: Model, models: Sequence[Model], alignment: Alignment) -> Mismatch:
    """The error for an alignment with problems."""
    problems = alignment.problems
    lines = [problem.text for problem in problems]
    more = f" (and {len(problems) - 1} more: see mergebench plan)" if len(problems) > 1 else ""
    for model in models:
        own = [problem for problem in problems if problem.model is model]
        if any(problem.kind != "tokens" for problem in own):
            other = _other_model(base, model, own)
            if other is not None:
                return Mismatch(other, "only models of one architecture and size merge")
            try:
                read_experts(base, model)
            except ModelError as error:
                return Mismatch(error.message, error.hint, lines)
            strange = _component(base, model) or _component(model, base) or _strange_names(model, own)
            if strange is not None:
                return Mismatch(*strange, lines)
    hint = "only models of one architecture merge; exclude the tensor to copy the base's"
    first = problems[0]
    if first.kind == "tokens":
        hint = "their vocabularies differ: add tokenizer_source: union (or base), or exclude the tensor"
    elif first.kind in ("missing", "extra") and len(problems) > 1:
        hint = _parts(base, problems) or hint
    elif all(problem.kind == "shape" and layer_of(problem.name) is None for problem in problems):
        globs = sorted({f'"{problem.name.rpartition(".")[0]}.*"' for problem in problems})
        hint = f"to merge the rest and keep the base's: exclude: [{', '.join(globs)}]" if len(globs) < 4 else hint
    return Mismatch(first.text + more, hint, lines)


def _other_model(base: Model, model: Model, problems: Sequence[Problem]) -> str | None:
    """The message for a model of another size or kind, as its config says."""
    ours, theirs = alike(base.config, model.config)
    kinds = [model.config.get("model_type"), base.config.get("model_type")]
    other_kind = None not in kinds and ours.get("model_type") != theirs.get("model_type")
    sizes = [
        f"{key} {theirs[key]} against {ours[key]}"
        for key in _SIZES
        if key in ours and key in theirs and theirs[key] != ours[key]
    ]
    fitting = sum(
        info.shape == base.tensors[name].shape for name, info in model.tensors.items() if name in base.tensors
    )
    few = 2 * fitting < min(len(base.tensors), len(model.tensors))
    if other_kind and (few or sizes):
        what = f"{model.reference} is of type {kinds[0]}, base of type {kinds[1]}"
        return f"{what}: {', '.join(sizes[:_SHOWN])}" if sizes else f"{what}, and few of their tensors fit"
    if sizes and (few or any(problem.kind == "shape" for problem in problems)):
        return f"{model.reference} is of another size than base: {', '.join(sizes[:_SHOWN])}"
    if sizes and all(problem.kind in ("missing", "extra") for problem in problems):
        return f"{model.reference} has other layers than base: {', '.join(sizes[:_SHOWN])}"
    return None


def _component(pipeline: Model, part: Model) -> tuple[str, str] | None:
    """The message for a pipeline and a component of one by itself."""
    for folder in pipeline.naming.folders if pipeline.naming.pipeline else ():
        if all(f"{folder}/{name}" in pipeline.tensors for name in part.tensors):
            what = f"{part.reference} is a component, {pipeline.reference} a pipeline of several"
            return what, f"merge it with {pipeline.reference}/{folder}, or name the whole pipeline that it is of"
    return None


def _strange_names(model: Model, problems: Sequence[Problem]) -> tuple[str, str] | None:
    """The message for a model with many tensors under names that no rule maps to the base's."""
    extra = [problem.name for problem in problems if problem.kind == "extra"]
    missing = [problem.name for problem in problems if problem.kind == "missing"]
    if min(len(extra), len(missing)) < _SHOWN:
        return None
    return (
        f"{model.reference} has {len(extra)} tensors that base does not have ({few(extra)}), "
        f"and lacks {len(missing)} of base's ({few(missing)})",
        "if they are the same tensors, rename them: no known rule leads from these names to those, or several do",
    )


def few(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])


def _parts(base: Model, problems: Sequence[Problem]) -> str | None:
    """A hint to `exclude` whole parts that only some models have (a vision tower, a head)."""
    odd = {problem.name for problem in problems}
    fitting = base.tensors.keys() - odd
    globs = set()
    for name in odd:
        folder = name.rpartition("/")[0]
        if folder and not any(one.startswith(f"{folder}/") for one in fitting):
            globs.add(f"{folder}/*")
            continue
        parts = name.split(".")
        heads = (".".join(parts[: depth + 1]) for depth in range(min(len(parts) - 1, 3)))
        own = next((head for head in heads if not any(one.startswith(f"{head}.") for one in fitting)), None)
        if own is None or any(part.isdigit() for part in own.split(".")[:-1]):
            return None  # a whole layer is a part, too: multi-token prediction adds one
        globs.add(f"{own}.*")
    if len(globs) > 4:
        return None
    listed = ", ".join(f'"{glob}"' for glob in sorted(globs))
    return f"to merge only what all have: exclude: [{listed}]"
