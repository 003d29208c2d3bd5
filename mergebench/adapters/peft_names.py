"""PEFT's names of a model's modules: those of the transformers class, which may add a prefix to the files' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate

from mergebench.checkpoint.layouts import build, in_memory, renamed
from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError

# as most language models in transformers call them: no need to load it
_COMMON = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


def modules_of(model: Model, weights: Iterable[str]) -> dict[str, str]:
    """The modules of weights as the class that config.json names calls them, whose names PEFT takes.

    GPT-2's files say `h.0.attn.c_attn`, a GPT2LMHeadModel `transformer.h.0.attn.c_attn`; transformers loads either.
    Without weights that the class holds in another form, such as experts in one tensor. If the class is not available,
    by the files' names.
    """
    plain = {name: name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    if all(_COMMON.fullmatch(module) for module in plain.values()):
        return plain
    names = renamed(in_memory(model.tensors, model.config), {name: info.shape for name, info in model.tensors.items()})
    return {name: names[name].removesuffix(".weight") for name in plain if name in names} if names else plain


def without_layer(model: Model, modules: Collection[str]) -> set[str]:
    """Those of the modules that are no linear layers in the class: experts apart, routers. None if it is not known."""
    if all(_COMMON.fullmatch(module) for module in modules):
        return set()
    built = build(model.config)
    if built is None:
        return set()
    layers = {name for name, module in built.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    return set(modules) - layers


def targets_of(model: Model, modules: Collection[str]) -> list[str]:
    """What PEFT's `target_modules` can say to mean these modules and no others: the ends of their names, as `q_proj`,
    where no other module's name ends so.

    Whole names in a model with experts, because PEFT takes the ends of theirs for what the class fuses.
    """
    every = _all_modules(model)
    if every is None or any(".experts." in name for name in model.tensors):
        return sorted(modules)
    others = {end for other in every.difference(modules) for end in _ends(other)}
    return sorted({next((end for end in _ends(module) if end not in others), module) for module in modules})


def _all_modules(model: Model) -> set[str] | None:
    """The names of all modules of the class; None if it is not known."""
    names = [name for name in model.tensors if name.endswith(".weight")]
    if any(_COMMON.fullmatch(name.removesuffix(".weight")) for name in names):
        return {above for name in names for above in accumulate(name.split(".")[:-1], "{}.{}".format)}
    built = build(model.config)
    return None if built is None else {name for name, _ in built.named_modules()}


def _ends(module: str) -> Iterator[str]:
    """`dense`, `output.dense`, ..., the whole name; without ends that hold a number."""
    parts = module.split(".")
    last = next((at for at in reversed(range(len(parts))) if parts[at].isdigit()), -1)
    yield from (".".join(parts[at:]) for at in range(len(parts) - 1, last, -1))
    yield module


def task_type(model: Model) -> str | None:
    """PEFT's task type for the model, if it does not change which tensors are saved."""
    return "CAUSAL_LM" if _class_name(model).endswith(("ForCausalLM", "LMHeadModel")) else None


def _class_name(model: Model) -> str:
    return str((model.config.get("architectures") or [""])[0])


def stored_in_out(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these weights of linear layers are stored [in, out], as GPT-2's are: a bias has `out` elements.
    `ModelError` if the layers differ."""
    found = set()
    for name, (rows, columns) in shapes.items():
        bias = model.tensors.get(f"{name.removesuffix('.weight')}.bias")
        if bias is not None and rows != columns and bias.shape in ((rows,), (columns,)):
            found.add(bias.shape == (columns,))
    if len(found) > 1:
        raise ModelError(f"{model.reference}: some linear layers are stored [in, out], others [out, in]")
    return True in found
