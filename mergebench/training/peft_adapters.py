"""Adapters that PEFT trains: its own layers in place of a network's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.deltas import formats
from mergebench.errors import ModelError, RecipeError, did_you_mean, first_line
from mergebench.plugins import need
from mergebench.training.attached import Attached, Base

FEATURES, COMPLETION = "FEATURE_EXTRACTION", "CAUSAL_LM"


def peft_adapter(base: Base, given: Mapping[str, Any]) -> Attached:
    """The adapter of a PEFT config, a mapping as adapter_config.json has it, on a network.

    `RecipeError` if PEFT has no such type or setting, `ModelError` if the adapter does not fit the model.
    """
    need("peft", "peft adapters")
    name = str(given["peft_type"]).upper()
    known = [kind.strip() for kind in formats.peft_types().split(",")]
    if name not in known:
        raise RecipeError(f"peft: peft_type: '{name}' cannot be folded later", did_you_mean(name, known))
    if name == "ADALORA":
        raise RecipeError(
            "peft: ADALORA: nothing would call its allocator: it would stay a LoRA of its first rank",
            "delta: {kind: adalora, init_rank: 12, target_rank: 8}",
        )
    return PeftAdapter(base, name, {key: value for key, value in given.items() if key != "peft_type"})


class PeftAdapter(Attached):
    """An adapter of PEFT's on a network."""

    def __init__(self, base: Base, name: str, settings: Mapping[str, Any]) -> None:
        import peft
        import torch

        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
        unknown = [key for key in settings if key not in kind.__dataclass_fields__]
        if unknown:
            raise RecipeError(
                f"peft: {name} has no '{unknown[0]}'", did_you_mean(unknown[0], kind.__dataclass_fields__)
            )
        causal = base.network.auto_class == "AutoModelForCausalLM"
        try:
            with warnings.catch_warnings(action="ignore"):
                torch.manual_seed(base.generator.initial_seed())  # PEFT draws from torch's own generator
                config = kind(**{"task_type": COMPLETION if causal else FEATURES, **settings})
                self.model: Any = peft.get_peft_model(base.network.module, config)
        except (TypeError, ValueError) as error:
            raise ModelError(f"peft: {name} on {base.model.reference}: {first_line(error)}") from None
        super().__init__({n: one for n, one in self.model.named_parameters() if one.requires_grad})
        if not self.parameters:
            raise RecipeError(f"peft: {name}: it has no trained parameter", "take inference_mode out")
        self._reference = base.model.reference

    def save(self, directory: Path) -> None:
        """PEFT's directory."""
        self.model.peft_config["default"].base_model_name_or_path = self._reference
        with warnings.catch_warnings(action="ignore"):
            self.model.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)
