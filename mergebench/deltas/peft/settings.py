"""The settings in a PEFT config that a fold depends on: each must be of its type, so that a damaged one is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergebench.errors import ModelError

_FLAGS = (
    "apply_GS", "block_share", "coft", "ensure_weight_tying", "fan_in_fan_out", "lora_bias", "para", "save_indices",
    "save_projection", "use_cayley_neumann", "use_dora", "use_idwt", "use_rslora",
)  # fmt: skip
_WHOLE = (
    "depth", "group_size", "init_r", "mini_r", "num_cayley_neumann_terms", "projection_prng_key", "projection_seed",
    "r", "random_loc_seed", "topk",
)  # fmt: skip
_NUMBERS = ("alpha", "eps", "lora_alpha", "randlora_alpha", "scaling", "weight_tying")
_WORDS = ("act_fn", "bias", "decomposition_method", "variant", "wavelet_family")


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(_number(one) for one in value.values())


def _names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


_SORTS: tuple[tuple[tuple[str, ...], str, Callable[[object], bool]], ...] = (
    (_FLAGS, "be true or false", lambda value: isinstance(value, bool)),
    (_WHOLE, "be a whole number", lambda value: type(value) is int),
    (_NUMBERS, "be a number", _number),
    (_WORDS, "be a word", lambda value: isinstance(value, str)),
    (("alpha_pattern",), "map modules to numbers", _numbers),
    (("rank_pattern",), "map modules to values", lambda value: isinstance(value, dict)),
    (("modules_to_save", "target_parameters"), "be a list of names", _names),
)


def check_settings(file: Path, config: Mapping[str, Any]) -> None:
    """`ModelError` if a setting is of another type; null and missing ones are the default's business."""
    for names, wanted, fits in _SORTS:
        for name in names:
            value = config.get(name)
            if value is not None and not fits(value):
                raise ModelError(f"{file}: {name} is {value!r}, it must {wanted}")
