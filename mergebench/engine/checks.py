"""What a plan refuses before models are compared: their number and kind, and what a result cannot be written as."""

from __future__ import annotations

from mergebench.checkpoint.encoded import Encoded, encoded
from mergebench.checkpoint.quantized import check_not_packed
from mergebench.engine.job import Merge
from mergebench.engine.method import Method
from mergebench.errors import ModelError, RecipeError, human


def check_models(merge: Merge) -> None:
    """`RecipeError` if a method does not take such models, `ModelError` for types that are not read."""
    method, count = merge.method, len(merge.models)
    if method.needs_base and merge.base is None:
        raise RecipeError(f"base_model: '{method.name}' merges task vectors and needs a base")
    vector = next((model for model in merge.models if model.is_task_vector), None)
    if merge.base is None and vector is not None:
        raise RecipeError(f"base_model: missing, '{vector.reference}' is a difference to it")
    if merge.base is not None and merge.base.is_task_vector:
        raise RecipeError(f"base_model: '{merge.base.reference}' is a difference to a base, no model")
    if method.models is not None and count != method.models:
        wanted = f"{method.models} model{'s' * (method.models > 1)}"
        beside = " besides the base" if merge.from_base else ""
        hint = "base_model counts as one of them" if merge.base is not None and not merge.from_base else None
        raise RecipeError(f"models: '{method.name}' takes exactly {wanted}{beside}, got {count}", hint)
    if count == 0:
        raise RecipeError("models: no model to merge")
    for model in [*merge.models, merge.reference]:
        check_not_packed(model, merge.wanted)
        for info in model.tensors.values():
            if info.dtype.startswith("F8") and not info.is_float and merge.wanted(info.name):
                raise ModelError(f"{info.name}: {model.reference} has {info.dtype}: this type is not supported yet")


def encoded_of(merge: Merge) -> Encoded:
    """What the recipe wants in eight or four bits."""
    if merge.encoding is None or not merge.adds_base:
        return Encoded()
    if merge.method.gives == "deltas":
        raise RecipeError(f"out_dtype: {merge.encoding}: '{merge.method.name}' writes no model", "leave it out")
    if merge.edits or merge.copies:
        raise RecipeError(f"out_dtype: {merge.encoding}: edits change bfloat16 or float32", "leave it out")
    if merge.reference.is_task_vector:
        raise RecipeError(f"out_dtype: {merge.encoding}: the result is a difference, no model", "leave it out")
    return encoded(merge.reference, merge.encoding)


def check_memory(method: Method, needed: int, memory: int) -> None:
    """`RecipeError` if a merge needs more bytes than it is given."""
    if needed > memory:
        what = f"--memory {human(memory).replace(' ', '')}: '{method.name}' needs at least {-(-needed // 10**6)}MB here"
        raise RecipeError(what, "give it more memory, or fewer --workers")
