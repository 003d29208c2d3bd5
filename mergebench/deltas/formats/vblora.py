"""VB-LoRA as PEFT saves it: a bank of vectors, and a module's logits or the vectors that these chose."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.vector_bank import vector_bank


@peft_type(
    "VBLORA",
    bank="vblora_vector_bank",
    logits_a="vblora_logits_A",
    logits_b="vblora_logits_B",
    chosen_a=r"vblora_logits_A(?:\.default)?_topk_indices",
    chosen_b=r"vblora_logits_B(?:\.default)?_topk_indices",
    weights_a=r"vblora_logits_A(?:\.default)?_topk_weights",
    weights_b=r"vblora_logits_B(?:\.default)?_topk_weights",
    shared=("bank",),
)
def vblora(module: Module) -> Iterator[Change]:
    """The pieces of a module's factors."""
    topk = module.config.get("topk")
    if not isinstance(topk, int):
        raise module.error(f"topk is {topk!r}")
    parts = {"bank": module.part("bank", None, None)}
    for factor in "ab":
        if f"logits_{factor}" in module.parts:
            parts[f"logits_{factor}"] = module.part(f"logits_{factor}", None, None, None)
        else:
            parts[f"chosen_{factor}"] = module.part(f"chosen_{factor}", None, None, topk, floats=False)
            parts[f"weights_{factor}"] = module.part(f"weights_{factor}", None, None, topk - 1)
    yield Change(vector_bank, parts, {"topk": topk, "columns": module.in_out})
