"""Super-Tuning as PEFT saves it: values [k], their flat positions, int32 [k], and for Supra two factors of a LoRA."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import Part
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.scattered import scattered


@peft_type(
    "SUPERTUNING",
    values="supertuning_values",
    indices="supertuning_indices",
    A="supertuning_lora_A",
    B="supertuning_lora_B",
)
def supertuning(module: Module) -> Iterator[Change]:
    """The elements of a module that change; the factors' scale is alpha / r, alpha is 2 r if the config has none."""
    if "indices" not in module.parts:
        raise module.error(
            "save_precomputed_indices is off: which elements change is told by the order of the magnitudes that it was "
            "trained on, and equal magnitudes have none"
        )
    parts: dict[str, Part | TensorInfo | None] = {
        "values": module.part("values", None),
        "indices": module.parts["indices"],
    }
    scale = 1.0
    if module.config.get("r") or "A" in module.parts or "B" in module.parts:
        parts |= module.factors("B", "A")
        rank, alpha = module.parts["A"].shape[0], module.config.get("lora_alpha")
        if not rank or not isinstance(alpha, (int, float, type(None))):
            raise module.error(f"rank {rank} and lora_alpha {alpha!r} make no scale")
        scale = 2.0 if alpha is None else alpha / rank
    yield Change(scattered, parts, {"scale": scale})
