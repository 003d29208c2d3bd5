"""Adapters that PEFT trains: its own layers in place of a network's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.files import read_tensors
from mergebench.deltas import formats
from mergebench.deltas.peft.directory import read_directory
from mergebench.errors import ModelError, RecipeError, did_you_mean, first_line
from mergebench.plugins import need
from mergebench.training.attached import SAME, Attached, Base

ELSEWHERE = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
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

    def load(self, directory: Path) -> None:
        """The values of an adapter of the same configuration."""
        import peft

        config, tensors = read_directory(directory)
        ours = _plain(self.model.peft_config["default"].to_dict())
        theirs = _plain({**ours, **config})
        other = next((key for key in ours if key not in ELSEWHERE and theirs[key] != ours[key]), None)
        if other is not None:
            what = f"from: {directory}: its {other} is {theirs[other]}, here it is {ours[other]}"
            raise RecipeError(what, SAME)
        loaded: Any = peft.set_peft_model_state_dict(self.model, read_tensors(tensors))
        missing = [name for name in loaded.missing_keys if name in self.parameters]
        if missing or loaded.unexpected_keys:
            name = [*missing, *loaded.unexpected_keys][0]
            raise RecipeError(f"from: {directory}: {name} is trained there or here, not in both", SAME)

    def save(self, directory: Path) -> None:
        """PEFT's directory."""
        self.model.peft_config["default"].base_model_name_or_path = self._reference
        with warnings.catch_warnings(action="ignore"):
            self.model.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as its file has it; sets in order."""
    found: dict[str, Any] = json.loads(json.dumps(config, default=lambda one: sorted(map(str, one))))
    return {key: sorted(one, key=str) if isinstance(one, list) else one for key, one in found.items()}
