"""The PEFT types that have no format, and why: each in half a sentence."""

from __future__ import annotations

_PROMPT = "its tensors are prompts, read before the input"

# What they add to a layer depends on its input.
NO_DIFFERENCE = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": "its tensors are keys and values that attention reads before the input's",
    "CARTRIDGE": "its tensors are keys and values that attention reads before the input's",
    "ADAPTION_PROMPT": "its tensors are prompts that attention reads in some layers",
    "POLY": "its LoRAs are mixed by the input's task",
    "XLORA": "its LoRAs are mixed for each token",
    "LILY": "its factors are mixed by what the layer reads",
    "SHADOW": "it is a network that runs beside the model",
}

# They change weights, by numbers that PEFT computes again from the base and saves nowhere.
NOT_IN_THE_FILE = {
    "PSOFT": "its factors are singular vectors of the base, and their signs are not saved",
    "ADAMSS": "which rows it changes comes from a random clustering that is not saved",
}


def why_refused(kind: object) -> str | None:
    """Why there is no format for a PEFT type; None for types that have one or are unknown."""
    if isinstance(kind, str) and kind in NO_DIFFERENCE:
        return f"adapter type {kind} is no difference of weights: {NO_DIFFERENCE[kind]}"
    if isinstance(kind, str) and kind in NOT_IN_THE_FILE:
        return f"adapter type {kind} cannot be folded from its files: {NOT_IN_THE_FILE[kind]}"
    return None
